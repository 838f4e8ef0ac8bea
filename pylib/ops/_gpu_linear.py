"""The base matmul of a linear layer on a GPU with LoRA in its tail: which of several ways to take.

    y = x W^T + scaling s B^T + bias          dX = dY W + mask * (scaling dS A)

- cuda: few rows, straight from the packed weight, one kernel;
- triton: the weight decoded in one launch, then one matmul that starts from the tail: the result
  is written once;
- addmm: the weight decoded, the vendor's matmul, and the tail added in place;
- augmented: the vendor's matmul of [x | s] and [W | scaling B]: no tail, but x is copied. Never by
  default: where FUSETUNE_TUNE=1 has measured it to be the fastest, or under `use_way`.

Which one: `_gpu_choice`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusetune.ops import _cuda, _triton
from fusetune.ops._gpu_choice import Problem, Ways, choose
from fusetune.ops._registry import Case, backend
from fusetune.ops._weight import Weight
from fusetune.ops.dequantize_4bit import dequantize_4bit
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.dropout import dropout as reference_dropout

Tensor = torch.Tensor
# (s fp32 [M, r], B [N, r], scaling); in dX (dS, A [r, K], scaling).
Tail = tuple[Tensor, Tensor, float]
Mask = tuple[float, Tensor]  # dropout's probability and seed, of dX's tail


class Scale(NamedTuple):
    """DoRA's: y = factor (x W^T + tail) + bias."""

    factor: Tensor  # fp32 [N], contiguous
    z: Tensor | None = None  # [M, N], contiguous: x W^T + tail is written here too
    add: Tensor | None = None  # [M, N], contiguous: y is added to it, in place, and it is returned


# --- forward --------------------------------------------------------------------------------------


def linear(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    tail: Tail | None = None,
    scale: Scale | None = None,
) -> Tensor:
    """y [M, N] in rows' dtype. rows: [M, K], rows contiguous; weight: [N, K]; bias: fp32 [N]."""
    (m, k), n = rows.shape, weight.shape[0]
    if m == 0 or n == 0 or k == 0:
        return _without_product(rows, n, bias, scale)
    ways: Ways = {}
    if cuda_takes(m, n, k, rows.dtype, weight) and scale is None:
        ways["cuda"] = lambda: _cuda.linear_4bit(rows, weight, bias, tail)  # type: ignore[arg-type]
    if triton_multiplies(rows, weight):
        ways["triton"] = lambda: _triton_linear(rows, dense(weight, rows), bias, tail, scale)
    ways["addmm"] = lambda: _addmm(rows, dense(weight, rows), bias, tail, scale)
    if _augments(weight, k, tail) and scale is None and _triton_takes(rows, weight):
        ways["augmented"] = lambda: _augmented(rows, weight, bias, tail)  # type: ignore[arg-type]
    what = "y" if scale is None else "y scaled"  # fewer ways, and so another choice
    repeatable = scale is None or scale.add is None
    problem = Problem(what, m, n, k, _rank(tail), rows.dtype, rows.device, repeatable=repeatable)
    return choose(problem, ways)()


def _without_product(rows: Tensor, n: int, bias: Tensor | None, scale: Scale | None) -> Tensor:
    y = torch.zeros(rows.shape[0], n, dtype=rows.dtype, device=rows.device)
    if scale is not None and scale.z is not None:
        scale.z.zero_()
    if scale is not None and scale.add is not None:
        y = scale.add
    return y if bias is None else y.add_(bias)


def _triton_linear(
    rows: Tensor, w: Tensor, bias: Tensor | None, tail: Tail | None, scale: Scale | None
) -> Tensor:
    from fusetune._triton.linear import Tail as KernelTail
    from fusetune._triton.linear import launch_linear

    factor, z, y = scale or (None, None, None)
    add = y is not None
    if y is None:
        y = torch.empty(rows.shape[0], w.shape[0], dtype=rows.dtype, device=rows.device)
    with _triton.on(y.device):
        launch_linear(
            rows,
            w,
            y,
            arch=_triton.capability(y.device),
            tail=None if tail is None else KernelTail(*tail),
            bias=bias,
            col_scale=factor,
            z=z,
            add=add,
        )
    return y


def _addmm(
    rows: Tensor, w: Tensor, bias: Tensor | None, tail: Tail | None, scale: Scale | None
) -> Tensor:
    y = rows @ w.T
    if tail is not None:
        s, b, scaling = tail
        y.addmm_(s.to(y.dtype), b.to(y.dtype).T, alpha=scaling)
    if scale is not None:
        if scale.z is not None:
            scale.z.copy_(y)
        y = y.mul_(scale.factor) if scale.add is None else scale.add.addcmul_(y, scale.factor)
    return y if bias is None else y.add_(bias)


def _augmented(rows: Tensor, weight: Weight, bias: Tensor | None, tail: Tail) -> Tensor:
    from fusetune._triton.dequantize_4bit import launch_rows

    s, b, scaling = tail
    k, (n, r) = rows.shape[1], b.shape
    width = k + _padded(r)
    w = torch.empty(n, width, dtype=rows.dtype, device=rows.device)
    with _triton.on(w.device):
        launch_rows(_triton.rows_of(weight), n, k, lora_B=b, scaling=scaling, out=w)
    y = _beside(rows, s, width) @ w.T
    return y if bias is None else y.add_(bias)


# --- gradient -------------------------------------------------------------------------------------


