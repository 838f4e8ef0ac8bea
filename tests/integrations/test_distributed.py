"""Two processes over gloo, each with half the batch, equal one process with all of it."""

import os
import traceback

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


CASES = {
    "ddp": (ddp, False),
    "ddp-4bit": (ddp, True),
    "fsdp2": (fsdp2, False),
    "fsdp2-of-adapters": (fsdp2_of_adapters, False),
}


def worker(rank, folder):
    """One process. It leaves without destructors: gloo's can wait for a peer that is gone."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
        for name, case in CASES.items():
            results = step_of_half_a_batch(rank, *case)
            if rank == 0:
                torch.save(results, os.path.join(folder, name))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def step_of_half_a_batch(rank, wrap, four_bit):
    """({name: gradient}, number of LoRA layers that took the fused path)."""
    model, batch = model_and_batch(four_bit)
    case = fusetune.ops.Case("cpu", torch.float32)
    if fusetune.ops.OPS["lora_linear"].select(case).name == "reference":
        fusetune.ops.set_backend("reference")
    fusetune.fuse(model)
    wrapped = wrap(model)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        op = fusetune.ops.lora_linear
        patch.setattr(fusetune.ops, "lora_linear", lambda *a, **k: calls.append(1) or op(*a, **k))
        part = {key: value.chunk(PROCESSES)[rank] for key, value in batch.items()}
        wrapped(**part).loss.backward()
    return gradients(wrapped), len(calls)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both processes go through all cases: starting them takes longer than the cases do."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=PROCESSES)
    return {name: torch.load(folder / name) for name in CASES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(results, name):
    _, four_bit = CASES[name]
    stock, batch = model_and_batch(four_bit)
    _, _, expected = tiny_models.loss_and_grads(stock, batch)
    got, fused_layers = results[name]
    assert fused_layers == (0 if name == "fsdp2-of-adapters" else 14)
    assert got.keys() == expected.keys()
    for parameter, grad in got.items():
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-6)
