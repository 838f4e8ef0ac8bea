"""lora_linear on the native CPU kernels."""

from __future__ import annotations

import torch

from fusetune import _native
from fusetune.ops import _cpu
from fusetune.ops._registry import Impl, backend
from fusetune.ops._weight import Weight

Tensor = torch.Tensor
_NATIVE_BF16: bool = torch.cpu._is_avx512_bf16_supported()
_ROWS_TO_TILE = (
    8  # of x: fewer, and decoding the rows of a transposed weight is what takes the time
)


_MKL_AT_HOME: bool = (
    torch.backends.mkl.is_available() and _native.C is not None and bool(_native.C.is_intel())
)
# Where MKL's repacking costs our forward pass less than it does MKL's: rows of x, elements of W.
_OURS_ON_INTEL = range(8, 65)
_LARGE = 1 << 22


def torch_multiplies(rows: Tensor, weight: Weight, *, backward: bool = False) -> bool:
    """Whether the dense base matmul is left to torch.

    It is where the CPU multiplies bfloat16 natively, which our kernels, summing in fp32, do not
    (1.5 to 2 times as fast on Zen 4), and for one row of fp32. On AMD's processors, where MKL keeps
    to AVX2, our kernel is ahead for more rows of fp32. On Intel's MKL takes 0.8 to 0.95 of our time
    (AMX Xeon, fp32, 128 to 1024 rows), 0.5 to 0.9 backward, and ours is ahead for some rows of a
    large weight only, as MKL repacks the weight on every call. torch converts float16, and bfloat16
    on other CPUs, at a crawl. Weights whose rows are not contiguous go to torch too, but for those
    of `stored_transposed`.
    """
    if not isinstance(weight, Tensor) or rows.dtype != weight.dtype:
        return False
    if weight.stride(1) != 1:
        return True
    if rows.dtype == torch.bfloat16:
        return _NATIVE_BF16
    if rows.dtype != torch.float32:
        return False
    return rows.shape[0] == 1 or (
        _mkl_is_best() and (backward or not _repacking_costs(rows, weight))
    )


def _mkl_is_best() -> bool:
    """Not where our kernels are forced, by a backend or an instruction set."""
    if not _MKL_AT_HOME or backend() != "auto":
        return False
    kernels = _cpu.kernels()
    return bool(kernels.isa() == kernels.available_isas()[0])


def _repacking_costs(rows: Tensor, weight: Tensor) -> bool:
    return rows.shape[0] in _OURS_ON_INTEL and weight.numel() >= _LARGE


