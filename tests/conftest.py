"""What every test runs under: fixed seeds, memory that shows what was not written, backends."""

import os
import sys
import types

# Threads that wait sleep instead of spinning: small operators wait longer than they compute, and
# what spins takes a core from the tests of another process. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from backends import HOST, forced

# Triton is about to change its default: a multiplication and an addition may become one FMA.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Parameters that are drawn where test files are read, and the tests' names with them, are the same
# in every process: they share the tests by name.
torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Marks what runs on a card, so that `-m gpu` selects it. Slow tests come first: of several
    processes none is left with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") in ("triton", "cuda") or parameters.get("arch") == "card":
            item.add_marker(pytest.mark.gpu)


def pytest_make_parametrize_id(val):
    """Functions by their names, not by addresses, which differ between the processes that test."""
    return val.__name__ if isinstance(val, types.FunctionType) else None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """torch.empty called from fusetune gives NaN, or 0xAB bytes: what is left unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("fusetune") and tensor.device.type != "meta":
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0xAB)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=HOST)
def backend(request):
    """Runs the test once on each backend that any machine has, forced: no silent fallback.

    `parametrize("backend", [...], indirect=True)` names others, see backends.py.
    """
    with forced(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler():
    """For tests that compile: what earlier ones compiled counts against a limit."""
    torch.compiler.reset()
