"""prefix_attention's core: the base attention, and the prefix merged into it by log-sum-exp.

Where the base attention is ours too, on the CPU, it takes a plain prefix as further keys.
Kept for the backward pass are the arguments (by reference), out and lse: nothing of T x S or T x P.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _base_attention, _cpu
from fusetune.ops._base_attention_cpu import ours
from fusetune.ops._prefix_attention_cpu import CPU_BACKWARD, CPU_FORWARD
from fusetune.ops._prefix_attention_gpu import GPU_BACKWARD, GPU_FORWARD
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops.attention import JoinedPrefix, cpu_backward, cpu_forward
from fusetune.reference import prefix_attention as reference
from fusetune.reference.attention import Options as AttentionOptions

Tensor = torch.Tensor


class Given(NamedTuple):
    """The arguments that carry no gradient; see reference/prefix_attention.py.

    mask and causal concern the base attention alone.
    """

    mask: Tensor | None
    bias: Tensor | None
    rows: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    causal: bool
    scale: float
    window: int
    position: int
    dropout_p: float

    def of_prefix(self) -> reference.Options:
        """Those that concern the prefix."""
        return reference.Options(
            *(self.bias, self.rows, self.lengths, self.scale),
            *(self.window, self.position, self.dropout_p, self.seed),
        )


TENSORS = 5  # the first of them


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    given: Given,
) -> Tensor:
    """query [B, Hq, T, D], key, value [B, Hkv, S, D], prefixes [G, P, Hkv, D] -> like query.

    Differentiable, once, in these five. Arguments are trusted.
    """
    tensors = (query, key, value, prefix_key, prefix_value)
    if torch.compiler.is_compiling() or not all(map(plain, tensors)):
        out: Tensor = _op(*tensors, *given)[0]
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = _PrefixAttention.apply(given, *tensors)
    else:
        out = _forward(*tensors, given)[0]
    return out


# --- implementations ---- -------------------------------------------------------------------------

OP = Op(
    "prefix_attend",
    *GPU_FORWARD,
    CPU_FORWARD,
    Impl("reference", reference.prefix_attend, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "prefix_attend_backward",
    *GPU_BACKWARD,
    CPU_BACKWARD,
    Impl("reference", reference.prefix_attend_backward, lambda case: None, 0),
)


def _strided(x: Tensor) -> Tensor:
    """x with contiguous elements in its last dimension. Copies only where it has to."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _by_tokens(x: Tensor) -> Tensor:
    """x [B, H, T, D] with memory in the order of [B, T, H, D], as torch's attention gives it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    given: Given,
) -> tuple[Tensor, Tensor]:
    """out like query, lse [B, Hq, T]."""
    if _joins(query, key, prefix_key, given):
        return cpu_forward(query, key, value, *_joined(prefix_key, prefix_value, given))
    out, lse = _base_attention.attend(query, key, value, given.mask, given.causal, given.scale)
    run = OP.run(query.device.type, query.dtype, prefix_key.dtype)
    prefix = _strided(prefix_key), _strided(prefix_value)
    merged, lse = run(_strided(query), *prefix, out, lse, given.of_prefix())
    return _by_tokens(merged), lse.contiguous()


def _joins(query: Tensor, key: Tensor, prefix_key: Tensor, given: Given) -> bool:
    """Whether the CPU's attention takes the prefix in its own pass.

    It does not know a bias of the prefix, a window, lengths or the prefix's dropout.
    """
    plain_prefix = given.bias is None and given.lengths is None and not given.window
    if query.device.type != "cpu" or not plain_prefix or given.dropout_p:
        return False
    run_here = OP.carrier("cpu", query.dtype, prefix_key.dtype) == "cpu"
    return run_here and bool(query.numel() and key.shape[2]) and ours(query, key)


def _joined(
    prefix_key: Tensor, prefix_value: Tensor, given: Given
) -> tuple[AttentionOptions, JoinedPrefix]:
    rows = None if given.rows is None else given.rows.contiguous()
    prefix = JoinedPrefix(_strided(prefix_key), _strided(prefix_value), rows)
    return AttentionOptions(given.mask, given.causal, given.scale), prefix


def _joined_backward(
    dout: Tensor,
    tensors: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    given: Given,
    need_dprefix: bool,
) -> tuple[Tensor | None, ...]:
    *tokens, prefix_key, prefix_value = tensors
    options, prefix = _joined(prefix_key, prefix_value, given)
    dprefix: tuple[Tensor | None, Tensor | None] = (None, None)
    if need_dprefix:
        dprefix = (
            _cpu.empty(*prefix_key.shape, dtype=torch.float32),
            _cpu.empty(*prefix_value.shape, dtype=torch.float32),
        )
    query, key, value = tokens
    grads = cpu_backward(dout, query, key, value, out, lse, options, prefix, dprefix)
    return *grads, *(g if g is None else g.to(prefix_key.dtype) for g in dprefix)


def _backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    given: Given,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of query, key, value, prefix_key and prefix_value, as far as `needs` says."""
    dquery: Tensor | None = None
    dkey: Tensor | None = None
    dvalue: Tensor | None = None
    dout = _strided(dout)
    need_dprefix = needs[3] or needs[4]
    if any(needs[:3]) and _joins(query, key, prefix_key, given):
        tensors = (query, key, value, prefix_key, prefix_value)
        found = _joined_backward(dout, tensors, out, lse, given, need_dprefix)
        return [g if need else None for g, need in zip(found, needs, strict=True)]
    if any(needs[:3]):
        base = (query, key, value, given.mask, given.causal, given.scale, out, lse)
        dquery, dkey, dvalue = _base_attention.attend_backward(dout, *base)
    run = OP_BACKWARD.run(query.device.type, query.dtype, prefix_key.dtype)
    prefix = _strided(prefix_key), _strided(prefix_value)
    dquery, dprefix_key, dprefix_value = run(
        *(dout, _strided(query), *prefix, out, lse),
        *(given.of_prefix(), dquery, needs[0], need_dprefix),
    )
    gradients = (dquery, dkey, dvalue, dprefix_key, dprefix_value)
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


