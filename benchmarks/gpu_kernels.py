"""Every GPU kernel at a fixed shape: what tests/compile gates and benchmarks.bound calculates with.

A case calls a launcher, as the ops do, with tensors on the CPU; it runs inside one of
`fusetune.sim`'s drivers, which compiles the kernel, or executes it and counts. Dense operands have
two bytes an element, the adapter r = 16; weights are NF4 in blocks of 64 with nested statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch

from fusetune.ops import _cuda, _triton
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.dropout import threshold_and_scale

Tensor = torch.Tensor
Backend = Literal["triton", "cuda"]

RANK = 16
DROPOUT = 0.1


class Sizes(NamedTuple):
    """M rows of x [M, K] times W [N, K]."""

    m: int
    n: int
    k: int


FULL = Sizes(4096, 4096, 4096)
SMALL = Sizes(256, 256, 512)
_ADAPTER = Sizes(4096, 48, 768)


@dataclass(frozen=True)
class Case:
    """One kernel in one use of it.

    kernel: its name, of the launches that `call` makes. needs: what has to be among its machine
    instructions, see benchmarks/budgets.py; newest: the tensor cores of the newest kind, where an
    architecture has several. small: sizes at which it is executed and counted; it is compiled for
    those of `full`.
    """

    name: str
    backend: Backend
    kernel: str
    call: Callable[[Sizes, int], None]  # sizes, architecture
    needs: tuple[str, ...] = ()
    newest: bool = False
    small: Sizes = SMALL
    full: Sizes = FULL


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros: no count depends on dense operands. Large ones cost nothing until they are touched."""
    return torch.zeros(shape, dtype=dtype)


