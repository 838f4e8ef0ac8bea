"""Fused layers need a kernel: without one the reference is forced, which runs the same code."""

from contextlib import nullcontext

import pytest
import stock_peft
import torch

from fusetune import ops
from fusetune.integrations import (
    linear,
    transformers_attention,
    transformers_norm,
    transformers_rotary,
)

stock_peft.patch()

COUNTED = (
    "linear",
    "rms_norm",
    "rotary",
    "cross_entropy",
    "linear_cross_entropy",
    "dora_linear",
    "dropout",
    "glu",
    "ia3_linear",
    "importance",
    "linear_4bit",
    "lora_embedding",
    "lora_grouped_linear",
    "lora_linear",
    "lora_up",
    "multi_lora_linear",
    "orthogonality",
)


@pytest.fixture(autouse=True)
def _kernel():
    case = ops.Case("cpu", torch.float32)
    bare = ops.OPS["lora_linear"].select(case).name == "reference"
    with ops.use_backend("reference") if bare else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused ops in the order they were called: who took the fused path."""
    names = []

    def counting(name, op):
        def count(*args, **kwargs):
            names.append(name)
            return op(*args, **kwargs)

        return count

    for name in COUNTED:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    group = ops.lora_linear_group

    def count_each(x, projections, **options):
        names.extend(["lora_linear"] * len(projections))
        return group(x, projections, **options)

    monkeypatch.setattr(ops, "lora_linear_group", count_each)
    return names


@pytest.fixture
def stock_base(monkeypatch):
    """A base whose linear layers, norms, rotary and attention stay stock: the rest is alone."""
    stock = linear.FusedLinear, transformers_norm.FusedRMSNorm, transformers_rotary.FusedRotary
    for kind in stock:
        monkeypatch.setattr(kind, "accepts", classmethod(lambda cls, module: False))
    monkeypatch.setattr(transformers_attention, "install", lambda module, dropout: False)
