"""What is predicted of adapters and prefixes: ledgers against torch, kernels' bytes by hand."""

import json

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="executes Triton kernels")

from benchmarks import bound_adapters, readme, recorder
from benchmarks.bound_launch import ledger
from benchmarks.cards import CARDS
from benchmarks.gpu.schemes_prefix import causal_mask, joined_sdpa
from benchmarks.ledgers_adapters import LAYERS, Bottleneck, Fusion, Prefix
from fusetune.bench.fusion_cases import projected
from fusetune.sim.cuda_build import CannotBuild, find_nvcc

BF16 = torch.bfloat16
A100 = next(card for card in CARDS if card.name == "A100")
T4 = next(card for card in CARDS if card.name == "T4")
TWO, ONE = Prefix(2, 6, 2, 64, 16, 8, 2), Prefix(2, 2, 2, 64, 16, 8, 2)


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: that memory is filled would be counted."""


@pytest.fixture
def _simulator():
    try:
        find_nvcc()
    except CannotBuild as error:
        pytest.skip(str(error))


# --- ledgers: what torch does ---------------------------------------------------------------------


def leaves(*shapes, dtype=BF16):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def bottleneck(layer):
    """(what torch computes, of which tensors)"""
    m, h, d = layer

    def run(x, down, down_bias, up, up_bias, residual):
        hidden = functional.linear(x, down, down_bias).relu()
        return functional.linear(hidden, up, up_bias) + residual

    return run, leaves((m, h), (d, h), (d,), (h, d), (h,), (m, h))


def fusion(layer):
    m, n, h = layer

    def run(query, residual, *rest):
        return projected(query, rest[:n], rest[n:], residual)

    return run, leaves(*[(m, h)] * (n + 2), (h, h), (h,), (h, h), (h,), (h, h))


def prefix(layer):
    batch, heads, heads_kv, tokens, dim, count, wide = layer
    mask = causal_mask(batch, tokens, count)
    kinds = [(batch, tokens, h, dim) for h in (heads, heads_kv, heads_kv)]
    tensors = [t.detach().transpose(1, 2).requires_grad_() for t in leaves(*kinds)]
    tensors += leaves((count, 2 * heads_kv * dim), dtype=BF16 if wide == 2 else torch.float32)
    return lambda *tensors: joined_sdpa(*tensors, mask), tensors


@pytest.mark.parametrize(
    ("layer", "make"),
    [
        (Bottleneck(64, 32, 8), bottleneck),
        (Fusion(64, 4, 32), fusion),
        (Fusion(48, 3, 64), fusion),
        (TWO, prefix),
        (TWO._replace(wide=4), prefix),
        (ONE, prefix),
    ],
)
def test_ledgers_are_what_torch_executes(layer, make):
    """Operator for operator: as many, and the bytes of each but for its scalars."""
    (run, tensors), works = make(layer), []
    dy = torch.empty_like(run(*tensors))
    with recorder._Operators(works):
        torch.autograd.grad(run(*tensors), tensors, dy)
    known = layer.eager()
    assert sorted(w.memory for w in works) == pytest.approx(
        sorted(o.bytes for o in known), rel=0, abs=8
    )
    if make is prefix:  # of torch's attention no flops are noted
        return
    flops = [o.flops for o in known if o.flops]
    assert sorted(w.tensor_flops for w in works if w.tensor_flops) == sorted(flops)


def test_ledgers_by_hand():
    """At the issues' sizes, by other means: t is a tensor of activations, MB."""
    x = 2 * 4096 * 768
    layer = Bottleneck(4096, 768, 48)
    moved = sum(o.bytes for o in layer.eager())
    # x twice, y thrice and the sum's; dY four times, x, dX; z and the weights are small.
    assert moved / x == pytest.approx(10, rel=0.1)
    assert sum(o.bytes for o in layer.least()) / x == pytest.approx(6, rel=0.05)
    assert sum(o.flops for o in layer.eager()) == 6 * 2 * 4096 * 768 * 48
    t = 2 * 2048 * 768
    for n in (3, 8, 16):
        layer = Fusion(2048, n, 768)
        least = sum(o.bytes for o in layer.least()) - 9 * 2 * 768**2
        assert least == (6 + 3 * n) * t
        # The key and the value of every adapter projected, and both in the gradient twice.
        flops = sum(o.flops for o in layer.eager())
        assert flops == (3 * (1 + 2 * n)) * 2 * 2048 * 768**2 + 6 * 2 * 2048 * n * 768
    layer = Prefix(8, 9, 3, 512, 64, 32, 4)
    query, keys, lse = 2 * 8 * 512 * 9 * 64, 2 * 8 * 512 * 3 * 64, 4 * 8 * 512 * 9
    assert sum(o.bytes for o in layer.base()) == 6 * query + 6 * keys + 2 * lse
    flops = 2 * 8 * 9 * 512 * 512 * 64  # half of two products
    assert sum(o.flops for o in layer.base()) == 3.5 * flops
    pairs = 4 * 8 * 9 * 512 * 32 * 64
    assert sum(o.flops for o in layer.least()) == 3.5 * (flops + pairs)
    # All cells of the mask are computed.
    assert sum(o.flops for o in layer.eager()) == 3.5 * (2 * flops + pairs)


