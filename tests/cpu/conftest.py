"""Shared by the tests of the native kernels."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def run_python():
    """Runs code in a fresh interpreter with these environment variables; gives what it printed."""

    def run(code: str, **env: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, **env}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run