def torch_crawls(dtype: torch.dtype) -> bool:
    """Whether torch's products of this dtype take many times as long as fp32's on this CPU."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not _NATIVE_BF16)


def stored_transposed(rows: Tensor, weight: Weight, least: int = 0) -> Tensor | None:
    """The matrix [K, N] whose transpose `weight` is, where our kernels multiply by it as it lies.

    Their two directions are each other's for a transposed weight: y = x W^T sums over the rows of
    [K, N] as dX does elsewhere, dX = dY W takes one row for each of its columns. None for other
    weights, for what torch multiplies (see there), and for fp32 with fewer than `least` rows.
    """
    if not isinstance(weight, Tensor) or weight.stride(1) == 1 or weight.stride(0) != 1:
        return None
    stored = weight.resolve_neg().t()
    if torch_multiplies(rows, stored):
        return None
    few = rows.dtype == torch.float32 and rows.shape[0] < least
    return None if few and rows.dtype == weight.dtype else stored


def with_contiguous_rows(weight: Weight) -> Weight:
    """A copy of a dense weight where kernels cannot read it in place; itself otherwise."""
    if not isinstance(weight, Tensor):
        return weight
    weight = weight.resolve_neg()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _sum_biases(bias: Tensor | None, lora_bias: Tensor | None, scaling: float) -> Tensor | None:
    """bias + scaling * lora_bias, fp32."""
    if lora_bias is None:
        return None if bias is None else _cpu.fp32(bias)
    scaled = _cpu.fp32(lora_bias) * scaling
    return scaled if bias is None else scaled + _cpu.fp32(bias)


def shrink(rows: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """s = drop(rows) lora_A^T, fp32 [M, r]."""
    m, k = rows.shape
    r = lora_A.shape[0]
    s = _cpu.empty(m, r, dtype=torch.float32)
    _cpu.kernels().lora_shrink(
        _cpu.matrix(rows), m, k, lora_A.data_ptr(), r, _cpu.dropout(p, seed), s.data_ptr()
    )
    return s


def _forward(
    rows: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    int16: bool,
) -> tuple[Tensor, Tensor]:
    s = shrink(rows, _cpu.fp32(lora_A), dropout_p, seed)
    return expand(rows, weight, s, lora_B, scaling, bias, lora_bias, int16), s


def expand(
    rows: Tensor,
    weight: Weight,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    int16: bool,
) -> Tensor:
    """y = rows weight^T + bias + scaling (s lora_B^T + lora_bias), in rows' dtype."""
    b = _cpu.fp32(lora_B)
    n, r = b.shape
    tail = (s.data_ptr(), b.data_ptr(), r, scaling)
    stored = stored_transposed(rows, weight, _ROWS_TO_TILE)
    if stored is not None:
        left, right = _with_bias(s, b, scaling, _sum_biases(bias, lora_bias, scaling))
        return _kernel_dx(rows, stored, rows.shape[1], left, right, None, None)
    if isinstance(weight, Tensor) and torch_multiplies(rows, weight):
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
        scaled = _sum_biases(None, lora_bias, scaling)
        if y.dtype == torch.float32:
            y.addmm_(s, b.t(), alpha=scaling)
            return y if scaled is None else y.add_(scaled)
        # The tail in fp32, as in PEFT: addmm would round s and lora_B to 16 bits.
        return y.add_(_cpu.linear(s[:, :0], weight, n, scaled, tail, False))
    both = _sum_biases(bias, lora_bias, scaling)
    return _cpu.linear(rows, with_contiguous_rows(weight), n, both, tail, int16)


