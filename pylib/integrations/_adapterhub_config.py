"""Configurations as AdapterHub's JSON files have them, to arguments of ours and back.

Fields have the same names on both sides; these are the defaults, what is refused, and the changes
of older files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

# BnConfig of adapters 1.3.0. A file may lack keys; those without a default here are required.
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "leave_out": (),
    "dropout": 0.0,
    "stochastic_depth": 0.0,
}
FIELDS = (*_REQUIRED, *_DEFAULTS)
INVERTIBLE_FIELDS = ("inv_adapter", "inv_adapter_reduction_factor")
# Compacter's, without meaning unless phm_layer is set; written as adapters does.
_PHM: dict[str, Any] = {
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}
_FUSION_DEFAULTS: dict[str, Any] = {
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
    "value_before_softmax": True,
    "dropout_prob": None,
}
_FUSION_REQUIRED = ("key", "query", "value", "regularization", "value_initialized")
FUSION_FIELDS = (*_FUSION_REQUIRED, *_FUSION_DEFAULTS)

_SEQ_BN = {
    "mh_adapter": False,
    "output_adapter": True,
    "original_ln_before": True,
    "reduction_factor": 16,
    "non_linearity": "relu",
}
_DOUBLE_SEQ_BN = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "swish",
}
_PAR_BN = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 2,
    "non_linearity": "relu",
    "is_parallel": True,
    "init_weights": "mam_adapter",
    "scaling": 4.0,
}
_NICE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
# Configurations by name, and by the names of adapter-transformers.
_NAMED: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQ_BN,
    "double_seq_bn": _DOUBLE_SEQ_BN,
    "par_bn": _PAR_BN,
    "scaled_par_bn": {**_PAR_BN, "scaling": "learned"},
    "seq_bn_inv": {**_SEQ_BN, **_NICE},
    "double_seq_bn_inv": {**_DOUBLE_SEQ_BN, **_NICE},
}
_ALIASES = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
    "pfeiffer+inv": "seq_bn_inv",
    "houlsby+inv": "double_seq_bn_inv",
}
_DYNAMIC = dict.fromkeys(_FUSION_REQUIRED, True)
_NAMED_FUSIONS: dict[str, dict[str, Any]] = {
    "dynamic": _DYNAMIC,
    "static": {**_DYNAMIC, "value": False, "regularization": False, "value_initialized": False},
}
# Before files had a version, "gelu" was the approximation by tanh.
_UNVERSIONED_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def bottleneck_arguments(header: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Arguments of BottleneckConfig, or with `inv_adapter` of MadXConfig, from adapter_config.json.

    source: the file, for messages. Raises ValueError for what is not a bottleneck adapter, for what
    is not supported, and naming a key that is missing.
    """
    config = header["config"]
    if isinstance(config, str):
        name = _ALIASES.get(config, config)
        if name not in _NAMED:
            raise ValueError(
                f"{source}: config {config!r} is not known; known are {sorted(_NAMED)}"
            )
        config = _NAMED[name]
    architecture = config.get("architecture")
    if architecture is not None:
        raise ValueError(
            f"{source}: architecture {architecture!r} is not supported: only bottleneck adapters"
        )
    if config.get("phm_layer"):
        raise ValueError(
            f"{source}: phm_layer is not supported: Compacter's hypercomplex layers are no "
            "bottleneck of two matrices"
        )
    arguments = _select(config, _REQUIRED, _DEFAULTS, source)
    arguments["leave_out"] = list(arguments["leave_out"] or ())
    if "version" not in header:
        old = arguments["non_linearity"]
        arguments["non_linearity"] = _UNVERSIONED_ACTIVATIONS.get(old, old)
    invertible = _invertible(config, source)
    _warn_of_others(
        config, {*FIELDS, *INVERTIBLE_FIELDS, *_PHM, "invertible_adapter", "architecture"}, source
    )
    return {**arguments, **invertible}


def bottleneck_json(config: Any) -> dict[str, Any]:
    """The "config" of adapter_config.json, from a config object with the fields above."""
    written = {field: getattr(config, field) for field in FIELDS}
    for field in INVERTIBLE_FIELDS:
        written[field] = getattr(config, field, None)
    if written["inv_adapter"] == "glow":
        raise ValueError(
            "inv_adapter 'glow' cannot be exported: adapters has no working block of that name"
        )
    if written["inv_adapter"] is None:
        written["inv_adapter_reduction_factor"] = None
    written["leave_out"] = list(written["leave_out"] or ())
    if not isinstance(written["scaling"], str):
        written["scaling"] = float(written["scaling"])  # adapters refuses an int
    return {**written, **_PHM}


def fusion_arguments(header: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Arguments of AdapterFusionConfig, from adapter_fusion_config.json. Raises as above."""
    config = header["config"]
    if isinstance(config, str):
        if config not in _NAMED_FUSIONS:
            raise ValueError(
                f"{source}: config {config!r} is not known; known are {sorted(_NAMED_FUSIONS)}"
            )
        config = _NAMED_FUSIONS[config]
    names = header.get("adapter_names", header["name"])
    if isinstance(names, str):
        names = names.split(",")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: 'adapter_names' must be a list of names, got {names!r}")
    _warn_of_others(config, set(FUSION_FIELDS), source)
    return {
        "adapters": names,
        **_select(config, _FUSION_REQUIRED, _FUSION_DEFAULTS, source),
    }


def fusion_json(config: Any) -> dict[str, Any]:
    """The "config" of adapter_fusion_config.json, from a config object with the fields above."""
    return {field: getattr(config, field) for field in FUSION_FIELDS}


def _select(
    config: Mapping[str, Any], required: tuple[str, ...], defaults: dict[str, Any], source: object
) -> dict[str, Any]:
    for key in required:
        if key not in config:
            raise ValueError(f"{source}: the config has no {key!r}")
    selected = {key: config[key] for key in required}
    return {**selected, **{key: config.get(key, value) for key, value in defaults.items()}}


def _invertible(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The two fields of an invertible adapter, or none; adapter-transformers 1 nested them."""
    kind = config.get("inv_adapter")
    factor = config.get("inv_adapter_reduction_factor")
    nested = config.get("invertible_adapter")
    if isinstance(nested, Mapping):
        kind, factor = nested.get("block_type"), nested.get("reduction_factor")
    if kind is None:
        return {}
    if kind != "nice":
        raise ValueError(
            f"{source}: inv_adapter {kind!r} is not supported: only 'nice' works in adapters"
        )
    if not isinstance(factor, int | float):
        raise ValueError(f"{source}: inv_adapter_reduction_factor must be a number, got {factor!r}")
    return {"inv_adapter": kind, "inv_adapter_reduction_factor": factor}


def _warn_of_others(config: Mapping[str, Any], known: set[str], source: object) -> None:
    others = sorted(set(config) - known)
    if others:
        warnings.warn(f"{source}: keys without a meaning for adapters: {others}", stacklevel=4)
