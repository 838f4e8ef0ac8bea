"""What the library adapters 1.3.0 computed on tiny models (adapters/oracle), in our models."""

import json
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file

from fusetune import methods

FOLDER = Path(__file__).parent / "adapters" / "oracle"
ORACLE = json.loads((FOLDER / "cases.json").read_text())
CASES = ORACLE["cases"]
NODES = {
    "stack": methods.Stack,
    "fuse": methods.Fuse,
    "split": methods.Split,
    "parallel": methods.Parallel,
    "batch_split": methods.BatchSplit,
    "average": methods.Average,
}
# Where adapters are in the files, and where in the model: (model, path there, path here).
_LLAMA = {
    "attention_adapters": "self_attn.o_proj",
    "output_adapters": "mlp.down_proj",
}
_BERT = {"attention.output": "attention.output.dropout", "output": "output.dropout"}
PATHS = {
    "bert": ("bert.encoder.layer", "encoder.layer", _BERT),
    "bare_bert": ("encoder.layer", "encoder.layer", _BERT),
    "roberta": ("roberta.encoder.layer", "encoder.layer", _BERT),
    "distilbert": (
        "distilbert.transformer.layer",
        "transformer.layer",
        {"attention_adapters": "attention.out_lin", "output_adapters": "ffn.dropout"},
    ),
    "vit": (
        "vit.encoder.layer",
        "layers",
        {"attention_adapters": "attention.o_proj", "output.output_adapters": "mlp.fc2"},
    ),
    "gpt2": (
        "transformer.h",
        "h",
        {"attention_adapters": "attn.resid_dropout", "output_adapters": "mlp.dropout"},
    ),
    "llama": ("model.layers", "layers", _LLAMA),
    "mistral": ("model.layers", "layers", _LLAMA),
    "qwen3": ("model.layers", "model.layers", _LLAMA),
    "gemma2": ("model.layers", "model.layers", _LLAMA),
    "t5": ("transformer", "", {f"layer.{i}": f"layer.{i}.dropout" for i in range(3)}),
}
WEIGHTS = {
    "adapter_down.0": "down",
    "adapter_down.1": "down",
    "adapter_up": "up",
    "adapter_norm_before": "norm_before",
    "adapter_norm_after": "norm_after",
}


def base_model(name, dtype=torch.float32):
    """The plain model of a case, with the weights that adapters ran on."""
    spec = ORACLE["models"][name]
    cls = getattr(transformers, spec["class"])
    config = cls.config_class(**spec["config"])
    weights = load_file(FOLDER / f"base_{name}.safetensors")
    if name == "vit":  # its modules have other names in transformers 5: converted on the way
        model = cls.from_pretrained(
            None, config=config, state_dict=weights, attn_implementation="eager"
        )
    else:
        model = cls._from_config(config, attn_implementation="eager")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        tied = ("embed_tokens", "lm_head", "predictions.decoder")
        assert all(any(part in key for part in tied) for key in missing)
    return model.eval().to(dtype)


def config_of(case, adapter):
    """Our config for the file's: its options have the same names."""
    written = json.loads((FOLDER / case / adapter / "adapter_config.json").read_text())["config"]
    known = methods.BottleneckConfig.__dataclass_fields__
    return methods.BottleneckConfig(**{k: v for k, v in written.items() if k in known})


def weights_of(case, adapter):
    path = FOLDER / case / adapter / "adapter.safetensors"
    if path.exists():
        return load_file(path)
    return torch.load(path.with_name("pytorch_adapter.bin"), weights_only=True)


def our_key(model_name, key):
    """The parameter's name in our model, of a key in a checkpoint; None: it is another's copy."""
    theirs, ours, locations = PATHS[model_name]
    place, rest = key.split(".adapters.")
    adapter, weight = rest.split(".", 1)
    path = place.removeprefix(f"{theirs}.")
    if model_name == "t5":  # both lists of blocks are in the path already
        stack, block, index, sub = path.split(".", 3)
        prefix, location = f"{stack}.{block}.{index}", sub
    else:
        index, location = path.split(".", 1)
        prefix = f"{ours}.{index}"
    for old, new in WEIGHTS.items():
        weight = weight.replace(f"{old}.", f"{new}.") if weight.startswith(f"{old}.") else weight
    return f"{prefix}.{locations[location]}.bn_adapters.{adapter}.{weight}"


def load(model, case, adapter):
    """The file's weights into the model; every parameter of the adapter is set."""
    parameters = dict(model.base_model.model.named_parameters())
    left = {name for name in parameters if f".bn_adapters.{adapter}." in name}
    with_norm = config_of(case, adapter).ln_before
    for key, value in weights_of(case, adapter).items():
        if with_norm and ".adapter_down.0." in key:
            continue  # the LayerNorm, once more
        name = our_key(CASES[case]["model"], key)
        parameters[name].data.copy_(value)
        left.discard(name)
    assert not left


def composition(tree):
    """Our composition for the one in cases.json.

    adapters divides the weighted mean of Average by the number of adapters once more. What it
    computed is had by weights that are that much smaller.
    """
    if isinstance(tree, str):
        return tree
    kind = next(key for key in tree if key in NODES)
    arguments = {key: value for key, value in tree.items() if key != kind}
    if kind == "average":
        count = len(tree[kind])
        weights = tree.get("weights") or [1.0] * count
        arguments = {"weights": [w / sum(weights) / count for w in weights]}
        arguments["normalize_weights"] = False
    return NODES[kind](*map(composition, tree[kind]), **arguments)


def adapted(case, dtype=torch.float32):
    """The case's model with its adapters and its composition."""
    spec = CASES[case]
    model = None
    for adapter in spec["adapters"]:
        config = config_of(case, adapter)
        if model is None:
            model = get_peft_model(base_model(spec["model"], dtype), config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
        load(model, case, adapter)
    methods.compose(model, composition(spec["composition"]))
    return model.eval()


def tensors(case):
    return load_file(FOLDER / f"{case}.safetensors")


def result(output):
    return output.logits if "logits" in output else output.last_hidden_state
