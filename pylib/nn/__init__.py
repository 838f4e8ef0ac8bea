"""Modules for models that use neither PEFT nor bitsandbytes."""

from fusetune.nn.lora_linear import LoraLinear
from fusetune.nn.nf4_linear import NF4Linear

__all__ = ["LoraLinear", "NF4Linear"]
