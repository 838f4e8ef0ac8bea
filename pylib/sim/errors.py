"""What a simulated launch can fail with. The message names the kernel, its line, CTA and thread."""


class SimError(Exception):
    """The kernel did something that is wrong on a GPU, or that the simulator does not know."""


class UnknownInstruction(SimError):
    """An instruction, or a modifier of one, that the simulator does not execute."""


class OutOfBounds(SimError):
    """An access outside the memory that the launch was given, or a misaligned one."""


class Race(SimError):
    """Two warps touch the same shared memory with no barrier between, and one of them writes."""


class Uninitialised(SimError):
    """A value is used that nothing has written."""


class Deadlock(SimError):
    """Threads wait for a barrier that cannot open."""


class Divergence(SimError):
    """A warp-wide instruction names threads of the warp that do not execute it."""
