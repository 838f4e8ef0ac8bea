"""Triton kernels that tests of the simulator run: none of the library's, but like them."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def add_unmasked(x, y, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def normalise(x, out, n, BLOCK: tl.constexpr):
    """out = x / max|x| of a row."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    values = tl.load(x + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=0)
    tl.store(out + row * n + i, (values / largest).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def matmul(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """c [M, N] = a [M, K] . b [N, K]^T, software-pipelined."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_at = a + (rows % M)[:, None] * K + inner[None, :]
    b_at = b + (columns % N)[None, :] * K + inner[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        left = tl.load(a_at, mask=inner[None, :] < K - k * BK, other=0.0)
        right = tl.load(b_at, mask=inner[:, None] < K - k * BK, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_at += BK
        b_at += BK
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
@triton.jit
def tuned_double(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def exchange(x, out, BLOCK: tl.constexpr):
    """A reduction in shared memory across warps, and a scan."""
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, tl.cumsum(values, 0) + tl.sum(values, 0) - tl.flip(values))