def _with_bias(s: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """left [M, r'], right [r', N] with left right = scaling s b^T + bias."""
    right = b.t() * scaling
    if bias is None:
        return s, right.contiguous()
    return torch.cat([s, s.new_ones(s.shape[0], 1)], 1), torch.cat([right, bias[None]])


def _backward(
    dy: Tensor,
    rows: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ds, dB = ds_db(dy, _cpu.fp32(lora_B), s, scaling)
    grad_x = dA = None
    if need_dA:
        dA = da(rows, ds, dropout_p, seed).to(lora_A.dtype)
    if need_dx:
        grad_x = dx(dy, weight, ds, _cpu.fp32(lora_A), _cpu.dropout(dropout_p, seed))
    return grad_x, dA, dB.to(lora_B.dtype) if need_dB else None


def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dS = scaling dy lora_B [M, r] and dB = scaling dy^T s [N, r], fp32."""
    (m, n), r = dy.shape, lora_B.shape[1]
    ds = _cpu.empty(m, r, dtype=torch.float32)
    dB = _cpu.empty(n, r, dtype=torch.float32)
    pointers = lora_B.data_ptr(), s.data_ptr(), r, scaling, ds.data_ptr(), dB.data_ptr()
    _cpu.kernels().lora_ds_db(_cpu.matrix(dy), m, n, *pointers)
    return ds, dB


def da(rows: Tensor, ds: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dA = dS^T drop(rows) [r, K], fp32."""
    (m, k), r = rows.shape, ds.shape[1]
    dA = _cpu.empty(r, k, dtype=torch.float32)
    dropout = _cpu.dropout(p, seed)
    _cpu.kernels().lora_da(_cpu.matrix(rows), m, k, ds.data_ptr(), r, dropout, dA.data_ptr())
    return dA


def dx(
    dy: Tensor,
    weight: Weight,
    ds: Tensor,
    a: Tensor,
    dropout: tuple[int, int, float] | None,
    to: Tensor | None = None,
) -> Tensor:
    """dy W + drop'(ds lora_A), in dy's dtype; added to `to`, without gaps, where that is given."""
    n = dy.shape[1]
    stored = stored_transposed(dy, weight)
    if stored is not None:
        dx = _dx_of_transposed(dy, stored, ds, a, dropout)
        return dx if to is None else to.add_(dx)
    if isinstance(weight, Tensor) and torch_multiplies(dy, weight, backward=True):
        dx = dy @ weight if to is None else to.addmm_(dy, weight)
        if dx.dtype == torch.float32 and dropout is None:
            return dx.addmm_(ds, a)
        return _kernel_dx(ds, weight, 0, ds, a, dropout, dx)
    return _kernel_dx(dy, with_contiguous_rows(weight), n, ds, a, dropout, to)


def _dx_of_transposed(
    dy: Tensor, stored: Tensor, ds: Tensor, a: Tensor, dropout: tuple[int, int, float] | None
) -> Tensor:
    """`dx` of the weight whose transpose `stored` [K, N] is."""
    r, k = a.shape
    if dropout is None:
        right = a.t().contiguous()
        return _cpu.linear(dy, stored, k, None, (ds.data_ptr(), right.data_ptr(), r, 1.0), False)
    # That direction of the kernel masks nothing: the tail is added to its result.
    dx = _cpu.linear(dy, stored, k, None, None, False)
    return _kernel_dx(ds, stored, 0, ds, a, dropout, dx)


def _mkl_is_ahead(dy: Tensor, weight: Tensor) -> bool:
    """Whether torch's dX of fp32 takes less time: by 5 to 10 % with AVX2 (Zen 3), for many rows and
    sums that are too long for the kernel that needs no copy of W (csrc/cpu/gemm_dense.h)."""
    many = dy.shape[0] >= 256 and weight.shape[0] > 1024
    fp32 = dy.dtype == weight.dtype == torch.float32
    return many and fp32 and bool(_cpu.kernels().isa() == "avx2")


def base_dx(dy: Tensor, weight: Weight) -> Tensor:
    """dy W, in dy's dtype."""
    if isinstance(weight, Tensor) and (
        torch_multiplies(dy, weight, backward=True) or _mkl_is_ahead(dy, weight)
    ):
        return dy @ weight
    (m, n), k = dy.shape, weight.shape[1]
    result = _cpu.empty(m, k, dtype=dy.dtype)
    dense = _cpu.weight(with_contiguous_rows(weight))
    _cpu.kernels().linear_dx(_cpu.matrix(dy), m, n, k, *dense, None, None, _cpu.matrix(result))
    return result


def _kernel_dx(
    dy: Tensor,
    weight: Weight,
    n: int,
    ds: Tensor,
    a: Tensor,
    dropout: tuple[int, int, float] | None,
    to: Tensor | None,
) -> Tensor:
    """dy[:, :n] weight[:n] + drop'(ds lora_A): the last term alone for n = 0."""
    r, k = a.shape
    kernels = _cpu.kernels()
    run = kernels.linear_dx if to is None else kernels.linear_dx_add
    dx = _cpu.empty(dy.shape[0], k, dtype=dy.dtype) if to is None else to
    tail = (ds.data_ptr(), a.data_ptr(), r, 1.0)
    run(_cpu.matrix(dy), dy.shape[0], n, k, *_cpu.weight(weight), tail, dropout, _cpu.matrix(dx))
    return dx


CPU_FORWARD = Impl("cpu", _forward, _cpu.supports("lora_shrink", "linear"), 10)
CPU_BACKWARD = Impl(
    "cpu", _backward, _cpu.supports("lora_ds_db", "lora_da", "linear_dx", "dropout"), 10
)
