"""The methods that glue_of_methods compares, with the learning rates that each may choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn

import fusetune

from .fusion_of_tasks import RATE, SOURCES, source_of
from .minilm import MeanPooled, load_classifier
from .side_by_side import HEAD, HEAD_RATE, Method, head_only, make, with_peft
from .training import Batch, Tensor, Texts, Trainer, batches, only

PROMPT = 10  # positions of each kind of prompt
RANK = 8
LINEAR = ["query", "key", "value", "dense"]  # all of an encoder's layers
BATCH = 32
MASK = 103  # BERT's token for a hidden word
HIDDEN = 0.15  # of the words

State = dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A method, and the learning rates it is tried with: as many for each, but for the head's.

    before: trains what the method finds ready; on texts, whose labels have these names.
    """

    method: Method
    rates: tuple[float, ...]
    before: Callable[[Any, Texts, list[str], int], None] | None = None

    @property
    def name(self) -> str:
        return self.method.name

    def trainer(self, rate: float, labels: int, steps: int, ready: State | None) -> Trainer:
        """With a new head. ready: what `prepared` gave."""
        trainer = make(replace(self.method, rate=rate), labels, steps)
        if ready:
            unknown = trainer.modules[1].load_state_dict(ready, strict=False).unexpected_keys
            assert not unknown, unknown
        return trainer

    def prepared(self, texts: Texts, labels: list[str], steps: int) -> State | None:
        """The weights after `before`, without the head's; None where there is nothing to do."""
        if self.before is None:
            return None
        model = make(self.method, len(labels), steps).modules[1]
        self.before(model, texts, labels, steps)
        return {k: v.clone() for k, v in model.state_dict().items() if "classifier" not in k}


def candidates(steps: int) -> tuple[Candidate, ...]:
    """All methods. steps: of the training, which AdaLoRA's schedule needs to know."""
    bottleneck = fusetune.BottleneckConfig
    # name, rates, what puts it into the model, and more of Method's
    plain: tuple[tuple[str, tuple[float, ...], Any, dict[str, Any]], ...] = (
        ("BitFit", (1e-3, 3e-3, 1e-2), with_peft(bitfit), {}),
        ("LoRA", (1e-3, 3e-3, 1e-2), with_peft(lora), {}),
        ("QLoRA", (1e-3, 3e-3, 1e-2), with_peft(lora), {"load": load_4bit}),
        ("DoRA", (1e-3, 3e-3, 1e-2), with_peft(lambda: lora(use_dora=True)), {}),
        ("AdaLoRA", (3e-3, 1e-2, 3e-2), with_peft(adalora(steps)), {"trainer": AdaLoraTrainer}),
        ("IA3", (3e-3, 1e-2, 3e-2), with_peft(ia3), {}),
        ("prompt tuning", (1e-2, 3e-2, 1e-1), with_peft(prompt("PromptTuningConfig")), {}),
        ("P-tuning", (1e-3, 3e-3, 1e-2), with_peft(prompt("PTuningConfig")), {}),
        ("P-tuning v2", (1e-2, 3e-2, 1e-1), with_peft(prompt("PTuningV2Config")), {}),
        ("prefix tuning", (3e-4, 1e-3, 3e-3), with_peft(prompt("PrefixTuningConfig")), {}),
        ("Houlsby", (1e-3, 3e-3, 1e-2), with_peft(lambda: bottleneck.houlsby(**HEAD)), {}),
        ("Pfeiffer", (1e-3, 3e-3, 1e-2), with_peft(lambda: bottleneck.pfeiffer(**HEAD)), {}),
        ("parallel", (1e-3, 3e-3, 1e-2), with_peft(lambda: bottleneck.parallel(**HEAD)), {}),
        ("full", (1e-4, 3e-4, 1e-3), lambda model: model, {}),
    )
    found = [
        Candidate(Method(name, rates[1], prepare, **more), rates)
        for name, rates, prepare, more in plain
    ]
    found.insert(0, Candidate(Method("head only", HEAD_RATE, head_only), (HEAD_RATE,)))
    found[-1:-1] = [
        Candidate(Method("AdapterFusion", 1e-3, fusion), (3e-4, 1e-3, 3e-3), learn_sources),
        Candidate(Method("MAD-X", 3e-3, madx), (1e-3, 3e-3, 1e-2), learn_language),
    ]
    return tuple(found)


# --- configs --------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, **options, **HEAD)


def ia3() -> IA3Config:
    """Keys, values, and what the activation of the feed-forward layers gives, as in the paper."""
    output = r".*layer\.\d+\.output\.dense"
    return IA3Config(
        target_modules=rf".*\.(key|value)|{output}", feedforward_modules=output, **HEAD
    )


def prompt(kind: str) -> Callable[[], Any]:
    return lambda: getattr(fusetune, kind)(num_virtual_tokens=PROMPT, **HEAD)


def load_4bit(labels: int) -> MeanPooled:
    """The encoder's linear layers in NF4, double quantisation."""
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["classifier"],
    )
    return load_classifier(labels, quantization_config=nf4, device_map={"": "cpu"})


