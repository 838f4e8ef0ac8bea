"""Whether a fused layer may stand in for the modules it would bypass.

A fused forward reads the weights of its submodules instead of calling them. That is only the same
thing while nothing hangs on those calls: hooks (accelerate's offloading, tensor parallelism,
DeepSpeed ZeRO-3), a replaced `forward`, a subclass (FSDP units, parametrizations), a weight that is
not a plain tensor (DTensor, torchao), or a function transform that needs to see each operator.

All of this may change at any time, so the checks run on every call; together they take about
3 microseconds. They return None, or the reason to run the library's own code instead.
"""

from __future__ import annotations

import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch.autograd import forward_ad

from fusetune.ops._registry import OPS, Case, backend

KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def no_kernel(op: str, device: str, dtype: torch.dtype, weight: torch.dtype | None = None) -> bool:
    """Whether only the reference implementation could carry out `op`.

    It defines the op and is slow: unless it was asked for by name it does not replace anything.
    """
    return OPS[op].carrier(device, dtype, weight) == "reference" and backend() == "auto"


def carrier(
    op: str, device: str, dtype: torch.dtype, weight: torch.dtype | None = None
) -> tuple[str, str | None]:
    """(backend that would carry out `op`, the reason not to use it), for reports.

    Raises ValueError where a forced backend cannot run.
    """
    name = OPS[op].carrier(device, dtype, weight)
    if not no_kernel(op, device, dtype, weight):
        return name, None
    reasons = OPS[op].explain(Case(device, dtype, weight))
    others = [f"{other}: {why}" for other, why in reasons if why]
    return name, f"no kernel for this model ({'; '.join(others)})"


def case_of(module: nn.Module) -> tuple[str, torch.dtype]:
    """Device and dtype of a module's activations, as its parameters tell them."""
    parameters = list(module.parameters())
    device = parameters[0].device.type if parameters else "cpu"
    floats = (p.dtype for p in parameters if p.is_floating_point())
    return device, next(floats, torch.float32)


def call_reason(x: object) -> str | None:
    """Why this call, whatever the layer, has to go the library's way."""
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook on all modules is registered"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def module_reason(module: nn.Module, role: str, kind: type[nn.Module]) -> str | None:
    """Why `module`, of which only the parameters would be read, has to be called instead."""
    if type(module) is not kind:
        return f"{role} is a {type(module).__name__}, not a plain {kind.__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{role} has hooks"
    if "forward" in module.__dict__:
        return f"{role} has a forward of its own"
    return None


def linear_reason(module: nn.Module, role: str, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Why a plain nn.Linear, or another `kind` with a weight, cannot be bypassed."""
    reason = module_reason(module, role, kind)
    if reason is not None:
        return reason
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"the weight of {role} is not a plain parameter but {type(weight).__name__}"
    if hasattr(weight, "ds_id"):
        return f"the weight of {role} is partitioned by DeepSpeed"
    return None
