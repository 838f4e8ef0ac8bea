"""What is special about lora_linear on a GPU: several A's at once, the choice of the base matmul,
large offsets, determinism, reasons. Simulated."""

import json
import warnings

import pytest
import torch
from backends import simulated
from lora_cases import check, eager, leaves, make, quantized, results
from tolerance import assert_close, assert_same

from fusetune import ops
from fusetune.ops import _cuda, _gpu_choice, _gpu_linear, _triton
from fusetune.ops._registry import OPS, Case
from fusetune.reference import dropout as reference_dropout
from fusetune.reference.dropout import new_seed, threshold_and_scale

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def triton_sim():
    with simulated("triton-sim") as run:
        yield run


# --- several A's from one read of x ---------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("ranks", "k", "dtype"),
    [((16, 16), 96, BF16), ((3, 16, 8), 101, F16), ((4, 20, 1, 7), 72, F32)],
)
def test_shrink_of_stacked_adapters(triton_sim, ranks, k, dtype, p):
    from fusetune._triton.lora_shrink import launch_lora_shrink

    x = torch.randn(37, k).to(dtype)
    loras = [torch.randn(r, k) / k**0.5 for r in ranks]
    seeds = [new_seed(x.device) for _ in ranks]  # each A has its own mask
    threshold, factor = threshold_and_scale(p)
    got = launch_lora_shrink(x, loras, seeds if p else None, threshold, factor)
    for s, a, seed in zip(got, loras, seeds, strict=True):
        dropped = reference_dropout.dropout(x.double(), p, seed if p else None)
        exact, magnitude = dropped @ a.double().T, dropped.abs() @ a.double().abs().T
        assert_close("s", s, exact, (dropped.float() @ a.T), magnitude)