def bitfit() -> Any:
    return fusetune.BitFitConfig(subset="all", **HEAD)


# --- AdaLoRA --------------------------------------------------------------------------------------


def adalora(steps: int) -> Callable[[], AdaLoraConfig]:
    """Half as much rank again at first; the budget sinks from the 10th to the 70th percent."""
    return lambda: AdaLoraConfig(
        init_r=3 * RANK // 2,
        target_r=RANK,
        lora_alpha=2 * RANK,
        tinit=steps // 10,
        tfinal=max(1, 3 * steps // 10),
        deltaT=max(1, steps // 50),
        total_step=steps,
        target_modules=LINEAR,
        **HEAD,
    )


class AdaLoraTrainer(Trainer):
    """With the orthogonal regularisation, which PEFT's model adds to the loss, and the budget."""

    done = 0

    def loss(self, arguments: dict[str, Tensor], targets: Tensor) -> Tensor:
        loss: Tensor = self.logits(**arguments, labels=targets).loss
        return loss

    def updated(self) -> None:
        allocate(self.logits, self.done)
        self.done += 1


def allocate(model: Any, step: int) -> None:
    """Moves AdaLoRA's budget on, after the update of a step and with its gradients still there."""
    model.base_model.update_and_allocate(step)


def ranks(model: nn.Module) -> dict[str, int]:
    """Of each matrix with AdaLoRA's adapter: singular values that were not pruned."""
    return {
        name: int((module.lora_E["default"] != 0).sum())
        for name, module in model.named_modules()
        if hasattr(module, "lora_E")
    }


# --- methods that find something ready ------------------------------------------------------------


def fusion(model: MeanPooled) -> nn.Module:
    """AdapterFusion of the adapters of three tasks."""
    adapted = get_peft_model(model, _pfeiffer(), SOURCES[0])
    for name in SOURCES[1:]:
        adapted.add_adapter(name, _pfeiffer())
    adapted.add_adapter("fused", fusetune.AdapterFusionConfig(adapters=list(SOURCES)))
    fusetune.compose(adapted, "fused", trainable=["fused"])
    return _with_head(adapted)


def _with_head(adapted: Any) -> nn.Module:
    """Fused, and its head trained where it is."""
    adapted.get_base_model().classifier.requires_grad_(True)
    fusetune.fuse(adapted)
    tuned: nn.Module = adapted
    return tuned


def _pfeiffer() -> Any:
    return fusetune.BottleneckConfig.pfeiffer(init_weights_seed=0)


def learn_sources(model: Any, texts: Texts, labels: list[str], steps: int) -> None:
    """Each adapter, with a head of its own, on the labels of its task."""
    head = model.get_base_model().classifier
    for name in SOURCES:
        fusetune.compose(model, name, trainable=[name])
        head.requires_grad_(True).reset_parameters()
        numbers = [n for n, label in enumerate(labels) if source_of(label) == name]
        trainer = Trainer(model, [(head, HEAD_RATE), (model, RATE)], steps)
        trainer.fit(only(texts, numbers), BATCH, steps)


def madx(model: MeanPooled) -> nn.Module:
    """A task's adapter on the language's."""
    adapted = get_peft_model(model, fusetune.MadXConfig(init_weights_seed=1), "language")
    adapted.add_adapter("task", fusetune.MadXConfig.task(init_weights_seed=1))
    fusetune.compose(adapted, fusetune.Stack("language", "task"), trainable=["task"])
    return _with_head(adapted)


def learn_language(model: Any, texts: Texts, labels: list[str], steps: int) -> None:
    """The language's adapter, to fill in hidden words of the texts, whose labels are not used.

    The encoder came without the layers that guess words: a state is compared with the words'
    embeddings as they are.
    """
    fusetune.compose(model, "language", trainable=["language"])
    encoder = model.get_base_model().bert
    words = encoder.embeddings.word_embeddings.weight.detach()

    def logits(hidden: Tensor, **arguments: Tensor) -> Tensor:
        return encoder(**arguments).last_hidden_state[hidden] @ words.T

    trainer = Trainer(logits, [(model, RATE)], steps)
    for batch in hidden_words(texts, steps):
        trainer.step(batch)


def hidden_words(texts: Texts, steps: int) -> Iterator[Batch]:
    """Batches of which some words are hidden, and those words; never the first or last token."""
    generator = torch.Generator().manual_seed(0)
    for arguments, _ in batches(texts, BATCH, steps):
        ids, mask = arguments["input_ids"], arguments["attention_mask"].bool()
        inside = mask & mask.roll(-1, 1)  # [SEP] is the last
        inside[:, [0, -1]] = False
        hidden = inside & (torch.rand(ids.shape, generator=generator) < HIDDEN)
        hidden[0, 1] = True  # one at least
        yield (
            {**arguments, "input_ids": ids.masked_fill(hidden, MASK), "hidden": hidden},
            ids[hidden],
        )
