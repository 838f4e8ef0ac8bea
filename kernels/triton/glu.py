"""y = f(gate) up, the activation of a gated MLP, and both gradients, one pass each.

Tiling: a program takes a tile [ROWS, COLS] of every matrix, f and f' in registers and fp32.

Bytes, for M N elements of o bytes each: forward 2 M N o read and M N o written, backward 3 M N o
and 2 M N o; all once, nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusetune._triton._activation import activate, slope
from fusetune._triton._tile import load_tile

_ROWS, _COLS, _WARPS = 4, 512, 4  # two vectors of 16 bytes a thread, where elements have two


@triton.jit
def _store(matrix, row, col, N, values, inside):
    values = values.to(matrix.dtype.element_ty)
    tl.store(matrix + row[:, None] * N + col[None, :], values, mask=inside)


@triton.jit
def _glu(
    gate,
    up,
    y,
    M,
    N,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < M)[:, None] & (col < N)[None, :]
    z = load_tile(gate, row, col, stride_gate, inside)
    other = load_tile(up, row, col, stride_up, inside)
    _store(y, row, col, N, activate(z, ACTIVATION) * other, inside)


@triton.jit
def _glu_backward(
    dy,
    gate,
    up,
    dgate,
    dup,
    M,
    N,
    stride_dy,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < M)[:, None] & (col < N)[None, :]
    upper = load_tile(dy, row, col, stride_dy, inside)
    z = load_tile(gate, row, col, stride_gate, inside)
    if NEED_GATE:
        other = load_tile(up, row, col, stride_up, inside)
        _store(dgate, row, col, N, upper * other * slope(z, ACTIVATION), inside)
    if NEED_UP:
        _store(dup, row, col, N, upper * activate(z, ACTIVATION), inside)


def _grid(m: int, n: int) -> tuple[int, int]:
    return triton.cdiv(m, _ROWS), triton.cdiv(n, _COLS)


def launch_glu(gate: torch.Tensor, up: torch.Tensor, activation: str, y: torch.Tensor) -> None:
    """y = f(gate) up.

    gate, up: [M, N], rows contiguous, fp32, fp16 or bf16, of one dtype; y: likewise, contiguous.
    activation: one of the op's ACTIVATIONS.
    """
    m, n = gate.shape
    if m == 0 or n == 0:
        return
    _glu[_grid(m, n)](
        gate,
        up,
        y,
        m,
        n,
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        ROWS=_ROWS,
        COLS=_COLS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


def launch_glu_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
) -> None:
    """dgate = dy up f'(gate) and dup = dy f(gate), contiguous; None: not needed.

    The rest as in `launch_glu`. A gradient may be dy, gate or up itself.
    """
    m, n = gate.shape
    if m == 0 or n == 0 or (dgate is None and dup is None):
        return
    _glu_backward[_grid(m, n)](
        dy,
        gate,
        up,
        dy if dgate is None else dgate,
        dy if dup is None else dup,
        m,
        n,
        dy.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        NEED_GATE=dgate is not None,
        NEED_UP=dup is not None,
        ROWS=_ROWS,
        COLS=_COLS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
