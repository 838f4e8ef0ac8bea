"""When a fused model computes what the stock one does, measured against float64."""

import copy

import bitsandbytes as bnb
import tiny_models
import torch

import fusetune


def assert_near(got, eager, exact):
    """Dicts of tensors. The relative error (of norms) of each is at most four times the largest
    that eager makes in any of them, plus four roundings: they are results of one chain of layers,
    where the gradients of attention's queries and keys nearly cancel: roundings show by chance."""

    def error(values, name):
        true = exact[name].double()
        return ((values[name].double() - true).norm() / true.norm()).item()

    assert got.keys() == eager.keys()
    for name, value in got.items():
        assert (value.dtype, value.shape) == (eager[name].dtype, eager[name].shape), name
    eps = max(torch.finfo(value.dtype).eps for value in got.values())
    allowed = 4 * max(error(eager, name) for name in eager) + 4 * eps
    errors = {name: error(got, name) for name in got}
    wrong = {name: value for name, value in errors.items() if not value <= allowed}
    assert not wrong, f"allowed {allowed}: {wrong}"


def assert_the_fused_step_is_the_stock_one(method, count):
    """Of a LLaMA with LoRA, in which so many modules are fused as `method` says."""
    stock, inputs = tiny_models.lora_llama()
    fused = copy.deepcopy(stock)
    found = [row for row in fusetune.fuse(fused).rows if row.method == method]
    assert [row.fused for row in found] == [True] * count
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))


def step(model, inputs):
    loss, logits, grads = tiny_models.loss_and_grads(model, inputs)
    assert grads
    return {"loss": loss, "logits": logits, **grads}


def float64_copy(model):
    """The model in float64, with 4-bit layers replaced by what they stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
            dense.weight.data = weight
            dense.weight.requires_grad_(False)
            dense.bias = module.bias
            model.set_submodule(name, dense)
    return model.double()
