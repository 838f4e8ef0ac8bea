"""The CUDA kernels of linear_4bit, their compiled PTX executed: results, splits, traffic, refusals.

What every backend is tested for is in test_linear_4bit.py; here is what only these kernels have.
"""

import math

import pytest
import torch
from backends import forced, simulated
from tolerance import assert_close, one_thread
from torch.nn.functional import linear

from fusetune import ops
from fusetune.ops import _cuda
from fusetune.reference.dropout import dropout, keep_mask
from fusetune.sim.ptx import Program

HALVES = (torch.float16, torch.bfloat16)
WEIGHTS = {
    "nf4": {},
    "nf4 nested": {"double_quant": True},
    "fp4 nested": {"quant_type": "fp4", "double_quant": True, "blocksize": 32},
    "fp4": {"quant_type": "fp4", "blocksize": 4096},
}


@pytest.fixture(params=[75, 80], ids=["sm_75", "sm_80"])
def run(request):
    """The simulator, in force; what it has launched."""
    with simulated("cuda-sim", request.param) as launched:
        yield launched


@pytest.fixture(params=[75, 80, "card"], ids=["sm_75", "sm_80", "card"])
def arch(request):
    """Compute capability of what the test runs on, simulated or a card."""
    if request.param == "card":
        with forced("cuda"):
            major, minor = torch.cuda.get_device_capability()
            yield 10 * major + minor
        return
    with simulated("cuda-sim", request.param):
        yield request.param


def tensors(m, n, k, r, dtype, kind):
    """Everything that the forward and the backward pass of a layer take."""
    with ops.use_backend("reference"):
        w = ops.quantize_4bit(torch.randn(n, k), **WEIGHTS[kind])
        exact, dense = (ops.dequantize_4bit(w, t) for t in (torch.float64, dtype))
    x, dy, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n)
    s, lora_A = torch.randn(m, r), torch.randn(r, k) / r**0.5
    return w, exact, dense, x, dy, bias, s, torch.randn(n, r) / r**0.5, lora_A


def check_forward(y, exact, dense, x, bias, s, lora_B, scaling):
    def exactly(x, w, bias, s, b):
        return linear(x.double(), w, bias.double()) + scaling * s.double() @ b.double().T

    dtype = x.dtype
    with one_thread():
        wanted = exactly(x, exact, bias, s, lora_B)
        magnitude = exactly(*(t.abs() for t in (x, exact, bias, s, lora_B)))
        tail = scaling * (s.to(dtype) @ lora_B.to(dtype).T)
        eager = linear(x, dense, bias.to(dtype)) + tail
    assert_close("y", y, wanted, eager, magnitude)


def check_backward(dx, exact, dense, dy, ds, lora_A, p, seed):
    def exactly(dy, w, ds, a):
        return dy.double() @ w + dropout(ds.double() @ a.double(), p, seed)

    dtype = dy.dtype
    with one_thread():
        wanted = exactly(dy, exact, ds, lora_A)
        magnitude = exactly(*(t.abs() for t in (dy, exact, ds, lora_A)))
        eager = dy @ dense + dropout(ds.to(dtype) @ lora_A.to(dtype), p, seed)
    assert_close("dx", dx, wanted, eager, magnitude)