def test_stacked_adapters_read_x_once(triton_sim):
    """What three or four A's load more than one is the A's: less than another read of x."""
    from fusetune._triton.lora_shrink import launch_lora_shrink

    x = torch.randn(256, 512).to(BF16)
    loras = [torch.randn(16, 512).to(BF16) for _ in range(4)]
    loaded = {}
    for count in (1, 3, 4):
        triton_sim.launches.clear()
        launch_lora_shrink(x, loras[:count])
        first = triton_sim.launches[0]
        assert first.kernel == "_shrink"
        loaded[count] = 32 * first.counts.global_load_sectors
    rows = -(-x.shape[0] // 64)  # programs that read an A
    assert loaded == {count: x.nbytes + count * rows * loras[0].nbytes for count in loaded}


# --- the base matmul ------------------------------------------------------------------------------


@pytest.fixture
def choices(tmp_path, monkeypatch):
    """An own cache of measured choices; the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FUSETUNE_TUNE", raising=False)
    _gpu_choice.forget()
    yield tmp_path / "fusetune" / "linear.json"
    _gpu_choice.forget()


@pytest.mark.parametrize("way", ["triton", "addmm", "augmented"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kind", ["dense", "fp4 nested"])
def test_every_way_gives_the_same(triton_sim, monkeypatch, way, dtype, kind):
    taken = []

    def choose(problem, ways):
        taken.append(problem)
        return ways[way]

    monkeypatch.setattr(_gpu_linear, "choose", choose)
    check(make(19, 40, 72, 20, dtype, kind))
    assert len(taken) == 2


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_masked_tail_added_to_the_vendors_matmul(triton_sim, monkeypatch, kind):
    arguments, dy = make(19, 40, 72, 20, BF16, kind), torch.randn(19, 40).to(BF16)
    grads = []
    for way in ("triton", "addmm"):
        monkeypatch.setattr(_gpu_linear, "choose", lambda problem, ways, way=way: ways[way])
        torch.manual_seed(3)
        grads.append(results(ops.lora_linear, arguments, dy, dropout_p=0.4)["dx"])
    assert_same(*grads)


def test_columns_can_be_scaled_before_the_bias(triton_sim):
    x, weight = torch.randn(5, 64), torch.randn(24, 64)
    s, b, bias, scale = torch.randn(5, 4), torch.randn(24, 4), torch.randn(24), torch.rand(24)
    product, before = x @ weight.T + 0.5 * s @ b.T, torch.randn(5, 24)
    for way in (_gpu_linear._triton_linear, _gpu_linear._addmm):
        y = way(x, weight, bias, (s, b, 0.5), _gpu_linear.Scale(scale))
        assert_same(y, product * scale + bias)
        z, added = torch.full((5, 24), torch.nan), before.clone()
        y = way(x, weight, bias, (s, b, 0.5), _gpu_linear.Scale(scale, z, added))
        assert y is added
        assert_same(y, before + product * scale + bias)
        assert_same(z, product)


def test_a_way_that_adds_is_not_measured(triton_sim, choices, monkeypatch):
    """It would add as often as it is tried."""
    monkeypatch.setenv("FUSETUNE_TUNE", "1")
    x, weight, before = torch.randn(5, 64), torch.randn(24, 64), torch.randn(5, 24)
    s, b, scale, added = torch.randn(5, 4), torch.randn(24, 4), torch.randn(24), before.clone()
    _gpu_linear.linear(x, weight, None, (s, b, 0.5), _gpu_linear.Scale(scale, None, added))
    assert_same(added, before + (x @ weight.T + 0.5 * s @ b.T) * scale)
    dx = torch.randn(5, 64)
    expected = dx + before @ weight
    _gpu_linear.linear_dx(before, weight, to=dx)
    assert_same(dx, expected)
    assert not choices.exists()


def test_a_measured_choice_is_kept_and_used(triton_sim, choices, monkeypatch):
    arguments = make(5, 24, 64, 4, BF16)
    ops.lora_linear(**arguments)
    assert not choices.exists()  # nothing is measured unasked
    monkeypatch.setenv("FUSETUNE_TUNE", "1")
    ops.lora_linear(**arguments)
    content = json.loads(choices.read_text())
    assert list(content["choices"]) == ["simulated sm_80: y M 8 N 24 K 64 r 4 bfloat16"]
    # A new process reads the file, and does not measure again.
    content["choices"] = dict.fromkeys(content["choices"], "augmented")
    choices.write_text(json.dumps(content))
    _gpu_choice.forget()
    monkeypatch.setattr(_gpu_choice, "_seconds", None)
    triton_sim.launches.clear()
    ops.lora_linear(**arguments)
    assert "_dequantize_rows" in [launch.kernel for launch in triton_sim.launches]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 0, "choices": {}}', '{"version": 1}', '{"version": 1, "choices": 3}'],
)
def test_a_broken_cache_is_ignored(triton_sim, choices, content):
    choices.parent.mkdir()
    choices.write_text(content)
    arguments = make(5, 24, 64, 4, BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = ops.lora_linear(**arguments)
    assert_same(y, eager(**arguments))


def test_a_choice_that_is_not_to_be_had_is_ignored(triton_sim, choices):
    choices.parent.mkdir()
    key = "simulated sm_80: y M 8 N 24 K 64 r 4 bfloat16"
    choices.write_text(json.dumps({"version": 1, "choices": {key: "cuda"}}))
    arguments = make(5, 24, 64, 4, BF16)
    assert_same(ops.lora_linear(**arguments), eager(**arguments))


def test_a_cache_that_cannot_be_written_only_warns(triton_sim, choices, monkeypatch):
    choices.parent.write_text("a file where the folder would be")
    monkeypatch.setenv("FUSETUNE_TUNE", "1")
    arguments = make(5, 24, 64, 4, BF16)
    with pytest.warns(UserWarning, match="fusetune"):
        y = ops.lora_linear(**arguments)
    assert_same(y, eager(**arguments))


@pytest.mark.parametrize("arch", [0, 70, 75, 80, 90, 103, 120, 999])
def test_an_unknown_gpu_has_defaults(arch):
    from fusetune._triton.linear import tiles

    every = dict.fromkeys(("cuda", "triton", "addmm", "augmented"))
    for m in (1, 100, 5000):
        for dtype in (F32, BF16):
            assert tiles(arch, m, dtype).rows > 0
            for rank in (0, 16):
                problem = _gpu_choice.Problem("y", m, 64, 64, rank, dtype, torch.device("cpu"))
                assert _gpu_choice.default(problem, every) == "cuda"
                del every["cuda"]
                tail_in_16_bits = rank and dtype == BF16
                assert _gpu_choice.default(problem, every) == (
                    "triton" if tail_in_16_bits else "addmm"
                )
                every["cuda"] = None
    assert _cuda.max_rows(arch, BF16) >= 64


# --- Turing: no tensor cores for Triton -----------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "dtype", "kind", "adapter", "p"),
    [
        ((9, 64, 101, 1), F16, "fp4 nested", F32, 0.3),
        ((70, 136, 200, 16), F16, "nf4", F16, 0.3),
        ((67, 130, 40, 20), F16, "nf4", F32, 0.0),
        ((17, 24, 48, 128), F16, "dense", F32, 0.1),
        ((33, 65, 50, 20), F32, "nf4", F32, 0.3),
    ],
)
def test_turing(sizes, dtype, kind, adapter, p):
    """Narrow products by fp32 FMA; a base product in 16 bits is never Triton's."""
    with simulated("triton-sim", 75) as run:
        check(make(*sizes, dtype, kind, adapter), p)
    opcodes = {op.split(".")[0] for launch in run.launches for op in launch.counts.instructions}
    assert {"_shrink", "_ds_db", "_da"} <= {launch.kernel for launch in run.launches}
    assert "mma" not in opcodes
    if dtype == F16 and not p:
        assert "_linear" not in {launch.kernel for launch in run.launches}


@pytest.mark.parametrize("m", [3, 300])
def test_turing_multiplies_with_the_packed_weight(m):
    """The CUDA kernels carry the base product and its tail, whatever M."""
    with simulated("cuda-sim", 75) as cuda, simulated("triton-sim", 75), ops.use_backend("auto"):
        check(make(m, 40, 64, 4, F16), 0.3)
    names = " ".join(launch.kernel for launch in cuda.launches)
    assert "linear_4bit_dx" in names
    assert "dequantize" not in names


# --- offsets, determinism, reasons ----------------------------------------------------------------


def test_offsets_above_2_to_the_31(triton_sim):
    """Two rows of x, and of dy, so far apart that an int32 offset would wrap."""
    stride, k, n = 2**31 + 64, 64, 48
    far = torch.empty(0, dtype=torch.uint8)
    far.set_(torch.UntypedStorage(2 * (stride + k + n)))  # untouched pages take no memory
    far = far.view(BF16)
    x, dy = far.as_strided((2, k), (stride, 1)), far[k:].as_strided((2, n), (stride, 1))
    near = {"x": torch.randn(2, k).to(BF16), "dy": torch.randn(2, n).to(BF16)}
    x.copy_(near["x"])
    dy.copy_(near["dy"])
    arguments = make(2, n, k, 4, BF16)

    def run(x, dy):
        inputs = leaves(arguments) | {"x": x}
        torch.manual_seed(1)
        y = ops.lora_linear(**inputs, dropout_p=0.3)
        y.backward(dy)
        return y.detach(), inputs["lora_A"].grad, inputs["lora_B"].grad

    for got, expected in zip(run(x, dy), run(**near), strict=True):
        assert torch.equal(got, expected)


def test_masks_of_counters_above_2_to_the_32(triton_sim):
    """Element index / 4 no longer fits 32 bits: the counter's high word is used."""
    import triton
    import triton.language as tl

    from fusetune._triton._tile import keep_mask, signed

    first, k = 2**34 // 64 + 5, 64

    @triton.jit
    def kernel(out, seed, first, threshold, K: tl.constexpr, ROWS: tl.constexpr):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        kept = keep_mask(tl.load(seed), row, 0, K, threshold, K, True)
        at = tl.arange(0, ROWS)[:, None] * K + tl.arange(0, K)[None, :]
        tl.store(out + at, kept.to(tl.int8))

    seed = torch.tensor([-12345678901234567])
    out = torch.empty(16, k, dtype=torch.int8)
    threshold, _ = threshold_and_scale(0.6)
    kernel[(1,)](out, seed, first, signed(threshold), K=k, ROWS=16)
    block = first * k // 4 + torch.arange(16 * k // 4)
    zero, word = torch.zeros_like(block), 0xFFFFFFFF
    value = int(seed)
    words = reference_dropout.philox(
        (block & word, block >> 32, zero, zero), (value & word, (value >> 32) & word)
    )
    assert torch.equal(out.bool(), (torch.stack(words, 1) >= threshold).view(16, k))


def test_results_do_not_change_from_run_to_run(triton_sim):
    arguments, dy = make(300, 72, 520, 8, BF16), torch.randn(300, 72).to(BF16)

    def run():
        torch.manual_seed(2)
        return results(ops.lora_linear, arguments, dy, dropout_p=0.2)

    first, second = run(), run()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    opcodes = {op for launch in triton_sim.launches for op in launch.counts.instructions}
    assert not [op for op in opcodes if op.startswith(("atom", "red"))]


def test_reasons(monkeypatch):
    case = ops.Case("cpu", BF16)
    assert _triton.supports(case) == "the tensors are on cpu"
    with simulated("triton-sim"):
        assert _triton.supports(case) is None
        assert "float64" in _triton.supports(ops.Case("cpu", torch.float64))
        assert "dense weight" in _triton.supports(ops.Case("cpu", BF16, F32))
        monkeypatch.setattr(_triton, "_load", lambda: "Triton is not installed: no")
        assert _triton.supports(case) == "Triton is not installed: no"
        monkeypatch.undo()
        monkeypatch.setattr(_triton, "capability", lambda device=None: 70)
        assert "sm_70" in _triton.supports(case)
        monkeypatch.setattr(_triton, "capability", lambda device=None: 75)
        assert "sm_75 has no torch.bfloat16" in _triton.supports(case)
        assert _triton.supports(ops.Case("cpu", F16)) is None
        monkeypatch.undo()
        with pytest.raises(ValueError, match="dense weight"):
            ops.lora_linear(**(make(2, 8, 64, 2, F32, "dense") | {"x": torch.randn(2, 64).half()}))


@pytest.mark.parametrize(("version", "why"), [("3.2.0", "older"), ("3.5.1", None), ("4.0", None)])
def test_versions_of_triton(monkeypatch, version, why):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    reason = _triton._load.__wrapped__()
    assert reason is None if why is None else why in reason


def test_what_triton_does_not_take_goes_to_the_next_backend():
    """Where nothing is forced the CPU's kernels, or the reference, take over."""
    with simulated("triton-sim"), ops.use_backend("auto"):
        assert ops.OPS["lora_linear"].select(ops.Case("cpu", F32)).name == "triton"
        assert ops.OPS["lora_linear"].select(ops.Case("cpu", torch.float64)).name == "reference"
        assert ops.OPS["lora_linear"].select(ops.Case("cpu", F16, F32)).name == "cpu"


def test_no_rows_no_launch(triton_sim):
    arguments = leaves(make(1, 8, 64, 2, BF16) | {"x": torch.randn(0, 64).to(BF16)})
    y = ops.lora_linear(**arguments, dropout_p=0.5)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert arguments["lora_A"].grad.eq(0).all()
    assert not triton_sim.launches


def test_the_cuda_kernels_serve_few_rows_also_beside_triton():
    """On a card with both, the base product of few rows is the CUDA kernel's."""
    with simulated("cuda-sim") as cuda, simulated("triton-sim"), ops.use_backend("auto"):
        arguments = make(3, 24, 64, 4, BF16)
        assert _cuda.refuses(3, 24, 64, BF16, arguments["weight"]) is None
        y = ops.lora_linear(**arguments)
        assert cuda.launches
    assert_same(y, eager(**arguments))


def test_quantized_weights_of_any_blocksize():
    for blocksize in (32, 4096):
        with simulated("triton-sim"):
            w = quantized(torch.randn(24, 72), blocksize=blocksize, double_quant=True)
            arguments = make(5, 24, 72, 4, BF16) | {"weight": w}
            assert_same(ops.lora_linear(**arguments), eager(**arguments))


def test_narrow_products_by_torch_are_only_used_on_request(monkeypatch):
    """Without Triton: fuse then leaves LoRA layers to PEFT, and the report gives this reason."""
    monkeypatch.setattr(_cuda, "supports", lambda case: None)
    case = Case("cuda", torch.float16)
    with ops.use_backend("auto"):
        assert "no CUDA kernels" in dict(OPS["lora_linear"].explain(case))["cuda"]
    with ops.use_backend("cuda"):
        assert OPS["lora_linear"].select(case).name == "cuda"
