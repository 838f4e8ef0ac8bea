"""The methods that bench_methods compares, each as a model that is ready to be trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

import fusetune
from examples.minilm import load_classifier
from examples.side_by_side import bias_only
from fusetune.bench import composed
from fusetune.demo.model import load_base

LABELS = 41  # of the encoder's head, as examples.adapters_minilm has it
PROMPT = 20  # tokens of each kind of prompt
KINDS = ("stock", "fused")


class Source(NamedTuple):
    """Folders of the real models' weights. layers: of how many the models are; None: of all."""

    decoder: Path
    encoder: Path | None = None  # None: the package's
    layers: int | None = None

    @property
    def _options(self) -> dict[str, Any]:
        return {} if self.layers is None else {"num_hidden_layers": self.layers}

    def causal_lm(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.decoder, dtype=torch.float32, **self._options
        )
        return model

    def causal_lm_4bit(self) -> nn.Module:
        model: nn.Module = load_base(str(self.decoder), torch.device("cpu"), **self._options)
        return model

    def classifier(self) -> nn.Module:
        model = load_classifier(LABELS, folder=self.encoder, **self._options)
        return model.requires_grad_(False)


@dataclass(frozen=True)
class Method:
    """`make`: the model with the method in it.

    against: whose operators the stock step runs. PEFT's, where it has the method; else torch's, in
    the same model. within: what a stock step runs within, for that; or stock: its model.
    """

    name: str
    make: Callable[[Source], Any]
    encoder: bool = False
    against: str = "PEFT"
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    stock: Callable[[Source], Any] | None = None

    @property
    def model(self) -> str:
        return "MiniLM" if self.encoder else "SmolLM2-135M"

    def build(self, kind: str, source: Source) -> Any:
        """The model of a kind, in training; the same weights for both."""
        torch.manual_seed(0)
        make = self.stock if kind == "stock" and self.stock else self.make
        model = make(source).train()
        if kind == "fused":
            fusetune.fuse(model)
        return model

    def around(self, kind: str) -> AbstractContextManager[Any]:
        """What each step of a kind runs within."""
        return self.within() if kind == "stock" else nullcontext()


def _lm(config: Any, load: Callable[[Source], nn.Module] = Source.causal_lm) -> Any:
    """config: made anew for each model, PEFT writes into it."""
    return lambda source: get_peft_model(load(source), config())


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )


def _adalora() -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=12, target_r=8, total_step=1000, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _ia3() -> IA3Config:
    return IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )


def _prompt(kind: Any, **options: Any) -> Callable[[], Any]:
    return lambda: kind(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, **options)


def _adapters(config: Callable[[], Any]) -> Callable[[Source], Any]:
    return lambda source: get_peft_model(source.classifier(), config())


def _fusion(source: Source) -> Any:
    """Three adapters, frozen, and their fusion; without its dropout, whose masks would differ."""
    names = ["first", "second", "third"]
    pfeiffer = fusetune.BottleneckConfig.pfeiffer
    model = get_peft_model(source.classifier(), pfeiffer(), names[0])
    for name in names[1:]:
        model.add_adapter(name, pfeiffer())
    model.add_adapter("fused", fusetune.AdapterFusionConfig(adapters=names, dropout_prob=0.0))
    fusetune.compose(model, "fused", trainable=["fused"])
    return model


def _madx(source: Source) -> Any:
    """A task's adapter on a language's, which is frozen."""
    model = get_peft_model(source.classifier(), fusetune.MadXConfig(), "language")
    model.add_adapter("task", fusetune.MadXConfig.task())
    fusetune.compose(model, fusetune.Stack("language", "task"), trainable=["task"])
    return model


def _biases(source: Source) -> Any:
    """The encoder's biases, trained where they are; not the head's, as BitFitConfig has it."""
    model: Any = source.classifier()
    bias_only(model)
    return model


def _ours(name: str, make: Callable[[Source], Any]) -> Method:
    return Method(name, make, True, "torch", composed.in_place_of_ops)


METHODS = (
    Method("LoRA", _lm(_lora)),
    Method("QLoRA", _lm(_lora, Source.causal_lm_4bit)),
    Method("DoRA", _lm(lambda: _lora(use_dora=True))),
    Method("AdaLoRA", _lm(_adalora)),
    Method("IA3", _lm(_ia3)),
    Method("prompt tuning", _lm(_prompt(PromptTuningConfig))),
    Method("P-tuning", _lm(_prompt(PromptEncoderConfig, encoder_hidden_size=512))),
    Method("P-tuning v2", _lm(_prompt(PrefixTuningConfig))),
    Method(
        "prefix tuning",
        _lm(_prompt(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=512)),
    ),
    Method(
        "BitFit",
        _adapters(lambda: fusetune.BitFitConfig(subset="all")),
        True,
        "torch",
        stock=_biases,
    ),
    _ours("Houlsby", _adapters(fusetune.BottleneckConfig.houlsby)),
    _ours("Pfeiffer", _adapters(fusetune.BottleneckConfig.pfeiffer)),
    _ours("parallel", _adapters(fusetune.BottleneckConfig.parallel)),
    _ours("AdapterFusion", _fusion),
    _ours("MAD-X", _madx),
)


def _bare(load: Callable[[Source], nn.Module]) -> Callable[[Source], Any]:
    """The model itself; its embeddings are trained, so that gradients pass all layers."""

    def make(source: Source) -> Any:
        model: Any = load(source).requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        return model

    return make


BARE = (
    Method("no method", _bare(Source.causal_lm)),
    Method("no method", _bare(Source.classifier), encoder=True),
)
NAMES = {method.name.lower().replace(" ", "-"): method for method in METHODS}