# M below, at and across every tile; N and K off the tile's grid; every kind of weight; both dtypes.
CASES = (
    (1, 48, 1056, "nf4 nested", 16, 1),
    (2, 33, 96, "fp4", 1, 1),
    (5, 17, 1184, "fp4 nested", 8, 3),
    (8, 130, 544, "nf4", 5, 2),
    (9, 200, 544, "nf4 nested", 16, 1),
    (16, 133, 288, "fp4 nested", 64, 3),
    (33, 130, 416, "nf4", 3, 2),
    (64, 96, 160, "fp4", 17, 1),
    (130, 133, 160, "nf4 nested", 8, 2),
    (256, 72, 96, "fp4 nested", 4, 1),
)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(arch, case, dtype):
    """Bias, low-rank tail, dropout and splits in all of them; bfloat16 only from sm_80."""
    m, n, k, kind, r, splits = case
    w, exact, dense, x, dy, bias, s, lora_B, lora_A = tensors(m, n, k, r, dtype, kind)
    if arch < 80 and dtype == torch.bfloat16:
        assert "bfloat16" in _cuda.refuses(m, n, k, dtype, w, r)
        return
    assert _cuda.refuses(m, n, k, dtype, w, r) is None
    y = _cuda.linear_4bit(x, w, bias, (s, lora_B, 0.5), splits=splits)
    check_forward(y, exact, dense, x, bias, s, lora_B, 0.5)
    assert _cuda.refuses(m, n, k, dtype, w, r, dx=True) is None
    seed = torch.tensor([0x0123_4567_89AB_CDEF])
    dx = _cuda.linear_4bit_dx(dy, w, (s, lora_A, 1.0), (0.3, seed), min(splits, -(-n // 64)))
    check_backward(dx, exact, dense, dy, s, lora_A, 0.3, seed)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_fp32_matches_float64(arch, kind):
    w, exact, dense, x, _, bias, s, lora_B, _ = tensors(7, 35, 320, 5, torch.float32, kind)
    for m in (1, 7):
        y = _cuda.linear_4bit(x[:m], w, bias, (s[:m], lora_B, 0.5))
        check_forward(y, exact, dense, x[:m], bias, s[:m], lora_B, 0.5)


def test_without_tail_bias_and_dropout(arch):
    w, exact, dense, x, dy, _, s, _, lora_A = tensors(12, 72, 160, 4, torch.float16, "nf4")
    nothing = torch.zeros(12, 4), torch.zeros(72, 4), 1.0
    check_forward(_cuda.linear_4bit(x, w), exact, dense, x, torch.zeros(72), *nothing)
    check_backward(_cuda.linear_4bit_dx(dy, w), exact, dense, dy, s * 0, lora_A, 0.0, None)
    check_backward(
        _cuda.linear_4bit_dx(dy, w, (s, lora_A, 1.0)), exact, dense, dy, s, lora_A, 0.0, None
    )


def test_the_mask_is_that_of_the_definition(arch):
    """dy is zero, so that dx shows the masked tail alone."""
    w, *_ = tensors(20, 8, 96, 1, torch.float16, "nf4")
    seed = torch.tensor([2**62 + 12345])
    dy, ones = torch.zeros(20, 8).half(), (torch.ones(20, 1), torch.ones(1, 96), 1.0)
    dx = _cuda.linear_4bit_dx(dy, w, ones, (0.5, seed))
    assert torch.equal(dx, 2.0 * keep_mask(20, 96, 0.5, seed).half())


def test_a_split_is_deterministic_and_chosen_where_columns_are_few(run):
    w, _, _, x, *_ = tensors(20, 64, 2048, 1, torch.float16, "nf4 nested")
    first = _cuda.linear_4bit(x, w)
    assert run.launches[0].grid[2] > 1
    assert len(run.launches) == 2
    assert torch.equal(first, _cuda.linear_4bit(x, w))


def test_strides_and_alignment(arch):
    """Rows that 16-byte loads cannot reach are copied; others are read where they are."""
    w, _, _, x, dy, *_ = tensors(3, 20, 64, 1, torch.float16, "nf4")
    y, dx = _cuda.linear_4bit(x, w), _cuda.linear_4bit_dx(dy, w)
    for pitch, offset in ((64, 0), (72, 0), (65, 0), (64, 1), (0, 0)):
        wide = torch.empty(offset + 3 * max(pitch, 64), dtype=x.dtype).fill_(torch.nan)
        rows = wide.as_strided((3, 64), (pitch, 1), offset)
        for i in range(3 if pitch else 1):
            rows[i] = x[i]
        assert torch.equal(_cuda.linear_4bit(rows, w), y if pitch else y[:1].expand(3, 20))
    rows = torch.full((3, 31), torch.nan, dtype=x.dtype)[:, 1:21]
    rows.copy_(dy)
    assert torch.equal(_cuda.linear_4bit_dx(rows, w), dx)


def test_no_rows(run):
    w, *_ = tensors(1, 24, 64, 1, torch.float16, "nf4")
    x = torch.empty(0, 64, dtype=torch.float16)
    assert _cuda.linear_4bit(x, w).shape == (0, 24)
    assert _cuda.linear_4bit_dx(x[:, :24], w).shape == (0, 64)
    assert not run.launches


@pytest.mark.parametrize("m", [3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_offsets_above_2_to_the_31(run, m, dtype):
    """Rows of x, and of dy, so far apart that an int32 offset would wrap."""
    w, _, _, x, dy, *_ = tensors(m, 24, 64, 1, dtype, "nf4 nested")
    if dtype == torch.float32 and m > 8:
        pytest.skip("no kernel for so many rows in fp32")

    def apart(near):
        stride, width = 2**31 // (m - 1) + 64, near.shape[1]
        far = torch.empty(0, dtype=torch.uint8)
        size = dtype.itemsize * ((m - 1) * stride + width)
        far.set_(torch.UntypedStorage(size))  # untouched pages take no memory
        rows = far.view(dtype).as_strided((m, width), (stride, 1))
        return rows.copy_(near)

    assert torch.equal(_cuda.linear_4bit(apart(x), w), _cuda.linear_4bit(x, w))
    if dtype == torch.float16:
        assert torch.equal(_cuda.linear_4bit_dx(apart(dy), w), _cuda.linear_4bit_dx(dy, w))


def untouched(count, dtype):
    """Pages that nobody writes take no memory."""
    whole = torch.empty(0, dtype=torch.uint8)
    return whole.set_(torch.UntypedStorage(dtype.itemsize * count)).view(dtype)


@pytest.fixture(params=[False, True])
def above(request, run, monkeypatch):
    """Weights of a little more than 2**31 elements, and their last rows alone: only the last CTA of
    each kernel is executed, which decodes these. Codes and statistics of the others lie in
    untouched pages. Few columns for what sums over them, few rows for what sums over those: the
    simulator's time is that of the sum."""
    last = 128

    def weights(k):
        n = 2**31 // k + last
        small = _quantized((last, k), double_quant=request.param)

        def behind(part, elements):
            count = n * k // elements
            few = count < 2**20  # not worth pages of their own, which would be zero
            whole = torch.zeros(count, dtype=part.dtype) if few else untouched(count, part.dtype)
            whole[-part.numel() :] = part.reshape(-1)
            return whole

        fields = {"packed": behind(small.packed, 2)}
        fields["absmax"] = behind(small.absmax, small.blocksize)
        if request.param:
            elements = small.blocksize * small.nested_blocksize
            fields["nested_absmax"] = behind(small.nested_absmax, elements)
        return small._replace(fields | {"shape": torch.Size((n, k))}), small

    whole = Program.launch

    def last_only(program, kernel, grid, *args, **options):
        return whole(program, kernel, grid, *args, **options, first=math.prod(grid) - 1)

    monkeypatch.setattr(Program, "launch", last_only)
    return weights


def test_weights_of_more_than_2_to_the_31_elements(above):
    large, small = above(2**12)
    x = torch.randn(9, 2**12).half()
    for rows, columns in ((x[:1], 16), (x, 128)):
        got, expected = (_cuda.linear_4bit(rows, w, splits=1) for w in (large, small))
        assert torch.equal(got[-8:, -columns:], expected[-8:, -columns:])


def test_weights_of_more_than_2_to_the_31_elements_backwards(above):
    large, small = above(2**17)
    (n, k), last = large.shape, small.shape[0]
    dy = torch.zeros(9, n).half()
    dy[:, -last:] = torch.randn(9, last)
    got = _cuda.linear_4bit_dx(dy, large, splits=1)
    expected = _cuda.linear_4bit_dx(dy[:, -last:], small, splits=1)
    assert torch.equal(got[:, -128:], expected[:, -128:])
    out, exact = untouched(n * k, torch.float16), ops.dequantize_4bit(small, torch.float16)
    _cuda.dequantize_4bit(large, out)
    assert torch.equal(out[-1024:], exact.view(-1)[-1024:])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "shape", "dtype", "options", "why"),
    [
        (1, (8, 70), torch.float16, {}, "K = 70 is not a multiple of 32"),
        (1, (8, 7), torch.float16, {}, "K = 7 is not"),
        (65536, (8, 64), torch.float16, {}, "65536 rows, more than"),
        (9, (8, 64), torch.float32, {}, "9 rows, more than 8"),
        (1, (8, 64), torch.float64, {}, "no kernel for torch.float64"),
        (1, (8, 64), torch.float32, {"dx": True}, "no kernel for the gradient"),
        (1, (0, 64), torch.float16, {}, "an empty weight"),
        (1, (8, 0), torch.float16, {}, "an empty weight"),
    ],
)
def test_refusals(arch, m, shape, dtype, options, why):
    w = _quantized(shape)
    assert why in _cuda.refuses(m, *shape, dtype, w, **options)


@pytest.mark.parametrize(("capability", "most"), [(75, 65535), (80, 256), (90, 256), (100, 64)])
def test_rows_above_which_a_card_decodes_the_weight(run, monkeypatch, capability, most):
    monkeypatch.setattr(_cuda, "_capability", lambda device=None: capability)
    monkeypatch.setattr(_cuda, "_no_code", lambda capability: None)
    w = _quantized((8, 64))
    assert _cuda.refuses(most, 8, 64, torch.float16, w) is None
    assert "rows, more than" in _cuda.refuses(most + 1, 8, 64, torch.float16, w)


def _quantized(shape, **options):
    with ops.use_backend("auto"):
        return ops.quantize_4bit(torch.randn(shape), **options)


def test_refuses_weights_that_it_cannot_read(arch):
    assert "dense" in _cuda.refuses(1, 8, 64, torch.float16, torch.randn(8, 64))
    w = _quantized((8, 64))
    buffer = torch.zeros(8 * 32 + 1, dtype=torch.uint8)
    moved = w._replace({"packed": buffer[1:]})
    assert "aligned" in _cuda.refuses(1, 8, 64, torch.float16, moved)
    odd = w._replace({"nested_blocksize": 96})
    assert "power of two" in _cuda.refuses(1, 8, 64, torch.float16, odd)


def test_refuses_architectures_that_it_is_not_built_for(run, monkeypatch):
    w, has_code = _quantized((8, 64)), _cuda.MODULE.has_code
    older, same = run.arch - run.arch % 10 - 10, run.arch - run.arch % 10 + 9
    assert has_code(same)
    assert has_code(130)  # PTX
    assert not has_code(older)
    assert not has_code(run.arch - 1)
    monkeypatch.setattr(_cuda, "_capability", lambda device=None: older)
    assert f"not built for sm_{older}" in _cuda.refuses(1, 8, 64, torch.float16, w)
    with pytest.raises(ValueError, match=f"not built for sm_{older}"):
        ops.dequantize_4bit(w)


def test_without_a_device_it_says_why():
    """On a machine with neither a GPU nor a simulation the backend is off, with a reason."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert _cuda.reason()
    w = _quantized((8, 64))
    assert _cuda.refuses(1, 8, 64, torch.float16, w) == _cuda.reason()
    with ops.use_backend("cuda"), pytest.raises(ValueError, match="the tensors are on cpu"):
        ops.linear_4bit(torch.randn(1, 64), w)


# --- traffic --------------------------------------------------------------------------------------


def test_gemv_reads_the_packed_weight_once(run):
    """All bytes that lanes ask for, accounted for: none of the codes twice."""
    n, k = 64, 2048
    w, _, _, x, *_ = tensors(1, n, k, 1, torch.float16, "nf4")
    _cuda.linear_4bit(x, w, splits=1)
    (launch,) = run.launches
    ctas, warps = n // 16, 8
    expected = n * k // 2  # codes
    expected += n * k // 32 * 4  # absmax, by every lane for its 32 elements
    expected += ctas * 8 * k * 2  # x; the seven rows that there are not read the one that is
    expected += ctas * warps * 32 * 4  # codebook
    assert launch.counts.global_load_bytes == expected
    assert launch.counts.global_store_bytes == n * 2


@pytest.mark.parametrize("m", [1, 16, 64])
def test_shared_memory_has_no_bank_conflicts(run, m):
    """Every request takes as many passes as its width asks for (absmax is not nested here)."""
    w, _, _, x, dy, *_ = tensors(m, 256, 512, 1, torch.float16, "nf4")
    _cuda.linear_4bit(x, w, splits=1)
    _cuda.linear_4bit_dx(dy, w, splits=1)
    forward, backward = (launch.counts for launch in run.launches)
    tiles = 2 if m <= 16 else 8
    if m == 1:  # sums of 8 warps: stores of 8 bytes, loads of 4
        assert forward.shared_store_wavefronts == 2 * forward.shared_store_requests
        assert forward.shared_load_wavefronts == forward.shared_load_requests
    else:  # x: 16 bytes a lane, read and written
        assert forward.shared_load_wavefronts == 4 * forward.shared_load_requests
        assert forward.shared_store_wavefronts == 4 * forward.shared_store_requests
    # Of dx, per warp and 32 rows of W: dy and absmax 16 bytes a lane, codes 2; stores, per stage of
    # 64 rows: dy and codes 16 bytes a thread, two absmax.
    loads, stores = backward.shared_load_requests, backward.shared_store_requests
    ctas_stages = 512 // 128 * 256 // 64
    assert loads == ctas_stages * 4 * 2 * (tiles + 2 + 8)
    assert backward.shared_load_wavefronts == ctas_stages * 4 * 2 * (4 * tiles + 4 * 2 + 8)
    assert stores == ctas_stages * 4 * (tiles // 2 + 2 + 2)
    assert backward.shared_store_wavefronts == ctas_stages * 4 * (4 * (tiles // 2 + 2) + 2)


@pytest.mark.parametrize("m", [1, 64])
def test_the_work_is_that_of_the_tiles(run, m):
    """Multiplications on tensor cores: M rounded up to its tile, and nothing else."""
    n, k = 128, 512
    w, _, _, x, *_ = tensors(m, n, k, 1, torch.float16, "nf4")
    _cuda.linear_4bit(x, w, splits=1)
    assert run.launches[0].counts.mma_flops == 2 * max(m, 8) * n * k


# --- dequantize_4bit ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 65), (3, 5, 64), (40, 1024)])
def test_dequantize_is_exact(arch, shape, kind, dtype):
    with ops.use_backend("reference"):
        w = ops.quantize_4bit(torch.randn(shape), **WEIGHTS[kind])
        expected = ops.dequantize_4bit(w, dtype)
    assert torch.equal(ops.dequantize_4bit(w, dtype), expected)
    shifted = torch.empty(w.numel() + 1, dtype=dtype)[1:].view(shape)  # not aligned to 16 bytes
    assert torch.equal(ops.dequantize_4bit(w, out=shifted), expected)


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_moves_few_bytes(run, double_quant):
    """At most 1.02 of codes, statistics and result, in the sectors that warps ask for."""
    n = 8192 * 8 * (64 if run.arch == 75 else 162)  # a warp takes 8192 elements where they suffice
    w = _quantized((n // 4096, 4096), double_quant=double_quant)
    out = ops.dequantize_4bit(w, torch.float16)
    (launch,) = run.launches
    assert launch.grid[0] == n // (8192 * 8)
    assert 32 * launch.counts.global_sectors <= 1.02 * (w.nbytes + out.nbytes)
