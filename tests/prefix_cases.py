"""Arguments of prefix_attention, its definition by concatenation, and how far from it it may be."""

import torch
from tolerance import assert_close

from fusetune.ops import prefix_attention
from fusetune.reference.dropout import dropout, new_seed

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


def inputs(
    batch=2, heads=6, kv_heads=3, tokens=9, keys=9, dim=16, prefix=5, groups=None, dtype=None,
    prefix_dtype=None,
):  # fmt: skip
    """The five tensors, by name; groups None: one prefix [P, Hkv, D]."""
    dtype = dtype or torch.float32
    one = (prefix, kv_heads, dim)
    shapes = {
        "query": (batch, heads, tokens, dim),
        "key": (batch, kv_heads, keys, dim),
        "value": (batch, kv_heads, keys, dim),
        "prefix_key": one if groups is None else (groups, *one),
        "prefix_value": one if groups is None else (groups, *one),
    }
    kinds = {name: prefix_dtype or dtype if name.startswith("prefix") else dtype for name in NAMES}
    return {n: torch.randn(s).to(kinds[n]).requires_grad_() for n, s in shapes.items()}


def segments(
    query, key, value, prefix_key, prefix_value, *, attn_mask=None, is_causal=False, scale=None,
    prefix_bias=None, window=None, position=0, rows=None, lengths=None, prefix_dropout_p=0.0,
):  # fmt: skip
    """(p [B, Hq, T, P + S], k, v [B, Hq, P + S, D]): one softmax over prefix and keys joined.

    Row by row of the batch, in their dtype. Written from the description of prefix_attention, with
    no part of its implementation but the dropout's mask.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if prefix_key.dim() == 3:
        prefix_key, prefix_value = prefix_key[None], prefix_value[None]
    count = prefix_key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    seed = new_seed(query.device) if prefix_dropout_p else None
    which = [0] * batch if rows is None else rows.tolist()
    both = torch.cat(
        [x[max(g, 0)].reshape(1, -1) for x in (prefix_key, prefix_value) for g in which]
    )
    both = dropout(both, prefix_dropout_p, seed).view(2, batch, count, kv_heads, dim)
    all_p, all_k, all_v = [], [], []
    for b, g in enumerate(which):
        length = 0 if g < 0 else count if lengths is None else int(lengths[g])
        seen = torch.zeros(heads, tokens, count + keys, dtype=torch.float64)
        for i in range(tokens):
            for j in range(count):
                far = window is not None and length + position + i - j >= window
                if j >= length or far:
                    seen[:, i, j] = -torch.inf
            if is_causal:
                seen[:, i, count + i + 1 :] = -torch.inf
        if prefix_bias is not None:
            bias = prefix_bias.expand(batch, heads, -1, -1)[b]
            seen[:, :, :count] += bias
        if attn_mask is not None:
            mask = attn_mask.expand(batch, heads, tokens, keys)[b]
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            seen[:, :, count:] += mask
        group = heads // kv_heads
        k = torch.cat([both[0, b].movedim(0, 1).to(key.dtype), key[b]], 1)
        v = torch.cat([both[1, b].movedim(0, 1).to(key.dtype), value[b]], 1)
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        scores = scale * query[b] @ k.mT + seen.to(query.dtype)
        dark = (seen == -torch.inf).all(-1, keepdim=True)
        all_p.append(torch.where(dark, 0, scores.masked_fill(dark, 0).softmax(-1)))
        all_k.append(k)
        all_v.append(v)
    return torch.stack(all_p), torch.stack(all_k), torch.stack(all_v)


def joined(**arguments):
    p, _, v = segments(**arguments)
    return p @ v


def run(function, tensors, upper, **options):
    """The output and the gradients of all five."""
    torch.manual_seed(3)
    out = function(**tensors, **options)
    gradients = torch.autograd.grad(out, list(tensors.values()), upper.to(out.dtype))
    return [out.detach(), *gradients]


def in_dtype(tensors, dtype):
    return {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}


def magnitudes(tensors, upper, **options):
    """What rounding errors scale with: each result with absolute values in the place of its terms.

    An error of a score is a relative error of its weight, and the sizes of scores count as such.
    """
    torch.manual_seed(3)
    p, k, v = segments(**tensors, **options)
    query, upper, weight = tensors["query"].detach().abs(), upper.double().abs(), p.detach()
    scale = options.get("scale") or query.shape[-1] ** -0.5
    key, value = k.detach().abs(), v.detach().abs()
    scores = scale * query @ key.mT
    if scores.shape[-1]:
        weight = weight * (1 + scores.amax(-1, keepdim=True))
    dp = upper @ value.mT
    ds = scale * weight * (dp + (p.detach() * dp).sum(-1, keepdim=True))
    # Back to the tensors that k and v were made of, whose elements have positive factors there.
    total = (k * (ds.mT @ query)).sum() + (v * (weight.mT @ upper)).sum()
    return [weight @ value, ds @ key, *torch.autograd.grad(total, [tensors[n] for n in NAMES[1:]])]


def compare(tensors, **options):
    """Ours against the joined tensors in float64, and about as near as those in our own dtype."""
    upper = torch.randn(tensors["query"].shape)
    got = run(prefix_attention, tensors, upper, **options)
    wide = in_dtype(tensors, torch.float64)
    exact = run(joined, wide, upper, **options)
    eager = run(joined, tensors, upper, **options)
    sizes = magnitudes(wide, upper, **options)
    for name, *results, size in zip(("out", *NAMES), got, exact, eager, sizes, strict=True):
        assert_close(name, *results, size)
