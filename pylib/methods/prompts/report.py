"""What `fuse`'s report says of a prompt, whose ops are called without `fuse`: no swap."""

from __future__ import annotations

from torch import nn

from fusetune.methods.prompts.layer import PromptLayer
from fusetune.nn import _token_embedding, prefix_attention
from fusetune.ops._registry import OPS, Case, backend

METHOD = "prompts"


def carrier(module: nn.Module) -> tuple[str, str | None] | None:
    """(backend of the active prompt's op, None or why it is not fused); None for other modules.

    Raises ValueError where a forced backend cannot run.
    """
    if not isinstance(module, PromptLayer):
        return None
    names = [] if module.disable_adapters else module.active_adapters
    if not names:
        return "-", "adapters are disabled, or none is active"
    model = module.model[0]
    embedding = model.get_input_embeddings()
    prompt = next(module.prompt_encoders[names[0]].parameters())
    deep = module.prompt_configs[names[0]].deep
    if deep and prefix_attention.attached(model):
        reason = prefix_attention.joined_reason(model)
    else:
        reason = None if deep else _token_embedding.stock_reason(embedding)
    if reason is not None:
        return "-", reason
    op = OPS["prefix_attend" if deep else "prompt_embed"]
    case = Case(prompt.device.type, embedding.weight.dtype, prompt.dtype)
    name = op.carrier(*case)
    if name != "reference" or backend() != "auto":
        return name, None
    others = "; ".join(f"{other}: {why}" for other, why in op.explain(case) if why)
    return name, f"no kernel for this model ({others})"
