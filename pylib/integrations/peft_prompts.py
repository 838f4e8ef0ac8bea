"""Fused forward of PEFT's prompt learning, by class swap of the `PeftModel` itself.

Prefix tuning: PEFT's own forward runs, but the prompt it asks for is not made into a cache; the
attention of the base model gets the prefix instead (nn/prefix_attention.py). Whatever cannot be
done exactly runs PEFT's code, and `fused_reason` says why. Prompt tuning and p-tuning:
peft_prompt_embed.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from peft import PeftType
from peft.peft_model import _get_layer_kv_target_shape
from torch import nn

from fusetune.integrations import peft_prompt_embed
from fusetune.integrations._guards import carrier
from fusetune.integrations._prompt_rows import is_a_table
from fusetune.nn import cache_argument, prefix_attention
from fusetune.nn._prefix_layout import parameters
from fusetune.nn.adapter_names import distinct, places
from fusetune.nn.prefix_attention import Prefix

_ACTIVE = "_fusetune_prefix_counts"  # in the PeftModel: within a forward or generate of a prefix


class FusedPrompts:
    """What all fused `PeftModel`s share; the first base of each."""

    stock_class: type[nn.Module]
    method = "prefix tuning"

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a model of the stock class is one to fuse at all."""
        fused = (PeftType.PREFIX_TUNING, *peft_prompt_embed.METHODS)
        return bool(module._is_prompt_learning) and _kind(module) in fused

    def after_fuse(self: Any) -> None:
        """After the class was swapped in, and when `fuse` comes again."""
        if _kind(self) in peft_prompt_embed.METHODS:
            return
        if prefix_attention.unsupported(self.base_model) is None:
            prefix_attention.attach(self.base_model)

    def before_unfuse(self: Any) -> None:
        """Before it is swapped out."""
        prefix_attention.detach(self.base_model)

    def forward(
        self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """As the stock class; adapter_names: an adapter for each row, "__base__" for none."""
        if self._adapters_disabled or self.stock_reason() is not None:
            _refuse(self, adapter_names)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if _kind(self) in peft_prompt_embed.METHODS:
            return peft_prompt_embed.forward(self, args, kwargs, adapter_names)
        with _prefixed(self, adapter_names, counts=True):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def generate(
        self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """As the stock class; adapter_names as in `forward`."""
        if self._adapters_disabled or self.stock_reason() is not None:
            _refuse(self, adapter_names)
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        if _kind(self) in peft_prompt_embed.METHODS:
            return peft_prompt_embed.generate(self, args, kwargs, adapter_names)
        with _prefixed(self, adapter_names, counts=False):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def get_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; no cache where the prefix goes to the attention."""
        return None if _ACTIVE in self.__dict__ else super().get_prompt(*args, **kwargs)  # type: ignore[misc]

    def _prefix_tuning_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, and also where the model's cache has the name of transformers 5.24.

        PEFT 0.21 looks for the older one in the model, then in its backbone, and gives up.
        """
        backbone = self.base_model.get_submodule(self.transformer_backbone_name)
        kinds: tuple[Any, ...] = (type(self.base_model), type(backbone))
        known = any(cache_argument.NAMES[1] in parameters(kind) for kind in kinds)
        if known or _ACTIVE not in self.__dict__:
            return super()._prefix_tuning_forward(*args, **kwargs)  # type: ignore[misc]
        return self.base_model(*args, **kwargs)

    def _setup_prompt_encoder(self: Any, adapter_name: str) -> None:
        """As the stock class, but not refusing a model that checkpoints, as that one has to."""
        flagged = [m for m in self.modules() if getattr(m, "gradient_checkpointing", False)]
        lifted = flagged if self.stock_reason() is None else []
        try:
            for module in lifted:
                module.gradient_checkpointing = False
            super()._setup_prompt_encoder(adapter_name)  # type: ignore[misc]
        finally:
            for module in lifted:
                module.gradient_checkpointing = True

    def fused_reason(self: Any) -> str | None:
        """Why the model, in its present state, is not all fused; None where it is."""
        if self._adapters_disabled:
            return "adapters are disabled"
        if reason := self.stock_reason():
            return reason
        if _kind(self) in peft_prompt_embed.METHODS:
            return None
        reason = prefix_attention.joined_reason(self.base_model) or self.fused_carrier()[1]
        return reason and f"{reason}: the prefix is joined to keys and values"

    def stock_reason(self: Any) -> str | None:
        """Why PEFT's own code runs, with a cache; None where the attention gets the prefix."""
        config = self.active_peft_config
        if config.peft_type in peft_prompt_embed.METHODS:
            return peft_prompt_embed.stock_reason(self)
        if config.peft_type != PeftType.PREFIX_TUNING:
            return f"{config.peft_type} is not fused"
        reason = None
        if not prefix_attention.attached(self.base_model):
            reason = prefix_attention.unsupported(self.base_model)
            reason = reason or "the attention function was changed since: call fuse() again"
        return reason or _shape_reason(self, config)

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it) for a query of the base model's dtype and device."""
        if _kind(self) in peft_prompt_embed.METHODS:
            return peft_prompt_embed.fused_carrier(self), None
        weight = self.prompt_encoder[self.active_adapter].embedding.weight
        dtype = self.base_model_torch_dtype or weight.dtype
        return carrier("prefix_attend", weight.device.type, dtype, dtype)

    @property
    def present_method(self: Any) -> str:
        return peft_prompt_embed.METHODS.get(_kind(self), self.method)


def _kind(model: Any) -> Any:
    return model.active_peft_config.peft_type


def _refuse(model: Any, adapter_names: Sequence[str] | None) -> None:
    if adapter_names is not None and not model._adapters_disabled:
        raise ValueError(
            f"adapter_names: this model runs PEFT's own code, which has one prompt for all rows, "
            f"because {model.stock_reason()}"
        )


def _shape_reason(model: Any, config: Any) -> str | None:
    """Why a prefix does not go to the attention layers one by one, as PEFT would have it."""
    base = model.base_model.config
    if any(kind in base.model_type for kind in ("gemma2", "gemma3_text", "gemma4")):
        text = base.get_text_config()
        shapes = {_get_layer_kv_target_shape(text, layer) for layer in range(config.num_layers)}
        own = (config.num_attention_heads, config.token_dim // config.num_attention_heads)
        if getattr(text, "num_kv_shared_layers", 0) or not shapes <= {None, own}:
            return "layers that share keys and values, or have different heads"
    layers = prefix_attention.places(model.base_model)
    submodules = config.num_transformer_submodules
    place = "self" if submodules == 1 else "decoder"
    if submodules not in (1, 2) or place not in layers:
        return f"a prefix for {submodules} parts of the model"
    if layers[place] != config.num_layers:
        return f"a prefix of {config.num_layers} layers for a model of {layers[place]}"
    return None


@contextlib.contextmanager
def _prefixed(model: Any, adapter_names: Sequence[str] | None, *, counts: bool) -> Iterator[None]:
    """counts: whether PEFT has mask and positions count the prefix, as its forward does."""
    prefix = _prefix(model, adapter_names, counts)
    model.__dict__[_ACTIVE] = True
    try:
        with prefix_attention.active(model.base_model, prefix):
            yield
    finally:
        model.__dict__.pop(_ACTIVE, None)


def _prefix(model: Any, adapter_names: Sequence[str] | None, counts: bool) -> Prefix:
    """The prefix of the active adapter, or of those named."""
    active = model.active_adapter
    names = [active] if adapter_names is None else distinct(adapter_names, model.peft_config)
    flat = [_flat(model, name) for name in names] or [_flat(model, active)]
    lengths = tuple(len(rows) for rows in flat)
    counted = model.peft_config[active].num_virtual_tokens if counts else 0
    config = model.peft_config[names[0] if names else active]
    heads = (config.num_layers, 2, config.num_attention_heads, -1)
    if adapter_names is None:
        by_layer = flat[0].unflatten(1, heads).flatten(1, 2).unbind(1)
        return Prefix(_layers(config, by_layer), lengths[0], counted=counted)
    longest = max(lengths)
    padded = [nn.functional.pad(rows, (0, 0, 0, longest - len(rows))) for rows in flat]
    by_layer = torch.stack(padded).unflatten(2, heads).flatten(2, 3).unbind(2)
    return Prefix(
        _layers(config, by_layer),
        longest,
        rows=torch.tensor(places(adapter_names, names), device=flat[0].device),
        lengths=lengths,
        counted=counted,
    )


def _flat(model: Any, name: str) -> torch.Tensor:
    """An adapter's prefix [P, layers * 2 * token_dim], in the base model's dtype."""
    encoder = model.prompt_encoder[name]
    config = model.peft_config[name]
    weight = encoder.embedding.weight
    if config.inference_mode or is_a_table(encoder):
        flat: torch.Tensor = weight
    else:
        tokens = model.prompt_tokens[name][: config.num_virtual_tokens]
        flat = encoder(tokens.unsqueeze(0).to(weight.device))[0]
    dtype = model.base_model_torch_dtype
    return flat if dtype is None else flat.to(dtype)


def _layers(config: Any, by_layer: tuple[torch.Tensor, ...]) -> dict[str, list[Any]]:
    """Keys and values by layer, from [key of 0, value of 0, key of 1, ...]."""
    if config.num_transformer_submodules == 1:
        return {"self": list(zip(by_layer[::2], by_layer[1::2], strict=True))}
    # PEFT lays the prefix out twice and hands four parts to each layer of the decoder: keys and
    # values of its own attention, and two more for the cross-attention, which it then discards.
    twice = by_layer * 2
    return {"decoder": list(zip(twice[::4], twice[1::4], strict=True))}


class FusedPeftModel(FusedPrompts, peft.PeftModel):
    stock_class = peft.PeftModel


class _Generating(FusedPrompts):
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; a prefix needs no preparation."""
        if peft_prompt_embed.ACTIVE in self.__dict__:
            return peft_prompt_embed.prepare_inputs(self, args, kwargs)
        if _ACTIVE not in self.__dict__:
            return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        kwargs.pop("task_ids", None)
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class FusedCausalLM(_Generating, peft.PeftModelForCausalLM):  # type: ignore[misc]
    stock_class = peft.PeftModelForCausalLM


class FusedSeq2SeqLM(_Generating, peft.PeftModelForSeq2SeqLM):  # type: ignore[misc]
    stock_class = peft.PeftModelForSeq2SeqLM


class FusedSequenceClassification(FusedPrompts, peft.PeftModelForSequenceClassification):
    stock_class = peft.PeftModelForSequenceClassification


class FusedTokenClassification(FusedPrompts, peft.PeftModelForTokenClassification):
    stock_class = peft.PeftModelForTokenClassification


class FusedQuestionAnswering(FusedPrompts, peft.PeftModelForQuestionAnswering):
    stock_class = peft.PeftModelForQuestionAnswering


class FusedFeatureExtraction(FusedPrompts, peft.PeftModelForFeatureExtraction):
    stock_class = peft.PeftModelForFeatureExtraction


_CLASSES: tuple[Any, ...] = (
    FusedPeftModel,
    FusedCausalLM,
    FusedSeq2SeqLM,
    FusedSequenceClassification,
    FusedTokenClassification,
    FusedQuestionAnswering,
    FusedFeatureExtraction,
)
SWAPS: dict[type[nn.Module], type[Any]] = {kind.stock_class: kind for kind in _CLASSES}
