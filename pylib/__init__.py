"""Fused kernels for parameter-efficient fine-tuning of Hugging Face models.

`fuse(model)` speeds up a model that PEFT has wrapped, in place; `ops` holds the operations,
`nn` modules for those who use neither PEFT nor bitsandbytes. BottleneckConfig and its like are
methods that PEFT does not have; they import peft when they are first used.
"""

import contextlib
import importlib
import sys
from typing import Any

from fusetune import nn, ops
from fusetune.fuse import fuse, fused, unfuse
from fusetune.quantized_weight import QuantizedWeight
from fusetune.report import FuseReport

__version__ = "0.1.0"
__all__ = [
    "FuseReport",
    "QuantizedWeight",
    "__version__",
    "fuse",
    "fused",
    "nn",
    "ops",
    "unfuse",
]

# Public too, but not in __all__: `from fusetune import *` is not to import peft.
_METHODS = (
    "AdapterFusionConfig",
    "Average",
    "BatchSplit",
    "BitFitConfig",
    "BottleneckConfig",
    "Fuse",
    "MadXConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "Parallel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Split",
    "Stack",
    "compose",
    "fusion_regularization",
)
_LAZY = {
    **dict.fromkeys(_METHODS, "fusetune.methods"),
    "AdaLoraCallback": "fusetune.methods.adalora.callback",
    "compact": "fusetune.methods.adalora.compact",
    "load_adapterhub": "fusetune.integrations.adapterhub",
    "load_peft_prompts": "fusetune.integrations.prompt_checkpoints",
    "merge_ia3_4bit": "fusetune.integrations.peft_ia3_merge",
    "save_adapterhub": "fusetune.integrations.adapterhub",
    "save_peft_prompts": "fusetune.integrations.prompt_checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fusetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


# Saved adapters can be loaded by PEFT once it knows the methods. A PEFT that is too old for them
# says so when one is used: all else works with it.
if "peft" in sys.modules:
    with contextlib.suppress(ImportError):
        importlib.import_module("fusetune.methods")
