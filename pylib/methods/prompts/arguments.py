"""A forward's arguments with a prompt in them: embeddings, mask, labels, positions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from fusetune.methods.prompts.template import extended, fill_rows
from fusetune.methods.prompts.turn import Turn
from fusetune.nn import _token_embedding, cache_argument
from fusetune.ops.prompt_embed import extend_labels, extend_mask, prompt_embed

Tensor = torch.Tensor
Arguments = dict[str, Any]

# Arguments that are places in the sequence (question answering).
_SPANS = ("start_positions", "end_positions")


def named(module: Any, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """A forward's arguments by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check(values: Arguments) -> None:
    """Raises ValueError for a mask or a cache without room for a prompt."""
    check_mask(values.get("attention_mask"))
    if getattr(cache_argument.given(values), "is_compileable", False):
        raise ValueError(
            "cache: a static one has no room for the prompt; in generate leave "
            "cache_implementation out"
        )


def check_mask(mask: Any) -> None:
    """Raises ValueError for a mask that cannot be extended."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: with a prompt it must be of shape [B, T], got {shape}; generate "
            "makes another one for a static cache: leave cache_implementation out"
        )


def put_in_front(module: Any, values: Arguments, turn: Turn) -> None:
    """The prompt before everything, as PEFT has it; `values` are changed."""
    ids: Tensor = values["input_ids"]
    values["inputs_embeds"] = _embed(module.get_input_embeddings(), ids, turn, None)
    _extend_in_front(module, values, turn, ids.shape)
    values["input_ids"] = None


def put_at_places(module: Any, values: Arguments, turn: Turn) -> None:
    """The prompt where the template has it, or where the input has pseudo-tokens already."""
    ids: Tensor = values["input_ids"]
    if not bool((ids == turn.pseudo_token_id).any()):
        ids = _fill(values, turn)
    marks = ids == turn.pseudo_token_id
    counts = marks.sum(1)
    if bool((counts != turn.length).any()):
        raise ValueError(
            f"input_ids: each row must have {turn.length} pseudo-tokens "
            f"(id {turn.pseudo_token_id}), got {counts.tolist()}"
        )
    places = marks.nonzero()[:, 1].view(len(ids), turn.length)
    tokens = ids[~marks].view(len(ids), -1)
    values["inputs_embeds"] = _embed(module.get_input_embeddings(), tokens, turn, places)
    labels: Any = values.get("labels")
    if _per_token(labels, ids.shape):
        values["labels"] = labels.masked_fill(marks, -100)
    values["input_ids"] = None


def _per_token(values: Any, shape: Sequence[int]) -> bool:
    """Whether these are labels of tokens, not of sequences."""
    return isinstance(values, Tensor) and values.shape == shape and not values.is_floating_point()


def _embed(embedding: Any, tokens: Tensor, turn: Turn, places: Tensor | None) -> Tensor:
    prompt = turn.stacked()
    if _token_embedding.stock_reason(embedding) is not None:
        return _joined(embedding(tokens), prompt, turn, places)
    embedded = prompt_embed(
        tokens,
        embedding.weight,
        prompt,
        positions=places,
        rows=turn.rows,
        scale=_token_embedding.scale_of(embedding) or 1.0,
        padding_idx=embedding.padding_idx,
    )
    return _token_embedding.require_grad_as(embedding, embedded)


def _joined(embedded: Tensor, prompt: Tensor, turn: Turn, places: Tensor | None) -> Tensor:
    """[B, P + T, H] of the tokens' embeddings [B, T, H]."""
    batch = len(embedded)
    if turn.rows is None:
        mine = prompt.expand(batch, -1, -1)
    else:
        mine = prompt[turn.rows.clamp(min=0)] * (turn.rows >= 0)[:, None, None]
    joined = torch.cat((mine.to(embedded.dtype), embedded), 1)
    if places is None:
        return joined
    taken = torch.zeros(joined.shape[:2], dtype=torch.bool, device=joined.device)
    taken.scatter_(1, places, True)
    # The prompt's vectors in the order of their places, then the tokens in the order of theirs.
    order = (~taken).long().argsort(stable=True, dim=1).argsort(1)
    return joined.gather(1, order[..., None].expand_as(joined))


def put_before_embeddings(module: Any, values: Arguments, turn: Turn) -> None:
    """As `put_in_front`, of a model that was called with embeddings."""
    if turn.template is not None:
        raise ValueError("inputs_embeds: a template needs input_ids to know what is where")
    embedded = values["inputs_embeds"]
    values["inputs_embeds"] = _joined(embedded, turn.stacked(), turn, None)
    _extend_in_front(module, values, turn, embedded.shape[:2])


def _extend_in_front(module: Any, values: Arguments, turn: Turn, shape: Sequence[int]) -> None:
    length = turn.length
    if values.get("attention_mask") is None and turn.lengths is not None:
        values["attention_mask"] = _ones(turn.lengths, shape[1])
    if values.get("attention_mask") is not None:
        values["attention_mask"] = longer_mask(values["attention_mask"], turn)
    if values.get("token_type_ids") is not None:
        values["token_type_ids"] = extend_labels(values["token_type_ids"], length, ignore_index=0)
    if _per_token(values.get("labels"), shape):
        values["labels"] = extend_labels(values["labels"], length)
    if values.get("position_ids") is not None:
        values["position_ids"] = _positions_in_front(values["position_ids"], turn)
    elif turn.uneven:
        values["position_ids"] = _new_positions(module, turn, shape)
    for name in _SPANS:
        if values.get(name) is not None:
            values[name] = values[name] + length


