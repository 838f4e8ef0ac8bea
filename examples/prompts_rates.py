"""How prompts_smollm2 came to its learning rates: as many trials for every method.

    python -m examples.prompts_rates        fifteen trials

Each of a method's three rates trains as prompts_smollm2 does, from the same seeds, and is judged
by the mean loss on glosses that are neither trained on nor those that prompts_smollm2 holds out.
Writes OUT/prompts-rates.json after each trial, and goes on where it was stopped.

The three were moved up once for P-tuning v2, whose best of a first round, with one seed, was the
highest; P-tuning's likewise. Prompt tuning's best is its highest still, prefix tuning's its lowest.
"""

from __future__ import annotations

import argparse
import json
import statistics

from .prompts_methods import METHODS, ask, measure, train
from .prompts_smollm2 import QUICK, SIZES, parsed
from .smollm2 import load_tasks, load_tokenizer, prepare


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.prompts_rates")
    options = parsed(parser)
    path = options.out / "prompts-rates.json"
    trials: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    folder = options.base or prepare(options.out / "smollm2-135m")
    sizes = QUICK if options.quick else SIZES
    texts, validation, _ = load_tasks(load_tokenizer(folder), *sizes.parts)
    for method in METHODS:
        of_method = trials.setdefault(method.name, {})
        for rate in method.rates:
            if str(rate) in of_method:
                continue
            losses = []
            for seed in range(sizes.seeds):
                trained = train(method, rate, folder, texts, sizes.steps, seed)
                losses.append(measure(trained.model, ask(trained.model, folder, validation))[0])
            of_method[str(rate)] = loss = statistics.mean(losses)
            path.write_text(json.dumps(trials, indent=1) + "\n")
            print(f"{method.name} at {rate:g}: validation loss {loss:.3f}", flush=True)
        print(f"{method.name}: {best(of_method):g}", flush=True)


def best(trials: dict[str, float]) -> float:
    """The rate with the lowest loss."""
    return float(min(trials, key=lambda rate: trials[rate]))


if __name__ == "__main__":
    main()
