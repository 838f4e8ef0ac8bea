"""The `fusetune` command and `python -m benchmarks.run`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fusetune import _native, cli, ops

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(_native.C is None, reason="the native module is not built")


def fusetune(*args):
    return CliRunner().invoke(cli.app, args)


def off_by_a_thousandth(op):
    def wrong(*args, **kwargs):
        return op(*args, **kwargs) * 1.001

    return wrong


def test_env_names_versions_and_backends():
    result = fusetune("env")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "linear_4bit" in result.output


@needs_kernels
def test_verify_passes_on_every_instruction_set():
    result = fusetune("verify")
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    assert all(f"ok   {isa}" in result.output for isa in _native.C.available_isas())
    assert ", 0 failed" in result.output


@needs_kernels
def test_verify_fails_when_a_kernel_is_wrong(monkeypatch):
    monkeypatch.setattr(ops, "linear_4bit", off_by_a_thousandth(ops.linear_4bit))
    result = fusetune("verify")
    assert result.exit_code == 1
    failed = [line for line in result.output.splitlines() if line.startswith("FAIL")]
    assert failed
    assert all("linear_4bit" in line for line in failed)


@pytest.mark.parametrize("op", ["linear_4bit", "lora_linear", "quantize_4bit", "dequantize_4bit"])
def test_bench_prints_a_table(op):
    result = fusetune("bench", "--op", op, "--size", "128", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert "| case" in result.output
    assert "bitsandbytes takes" in result.output
    assert "×" in result.output


def test_unknown_op_is_named():
    result = fusetune("bench", "--op", "no_such_op")
    assert result.exit_code != 0
    assert "op: must be one of" in str(result.exception)


def benchmark(*args, **env):
    command = [sys.executable, "-m", "benchmarks.run", *args, "--size", "128", "--seconds", "0.01"]
    options = {"capture_output": True, "text": True, "cwd": ROOT}
    return subprocess.run(command, env={**os.environ, **env}, **options)


def test_benchmarks_write_what_they_print(tmp_path):
    path = tmp_path / "out.json"
    result = benchmark("--op", "linear_4bit", "--short", "--json", str(path))
    assert result.returncode == 0, result.stderr
    stored = json.loads(path.read_text())
    rows = stored["ops"]["linear_4bit"]["rows"]
    assert stored["cpu"] in result.stdout
    assert {row["name"] for row in rows} >= {"forward fp32", "dX fp32"}
    for row in rows:
        assert row["ms"] > 0
        assert row["error"] < 1e-3
        assert set(row["ratio"]) == {"bitsandbytes", "torch dense"}
        assert f"| {row['name']}" in result.stdout


def test_a_wrong_result_is_not_timed(monkeypatch):
    from fusetune.bench import cases_of, measure

    monkeypatch.setattr(ops, "linear_4bit", off_by_a_thousandth(ops.linear_4bit))
    case = next(cases_of("linear_4bit", False, 128, 128))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        measure(case, 0.01)
