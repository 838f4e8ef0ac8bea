"""Two processes over gloo, each with half the batch, equal one process with all of it."""

import os
import traceback

import prefix_models
import pytest
import tiny_models
import torch
import torch.distributed as dist
from torch import nn

import fusetune
from fusetune.nn import _prefix_interface

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

PROCESSES = 2


def lora(four_bit=False):
    return tiny_models.lora_llama(layers=2, four_bit=four_bit)[0]


def lora_4bit():
    return lora(four_bit=True)


def prefix():
    return prefix_models.prefix_tuned(prefix_models.llama)[0]


def batch():
    torch.manual_seed(0)
    ids = torch.randint(1, tiny_models.VOCABULARY, (2 * PROCESSES, 10))
    return {"input_ids": ids, "labels": ids}


def gradients(model):
    """{name: gradient}, of sharded parameters as a whole."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            full = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)
            grads[name.removeprefix("module.")] = full()
    return grads


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model):
    """Parameters sharded per decoder layer; gathered, as plain tensors, before its forward."""
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def fsdp2_of_adapters(model):
    """Every lora_A and lora_B a unit of its own: only calling it gathers its weight."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, fusetune.integrations.peft.FusedLinear):
            fully_shard(module.lora_A["default"])
            fully_shard(module.lora_B["default"])
    fully_shard(model)
    return model


# What wraps which model, and how many of its layers take the fused path.
CASES = {
    "ddp": (ddp, lora, 14),
    "ddp-4bit": (ddp, lora_4bit, 14),
    "ddp-prefix": (ddp, prefix, 3),
    "fsdp2": (fsdp2, lora, 14),
    "fsdp2-of-adapters": (fsdp2_of_adapters, lora, 0),
}


def worker(rank, folder):
    """One process. It leaves without destructors: gloo's can wait for a peer that is gone."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
        for name, (wrap, make, _) in CASES.items():
            results = step_of_half_a_batch(rank, wrap, make)
            if rank == 0:
                torch.save(results, os.path.join(folder, name))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def step_of_half_a_batch(rank, wrap, make):
    """({name: gradient}, number of layers that took the fused path, of losses without logits)."""
    model = make().train()
    case = fusetune.ops.Case("cpu", torch.float32)
    if fusetune.ops.OPS["lora_linear"].select(case).name == "reference":
        fusetune.ops.set_backend("reference")
    fusetune.fuse(model, lazy_logits=True)
    wrapped = wrap(model)
    calls, losses = [], []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((fusetune.ops, "lora_linear"), (_prefix_interface, "_fused")):
            patch.setattr(module, name, counting(getattr(module, name), calls))
        loss = counting(fusetune.ops.linear_cross_entropy, losses)
        patch.setattr(fusetune.ops, "linear_cross_entropy", loss)
        part = {key: value.chunk(PROCESSES)[rank] for key, value in batch().items()}
        wrapped(**part).loss.backward()
    return gradients(wrapped), len(calls), len(losses)


def counting(function, calls):
    return lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both processes go through all cases: starting them takes longer than the cases do."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=PROCESSES)
    return {name: torch.load(folder / name) for name in CASES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(results, name):
    _, make, layers = CASES[name]
    _, _, expected = tiny_models.loss_and_grads(make(), batch())
    got, fused_layers, losses = results[name]
    assert (fused_layers, losses) == (layers, 1)
    assert got.keys() == expected.keys()
    for parameter, grad in got.items():
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-6)
