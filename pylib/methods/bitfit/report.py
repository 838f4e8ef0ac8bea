"""What `fuse`'s report says of a BitFit layer, which sums its gradient by itself: no swap."""

from __future__ import annotations

from torch import nn

from fusetune.methods.bitfit.layer import BitFitLayer
from fusetune.ops._scale_columns import summed_by

METHOD = "BitFit"


def carrier(module: nn.Module) -> tuple[str, str | None] | None:
    """(who sums the bias's gradient, None or why autograd does); None for other modules."""
    if not isinstance(module, BitFitLayer):
        return None
    if module.merged_adapters:
        return "-", "the adapter is merged"
    if not module.active_names():
        return "-", "adapters are disabled, or none is active"
    reason = module.stock_reason()
    if reason is not None:
        return "-", reason
    bias = next(iter(module.bitfit_bias.values()))
    return summed_by(bias.device.type, module.bias.dtype), None
