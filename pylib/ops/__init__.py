"""The operations: differentiable functions over tensors and `QuantizedWeight`s.

Each runs on the best backend its arguments allow, is a `torch.library` op for torch.compile and
export, and has its definition in `fusetune.reference`.
"""

from fusetune.ops._cpu import empty_cache, set_isa
from fusetune.ops._registry import (
    OPS,
    Case,
    backend,
    decode_int16,
    set_backend,
    set_decode_int16,
    use_backend,
)
from fusetune.ops.adapter_fusion import adapter_fusion
from fusetune.ops.attention import attention
from fusetune.ops.bottleneck import bottleneck
from fusetune.ops.cross_entropy import cross_entropy
from fusetune.ops.dequantize_4bit import dequantize_4bit
from fusetune.ops.dora_linear import dora_linear
from fusetune.ops.dora_norm import dora_norm
from fusetune.ops.dropout import dropout
from fusetune.ops.glu import glu
from fusetune.ops.ia3_linear import ia3_linear
from fusetune.ops.importance import importance
from fusetune.ops.linear import linear
from fusetune.ops.linear_4bit import linear_4bit
from fusetune.ops.linear_cross_entropy import linear_cross_entropy
from fusetune.ops.lora_embedding import lora_embedding
from fusetune.ops.lora_grouped_linear import lora_grouped_linear
from fusetune.ops.lora_linear import lora_linear
from fusetune.ops.lora_linear_group import LoraProjection, lora_linear_group
from fusetune.ops.lora_up import lora_up
from fusetune.ops.merge_lora import merge_lora
from fusetune.ops.multi_lora_linear import multi_lora_linear
from fusetune.ops.orthogonality import orthogonality
from fusetune.ops.prefix_attention import prefix_attention
from fusetune.ops.prompt_embed import extend_labels, extend_mask, prompt_embed
from fusetune.ops.quantize_4bit import quantize_4bit
from fusetune.ops.rms_norm import rms_norm
from fusetune.ops.rotary import rotary

__all__ = [
    "OPS",
    "Case",
    "LoraProjection",
    "adapter_fusion",
    "attention",
    "backend",
    "bottleneck",
    "cross_entropy",
    "decode_int16",
    "dequantize_4bit",
    "dora_linear",
    "dora_norm",
    "dropout",
    "empty_cache",
    "extend_labels",
    "extend_mask",
    "glu",
    "ia3_linear",
    "importance",
    "linear",
    "linear_4bit",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_group",
    "lora_up",
    "merge_lora",
    "multi_lora_linear",
    "orthogonality",
    "prefix_attention",
    "prompt_embed",
    "quantize_4bit",
    "rms_norm",
    "rotary",
    "set_backend",
    "set_decode_int16",
    "set_isa",
    "use_backend",
]