def mask_of_encoded(mask: Tensor | None, states: Tensor, turn: Turn) -> Tensor | None:
    """The mask [B, P + T] of an encoder's output, of the mask [B, T] of its input."""
    if mask is None:
        if turn.lengths is None:
            return None
        mask = _ones(turn.lengths, states.shape[1] - turn.length)
    check_mask(mask)
    return mask if mask.shape[1] == states.shape[1] else longer_mask(mask, turn)


def _ones(lengths: Tensor, tokens: int) -> Tensor:
    return torch.ones(len(lengths), tokens, dtype=torch.long, device=lengths.device)


def longer_mask(mask: Tensor, turn: Turn) -> Tensor:
    """A mask [B, T] with the prompt's places: [B, T + turn.added]."""
    if turn.template is not None:
        return extended(mask, turn.added)
    return extend_mask(mask, turn.length, lengths=turn.lengths)


def _positions_in_front(position_ids: Tensor, turn: Turn) -> Tensor:
    """The tokens' positions after the prompt's."""
    begin = position_ids.amin(1, keepdim=True)
    places = torch.arange(turn.length, device=position_ids.device)
    if turn.lengths is None:
        return torch.cat((begin + places, position_ids + turn.length), 1)
    used = turn.lengths[:, None]
    places = (places - turn.length + used).clamp(min=0)
    return torch.cat((begin + places, position_ids + used), 1)


def _new_positions(module: Any, turn: Turn, shape: Sequence[int]) -> Tensor | None:
    """Positions that leave out the empty places before a shorter prompt; None: none are needed."""
    config = module.config
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        return None
    if "position_ids" not in inspect.signature(type(module).forward).parameters:
        raise ValueError(
            f"adapter_names: {type(module).__name__} takes no position_ids, so that the prompts of "
            "a batch must be of one length"
        )
    assert turn.lengths is not None
    tokens = torch.arange(shape[1], device=turn.lengths.device) + _first_position(module)
    return _positions_in_front(tokens.expand(shape[0], -1), turn)


def _first_position(module: Any) -> int:
    """RoBERTa and its kin count positions from behind the padding's id."""
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(part.padding_idx) + 1
    return 0


def _fill(values: Arguments, turn: Turn) -> Tensor:
    """The template around the rows of a batch: their new ids, and `values` to match."""
    assert turn.template is not None
    ids, mask = values["input_ids"], values.get("attention_mask")
    if turn.template.slots != 1:
        raise ValueError(
            f"input_ids: the template has {turn.template.slots} slots, and the input no "
            f"pseudo-tokens (id {turn.pseudo_token_id}): make it by PTuningConfig.fill"
        )
    if mask is not None and cache_argument.given(values) is not None and _holes(mask):
        raise ValueError("attention_mask: with a template, padding must be at the left to generate")
    filled = fill_rows(ids, mask, *turn.template.around(turn.pseudo_token_id))
    if mask is not None:
        values["attention_mask"] = filled.take(mask, 1)
    if values.get("token_type_ids") is not None:
        values["token_type_ids"] = filled.take(values["token_type_ids"], 0)
    if _per_token(values.get("labels"), ids.shape):
        values["labels"] = filled.take(values["labels"], -100)
    if values.get("position_ids") is not None:
        values["position_ids"] = filled.positions(values["position_ids"])
    for name in _SPANS:
        if values.get(name) is not None:
            values[name] = filled.moved(values[name])
    return filled.ids


def _holes(mask: Tensor) -> bool:
    return bool((mask[:, 1:] < mask[:, :-1]).any())


def continue_after_cache(values: Arguments, turn: Turn, new: int) -> None:
    """A forward of `new` positions behind a cache that has the prompt in it."""
    mask, positions = values.get("attention_mask"), values.get("position_ids")
    if turn.template is not None and turn.template.slots != 1:
        return  # the pseudo-tokens were in the input, and are counted
    if mask is not None:
        total = int(cache_argument.given(values).get_seq_length()) + new
        if turn.template is not None and mask.shape[1] == total:
            return  # so they were here
        if mask.shape[1] + turn.added != total:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns; the cache and the new tokens have "
                f"{total}, of which {turn.added} are the prompt's"
            )
        values["attention_mask"] = longer_mask(mask, turn)
    elif turn.lengths is not None:
        # generate leaves a mask of ones out; prompts shorter than the longest must not be seen.
        total = int(cache_argument.given(values).get_seq_length()) + new
        values["attention_mask"] = longer_mask(_ones(turn.lengths, total - turn.added), turn)
    if positions is not None:
        added: Any = turn.added if turn.lengths is None else turn.lengths[:, None]
        values["position_ids"] = positions + added


def align_right(values: Arguments) -> None:
    """Moves padding from the right to the left.

    For models that classify by the last token: given embeddings, they cannot tell padding from
    tokens, and take the last position.
    """
    mask, embedded = values.get("attention_mask"), values.get("inputs_embeds")
    if mask is None or embedded is None:
        return
    used = mask != 0
    behind = used.flip(1).long().argmax(1, keepdim=True)
    if not bool(behind.any()):
        return
    places = torch.arange(mask.shape[1], device=mask.device)
    order = (places - behind) % mask.shape[1]
    values["inputs_embeds"] = embedded.gather(1, order[..., None].expand_as(embedded))
    values["attention_mask"] = mask.gather(1, order)
    positions = values.get("position_ids")
    positions = places[None] if positions is None else positions
    values["position_ids"] = positions.expand(len(mask), -1).gather(1, order)
    if values.get("token_type_ids") is not None:
        values["token_type_ids"] = values["token_type_ids"].gather(1, order)
