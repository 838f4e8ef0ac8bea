"""The Triton kernels of adapters, their fusion, gated MLPs, prefixes and prompts."""

from __future__ import annotations

import torch

from benchmarks import gpu_bottleneck as bottleneck
from benchmarks import gpu_launches as launches
from benchmarks import gpu_prompts as prompts
from benchmarks.gpu_case import MATMUL, PIPELINED, WIDE, Case
from benchmarks.gpu_launches import DROPOUT, Sizes

BERT_ADAPTER = Sizes(4096, 48, 768)
WIDE_ADAPTER = Sizes(2048, 64, 4096)

METHODS = (
    *(
        Case(
            name,
            "triton",
            "_bottleneck",
            call,
            PIPELINED,
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
                MATMUL,
                bottleneck.backward_bytes,
            ),
            (
                "bottleneck_backward, dropout",
                "_backward",
                lambda s, arch: bottleneck.backward(s, arch, DROPOUT),
                MATMUL,
                bottleneck.backward_bytes,
            ),
            ("bottleneck_backward, sums", "_sum_shares", bottleneck.backward, WIDE, None),
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
            ("prefix_attend", "_prefix_attend", prompts.prefix_attend, MATMUL),
            (
                "prefix_attend, fp32 prefix, dropout",
                "_prefix_attend",
                lambda s, arch: prompts.prefix_attend(s, arch, prefix=torch.float32, dropout=True),
                MATMUL,
            ),
            (
                "prefix_attend_backward",
                "_prefix_attend_backward",
                lambda s, arch: prompts.prefix_attend(s, arch, backward=True),
                MATMUL,
            ),
            (
                "prefix_attend_backward, fp32 prefix",
                "_prefix_attend_backward",
                lambda s, arch: prompts.prefix_attend(s, arch, True, torch.float32),
                MATMUL,
            ),
            (
                "prefix_attend_backward, sums",
                "_sum_prefix",
                lambda s, arch: prompts.prefix_attend(s, arch, backward=True),
                WIDE,
            ),
        )
    ),
    Case(
        "prefix_attend_backward, fp32 prefix, all options",
        "triton",
        "_prefix_attend_backward",
        lambda s, arch: prompts.prefix_attend(s, arch, True, torch.float32, every=True),
        MATMUL,
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
