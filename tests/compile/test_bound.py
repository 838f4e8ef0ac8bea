"""The arithmetic of the predicted bounds, by hand; and that they stand on what is executed."""

import pytest
import torch

from benchmarks import bound, ledgers
from benchmarks.cards import CARDS, Card


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: that memory is filled would be counted."""


CARD = Card(
    "made up",
    80,
    torch.bfloat16,
    memory=100e9,
    tensor=2e12,
    fp32=1e12,
    multiprocessors=10,
    clock=1e9,
    source="",
)


def work(**numbers):
    pytest.importorskip("triton")
    from benchmarks.recorder import Work

    return Work("k", numbers.pop("memory", 0), **numbers)


@pytest.mark.parametrize(
    ("numbers", "resource", "microseconds"),
    [
        ({"memory": 10**6}, "memory", 10.0),  # 1 MB at 100 GB/s
        ({"memory": 10**6, "tensor_flops": 60e6}, "tensor cores", 30.0),
        ({"fp32_flops": 3e6}, "fp32 units", 3.0),
        ({"wavefronts": 50e3}, "shared memory", 5.0),  # ten multiprocessors, one a clock
        ({"sectors": 80e3}, "L1", 2.0),  # four a clock
        ({"shuffles": 70e3}, "shuffles", 7.0),
        ({"special": 160e3}, "special functions", 1.0),  # sixteen a clock
        ({"instructions": 400e3}, "issue slots", 10.0),  # four a clock
    ],
)
def test_each_resource(numbers, resource, microseconds):
    found = bound.bound(work(**numbers), CARD)
    assert found.resource == resource
    assert found.time == pytest.approx(1e-6 * microseconds)


def test_matrix_instructions_of_another_architecture_are_left_out():
    """1 MB: 10 us. 2e6 instructions are 50 us; without the 1.8e6 for products, 5 us."""
    numbers = {"memory": 10**6, "tensor_flops": 1.0, "wavefronts": 600e3}
    numbers |= {"instructions": 2e6, "matrix_instructions": 1.8e6}
    for arch, microseconds in ((80, 60), (90, 10), (100, 10), (120, 60)):
        card = CARD._replace(arch=arch)
        found = bound.bound(work(**numbers, anywhere=False), card)
        assert found.time == pytest.approx(1e-6 * microseconds)
        assert bound.bound(work(**numbers), card).time == pytest.approx(60e-6)
    hopper = bound.bound(work(**numbers, anywhere=False), CARD._replace(arch=90))
    assert hopper.seconds["issue slots"] == pytest.approx(5e-6)


def test_a_pass_is_the_sum_of_its_launches():
    launches = [bound.bound(work(memory=m), CARD) for m in (10**6, 3 * 10**6)]
    moved, took = bound.total(launches)
    assert (moved, took) == (4 * 10**6, pytest.approx(40e-6))


def test_ledgers_by_hand():
    """One 4096 x 4096 layer, 4096 tokens, r = 16: t is a 16-bit matrix of that size."""
    layer, t = ledgers.Layer(4096, 4096, 4096, 16), 2 * 4096 * 4096
    decoding = sum(o.bytes for o in ledgers.dequantise(layer))
    assert decoding == pytest.approx(46.4e6, rel=2e-3)

    def moved(scheme, dropout=False):
        return sum(o.bytes for o in ledgers.SCHEMES[scheme](layer, dropout))

    thin = 16 * 2 * 4096  # s, and each factor of the adapter
    # Two matmuls (6 t), clone 2, s 1, s B 1, scaling 2, sum 3; 2, 1, 1, 1, 1, 3 in the gradient.
    assert moved("PEFT + bitsandbytes") == 24 * t + 2 * decoding + 12 * thin
    # Two matmuls, s 1, addition in place 2; five skinny products, addition in place 2.
    assert moved("Unsloth") == 16 * t + 2 * decoding + 16 * thin
    assert moved("the least") == 6 * t + 2 * layer.packed + 11 * thin
    # A result, a mask of a byte an element, and the same in the gradient.
    assert moved("PEFT + bitsandbytes", True) - moved("PEFT + bitsandbytes") == 5 * t
    assert moved("Unsloth", True) == moved("PEFT + bitsandbytes", True)
    flops = sum(o.flops for o in ledgers.peft(layer, False))
    assert flops == 2 * 2 * 4096**3 + 6 * 2 * 16 * 4096**2


def test_the_time_of_a_ledger():
    """1 MB at 100 GB/s; 60 Mflop at 2 Tflop/s, which take longer than its 2 MB."""
    operators = [ledgers.Operator("a", 10**6), ledgers.Operator("b", 2 * 10**6, 60 * 10**6)]
    found = bound.ledger(operators, CARD)
    assert found == {"bytes": 3 * 10**6, "seconds": pytest.approx(40e-6)}


def test_cards_follow_from_their_multiprocessors():
    """fp32 peak: 128 FMAs a clock of each, 64 on sm_75 and sm_80."""
    for card in CARDS:
        lanes = 64 if card.arch in (75, 80) else 128
        assert card.fp32 == pytest.approx(card.per_clock(2 * lanes), rel=0.02), card.name


@pytest.fixture(scope="module")
def a100():
    pytest.importorskip("triton")
    from fusetune.sim.cuda_build import CannotBuild, find_nvcc

    try:
        find_nvcc()
    except CannotBuild as error:
        pytest.skip(str(error))
    return next(card for card in CARDS if card.name == "A100")


def test_sampled_launches_stand_for_all(a100, monkeypatch):
    """At a size where every CTA can be executed, a sample says the same, but for look-ups: codes
    differ from block to block."""
    from benchmarks import recorder

    def works(sample):
        monkeypatch.setattr(recorder, "SAMPLE", sample)
        noted = []
        monkeypatch.setattr(bound, "bound", lambda work, card: noted.append(work))
        bound.step(a100, 512, size=512)
        return noted

    few, all_of_them = works(2), works(10**6)
    assert [w.name for w in few] == [w.name for w in all_of_them]
    assert {"shrink", "ds_db", "da", "linear"} <= {w.name for w in few}
    for a, b in zip(few, all_of_them, strict=True):
        assert (a.memory, a.tensor_flops, a.instructions) == (
            b.memory,
            b.tensor_flops,
            b.instructions,
        )
        assert a.sectors == b.sectors
        assert a.wavefronts == pytest.approx(b.wavefronts, rel=0.03)


def test_a_layer_on_the_a100(a100):
    """What is counted at full size: less than 400 MB, and the tensor cores' share."""
    moved, took = bound.total(bound.step(a100, 4096))
    layer = ledgers.Layer(4096, 4096, 4096, 16)
    assert moved <= 400e6
    assert took >= 2 * layer.base / a100.tensor
    for scheme in (ledgers.peft, ledgers.unsloth):
        assert moved < bound.ledger(scheme(layer, False), a100)["bytes"]
    with_dropout, _ = bound.total(bound.step(a100, 4096, 0.1))
    assert with_dropout - moved < 1e3  # seeds


@pytest.mark.parametrize("name", ["T4", "B200"])
def test_other_cards_move_no_more(a100, name):
    """The T4: W is never written out. The B200: as on the A100."""
    card = next(card for card in CARDS if card.name == name)
    moved, _ = bound.total(bound.step(card, 4096))
    assert moved <= (280e6 if name == "T4" else 400e6)
    with_dropout, _ = bound.total(bound.step(card, 4096, 0.1))
    assert with_dropout - moved < 6e6  # other tiles, and so other shares of sums; of s, dA and dB


def test_vendor_matmuls_are_noted_and_not_computed(a100):
    """Torch's matmul, and the tail added in place."""
    b200 = next(card for card in CARDS if card.name == "B200")
    with bound.use_way("addmm"):
        launches = bound.step(b200, 512, size=512)
    names = [launch.name for launch in launches]
    assert names.count("torch mm") == 2
    assert names.count("torch addmm_") == 2
    products = [launch for launch in launches if launch.name == "torch mm"]
    assert {p.memory for p in products} == {2 * 3 * 512 * 512}
