"""The PTX interpreter: `Program(text).launch(kernel, grid, block, args)`."""

from fusetune.sim.ptx.program import Program

__all__ = ["Program"]
