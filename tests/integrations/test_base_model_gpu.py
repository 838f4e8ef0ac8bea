"""What is fused of a model without adapters, by the kernels for GPUs, simulated: in bf16 the errors
against float64 are the stock model's, and a launch each way does it.
"""

import copy

import pytest
import tiny_models
import torch
from backends import simulated
from model_equality import assert_near, float64_copy

import fusetune
from fusetune import ops

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
