"""The Triton kernels that a T4 runs, compiled for sm_75: fp32 FMA in place of tensor cores, whose
operands all lie in registers. They must not spill."""

import itertools

import pytest
import torch

from fusetune.reference.dropout import threshold_and_scale

pytest.importorskip("triton")

from fusetune.sim import compile as offline
from fusetune.sim.run import accept_cpu_tensors

SIZE = 4096
HALF, F32 = torch.float16, torch.float32


def zeros(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype)


def mask(p):
    return (torch.tensor([1]), *threshold_and_scale(p)) if p else (None, 0, 1.0)


def shrink(r, p, adapter, k):
    from fusetune._triton.lora_shrink import launch_lora_shrink

    seed, threshold, factor = mask(p)
    seeds = None if seed is None else [seed]
    lora_A = zeros(r, k, dtype=adapter)
    launch_lora_shrink(zeros(SIZE, k), [lora_A], seeds, threshold, factor, arch=75)


def ds_db(r, p, adapter, k):
    from fusetune._triton.lora_ds_db import launch_lora_ds_db

    b, db = (zeros(k, r, dtype=adapter) for _ in range(2))
    s, ds = (zeros(SIZE, r, dtype=F32) for _ in range(2))
    launch_lora_ds_db(zeros(SIZE, k), b, s, 2.0, ds, db, arch=75)


def da(r, p, adapter, k):
    from fusetune._triton.lora_da import launch_lora_da

    out, ds = zeros(r, k, dtype=adapter), zeros(SIZE, r, dtype=F32)
    seed, threshold, factor = mask(p)
    seeds = None if seed is None else [seed]
    launch_lora_da(zeros(SIZE, k), [ds], [out], seeds, threshold, factor, terms=0)


def masked_tail(r, p, adapter, k):
    from fusetune._triton.linear import Dropout, Tail, launch_linear

    tail = Tail(zeros(SIZE, r, dtype=F32), zeros(r, k, dtype=adapter).T, 1.0)
    launch_linear(None, None, zeros(SIZE, k), arch=75, tail=tail, dropout=Dropout(*mask(p)))


def dropout(p, k):
    from fusetune._triton.dropout import launch_dropout

    x, kept, rest = (zeros(SIZE, k) for _ in range(3))
    launch_dropout(x, kept, *mask(p), rest)


@pytest.mark.parametrize("k", [SIZE, SIZE + 3])
def test_dropout_spills_nothing(k):
    with offline.triton_kernels(75) as kernels, accept_cpu_tensors("triton"):
        dropout(0.1, k)
    (kernel,) = kernels
    assert kernel.usage.spills == 0


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize(
    ("launch", "p"),
    [(shrink, 0.0), (shrink, 0.1), (ds_db, 0.0), (da, 0.0), (da, 0.1), (masked_tail, 0.1)],
)
def test_no_register_is_spilled(launch, p, r):
    """Of all kernels at once: see sim/compile.py."""
    launched = []
    with offline.triton_kernels(75) as kernels, accept_cpu_tensors("triton"):
        for case in itertools.product((HALF, F32), (SIZE, SIZE + 3)):
            launch(r, p, *case)
            launched += [case] * (len(kernels) - len(launched))
    assert len({*launched}) == 4
    for case, kernel in zip(launched, kernels, strict=True):
        assert kernel.usage.spills == 0, (kernel.name, *case)
        assert kernel.usage.shared <= 64 * 1024, (kernel.name, *case)
