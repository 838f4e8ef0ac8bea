"""Checkpoints of PEFT's own prefix tuning, prompt tuning and p-tuning, for fusetune's methods.

A file of PEFT's holds the prompt itself under "prompt_embeddings", and what modules_to_save names:

    PROMPT_TUNING, P_TUNING   [P, H]; for encoder-decoder models [2 P, H], of which P are used
    PREFIX_TUNING             [P, layers * 2 * heads * head_dim]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fusetune.integrations._adapterhub_files import Files, tensors_of
from fusetune.methods.prompts.config import PEFT_TYPE, PromptConfig
from fusetune.methods.prompts.deep_config import DeepPromptConfig, PrefixTuningConfig
from fusetune.methods.prompts.geometry import Geometry, geometry_of
from fusetune.methods.prompts.layer import NAME
from fusetune.methods.prompts.model import PromptModel
from fusetune.methods.prompts.shallow_config import PromptTuningConfig, PTuningConfig

Tensor = torch.Tensor

FILES = Files("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "")
KEY = "prompt_embeddings"
TYPES = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
_OURS = f"base_model.model.{NAME}.prompt_encoders."


def load_peft_prompts(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Adds the prompt in a directory, saved by PEFT, to a model. Returns the PEFT model.

    model: a transformers model, which gets its first adapter, or a PEFT model with fusetune's
    prompts, which gets one more; that is not activated, as with PEFT's `load_adapter`.
    directory: what `save_pretrained` wrote for peft.PrefixTuningConfig, PromptTuningConfig or
    PromptEncoderConfig. is_trainable: the prompt is trained further, without an encoder, since a
    file has none.

    Files are read without unpickling code. A model that raises is as it was. Raises
    FileNotFoundError; ValueError naming the file, and the key and shapes of what does not fit.
    """
    _check_model(model)
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"adapter_name: the model has an adapter {adapter_name!r} already")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    geometry = geometry_of(base)
    folder = Path(directory)
    header = _header(folder / FILES.config)
    path = folder / FILES.safetensors
    path = path if path.is_file() else folder / FILES.weights
    tensors = tensors_of(path, FILES, folder)
    if KEY not in tensors:
        raise ValueError(f"{path} has no {KEY}, only {sorted(tensors)}")
    prompt = _prompt(tensors.pop(KEY), header, base, geometry, path)
    config = _config(header, base)
    config.inference_mode = not is_trainable
    required = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        peft_model = model
    else:
        peft_model = get_peft_model(model, config, adapter_name)
    try:
        state = {f"{_OURS}{name}": value for name, value in prompt.items()}
        state.update(_saved_modules(tensors, peft_model, adapter_name, path))
        set_peft_model_state_dict(peft_model, state, adapter_name)
    except Exception:
        if isinstance(model, PeftModel):
            model.delete_adapter(adapter_name)
        else:
            cast(PromptModel, peft_model.base_model).unload()
        for parameter, before in required:
            parameter.requires_grad_(before)
        raise
    if is_trainable:
        peft_model.set_requires_grad(adapter_name)
    else:
        peft_model.eval()
    return peft_model


def save_peft_prompts(
    model: PeftModel, directory: str | Path, adapter_name: str = "default"
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors so that stock PEFT loads them.

    directory: made where there is none. What trains a prompt is not written, since PEFT does not
    keep it either: encoders, prompt dropout.
    Raises ValueError for what PEFT cannot express: templates that are not in front; in
    encoder-decoder models prefixes of the encoder or of the cross-attention.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    _check_model(model)
    known = sorted(model.peft_config)
    if adapter_name not in known:
        raise ValueError(f"adapter_name: no adapter {adapter_name!r}, only {known}")
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory: {folder} is a file")
    base: Any = model.get_base_model()
    config: Any = model.peft_config[adapter_name]
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    prompts = {k.removeprefix(_OURS): state.pop(k) for k in list(state) if k.startswith(_OURS)}
    tensors = {key.replace("base_model.model.", "base_model.", 1): v for key, v in state.items()}
    exported, tensors[KEY] = _export(config, prompts, base)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILES.weights).unlink(missing_ok=True)
    from safetensors.torch import save_file

    copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    save_file(copies, folder / FILES.safetensors, metadata={"format": "pt"})
    exported.save_pretrained(str(folder))


# --- loading --------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if isinstance(model, PeftModel) and model.peft_type != PEFT_TYPE:
        raise ValueError(
            f"model has adapters of PEFT's type {model.peft_type}, not fusetune's prompts"
        )


def _header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"directory: there is no {path}")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} must hold an object, got {type(header).__name__}")
    kind = header.get("peft_type")
    if kind == PEFT_TYPE:
        raise ValueError(f"{path} is fusetune's own: use PeftModel.from_pretrained or load_adapter")
    if kind not in TYPES:
        raise ValueError(f"{path}: peft_type must be one of {TYPES}, got {kind!r}")
    count = header.get("num_virtual_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{path}: num_virtual_tokens must be a positive integer, got {count!r}")
    saved = header.get("modules_to_save")
    if not all(isinstance(name, str) for name in saved or ()):
        raise ValueError(f"{path}: modules_to_save must be names of modules, got {saved!r}")
    return header


def _config(header: dict[str, Any], base: Any) -> PromptConfig:
    shared: dict[str, Any] = {
        "num_virtual_tokens": header["num_virtual_tokens"],
        "task_type": header.get("task_type"),
        "modules_to_save": header.get("modules_to_save"),
        "base_model_name_or_path": header.get("base_model_name_or_path"),
        "inference_mode": True,  # so that neither encoder nor initial words are asked for
    }
    if header["peft_type"] == "PROMPT_TUNING":
        return PromptTuningConfig(**shared)
    if header["peft_type"] == "P_TUNING":
        return PTuningConfig(**shared)
    sites: dict[str, Any] = {}
    if base.config.is_encoder_decoder:
        sites = {"encoder": False, "decoder": True, "cross": False}
    return PrefixTuningConfig(prefix_projection=False, **sites, **shared)


