"""What every test runs under: fixed seeds, memory that shows what was not written, backends."""

import sys
from contextlib import nullcontext

import pytest
import torch
from tolerance import one_thread

from fusetune import ops


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


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test once on each backend of this machine, forced: no silent fallback."""
    threads = one_thread() if request.param == "reference" else nullcontext()
    with threads, ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler():
    """For tests that compile: what earlier ones compiled counts against a limit."""
    torch.compiler.reset()
