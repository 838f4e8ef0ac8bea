"""Fused input of PEFT's prompt tuning and p-tuning; `peft_prompts.py` calls it.

PEFT looks the tokens up, repeats the prompt for every row, concatenates the two, and makes ones for
the mask and -100 for the labels in further tensors. Here `prompt_embed` writes the input once, and
mask and labels are one allocation each. A batch may have a prompt for each row (_prompt_rows.py).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftType
from peft.tuners.p_tuning import PromptEncoder
from peft.tuners.prompt_tuning import PromptEmbedding

from fusetune.integrations._guards import call_reason
from fusetune.integrations._prompt_rows import Prompts, positions_of, prompts_of
from fusetune.nn import _token_embedding, cache_argument
from fusetune.nn.adapter_rows import heads_by_row
from fusetune.ops._registry import OPS
from fusetune.ops.prompt_embed import extend_labels, extend_mask, prompt_embed

Tensor = torch.Tensor
METHODS = {PeftType.PROMPT_TUNING: "prompt tuning", PeftType.P_TUNING: "p-tuning"}
ACTIVE = "_fusetune_generation"  # in the PeftModel, within generate
_KINDS: tuple[Any, ...] = (peft.PeftModel, *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())
_PARAMETERS = {  # of the stock forwards, by position
    kind: tuple(inspect.signature(kind.forward).parameters)[1:] for kind in _KINDS
}


def stock_reason(model: Any) -> str | None:
    """Why the input of a model with such a prompt is made by PEFT's code; None where by ours."""
    if type(model).stock_class is peft.PeftModel:
        return "PEFT uses no prompt where the task type is None"
    encoder = model.prompt_encoder[model.active_adapter]
    if type(encoder) not in (PromptEmbedding, PromptEncoder):
        return f"the prompt encoder is a {type(encoder).__name__}"
    return _token_embedding.stock_reason(model.word_embeddings)


def fused_carrier(model: Any) -> str:
    """The backend that writes the input."""
    weight = model.word_embeddings.weight
    prompt = model.prompt_encoder[model.active_adapter].embedding.weight
    return OPS["prompt_embed"].carrier(weight.device.type, weight.dtype, prompt.dtype)


# --- the input ---- -------------------------------------------------------------------------------


def _embed(model: Any, input_ids: Tensor, prompts: Prompts) -> Tensor:
    embedding = model.word_embeddings
    scale = _token_embedding.scale_of(embedding)
    assert scale is not None  # stock_reason has looked
    out = prompt_embed(
        input_ids,
        embedding.weight,
        prompts.prompt,
        rows=prompts.rows,
        scale=scale,
        padding_idx=embedding.padding_idx,
    )
    return _token_embedding.require_grad_as(embedding, out)


def _mask(
    input_ids: Tensor, mask: Tensor | None, prompts: Prompts, cached: int = 0
) -> Tensor | None:
    """`cached`: tokens whose keys are in the cache already."""
    if mask is None:
        if prompts.lengths is None:
            return None
        mask = input_ids.new_ones(len(input_ids), cached + input_ids.shape[1])
    return extend_mask(mask, prompts.length, lengths=prompts.lengths)


# --- forward and generate ---- --------------------------------------------------------------------


def forward(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str] | None
) -> Any:
    """What the stock class' forward gives; `names`: adapters by row."""
    stock = type(model).stock_class
    given = {**dict(zip(_PARAMETERS[stock], args, strict=False)), **kwargs}
    input_ids: Any = given.get("input_ids")
    mask = given.get("attention_mask")
    reason = call_reason(input_ids)
    if given.get("inputs_embeds") is not None or (mask is not None and mask.dim() != 2):
        reason = "inputs_embeds or a mask of more than two dimensions was given"
    if reason is not None:
        if names is not None:
            raise ValueError(f"adapter_names: PEFT has one prompt for all rows, and {reason}")
        return stock.forward(model, *args, **kwargs)
    given.pop("task_ids", None)
    prompts = prompts_of(model, names, len(input_ids))
    if prompts is None:
        with heads_by_row(model, names):
            return model.base_model(**given)
    del given["input_ids"]
    positions = given.pop("position_ids", None)
    _extend(model, given, input_ids, prompts)
    tokens = prompts.length + input_ids.shape[1]
    own = positions_of(model, prompts, 0, tokens, positions)
    if own is not None:
        given["position_ids"] = own
    elif positions is not None:
        _ignored("position_ids")
    given["inputs_embeds"] = _embed(model, input_ids, prompts)
    with heads_by_row(model, names):
        return model.base_model(**given)


