"""rotary: rotary position embedding of queries and keys, in one pass each way.

PyTorch takes seven operators for each of them, forward, and more backward; here each element is
read and written once, and nothing is kept but cos and sin.
"""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._attention_arguments import check_device, check_no_gradient
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.reference import rotary as reference

Tensor = torch.Tensor


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both, turned by their positions (Su et al. 2021, arXiv:2104.09864; LLaMA's order).

    query: [B, Hq, T, D], key: [B, Hkv, T, D], D even; cos, sin: [1 or B, T, D]. All float16,
    bfloat16, float32 or float64, query and key of one dtype, cos and sin of that or float32.
    Returns query and key in their dtype, computed in fp32 (float64 for float64) and rounded once;
    in fp32 the numbers are those of transformers' apply_rotary_pos_emb. Differentiable, any number
    of times, in query and key.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes or devices that do not
    fit, and for cos or sin that require grad.
    """
    _check_arguments(query, key, cos, sin)
    if torch.compiler.is_compiling() or not (plain(query) and plain(key)):
        pair: tuple[Tensor, Tensor] = _op(query, key, cos, sin, False)
        return pair
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        pair = _Rotary.apply(query, key, cos, sin, False)
        return pair
    return _both(query, key, cos, sin, False)


def _check_arguments(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    _check.check_float("query", query)
    if query.dim() != 4 or query.shape[-1] % 2:
        raise ValueError(
            f"query must have shape [B, Hq, T, D] with an even D, got {list(query.shape)}"
        )
    batch, _, tokens, dim = query.shape
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        _check.check_float(name, tensor)
        check_device(name, tensor, query)
    if key.dim() != 4 or (key.shape[0], *key.shape[2:]) != (batch, tokens, dim):
        raise ValueError(
            f"key must have shape [{batch}, Hkv, {tokens}, {dim}], got {list(key.shape)}"
        )
    if key.dtype != query.dtype:
        raise TypeError(f"key must be {query.dtype} as query is, got {key.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (tokens, dim):
            raise ValueError(
                f"{name} must have shape [1 or {batch}, {tokens}, {dim}], got {list(table.shape)}"
            )
        if table.dtype not in (query.dtype, torch.float32) or table.dtype != cos.dtype:
            raise TypeError(
                f"{name} must be {query.dtype} or float32, cos and sin alike, got {table.dtype}"
            )
        check_no_gradient(name, table)


# --- implementations ------------------------------------------------------------------------------


def _cpu_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    return _cpu_rotary(query, cos, sin, transposed), _cpu_rotary(key, cos, sin, transposed)


def _cpu_rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    batch, heads, tokens, dim = x.shape
    x, cos, sin = map(_rows, (x, cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)))
    out = _cpu.empty(batch, tokens, heads, dim, dtype=x.dtype).transpose(1, 2)
    tables = _cpu.heads(cos.unsqueeze(1)), _cpu.heads(sin.unsqueeze(1))
    shape = batch, heads, tokens, dim
    _cpu.kernels().rotary(_cpu.heads(x), shape, *tables, transposed, _cpu.heads(out))
    return out


def _rows(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _triton_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    from fusetune._triton.rotary import launch_rotary

    with _triton.on(query.device):
        pair: tuple[Tensor, Tensor] = launch_rotary(
            _rows(query), _rows(key), cos.contiguous(), sin.contiguous(), transposed
        )
    return pair


def _reference_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    query, key = (reference.rotary(x, cos, sin, transposed) for x in (query, key))
    return query, key


OP = Op(
    "rotary",
    Impl("triton", _triton_both, _triton.supports_mixed, 20),
    Impl("cpu", _cpu_both, _cpu.supports("rotary"), 10),
    Impl("reference", _reference_both, lambda case: None, 0),
)


def _both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    run = OP.run(query.device.type, query.dtype, cos.dtype)
    pair: tuple[Tensor, Tensor] = run(query, key, cos, sin, transposed)
    return pair


# --- autograd, eager ------------------------------------------------------------------------------


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.transposed = transposed
        return _both(query, key, cos, sin, transposed)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        return *_Rotary.apply(dquery, dkey, *ctx.saved_tensors, not ctx.transposed), *[None] * 3


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _run(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    query, key = _both(query, key, cos, sin, transposed)
    return _by_tokens(query), _by_tokens(key)


def _by_tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    new = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key))
    return tuple(new)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.transposed = inputs[4]


def _library_backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
    return *_op(dquery, dkey, *ctx.saved_tensors, not ctx.transposed), *[None] * 3


_op = define(
    "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)",
    _run,
    _fake,
    _library_backward,
    _setup_context,
)
