"""Writes the oracle: what the library `adapters` computes, for tests that run without it.

`adapters` 1.3.0 needs transformers 4.57, so this runs in an environment of its own:

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 adapters==1.3.0 \
        transformers==4.57.6 safetensors numpy
    oracle/bin/python tests/adapters/oracle/make.py

Beside this file it writes, all fp32 on the CPU in eval mode:

    cases.json                  configs of the models, and every case of cases.py
    base_<model>.safetensors    state dict of the transformers model; tied weights once
    <case>/<adapter>/           as `save_adapter` writes it; fusion/ as `save_adapter_fusion` does;
                                cases named *_safetensors with use_safetensors=True
    <case>.safetensors          input.*   what the model is called with
                                output.*  last_hidden_state or logits
    and for BERT                input.projection, of the shape of the output
                                grad.*    of (output * projection).sum(): adapters' parameters by
                                          their checkpoint key, and inputs_embeds
"""

import json
import shutil
import zlib
from pathlib import Path

import torch
from adapters import AdapterConfig, AdapterFusionConfig, composition
from cases import CASES
from models import MODELS, SEED, adapter_model, base_model, inputs, randomize
from safetensors.torch import save_file

HERE = Path(__file__).parent
BLOCKS = {
    "stack": composition.Stack,
    "parallel": composition.Parallel,
    "batch_split": composition.BatchSplit,
    "split": composition.Split,
    "average": composition.Average,
    "fuse": composition.Fuse,
}


def main():
    for name in MODELS:
        save_file(untied(base_model(name)), HERE / f"base_{name}.safetensors")
    for name, case in CASES.items():
        write(name, case)
    record = {
        "versions": {"adapters": "1.3.0", "transformers": "4.57.6", "torch": torch.__version__},
        "models": {
            name: {"class": class_name, "config": options}
            for name, (class_name, _, options) in MODELS.items()
        },
        "cases": CASES,
    }
    (HERE / "cases.json").write_text(json.dumps(record, indent=1) + "\n")


def write(name, case):
    """Runs one case and writes its files."""
    model, caller = adapter_model(case["model"], base_model(case["model"]))
    add_adapters(model, case, seed=SEED + zlib.crc32(name.encode()))
    model.set_active_adapters(parse(case["composition"]))
    arguments = inputs(case["model"])
    tensors = {f"input.{key}": value for key, value in arguments.items()}
    if case["model"].startswith("bert"):
        tensors |= with_gradients(model, caller, arguments, name)
    else:
        with torch.no_grad():
            tensors |= outputs(caller(**arguments))
    if case["model"] == "bert_mlm":
        tensors["output.logits_without_inverse"] = without_inverse(model, arguments)
    if "temperature" in name:
        with torch.no_grad():
            tensors["output.second_forward"] = caller(**arguments).last_hidden_state
    save(model, case, HERE / name)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors"
    )


def add_adapters(model, case, seed):
    for name, adapter in case["adapters"].items():
        model.add_adapter(name, config=AdapterConfig.load(adapter["config"], **adapter["changes"]))
    if case["fusion"]:
        config = AdapterFusionConfig.load(case["fusion"]["config"], **case["fusion"]["changes"])
        names = (case["fusion_name"] or ",".join(case["adapters"])).split(",")
        model.add_adapter_fusion(names, config=config)
    randomize(adapter_parameters(model), seed)
    model.eval()


def adapter_parameters(model):
    """(checkpoint key, parameter) of all adapters and fusions; a parameter under two keys once."""
    return [
        (key, parameter)
        for key, parameter in model.named_parameters()
        if any(
            part in key for part in (".adapters.", ".adapter_fusion_layer.", "invertible_adapters.")
        )
    ]


def parse(tree):
    """A composition block of `adapters` from its JSON."""
    if isinstance(tree, str):
        return tree
    options = {key: value for key, value in tree.items() if key not in BLOCKS}
    ((kind, children),) = ((key, value) for key, value in tree.items() if key in BLOCKS)
    return BLOCKS[kind](*map(parse, children), **options)


def with_gradients(model, caller, arguments, name):
    """Outputs and gradients; the token embeddings are an argument, as a leaf."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = adapter_parameters(model)
    for _, parameter in trained:
        parameter.requires_grad_(True)
    embedded = model.bert.embeddings.word_embeddings(arguments["input_ids"]).requires_grad_(True)
    result = outputs(caller(inputs_embeds=embedded, attention_mask=arguments["attention_mask"]))
    (output,) = result.values()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    projection = torch.randn(output.shape, generator=generator)
    leaves = [("inputs_embeds", embedded), *trained]
    gradients = torch.autograd.grad(
        (output * projection).sum(), [leaf for _, leaf in leaves], allow_unused=True
    )
    tensors = {key: value.detach() for key, value in result.items()}
    tensors["input.projection"] = projection
    for (key, _), gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:  # no gradient: the parameter has no part in the output
            tensors[f"grad.{key}"] = gradient
    return tensors


def outputs(result):
    key = "logits" if "logits" in result else "last_hidden_state"
    return {f"output.{key}": result[key]}


def without_inverse(model, arguments):
    """The same head without the inverse of the invertible adapter: what `adapters.init` gives
    for transformers' BertForMaskedLM."""
    with torch.no_grad():
        hidden = model.bert(**arguments).last_hidden_state
        for layer in model.heads["head"]:
            hidden = layer(hidden)
    return hidden


def save(model, case, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in case["adapters"]:
        options = {"with_head": False, "use_safetensors": folder.name.endswith("_safetensors")}
        model.save_adapter(str(folder / name), name, **options)
    if case["fusion"]:
        names = (case["fusion_name"] or ",".join(case["adapters"])).split(",")
        model.save_adapter_fusion(str(folder / "fusion"), names)


def untied(model):
    """The state dict, of tensors that share memory only the first."""
    seen, tensors = set(), {}
    for key, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            tensors[key] = value.contiguous()
        seen.add(value.data_ptr())
    return tensors


if __name__ == "__main__":
    main()
