"""What `fuse`'s report says of a bottleneck layer, which calls its op by itself: no swap."""

from __future__ import annotations

import torch
from torch import nn

from fusetune.methods.bottleneck.layer import BottleneckLayer
from fusetune.ops._bottleneck_gpu import too_wide
from fusetune.ops._registry import OPS, Case, backend

METHOD = "bottleneck"


def carrier(module: nn.Module) -> tuple[str, str | None] | None:
    """(backend of the active adapters' op, None or why it is not fused); None for other modules.

    Raises ValueError where a forced backend cannot run.
    """
    if not isinstance(module, BottleneckLayer):
        return None
    tree = module.active_tree()
    if tree is None:
        return "-", "adapters are disabled, or none is active"
    names = module.present(tree)
    if not names:
        return "-", "none of the active adapters is here"
    weights: list[torch.Tensor] = [module.bn_adapters[name].down.weight for name in names]
    weight = weights[0]
    case = Case(weight.device.type, module.dtype, weight.dtype)
    name = OPS[METHOD].carrier(*case)
    if name == "triton":
        whys = [too_wide(w.shape[0], module.dtype, w.dtype) for w in weights]
        if any(whys):
            return "reference", next(why for why in whys if why)
    if name != "reference" or backend() != "auto":
        return name, None
    others = [f"{other}: {why}" for other, why in OPS[METHOD].explain(case) if why]
    return name, f"no kernel for this model{': ' * bool(others)}{'; '.join(others)}"
