"""Checkpoints of AdapterHub, as the library `adapters` 1.3.0 reads and writes them.

Bottleneck adapters, with or without an invertible block, and AdapterFusions. What cannot be
expressed on the other side is refused, or where only training differs, warned of.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fusetune.integrations import _adapterhub_config as json_config
from fusetune.integrations import _adapterhub_files as files
from fusetune.integrations import _adapterhub_keys as keys
from fusetune.methods.bottleneck.config import AdapterConfig, BottleneckConfig
from fusetune.methods.bottleneck.fusion import AdapterFusion
from fusetune.methods.bottleneck.fusion_config import AdapterFusionConfig
from fusetune.methods.bottleneck.madx_config import MadXConfig
from fusetune.methods.bottleneck.model import BottleneckModel

Tensor = torch.Tensor


def load_adapterhub(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str | None = None,
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Adds the adapter, or the AdapterFusion, in a directory to a model. Returns the PEFT model.

    model: a transformers model, which gets its first adapter, or a PEFT model, which gets one more.
    An adapter added to a PEFT model is not activated, as with PEFT's `load_adapter`.
    directory: what `save_adapter` or `save_adapter_fusion` of adapters wrote. For a fusion the
    adapters that it fuses must be in the model, by the names they were fused under.
    adapter_name: None for the name in the file. is_trainable: as in PEFT.

    Files are read without unpickling code. Everything is checked before the model is touched, or
    taken back: a model that raises has what it had. Raises FileNotFoundError; ValueError naming the
    file, and the key and shapes of each tensor that does not fit; ValueError for what is not
    supported: other methods than bottleneck adapters, phm_layer (Compacter), inv_adapter "glow".
    """
    peft_model = model if isinstance(model, PeftModel) else None
    base: Any = peft_model.get_base_model() if peft_model is not None else model
    model_type = _model_type(base)
    checkpoint = files.read(directory, base.base_model_prefix)
    _check_model(checkpoint, base, model_type)
    name = checkpoint.name if adapter_name is None else adapter_name
    if not name or "." in name:
        raise ValueError(f"adapter_name: {name!r} cannot be a name in PyTorch, give another")
    config = _config(checkpoint, model_type)
    config.inference_mode = not is_trainable
    _check_names(name, config, peft_model)
    checkpoint = _renamed(checkpoint, name)
    if peft_model is not None:
        if isinstance(config, AdapterFusionConfig):
            checkpoint = _without_unused(checkpoint, base, config, peft_model)
        peft_model.add_adapter(name, config)
        try:
            _copy(checkpoint, peft_model, base, name)
        except Exception:
            peft_model.delete_adapter(name)
            raise
        return peft_model
    peft_model = get_peft_model(model, config, name)
    try:
        _copy(checkpoint, peft_model, base, name)
    except Exception:
        cast(BottleneckModel, peft_model.base_model).unload()
        raise
    return peft_model


def save_adapterhub(
    model: PeftModel,
    directory: str | Path,
    adapter_name: str,
    *,
    safe_serialization: bool = False,
) -> None:
    """Writes an adapter, or a fusion, so that `load_adapter` (`load_adapter_fusion`) reads it.

    directory: made where there is none. safe_serialization: adapter.safetensors, which adapters
    reads with use_safetensors=True, in place of pytorch_adapter.bin.

    The temperature of a fusion is divided out of its query, since adapters does not save it. The
    inverse of an invertible block is applied there by adapters' own heads (`BertAdapterModel`), not
    by those of transformers after `adapters.init`.
    Raises ValueError for what adapters cannot express: inv_adapter "glow", trained LayerNorms, and
    in models without a class there original_ln_after=False.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"adapter_name: no adapter {adapter_name!r}, only {sorted(model.peft_config)}"
        )
    base: Any = model.get_base_model()
    model_type = _model_type(base)
    config: Any = model.peft_config[adapter_name]
    header: dict[str, Any] = {
        "name": adapter_name,
        "model_type": model_type,
        "model_class": type(base).__name__,
        "model_name": getattr(base.config, "name_or_path", "") or "",
        "hidden_size": getattr(base.config, "hidden_size", None),
        "version": files.VERSION,
    }
    tensors = dict(keys.parameters(model, base, adapter_name))
    if isinstance(config, AdapterFusionConfig):
        kind = files.FUSION
        header["config"] = {**json_config.fusion_json(config), "temperature": False}
        header["adapter_names"] = list(config.adapters)
        _fold_temperatures(model, adapter_name, tensors)
    else:
        kind = files.ADAPTER
        _check_export(config, model_type)
        header["config"] = json_config.bottleneck_json(config)
    prefix = base.base_model_prefix
    tensors = {f"{prefix}.{key}" if prefix else key: value for key, value in tensors.items()}
    files.write(directory, kind, header, tensors, safe_serialization)


# --- loading --------------------------------------------------------------------------------------


def _model_type(base: Any) -> str:
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        raise TypeError(f"model must be a transformers model, got {type(base).__name__}")
    keys.check_known(model_type)
    return model_type


def _check_model(checkpoint: files.Checkpoint, base: Any, model_type: str) -> None:
    """The file's own word on the model it is for, where it has one."""
    header, hidden_size = checkpoint.header, getattr(base.config, "hidden_size", None)
    given = header.get("model_type")
    if given is not None and given != model_type:
        raise ValueError(
            f"{checkpoint.path}: for models of type {given!r}, the model is {model_type!r}"
        )
    given = header.get("hidden_size")
    if given is not None and hidden_size is not None and given != hidden_size:
        raise ValueError(f"{checkpoint.path}: for hidden_size {given}, the model has {hidden_size}")


