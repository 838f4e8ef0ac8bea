"""What setup.py needs in its environment to build for aarch64 by a cross compiler."""

import os
import shutil
import sys

import pytest

COMPILERS = {"CC": "aarch64-linux-gnu-gcc", "CXX": "aarch64-linux-gnu-g++"}
SUFFIX = f".cpython-{sys.version_info.major}{sys.version_info.minor}-aarch64-linux-gnu.so"


def environment():
    """Skips the test where the compilers are not installed."""
    for compiler in COMPILERS.values():
        if not shutil.which(compiler):
            pytest.skip(f"{compiler} is not installed")
    target = {
        "FUSETUNE_TARGET_MACHINE": "aarch64",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": SUFFIX,
    }
    return {**os.environ, **COMPILERS, **target}
