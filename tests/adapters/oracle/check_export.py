"""Does the library `adapters` compute from exported checkpoints what fusetune does?

In the environment of make.py:

    oracle/bin/python tests/adapters/oracle/check_export.py EXPORTED

EXPORTED has for each case of cases.json that it tests, as `save_adapterhub` writes them,

    <case>/<adapter>/, <case>/fusion/
    <case>.safetensors    input.*   what the model is called with
                          output.*  last_hidden_state or logits, computed by fusetune

The test that writes such a folder and runs this script:

    FUSETUNE_ADAPTERS_PYTHON=oracle/bin/python pytest tests/methods/test_adapterhub.py -k adapters

Prints the largest difference of every case; exits with 1 if one is more than 5e-6 of the largest
output, or if adapters did not take exactly the tensors in the files.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from make import parse
from models import adapter_model, base_model
from safetensors.torch import load_file

HERE = Path(__file__).parent
TOLERANCE = 5e-6  # fp32, two layers: some dozens of roundings


def main(exported):
    logging.disable(logging.WARNING)
    cases = json.loads((HERE / "cases.json").read_text())["cases"]
    names = sorted(path.stem for path in exported.glob("*.safetensors"))
    bad = [name for name in names if not check(name, cases[name], exported)]
    print(f"{len(names) - len(bad)} of {len(names)} cases agree")
    if bad or not names:
        sys.exit(1)


def check(name, case, exported):
    base = base_model(case["model"])
    base.load_state_dict(load_file(HERE / f"base_{case['model']}.safetensors"), strict=False)
    model, caller = adapter_model(case["model"], base)
    faults = []
    loads = [(model.load_adapter, adapter) for adapter in case["adapters"]]
    if case["fusion"]:
        loads.append((model.load_adapter_fusion, "fusion"))
    for load, folder in loads:
        info = {}
        # With use_safetensors it takes the other format where there is none.
        load(str(exported / name / folder), loading_info=info, use_safetensors=True)
        faults += info.get("missing_keys", []) + info.get("unexpected_keys", [])
    model.set_active_adapters(parse(case["composition"]))
    model.eval()
    tensors = load_file(exported / f"{name}.safetensors")
    ((key, expected),) = ((k, v) for k, v in tensors.items() if k.startswith("output."))
    with torch.no_grad():
        result = caller(**{k[6:]: v for k, v in tensors.items() if k.startswith("input.")})
    got = result[key.removeprefix("output.")]
    error = (got - expected).abs().max() / expected.abs().max()
    print(f"{name:28} {error:.1e}", *faults)
    return error <= TOLERANCE and not faults


if __name__ == "__main__":
    main(Path(sys.argv[1]))
