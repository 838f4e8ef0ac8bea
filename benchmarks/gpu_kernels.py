"""Every GPU kernel at a fixed shape: what tests/compile gates and benchmarks.bound calculates with.

A case calls a launcher, as the ops do, with tensors on the CPU; it runs inside one of
`fusetune.sim`'s drivers, which compiles the kernel, or executes it and counts. Dense operands have
two bytes an element, the adapter r = 16; weights are NF4 in blocks of 64 with nested statistics.
"""

from __future__ import annotations

import torch

from benchmarks import gpu_launches as launches
from benchmarks.gpu_case import MATMUL, PIPELINED, WIDE, Case
from benchmarks.gpu_kernels_methods import METHODS
from benchmarks.gpu_launches import DROPOUT, Sizes
from benchmarks.gpu_model import MODEL
from benchmarks.gpu_multi_lora import SEVERAL

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
    Case("lora_shrink", "triton", "_shrink", launches.shrink, PIPELINED),
    Case(
        "lora_shrink, fp32 adapter",
        "triton",
        "_shrink",
        lambda s, arch: launches.shrink(s, arch, adapter=torch.float32),
        PIPELINED,
    ),
    Case(
        "lora_shrink of q, k, v",
        "triton",
        "_shrink",
        lambda s, arch: launches.shrink(s, arch, count=3),
        PIPELINED,
    ),
    Case(
        "lora_shrink, dropout",
        "triton",
        "_shrink",
        lambda s, arch: launches.shrink(s, arch, p=DROPOUT),
        PIPELINED,
    ),
    Case("lora_ds_db", "triton", "_ds_db", launches.ds_db, MATMUL),
    Case(
        "lora_ds_db, fp32 adapter",
        "triton",
        "_ds_db",
        lambda s, arch: launches.ds_db(s, arch, adapter=torch.float32),
        MATMUL,
    ),
    Case("lora_da", "triton", "_da", launches.da, PIPELINED),
    Case(
        "lora_da, fp32 adapter",
        "triton",
        "_da",
        lambda s, arch: launches.da(s, arch, adapter=torch.float32),
        PIPELINED,
    ),
    *(
        Case(
            f"lora_da of q, k, v{name}",
            "triton",
            "_da",
            lambda s, arch, p=p: launches.da(s, arch, p, count=3),
            PIPELINED,
        )
        for name, p in (("", 0.0), (", dropout", DROPOUT))
    ),
    Case(
        "lora_da, dropout",
        "triton",
        "_da",
        lambda s, arch: launches.da(s, arch, p=DROPOUT),
        PIPELINED,
    ),
    Case("dropout", "triton", "_dropout", launches.dropout, ("wide loads", "wide stores")),
    Case("sum_parts", "triton", "_sum_parts", launches.sum_parts, WIDE),
    Case(
        "linear with tail",
        "triton",
        "_linear",
        launches.linear,
        PIPELINED,
        newest=True,
        turing=False,
    ),
    Case(
        "linear with tail, few rows",
        "triton",
        "_linear",
        launches.linear,
        PIPELINED,
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
        PIPELINED,
        newest=True,
        turing=False,
    ),
    Case(
        "linear_dx with tail, dropout",
        "triton",
        "_linear",
        lambda s, arch: launches.linear_dx(s, arch, DROPOUT),
        PIPELINED,
        newest=True,
        turing=False,
    ),
    *(
        Case(
            f"linear_dx added to dX{name}",
            "triton",
            "_linear",
            lambda s, arch, p=p: launches.linear_dx(s, arch, p, add=True),
            PIPELINED,
            newest=True,
            turing=False,
        )
        for name, p in (("", 0.0), (", dropout", DROPOUT))
    ),
    Case(
        "tail of linear_dx, dropout", "triton", "_linear", launches.dropped_tail, ("wide stores",)
    ),
    *SEVERAL,
    *METHODS,
    *MODEL,
)


CUDA = (
    *(
        Case(
            f"linear_4bit, M = {m}",
            "cuda",
            "linear_4bit_stream",
            launches.cuda_linear,
            small=Sizes(m, 256, 4096),
        )
        for m in (1, 8)
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
