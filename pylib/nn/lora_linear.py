"""A frozen linear layer with a LoRA adapter."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from fusetune.nn.nf4_linear import NF4Linear
from fusetune.ops.lora_linear import lora_linear


class LoraLinear(nn.Module):
    """y = x W^T + bias + scaling (drop(x) A^T B^T + lora_bias) with a frozen W, dense or 4-bit.

    base_layer: nn.Linear or NF4Linear; its parameters are frozen here.
    r: rank. lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    lora_dropout: probability. lora_bias: a trainable bias on lora_B, scaled with it.
    The adapter is fp32 whatever the base is; A starts as PEFT's does (Kaiming uniform), B as zero.

    State-dict keys are those of PEFT's lora.Linear for the adapter `adapter_name`
    (base_layer.weight, lora_A.default.weight, ...), so that they load into it and back.
    """

    def __init__(
        self,
        base_layer: nn.Linear | NF4Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        lora_bias: bool = False,
        adapter_name: str = "default",
    ) -> None:
        """Raises ValueError for a rank below 1 or a dropout outside [0, 1)."""
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        self.adapter_name = adapter_name
        device = base_layer.weight.device
        n, k = base_layer.out_features, base_layer.in_features
        fp32 = torch.float32
        a = nn.Linear(k, r, bias=False, device=device, dtype=fp32)
        b = nn.Linear(r, n, bias=lora_bias, device=device, dtype=fp32)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        if lora_bias:
            nn.init.zeros_(b.bias)
        self.lora_A = nn.ModuleDict({adapter_name: a})
        self.lora_B = nn.ModuleDict({adapter_name: b})

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, *, quantize: bool = False, **options: object
    ) -> LoraLinear:
        """Wraps an nn.Linear, quantised to NF4 first where asked. options: as __init__."""
        base = NF4Linear.from_linear(linear) if quantize else linear
        return cls(base, r, **options)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        a = cast(nn.Linear, self.lora_A[self.adapter_name])
        b = cast(nn.Linear, self.lora_B[self.adapter_name])
        return lora_linear(
            x,
            base.weight,
            a.weight,
            b.weight,
            self.scaling,
            bias=base.bias,
            lora_bias=b.bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
