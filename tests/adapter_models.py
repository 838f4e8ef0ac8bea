"""Tiny models with bottleneck adapters whose weights are not near the identity."""

import tiny_models
import torch
from peft import get_peft_model

from fusetune.methods import BottleneckConfig


def randomise(model, seed=1):
    """Weights of all adapters, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bn_" in name:
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(value)
    return model


def adapted(family, config, *, seed=0, names=("default",), dtype=torch.float32, **options):
    """(a model of tiny_models with an adapter of each name, its inputs), in evaluation."""
    torch.manual_seed(seed)
    base, inputs = getattr(tiny_models, family)()
    if options.pop("four_bit", False):
        tiny_models.quantize(base, **options)
    model = get_peft_model(base.to(dtype), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    return randomise(model).eval(), inputs


def pfeiffer(**changes):
    return BottleneckConfig.pfeiffer(**{"reduction_factor": 8, "mh_adapter": True, **changes})


def houlsby(**changes):
    return BottleneckConfig.houlsby(reduction_factor=8, **changes)


def parallel(**changes):
    return BottleneckConfig.parallel(reduction_factor=8, **changes)