def _extend(model: Any, given: dict[str, Any], input_ids: Tensor, prompts: Prompts) -> None:
    """Mask, labels and token types, in place, as PEFT has them for the task."""
    stock = type(model).stock_class
    mask = _mask(input_ids, given.get("attention_mask"), prompts)
    if mask is not None:
        given["attention_mask"] = mask
    if stock is peft.PeftModelForCausalLM and given.get("labels") is not None:
        given["labels"] = extend_labels(given["labels"], prompts.length)
    types = given.pop("token_type_ids", None)
    if types is None:
        return
    if stock in (peft.PeftModelForSequenceClassification, peft.PeftModelForTokenClassification):
        types = extend_labels(types, prompts.length, ignore_index=0)
        given["token_type_ids"] = types
    else:
        _ignored("token_type_ids")


def _ignored(name: str) -> None:
    warnings.warn(f"{name} are not supported by PEFT's prompts, and ignored", stacklevel=4)


@dataclass
class _Generation:
    """One call of generate: the encoders run once for all its steps."""

    names: Sequence[str] | None
    prompts: Prompts | None = None
    batch: int = -1

    def prompts_of(self, model: Any, batch: int) -> Prompts | None:
        if batch != self.batch:
            self.prompts, self.batch = prompts_of(model, self.names, batch), batch
        return self.prompts


def generate(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str] | None
) -> Any:
    """What the stock class' generate gives; `names`: adapters by row."""
    stock = type(model).stock_class
    if stock is peft.PeftModelForSeq2SeqLM:
        return _generate_from_encoder(model, kwargs, names)
    model.__dict__[ACTIVE] = _Generation(names)
    try:
        return stock.generate(model, *args, **kwargs)
    finally:
        del model.__dict__[ACTIVE]


def _generate_from_encoder(model: Any, kwargs: dict[str, Any], names: Sequence[str] | None) -> Any:
    """The prompt is in front of the encoder's input."""
    if "input_ids" not in kwargs:
        raise ValueError("input_ids must be given")
    given = dict(kwargs)
    for name in ("position_ids", "token_type_ids", "encoder_outputs"):
        if given.pop(name, None) is not None:
            _ignored(name)
    given.pop("task_ids", None)
    prompts = prompts_of(model, names, len(given["input_ids"]))
    if prompts is not None:
        input_ids = given.pop("input_ids")
        given["inputs_embeds"] = _embed(model, input_ids, prompts)
        mask = _mask(input_ids, given.get("attention_mask"), prompts)
        if mask is not None:
            given["attention_mask"] = mask
    return model.base_model.generate(**given)


def prepare_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`PeftModelForCausalLM.prepare_inputs_for_generation`, within `generate`."""
    generation: _Generation = model.__dict__[ACTIVE]
    stock = type(model).stock_class.prepare_inputs_for_generation
    given = model.base_model_prepare_inputs_for_generation(*args, **kwargs)
    input_ids: Any = given.get("input_ids")
    mask = given.get("attention_mask")
    if input_ids is None or isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        if generation.names is not None:
            raise ValueError("adapter_names: generate with a dynamic cache and from input_ids")
        return stock(model, *args, **kwargs)
    given.pop("task_ids", None)
    prompts = generation.prompts_of(model, len(input_ids))
    if prompts is None:
        return given
    cache = cache_argument.given(given)
    past = 0 if cache is None else cache.get_seq_length()
    if past >= input_ids.shape[1]:  # the cache has the prompt too
        input_ids = given["input_ids"] = input_ids[:, -1:]
    given["attention_mask"] = _mask(input_ids, mask, prompts, max(0, past - prompts.length))
    positions, tokens = given.pop("position_ids", None), input_ids.shape[1]
    for name in ("token_type_ids", "cache_position"):
        given.pop(name, None)
    if not past:
        given["inputs_embeds"], given["input_ids"] = _embed(model, input_ids, prompts), None
        tokens += prompts.length
    own = positions_of(model, prompts, past, tokens, positions)
    if own is not None:
        given["position_ids"] = own
    return given
