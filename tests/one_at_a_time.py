"""Tests of several processes that build in the same folder wait for each other."""

import fcntl
from contextlib import contextmanager


@contextmanager
def alone(folder):
    """Holds `folder`, made if need be, for one process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
