"""What is measured on a card, case by case; ours comes first among the contenders.

    python -m benchmarks.gpu.cases GROUP... --json FILE [--seconds S] [--simulate]

runs the cases of groups that FILE does not hold yet and writes each as it is done. Ours is first
compared with float64: where it is wrong nothing is timed. Simulated, shapes are tiny, every
contender runs once, and nothing is timed at all.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cases_dora, cases_linear, cases_lora, cases_model, cases_prefix, timing
from benchmarks.gpu.measured import Entry, Measured
from benchmarks.gpu.store import load, save, source_hash, store
from fusetune import ops
from fusetune.bench.timing import Run, relative_error, seeded

ATTEMPTS = 2  # a case that was begun so often, and never ended, is given up

# --- the lists ------------------------------------------------------------------------------------


def entries(group: str, simulated: bool) -> Iterator[Entry]:
    """Most telling first: the time may not suffice for all."""
    yield from (SIMULATED if simulated else GROUPS)[group]()


GROUPS: dict[str, Callable[[], Iterator[Entry]]] = {
    "dequantize": cases_linear.dequantize_entries,
    "linear": cases_linear.linear_entries,
    "lora": cases_lora.lora_entries,
    "prefix": cases_prefix.prefix_entries,
    "model": cases_model.model_entries,
    "dora": cases_dora.dora_entries,
    "ways": cases_linear.ways_entries,
    "layer": cases_lora.layer_entries,
}
# The same builders at sizes that an interpreter can do.
SIMULATED: dict[str, Callable[[], Iterator[Entry]]] = {
    "dequantize": cases_linear.simulated_dequantize,
    "linear": cases_linear.simulated_linear,
    "lora": cases_lora.simulated_lora,
    "prefix": cases_prefix.simulated_prefix,
    "model": cases_model.simulated_model,
    "dora": cases_dora.simulated_dora,
    "ways": cases_linear.simulated_ways,
    "layer": cases_lora.simulated_layer,
}


# --- running them ---------------------------------------------------------------------------------


def run_case(make: Callable[[], Measured], seconds: float, simulated: bool) -> dict[str, Any]:
    """What was measured. Raises where ours fails or is wrong; another that fails is left out."""
    with torch.device("cpu" if simulated else timing.DEVICE):
        case = make()
        runs, measured = checked(case)
    result: dict[str, Any] = dict(case.facts)
    if "error" in measured["ours"]:
        result |= {"error": measured["ours"]["error"], "allowed": case.tolerance}
    if not simulated:
        for name, times in timing.compare(runs, seconds).items():
            measured[name] |= times
    return {**result, "contenders": measured}


def checked(case: Measured) -> tuple[dict[str, Run], dict[str, Any]]:
    """The contenders that run, and the error of all or why they do not run."""
    exact = None if case.exact is None else seeded(case.exact)
    runs: dict[str, Run] = {}
    measured: dict[str, Any] = {}
    for name, run in case.runs.items():
        try:
            got = seeded(run)
        except Exception as error:
            if name == "ours":
                raise
            measured[name] = {"failure": first_line(error)}
            continue
        runs[name], measured[name] = run, {}
        if exact is None or (case.random and name != "ours"):
            continue
        error_of = measured[name]["error"] = relative_error(got, exact)
        if name == "ours" and not error_of <= case.tolerance:
            raise RuntimeError(f"error {error_of:.2e}, allowed {case.tolerance:.2e}")
    return runs, measured


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def run_group(group: str, path: Path, seconds: float, simulated: bool) -> int:
    """0: all done; 1: some failed; 3: the device is lost, and a new process has to go on."""
    failed = False
    for key, make in entries(group, simulated):
        known = load(path)["cases"].get(key, {})
        begun = known.get("begun", 0)
        if known.get("source") == source_hash():
            if "contenders" in known:
                continue
            if begun >= ATTEMPTS:
                failed = True
                continue
        else:
            begun = 0
        entry: dict[str, Any] = {"group": group, "source": source_hash(), "begun": begun + 1}
        store(path, key, {**entry, "failure": "began, and did not end"})
        start = time.perf_counter()
        try:
            entry |= run_case(make, seconds, simulated)
            outcome = ""
        except Exception as error:
            entry["failure"] = outcome = first_line(error)
            traceback.print_exc()
            failed = True
        store(path, key, entry)
        took = time.perf_counter() - start
        print(f"{key:<36} {took:5.1f} s  {outcome or summary(entry)}", flush=True)
        if outcome and not simulated and not alive():
            return 3
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


def summary(entry: dict[str, Any]) -> str:
    measured = entry["contenders"].items()
    times = [f"{name} {value['ms']:.3f} ms" for name, value in measured if "ms" in value]
    error = f"error {entry['error']:.1e}" if "error" in entry else "not compared with float64"
    return ", ".join([*times, error])


def alive() -> bool:
    """Whether the device still takes work: after some errors it never does in this process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=timing.DEVICE).item()
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases")
    parser.add_argument("groups", nargs="+", choices=[*GROUPS, "card"], metavar="GROUP")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with ExitStack() as stack:
        if options.simulate:
            simulate(stack)
        code = 0
        for group in options.groups:
            if group == "card":
                measure_card(options.json, options.simulate)
            else:
                code = max(code, run_group(group, options.json, options.seconds, options.simulate))
            if code == 3:
                break
    return code


def simulate(stack: ExitStack) -> None:
    """Triton's kernels and, where there is an nvcc, CUDA's: both, as on a card."""
    from fusetune import sim
    from fusetune.sim.cuda_build import CannotBuild

    try:
        stack.enter_context(sim.cuda_sim())
    except CannotBuild as error:
        print(f"without the CUDA kernels: {error}")
    stack.enter_context(sim.triton_sim())
    stack.enter_context(ops.use_backend("auto"))


def measure_card(path: Path, simulated: bool) -> None:
    content = load(path)
    content.setdefault("card", {}).update(timing.card(simulated))
    save(path, content)
    print(json.dumps(content["card"], indent=1))


if __name__ == "__main__":
    sys.exit(main())