@cache
def weight(n: int, k: int) -> QuantizedWeight:
    """Random codes: how often look-ups meet in a bank depends on them."""
    random = torch.Generator().manual_seed(n + k)
    byte = {"dtype": torch.uint8, "generator": random}
    blocks = n * k // 64
    return QuantizedWeight(
        packed=torch.randint(256, (n * k // 2,), **byte),  # type: ignore[call-overload]
        absmax=torch.randint(256, (blocks,), **byte),  # type: ignore[call-overload]
        quant_type="nf4",
        blocksize=64,
        shape=torch.Size((n, k)),
        dtype=torch.bfloat16,
        nested_absmax=torch.full((-(-blocks // 256),), 0.01),
        nested_code=torch.linspace(-1, 1, 256),
        nested_offset=torch.tensor(0.03),
    )


def plain_weight(n: int, k: int) -> QuantizedWeight:
    """The same with an absmax in fp32."""
    nested = weight(n, k)
    absmax = torch.full((n * k // 64,), 0.03)
    return QuantizedWeight(nested.packed, absmax, "nf4", 64, nested.shape, nested.dtype)


# --- Triton ---------------------------------------------------------------------------------------


def _dequantize(sizes: Sizes, arch: int, nested: bool = True) -> None:
    _, n, k = sizes
    _triton.dequantize_4bit(weight(n, k) if nested else plain_weight(n, k), tensor(n, k))


def _rows(sizes: Sizes, arch: int, merge: bool) -> None:
    from fusetune._triton.dequantize_4bit import launch_rows

    _, n, k = sizes
    a, b = tensor(RANK, k) if merge else None, tensor(n, RANK)
    out = tensor(n, k if merge else k + RANK)
    launch_rows(_triton.packed(weight(n, k)), n, k, lora_A=a, lora_B=b, scaling=2.0, out=out)


def _dora_norm(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.dora_norm import launch_dora_norm

    _, n, k = sizes
    norm = tensor(n, dtype=torch.float32)
    launch_dora_norm(_triton.packed(weight(n, k)), tensor(RANK, k), tensor(n, RANK), 2.0, norm)


def _mask(p: float) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, factor) as the launchers take them."""
    if not p:
        return None, 0, 1.0
    return torch.tensor([1]), *threshold_and_scale(p)


def _dropout(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.dropout import launch_dropout

    m, _, k = sizes
    x, kept, rest = (tensor(m, k) for _ in range(3))
    launch_dropout(x, kept, torch.tensor([1]), *threshold_and_scale(DROPOUT), rest)


def _shrink(
    sizes: Sizes, arch: int, count: int = 1, p: float = 0.0, adapter: torch.dtype = torch.bfloat16
) -> None:
    from fusetune._triton.lora_shrink import launch_lora_shrink

    m, _, k = sizes
    seed, threshold, factor = _mask(p)
    loras = [tensor(RANK, k, dtype=adapter) for _ in range(count)]
    seeds = None if seed is None else [seed] * count
    launch_lora_shrink(tensor(m, k), loras, seeds, threshold, factor, arch=arch)


def _ds_db(sizes: Sizes, arch: int, adapter: torch.dtype = torch.bfloat16) -> None:
    from fusetune._triton.lora_ds_db import launch_lora_ds_db

    m, n, _ = sizes
    s, ds = (tensor(m, RANK, dtype=torch.float32) for _ in range(2))
    b, db = (tensor(n, RANK, dtype=adapter) for _ in range(2))
    launch_lora_ds_db(tensor(m, n), b, s, 2.0, ds, db, arch=arch)


def _da(sizes: Sizes, arch: int, p: float = 0.0, adapter: torch.dtype = torch.bfloat16) -> None:
    from fusetune._triton._tile import terms
    from fusetune._triton.lora_da import launch_lora_da

    m, _, k = sizes
    out, ds = tensor(RANK, k, dtype=adapter), tensor(m, RANK, dtype=torch.float32)
    launch_lora_da(tensor(m, k), ds, out, *_mask(p), terms=terms(out, torch.bfloat16, arch))


def _sum_parts(sizes: Sizes, arch: int) -> None:
    from fusetune._triton._tile import sum_parts

    m, _, _ = sizes
    sum_parts(tensor(8, m, RANK, dtype=torch.float32), tensor(m, RANK), 2.0)


def _linear(sizes: Sizes, arch: int, dtype: torch.dtype = torch.bfloat16) -> None:
    from fusetune._triton.linear import Tail, launch_linear

    m, n, k = sizes
    tail = Tail(tensor(m, RANK, dtype=torch.float32), tensor(n, RANK, dtype=dtype), 2.0)
    x, w, y = (tensor(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
    launch_linear(x, w, y, arch=arch, tail=tail)


def _linear_dx(sizes: Sizes, arch: int, p: float = 0.0) -> None:
    from fusetune._triton.linear import Dropout, Tail, launch_linear

    m, n, k = sizes
    tail = Tail(tensor(m, RANK, dtype=torch.float32), tensor(RANK, k).T, 1.0)
    seed, threshold, factor = _mask(p)
    dropout = None if seed is None else Dropout(seed, threshold, factor)
    w = tensor(n, k)
    launch_linear(tensor(m, n), w.T, tensor(m, k), arch=arch, tail=tail, dropout=dropout)


def _bottleneck(sizes: Sizes, arch: int) -> None:
    """n: the bottleneck's width, k: the model's."""
    from fusetune._triton.bottleneck import launch_bottleneck

    m, d, h = sizes
    down, up = tensor(1, d, h), tensor(1, h, d)
    biases = tensor(1, d), tensor(1, h)
    launch_bottleneck(
        tensor(m, h), down, biases[0], up, biases[1], [m], "gelu", tensor(m, h), False, arch=arch
    )


def _bottleneck_backward(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.bottleneck_backward import launch_bottleneck_backward

    m, d, h = sizes
    down, up, z = tensor(1, d, h), tensor(1, h, d), tensor(m, d)
    dy, x = tensor(m, h), tensor(m, h)
    launch_bottleneck_backward(
        dy, x, down, up, z, [m], "gelu", False, need_dx=True, need_parameters=True, arch=arch
    )


def _attend(sizes: Sizes, arch: int, backward: bool = False) -> None:
    """n: how many adapters."""
    from fusetune._triton import adapter_fusion

    m, n, h = sizes
    g, values = tensor(m, h), [tensor(n, m, h)]
    if not backward:
        adapter_fusion.launch_fusion_attend(g, values, None, 1.0)
        return
    p = tensor(m, n, dtype=torch.float32)
    adapter_fusion.launch_fusion_attend_backward(g, g, values, p, 1.0, need_dvalues=True)


_WIDE = ("wide loads",)
_MATMUL = ("tensor cores", "wide loads")
_PIPELINED = ("tensor cores", "asynchronous copies")

TRITON = (
    Case("dequantize_4bit", "triton", "_dequantize", _dequantize, ("wide stores",)),
    Case(
        "dequantize_4bit, plain absmax",
        "triton",
        "_dequantize",
        lambda s, arch: _dequantize(s, arch, nested=False),
        ("wide stores",),
    ),
    Case(
        "dequantize_4bit, [W | s B]",
        "triton",
        "_dequantize_rows",
        lambda s, arch: _rows(s, arch, merge=False),
    ),
    Case(
        "dequantize_4bit, W + s B A",
        "triton",
        "_dequantize_rows",
        lambda s, arch: _rows(s, arch, merge=True),
    ),
    Case("dora_norm", "triton", "_dequantize_rows", _dora_norm),
    Case("lora_shrink", "triton", "_shrink", _shrink, _PIPELINED),
    Case(
        "lora_shrink, fp32 adapter",
        "triton",
        "_shrink",
        lambda s, arch: _shrink(s, arch, adapter=torch.float32),
        _PIPELINED,
    ),
    Case(
        "lora_shrink of q, k, v",
        "triton",
        "_shrink",
        lambda s, arch: _shrink(s, arch, count=3),
        _PIPELINED,
    ),
    Case(
        "lora_shrink, dropout",
        "triton",
        "_shrink",
        lambda s, arch: _shrink(s, arch, p=DROPOUT),
        _PIPELINED,
    ),
    Case("lora_ds_db", "triton", "_ds_db", _ds_db, _MATMUL),
    Case(
        "lora_ds_db, fp32 adapter",
        "triton",
        "_ds_db",
        lambda s, arch: _ds_db(s, arch, adapter=torch.float32),
        _MATMUL,
    ),
    Case("lora_da", "triton", "_da", _da, _PIPELINED),
    Case(
        "lora_da, fp32 adapter",
        "triton",
        "_da",
        lambda s, arch: _da(s, arch, adapter=torch.float32),
        _PIPELINED,
    ),
    Case("lora_da, dropout", "triton", "_da", lambda s, arch: _da(s, arch, p=DROPOUT), _PIPELINED),
    Case("dropout", "triton", "_dropout", _dropout, ("wide loads", "wide stores")),
    Case("sum_parts", "triton", "_sum_parts", _sum_parts, _WIDE),
    Case("linear with tail", "triton", "_linear", _linear, _PIPELINED, newest=True),
    Case(
        "linear with tail, few rows",
        "triton",
        "_linear",
        _linear,
        _PIPELINED,
        small=Sizes(32, 256, 512),
        full=Sizes(64, 4096, 4096),
    ),
    Case(
        "linear with tail, fp32",
        "triton",
        "_linear",
        lambda s, arch: _linear(s, arch, torch.float32),
        ("asynchronous copies",),
    ),
    Case("linear_dx with tail", "triton", "_linear", _linear_dx, _PIPELINED, newest=True),
    Case(
        "linear_dx with tail, dropout",
        "triton",
        "_linear",
        lambda s, arch: _linear_dx(s, arch, DROPOUT),
        _PIPELINED,
        newest=True,
    ),
    *(
        Case(name, "triton", kernel, call, needs, small=Sizes(128, 48, 768), full=_ADAPTER)
        for name, kernel, call, needs in (
            ("bottleneck", "_bottleneck", _bottleneck, _MATMUL),
            ("bottleneck_backward", "_backward", _bottleneck_backward, _MATMUL),
            ("bottleneck_backward, sums", "_sum_shares", _bottleneck_backward, _WIDE),
        )
    ),
    Case(
        "fusion_attend",
        "triton",
        "_attend",
        _attend,
        ("wide loads", "wide stores"),
        small=Sizes(16, 3, 768),
        full=Sizes(2048, 8, 768),
    ),
    Case(
        "fusion_attend_backward",
        "triton",
        "_attend_backward",
        lambda s, arch: _attend(s, arch, backward=True),
        ("wide loads", "wide stores"),
        small=Sizes(16, 3, 768),
        full=Sizes(2048, 8, 768),
    ),
)


# --- CUDA: fp16 on sm_75, which has no bf16 -------------------------------------------------------


def _half(arch: int) -> torch.dtype:
    return torch.bfloat16 if arch >= 80 else torch.float16


def _tail(m: int, right: Tensor) -> tuple[Tensor, Tensor, float]:
    return tensor(m, RANK, dtype=torch.float32), right, 2.0


def _cuda_linear(sizes: Sizes, arch: int, splits: int = 0) -> None:
    m, n, k = sizes
    x, b = tensor(m, k, dtype=_half(arch)), tensor(n, RANK, dtype=torch.float32)
    _cuda.linear_4bit(x, weight(n, k), None, _tail(m, b), splits)


def _cuda_linear_fp32(sizes: Sizes, arch: int) -> None:
    m, n, k = sizes
    b = tensor(n, RANK, dtype=torch.float32)
    _cuda.linear_4bit(tensor(m, k, dtype=torch.float32), weight(n, k), None, _tail(m, b))


def _cuda_dx(sizes: Sizes, arch: int, p: float = 0.0) -> None:
    m, n, k = sizes
    dropout = (p, torch.tensor([1])) if p else None
    tail = _tail(m, tensor(RANK, k, dtype=torch.float32))
    _cuda.linear_4bit_dx(tensor(m, n, dtype=_half(arch)), weight(n, k), tail, dropout, splits=1)


def _cuda_dequantize(sizes: Sizes, arch: int) -> None:
    _, n, k = sizes
    _cuda.dequantize_4bit(weight(n, k), tensor(n, k, dtype=_half(arch)))


CUDA = (
    Case(
        "linear_4bit, M = 1", "cuda", "linear_4bit_stream", _cuda_linear, small=Sizes(1, 256, 4096)
    ),
    Case(
        "linear_4bit, M = 8", "cuda", "linear_4bit_stream", _cuda_linear, small=Sizes(8, 256, 4096)
    ),
    *(
        Case(
            f"linear_4bit, M = {m}",
            "cuda",
            "linear_4bit_tile",
            lambda s, arch: _cuda_linear(s, arch, 1),
            small=Sizes(m, 256, 1024),
        )
        for m in (16, 32, 64)
    ),
    Case(
        "linear_4bit, split",
        "cuda",
        "sum_splits",
        lambda s, arch: _cuda_linear(s, arch, 4),
        small=Sizes(16, 256, 1024),
    ),
    Case(
        "linear_4bit, fp32",
        "cuda",
        "linear_4bit_fp32",
        _cuda_linear_fp32,
        small=Sizes(4, 256, 1024),
    ),
    *(
        Case(
            f"linear_4bit_dx, M = {m}", "cuda", "linear_4bit_dx", _cuda_dx, small=Sizes(m, 512, 256)
        )
        for m in (16, 32, 64)
    ),
    Case(
        "linear_4bit_dx, dropout",
        "cuda",
        "linear_4bit_dx",
        lambda s, arch: _cuda_dx(s, arch, DROPOUT),
        small=Sizes(64, 512, 256),
    ),
    Case("dequantize_4bit", "cuda", "dequantize_4bit", _cuda_dequantize),
)
