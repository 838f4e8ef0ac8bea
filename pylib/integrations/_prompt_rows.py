"""The prompts of a batch from PEFT's encoders: one for all rows, or each row's own.

Rows whose prompts are shorter, and rows of the base model alone, are padded in front; the mask and
the positions hide that from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.prefix_tuning import PrefixEncoder
from peft.tuners.prompt_tuning import PromptEmbedding
from torch import nn

from fusetune.nn.adapter_names import BASE, distinct, places

Tensor = torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch: [P, H], or [G, P, H] with rows [B], -1 for none, and lengths [B]."""

    prompt: Tensor
    rows: Tensor | None = None
    lengths: Tensor | None = None  # None: all rows' prompts fill their P places
    base: Tensor | None = None  # with lengths: which rows have no prompt

    @property
    def length(self) -> int:
        return self.prompt.shape[-2]


def encoded(model: Any, name: str) -> Tensor:
    """An adapter's prompt [P, H], as `PeftModel.get_prompt` makes it for one row."""
    encoder, config = model.prompt_encoder[name], model.peft_config[name]
    weight: Tensor = encoder.embedding.weight
    if config.inference_mode or is_a_table(encoder):
        prompt = weight
    else:
        prompt = encoder(model.prompt_tokens[name].unsqueeze(0).to(weight.device))[0]
    # PEFT has one for the decoder of a sequence-to-sequence model too, but uses the first alone.
    return prompt[: config.num_virtual_tokens]


def is_a_table(encoder: Any) -> bool:
    """Whether calling an encoder of PEFT would look up all rows of its embedding, no more."""
    plain = type(encoder) in (PromptEmbedding, PrefixEncoder)
    plain = plain and type(encoder.embedding) is nn.Embedding
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    return plain and not hooked and not getattr(encoder, "prefix_projection", False)


def prompts_of(model: Any, adapter_names: Sequence[str] | None, batch: int) -> Prompts | None:
    """Those of the active adapter, or of the rows' own; None where no row has one."""
    if adapter_names is None:
        return Prompts(encoded(model, model.active_adapter))
    names = distinct(adapter_names, model.peft_config)
    if not adapter_names or batch % len(adapter_names):
        raise ValueError(
            f"adapter_names must name an adapter for each of {batch} rows, got {len(adapter_names)}"
        )
    if not names:
        return None
    each = [encoded(model, name) for name in names]
    if len(each) == 1 and BASE not in adapter_names:
        return Prompts(each[0])
    longest = max(map(len, each))
    padded = [nn.functional.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in each]
    # Beam search has the beams of a row one after the other.
    beams = batch // len(adapter_names)
    rows = [place for place in places(adapter_names, names) for _ in range(beams)]
    lengths = [len(each[row]) if row >= 0 else 0 for row in rows]
    device = each[0].device
    index = torch.tensor(rows, device=device)
    if min(lengths) == longest:
        return Prompts(torch.stack(padded), index)
    return Prompts(torch.stack(padded), index, torch.tensor(lengths, device=device), index < 0)


def positions_of(
    model: Any, prompts: Prompts, past: int, tokens: int, given: Tensor | None
) -> Tensor | None:
    """Position ids [B, tokens] from place `past` on, where the rows' prompts differ in length.

    A row counts from its own prompt's first vector, as it would alone; one without a prompt keeps
    those that were given for it. None where the model counts for itself rightly.
    """
    if prompts.lengths is None or prompts.base is None:
        return None
    base = model.get_base_model()
    if getattr(base.config, "relative_attention_num_buckets", None) is not None:
        return None  # T5: distances alone
    reason = _uneven_reason(model, base)
    if reason is not None:
        raise ValueError(
            f"adapter_names: {reason}, so that all rows must have prompts of one length"
        )
    places = torch.arange(past, past + tokens, device=prompts.lengths.device)
    own = (places - (prompts.length - prompts.lengths)[:, None]).clamp(min=0)
    if given is None:
        return own
    given = nn.functional.pad(given.expand(len(own), -1), (tokens - given.shape[1], 0))
    return torch.where(prompts.base[:, None], given, own)


def _uneven_reason(model: Any, base: Any) -> str | None:
    """Why a shorter prompt cannot be padded in front; None where it can."""
    kind = base.config.model_type
    takes = "position_ids" in inspect.signature(base.forward).parameters
    if not takes or any(_counts_from_padding(*named) for named in base.named_modules()):
        return f"positions of a {kind} cannot be given"
    classifies = type(model).stock_class is peft.PeftModelForSequenceClassification
    # `score`: the head of causal models, which reads the last place.
    if (classifies and not hasattr(base, "score")) or getattr(base, "pooler", None) is not None:
        return f"what a {kind} pools is the first place, where a shorter prompt has padding"
    return None


def _counts_from_padding(name: str, module: nn.Module) -> bool:
    """Positions of RoBERTa and its kin begin after the padding's."""
    return name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
