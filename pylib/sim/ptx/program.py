"""A loaded PTX module, ready to launch its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusetune.sim.counts import Counts
from fusetune.sim.errors import OutOfBounds, Race, SimError, UnknownInstruction
from fusetune.sim.ptx._draft import PTXError, Sim

_KINDS = {
    "race": Race,
    "out-of-bounds": OutOfBounds,
    "misaligned": OutOfBounds,
    "unsupported": UnknownInstruction,
    "unknown": UnknownInstruction,
}


class Program:
    """A PTX module."""

    def __init__(self, text: str) -> None:
        self._sim = Sim(text)

    def parameters(self, kernel: str) -> list[int]:
        """Sizes in bytes of a kernel's parameters."""
        self._sim._parse(kernel)
        return [size for _, _, size in self._sim.params]

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Any],
        smem: int = 0,
        *,
        check: bool = True,
    ) -> Counts:
        """Runs a kernel over its grid. Tensors (on the CPU) are passed by address."""
        try:
            racecheck = "raise" if check else None
            s = self._sim.launch(kernel, grid, block, list(args), smem, racecheck=racecheck)
        except PTXError as error:
            kind = next((k for w, k in _KINDS.items() if w in str(error)), SimError)
            raise kind(f"{kernel}: {error}") from error
        counts = Counts()
        counts.instructions.update({k[5:]: v for k, v in s.items() if k.startswith("inst.")})
        counts.global_load_sectors = s["gl.ld.sectors"]
        counts.global_load_bytes = s["gl.ld.bytes"]
        counts.global_store_sectors = s["gl.st.sectors"]
        counts.global_store_bytes = s["gl.st.bytes"]
        counts.shared_load_wavefronts = s["sm.wavefronts"]
        counts.mma_flops = s["flop.mma"]
        return counts
