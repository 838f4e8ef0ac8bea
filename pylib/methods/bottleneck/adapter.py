"""One bottleneck adapter at one location: its parameters, its input and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from fusetune import ops
from fusetune.methods.bottleneck.config import BottleneckConfig

Tensor = torch.Tensor
Norm = Callable[[Tensor], Tensor]

BERT_STD = 0.02
HOUSLBY_STD = 0.01


class BottleneckAdapter(nn.Module):
    """The parameters of A(x) = s (W_u f(W_d x + b_d) + b_u), and what is around it by the config.

    down, up: linear layers; norm_before, norm_after: LayerNorms, or None; gate: a linear layer to
    one feature, or None; scaling: a number, or a parameter of [1] or [H].
    """

    def __init__(self, hidden_size: int, bottleneck_size: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size)
        self.norm_before = nn.LayerNorm(hidden_size) if config.ln_before else None
        self.norm_after = nn.LayerNorm(hidden_size) if config.ln_after else None
        self.gate = nn.Linear(hidden_size, 1) if config.use_gating else None
        if isinstance(config.scaling, str):
            size = 1 if config.scaling == "learned" else hidden_size
            self.scaling = nn.Parameter(torch.ones(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the config's init_weights says."""
        init = self.config.init_weights
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            if init == "houlsby":
                bound = 2 * HOUSLBY_STD
                nn.init.trunc_normal_(layer.weight, std=HOUSLBY_STD, a=-bound, b=bound)
            elif init == "bert":
                nn.init.normal_(layer.weight, std=BERT_STD)
        if init == "mam_adapter":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        if self.gate is not None and init != "houlsby":
            nn.init.normal_(self.gate.weight, std=BERT_STD)
            nn.init.zeros_(self.gate.bias)

    @property
    def scale(self) -> float | Tensor:
        """s, as `ops.bottleneck` takes it."""
        return self.config.scaling if not isinstance(self.config.scaling, str) else self.scaling

    @property
    def plain(self) -> bool:
        """Whether its result is `ops.bottleneck` of its input and nothing else."""
        extras = (self.norm_before, self.norm_after, self.gate)
        return all(extra is None for extra in extras) and not self._drops_sequences()

    def enter(
        self, hidden: Tensor, stream: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """(input x, residual) of the adapter from the sub-layer's h so far, r and LN."""
        config = self.config
        if config.is_parallel:
            assert stream is not None
            return stream, stream
        if not config.original_ln_before:
            return hidden, hidden
        assert stream is not None
        added = hidden + stream
        x = added if norm is None else norm(added)
        if config.residual_before_ln == "post_add":
            return x, added
        return x, hidden if config.residual_before_ln else x

    def forward(self, x: Tensor, residual: Tensor, base: Tensor) -> Tensor:
        """The result for an input x, its residual, and (for a parallel adapter) h: [B, T, H]."""
        config = self.config
        if config.is_parallel:
            residual = base
        before = config.adapter_residual_before_ln and not config.is_parallel
        if self.plain:
            return self._branch(x, residual, config.dropout)
        if (
            self.gate is None
            and not self._drops_sequences()
            and (self.norm_after is None or before)
        ):
            return self._after(self._branch(x, residual, config.dropout))
        branch = self._skip_sequences(self._branch(x, None, config.dropout))
        if self.gate is not None:
            branch = branch * self._gate(self.gate, x)
        if before:
            return self._after(branch + residual)
        return self._after(branch) + residual

    def output(self, x: Tensor) -> Tensor:
        """A(x) alone: what a fusion attends over."""
        return self._skip_sequences(self._branch(x, None, 0.0))

    def _branch(self, x: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
        if self.norm_before is not None:
            x = _layer_norm(self.norm_before, x)
        return ops.bottleneck(
            x,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            activation=self.config.activation,
            scaling=self.scale,
            residual=residual,
            dropout_p=dropout_p,
            training=self.training,
        )

    def _after(self, y: Tensor) -> Tensor:
        return y if self.norm_after is None else _layer_norm(self.norm_after, y)

    def _drops_sequences(self) -> bool:
        config = self.config
        return self.training and config.stochastic_depth > 0 and not config.is_parallel

    def _skip_sequences(self, branch: Tensor) -> Tensor:
        if not self._drops_sequences():
            return branch
        keep = 1 - self.config.stochastic_depth
        shape = (branch.shape[0], *[1] * (branch.dim() - 1))
        return branch * (torch.rand(shape, device=branch.device) < keep).to(branch.dtype) / keep

    def _gate(self, gate: nn.Linear, x: Tensor) -> Tensor:
        """The mean over a sequence of the gate, [B, 1, 1]; padding counts, as in adapters."""
        logits = functional.linear(x.to(gate.weight.dtype), gate.weight, gate.bias)
        return torch.sigmoid(logits).mean(dim=-2, keepdim=True).to(x.dtype)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In the weight's dtype: PEFT keeps it in fp32 where the model is not."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def groupable(adapters: Sequence[BottleneckAdapter]) -> bool:
    """Whether one grouped call of the op can serve them, each on its own rows."""
    head = adapters[0]
    return all(
        a.plain
        and a.down.weight.shape == head.down.weight.shape
        and a.down.weight.dtype == head.down.weight.dtype
        and a.config.activation == head.config.activation
        and a.config.dropout == head.config.dropout
        for a in adapters
    )


def grouped(
    adapters: Sequence[BottleneckAdapter], x: Tensor, residual: Tensor, sizes: Sequence[int]
) -> Tensor:
    """What adapters that are `groupable` give: the i-th for sizes[i] sequences of x [B, T, H]."""
    length = x.shape[1:-1].numel()
    return ops.bottleneck(
        x,
        torch.stack([a.down.weight for a in adapters]),
        torch.stack([a.down.bias for a in adapters]),
        torch.stack([a.up.weight for a in adapters]),
        torch.stack([a.up.bias for a in adapters]),
        activation=adapters[0].config.activation,
        scaling=_scales([a.scale for a in adapters], x),
        residual=residual,
        dropout_p=adapters[0].config.dropout,
        training=adapters[0].training,
        rows=[size * length for size in sizes],
    )


def _scales(scales: Sequence[float | Tensor], x: Tensor) -> float | Tensor:
    """One scaling for all where they are one number, else [G, 1] or [G, H]."""
    numbers = [s for s in scales if not isinstance(s, Tensor)]
    if len(numbers) == len(scales) and len(set(numbers)) == 1:
        return float(numbers[0])
    width = max(s.numel() if isinstance(s, Tensor) else 1 for s in scales)
    rows = [
        s.expand(width)
        if isinstance(s, Tensor)
        else torch.full((width,), float(s), device=x.device, dtype=torch.float32)
        for s in scales
    ]
    return torch.stack(rows)