# --- autograd, eager ---- -------------------------------------------------------------------------


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Given, *tensors: Tensor) -> Tensor:
        out, lse = _forward(*tensors, given)  # type: ignore[call-arg, arg-type]
        ctx.save_for_backward(*tensors, out, lse, *given[:TENSORS])
        ctx.scalars = given[TENSORS:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given = Given(*saved[7:], *ctx.scalars)
        arguments: tuple[Any, ...] = (dout, *saved[:7], given, ctx.needs_input_grad[1:])
        return None, *_backward(*arguments)


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _op_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs: tuple[Any, ...] = (*arguments[:5], Given(*arguments[5:]))
    return _forward(*inputs)


def _op_backward_run(*arguments: Any) -> list[Tensor]:
    *tensors, needs = arguments[:9]
    inputs: tuple[Any, ...] = (*tensors, Given(*arguments[9:]), tuple(needs))
    gradients = _backward(*inputs)
    laid_out = [g if g is None else _by_tokens(g) for g in gradients[:3]]
    return [g for g in (*laid_out, *gradients[3:]) if g is not None]


def _new_by_tokens(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _new_by_tokens(query), query.new_empty(query.shape[:3], dtype=acc)


def _fake_backward(dout: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, needs = arguments[:5], arguments[7]
    new = [*map(_new_by_tokens, tensors[:3]), *(t.new_empty(t.shape) for t in tensors[3:])]
    return [t for t, need in zip(new, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = Given(*inputs[5:])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], *output, *given[:TENSORS])
    ctx.scalars = given[TENSORS:]


def _library_backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients = iter(_op_backward(dout, *saved[:7], needs, *saved[7:], *ctx.scalars))
    found = [next(gradients) if need else None for need in needs]
    return *found, *[None] * len(Given._fields)


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value"
_GIVEN = (
    "Tensor? mask, Tensor? bias, Tensor? rows, Tensor? lengths, Tensor? seed, "
    "bool causal, float scale, SymInt window, SymInt position, float dropout_p"
)
_op = define(
    f"prefix_attention({_TENSORS}, {_GIVEN}) -> (Tensor, Tensor)",
    _op_forward,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    f"prefix_attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor lse, bool[] needs, "
    f"{_GIVEN}) -> Tensor[]",
    _op_backward_run,
    _fake_backward,
)
