"""What a launch did: exact counts over all its CTAs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Executed work of a launch.

    A sector is 32 bytes of global memory, counted once per warp instruction that touches it. A
    wavefront is one pass through the 32 banks of shared memory: 1 per request without conflicts
    (2 or 4 where a lane takes 8 or 16 bytes).
    """

    instructions: Counter[str] = field(default_factory=Counter)  # warp instructions by opcode
    global_load_requests: int = 0
    global_load_sectors: int = 0
    global_load_bytes: int = 0  # what lanes asked for
    global_store_requests: int = 0
    global_store_sectors: int = 0
    global_store_bytes: int = 0
    shared_load_requests: int = 0
    shared_load_wavefronts: int = 0
    shared_store_requests: int = 0
    shared_store_wavefronts: int = 0
    mma_flops: int = 0
    barriers: int = 0  # CTA-wide ones passed, summed over CTAs

    @property
    def warp_instructions(self) -> int:
        """Instructions issued, each counted once per warp."""
        return sum(self.instructions.values())

    @property
    def global_sectors(self) -> int:
        return self.global_load_sectors + self.global_store_sectors

    @property
    def shared_wavefronts(self) -> int:
        return self.shared_load_wavefronts + self.shared_store_wavefronts

    def add(self, other: Counts) -> None:
        """Adds another launch's counts to these."""
        self.instructions.update(other.instructions)
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_NUMBERS = [name for name in Counts.__dataclass_fields__ if name != "instructions"]
