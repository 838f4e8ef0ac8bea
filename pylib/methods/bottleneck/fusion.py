"""AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): attention over the outputs of adapters.

At every token q . k_i weighs the outputs u_i of N trained adapters; only this attention is trained
in the second stage. One module for each location; the attention itself is ops.adapter_fusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fusetune import ops

Tensor = torch.Tensor

INIT_STD = 0.02
OFF_DIAGONAL = 1e-6  # of the value matrix at first, whose diagonal is 1
REGULARIZATION = 0.01  # times ||I - W_v||_F^2

# The temperature of `temperature=True`, as in adapters: 50 in the first forward in training, then
# 0.05 less each time, down to 1.
FIRST_TEMPERATURE, TEMPERATURE_STEP, LAST_TEMPERATURE = 50.0, 0.05, 1.0


class AdapterFusion(nn.Module):
    """One fusion at one location, of any number of adapters.

        out = residual + sum_i p_i u_i W_v^T           p = softmax_i(drop(q_i . k_i) / temperature)
        q = query W_q^T + b_q                          k_i = u_i W_k^T + b_k

    hidden_size: H. query, key, value: whether there are these projections. residual_before: the
    residual is added to each u_i, for keys and values alike, and not to the result. temperature: a
    number; True: the schedule, whose state is the buffer `steps`, saved with the weights; False: 1.
    """

    steps: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        query: bool = True,
        key: bool = True,
        value: bool = True,
        value_initialized: bool = True,
        residual_before: bool = False,
        regularization: bool = True,
        temperature: bool | float = False,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.residual_before = residual_before
        self.regularized = regularization and value
        self.scheduled = temperature is True
        self.temperature = 1.0 if isinstance(temperature, bool) else float(temperature)
        self.dropout_p = dropout_p
        self.query = _projection(hidden_size) if query else None
        self.key = _projection(hidden_size) if key else None
        self.value = nn.Linear(hidden_size, hidden_size, bias=False) if value else None
        if self.value is not None:
            _init_value(self.value.weight, value_initialized)
        if self.scheduled:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self, query: Tensor, outputs: Sequence[Tensor], residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """query, residual and N outputs u_i: [..., H] -> out [..., H], p [..., N] (no gradient)."""
        if self.residual_before and residual is not None:
            outputs = [output + residual for output in outputs]
            residual = None
        query_weight, query_bias = _weight_and_bias(self.query)
        key_weight, key_bias = _weight_and_bias(self.key)
        if key_weight is not None and key_bias is not None and key_bias.requires_grad:
            # The softmax cancels the key's bias. Its gradient is zero, but there has to be one:
            # DistributedDataParallel waits for that of every parameter.
            key_weight = key_weight + 0 * key_bias.unsqueeze(1)
        if self.scheduled:
            # Divided out of the query, not passed to the op: a tensor's value is not known here
            # without waiting for its device, and a new constant each step would compile anew.
            temperature = self.current_temperature()
            if query_weight is None:
                query = query / temperature.to(query.dtype)
            else:
                query_weight = query_weight / temperature
                query_bias = None if query_bias is None else query_bias / temperature
        return ops.adapter_fusion(
            query,
            outputs,
            query_weight,
            query_bias,
            key_weight,
            key_bias,
            None if self.value is None else self.value.weight,
            temperature=self.temperature,
            dropout_p=self.dropout_p,
            training=self.training,
            residual=residual,
            return_attention=True,
        )

    def current_temperature(self) -> Tensor:
        """The temperature of the latest forward in training, fp32, of no dimension."""
        if not self.scheduled:
            return torch.tensor(self.temperature)
        done = (self.steps - 1).clamp(min=0)
        return (FIRST_TEMPERATURE - TEMPERATURE_STEP * done).clamp(min=LAST_TEMPERATURE)

    def step(self) -> None:
        """Moves the schedule on by one forward in training; in evaluation it stays.

        For the model to call at its entry, not part of forward: under gradient checkpointing a
        layer runs twice in a step, and both times must give the same.
        """
        if self.scheduled and self.training:
            self.steps.add_(1)

    def regularization(self) -> Tensor:
        """0.01 ||I - W_v||_F^2, which draws the value matrix to the identity; fp32, 0-dim."""
        if self.value is None:
            raise ValueError("this fusion has no value matrix to regularise (value=False)")
        weight = self.value.weight
        identity = torch.eye(len(weight), device=weight.device, dtype=weight.dtype)
        return REGULARIZATION * (identity - weight).float().square().sum()


def fusion_regularization(model: nn.Module) -> Tensor:
    """The sum of `AdapterFusion.regularization()` over what is trained in a model.

    For fusions with `regularization` whose value matrices require a gradient; zero without any.
    Add it to the loss of every step: `loss = model(**batch).loss + fusion_regularization(model)`.
    """
    terms = [
        module.regularization()
        for module in model.modules()
        if isinstance(module, AdapterFusion)
        and module.regularized
        and module.value is not None
        and module.value.weight.requires_grad
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _projection(hidden_size: int) -> nn.Linear:
    layer = nn.Linear(hidden_size, hidden_size)
    nn.init.normal_(layer.weight, std=INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer


def _init_value(weight: Tensor, as_identity: bool) -> None:
    if not as_identity:
        nn.init.normal_(weight, std=INIT_STD)
        return
    with torch.no_grad():
        weight.fill_(OFF_DIAGONAL).fill_diagonal_(1.0)


def _weight_and_bias(layer: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if layer is None else (layer.weight, layer.bias)
