"""Input embeddings with prompts in them: by hooks on the transformers model.

`generate` calls the transformers model itself, not PEFT's: what has to happen at each forward is
done here. The prompt goes in where there is no cache yet; with a cache, the mask and the positions
count what is in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fusetune.methods.prompts.layer import PromptLayer
from fusetune.methods.prompts.shallow_config import PTuningConfig
from fusetune.methods.prompts.template import Template, extended, fill_rows
from fusetune.ops.prompt_embed import extend_labels, extend_mask, prompt_embed

Tensor = torch.Tensor
Arguments = dict[str, Any]

# Arguments that are places in the sequence (question answering).
_SPANS = ("start_positions", "end_positions")


class Turn(NamedTuple):
    """The prompts of one forward.

    prompts: [P, H] each; rows: int64 [B], which of them a row has, -1 none, or None: the first.
    lengths: by row how many positions its prompt has, where rows differ. template: None in front.
    """

    prompts: list[Tensor]
    rows: Tensor | None
    lengths: Tensor | None
    template: Template | None
    pseudo_token_id: int

    @property
    def length(self) -> int:
        """P, the longest prompt's."""
        return max(len(prompt) for prompt in self.prompts)

    @property
    def added(self) -> int:
        """How many positions come to a sequence that has no pseudo-tokens in it."""
        if self.template is None:
            return self.length
        return sum(map(len, self.template.around(self.pseudo_token_id)))

    def stacked(self) -> Tensor:
        """[G, P, H], a shorter prompt at the right end."""
        if len(self.prompts) == 1:
            return self.prompts[0][None]
        padded = [
            nn.functional.pad(prompt, (0, 0, self.length - len(prompt), 0))
            for prompt in self.prompts
        ]
        return torch.stack(padded)


