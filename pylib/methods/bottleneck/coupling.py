"""Invertible coupling blocks: the language adapters of MAD-X on the side of the embeddings.

A block transforms the halves of a vector in turn, each by a function of the other one, so that it
is undone by taking the steps backwards, whatever the functions are:

    NICE (Dinh et al. 2015, arXiv:1410.8516)       y1 = x1 + F(x2)            y2 = x2 + G(y1)
    GLOW (Dinh et al. 2017, arXiv:1605.08803;      y1 = x1 exp(s_F) + t_F     (s_F, t_F) = F(x2)
          Kingma & Dhariwal 2018, 1807.03039)      y2 = x2 exp(s_G) + t_G     (s_G, t_G) = G(y1)

F and G are W_2 f(W_1 v + b_1) + b_2. MAD-X (Pfeiffer et al. 2020, arXiv:2005.00052) takes NICE.

GLOW is the affine coupling of RealNVP, with one network for scale and shift as in Glow and its last
layer zero at first, so that a new block is the identity. The logarithms of the scales are bounded,
LOG_SCALE_BOUND tanh(s / LOG_SCALE_BOUND), as by RealNVP's tanh: a scale near zero would be no
inverse in floating point. The block of the same name in the library `adapters` raises an error,
and ignores one of its two networks: there is no behaviour to be equal to, nor a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from fusetune import ops
from fusetune.reference.bottleneck import ACTIVATIONS

Tensor = torch.Tensor

LOG_SCALE_BOUND = 1.0
INIT_STD = 0.02  # BERT's, which adapters takes


class Network(nn.ModuleDict):
    """W_2 f(W_1 v + b_1) + b_2. Its layers have the names they have in adapters' checkpoints.

    hidden size: inputs // reduction_factor, at least 1.
    """

    def __init__(self, inputs: int, reduction_factor: float, outputs: int, activation: str) -> None:
        hidden = max(1, int(inputs // reduction_factor))
        super().__init__({"0": nn.Linear(inputs, hidden), "2": nn.Linear(hidden, outputs)})
        self.activation = activation
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    @property
    def down(self) -> nn.Linear:
        return cast(nn.Linear, self["0"])

    @property
    def up(self) -> nn.Linear:
        return cast(nn.Linear, self["2"])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], in the wider dtype of x and the weights."""
        return _linear(self.up, ACTIVATIONS[self.activation][0](_linear(self.down, x)))


class Coupling(nn.Module):
    """What both blocks share: the halves, and the networks F and G.

    hidden_size H >= 2: the first half has H // 2 features, the second the rest. reduction_factor:
    the networks' hidden size is their input's divided by it, at least 1. activation: one of
    ops.bottleneck's. outputs: how many features the networks give for each that they transform.
    """

    def __init__(
        self, hidden_size: int, reduction_factor: float, activation: str, outputs: int
    ) -> None:
        super().__init__()
        if hidden_size < 2:
            raise ValueError(f"hidden_size must be at least 2 to be split, got {hidden_size}")
        if reduction_factor <= 0:
            raise ValueError(f"reduction_factor must be positive, got {reduction_factor}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.split = (hidden_size // 2, hidden_size - hidden_size // 2)
        first, second = self.split
        self.F = Network(second, reduction_factor, outputs * first, activation)
        self.G = Network(first, reduction_factor, outputs * second, activation)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != sum(self.split):
            raise ValueError(f"x must have shape [..., {sum(self.split)}], got {list(x.shape)}")
        first, second = x.split(self.split, dim=-1)
        return first, second


class NiceCoupling(Coupling):
    """y1 = x1 + F(x2), y2 = x2 + G(y1); x [..., H], any float dtype, sums as in ops.bottleneck."""

    def __init__(self, hidden_size: int, reduction_factor: float, activation: str) -> None:
        super().__init__(hidden_size, reduction_factor, activation, outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.halves(x)
        y1 = self._add(self.F, x2, x1, 1.0)
        return torch.cat((y1, self._add(self.G, y1, x2, 1.0)), dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = self.halves(y)
        x2 = self._add(self.G, y1, y2, -1.0)
        return torch.cat((self._add(self.F, x2, y1, -1.0), x2), dim=-1)

    def _add(self, network: Network, x: Tensor, residual: Tensor, sign: float) -> Tensor:
        """residual + sign network(x): a bottleneck where both halves are of one size."""
        if x.shape[-1] != residual.shape[-1]:
            y = network(x)
            return (residual.to(y.dtype) + sign * y).to(residual.dtype)
        down, up = network.down, network.up
        return ops.bottleneck(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=self.activation,
            scaling=sign,
            residual=residual,
        )


class GlowCoupling(Coupling):
    """y1 = x1 exp(s_F) + t_F, y2 = x2 exp(s_G) + t_G, |s| < LOG_SCALE_BOUND; x [..., H]."""

    def __init__(self, hidden_size: int, reduction_factor: float, activation: str) -> None:
        super().__init__(hidden_size, reduction_factor, activation, outputs=2)
        for network in (self.F, self.G):
            nn.init.zeros_(network.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.halves(x)
        scale, shift = self._scale_and_shift(self.F, x2)
        y1 = (x1.to(scale.dtype) * scale.exp() + shift).to(x.dtype)
        # y1 as it leaves, rounded: the inverse knows no other.
        scale, shift = self._scale_and_shift(self.G, y1)
        y2 = (x2.to(scale.dtype) * scale.exp() + shift).to(x.dtype)
        return torch.cat((y1, y2), dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = self.halves(y)
        scale, shift = self._scale_and_shift(self.G, y1)
        x2 = ((y2.to(scale.dtype) - shift) * (-scale).exp()).to(y.dtype)
        scale, shift = self._scale_and_shift(self.F, x2)
        x1 = ((y1.to(scale.dtype) - shift) * (-scale).exp()).to(y.dtype)
        return torch.cat((x1, x2), dim=-1)

    def _scale_and_shift(self, network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = network(x).chunk(2, dim=-1)
        return LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND), shift


COUPLINGS: dict[str, Callable[[int, float, str], NiceCoupling | GlowCoupling]] = {
    "nice": NiceCoupling,
    "glow": GlowCoupling,
}


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, layer.weight.dtype)
    return functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
