"""lora_up: what a LoRA adapter adds to a convolution's output, added to it in place.

PEFT makes the up-convolution's output, its scaled copy and the sum: three tensors of the result's
size, all in fp32 where the adapter is. Here one product accumulates into the output, a sample at a
time where it has to be widened; kept for the backward pass are the adapter's r channels alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check
from fusetune.ops._registry import Case, Impl, Op, plain
from fusetune.reference import lora_up as reference

Tensor = torch.Tensor
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lora_up(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """y + scaling (lora_B s + bias) for each place of a convolution's output, in place.

    y: [M, N, ...], which is changed and returned; s: [M, r, ...], the output of the adapter's first
    convolution; lora_B: [N, r]; bias: [N]; all float16, bfloat16, float32 or float64, not
    necessarily the same. Sums are taken in fp32 (float64 for a float64 y), rounded once.

    Differentiable, once, in y, s, lora_B and bias; nothing that the caller's graph needs may be in
    y (a convolution's gradient does not read its output). While torch.compile traces, the result is
    a new tensor. Raises TypeError or ValueError, naming the argument, for what does not fit.
    """
    _check_arguments(y, s, lora_B, bias)
    scaling = float(scaling)
    if torch.compiler.is_compiling() or not (plain(y) and plain(s)):
        return _out_of_place(y, s, lora_B, scaling, bias)
    tensors = (y, s, lora_B, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out: Tensor = _LoraUp.apply(*tensors, scaling)
        return out
    _add(y, s, lora_B, bias, scaling)
    return y


def _check_arguments(y: Tensor, s: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("y", y), ("s", s), ("lora_B", lora_B)):
        _check.check_float(name, tensor)
        if tensor.device != y.device:
            raise ValueError(f"{name} is on {tensor.device}, y on {y.device}: move one of them")
    if y.dim() < 3:
        raise ValueError(f"y must have shape [M, N, ...], got {list(y.shape)}")
    if lora_B.dim() != 2 or lora_B.shape[0] != y.shape[1]:
        raise ValueError(f"lora_B must have shape [{y.shape[1]}, r], got {list(lora_B.shape)}")
    _check.check_shape("s", s, (y.shape[0], lora_B.shape[1], *y.shape[2:]))
    if bias is not None:
        _check.check_float("bias", bias)
        _check.check_shape("bias", bias, (y.shape[1],))


def _out_of_place(
    y: Tensor, s: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    acc = torch.promote_types(y.dtype, torch.float32)
    added = lora_B.to(acc) @ s.flatten(2).to(acc)
    if bias is not None:
        added = added + bias.to(acc)[:, None]
    return (y.to(acc) + (scaling * added).view(y.shape)).to(y.dtype)


# --- implementations ------------------------------------------------------------------------------


def _by_torch(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None) -> None:
    left, right = lora_B.float() * scaling, s.float()
    if bias is not None:  # one more rank
        left = torch.cat([left, (bias.float() * scaling)[:, None]], 1)
        right = torch.cat([right, right.new_ones(right.shape[0], 1, right.shape[2])], 1)
    if y.dtype == torch.float32:
        y.baddbmm_(left.expand(len(y), *left.shape), right)
    elif y.device.type != "cpu":
        y.copy_(torch.baddbmm(y.float(), left.expand(len(y), *left.shape), right))
    else:
        for sample, low in zip(y, right, strict=True):
            sample.copy_(torch.addmm(sample.float(), left, low))


def _backward_by_torch(
    dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    b, low = lora_B.float() * scaling, s.float()
    if dy.device.type != "cpu":
        wide = dy.float()
        return b.t() @ wide, (wide @ low.transpose(1, 2)).sum(0).mul_(scaling)
    ds, dB = torch.empty_like(low), torch.zeros_like(b)
    for sample, down, up in zip(dy, low, ds, strict=True):  # in order: the same sums every time
        wide = sample.float()
        torch.mm(b.t(), wide, out=up)
        dB.addmm_(wide, down.t(), alpha=scaling)
    return ds, dB


def _on(device: str) -> Any:
    def reason(case: Case) -> str | None:
        if case.device != device:
            return f"the tensors are on {case.device}"
        return None if case.dtype in _DTYPES else f"not in {case.dtype}"

    return reason


def _impls(run: Any) -> tuple[Impl, ...]:
    # A GPU's own matmul does it, whichever of our backends is asked for.
    names = (("triton", "cuda", 20), ("cuda", "cuda", 15), ("cpu", "cpu", 10))
    return tuple(Impl(name, run, _on(device), priority) for name, device, priority in names)


OP = Op("lora_up", *_impls(_by_torch), Impl("reference", reference.lora_up, lambda case: None, 0))
OP_BACKWARD = Op(
    "lora_up_backward",
    *_impls(_backward_by_torch),
    Impl("reference", reference.lora_up_backward, lambda case: None, 0),
)


def _add(y: Tensor, s: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float) -> None:
    flat = y.flatten(2)
    run = OP.run(y.device.type, y.dtype, None)
    run(flat, s.flatten(2), lora_B, scaling, bias)
    if flat.data_ptr() != y.data_ptr():  # y's places cannot be numbered with one stride
        y.copy_(flat.view(y.shape))


# --- autograd -------------------------------------------------------------------------------------


class _LoraUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, s: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(s, lora_B)
        ctx.scaling, ctx.bias = scaling, None if bias is None else bias.dtype
        ctx.mark_dirty(y)
        _add(y, s, lora_B, bias, scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        s, lora_B = ctx.saved_tensors
        need = ctx.needs_input_grad
        ds = dB = dbias = None
        flat = dy.flatten(2)
        if need[1] or need[2]:
            run = OP_BACKWARD.run(dy.device.type, dy.dtype, None)
            ds, dB = run(flat, s.flatten(2), lora_B, ctx.scaling)
            ds = ds.to(s.dtype).view(s.shape)
            dB = dB.to(lora_B.dtype)
        if need[3]:
            acc = torch.promote_types(dy.dtype, torch.float32)
            dbias = (flat.sum((0, 2), dtype=acc) * ctx.scaling).to(ctx.bias)
        return dy if need[0] else None, ds, dB, dbias, None