# --- kernels: what they are given, each once ------------------------------------------------------


def by_kernel(bounds):
    return {b.name: b.memory for b in bounds if not b.name.startswith("torch")}


@pytest.mark.usefixtures("_simulator")
def test_bytes_of_the_bottleneck():
    m, h, d = 256, 128, 16
    found = by_kernel(bound_adapters.bottleneck(Bottleneck(m, h, d), A100))
    rows, narrow, weight = 2 * m * h, 2 * m * d, 2 * d * h
    biases = 2 * (d + h)
    assert found["bottleneck"] == 3 * rows + narrow + 2 * weight + biases
    # Eight ranges of 32 rows; two parts of H, each with f(z) and dZ of its own; shares in blocks.
    share = 4 * (2 * 2048 + 512 + 512)
    assert found["backward"] == 3 * rows + narrow + 2 * weight + 2 * 2 * narrow + 8 * share
    assert found["sum_shares"] == 8 * share + 2 * weight + 2 * biases


@pytest.mark.usefixtures("_simulator")
def test_bytes_of_the_fusion():
    m, n, h = 64, 3, 128
    bounds = bound_adapters.fusion(Fusion(m, n, h), A100)
    found = by_kernel(bounds)
    t, p = 2 * m * h, 4 * m * n
    assert found == {
        "attend": (n + 2) * t + p,
        "attend_backward": (2 * n + 3) * t + p + 4 * m,
    }
    products = [b for b in bounds if b.seconds["tensor cores"]]
    flops = sum(b.seconds["tensor cores"] for b in products) * A100.tensor
    # Two thin products rather than W_q^T W_k, as m < h / 2; three each way, and biases' scores.
    assert flops == pytest.approx(3 * 3 * 2 * m * h * h, rel=0.02)


@pytest.mark.usefixtures("_simulator")
@pytest.mark.parametrize("wide", [2, 4])
def test_bytes_of_the_prefix(wide):
    """out, lse and dquery are written over what they were: twice."""
    layer = Prefix(2, 4, 2, 64, 64, 32, wide)
    base, first, base_backward, rest, sums = bound_adapters.prefix(layer, A100)
    query, lse = 2 * 2 * 4 * 64 * 64, 4 * 2 * 4 * 64
    keys = 2 * 32 * 2 * 64  # elements
    ranges = 1  # of four blocks of 64 rows
    assert first.memory == 3 * query + 2 * lse + wide * keys
    assert rest.memory == 5 * query + lse + wide * keys + 4 * ranges * keys
    assert sums.memory == 4 * ranges * keys + wide * keys
    assert (base.memory, base_backward.memory) == tuple(o.bytes for o in layer.base())


