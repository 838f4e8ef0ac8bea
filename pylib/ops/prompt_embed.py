"""prompt_embed: a model's input of prompt and token embeddings, in one pass over the result.

A look-up, a repetition of the prompt for every row and a concatenation write each embedding up to
three times, and their backward keeps a gradient for every row. Here it is written once, and the
prompt's gradient is summed over the batch as it is read. `extend_mask` and `extend_labels` make
the attention mask and the labels that belong to it.
"""

from __future__ import annotations

import torch

from fusetune.ops import _check
from fusetune.ops._prompt_embed import embed

Tensor = torch.Tensor
INTEGERS = (torch.int64, torch.int32)


def prompt_embed(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    *,
    positions: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """Prompt tuning's input (Lester et al. 2021): [B, P + T, H] in weight's dtype.

    input_ids: int64 or int32 [B, T]; weight: the embeddings [V, H]; prompt: [P, H] or, for several
    prompts, [G, P, H], of any float dtype.

    positions: int64 [P] or [B, P], strictly increasing: the places of the result that hold the
    prompt, as in P-tuning (Liu et al. 2021); tokens fill the others. None: in front. rows: int64
    [B], which of the G prompts each row has, or -1 for none: zeros lie in its place, for the mask
    to hide. scale multiplies the tokens' embeddings, not the prompt. padding_idx: the row of weight
    that gets no gradient.

    Differentiable, once, in prompt (summed over the batch, in a fixed order) and in weight. Raises
    TypeError or ValueError, naming the argument, for shapes, dtypes, devices and, on the CPU,
    values that do not fit. Definition: reference/prompt_embed.py.
    """
    _check_tensors(input_ids, weight, prompt)
    groups = prompt if prompt.dim() == 3 else prompt.unsqueeze(0)
    batch, tokens = input_ids.shape
    if positions is not None:
        positions = _checked_positions(positions, batch, groups.shape[1], tokens)
        _check_device("positions", positions, weight)
    if rows is None and len(groups) != 1:
        raise ValueError(f"rows must say which of the {len(groups)} prompts each row has, got None")
    if rows is not None:
        _check_rows(rows, batch)
        _check_device("rows", rows, weight)
    padding = -1 if padding_idx is None else _checked_padding(padding_idx, len(weight))
    return embed(input_ids.long(), weight, groups, positions, rows, float(scale), padding)


def extend_mask(
    attention_mask: Tensor,
    length: int,
    *,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """attention_mask [B, T] with the prompt's `length` places: [B, length + T] of the same dtype.

    The prompt is seen by all. positions: as in `prompt_embed`. lengths: int64 [B], how many of a
    row's prompt places hold something, the last ones; not together with positions. Raises TypeError
    or ValueError, naming the argument.
    """
    _check_batch("attention_mask", attention_mask, length)
    extended = _extended(attention_mask, length, 1, positions)
    if lengths is None:
        return extended
    if positions is not None:
        raise ValueError("lengths cannot be given together with positions")
    _check_rows(lengths, len(attention_mask), "lengths")
    _check_device("lengths", lengths, attention_mask)
    places = torch.arange(length, device=lengths.device)
    extended[:, :length] = places >= length - lengths[:, None]
    return extended


def extend_labels(
    labels: Tensor, length: int, *, positions: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """labels [B, T] with `ignore_index` at the prompt's places: [B, length + T], the same dtype.

    positions: as in `prompt_embed`. Raises TypeError or ValueError, naming the argument.
    """
    _check_batch("labels", labels, length)
    return _extended(labels, length, ignore_index, positions)


def _extended(values: Tensor, length: int, fill: int, positions: Tensor | None) -> Tensor:
    batch, tokens = values.shape
    out = values.new_empty(batch, length + tokens)
    if positions is None:
        out[:, :length] = fill
        out[:, length:] = values
        return out
    positions = _checked_positions(positions, batch, length, tokens).expand(batch, -1)
    _check_device("positions", positions, values)
    free = torch.ones_like(out, dtype=torch.bool).scatter_(1, positions, False)
    return out.fill_(fill).masked_scatter_(free, values)


# --- arguments ---- -------------------------------------------------------------------------------


def _check_tensors(input_ids: Tensor, weight: Tensor, prompt: Tensor) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in INTEGERS:
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 or int32 tensor, got {kind}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape [B, T], got {list(input_ids.shape)}")
    _check.check_float("weight", weight)
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"weight must have shape [V, H] with H > 0, got {list(weight.shape)}")
    _check.check_float("prompt", prompt)
    h = weight.shape[1]
    if prompt.dim() not in (2, 3) or prompt.shape[-1] != h:
        raise ValueError(
            f"prompt must have shape [P, {h}] or [G, P, {h}], got {list(prompt.shape)}"
        )
    if prompt.dim() == 3 and not len(prompt):
        raise ValueError(f"prompt must hold at least one prompt, got {list(prompt.shape)}")
    _check_device("input_ids", input_ids, weight)
    _check_device("prompt", prompt, weight)


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, not on {other.device}: move one of them")


def _check_rows(rows: Tensor, batch: int, name: str = "rows") -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {kind}")
    _check.check_shape(name, rows, (batch,))


def _checked_positions(positions: Tensor, batch: int, length: int, tokens: int) -> Tensor:
    """positions as [B or 1, P]."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an int64 tensor, got {kind}")
    if tuple(positions.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must have shape {[length]} or {[batch, length]}, "
            f"got {list(positions.shape)}"
        )
    slots = positions if positions.dim() == 2 else positions.unsqueeze(0)
    known = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and type(positions) is Tensor and positions.numel():
        end = length + tokens
        if slots.min() < 0 or slots.max() >= end or (slots.diff(dim=1) <= 0).any():
            raise ValueError(
                f"positions must be strictly increasing and in [0, {end}), got {positions.tolist()}"
            )
    return slots


def _checked_padding(padding_idx: int, vocabulary: int) -> int:
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(f"padding_idx must be in [{-vocabulary}, {vocabulary}), got {padding_idx}")
    return padding_idx % vocabulary


def _check_batch(name: str, values: Tensor, length: int) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dim() != 2:
        raise ValueError(f"{name} must have shape [B, T], got {list(values.shape)}")
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
