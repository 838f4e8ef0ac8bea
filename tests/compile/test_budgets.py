"""The GPU kernels keep to tests/compile/budgets.json; and the gate shuts.

What they need is read from machine code of every architecture, what they move is counted by the
simulator: no GPU. After a change that is meant: `python -m benchmarks.budgets --update`, and the
difference of the file is reviewed with the code.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton", reason="compiles Triton kernels, and reads cubins by Triton's tools")

from benchmarks import budgets, budgets_found
from benchmarks.gpu_kernels import CUDA, TRITON
from fusetune.sim import Counts, Launch
from fusetune.sim.cuda_build import CannotBuild
from fusetune.sim.ptx.trace import Trace

RECORDED = json.loads(budgets.RECORD.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", budgets_found.PARTS)
def test_kernels_keep_to_their_budgets(part):
    try:
        here = budgets_found.toolchain()
    except CannotBuild as error:
        pytest.skip(str(error))
    if here != RECORDED["toolchain"]:
        pytest.skip(f"recorded with {RECORDED['toolchain']}, here is {here}")
    try:
        found = budgets_found.PARTS[part]()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    broken = budgets.broken(budgets.compare(RECORDED[part], found))
    assert not broken, "\n" + budgets.table(broken)


def test_every_kernel_is_recorded_for_every_architecture():
    archs = (75, 80, 86, 89, 90, 100, 120)
    triton = {f"sm_{arch}, {c.name}" for c in TRITON for arch in c.archs(archs)}
    assert set(RECORDED["compiled-triton"]) == triton
    labels = {key.split(", ", 1)[1] for key in RECORDED["compiled-cuda"]}
    halves = {label for label in labels if "bf16" in label}
    cuda = {f"sm_{arch}, {k}" for k in labels for arch in (80, 86, 89, 90, 100, 120)}
    assert set(RECORDED["compiled-cuda"]) == cuda | {f"sm_75, {k}" for k in labels - halves}
    assert len(labels) >= 19
    executed = {f"sm_{arch}, {c.name}" for c in TRITON for arch in c.archs((75, 80))}
    assert set(RECORDED["executed-triton"]) == executed
    executed = {f"sm_{arch}, {c.name}" for c in CUDA for arch in (75, 80)}
    assert set(RECORDED["executed-cuda"]) == executed


COMPILED = {"registers": 100, "shared": 1000}
CLEAN = {"registers": 100, "shared": 1000, "stack": 0, "spills": 0, "missing": []}
COUNTED = {"load sectors": 10, "store sectors": 5, "shared wavefronts": 0, "mma flops": 4096}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, None),
        ({"registers": 108}, None),
        ({"registers": 92}, None),
        ({"shared": 99 * 1024}, None),
        ({"registers": 109}, "further than 8 from the record"),
        ({"registers": 91}, "further than 8 from the record"),
        ({"shared": 100 * 1024}, "more than the device's 101376"),
        ({"stack": 8}, "must be 0"),
        ({"spills": 1}, "must be 0"),
        ({"missing": ["tensor cores"]}, "no tensor cores"),
    ],
)
def test_what_a_compiled_kernel_may_not_do(change, verdict):
    rows = budgets.compare({"sm_86, k": COMPILED}, {"sm_86, k": {**CLEAN, **change}})
    assert len(rows) == len(CLEAN)
    assert [row.verdict for row in budgets.broken(rows)] == ([verdict] if verdict else [])


@pytest.mark.parametrize("what", COUNTED)
@pytest.mark.parametrize("by", [1, -1])
def test_counts_are_exact(what, by):
    found = {"sm_80, k": {**COUNTED, what: COUNTED[what] + by}}
    (row,) = budgets.broken(budgets.compare({"sm_80, k": COUNTED}, found))
    assert (row.what, row.recorded, row.found) == (what, COUNTED[what], COUNTED[what] + by)
    assert row.verdict == ("more than recorded" if by > 0 else "less: update the record")


def test_memory_may_move_what_is_compulsory_and_little_more():
    """64 sectors are loaded twice, and one is stored."""
    case = replace(TRITON[0], compulsory=lambda sizes: 32 * 65, within=1.05)
    found = budgets_found.multiples(case, passes(2))
    assert found == {
        "executed": round(129 / 65, 3),
        "memory, L2 of 6 MiB": 1.0,
        "memory, L2 of 40 MiB": 1.0,
        "beyond": "",
    }
    assert not budgets.broken(budgets.compare({"sm_80, k": found}, {"sm_80, k": found}))
    assert budgets_found.multiples(replace(case, compulsory=None), passes(2)) == {}
    found = budgets_found.multiples(replace(case, within=0.99), passes(1))
    (row,) = budgets.broken(budgets.compare({"sm_80, k": found}, {"sm_80, k": found}))
    assert row.verdict == "memory moves more than 0.99 times the least"


def passes(count):
    """A launch that loads 64 sectors `count` times and stores another."""
    trace = Trace()
    for _ in range(count):
        trace.note(32 * np.arange(64), None, stored=False)
    trace.note(np.full(32, 32 * 64), None, stored=True)
    counts = Counts(global_load_sectors=64 * count, global_store_sectors=1)
    return Launch("k", (1, 1, 1), (64, 1, 1), counts, trace)


def test_kernels_that_appear_or_vanish_are_told():
    rows = budgets.compare({"sm_80, old": COUNTED}, {"sm_80, new": COUNTED})
    assert [(row.kernel, row.verdict) for row in rows] == [
        ("sm_80, new", "not recorded"),
        ("sm_80, old", "recorded, but not found"),
    ]
    assert "sm_80, old" in budgets.table(rows)


def test_a_record_is_read_back_as_it_was():
    counted = {**COUNTED, "beyond": ""}
    text = budgets.record({"part": {"sm_80, b": CLEAN, "sm_80, a": counted}})
    stored = json.loads(text)
    assert stored["part"] == {"sm_80, a": COUNTED, "sm_80, b": COMPILED}
    assert stored["toolchain"] == budgets_found.toolchain()


def test_required_instructions_are_looked_for():
    from collections import Counter

    from fusetune.sim.compile import Usage

    scalar = Usage(32, 0, 0, opcodes=Counter({"LDG.E": 4, "FFMA": 8}))
    wide = Usage(32, 0, 0, opcodes=Counter({"LDG.E.128.CONSTANT": 4, "HMMA.16816.F32.BF16": 8}))
    needs = ("tensor cores", "wide loads", "asynchronous copies")
    assert budgets_found.resources(scalar, 80, needs)["missing"] == list(needs)
    assert budgets_found.resources(wide, 80, needs)["missing"] == ["asynchronous copies"]
    assert budgets_found.resources(wide, 75, needs)["missing"] == []  # sm_75 has none


def test_names_of_cuda_kernels():
    tile = "_ZN8fusetune16linear_4bit_tileI13__nv_bfloat16Li4EEEvPKT_liPKhPKfS6_S4_"
    assert budgets_found.demangled(tile) == (
        "linear_4bit_tile",
        "linear_4bit_tile<bf16, 4>",
        "bf16",
    )
    plain = "_ZN8fusetune16linear_4bit_fp32EPKfliPKhS1_S1_"
    assert budgets_found.demangled(plain) == ("linear_4bit_fp32", "linear_4bit_fp32", "fp32")
    with pytest.raises(ValueError, match="say what the kernel"):
        budgets_found.demangled("_ZN8fusetune9somethingEPKf")


def test_a_worse_tile_is_caught(monkeypatch):
    """Tiles of half the rows read W twice as often."""
    from fusetune._triton import linear

    name, smaller = "linear with tail, few rows", linear.Tiles(16, 64, 64, 4, 3)
    recorded = {f"sm_80, {name}": RECORDED["executed-triton"][f"sm_80, {name}"]}
    assert not budgets.broken(budgets.compare(recorded, budgets_found._execute("triton", name, 80)))
    monkeypatch.setattr(linear, "_SMALL", smaller)
    broken = budgets.broken(budgets.compare(recorded, budgets_found._execute("triton", name, 80)))
    assert ("load sectors", "more than recorded") in {(row.what, row.verdict) for row in broken}
