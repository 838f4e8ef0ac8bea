"""The `fusetune` command and `python -m benchmarks.run`."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from backends import simulated
from typer.testing import CliRunner

from fusetune import _native, cli, ops, sim
from fusetune.bench import gpu_cases
from fusetune.env import cpu_label
from fusetune.sim import cuda_build

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


def sources(folder):
    return "".join(path.read_text() for path in sorted((ROOT / "kernels" / folder).iterdir()))


KERNELS = {
    "triton-sim": set(re.findall(r"(\w+)\[\(", sources("triton"))),  # _kernel[(grid...)](...)
    "cuda-sim": set(re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", sources("cuda"))),
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that simulations launch during the test."""
    names = set()

    def recording(simulation):
        @contextmanager
        def wrapped(arch=80):
            with simulation(arch) as run:
                yield run
            names.update(launch.kernel for launch in run.launches)

        return wrapped

    for name in ("triton_sim", "cuda_sim"):
        monkeypatch.setattr(sim, name, recording(getattr(sim, name)))
    return names


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton-sim", "cuda-sim"])
def test_verify_runs_every_gpu_kernel_without_a_gpu(backend, launched, monkeypatch):
    """Triton's in one of its dtypes, since a minute goes into each: tests/ops has all of them."""
    with simulated(backend):  # skips the test where it cannot be
        pass
    if backend == "triton-sim":
        monkeypatch.setattr(gpu_cases, "DTYPES", (torch.bfloat16,))
    result = fusetune("verify", "--backend", backend)
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    assert ", 0 failed" in result.output
    for op in ("dequantize_4bit", "linear_4bit", "lora_linear"):
        assert re.search(rf"ok +{backend} +{op} .*bf16", result.output)
    assert len(KERNELS[backend]) >= 6
    missing = [k for k in KERNELS[backend] if not any(k in name for name in launched)]
    assert not missing


@pytest.mark.parametrize("backend", ["triton-sim", "cuda-sim"])
def test_verify_fails_when_a_gpu_kernel_is_wrong(backend, monkeypatch):
    with simulated(backend):
        pass
    monkeypatch.setattr(ops, "dequantize_4bit", off_by_a_thousandth(ops.dequantize_4bit))
    for name in ("triton_cases", "cuda_cases"):
        one = [gpu_cases.dequantize_4bit, (9, 72, torch.float32)]
        monkeypatch.setattr(gpu_cases, name, lambda one=one: iter([one[0](*one[1])]))
    result = fusetune("verify", "--backend", backend)
    assert result.exit_code == 1
    assert f"FAIL {backend}" in result.output
    assert "0 passed, 1 failed" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_verify_says_why_it_cannot_run(name):
    result = fusetune("verify", "--backend", name)
    assert result.exit_code == 2
    assert f"{name} cannot run here: " in result.output
    assert "GPU" in result.output or "Triton" in result.output


def test_verify_says_what_the_simulators_lack(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_build, "find_nvcc", no_nvcc)
    monkeypatch.setattr(cuda_build, "launchers", no_nvcc)
    result = fusetune("verify", "--backend", "cuda-sim")
    assert result.exit_code == 2
    assert "cuda-sim cannot run here: nvcc was not found" in result.output
    monkeypatch.setitem(sys.modules, "triton", None)
    result = fusetune("verify", "--backend", "triton-sim")
    assert result.exit_code == 2
    assert "triton-sim cannot run here: the simulator needs what is not installed" in result.output


def no_nvcc(*_):
    raise cuda_build.CannotBuild("nvcc was not found")


def test_verify_names_an_unknown_backend():
    result = fusetune("verify", "--backend", "gpu")
    assert result.exit_code != 0
    assert "backend must be one of cpu, triton-sim" in str(result.exception)


def test_verify_without_typer():
    command = [sys.executable, "-m", "fusetune.verify", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == (0 if torch.cuda.is_available() else 2), result.stderr


@pytest.mark.parametrize("op", ["linear_4bit", "lora_linear", "quantize_4bit", "dequantize_4bit"])
def test_bench_prints_a_table(op):
    result = fusetune("bench", "--op", op, "--size", "128", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(cpu_label())
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
    assert stored["cpu"] == cpu_label()
    assert f"{cpu_label()}, 2 threads" in result.stdout
    assert {row["name"] for row in rows} >= {"forward fp32", "dX fp32"}
    for row in rows:
        assert row["ms"] > 0
        assert row["error"] < 1e-3
        assert set(row["ratio"]) == {"bitsandbytes", "torch dense"}
        assert f"| {row['name']}" in result.stdout


def test_figures_of_two_machines_do_not_share_a_file(tmp_path):
    path = tmp_path / "out.json"
    path.write_text('{"cpu": "another, AVX2", "ops": {}}')
    result = benchmark("--op", "linear_4bit", "--short", "--json", str(path))
    assert result.returncode == 1
    assert f"{path} has figures of another, AVX2, and this is {cpu_label()}" in result.stderr
    assert json.loads(path.read_text())["ops"] == {}


def test_a_wrong_result_is_not_timed(monkeypatch):
    from fusetune.bench import cases_of, measure

    monkeypatch.setattr(ops, "linear_4bit", off_by_a_thousandth(ops.linear_4bit))
    case = next(cases_of("linear_4bit", False, 128, 128))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        measure(case, 0.01)
