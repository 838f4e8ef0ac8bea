"""What kernels share: tiles in fp32, dropout by counter, products as precise, sums of parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Programs that a memory-bound kernel is cut into, where its size allows: one for each
# multiprocessor of today's largest cards or nearly so, and few partial sums to add.
PROGRAMS = 128
_SUM_BLOCK = 512  # four elements a thread: one vector
_FEWEST = 4  # steps of a loop that is cut


def rank_block(r: int) -> int:
    """The rank as the kernels' tiles have it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(r))


def splits(blocks: int, steps: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(parts, steps of each) to cut a loop of `steps` into, in each of `blocks` programs."""
    parts = max(1, min(triton.next_power_of_2(programs // max(1, blocks)), steps // _FEWEST))
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


def signed(threshold: int) -> int:
    """The bits of an unsigned 32-bit number as Triton passes them in one type: as int32."""
    return threshold - (1 << 32) if threshold >= 1 << 31 else threshold


def terms(parameter: torch.Tensor, activations: torch.dtype, arch: int) -> int:
    """How many narrow numbers stand for one of `parameter` in `dot_wide`.

    0: Triton has no tensor cores for `arch`, and fp32 FMA does what is wanted.
    """
    if arch < 80:
        return 0
    if parameter.dtype != torch.float32 or activations == torch.float32:
        return 1
    return 3 if activations == torch.bfloat16 else 2


@triton.jit
def load_tile(matrix, row, col, stride, inside):
    """Elements (row, col) in fp32, 0 where not inside; stride: from row to row."""
    at = matrix + row[:, None] * stride + col[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def keep_mask(key, row, first_col, K, threshold, COLS: tl.constexpr, ALIGNED: tl.constexpr):
    """Which elements (row, first_col + 0 .. COLS - 1) of a [., K] matrix are kept.

    key: the seed; row: int64 [ROWS]; first_col: a multiple of 4; ALIGNED: K is one too, so that one
    counter serves four neighbours. threshold: int32, the bits of an unsigned number.
    """
    if ALIGNED:
        quad = first_col // 4 + tl.arange(0, COLS // 4)
        w0, w1, w2, w3 = tl.randint4x(key, row[:, None] * (K // 4) + quad[None, :])
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(row.shape[0], COLS)
    else:
        index = row[:, None] * K + (first_col + tl.arange(0, COLS))[None, :]
        w0, w1, w2, w3 = tl.randint4x(key, index // 4)
        place = (index % 4).to(tl.int32)
        words = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    return words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def dot_wide(x, a, acc, TERMS: tl.constexpr):
    """acc + x a in fp32's precision: x in its own dtype, a in any.

    bf16 x: a is the sum of TERMS bf16 numbers, and every product is exact in fp32. fp16 x: as fp16
    has not a's range, both are TF32, which holds x exactly, and a is the sum of TERMS of those.
    fp32 x, or TERMS 0: fp32 FMA.
    """
    if x.dtype == tl.float32 or TERMS == 0:
        acc = tl.dot(x.to(tl.float32), a.to(tl.float32), acc, input_precision="ieee")
    elif x.dtype == a.dtype:
        acc = tl.dot(x, a, acc)
    elif x.dtype == tl.float16:
        a = a.to(tl.float32)
        wide = x.to(tl.float32)
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        if TERMS > 1:
            acc = tl.dot(wide, a - high, acc, input_precision="tf32")
        acc = tl.dot(wide, high, acc, input_precision="tf32")
    elif TERMS == 1:
        acc = tl.dot(x, a.to(x.dtype), acc)
    else:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, middle, acc)
        acc = tl.dot(x, high, acc)
    return acc


@triton.jit
def _sum_parts(parts, out, n, count, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(parts + i, mask=i < n, other=0.0)
        parts += n
    tl.store(out + i, (total * factor).to(out.dtype.element_ty), mask=i < n)


def sum_parts(parts: torch.Tensor, out: torch.Tensor, factor: float = 1.0) -> None:
    """out = factor times the sum of parts, fp32 [count, out.numel()], in their order: always the
    same result. out: contiguous, any dtype."""
    n = out.numel()
    _sum_parts[(triton.cdiv(n, _SUM_BLOCK),)](
        parts, out, n, parts.shape[0], factor, BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=True
    )
