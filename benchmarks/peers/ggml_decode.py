"""One token through 4-bit layers: our int16 path beside ggml's repacked IQ4_NL.

    git clone https://github.com/ggml-org/ggml && cd ggml
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=OFF && cmake --build build -j
    python -m benchmarks.peers.ggml_decode --ggml .

A weight of 4096 x 4096 that stays in the cache, and a dozen of them in turn, which come from memory
as in a model. Blocks of calls take turns: both keep their threads awake for a while, and would
disturb each other call by call. IQ4_NL has 4.5 bits a weight, NF4 4.5, and 4.13 with double quant.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fusetune import QuantizedWeight, ops
from fusetune.env import cpu_label

SIZE, CALLS, WARM_UP, ROUNDS, PAUSE = 4096, 60, 10, 9, 0.15
SOURCE = Path(__file__).with_suffix(".cpp")
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.ggml_decode")
    parser.add_argument("--ggml", type=Path, required=True, help="its source, built in build/")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ops.set_decode_int16(True)
    print(f"{cpu_label()}, {options.threads} threads, one token, {SIZE} × {SIZE}")
    weight, x = torch.randn(SIZE, SIZE), torch.randn(1, SIZE)
    for layers in (1, 12):
        runs = {"ggml": ggml(options.ggml, layers, options.threads, weight, x)}
        for name, double in (("NF4", False), ("NF4, double quant", True)):
            copies = [ops.quantize_4bit(weight, double_quant=double) for _ in range(layers)]
            runs[name] = ours(x, copies)
        blocks = timed(runs)
        for name, times in blocks.items():
            pairs = zip(blocks["ggml"], times, strict=True)
            ratio = statistics.median(peer / own for peer, own in pairs)
            ms = 1e3 * statistics.median(times) / layers
            print(f"{layers:2} weights, {name}: {ms:.3f} ms, ggml takes {ratio:.2f}×")


def ggml(folder: Path, layers: int, threads: int, weight: torch.Tensor, x: torch.Tensor) -> Run:
    """A pass through `layers` copies of the weight, in IQ4_NL."""
    shared = Path(tempfile.mkdtemp()) / "ggml_decode.so"
    libraries = (folder / "build" / "src").resolve()
    command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{folder / 'include'}"]
    command += [str(SOURCE), "-o", str(shared), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    subprocess.run([*command, "-lggml", "-lggml-base", "-lggml-cpu"], check=True)
    library = ctypes.CDLL(str(shared))
    library.prepare.restype = ctypes.c_bool
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x)]
    if not library.prepare(SIZE, SIZE, layers, threads, *pointers):
        raise SystemExit("--ggml: this build has no repacked layout for this CPU")
    library.run()
    y = torch.empty(1, SIZE)
    library.result(ctypes.c_void_p(y.data_ptr()))
    exact = x @ weight.T
    if (y - exact).norm() > 0.1 * exact.norm():
        raise SystemExit("ggml's result is wrong")
    return library.run


def ours(x: torch.Tensor, weights: list[QuantizedWeight]) -> Run:
    @torch.no_grad()
    def run() -> None:
        for w in weights:
            ops.linear_4bit(x, w)

    return run


def timed(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Seconds of a call, the median of each block, for all rounds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            time.sleep(PAUSE)
            times = []
            for _ in range(CALLS):
                begin = time.perf_counter()
                runs[name]()
                times.append(time.perf_counter() - begin)
            found[name].append(statistics.median(times[WARM_UP:]))
    return found


if __name__ == "__main__":
    main()
