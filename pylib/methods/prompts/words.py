"""Real words as a prefix: their keys and values in the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusetune.methods.prompts.geometry import Site
from fusetune.nn._prefix_capture import captured

Tensor = torch.Tensor


@torch.no_grad()
def words_prefix(model: Any, sites: Sequence[Site], ids: Tensor) -> dict[str, Tensor]:
    """Prefix [P, width] of each site: what the model's attention computes of the words `ids` [P].

    Positions are those of words in front of a text. In an encoder-decoder model encoder and decoder
    both read the words.
    """
    device = model.get_input_embeddings().weight.device
    words = {"input_ids": ids.to(device)[None]}
    if model.config.is_encoder_decoder:
        words["decoder_input_ids"] = words["input_ids"]
    training = model.training
    model.eval()
    try:
        with captured(model) as found:
            model(**words)
    finally:
        model.train(training)
    return {site.name: _flat(site, found) for site in sites}


def _flat(site: Site, found: dict[tuple[str, int], tuple[Tensor, Tensor]]) -> Tensor:
    layers = []
    for layer in range(site.layers):
        for states in found[site.name, layer]:
            layers.append(states[0].transpose(0, 1))  # [P, heads, head_dim]
    stacked = torch.stack(layers, 1)
    wide = torch.promote_types(stacked.dtype, torch.float32)
    return stacked.reshape(len(stacked), site.width).to(wide)
