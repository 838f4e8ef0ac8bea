"""Inputs of rotary, what it is compared with, and when they agree: for its tests."""

import torch
from tolerance import assert_close, one_thread
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fusetune import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# B, Hq, Hkv, T, D: a head below, at and across whole vectors, and one of a single pair
SHAPES = ((1, 1, 1, 1, 2), (2, 3, 1, 5, 10), (1, 4, 2, 7, 34), (2, 9, 3, 40, 64), (3, 2, 2, 2, 128))


def inputs(shape, dtype=torch.float32, *, rows=None):
    batch, heads, kv_heads, tokens, dim = shape
    query = torch.randn(batch, tokens, heads, dim).transpose(1, 2).to(dtype)
    key = torch.randn(batch, kv_heads, tokens, dim).to(dtype)
    # halves that differ, unlike a model's
    cos, sin = torch.randn(2, rows or batch, tokens, dim).to(dtype)
    return query, key, cos, sin


def all_of(function, query, key, cos, sin, upper):
    leaves = [t.detach().clone().requires_grad_() for t in (query, key)]
    out = function(*leaves, cos, sin)
    grads = torch.autograd.grad(out, leaves, upper)
    names = ("query", "key", "dquery", "dkey")
    return dict(zip(names, (*(t.detach() for t in out), *grads), strict=True))


def rounded(query, key, cos, sin):
    """transformers' function, its results in the dtype of what it turns."""
    return tuple(t.to(query.dtype) for t in apply_rotary_pos_emb(query, key, cos, sin))


def assert_matches_float64(query, key, cos, sin):
    upper = tuple(torch.randn_like(t) for t in (query, key))
    got = all_of(ops.rotary, query, key, cos, sin, upper)
    with one_thread(), ops.use_backend("reference"):
        wide = [t.double() for t in (query, key, cos, sin)]
        exact = all_of(ops.rotary, *wide, [t.double() for t in upper])
        plain = all_of(rounded, query, key, cos, sin, upper)
    magnitude = turned_magnitudes(wide, upper)
    for name, value in got.items():
        assert_close(name, value, exact[name], plain[name], magnitude[name])


def turned_magnitudes(wide, upper):
    """The sums over absolute values, which is what rounding errors scale with."""
    query, key, cos, sin = (t.abs() for t in wide)
    sizes = {}
    for name, x, dy in zip(("query", "key"), (query, key), upper, strict=True):
        c, s, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
        sizes[name] = x * c + x.roll(half, -1) * s
        sizes[f"d{name}"] = dy.double().abs() * c + (dy.double().abs() * s).roll(half, -1)
    return sizes


def assert_same_numbers_as_transformers(query, key, cos, sin):
    """In fp32."""
    upper = tuple(torch.randn_like(t) for t in (query, key))
    got = all_of(ops.rotary, query, key, cos, sin, upper)
    expected = all_of(apply_rotary_pos_emb, query, key, cos, sin, upper)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
