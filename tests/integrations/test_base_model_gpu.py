"""What is fused of a model without adapters, by the kernels for GPUs, simulated: in bf16 the errors
against float64 are the stock model's, and a launch each way does it.
"""

import copy
from importlib import import_module

import pytest
import tiny_models
import torch
from backends import simulated
from model_equality import assert_near, float64_copy

import fusetune
from fusetune import ops
from fusetune.integrations.transformers_lazy_logits import head_reason

OURS = {"_rms_norm": 5, "_rotary": 2, "_glu": 2, "_cross_entropy": 1}
BACKWARD = {"_rms_norm_dx": 5, "_rotary": 2, "_glu_backward": 2, "_cross_entropy_backward": 1}


@pytest.fixture
def gpu():
    with simulated("triton-sim") as run, ops.use_backend("auto"):
        yield run


def model_and_inputs(dtype):
    torch.manual_seed(0)
    model, inputs = tiny_models.llama(attn_implementation="eager")  # sdpa is ours on CPUs
    return model.to(dtype).requires_grad_(False), inputs


def step(model, inputs):
    """The loss, and what reaches the embeddings."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    out = model(inputs_embeds=embeddings, **rest)
    (dx,) = torch.autograd.grad(out.loss, embeddings)
    return {"loss": out.loss.detach(), "dx": dx}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step(gpu, dtype):
    stock, inputs = model_and_inputs(dtype)
    fused = copy.deepcopy(stock)
    rows = {row.method: row for row in fusetune.fuse(fused).rows if row.backend == "triton"}
    assert {"rms norm", "rotary", "swiglu", "cross-entropy"} <= set(rows)
    assert all(row.fused for row in rows.values())
    got = step(fused, inputs)
    launches = [one.kernel for one in gpu.launches]
    for name in OURS.keys() | BACKWARD.keys():
        assert launches.count(name) == OURS.get(name, 0) + BACKWARD.get(name, 0), name
    assert_near(got, step(stock, inputs), step(float64_copy(stock), inputs))


def test_float64_is_stock(gpu):
    stock, inputs = model_and_inputs(torch.float64)
    fused = copy.deepcopy(stock)
    (row,) = [row for row in fusetune.fuse(fused).rows if row.method == "cross-entropy"]
    assert not row.fused
    assert "float64" in row.reason
    got, expected = step(fused, inputs), step(stock, inputs)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert not gpu.launches


def test_lazy_logits(gpu, monkeypatch):
    """The same step, its loss by blocks of rows, each with a launch each way."""
    monkeypatch.setattr(import_module("fusetune.ops.linear_cross_entropy"), "_GPU_ROWS", 16)
    stock, inputs = model_and_inputs(torch.float32)
    fused = copy.deepcopy(stock).train()
    (row,) = [r for r in fusetune.fuse(fused, lazy_logits=True).rows if r.method == "lazy logits"]
    assert (row.backend, row.reason) == ("triton", None)
    got = step(fused, inputs)
    launches = [one.kernel for one in gpu.launches]
    blocks = -(-inputs["labels"].numel() // 16)
    assert blocks > 1
    for name in ("_cross_entropy", "_cross_entropy_backward"):
        assert launches.count(name) == blocks
    assert_near(got, step(stock, inputs), step(float64_copy(stock), inputs))


def test_what_a_head_on_a_gpu_has_to_be():
    def head(**options):
        return torch.nn.Linear(3, 5, **options).requires_grad_(False)

    assert head_reason(head(dtype=torch.bfloat16)) is None
    assert head_reason(head().requires_grad_()) == "the weight is trained"
    assert head_reason(head(dtype=torch.float64)) == "the weight is torch.float64"
    other = head()
    del other.weight
    other.weight = torch.randn(5, 3)
    assert head_reason(other) == "the weight is not a plain parameter but Tensor"
