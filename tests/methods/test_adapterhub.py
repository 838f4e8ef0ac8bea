"""AdapterHub's checkpoints: the real library's read here, ours read by the real library."""

import json
import os
import subprocess

import pytest
import torch
from adapterhub_folders import inputs_of, randomize, weights
from oracle_cases import CASES, FOLDER, base_model, composition, result, tensors
from safetensors.torch import save_file

import fusetune.methods as methods
from fusetune.integrations import _adapterhub_keys as keys
from fusetune.integrations.adapterhub import load_adapterhub, save_adapterhub

PYTHON = os.environ.get("FUSETUNE_ADAPTERS_PYTHON")
# adapters divides an average by the number of adapters once more: see composition_of.
AVERAGES = [case for case in CASES if case.startswith("average")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
]


def composition_of(case):
    """Our composition of a case. An Average is what adapters computes, with its extra 1 / N."""
    spec = CASES[case]
    tree = spec["composition"]
    if "average" not in tree:
        return composition(tree)
    names = tree["average"]
    weights = tree.get("weights", [1.0] * len(names))
    weights = [w / sum(weights) / len(names) for w in weights]
    return methods.Average(*names, weights=weights, normalize_weights=False)


def loaded(case, folder=FOLDER):
    """The case's model with everything loaded, and the composition active."""
    spec = CASES[case]
    model = base_model(spec["model"])
    for adapter in spec["adapters"]:
        model = load_adapterhub(model, folder / case / adapter)
    if spec["fusion"]:
        model = load_adapterhub(model, folder / case / "fusion")
    methods.compose(model, composition_of(case))
    return model.eval()


def expected_output(stored):
    return next(
        stored[f"output.{key}"]
        for key in ("logits", "last_hidden_state")
        if f"output.{key}" in stored
    )


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_adapters(case):
    """fp32, two layers: adapters and we differ by some roundings."""
    stored = tensors(case)
    with torch.no_grad():
        got = result(loaded(case)(**inputs_of(stored)))
    expected = expected_output(stored)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-6 * max(1, expected.abs().max())


@pytest.mark.parametrize("case", [case for case in CASES if "grad.inputs_embeds" in tensors(case)])
def test_gradients_are_those_of_adapters(case):
    stored = tensors(case)
    model = loaded(case)
    base = model.get_base_model()
    named = {
        f"bert.{key}": parameter
        for name in model.peft_config
        for key, parameter in keys.parameters(model, base, name)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in named.values():
        parameter.requires_grad_(True)
    embedding = base.get_input_embeddings()
    embedded = embedding(stored["input.input_ids"]).detach().requires_grad_(True)
    output = result(model(inputs_embeds=embedded, attention_mask=stored["input.attention_mask"]))
    (output * stored["input.projection"]).sum().backward()
    checked = 0
    for key, expected in stored.items():
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.")
        got = embedded.grad if name == "inputs_embeds" else named[name].grad
        if name.endswith("key.bias"):  # zero, stored as rounding noise
            assert not got.any()
        error = (got - expected).abs().max()
        # The absolute part is for gradients that are sums of larger terms that cancel.
        assert error <= 2e-5 * expected.abs().max() + 5e-6, f"{name}: {error:.2g}"
        checked += 1
    assert checked > 4


def test_temperature_of_adapters_moves_in_evaluation_and_ours_does_not():
    stored = tensors("fusion_temperature")
    model = loaded("fusion_temperature")
    arguments = inputs_of(stored)
    with torch.no_grad():
        first, second = (model(**arguments).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        model(**arguments)
        model(**arguments)
        model.eval()  # the temperature of the second forward in training, 49.95
        after = model(**arguments).last_hidden_state
    expected = stored["output.second_forward"]
    torch.testing.assert_close(after, expected, atol=5e-6, rtol=0)


# --- saving ---------------------------------------------------------------------------------------


def formats():
    """Each case in adapters' own format, and those of one model in the other too."""
    yield from ((case, False) for case in CASES)
    yield from ((case, True) for case, spec in CASES.items() if spec["model"] == "bert")


@pytest.mark.parametrize(("case", "safe_serialization"), formats())
def test_saved_again_it_is_the_same(case, safe_serialization, tmp_path):
    """The same JSON and the same tensors by the same keys, but for a bare model's prefix."""
    model = loaded(case)
    spec = CASES[case]
    prefix = "" if not case.startswith("bare_") else "bert."
    for adapter in spec["adapters"]:
        save_adapterhub(model, tmp_path / adapter, adapter, safe_serialization=safe_serialization)
        compare(FOLDER / case / adapter, tmp_path / adapter, prefix)
    if spec["fusion"]:
        name = spec["fusion_name"] or ",".join(spec["adapters"])
        save_adapterhub(model, tmp_path / "f", name, safe_serialization=safe_serialization)
        compare(FOLDER / case / "fusion", tmp_path / "f", prefix)


def is_used(key, folder):
    """Not what adapters writes of a fusion without ever using it."""
    left_out = folder.parts[-2:] == ("fusion_leave_out", "fusion") and ".layer.0." in key
    return not left_out and ".dense." not in key


def compare(theirs, ours, prefix):
    name = next(p.name for p in theirs.glob("*config.json"))
    expected, got = (json.loads((folder / name).read_text()) for folder in (theirs, ours))
    scheduled = expected["config"].get("temperature") is True
    expected["config"].update({"temperature": False} if scheduled else {})
    for header in (expected, got):
        # BertAdapterModel there, BertModel here; and "None" where from_pretrained got None.
        del header["model_class"], header["model_name"]
    assert got == expected
    expected = {key: value for key, value in weights(theirs).items() if is_used(key, theirs)}
    got = weights(ours)
    assert set(got) == {prefix + key for key in expected}
    for key, value in expected.items():
        if scheduled and ".query." in key:
            value = value / 50
        assert torch.equal(got[prefix + key], value), key


@pytest.mark.skipif(PYTHON is None, reason="FUSETUNE_ADAPTERS_PYTHON names no Python with adapters")
def test_adapters_computes_the_same_from_what_is_exported(tmp_path):
    """Every case, with other weights than those that adapters made."""
    for case, spec in CASES.items():
        if case in AVERAGES:
            continue
        model = loaded(case)
        randomize(model)
        for adapter in spec["adapters"]:
            save_adapterhub(
                model, tmp_path / case / adapter, adapter, safe_serialization="stack" in case
            )
        if spec["fusion"]:
            name = spec["fusion_name"] or ",".join(spec["adapters"])
            save_adapterhub(model, tmp_path / case / "fusion", name)
        stored = tensors(case)
        arguments = inputs_of(stored)
        key = next(key for key in ("output.logits", "output.last_hidden_state") if key in stored)
        with torch.no_grad():
            output = result(model(**arguments))
        assert (output - stored[key]).abs().max() > 0.01  # the weights are others
        inputs = {f"input.{name}": value for name, value in arguments.items()}
        save_file({**inputs, key: output.contiguous()}, tmp_path / f"{case}.safetensors")
    command = [PYTHON, str(FOLDER / "check_export.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES) - len(AVERAGES)} of" in done.stdout
