"""How prompts_smollm2 came to its learning rates: as many trials for every method.

    python -m examples.prompts_rates        fifteen trials

Each of a method's three rates trains for STEPS steps, from one seed, and is judged by the loss on
glosses that are neither trained on nor those that prompts_smollm2 holds out. Writes
OUT/prompts-rates.json after each trial, and goes on where it was stopped.

The trials on record had a draw of their own: 2 of the 152 glosses that judged them, and 15 of
those they trained on, are among the 304 that the table's losses are of.
"""

from __future__ import annotations

import argparse
import json

from .prompts_methods import METHODS, ask, measure, train
from .prompts_smollm2 import QUICK, SIZES, parsed
from .smollm2 import load_tasks, load_tokenizer, prepare

STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.prompts_rates")
    options = parsed(parser)
    path = options.out / "prompts-rates.json"
    trials: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    folder = options.base or prepare(options.out / "smollm2-135m")
    sizes, steps = (QUICK, 2) if options.quick else (SIZES, STEPS)
    texts, validation, _ = load_tasks(load_tokenizer(folder), *sizes.parts)
    for method in METHODS:
        of_method = trials.setdefault(method.name, {})
        for rate in method.rates:
            if str(rate) in of_method:
                continue
            trained = train(method, rate, folder, texts, steps)
            loss, _ = measure(trained.model, ask(trained.model, folder, validation))
            of_method[str(rate)] = loss
            path.write_text(json.dumps(trials, indent=1) + "\n")
            print(f"{method.name} at {rate:g}: validation loss {loss:.3f}", flush=True)
        print(f"{method.name}: {best(of_method):g}", flush=True)


def best(trials: dict[str, float]) -> float:
    """The rate with the lowest loss."""
    return float(min(trials, key=lambda rate: trials[rate]))


if __name__ == "__main__":
    main()