@pytest.mark.usefixtures("_simulator")
def test_what_is_written_first_counts_once():
    """A dquery that is not given is not read, whatever the launcher hands over for it."""
    from fusetune.ops import _prefix_attention
    from fusetune.reference.prefix_attention import Options

    run = _prefix_attention.OP_BACKWARD
    query, keys, lse = (
        torch.zeros(1, 1, 64, 16, dtype=BF16),
        torch.zeros(1, 16, 1, 16).to(BF16),
        256,
    )
    tensors = (query, query.clone(), keys, keys.clone(), query.clone(), torch.zeros(1, 1, 64))
    found = []
    for dquery, needed in ((None, True), (query.clone(), True), (None, False)):
        with recorder.recorded(A100) as works:
            options = Options(scale=0.25)
            run.run("cpu", BF16, BF16)(*tensors, options, dquery, needed, True)
        found.append(works[0].memory)
    known = 3 * query.nbytes + lse + 2 * keys.nbytes + 4 * 2 * keys.numel()
    assert found == [known + query.nbytes, known + 2 * query.nbytes, known]


@pytest.mark.usefixtures("_simulator")
@pytest.mark.parametrize(
    "layer",
    [Bottleneck(512, 512, 20), Fusion(48, 3, 128), Prefix(2, 6, 3, 160, 32, 20, 2)],
    ids=str,
)
def test_sampled_launches_stand_for_all(layer, monkeypatch):
    noted = []
    monkeypatch.setattr(bound_adapters, "bound", lambda work, card: noted.append(work))
    for sample in (2, 10**6):
        monkeypatch.setattr(recorder, "SAMPLE", sample)
        bound_adapters.launches(layer, A100)
    half = len(noted) // 2
    for few, everything in zip(noted[:half], noted[half:], strict=True):
        assert (few.name, few.memory) == (everything.name, everything.memory)
        assert few.tensor_flops == everything.tensor_flops
        for count in ("sectors", "wavefronts", "instructions"):
            assert getattr(few, count) == pytest.approx(
                getattr(everything, count), rel=0.08, abs=64
            )


@pytest.mark.usefixtures("_simulator")
def test_no_kernel_on_the_t4_is_said():
    layers = [Bottleneck(64, 64, 16), Prefix(1, 2, 1, 16, 16, 16, 2)]
    found = bound_adapters.passes(T4, layers)
    assert [*found] == [layers[1].name]


# --- what is kept ---------------------------------------------------------------------------------

STORED = json.loads(readme.PREDICTED.read_text())


def test_every_layer_is_predicted_for_every_card():
    assert STORED["predicted"]
    for card in CARDS:
        kept = STORED["cards"][card.name]["passes"]
        for layer in LAYERS:
            if card.arch < 80 and isinstance(layer, Bottleneck):
                assert layer.name not in kept
                continue
            one = kept[layer.name]
            others = (ledger(of, card) for of in (layer.eager(), layer.least()))
            for name, known in zip(bound_adapters.OTHERS, others, strict=True):
                assert one["others"][name] == pytest.approx(known)
            # No launch is left out, and none moves less than it must.
            moved = sum(launch["bytes"] for launch in one["launches"])
            assert moved > 0.95 * one["others"]["the least"]["bytes"]


def test_the_table_says_that_it_is_predicted():
    text = bound_adapters.table(STORED)
    lines = text.splitlines()
    assert lines[0].startswith("*predicted*")
    assert len(lines) == 2 + len(CARDS) * len(LAYERS)
    missing = [line for line in lines if "no kernel" in line]
    assert len(missing) == 2
    assert all(line.startswith("T4") for line in missing)
    shown = bound_adapters.markdown(STORED)
    assert shown.count("MB, ") == 3 * 2 * len(LAYERS)
    assert readme.section("predicted_adapters") == shown + "\n"
