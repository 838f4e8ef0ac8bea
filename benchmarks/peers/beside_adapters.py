"""The library `adapters`, which needs an environment of its own, beside our cases.

`adapters_layers.py` runs there as a child process and times its repetitions itself; here ours run
in turn with it, one for one, so that both meet the same state of the machine. One thread.
"""

import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from fusetune.bench.timing import Case

NAMES = {
    ("bottleneck", "forward + backward fp32, relu, d=48", "4096 × 768"): "sequential_768",
    ("bottleneck", "forward + backward fp32, relu, d=64", "2048 × 4096"): "sequential_4096",
    **{("adapter_fusion", f"forward fp32, N={n}", "2048 × 768"): f"fusion_{n}" for n in (3, 8, 16)},
}
OPS = {op for op, _, _ in NAMES}


class Adapters:
    """The child process. `python`: the interpreter of the environment that has `adapters`."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("adapters_layers.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.child = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.versions = self._answer()

    def compare(self, case: Case, seconds: float) -> tuple[float, float] | None:
        """(median of its time over ours, its median in ms); None for what it has no module for."""
        name = NAMES.get((case.op, case.name, case.shape))
        if name is None:
            return None
        self._seconds(name)
        case.ours()
        pairs: list[tuple[float, float]] = []
        stop = time.perf_counter() + seconds
        while len(pairs) < 7 or (time.perf_counter() < stop and len(pairs) < 200):
            begin = time.perf_counter()
            case.ours()
            pairs.append((time.perf_counter() - begin, self._seconds(name)))
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        return ratio, 1e3 * statistics.median(theirs for _, theirs in pairs)

    def close(self) -> None:
        """Ends the child: its input is at its end."""
        self.child.communicate()

    def _seconds(self, name: str) -> float:
        assert self.child.stdin is not None
        self.child.stdin.write(name + "\n")
        self.child.stdin.flush()
        answer = self._answer()
        if "seconds" not in answer:
            raise RuntimeError(f"adapters cannot run {name}: {answer}")
        return float(answer["seconds"])

    def _answer(self) -> dict[str, str]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs adapters ended: see its error above")
        answer: dict[str, str] = json.loads(line)
        return answer
