"""y = weight x / sqrt(mean(x^2) + eps) and the gradient of x, one pass each.

Tiling: a program takes ROWS whole rows in registers and fp32, short rows several at once; a row of
more than _LARGEST elements goes through in parts, twice: its sums first.

Bytes, for M N elements of o bytes each: forward M N o read and M N o written, backward 2 M N o and
M N o; 4 M of rstd, and the weight, N elements, for each program, which stays in the cache. A row
that goes in parts is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import load_tile

_LARGEST = 8192  # elements of a row that stay in registers: backward 3 x 16 a thread
_TILE = 2048  # elements that a program has at least, where there are as many


@triton.jit
def _normed(values, rstd, weight, col, N):
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)
    return w[None, :] * values * rstd[:, None]


@triton.jit
def _rms_norm(
    x,
    weight,
    y,
    rstd,
    M,
    N,
    stride_x,
    eps,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    valid = (row < M)[:, None]
    values = load_tile(x, row, col, stride_x, valid & (col < N)[None, :])
    squares = values * values
    if not WHOLE:
        for first in range(COLS, N, COLS):
            more = first + col
            part = load_tile(x, row, more, stride_x, valid & (more < N)[None, :])
            squares += part * part
    scale = tl.rsqrt(tl.sum(squares, axis=1) / N + eps)
    tl.store(rstd + row, scale, mask=row < M)
    inside = valid & (col < N)[None, :]
    result = _normed(values, scale, weight, col, N).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * N + col[None, :], result, mask=inside)
    if not WHOLE:
        for first in range(COLS, N, COLS):
            more = first + col
            inside = valid & (more < N)[None, :]
            part = load_tile(x, row, more, stride_x, inside)
            result = _normed(part, scale, weight, more, N).to(y.dtype.element_ty)
            tl.store(y + row[:, None] * N + more[None, :], result, mask=inside)


@triton.jit
def _dx_operands(dy, x, weight, row, col, M, N, stride_dy, stride_x):
    inside = (row < M)[:, None] & (col < N)[None, :]
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)
    upper = load_tile(dy, row, col, stride_dy, inside) * w[None, :]
    return upper, load_tile(x, row, col, stride_x, inside), inside


@triton.jit
def _rms_norm_dx(
    dy,
    x,
    weight,
    rstd,
    dx,
    M,
    N,
    stride_dy,
    stride_x,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    upper, values, inside = _dx_operands(dy, x, weight, row, col, M, N, stride_dy, stride_x)
    products = upper * values
    if not WHOLE:
        for first in range(COLS, N, COLS):
            more = first + col
            a, b, _ = _dx_operands(dy, x, weight, row, more, M, N, stride_dy, stride_x)
            products += a * b
    scale = tl.load(rstd + row, mask=row < M, other=0.0)
    along = (tl.sum(products, axis=1) / N * scale * scale)[:, None]
    result = ((upper - values * along) * scale[:, None]).to(dx.dtype.element_ty)
    tl.store(dx + row[:, None] * N + col[None, :], result, mask=inside)
    if not WHOLE:
        for first in range(COLS, N, COLS):
            more = first + col
            a, b, inside = _dx_operands(dy, x, weight, row, more, M, N, stride_dy, stride_x)
            result = ((a - b * along) * scale[:, None]).to(dx.dtype.element_ty)
            tl.store(dx + row[:, None] * N + more[None, :], result, mask=inside)


def _tile(m: int, n: int) -> dict[str, int | bool]:
    cols = min(triton.next_power_of_2(n), _LARGEST)
    rows = max(1, min(_TILE // cols, triton.next_power_of_2(m)))
    warps = max(1, min(16, rows * cols // 512))
    numbers = {"WHOLE": n <= cols, "ROWS": rows, "COLS": cols, "num_warps": warps}
    # Not fused: threads that add each other's squares would round one of the two and differ.
    return {**numbers, "enable_fp_fusion": False}


def launch_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, rstd: torch.Tensor
) -> None:
    """y [M, N] and rstd, fp32 [M].

    x: [M, N], rows contiguous; y: likewise, contiguous, of x's dtype; weight: [N], contiguous; all
    fp32, fp16 or bf16.
    """
    m, n = x.shape
    if m == 0 or n == 0:
        return
    tile = _tile(m, n)
    grid = (triton.cdiv(m, tile["ROWS"]),)
    _rms_norm[grid](x, weight, y, rstd, m, n, x.stride(0), eps, **tile)


def launch_rms_norm_dx(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
) -> None:
    """dx [M, N], contiguous, of x's dtype; dy as x, the rest as in `launch_rms_norm`."""
    m, n = x.shape
    if m == 0 or n == 0:
        return
    tile = _tile(m, n)
    grid = (triton.cdiv(m, tile["ROWS"]),)
    _rms_norm_dx[grid](dy, x, weight, rstd, dx, m, n, dy.stride(0), x.stride(0), **tile)
