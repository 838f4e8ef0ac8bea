"""Part three: MAD-X on a toy language that is written in two alphabets.

A word of the language is a letter between two digits, "3k7", and a text has words of mostly one
topic. The letters are those of alphabet A or those of B, and nothing tells which letter of one is
which of the other; but the digits, which depend on the letter, are common to both. In the texts
of the task the digits are illegible: their topic is in the letters alone.

    pretraining            a BERT, by masked symbols, on texts in A
    language adapters      of A and of B, with invertible blocks, by masked symbols, all else frozen
    task adapter           topic of a text in A, stacked on the language adapter of A
    asked of texts in B    under the adapter of A, and with that of B in its place
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import fusetune

from .training import Batch, Tensor, Trainer

TOPICS, EACH, WORDS = 4, 5, 8  # letters of each topic, words of a text
LETTERS = TOPICS * EACH
LOW = 2 * EACH  # digits that stand before a letter; as many others stand after one
NOISE = 0.1  # a digit is any, with this probability
OWN = 0.7  # a letter is of the text's topic
CLS, MASK, DIGITS = 1, 2, 3
FIRST = {"A": DIGITS + 2 * LOW, "B": DIGITS + 2 * LOW + LETTERS}
HIDDEN = 64
BATCH = 48
STEPS = (500, 500, 150, 1000)  # pretraining, a language, the task; texts it is tested on


def draw_texts(count: int, alphabet: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(symbols [count, 1 + 3 WORDS], topics [count])"""
    shape = (count, WORDS)

    def uniform(below: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    def sometimes(probability: float) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    topic = torch.randint(TOPICS, (count,), generator=generator)
    of = torch.where(sometimes(OWN), topic[:, None], uniform(TOPICS))
    within = uniform(EACH)
    before = torch.where(sometimes(NOISE), uniform(LOW), of % 2 * EACH + within)
    after = torch.where(sometimes(NOISE), uniform(LOW), of // 2 * EACH + within)
    letter = of * EACH + within
    if alphabet == "B":  # another order of the letters
        letter = torch.randperm(LETTERS, generator=torch.Generator().manual_seed(7))[letter]
    words = torch.stack((DIGITS + before, FIRST[alphabet] + letter, DIGITS + LOW + after), -1)
    return torch.cat((torch.full((count, 1), CLS), words.flatten(1)), 1), topic


def masked(alphabet: str, steps: int, seed: int) -> Iterator[Batch]:
    """Batches of texts with a fifth of the symbols hidden; targets are -100 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        symbols, _ = draw_texts(BATCH, alphabet, generator)
        hidden = (torch.rand(symbols.shape, generator=generator) < 0.2) & (symbols != CLS)
        yield {"input_ids": symbols.masked_fill(hidden, MASK)}, symbols.masked_fill(~hidden, -100)


def question(count: int, alphabet: str, generator: torch.Generator) -> Batch:
    """Texts without legible digits, and their topics."""
    symbols, topic = draw_texts(count, alphabet, generator)
    digits = (symbols >= DIGITS) & (symbols < DIGITS + 2 * LOW)
    return {"input_ids": symbols.masked_fill(digits, MASK)}, topic


def labelled(alphabet: str, steps: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield question(BATCH, alphabet, generator)


def make_model() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=DIGITS + 2 * LOW + 2 * LETTERS,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=1 + 3 * WORDS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    # Letters of B stay as they are drawn here: they must not drown in the positions' embeddings.
    nn.init.normal_(model.bert.embeddings.word_embeddings.weight, std=0.2)
    return model


def learn_language(model: nn.Module, alphabet: str, rate: float, steps: int, seed: int) -> float:
    """Trains what is not frozen to fill in hidden symbols; the mean loss of the last steps."""

    def logits(**arguments: Tensor) -> Tensor:
        return model(**arguments).logits.transpose(1, 2)  # as cross_entropy has them

    trainer = Trainer(logits, [(model, rate)], steps)
    losses = [trainer.step(batch) for batch in masked(alphabet, steps, seed)]
    last = losses[-50:]
    return sum(last) / len(last)


def run(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Accuracies of the task, by the text's alphabet and the language adapter in use."""
    pretraining, language, task, count = (3, 3, 3, 100) if quick else STEPS
    model = make_model()
    loss = learn_language(model, "A", 4e-3, pretraining, 1)
    progress(f"pretrained on A: loss {loss:.2f}")

    adapted = get_peft_model(model, fusetune.MadXConfig(init_weights_seed=1), "A")
    adapted.add_adapter("B", fusetune.MadXConfig(init_weights_seed=1))
    adapted.add_adapter("task", fusetune.MadXConfig.task(reduction_factor=4, init_weights_seed=1))
    for alphabet, seed in (("A", 2), ("B", 3)):
        fusetune.compose(adapted, alphabet)
        loss = learn_language(adapted, alphabet, 4e-3, language, seed)
        progress(f"language adapter of {alphabet}: loss {loss:.2f}")

    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, TOPICS)

    def logits(**arguments: Tensor) -> Tensor:
        # The model's language-model head has no part in the task; its hidden states have.
        states = adapted(**arguments, output_hidden_states=True).hidden_states[-1]
        return head(states.mean(1))

    fusetune.compose(adapted, fusetune.Stack("A", "task"), trainable=["task"])
    trainer = Trainer(logits, [(head, 3e-3), (adapted, 3e-3)], task)
    for batch in labelled("A", task, 4):
        trainer.step(batch)

    rows = []
    for text, under in (("A", "A"), ("B", "A"), ("B", "B")):
        fusetune.compose(adapted, fusetune.Stack(under, "task"))
        with torch.no_grad():
            arguments, topic = question(count, text, torch.Generator().manual_seed(5))
            right = (logits(**arguments).argmax(-1) == topic).float().mean()
        rows.append({"text": text, "language": f"language {under}", "accuracy": float(right)})
        progress(f"text in {text} under language {under}: {rows[-1]['accuracy']:.1%}")
    return {"rows": rows, "chance": 1 / TOPICS, "held_out": count}
