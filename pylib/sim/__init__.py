"""Runs the GPU kernels without a GPU: interprets the PTX that Triton and nvcc emit.

    with fusetune.sim.triton_sim(arch=80) as run:
        y = fusetune.ops.lora_linear(x, ...)     # tensors on the CPU
    run.launches[0].counts.global_load_sectors

Out-of-bounds and misaligned accesses, shared-memory races, reads of what was never written and
barriers that cannot open raise a `SimError`, and so does every instruction or modifier that is not
known; memory traffic is counted exactly, and `simulated_driver(traced=True)` keeps it in order, for
what of it a cache lets through.

Not modelled: time; wgmma, tcgen05, TMA and mbarrier (kernels that use them on sm_90 and sm_100 run
here in their sm_80 build); races between CTAs, and between the threads of one warp that follow one
another; the order in which tensor cores add. CTAs run in lockstep: one that spins until another
has got on never ends.
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
