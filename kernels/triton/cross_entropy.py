"""The loss over a vocabulary, and its gradient, one pass each.

Tiling: forward, a program goes over one row in parts of COLS elements, with the largest so far and
the sum of exponentials against it; backward, a program has COLS elements of one row.

Bytes, for M rows of V elements of o bytes: forward M V o read, backward M V o read and M V o
written, where a row is not ignored: of such a one nothing is read, and zeros are written. 12 M more
forward (target 8, loss and lse 8), 16 M for each part backward.

The gradient may be written over the logits: a program writes what it alone has read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLS, _WARPS = 4096, 8  # sixteen elements a thread


@triton.jit
def _cross_entropy(
    logits,
    target,
    loss,
    lse,
    V,
    stride,
    ignore_index,
    smoothing,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(target + row)
    col = tl.arange(0, COLS)
    largest, exponentials, values = -float("inf"), 0.0, 0.0
    for first in range(0, V, COLS):
        inside = first + col < V
        x = tl.load(logits + first + col, mask=inside, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x, axis=0))
        # Of nothing but -inf every exponential is 0, not exp(-inf + inf).
        zero = tl.where(largest == -float("inf"), 0.0, largest)
        exponentials = exponentials * tl.exp(before - zero) + tl.sum(tl.exp(x - zero), axis=0)
        values += tl.sum(tl.where(inside, x, 0.0), axis=0)
    total = largest + tl.log(exponentials)
    known = (label >= 0) & (label < V)
    at = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    picked = at
    if smoothing != 0:
        picked = at + smoothing * (values / V - at)
    tl.store(lse + row, total)
    tl.store(loss + row, tl.where(label == ignore_index, 0.0, total - picked))


@triton.jit
def _cross_entropy_backward(
    dloss,
    logits,
    target,
    lse,
    dlogits,
    V,
    stride,
    stride_out,
    ignore_index,
    smoothing,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    kept = label != ignore_index
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    x = tl.load(logits + row * stride + col, mask=(col < V) & kept, other=0.0).to(tl.float32)
    probability = tl.exp(x - tl.load(lse + row))
    if smoothing != 0:
        probability -= smoothing / V
    probability += tl.where(col == label, smoothing - 1.0, 0.0)
    gradient = tl.where(kept, probability * tl.load(dloss + row).to(tl.float32), 0.0)
    gradient = gradient.to(dlogits.dtype.element_ty)
    tl.store(dlogits + row * stride_out + col, gradient, mask=col < V)


def launch_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and log-sum-exp, fp32 [M]; the loss is NaN for a target that is no class.

    logits: [M, V], V > 0, rows contiguous, fp32, fp16 or bf16; target: int64 [M], contiguous.
    """
    m, v = logits.shape
    loss, lse = torch.empty(2, m, dtype=torch.float32, device=logits.device)
    if m:
        _cross_entropy[(m,)](
            logits,
            target,
            loss,
            lse,
            v,
            logits.stride(0),
            ignore_index,
            smoothing,
            COLS=_COLS,
            num_warps=_WARPS,
        )
    return loss, lse


def launch_cross_entropy_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    dlogits: torch.Tensor,
) -> None:
    """dlogits [M, V], of the logits' dtype, rows contiguous, which may be the logits themselves.

    dloss: fp32 [M], contiguous; lse: as `launch_cross_entropy` gives it, whose arguments the rest
    are.
    """
    m, v = logits.shape
    if m == 0:
        return
    _cross_entropy_backward[(m, triton.cdiv(v, _COLS))](
        dloss,
        logits,
        target,
        lse,
        dlogits,
        v,
        logits.stride(0),
        dlogits.stride(0),
        ignore_index,
        smoothing,
        COLS=_COLS,
        num_warps=_WARPS,
    )
