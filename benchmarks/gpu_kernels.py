"""Every GPU kernel at a fixed shape: what tests/compile gates and benchmarks.bound calculates with.

A case calls a launcher, as the ops do, with tensors on the CPU; it runs inside one of
`fusetune.sim`'s drivers, which compiles the kernel, or executes it and counts. Dense operands have
two bytes an element, the adapter r = 16; weights are NF4 in blocks of 64 with nested statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch

from benchmarks import gpu_bottleneck as bottleneck
from benchmarks import gpu_launches as launches
from benchmarks import gpu_prompts as prompts
from benchmarks.gpu_launches import DROPOUT, Sizes

Backend = Literal["triton", "cuda"]

FULL = Sizes(4096, 4096, 4096)
SMALL = Sizes(256, 256, 512)
BERT_ADAPTER = Sizes(4096, 48, 768)
WIDE_ADAPTER = Sizes(2048, 64, 4096)


@dataclass(frozen=True)
class Case:
    """One kernel in one use of it.

    kernel: its name, of the launches that `call` makes. needs: what has to be among its machine
    instructions, see benchmarks/budgets.py; newest: the tensor cores of the newest kind, where an
    architecture has several. small: sizes at which it is executed and counted; it is compiled for
    those of `full`. turing: whether the ops offer it on sm_75. compulsory: the least that it has to
    move at given sizes, in bytes; memory may have to move `within` times that.
    """

    name: str
    backend: Backend
    kernel: str
    call: Callable[[Sizes, int], None]  # sizes, architecture
    needs: tuple[str, ...] = ()
    newest: bool = False
    small: Sizes = SMALL
    full: Sizes = FULL
    turing: bool = True
    compulsory: Callable[[Sizes], int] | None = None
    within: float = inf

    def archs(self, known: Iterable[int]) -> list[int]:
        """Of the architectures, those on which the ops offer it."""
        return [arch for arch in known if arch >= 80 or self.turing]


_WIDE = ("wide loads",)
_MATMUL = ("tensor cores", "wide loads")
_PIPELINED = ("tensor cores", "asynchronous copies")

TRITON = (
    Case("dequantize_4bit", "triton", "_dequantize", launches.dequantize, ("wide stores",)),
    Case(
        "dequantize_4bit, plain absmax",
        "triton",
        "_dequantize",
        lambda s, arch: launches.dequantize(s, arch, nested=False),
        ("wide stores",),
    ),
    Case(
        "dequantize_4bit, [W | s B]",
        "triton",
        "_dequantize_rows",
        lambda s, arch: launches.rows(s, arch, merge=False),
    ),
    Case(
        "dequantize_4bit, W + s B A",
        "triton",
        "_dequantize_rows",
        lambda s, arch: launches.rows(s, arch, merge=True),
    ),
    Case("dora_norm", "triton", "_dequantize_rows", launches.dora_norm),
    Case("lora_shrink", "triton", "_shrink", launches.shrink, _PIPELINED),
    Case(
        "lora_shrink, fp32 adapter",
        "triton",
        "_shrink",
        lambda s, arch: launches.shrink(s, arch, adapter=torch.float32),
        _PIPELINED,
    ),
    Case(
        "lora_shrink of q, k, v",
        "triton",
        "_shrink",
        lambda s, arch: launches.shrink(s, arch, count=3),
        _PIPELINED,
    ),
    Case(
        "lora_shrink, dropout",
        "triton",
        "_shrink",
        lambda s, arch: launches.shrink(s, arch, p=DROPOUT),
        _PIPELINED,
    ),
    Case("lora_ds_db", "triton", "_ds_db", launches.ds_db, _MATMUL),
    Case(
        "lora_ds_db, fp32 adapter",
        "triton",
        "_ds_db",
        lambda s, arch: launches.ds_db(s, arch, adapter=torch.float32),
        _MATMUL,
    ),
    Case("lora_da", "triton", "_da", launches.da, _PIPELINED),
    Case(
        "lora_da, fp32 adapter",
        "triton",
        "_da",
        lambda s, arch: launches.da(s, arch, adapter=torch.float32),
        _PIPELINED,
    ),
    *(
        Case(
            f"lora_da of q, k, v{name}",
            "triton",
            "_da",
            lambda s, arch, p=p: launches.da(s, arch, p, count=3),
            _PIPELINED,
        )
        for name, p in (("", 0.0), (", dropout", DROPOUT))
    ),
    Case(
        "lora_da, dropout",
        "triton",
        "_da",
        lambda s, arch: launches.da(s, arch, p=DROPOUT),
        _PIPELINED,
    ),
    Case("dropout", "triton", "_dropout", launches.dropout, ("wide loads", "wide stores")),
    Case("sum_parts", "triton", "_sum_parts", launches.sum_parts, _WIDE),
    Case(
        "linear with tail",
        "triton",
        "_linear",
        launches.linear,
        _PIPELINED,
        newest=True,
        turing=False,
    ),
    Case(
        "linear with tail, few rows",
        "triton",
        "_linear",
        launches.linear,
        _PIPELINED,
        small=Sizes(32, 256, 512),
        full=Sizes(64, 4096, 4096),
        turing=False,
    ),
    Case(
        "linear with tail, fp32",
        "triton",
        "_linear",
        lambda s, arch: launches.linear(s, arch, torch.float32),
        ("asynchronous copies",),
    ),
    Case(
        "linear_dx with tail",
        "triton",
        "_linear",
        launches.linear_dx,
        _PIPELINED,
        newest=True,
        turing=False,
    ),
    Case(
        "linear_dx with tail, dropout",
        "triton",
        "_linear",
        lambda s, arch: launches.linear_dx(s, arch, DROPOUT),
        _PIPELINED,
        newest=True,
        turing=False,
    ),
    *(
        Case(
            f"linear_dx added to dX{name}",
            "triton",
            "_linear",
            lambda s, arch, p=p: launches.linear_dx(s, arch, p, add=True),
            _PIPELINED,
            newest=True,
            turing=False,
        )
        for name, p in (("", 0.0), (", dropout", DROPOUT))
    ),
    Case(
        "tail of linear_dx, dropout", "triton", "_linear", launches.dropped_tail, ("wide stores",)
    ),
    *(
        Case(
            name,
            "triton",
            "_bottleneck",
            call,
            _PIPELINED,
            small=sizes,
            full=sizes,
            turing=False,
            compulsory=least,
            within=1.05,
        )
        for name, call, sizes, least in (
            ("bottleneck", bottleneck.forward, BERT_ADAPTER, bottleneck.forward_bytes),
            ("bottleneck, wide", bottleneck.forward, WIDE_ADAPTER, bottleneck.forward_bytes),
            (
                "bottleneck, other residual, dropout",
                lambda s, arch: bottleneck.forward(s, arch, same=False, p=DROPOUT),
                BERT_ADAPTER,
                bottleneck.other_residual_bytes,
            ),
        )
    ),
    *(
        Case(
            name,
            "triton",
            kernel,
            call,
            needs,
            small=BERT_ADAPTER,
            full=BERT_ADAPTER,
            turing=False,
            compulsory=least,
        )
        for name, kernel, call, needs, least in (
            (
                "bottleneck_backward",
                "_backward",
                bottleneck.backward,
                _MATMUL,
                bottleneck.backward_bytes,
            ),
            (
                "bottleneck_backward, dropout",
                "_backward",
                lambda s, arch: bottleneck.backward(s, arch, DROPOUT),
                _MATMUL,
                bottleneck.backward_bytes,
            ),
            ("bottleneck_backward, sums", "_sum_shares", bottleneck.backward, _WIDE, None),
        )
    ),
    Case(
        "fusion_attend",
        "triton",
        "_attend",
        launches.attend,
        ("wide loads", "wide stores"),
        small=Sizes(16, 3, 768),
        full=Sizes(2048, 8, 768),
    ),
    Case(
        "fusion_attend_backward",
        "triton",
        "_attend_backward",
        lambda s, arch: launches.attend(s, arch, backward=True),
        ("wide loads", "wide stores"),
        small=Sizes(16, 3, 768),
        full=Sizes(2048, 8, 768),
    ),
    *(
        Case(
            kernel.removeprefix("_"),
            "triton",
            kernel,
            lambda s, arch, backward=backward: launches.glu(s, arch, backward),
            ("wide loads", "wide stores"),
            small=Sizes(128, 2048, 0),
            full=Sizes(4096, 14336, 0),
            compulsory=lambda s, matrices=matrices: 2 * matrices * s.m * s.n,
            within=1.0,
        )
        for kernel, backward, matrices in (("_glu", False, 3), ("_glu_backward", True, 5))
    ),
    *(
        Case(
            name,
            "triton",
            kernel,
            call,
            needs,
            small=Sizes(64, 32, 64),
            full=Sizes(512, 32, 128),
        )
        for name, kernel, call, needs in (
            ("prefix_attend", "_prefix_attend", prompts.prefix_attend, _MATMUL),
            (
                "prefix_attend, fp32 prefix, dropout",
                "_prefix_attend",
                lambda s, arch: prompts.prefix_attend(s, arch, prefix=torch.float32, dropout=True),
                _MATMUL,
            ),
            (
                "prefix_attend_backward",
                "_prefix_attend_backward",
                lambda s, arch: prompts.prefix_attend(s, arch, backward=True),
                _MATMUL,
            ),
            (
                "prefix_attend_backward, fp32 prefix",
                "_prefix_attend_backward",
                lambda s, arch: prompts.prefix_attend(s, arch, True, torch.float32),
                _MATMUL,
            ),
            (
                "prefix_attend_backward, sums",
                "_sum_prefix",
                lambda s, arch: prompts.prefix_attend(s, arch, backward=True),
                _WIDE,
            ),
        )
    ),
    Case(
        "prefix_attend_backward, fp32 prefix, all options",
        "triton",
        "_prefix_attend_backward",
        lambda s, arch: prompts.prefix_attend(s, arch, True, torch.float32, every=True),
        _MATMUL,
        small=Sizes(64, 32, 64),
        full=Sizes(512, 128, 64),
    ),
    *(
        Case(
            name,
            "triton",
            kernel,
            lambda s, arch, backward=backward: prompts.prompt_embed(s, arch, backward),
            needs,
            small=Sizes(24, 8, 1024),
            full=Sizes(512, 20, 2048),
        )
        for name, kernel, backward, needs in (
            ("prompt_embed", "_prompt_embed", False, ()),
            ("prompt_embed_dprompt", "_dprompt", True, ()),
        )
    ),
)


CUDA = (
    Case(
        "linear_4bit, M = 1",
        "cuda",
        "linear_4bit_stream",
        launches.cuda_linear,
        small=Sizes(1, 256, 4096),
    ),
    Case(
        "linear_4bit, M = 8",
        "cuda",
        "linear_4bit_stream",
        launches.cuda_linear,
        small=Sizes(8, 256, 4096),
    ),
    *(
        Case(
            f"linear_4bit, M = {m}",
            "cuda",
            "linear_4bit_tile",
            lambda s, arch: launches.cuda_linear(s, arch, 1),
            small=Sizes(m, 256, 1024),
        )
        for m in (16, 32, 64)
    ),
    Case(
        "linear_4bit, split",
        "cuda",
        "sum_splits",
        lambda s, arch: launches.cuda_linear(s, arch, 4),
        small=Sizes(16, 256, 1024),
    ),
    Case(
        "linear_4bit, fp32",
        "cuda",
        "linear_4bit_fp32",
        launches.cuda_linear_fp32,
        small=Sizes(4, 256, 1024),
    ),
    *(
        Case(
            f"linear_4bit_dx, M = {m}",
            "cuda",
            "linear_4bit_dx",
            launches.cuda_dx,
            small=Sizes(m, 512, 256),
        )
        for m in (16, 32, 64)
    ),
    Case(
        "linear_4bit_dx, dropout",
        "cuda",
        "linear_4bit_dx",
        lambda s, arch: launches.cuda_dx(s, arch, DROPOUT),
        small=Sizes(64, 512, 256),
    ),
    Case("dequantize_4bit", "cuda", "dequantize_4bit", launches.cuda_dequantize),
)
