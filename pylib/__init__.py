"""Fused kernels for parameter-efficient fine-tuning of Hugging Face models.

`fuse(model)` speeds up a model that PEFT has wrapped, in place; `ops` holds the operations,
`nn` modules for those who use neither PEFT nor bitsandbytes.
"""

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
