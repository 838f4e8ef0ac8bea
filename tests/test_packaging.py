"""`pip install .`: the wheel holds all of the package, native module included."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import aarch64
import pytest
from one_at_a_time import alone

ROOT = Path(__file__).parent.parent
PROGRAM = """
import torch, fusetune
from fusetune import _native
assert fusetune.__file__.startswith({folder!r}), fusetune.__file__
assert _native.C is not None, _native.reason
with fusetune.ops.use_backend("cpu"):
    w = fusetune.ops.quantize_4bit(torch.randn(64, 128), double_quant=True)
    y = fusetune.ops.linear_4bit(torch.randn(3, 128), w)
assert y.shape == (3, 64)
import fusetune.cli, fusetune.demo, fusetune.integrations.peft
print(*_native.C.available_isas())
"""


def build_wheel(target, environment):
    """setuptools lays every wheel out in the same folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    with alone(ROOT / "build"):
        subprocess.run([*command, "-w", str(target), str(ROOT)], check=True, env=environment)


def test_wheel_works_elsewhere(tmp_path):
    build_wheel(tmp_path, os.environ)
    (wheel,) = tmp_path.glob("fusetune-*.whl")
    folder = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        names = archive.namelist()
    assert "fusetune/py.typed" in names
    assert not any(n.startswith(("tests/", "csrc/", "benchmarks/", "pylib/")) for n in names)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(folder))],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "scalar" in result.stdout


@pytest.mark.slow
def test_wheel_for_another_machine(tmp_path):
    """Built by a cross compiler: the wheel and its native module are for aarch64."""
    build_wheel(tmp_path, aarch64.environment())
    (wheel,) = tmp_path.glob("fusetune-*-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        assert modules == [f"fusetune/_C{aarch64.SUFFIX}"]
        header = archive.read(modules[0])[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert int.from_bytes(header[18:], "little") == 183  # EM_AARCH64
