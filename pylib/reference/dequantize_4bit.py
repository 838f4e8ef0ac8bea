"""The value of a 4-bit weight: codebook[code] * absmax in fp32, then in the dtype asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.reference.codebook import codebook

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight


def dequantize_absmax(w: QuantizedWeight) -> torch.Tensor:
    """absmax of every block, fp32 [blocks], with the nested quantisation undone."""
    if w.nested_absmax is None or w.nested_code is None or w.nested_offset is None:
        return w.absmax
    scale = w.nested_absmax.repeat_interleave(w.nested_blocksize)[: w.absmax.numel()]
    return w.nested_code[w.absmax.long()] * scale + w.nested_offset


def dequantize_4bit(w: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight, of w's shape, in `dtype`."""
    numel = w.numel()
    codes = torch.stack([w.packed >> 4, w.packed & 15], 1).flatten()[:numel]
    scale = dequantize_absmax(w).repeat_interleave(w.blocksize)[:numel]
    return (codebook(w.quant_type, w.device)[codes.long()] * scale).to(dtype).view(w.shape)