def _prompt(
    tensor: Tensor, header: dict[str, Any], base: Any, geometry: Geometry, path: Path
) -> dict[str, Tensor]:
    """The prompt by the names of our parameters."""
    count = header["num_virtual_tokens"]
    deep = header["peft_type"] == "PREFIX_TUNING"
    site = None
    if deep:
        wanted = "decoder" if base.config.is_encoder_decoder else "self"
        site = next(site for site in geometry.sites if site.name == wanted)
    width = geometry.hidden_size if site is None else site.width
    submodules = header.get("num_transformer_submodules") or 1
    needed = [count if deep else count * submodules, width]
    if (shape := list(tensor.shape)) != needed:
        raise ValueError(f"{path}: {KEY} has shape {shape}, the model needs {needed}")
    if site is None:
        return {"weight": tensor[:count]}
    if base.config.is_encoder_decoder:
        tensor = _by_layer(tensor, site.layers)
    return {f"{site.name}.weight": tensor}


def _order(layers: int) -> Tensor:
    """Which of PEFT's 2 * layers parts are the decoder's keys and values, layer by layer.

    PEFT repeats the prefix for cross-attention, takes four parts for each layer and throws the
    second two away. With an even number of layers half of its parts are used, each twice.
    """
    taken = [4 * layer + part for layer in range(layers) for part in (0, 1)]
    return torch.tensor(taken) % (2 * layers)


def _by_layer(tensor: Tensor, layers: int) -> Tensor:
    parts = tensor.view(len(tensor), 2 * layers, -1)
    return parts[:, _order(layers)].reshape(tensor.shape)


def _saved_modules(
    tensors: dict[str, Tensor], model: PeftModel, adapter_name: str, path: Path
) -> dict[str, Tensor]:
    """The tensors of modules to save by our keys, all checked."""
    expected: dict[str, Tensor] = {}
    wrappers: Any = [m for m in model.named_modules() if isinstance(m[1], AuxiliaryTrainingWrapper)]
    for name, module in wrappers:
        inside = module.adapter_state_dict(adapter_name, module.state_dict())
        expected.update({f"{name}.{key}": value for key, value in inside.items()})
    given = {key.replace("base_model.", "base_model.model.", 1): key for key in tensors}
    for key, theirs in given.items():
        shape = list(tensors[theirs].shape)
        if key not in expected:
            raise ValueError(f"{path}: {theirs} {shape} has no place in the model")
        if tensors[theirs].shape != expected[key].shape:
            wanted = list(expected[key].shape)
            raise ValueError(f"{path}: {theirs} has shape {shape}, the model needs {wanted}")
    for key in sorted(expected.keys() - given.keys()):
        theirs = key.replace("base_model.model.", "base_model.", 1)
        raise ValueError(f"{path}: {theirs} {list(expected[key].shape)} is missing")
    return {key: tensors[theirs] for key, theirs in given.items()}


# --- saving ---------------------------------------------------------------------------------------


def _export(
    config: Any, prompts: dict[str, Tensor], base: Any
) -> tuple[peft.PromptLearningConfig, Tensor]:
    """PEFT's config of an adapter, and its tensor."""
    geometry = geometry_of(base)
    shared: dict[str, Any] = {
        "num_virtual_tokens": config.length,
        "task_type": config.task_type,
        "modules_to_save": config.modules_to_save,
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
        "token_dim": geometry.hidden_size,
        "num_transformer_submodules": 1,
    }
    if not isinstance(config, DeepPromptConfig):
        shared["num_attention_heads"] = getattr(base.config, "num_attention_heads", None)
        shared["num_layers"] = getattr(base.config, "num_hidden_layers", None)
        if isinstance(config, PromptTuningConfig):
            return peft.PromptTuningConfig(**shared), prompts["weight"]
        if not config.parsed.in_front:
            raise ValueError(
                "adapter_name: PEFT has no templates, only pseudo-tokens in front; this one's is "
                f"{config.template}"
            )
        size = config.encoder_hidden_size or geometry.hidden_size
        exported = peft.PromptEncoderConfig(encoder_hidden_size=size, **shared)
        return exported, prompts["weight"]
    names = sorted(key.removesuffix(".weight") for key in prompts)
    if names not in (["self"], ["decoder"]):
        raise ValueError(
            "adapter_name: in encoder-decoder models PEFT has prefixes for the decoder's "
            f"self-attention only; this adapter has them for {names}"
        )
    site = next(site for site in geometry.sites if site.name == names[0])
    (tensor,) = prompts.values()
    if site.name == "decoder":
        tensor = _by_part(tensor, site.layers)
        shared["num_transformer_submodules"] = 2
    shared.update(
        token_dim=site.heads * site.head_dim,
        num_attention_heads=site.heads,
        num_layers=site.layers,
    )
    return peft.PrefixTuningConfig(prefix_projection=False, **shared), tensor


def _by_part(tensor: Tensor, layers: int) -> Tensor:
    """The inverse of `_by_layer`. Raises ValueError where two layers share a part, but differ."""
    parts = tensor.view(len(tensor), 2 * layers, -1)
    theirs = torch.zeros_like(parts)
    theirs[:, _order(layers)] = parts
    if not torch.equal(_by_layer(theirs.flatten(1), layers), tensor):
        raise ValueError(
            "adapter_name: in encoder-decoder models with an even number of layers PEFT gives the "
            f"layers i and i + {layers // 2} one prefix; this adapter's differ"
        )
    return theirs.flatten(1)
