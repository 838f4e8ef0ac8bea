"""Directories of AdapterHub checkpoints: what is in them, read without running anything.

    adapter_config.json, pytorch_adapter.bin or adapter.safetensors                an adapter
    adapter_fusion_config.json, pytorch_model_adapter_fusion.bin or
        model_adapter_fusion.safetensors                                           a fusion

The tensors' keys are those of the model's modules. They start with the base model's name only
where the model that was saved had a head; `Checkpoint.tensors` never has it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor

VERSION = "adapters.1.3.0"

# Parts of keys that adapter-transformers 1 wrote, and their names since. The library replaces them
# wherever they stand.
_LEGACY_KEYS = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
_HEAD_FILES = ("pytorch_model_head.bin", "model_head.safetensors")


class Files(NamedTuple):
    """The names of the files of an adapter, or of a fusion."""

    config: str
    weights: str
    safetensors: str
    container: str  # the module dictionary in the keys, before the name


ADAPTER = Files("adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors", "adapters")
FUSION = Files(
    "adapter_fusion_config.json",
    "pytorch_model_adapter_fusion.bin",
    "model_adapter_fusion.safetensors",
    "adapter_fusion_layer",
)


class Checkpoint(NamedTuple):
    """What a directory holds."""

    files: Files
    name: str  # of the adapter or fusion when it was saved
    header: dict[str, Any]  # the JSON file; "config" is in it
    tensors: dict[str, Tensor]
    path: Path  # of the tensors, for messages


def read(directory: str | Path, prefix: str) -> Checkpoint:
    """The checkpoint in a directory, on the CPU.

    prefix: the base model's name in a model with a head, "bert" for instance. Raises
    FileNotFoundError or ValueError saying which file, and which key of it, is not as it must be.
    """
    folder = Path(directory)
    files = next((kind for kind in (ADAPTER, FUSION) if (folder / kind.config).is_file()), None)
    if files is None:
        raise FileNotFoundError(
            f"directory: {folder} has neither {ADAPTER.config} nor {FUSION.config}"
        )
    header = _header(folder / files.config)
    path = folder / files.safetensors
    if not path.is_file():
        path = folder / files.weights
    tensors = {
        _current(key, prefix): value for key, value in tensors_of(path, files, folder).items()
    }
    if any((folder / name).is_file() for name in _HEAD_FILES):
        warnings.warn(f"{folder}: the prediction head saved there is not loaded", stacklevel=3)
    return Checkpoint(files, header["name"], header, tensors, path)


def write(
    directory: str | Path,
    files: Files,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    safe_serialization: bool,
) -> None:
    """Writes both files; the directory is made where there is none."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory: {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, so that no two keys share memory: safetensors refuses that.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    # The other format of an earlier save would be the one that is read.
    (folder / (files.weights if safe_serialization else files.safetensors)).unlink(missing_ok=True)
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(state, folder / files.safetensors)
    else:
        torch.save(state, folder / files.weights)
    text = json.dumps(dict(header), indent=2, sort_keys=True)
    (folder / files.config).write_text(text + "\n", encoding="utf-8")


def compare(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the checkpoint is not exactly the tensors that are expected.

    Says of each key that does not fit which one, its shape, and what would fit.
    """
    faults = []
    for key, tensor in checkpoint.tensors.items():
        if key not in expected:
            faults.append(f"{key} {list(tensor.shape)} has no place in the model")
        elif tensor.shape != expected[key].shape:
            wanted = list(expected[key].shape)
            faults.append(f"{key} has shape {list(tensor.shape)}, the model needs {wanted}")
    for key in expected:
        if key not in checkpoint.tensors:
            faults.append(f"{key} {list(expected[key].shape)} is missing")
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise ValueError(f"{checkpoint.path} does not fit the model:\n  " + "\n  ".join(shown))


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} must hold an object, got {type(header).__name__}")
    if "peft_type" in header:
        raise ValueError(f"{path} is PEFT's: use PeftModel.from_pretrained or load_adapter")
    for key, kinds in (("name", (str,)), ("config", (dict, str))):
        if not isinstance(header.get(key), kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {key!r} must be a {names}, got {header.get(key)!r}")
    return header


def tensors_of(path: Path, files: Files, folder: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, each checked. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has neither {files.safetensors} nor {files.weights}")
    if path.name == files.safetensors:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the file leads it to
            raise ValueError(f"{path} cannot be read as tensors: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(state).__name__}")
    for key, value in state.items():
        _check_tensor(path, key, value)
    return dict(state)


def _check_tensor(path: Path, key: Any, value: Any) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{path}: keys must be strings, got {key!r}")
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {key} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or not value.is_floating_point():
        raise ValueError(f"{path}: {key} must be a dense float tensor, got {value.dtype}")
    if not value.isfinite().all():
        raise ValueError(f"{path}: {key} {list(value.shape)} has values that are not finite")


def _current(key: str, prefix: str) -> str:
    """A key as adapters 1.3.0 has it, without the base model's name."""
    for old, new in _LEGACY_KEYS.items():
        key = key.replace(old, new)
    return key.removeprefix(f"{prefix}.") if prefix else key
