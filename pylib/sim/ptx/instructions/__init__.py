"""The instructions, by kind. Importing this package registers all of them."""

from fusetune.sim.ptx.instructions import (  # noqa: F401
    atomic,
    bits,
    compare,
    control,
    convert,
    copy_async,
    floating,
    integer,
    load_store,
    matrix,
    move,
    warp,
)
from fusetune.sim.ptx.instructions.registry import make

__all__ = ["make"]
