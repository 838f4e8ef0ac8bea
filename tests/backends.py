"""The backends that tests run on, forced, and what each of them needs."""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from tolerance import one_thread

from fusetune import ops

HOST = ("reference", "cpu")
# Kernels for GPUs: their PTX interpreted on the CPU, and on a card.
TRITON = ("triton-sim", "triton")
CUDA = ("cuda-sim", "cuda")
GPU = ("triton-sim", "cuda-sim", "triton", "cuda")


@contextmanager
def forced(name):
    """Runs a test on one backend: no silent fallback. Skips it, with the reason, where it cannot.

    On a card new tensors are made there.
    """
    with ExitStack() as stack:
        if name in HOST:
            stack.enter_context(one_thread() if name == "reference" else nullcontext())
            stack.enter_context(ops.use_backend(name))
        elif name.endswith("-sim"):
            stack.enter_context(simulated(name))
        else:
            if not torch.cuda.is_available():
                pytest.skip("no GPU here")
            stack.enter_context(torch.device("cuda"))
            stack.enter_context(ops.use_backend(name))
        yield


@contextmanager
def simulated(name, arch=80):
    """triton-sim or cuda-sim. Gives what the simulation has launched."""
    if name == "triton-sim":
        pytest.importorskip("triton", reason="Triton is not installed")
    from fusetune import sim
    from fusetune.sim.cuda_build import CannotBuild, find_nvcc

    if name == "cuda-sim":
        try:
            find_nvcc()
        except CannotBuild as error:
            pytest.skip(str(error))
    with (sim.triton_sim if name == "triton-sim" else sim.cuda_sim)(arch) as run:
        yield run
