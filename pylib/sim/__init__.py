"""Runs the GPU kernels without a GPU: interprets the PTX that Triton and nvcc emit.

    with fusetune.sim.triton_sim(arch=80) as run:
        y = fusetune.ops.lora_linear(x, ...)     # tensors on the CPU
    run.launches[0].counts.global_load_sectors

Out-of-bounds and misaligned accesses, shared-memory races, reads of what was never written and
barriers that cannot open raise a `SimError`; memory traffic is counted exactly. Time is not
modelled.
"""

from fusetune.sim.counts import Counts
from fusetune.sim.cuda_runtime import cuda_sim
from fusetune.sim.errors import (
    Deadlock,
    Divergence,
    OutOfBounds,
    Race,
    SimError,
    Uninitialised,
    UnknownInstruction,
)
from fusetune.sim.run import Launch, Run
from fusetune.sim.triton_driver import triton_sim

__all__ = [
    "Counts",
    "Deadlock",
    "Divergence",
    "Launch",
    "OutOfBounds",
    "Race",
    "Run",
    "SimError",
    "Uninitialised",
    "UnknownInstruction",
    "cuda_sim",
    "triton_sim",
]
