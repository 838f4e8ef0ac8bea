"""How others attend to a prefix and embed a prompt, written down in torch: their order of things.

Descriptions, not code, of the libraries. The prefix of a layer is a parameter [P, 2 Hkv D], as a
slice of PEFT's flat weight:

- PEFT 0.21 looks it up for every row of the batch and casts it; transformers' cache joins it with
  the tokens' keys and values, its attention repeats them for the heads of a group and takes a mask
  as wide. Then torch's scaled_dot_product_attention, or matmuls and a softmax in fp32 ("eager").
- PEFT repeats a prompt for every row of the batch and joins it with the tokens' embeddings.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

Tensor = torch.Tensor
# (query [B, Hq, T, D], key and value [B, Hkv, T, D], flat [P, 2 Hkv D], mask) -> like query
Scheme = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def causal_mask(batch: int, tokens: int, prefix: int) -> Tensor:
    """bool [B, 1, T, P + T]: the prefix is seen by all. A model makes it once for all layers."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    joined = torch.cat([torch.ones(tokens, prefix, dtype=torch.bool), seen], 1)
    return joined.expand(batch, 1, -1, -1).contiguous()


def _joined(query: Tensor, key: Tensor, value: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hq, P + T, D] of every query head."""
    batch, heads, _, dim = query.shape
    count, heads_kv = len(flat), key.shape[1]
    ids = torch.arange(count, device=flat.device).expand(batch, -1)
    each = functional.embedding(ids, flat).to(query.dtype)
    first = each.view(batch, count, 2, heads_kv, dim).permute(2, 0, 3, 1, 4).unbind()
    pairs = zip(first, (key, value), strict=True)
    key, value = (torch.cat(pair, 2) for pair in pairs)
    return _repeated(key, heads), _repeated(value, heads)


def _repeated(x: Tensor, heads: int) -> Tensor:
    batch, heads_kv, tokens, dim = x.shape
    if heads == heads_kv:
        return x
    grouped = x[:, :, None].expand(batch, heads_kv, heads // heads_kv, tokens, dim)
    return grouped.reshape(batch, heads, tokens, dim)


def joined_sdpa(query: Tensor, key: Tensor, value: Tensor, flat: Tensor, mask: Tensor) -> Tensor:
    key, value = _joined(query, key, value, flat)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def joined_eager(query: Tensor, key: Tensor, value: Tensor, flat: Tensor, mask: Tensor) -> Tensor:
    key, value = _joined(query, key, value, flat)
    scores = torch.matmul(query, key.mT) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(p.to(query.dtype), value)


SCHEMES: dict[str, Scheme] = {"concatenation + SDPA": joined_sdpa, "eager": joined_eager}


def embedded(ids: Tensor, weight: Tensor, prompt: Tensor) -> Tensor:
    """ids [B, T], weight [V, H], prompt [P, H] -> [B, P + T, H]."""
    each = prompt.repeat(len(ids), 1, 1).to(weight.dtype)
    return torch.cat((each, functional.embedding(ids, weight)), 1)
