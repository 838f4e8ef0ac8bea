"""Where prompts begin: numbers, the embeddings of words, and words' keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusetune.methods.prompts.deep_config import DeepPromptConfig
from fusetune.methods.prompts.encoders import Encoder, prefix_mlp, prompt_network
from fusetune.methods.prompts.geometry import Geometry, Site
from fusetune.methods.prompts.shallow_config import PromptTuningConfig
from fusetune.methods.prompts.words import words_prefix

Tensor = torch.Tensor


def build(config: Any, model: Any, geometry: Geometry) -> nn.Module:
    """The encoder of a config: an Encoder for each site's name, or one Encoder.

    Raises ValueError, naming the config's field, for what does not fit the model.
    """
    if isinstance(config, DeepPromptConfig):
        return _build_deep(config, model, geometry)
    size = geometry.hidden_size
    if config.trained:
        return Encoder(torch.zeros(config.length, size))
    if isinstance(config, PromptTuningConfig):
        return Encoder(prompt_weight(config, geometry))
    return Encoder(torch.randn(config.length, size), prompt_network(config, size))


def tokens_of(config: Any, text: str, field: str) -> list[int]:
    """Ids of a text without special tokens. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{field}: {text!r} has no token")
    return ids


def repeated(ids: Sequence[int], length: int) -> list[int]:
    """The first `length` of endlessly repeated ids."""
    return [ids[i % len(ids)] for i in range(length)]


# --- prefixes ------------------------------------------------------------------------------------


def _build_deep(config: DeepPromptConfig, model: Any, geometry: Geometry) -> nn.ModuleDict:
    names = config.sites(tuple(site.name for site in geometry.sites))
    sites = [site for site in geometry.sites if site.name in names]
    init = getattr(config, "init_weights", "random")
    if init == "text" and not config.trained:
        ids = _text_ids(config, geometry)
        prefixes = words_prefix(model, sites, torch.tensor(repeated(ids, config.length)))
        return nn.ModuleDict({name: Encoder(prefix) for name, prefix in prefixes.items()})
    return nn.ModuleDict(
        {site.name: _prefix_encoder(config, site, init, geometry.hidden_size) for site in sites}
    )


def _prefix_encoder(config: DeepPromptConfig, site: Site, init: str, size: int) -> Encoder:
    if not config.prefix_projection or config.trained:
        shape = (config.length, site.width)
        empty = init == "zero" or config.trained
        return Encoder(torch.zeros(shape) if empty else torch.randn(shape))
    network = prefix_mlp(size, config.encoder_hidden_size, site.width)
    if init == "zero":
        for parameter in network[-1].parameters():
            nn.init.zeros_(parameter)
    return Encoder(torch.randn(config.length, size), network)


# --- prompts -------------------------------------------------------------------------------------


def prompt_weight(config: PromptTuningConfig, geometry: Geometry) -> Tensor:
    """[P, H] in fp32 (float64 for such a model), on the embeddings' device."""
    generator = None
    if config.init_seed is not None:
        generator = torch.Generator().manual_seed(config.init_seed)
    size = (config.length, geometry.hidden_size)
    if config.init == "uniform":
        return torch.empty(size).uniform_(
            -config.init_range, config.init_range, generator=generator
        )
    if config.init == "file":
        return _from_file(config, size)
    if config.init == "text":
        return _embedded(geometry, repeated(_text_ids(config, geometry), config.length))
    if config.init == "sampled_vocab":
        return _embedded(geometry, _sample(config, geometry, config.length, generator))
    assert config.class_labels is not None  # the config needs them
    means = [
        _embedded(
            geometry, _known(tokens_of(config, label, "class_labels"), geometry, "labels")
        ).mean(0, keepdim=True)
        for label in config.class_labels
    ]
    left = config.length - len(means)
    return torch.cat((*means, _embedded(geometry, _sample(config, geometry, left, generator))))


@torch.no_grad()
def _embedded(geometry: Geometry, ids: Sequence[int]) -> Tensor:
    """What the model sees for tokens: its module's, which may scale."""
    weight = geometry.embedding.weight
    embedded = geometry.embedding(torch.tensor(ids, dtype=torch.long, device=weight.device))
    wide: Tensor = embedded.detach().to(torch.promote_types(embedded.dtype, torch.float32))
    return wide.clone()


def _sample(
    config: PromptTuningConfig, geometry: Geometry, count: int, generator: torch.Generator | None
) -> list[int]:
    """Ids without replacement."""
    if config.init_token_ids is None:
        field = "init_vocab_size"
        pool = list(range(min(config.init_vocab_size, geometry.vocabulary)))
    else:
        field = "init_token_ids"
        pool = _known(config.init_token_ids, geometry, field)
    if len(set(pool)) < count:
        raise ValueError(
            f"{field}: {count} of {len(set(pool))} tokens cannot be sampled without replacement"
        )
    pool = list(dict.fromkeys(pool))
    return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]


def _text_ids(config: Any, geometry: Geometry) -> list[int]:
    if config.init_token_ids is not None:
        return _known(config.init_token_ids, geometry, "init_token_ids")
    return _known(tokens_of(config, config.init_text, "init_text"), geometry, "init_text")


def _known(ids: Sequence[int], geometry: Geometry, field: str) -> list[int]:
    if not ids:
        raise ValueError(f"{field} must hold a token, got none")
    wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < geometry.vocabulary]
    if wrong:
        raise ValueError(
            f"{field}: {wrong[0]!r} is no token of the model, which has {geometry.vocabulary}"
        )
    return list(ids)


def _from_file(config: PromptTuningConfig, size: tuple[int, int]) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(str(config.init_file))
    if not path.is_file():
        raise FileNotFoundError(f"init_file: there is no file {path}")
    try:
        tensors = load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"init_file: {path} is not a safetensors file: {error}") from error
    key = config.init_file_key
    if key is None and len(tensors) == 1:
        key = next(iter(tensors))
    if key not in tensors:
        raise ValueError(
            f"init_file_key must be one of {sorted(tensors)}, the keys of {path}, got {key!r}"
        )
    tensor = tensors[key]
    if tuple(tensor.shape) != size or not tensor.is_floating_point():
        raise ValueError(
            f"init_file: {key} must be floats of shape {list(size)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"init_file: {key} has values that are not finite")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