class EmbeddingHooks:
    """The hooks of one model. `remove` takes them away."""

    def __init__(self, model: Any, layer: PromptLayer) -> None:
        self.layer = layer
        self.decoder_only = not model.config.is_encoder_decoder
        self.stack = model if self.decoder_only else model.get_encoder()
        self._handles = [self.stack.register_forward_pre_hook(self._before_stack, with_kwargs=True)]
        if not self.decoder_only:
            self._handles.append(
                model.get_decoder().register_forward_pre_hook(
                    self._before_decoder, with_kwargs=True
                )
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- the model, or the encoder ----------------------------------------------------------------

    def _before_stack(self, module: Any, args: Any, kwargs: Arguments) -> Any:
        if not self._concerned():
            return None
        values = _named(module, args, kwargs)
        given = values.get("input_ids")
        given = values.get("inputs_embeds") if given is None else given
        if given is None:
            return None
        turn = self._turn(given.shape[0], given.device)
        if turn is None:
            return None
        _check_mask(values.get("attention_mask"))
        cache = values.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            _continued(values, turn)
        elif values.get("inputs_embeds") is not None:
            _in_front_of_embeddings(values, turn)
        elif turn.template is None and not _marked(values["input_ids"], turn):
            self._in_front(module, values, turn)
        else:
            self._at_places(module, values, turn)
        return (), values

    def _concerned(self) -> bool:
        """Whether a shallow prompt has its turn, without the batch."""
        layer = self.layer
        names = layer.active_adapters if layer.rows is None else layer.rows
        configs = (layer.prompt_configs.get(name) for name in names)
        return not layer.disable_adapters and any(c is not None and not c.deep for c in configs)

    def _turn(self, batch: int, device: torch.device) -> Turn | None:
        names, rows = self.layer.in_turn(batch)
        if not names:
            return None
        configs: list[Any] = [self.layer.prompt_configs[name] for name in names]
        if any(config.deep for config in configs):
            raise ValueError(f"adapter_names: {names} mixes prefixes and prompts in one batch")
        templates = [_template(config) for config in configs]
        if rows is not None and any(template is not None for template in templates):
            raise ValueError(
                f"adapter_names: of {names}, one has a template; in a batch of several adapters "
                "each must have its prompt in front"
            )
        prompts = [self.layer.prompt(name) for name in names]
        mark = getattr(configs[0], "pseudo_token_id", None)
        if rows is None:
            return Turn(prompts, None, None, templates[0], -1 if mark is None else mark)
        lengths = [len(prompts[row]) if row >= 0 else 0 for row in rows]
        return Turn(
            prompts,
            torch.tensor(rows, device=device),
            torch.tensor(lengths, device=device),
            None,
            -1,
        )

    def _in_front(self, module: Any, values: Arguments, turn: Turn) -> None:
        embedding = module.get_input_embeddings()
        values["inputs_embeds"] = _embed(embedding, values["input_ids"], turn, None)
        _extend_in_front(module, values, turn, values["input_ids"].shape)
        values["input_ids"] = None

    def _at_places(self, module: Any, values: Arguments, turn: Turn) -> None:
        ids: Tensor = values["input_ids"]
        if not _marked(ids, turn):
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
        labels = values.get("labels")
        if _per_token(labels, ids.shape):
            values["labels"] = labels.masked_fill(marks, -100)
        values["input_ids"] = None

    # --- the decoder of an encoder-decoder model --------------------------------------------------

    def _before_decoder(self, module: Any, args: Any, kwargs: Arguments) -> Any:
        """Its mask of the encoder's output is the encoder's input's: without the prompt."""
        if not self._concerned():
            return None
        values = _named(module, args, kwargs)
        states, mask = values.get("encoder_hidden_states"), values.get("encoder_attention_mask")
        if states is None or mask is None or states.shape[1] == mask.shape[-1]:
            return None
        turn = self._turn(states.shape[0], states.device)
        if turn is None:
            return None
        _check_mask(mask)
        values["encoder_attention_mask"] = _longer_mask(mask, turn)
        return (), values


# --- arguments of a forward ---- ------------------------------------------------------------------


def _named(module: Any, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """A forward's arguments by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: with a prompt it must be of shape [B, T], got {shape}. generate "
            "makes another one for static caches: leave cache_implementation out"
        )


def _template(config: Any) -> Template | None:
    """None: in front."""
    if not isinstance(config, PTuningConfig) or config.parsed.in_front:
        return None
    return config.parsed


def _marked(ids: Tensor, turn: Turn) -> bool:
    """Whether the input has pseudo-tokens of its own."""
    return turn.pseudo_token_id >= 0 and bool((ids == turn.pseudo_token_id).any())


def _per_token(values: Any, shape: Sequence[int]) -> bool:
    """Whether these are labels of tokens, not of sequences."""
    return isinstance(values, Tensor) and values.shape == shape and not values.is_floating_point()


def _embed(embedding: Any, tokens: Tensor, turn: Turn, places: Tensor | None) -> Tensor:
    prompt = turn.stacked()
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    if plain and not (embedding._forward_hooks or embedding._forward_pre_hooks):
        return prompt_embed(
            tokens,
            embedding.weight,
            prompt,
            positions=places,
            rows=turn.rows,
            padding_idx=embedding.padding_idx,
        )
    return _joined(embedding(tokens), prompt, turn, places)


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
    order = (~taken).long().argsort(1, stable=True).argsort(1)
    return joined.gather(1, order[..., None].expand_as(joined))


def _in_front_of_embeddings(values: Arguments, turn: Turn) -> None:
    if turn.template is not None:
        raise ValueError("inputs_embeds: a template needs input_ids to know what is where")
    embedded = values["inputs_embeds"]
    values["inputs_embeds"] = _joined(embedded, turn.stacked(), turn, None)
    _extend_in_front(None, values, turn, embedded.shape[:2])


def _extend_in_front(module: Any, values: Arguments, turn: Turn, shape: Sequence[int]) -> None:
    length = turn.length
    if values.get("attention_mask") is None and turn.lengths is not None:
        device = turn.lengths.device
        values["attention_mask"] = torch.ones(shape, dtype=torch.long, device=device)
    if values.get("attention_mask") is not None:
        values["attention_mask"] = _longer_mask(values["attention_mask"], turn)
    if values.get("token_type_ids") is not None:
        values["token_type_ids"] = extend_labels(values["token_type_ids"], length, ignore_index=0)
    if _per_token(values.get("labels"), shape):
        values["labels"] = extend_labels(values["labels"], length)
    if values.get("position_ids") is not None:
        values["position_ids"] = _positions_in_front(values["position_ids"], turn)
    elif turn.lengths is not None and len(set(turn.lengths.tolist())) > 1:
        values["position_ids"] = _new_positions(module, turn, shape)
    for name in _SPANS:
        if values.get(name) is not None:
            values[name] = values[name] + length


def _longer_mask(mask: Tensor, turn: Turn) -> Tensor:
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
    if mask is not None and values.get("past_key_values") is not None and _holes(mask):
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


def _continued(values: Arguments, turn: Turn) -> None:
    """A forward behind a cache that has the prompt in it."""
    mask, positions = values.get("attention_mask"), values.get("position_ids")
    if turn.template is not None and turn.template.slots != 1:
        return  # the pseudo-tokens were in the input and are counted
    if mask is None and turn.lengths is not None:
        raise ValueError("attention_mask must be given where adapter_names has several prompts")
    if mask is not None:
        values["attention_mask"] = _longer_mask(mask, turn)
    if positions is not None:
        added: Any = turn.added if turn.lengths is None else turn.lengths[:, None]
        values["position_ids"] = positions + added