def _config(checkpoint: files.Checkpoint, model_type: str) -> AdapterConfig:
    source = checkpoint.path.parent / checkpoint.files.config
    try:
        if checkpoint.files is files.FUSION:
            return AdapterFusionConfig(**json_config.fusion_arguments(checkpoint.header, source))
        arguments = json_config.bottleneck_arguments(checkpoint.header, source)
        if "inv_adapter" in arguments and _never_had_block(checkpoint):
            for field in json_config.INVERTIBLE_FIELDS:
                del arguments[field]
        cls = MadXConfig if "inv_adapter" in arguments else BottleneckConfig
        config = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(error if str(source) in str(error) else f"{source}: {error}") from error
    _check_block(config, model_type, source)
    if model_type.startswith("gemma") and config.original_ln_before:
        _warn_of_gemma(source)
    return config


def _never_had_block(checkpoint: files.Checkpoint) -> bool:
    """Task adapters of adapter-transformers 1 have the field without having the block."""
    has = any("invertible_adapters." in key for key in checkpoint.tensors)
    return checkpoint.header.get("type") == "text_task" and not has


def _check_block(config: AdapterConfig, model_type: str, source: object) -> None:
    if isinstance(config, MadXConfig) and model_type in ("gemma", "gemma2"):
        raise ValueError(
            f"{source}: in {model_type} models adapters has the invertible block before the "
            "embeddings are scaled, where transformers 5 has no place for it"
        )


def _warn_of_gemma(source: object) -> None:
    warnings.warn(
        f"{source}: with original_ln_before adapters 1.3.0 uses the last layer's norm in every "
        "layer of this model; here each layer's own is used, and results differ",
        stacklevel=4,
    )


def _check_names(name: str, config: AdapterConfig, peft_model: PeftModel | None) -> None:
    present = {} if peft_model is None else peft_model.peft_config
    if name in present:
        raise ValueError(f"adapter_name: the model has an adapter {name!r} already")
    if isinstance(config, AdapterFusionConfig):
        missing = [adapter for adapter in config.adapters if adapter not in present]
        if missing:
            raise ValueError(
                f"directory: a fusion of {config.adapters}; the model has no adapters {missing}"
            )


def _renamed(checkpoint: files.Checkpoint, name: str) -> files.Checkpoint:
    """With the keys of an adapter of another name."""
    old = f"{checkpoint.files.container}.{checkpoint.name}."
    new = f"{checkpoint.files.container}.{name}."
    tensors = {key.replace(old, new, 1): value for key, value in checkpoint.tensors.items()}
    return checkpoint._replace(tensors=tensors)


def _without_unused(
    checkpoint: files.Checkpoint, base: Any, config: AdapterFusionConfig, model: PeftModel
) -> files.Checkpoint:
    """Without what adapters writes of a fusion and never uses."""
    members: list[Any] = [model.peft_config[adapter] for adapter in config.adapters]
    container = checkpoint.files.container
    unused = tuple(f"{path}.{container}." for path in keys.unused_fusion_paths(base, members))
    tensors = {
        key: value
        for key, value in checkpoint.tensors.items()
        # A layer of its own, where there is neither query nor key nor value.
        if not key.startswith(unused) and key.split(".")[-2] != "dense"
    }
    return checkpoint._replace(tensors=tensors)


def _copy(checkpoint: files.Checkpoint, model: PeftModel, base: Any, name: str) -> None:
    """Checks all tensors, then copies them into the parameters."""
    places = list(keys.parameters(model, base, name))
    files.compare(checkpoint, dict(places))
    sources: dict[int, str] = {}
    for key, parameter in places:
        first = sources.setdefault(id(parameter), key)
        if not torch.equal(checkpoint.tensors[first], checkpoint.tensors[key]):
            raise ValueError(f"{checkpoint.path}: {first} and {key} are one tensor, but differ")
    with torch.no_grad():
        for key, parameter in places:
            parameter.copy_(checkpoint.tensors[key])


# --- saving ---------------------------------------------------------------------------------------


def _check_export(config: BottleneckConfig, model_type: str) -> None:
    if config.train_layer_norm:
        raise ValueError(
            "adapter_name: its LayerNorms are trained (train_layer_norm), which AdapterHub's files "
            "have no place for; without them the adapter computes something else"
        )
    if config.modules_to_save:
        warnings.warn(
            f"not exported, since adapters has heads of its own: {config.modules_to_save}",
            stacklevel=3,
        )
    if keys.is_plugged(model_type) and not config.original_ln_after:
        raise ValueError(f"adapters refuses original_ln_after=False in {model_type} models")
    _check_block(config, model_type, "adapter_name")
    if model_type.startswith("gemma") and config.original_ln_before:
        _warn_of_gemma("adapter_name")


def _fold_temperatures(model: PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
    """Divides the query (or the key, where there is none) of each location by its temperature."""
    for layer in keys.bottleneck_layers(model):
        if name not in layer.bn_fusions:
            continue
        fusion = layer.bn_fusions[name]
        assert isinstance(fusion, AdapterFusion)
        temperature = fusion.current_temperature()
        if temperature == 1:
            continue
        projection = fusion.query if fusion.query is not None else fusion.key
        if projection is None:
            raise ValueError(
                f"adapter_name: temperature {temperature:.4g} cannot be expressed in a fusion "
                "without query and key"
            )
        for key, parameter in tensors.items():
            if any(parameter is own for own in projection.parameters()):
                tensors[key] = parameter.detach() / temperature.to(parameter.device)
