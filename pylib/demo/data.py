"""Text for the demo: reading, splitting by conversation, tokenising and packing into batches."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import torch

Document = str | list[dict[str, str]]
"""Plain text (trained on every token) or chat messages (trained on the assistant's tokens)."""

IGNORED = -100  # the label that cross-entropy skips
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""For tokenizers that come without a chat template (base models)."""


def load_documents(path: Path | None) -> list[Document]:
    """The user's own text, JSONL or YAML, or the English part of chatterbot-corpus (BSD) for None.

    Raises: ValueError when the file cannot be read or holds no text.
    """
    if path is None:
        return chatterbot_corpus()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: cannot read {path} as UTF-8 text: {error}") from error
    if path.suffix in (".jsonl", ".json"):
        documents = [json_document(line, path, n) for n, line in numbered_lines(text)]
    elif path.suffix in (".yml", ".yaml"):
        documents = yaml_conversations(path)
    else:
        documents = [p.strip() for p in text.split("\n\n") if p.strip()]
    if not documents:
        raise ValueError(f"data: {path} holds no text")
    return documents


def numbered_lines(text: str) -> list[tuple[int, str]]:
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def json_document(line: str, path: Path, number: int) -> Document:
    """JSONL: {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}."""
    where = f"data: {path} line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object")
    if isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return alternate([record["prompt"], record["completion"]])
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(is_message(m) for m in messages):
        return messages
    raise ValueError(
        f"{where} has none of 'text', 'prompt' with 'completion', 'messages' (role, content)"
    )


def is_message(m: Any) -> bool:
    return (
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    )


def chatterbot_corpus() -> list[Document]:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data: pip install chatterbot-corpus, or give your own file with --data")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    return [d for path in sorted(folder.glob("*.yml")) for d in yaml_conversations(path)]


def yaml_conversations(path: Path) -> list[Document]:
    """chatterbot-corpus' format: {"conversations": [[utterance, reply, ...], ...]}."""
    import yaml  # type: ignore[import-untyped]

    try:
        conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        return [alternate([str(u).strip() for u in c]) for c in conversations if len(c) > 1]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"data: {path} has no list of 'conversations': {error}") from error


def alternate(utterances: list[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(utterances)]


def split(
    documents: list[Document], held_out: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(train, held out). Documents with the same opening stay together: a question that was trained
    on is never asked in the evaluation. Exact duplicates are dropped."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        opening = document if isinstance(document, str) else document[0]["content"]
        same = groups.setdefault(opening.lower(), [])
        if document not in same:
            same.append(document)
    if len(groups) < 2:
        raise ValueError(f"data: {len(groups)} document(s), need 2 or more to hold some out")
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    n_held = min(max(1, round(len(order) * held_out)), len(order) - 1)
    pick = [[d for key in keys for d in groups[key]] for keys in (order[n_held:], order[:n_held])]
    return pick[0], pick[1]


def encode(document: Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a document; labels are IGNORED where there is nothing to learn."""
    if isinstance(document, str):
        ids = [*tokenizer(document).input_ids, tokenizer.eos_token_id]
        return ids, list(ids)

    def render(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = render(document, prompt=False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(document):
        if message["role"] == "assistant":
            start = len(render(document[:i], prompt=True)) if i else 0
            turn = render(document[: i + 1], prompt=False)
            # Some templates rewrite earlier turns when more follow; learn what they leave alone.
            if ids[: len(turn)] == turn:
                labels[start : len(turn)] = turn[start:]
    return ids, labels


class PackedText:
    """Documents packed into rows of `seq_len` tokens.

    `position_ids` start anew with each document, which is how transformers is told to keep the
    documents of a row apart in attention. Longer documents are cut; the end of a row is padding.
    """

    def __init__(self, documents: list[Document], tokenizer: Any, seq_len: int):
        pad = (tokenizer.pad_token_id or 0, IGNORED, 0)
        rows: list[list[tuple[int, int, int]]] = [[]]
        for document in documents:
            ids, labels = encode(document, tokenizer)
            for start in range(0, len(ids), seq_len):
                piece = slice(start, start + seq_len)
                # The first token of a piece has no predecessor to predict it from.
                piece_labels = [IGNORED, *labels[piece][1:]]
                tokens = list(zip(ids[piece], piece_labels, range(seq_len), strict=False))
                if len(rows[-1]) + len(tokens) > seq_len:
                    rows.append([])
                rows[-1] += tokens
        # Rows without a single label would make the mean loss NaN.
        rows = [row for row in rows if any(label != IGNORED for _, label, _ in row)]
        if not rows:
            raise ValueError("data: no token to learn (no assistant message, or only empty text)")
        table = torch.tensor([row + [pad] * (seq_len - len(row)) for row in rows])
        self.input_ids, self.labels, self.position_ids = (t.contiguous() for t in table.unbind(-1))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    def rows(self, index: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            name: getattr(self, name)[index].to(device)
            for name in ("input_ids", "labels", "position_ids")
        }

    def batch(
        self, step: int, size: int, seed: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Batch number `step` of an endless shuffled stream; depends on (step, size, seed) only."""
        index = [self._shuffled(i, seed) for i in range(step * size, (step + 1) * size)]
        return self.rows(torch.tensor(index), device)

    def _shuffled(self, position: int, seed: int) -> int:
        epoch, offset = divmod(position, len(self))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self), generator=generator)[offset])