def linear_dx(
    dy: Tensor,
    weight: Weight,
    tail: Tail | None = None,
    mask: Mask | None = None,
    to: Tensor | None = None,
) -> Tensor:
    """dX [M, K] in dy's dtype, added to `to`, contiguous, where that is given.

    dy: [M, N], rows contiguous; weight: [N, K].
    """
    (m, n), k = dy.shape, weight.shape[1]
    if m == 0 or n == 0 or k == 0:
        return torch.zeros(m, k, dtype=dy.dtype, device=dy.device) if to is None else to
    ways: Ways = {}
    if cuda_takes(m, n, k, dy.dtype, weight, dx=True):
        ways["cuda"] = lambda: _plus(to, _cuda.linear_4bit_dx(dy, weight, tail, mask))  # type: ignore[arg-type]
    if triton_multiplies(dy, weight):
        ways["triton"] = lambda: _triton_dx(dy, dense(weight, dy), tail, mask, to)
    ways["addmm"] = lambda: _addmm_dx(dy, dense(weight, dy), tail, mask, to)
    if _augments(weight, k, tail) and mask is None and to is None:
        ways["augmented"] = lambda: _augmented_dx(dy, weight, tail)  # type: ignore[arg-type]
    problem = Problem(
        "dx", m, n, k, _rank(tail), dy.dtype, dy.device, mask is not None, repeatable=to is None
    )
    return choose(problem, ways)()


def _plus(to: Tensor | None, dx: Tensor) -> Tensor:
    return dx if to is None else to.add_(dx)


def _triton_dx(
    dy: Tensor | None, w: Tensor | None, tail: Tail | None, mask: Mask | None, dx: Any = None
) -> Tensor:
    """Added to dx where that is given. Without dy and w: the tail alone."""
    from fusetune._triton.linear import Dropout, launch_linear
    from fusetune._triton.linear import Tail as KernelTail

    add = dx is not None
    if dy is not None and w is not None and not add:
        dx = torch.empty(dy.shape[0], w.shape[1], dtype=dy.dtype, device=dy.device)
    with _triton.on(dx.device):
        launch_linear(
            dy,
            None if w is None else w.T,
            dx,
            arch=_triton.capability(dx.device),
            tail=None if tail is None else KernelTail(tail[0], tail[1].T, tail[2]),
            dropout=None if mask is None else Dropout(mask[1], **_triton.mask(*mask)),
            add=add,
        )
    result: Tensor = dx
    return result


def _addmm_dx(
    dy: Tensor, w: Tensor, tail: Tail | None, mask: Mask | None, to: Tensor | None
) -> Tensor:
    dx = dy @ w if to is None else to.addmm_(dy, w)
    if tail is None:
        return dx
    ds, a, scaling = tail
    if mask is None:
        return dx.addmm_(ds.to(dx.dtype), a.to(dx.dtype), alpha=scaling)
    if _triton_takes(dx, w):
        return _triton_dx(None, None, tail, mask, dx)
    return dx.add_(reference_dropout(scaling * (ds @ a.float()), mask[0], mask[1]))


def _augmented_dx(dy: Tensor, weight: Weight, tail: Tail) -> Tensor:
    ds, a, scaling = tail
    n, (r, k) = dy.shape[1], a.shape
    height = n + _padded(r)
    w = torch.zeros(height, k, dtype=dy.dtype, device=dy.device)
    if isinstance(weight, Tensor):
        w[:n] = weight
    else:
        dequantize_4bit(weight, out=w[:n])
    w[n : n + r] = a * scaling
    return _beside(dy, ds, height) @ w


# --- shared by the ways ---------------------------------------------------------------------------


def dense(weight: Weight, like: Tensor) -> Tensor:
    """The weight, decoded if it has to be, in like's dtype."""
    if isinstance(weight, QuantizedWeight):
        return dequantize_4bit(weight, like.dtype)
    return weight.resolve_neg()


def _beside(rows: Tensor, low: Tensor, width: int) -> Tensor:
    """[rows | low | zeros], `width` columns."""
    out = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    first, last = rows.shape[1], rows.shape[1] + low.shape[1]
    out[:, :first] = rows
    out[:, first:last] = low
    out[:, last:] = 0
    return out


def _rank(tail: Tail | None) -> int:
    return 0 if tail is None else tail[0].shape[1]


def _padded(r: int) -> int:
    return -(-r // 16) * 16


def _augments(weight: Weight, k: int, tail: Tail | None) -> bool:
    if tail is None:
        return False
    if isinstance(weight, Tensor):
        return weight.stride(1) == 1
    return k % 8 == 0


def _triton_takes(rows: Tensor, weight: Weight) -> bool:
    if backend() == "cuda":
        return False
    of_dense = weight.dtype if isinstance(weight, Tensor) else None
    return _triton.supports(Case(rows.device.type, rows.dtype, of_dense)) is None


def triton_multiplies(rows: Tensor, weight: Weight) -> bool:
    """Whether Triton's matmul is worth a try: in 16 bits not without tensor cores."""
    if not _triton_takes(rows, weight):
        return False
    return rows.dtype == torch.float32 or _triton.tensor_cores(rows.device)


def cuda_takes(
    m: int, n: int, k: int, dtype: torch.dtype, weight: Weight, *, dx: bool = False
) -> bool:
    if backend() == "triton" or weight.device.type not in _cuda.DEVICES:
        return False
    return _cuda.refuses(m, n, k, dtype, weight, dx=dx) is None
