"""The Triton kernels of a model's own parts: norms, rotary embedding, and the loss."""

from __future__ import annotations

import torch

from benchmarks.gpu_case import Case
from benchmarks.gpu_launches import Sizes, fp32, half

GROUP = 4  # query heads to a head of keys


def rms_norm(sizes: Sizes, arch: int, backward: bool = False) -> None:
    from fusetune._triton.rms_norm import launch_rms_norm, launch_rms_norm_dx

    m, n, _ = sizes
    x, y, weight, rstd = half(arch, m, n), half(arch, m, n), half(arch, n), fp32(m)
    if backward:
        launch_rms_norm_dx(y, x, weight, rstd, half(arch, m, n))
        return
    launch_rms_norm(x, weight, 1e-5, y, rstd)


def rotary(sizes: Sizes, arch: int) -> None:
    """m tokens of n heads, of k elements each."""
    from fusetune._triton.rotary import launch_rotary

    m, n, k = sizes
    query, key = (half(arch, 1, m, heads, k).transpose(1, 2) for heads in (n, n // GROUP))
    cos, sin = half(arch, 1, m, k), half(arch, 1, m, k)
    launch_rotary(query, key, cos, sin, False)


def cross_entropy(sizes: Sizes, arch: int, backward: bool = False) -> None:
    from fusetune._triton.cross_entropy import (
        launch_cross_entropy,
        launch_cross_entropy_backward,
    )

    m, v, _ = sizes
    logits, target = half(arch, m, v), torch.zeros(m, dtype=torch.int64)
    if backward:
        launch_cross_entropy_backward(fp32(m), logits, target, fp32(m), -100, 0.0, logits)
        return
    launch_cross_entropy(logits, target, -100, 0.0)


MODEL = (
    *(
        Case(
            kernel.removeprefix("_"),
            "triton",
            kernel,
            lambda s, arch, backward=backward: rms_norm(s, arch, backward),
            ("wide loads", "wide stores"),
            small=Sizes(128, 2048, 0),
            full=Sizes(4096, 4096, 0),
            compulsory=lambda s, matrices=matrices: 2 * matrices * s.m * s.n,
            within=1.02,
        )
        for kernel, backward, matrices in (("_rms_norm", False, 2), ("_rms_norm_dx", True, 3))
    ),
    Case(
        "rotary",
        "triton",
        "_rotary",
        rotary,
        ("wide loads", "wide stores"),
        small=Sizes(128, 8, 64),
        full=Sizes(4096, 32, 128),
        compulsory=lambda s: 4 * s.m * s.k * (s.n + s.n // GROUP + 1),
        within=1.0,
    ),
    *(
        Case(
            kernel.removeprefix("_"),
            "triton",
            kernel,
            lambda s, arch, backward=backward: cross_entropy(s, arch, backward),
            needs,
            small=Sizes(8, 8192, 0),
            full=Sizes(4096, 128256, 0),
            compulsory=lambda s, matrices=matrices: 2 * matrices * s.m * s.n,
            within=1.02,
        )
        for kernel, backward, matrices, needs in (
            ("_cross_entropy", False, 1, ("wide loads",)),
            ("_cross_entropy_backward", True, 2, ("wide loads", "wide stores")),
        )
    ),
)
