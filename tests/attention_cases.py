"""Arguments of attention, its definition written out, and how far from it it may be."""

import torch
from tolerance import assert_close

from fusetune.ops import attention
from fusetune.reference.dropout import keep_mask, new_seed

NAMES = ("query", "key", "value")


def inputs(batch=2, heads=6, kv_heads=3, tokens=9, keys=9, dim=16, dtype=None):
    """The three tensors, by name."""
    shapes = {
        "query": (batch, heads, tokens, dim),
        "key": (batch, kv_heads, keys, dim),
        "value": (batch, kv_heads, keys, dim),
    }
    kind = dtype or torch.float32
    return {name: torch.randn(shape).to(kind).requires_grad_() for name, shape in shapes.items()}


def parts(query, key, value, *, attn_mask=None, is_causal=False, scale=None, dropout_p=0.0):
    """(p, m, k, v): weights, what the dropout makes of each, keys and values for every head."""
    batch, heads, tokens, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    seen = torch.zeros(batch, heads, tokens, keys, dtype=torch.float64)
    if is_causal:
        for i in range(tokens):
            seen[:, :, i, i + 1 :] = -torch.inf
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        seen = seen + attn_mask
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = (dim**-0.5 if scale is None else scale) * query @ k.mT + seen.to(query.dtype)
    dark = (seen == -torch.inf).all(-1, keepdim=True)
    p = torch.where(dark, 0, scores.masked_fill(dark, 0).softmax(-1))
    factors = torch.ones(p.shape, dtype=p.dtype)
    if dropout_p:
        kept = keep_mask(batch * heads * tokens, keys, dropout_p, new_seed(query.device))
        factors = kept.view(p.shape) * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))
        factors = factors.to(p.dtype)
    return p, factors, k, v


def written_out(**arguments):
    p, factors, _, v = parts(**arguments)
    return p * factors @ v


def run(function, tensors, upper, **options):
    """The output and the gradients of all three."""
    torch.manual_seed(3)
    out = function(**tensors, **options)
    gradients = torch.autograd.grad(out, list(tensors.values()), upper.to(out.dtype))
    return [out.detach(), *gradients]


def magnitudes(tensors, upper, **options):
    """What rounding errors scale with: each result with absolute values in the place of its terms.

    An error of a score is a relative error of its weight, and the sizes of scores count as such.
    """
    torch.manual_seed(3)
    p, factors, k, v = parts(**tensors, **options)
    query, upper, weight = tensors["query"].detach().abs(), upper.double().abs(), p.detach()
    scale = options.get("scale") or query.shape[-1] ** -0.5
    key, value = k.detach().abs(), v.detach().abs()
    scores = scale * query @ key.mT
    if scores.shape[-1]:
        weight = weight * (1 + scores.amax(-1, keepdim=True))
    dp = factors * (upper @ value.mT)
    ds = scale * weight * (dp + (p.detach() * dp).sum(-1, keepdim=True))
    total = (k * (ds.mT @ query)).sum() + (v * ((weight * factors).mT @ upper)).sum()
    return [
        weight * factors @ value,
        ds @ key,
        *torch.autograd.grad(total, [tensors["key"], tensors["value"]]),
    ]


def compare(tensors, **options):
    """Ours against the definition in float64, and about as near as that in our own dtype."""
    upper = torch.randn(tensors["query"].shape)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    got = run(attention, tensors, upper, **options)
    exact = run(written_out, wide, upper, **options)
    eager = run(written_out, tensors, upper, **options)
    sizes = magnitudes(wide, upper, **options)
    for name, *results, size in zip(("out", *NAMES), got, exact, eager, sizes, strict=True):
        assert_close(name, *results, size)
