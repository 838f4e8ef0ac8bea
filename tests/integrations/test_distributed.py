"""Two processes over gloo, each with half the batch, equal one process with all of it."""

import copy
import os
import tempfile

import pytest
import tiny_models
import torch
import torch.distributed as dist
from torch import nn

import fusetune

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

PROCESSES = 2


def model_and_batch(four_bit=False):
    torch.manual_seed(0)
    model, _ = tiny_models.lora_llama(layers=2, four_bit=four_bit)
    ids = torch.randint(1, tiny_models.VOCABULARY, (2 * PROCESSES, 10))
    return model, {"input_ids": ids, "labels": ids}


def gradients(model):
    """{name: gradient}, of sharded parameters as a whole."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            full = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)
            grads[name.removeprefix("module.")] = full()
    return grads


def ddp(model):
    return nn.parallel.DistributedDataParallel(model), "lora_linear"


def fsdp2(model):
    """Parameters sharded per decoder layer; gathered, as plain tensors, before its forward."""
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model, "lora_linear"


def fsdp2_of_adapters(model):
    """Every lora_A and lora_B a unit of its own: only calling it gathers its weight."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, fusetune.integrations.peft.FusedLinear):
            fully_shard(module.lora_A["default"])
            fully_shard(module.lora_B["default"])
    fully_shard(model)
    return model, None


def worker(rank, wrap, four_bit, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    model, batch = model_and_batch(four_bit)
    case = fusetune.ops.Case("cpu", torch.float32)
    if fusetune.ops.OPS["lora_linear"].select(case).name == "reference":
        fusetune.ops.set_backend("reference")
    fusetune.fuse(model)
    calls = []
    op = fusetune.ops.lora_linear
    fusetune.ops.lora_linear = lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs)
    wrapped, expected = wrap(model)
    part = {key: value.chunk(PROCESSES)[rank] for key, value in batch.items()}
    wrapped(**part).loss.backward()
    assert len(calls) == (14 if expected else 0), len(calls)
    grads = gradients(wrapped)
    if rank == 0:
        torch.save(grads, os.path.join(folder, "grads.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "four_bit"),
    [(ddp, False), (ddp, True), (fsdp2, False), (fsdp2_of_adapters, False)],
    ids=["ddp", "ddp-4bit", "fsdp2", "fsdp2-of-adapters"],
)
def test_two_processes_equal_one(wrap, four_bit):
    model, batch = model_and_batch(four_bit)
    stock = copy.deepcopy(model)
    _, _, expected = tiny_models.loss_and_grads(stock, batch)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (wrap, four_bit, folder), nprocs=PROCESSES)
        got = torch.load(os.path.join(folder, "grads.pt"))
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
