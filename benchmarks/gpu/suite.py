"""Builds, tests and measures on a machine with a card, step by step: see `benchmarks/gpu_suite.sh`.

Every step is a process of its own with a time limit, so that one that hangs costs its limit and no
more. What is done is in the results file at once; called again, the suite does what is missing,
failed, or was done with other sources. Steps of half 1 show that the kernels are right, those of
half 2 how fast they are.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import report, store
from benchmarks.gpu.build import BUILD, SITE, nvcc_path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LOGS = BUILD / "logs"
PYTHON = sys.executable
MINUTES = 8.8  # of one call
PROCESSES = 6  # of one step, where they lose the device
LOST = 3  # exit code of benchmarks.gpu.cases where its process has lost the device
CANNOT = 2  # exit code of fusetune.verify where a backend cannot run

# Of measurements, and seconds for each. The first ones matter most where the time does not suffice.
GROUPS = {
    "lora": 130,
    "linear": 70,
    "prefix": 50,
    "model": 35,
    "dequantize": 25,
    "dora": 30,
    "ways": 60,
    "layer": 135,
}

CARD = """
import json, platform, torch
assert torch.cuda.is_available(), "torch finds no GPU"
major, minor = torch.cuda.get_device_capability()
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "name": torch.cuda.get_device_name(), "arch": f"sm_{major}{minor}",
    "memory_gib": properties.total_memory / 2**30,
    "multiprocessors": properties.multi_processor_count,
    "torch": torch.__version__, "cuda": torch.version.cuda, "system": platform.platform(),
}))
"""


@dataclass
class Step:
    name: str
    half: int  # 0: of both, whether it was done before or not
    limit: float  # seconds
    command: list[str] = field(default_factory=list)
    absent: str = ""  # why there is nothing to run
    environment: dict[str, str] = field(default_factory=dict)


def steps(path: Path) -> Iterator[Step]:
    """All of them, on a card."""
    yield Step("build", 0, 180, python("benchmarks.gpu.build"))
    yield Step("env", 0, 40, python("fusetune.env"))
    yield Step("verify triton", 1, 90, python("fusetune.verify", "triton"))
    yield Step("verify cuda", 1, 40, python("fusetune.verify", "cuda"))
    yield measure(path, 1, 40, "card")
    yield tests()
    for tool in ("memcheck", "racecheck", "synccheck"):
        yield sanitizer(tool)
    for group, limit in GROUPS.items():
        yield measure(path, 2, limit, group)


def simulated_steps(path: Path) -> Iterator[Step]:
    yield Step("env", 0, 60, python("fusetune.env"))
    yield Step("verify cuda-sim", 0, 300, python("fusetune.verify", "cuda-sim"))
    yield measure(path, 0, 300, "card", *GROUPS, simulated=True)


def python(module: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", module, *arguments]


def measure(path: Path, half: int, limit: float, *groups: str, simulated: bool = False) -> Step:
    options = ["--json", str(path), *(["--simulate"] if simulated else [])]
    name = "measure " + (groups[0] if len(groups) == 1 else "all")
    return Step(name, half, limit, python("benchmarks.gpu.cases", *groups, *options))


def tests() -> Step:
    """The tests that need a card, several at once where pytest-xdist is installed."""
    if not has("pytest"):
        return Step("tests", 1, 0, absent="pytest is not installed")
    command = python("pytest", "tests/ops", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short")
    if has("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return Step("tests", 1, 130, [*command, "--continue-on-collection-errors"])


def has(module: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0


def sanitizer(tool: str) -> Step:
    """NVIDIA's checker over every CUDA kernel: bounds (memcheck), shared memory, barriers."""
    nvcc = nvcc_path()
    found = shutil.which("compute-sanitizer") or (
        shutil.which(str(Path(nvcc).with_name("compute-sanitizer"))) if nvcc else None
    )
    if found is None:
        return Step(tool, 1, 0, absent="there is no compute-sanitizer")
    options = ["--tool", tool, "--error-exitcode", "9"]
    described = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
    if "--kernel-name" in described:  # torch's kernels need not be checked
        options += ["--kernel-name", "kns=fusetune"]
    command = [found, *options, *python("fusetune.verify", "cuda")]
    # Each tensor an allocation of its own: else torch's pool hides what is beyond its end.
    return Step(tool, 1, 60, command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


# --- running them ---------------------------------------------------------------------------------


def run(step: Step, limit: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """(exit code, or None where it was stopped at its limit; the end of what it printed)."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{step.name.replace(' ', '-')}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**environment, **step.environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children end with it
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            stop(process)
        except BaseException:
            stop(process)
            raise
    return code, log.read_text(errors="replace")


def stop(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the driver: go on
        process.wait(5)


def carry_out(step: Step, deadline: float, environment: dict[str, str]) -> dict[str, object]:
    """Runs a step, again where it has lost the device. What the results file keeps of it."""
    begin = time.monotonic()
    limit = min(step.limit, deadline - begin)
    code, text = None, ""
    for _ in range(PROCESSES if step.name.startswith("measure") else 1):
        left = limit - (time.monotonic() - begin)
        if left < 1:
            break
        code, text = run(step, left, environment)
        if code != LOST:
            break
    lines = [line for line in text.splitlines() if line.strip()]
    state = {0: "ok", None: "stopped"}.get(code, "failed")
    if code == CANNOT and step.name.startswith("verify"):
        state = "skipped"
    note = lines[-1].strip() if lines else ""
    if step.name == "tests" and "passed" not in note:
        state = "failed"  # they were all skipped, or none was found
    if state == "stopped":
        note = f"stopped after {limit:.0f} s; {note}"
    print("\n".join(f"    {line}" for line in lines[-(60 if state != "ok" else 30) :]), flush=True)
    return {"state": state, "seconds": time.monotonic() - begin, "note": note[:200]}


def run_steps(path: Path, todo: list[Step], minutes: float, environment: dict[str, str]) -> bool:
    """Whether nothing failed and nothing is left."""
    deadline = time.monotonic() + 60 * minutes
    source, good = store.source_hash(), True
    for step in todo:
        known = store.load(path)["steps"].get(step.name, {})
        if step.half and known.get("source") == source and known.get("state") in ("ok", "skipped"):
            print(f"[{step.name}] done before: {known['state']}", flush=True)
            continue
        if step.absent:
            entry: dict[str, object] = {"state": "skipped", "seconds": 0.0, "note": step.absent}
        elif deadline - time.monotonic() < 5:
            entry = {"state": "not begun", "seconds": 0.0, "note": "no time was left"}
        else:
            print(f"[{step.name}] {' '.join(step.command)}", flush=True)
            entry = carry_out(step, deadline, environment)
        print(f"[{step.name}] {entry['state']}, {entry['seconds']:.0f} s", flush=True)
        store.store(path, step.name, {**entry, "source": source}, "steps")
        good = good and entry["state"] in ("ok", "skipped")
    return good


def describe_card() -> dict[str, object] | None:
    """What torch says of the first GPU, asked in a process of its own; None where there is none."""
    try:
        asked = subprocess.run([PYTHON, "-c", CARD], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_suite.sh")
    parser.add_argument("--half", type=int, choices=(1, 2), help="only these steps")
    parser.add_argument("--simulate", action="store_true", help="without a card; no timings")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<card>.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="at most (%(default)s)")
    options = parser.parse_args()
    environment = dict(os.environ)
    if options.simulate:
        card: dict[str, object] | None = {"name": "simulated sm_80"}
        path = (options.json or BUILD / "simulated.json").resolve()
        path.unlink(missing_ok=True)
        todo = list(simulated_steps(path))
        print("On the simulator: tiny shapes; results are checked, nothing is timed.", flush=True)
    else:
        card = describe_card()
        if card is None:
            print("torch finds no GPU here; --simulate runs the suite without one", file=sys.stderr)
            return 2
        name = re.sub(r"[^a-z0-9]+", "-", str(card["name"]).lower()).strip("-")
        path = (options.json or RESULTS / f"{name}.json").resolve()
        todo = [s for s in steps(path) if options.half is None or s.half in (0, options.half)]
        inherited = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(SITE), *inherited])
    content = store.load(path)
    content["card"] = {**content.get("card", {}), **card}
    content["date"] = datetime.date.today().isoformat()
    content["simulated"] = options.simulate
    content["source"] = store.source_hash()
    store.save(path, content)
    good = run_steps(path, todo, options.minutes, environment)
    print("\n" + report.write(path))
    print(f"{path}, .md and .png beside it")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
