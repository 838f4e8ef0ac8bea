"""linear_cross_entropy on GPUs, its kernels simulated: blocks of rows, the last one short."""

from importlib import import_module

import pytest
import torch
from backends import TRITON
from cross_entropy_cases import DTYPES
from linear_cross_entropy_cases import assert_as_good_as_eager, inputs

from fusetune.ops._registry import OPS, Case


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(backend, dtype, monkeypatch):
    module = import_module("fusetune.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "_GPU_ROWS", 4)
    for bias in (False, True):
        for shape in ((1, 3, 5), (9, 20, 300)):
            given = inputs(*shape, dtype, bias)
            assert_as_good_as_eager(*given, reduction="none", label_smoothing=0.1)


def test_supported_cases():
    op = OPS["linear_cross_entropy"]
    case = Case("cuda", torch.float64, torch.float64)
    assert "float64" in dict(op.explain(case))["triton"]
