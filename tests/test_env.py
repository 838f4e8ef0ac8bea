"""What the machine's description says, and the environment variables that force a path."""

import json
import os
import subprocess
import sys

import pytest
import torch
from backends import simulated

from fusetune import _native, env, ops
from fusetune.ops import _cuda, _triton


def run(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
    )


def test_information_is_plain_and_complete():
    info = env.information()
    assert json.loads(json.dumps(info)) == info
    assert info["versions"]["torch"] == torch.__version__
    assert info["native"]["isa"] == _native.C.isa()
    assert info["backends"].keys() == ops.OPS.keys()
    chosen = {name: entry["chosen"] for name, entry in info["backends"].items()}
    assert set(chosen.values()) == {"cpu"}
    assert info["cpu"]["threads"] == torch.get_num_threads()


def test_description_names_backends_and_reasons():
    text = env.describe()
    for expected in (torch.__version__, env.cpu_name(), _native.C.isa(), "linear_4bit"):
        assert expected in text
    with ops.use_backend("triton"):
        assert "no such implementation" in env.describe()
    with ops.use_backend("reference"):
        chosen = {entry["chosen"] for entry in env.backends("cpu").values()}
    assert chosen == {"reference"}
    reasons = env.backends("cuda")["linear_4bit"]["not"]
    assert reasons["cpu"] == "the tensors are on cuda"


def test_label_of_the_cpu_names_the_instruction_set_in_use():
    best, *others = _native.C.available_isas()
    before = _native.C.isa()
    labels = {}
    try:
        for isa in (best, *others):
            ops.set_isa(isa)
            labels[isa] = env.cpu_label()
    finally:
        ops.set_isa(before)
    assert len(set(labels.values())) == len(labels)
    assert all(label.startswith(f"{env.cpu_name()}, ") for label in labels.values())
    assert {isa for isa in labels if labels[isa].endswith(" forced")} == set(others)
    assert labels["scalar"].removesuffix(" forced") == f"{env.cpu_name()}, scalar"


@pytest.mark.parametrize(("name", "module"), [("triton", _triton), ("cuda", _cuda)])
def test_description_says_why_there_are_no_gpu_kernels(name, module):
    """Without a driver the modules still load and say what is missing."""
    why = module.reason()
    information = env.information()
    assert information[name] == {"available": why is None, "reason": why}
    (line,) = [t for t in env.describe().splitlines() if t.lower().startswith(f"{name} kernels")]
    assert line.endswith(why or "available")
    if not torch.cuda.is_available():
        assert why is not None
        assert env.backends("cuda")["linear_4bit"]["not"][name] == why
        assert information["gpu_backends"] == {}


def test_a_simulated_gpu_is_available():
    with simulated("triton-sim"):
        assert env.information()["triton"] == {"available": True, "reason": None}


def test_the_choice_is_explained():
    op = ops.OPS["lora_linear"]
    explained = op.explain(ops.Case("cpu", torch.float64, torch.float32))
    assert explained[-2:] == [("cpu", "no kernel for torch.float64"), ("reference", None)]
    assert op.select(ops.Case("cpu", torch.float32)).name == "cpu"
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="the tensors are on meta"):
        op.select(ops.Case("meta", torch.float32))


SHOW = "import torch; from fusetune import ops, _native; print(ops.backend(), ops.decode_int16())"


def test_environment_forces_the_backend():
    assert run(SHOW).stdout.split() == ["auto", "False"]
    forced = run(SHOW, FUSETUNE_BACKEND="reference", FUSETUNE_DECODE_INT16="1")
    assert forced.stdout.split() == ["reference", "True"]
    wrong = run(SHOW, FUSETUNE_BACKEND="gpu")
    assert "FUSETUNE_BACKEND must be one of ('auto', 'reference'" in wrong.stderr


def test_environment_forces_the_instruction_set():
    show = "from fusetune import _native; print(_native.C.isa() if _native.C else _native.reason)"
    assert run(show, FUSETUNE_CPU_ISA="scalar").stdout.strip() == "scalar"
    assert "FUSETUNE_CPU_ISA" in run(show, FUSETUNE_CPU_ISA="mmx").stdout


def test_without_the_native_module_everything_runs_on_the_reference():
    code = """
import sys
sys.modules["fusetune._C"] = None
import torch
from fusetune import env, ops
w = ops.quantize_4bit(torch.randn(8, 64), double_quant=True)
x = torch.randn(2, 64, requires_grad=True)
ops.lora_linear(x, w, torch.randn(2, 64), torch.randn(8, 2), 1.0, dropout_p=0.1).sum().backward()
ops.linear_4bit(x, w).sum().backward()
print(env.describe())
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "could not be imported" in result.stdout
    assert "linear_4bit             reference" in result.stdout


def test_forcing_an_instruction_set_from_python():
    try:
        ops.set_isa("scalar")
        assert _native.C.isa() == "scalar"
        with pytest.raises(ValueError, match="'mmx' is not available"):
            ops.set_isa("mmx")
        assert _native.C.isa() == "scalar"
    finally:
        ops.set_isa("auto")
    assert _native.C.isa() == _native.C.available_isas()[0]


def test_processors_without_a_model_are_told_by_their_generation(monkeypatch):
    amd = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "flags": "avx2"}
    intel = {"vendor_id": "GenuineIntel", "model name": "Xeon", "cpu family": "6"}
    names = {
        "AMD EPYC (Zen 3)": {**amd, "cpu family": "25"},
        "AMD EPYC (Zen 4)": {**amd, "cpu family": "25", "flags": "avx2 avx512f"},
        "AMD EPYC (Zen 5)": {**amd, "cpu family": "26"},
        "AMD EPYC": {**amd, "cpu family": "99"},
        "AMD EPYC 9655": {**amd, "cpu family": "26", "model name": "AMD EPYC 9655"},
        "Xeon (Emerald Rapids)": {**intel, "model": "207"},
        "Xeon": {**intel, "model": "999"},
        "Virtual CPU": {"vendor_id": "GenuineIntel", "model name": "Virtual CPU"},
    }
    for name, info in names.items():
        monkeypatch.setattr(env, "_cpuinfo", lambda info=info: info)
        assert env.cpu_name() == name
