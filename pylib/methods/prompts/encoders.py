"""What makes a prompt: a trained tensor, or a network over one that is dropped after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


class Encoder(nn.Module):
    """A prompt [P, W]: `weight`, or what `network` makes of `weight` [P, its input's size].

    For a prefix W is [layers, key and value, heads, head_dim], flat, as in PEFT; for input
    embeddings the hidden size.
    """

    def __init__(self, weight: Tensor, network: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.network = network

    def forward(self) -> Tensor:
        if self.network is None:
            return self.weight
        prompt: Tensor = self.network(self.weight)
        return prompt

    @torch.no_grad()
    def evaluated(self) -> Tensor:
        """The prompt, without the dropout of training."""
        training = self.training
        self.eval()
        try:
            return self().detach()
        finally:
            self.train(training)

    def drop_network(self) -> None:
        """From now on the prompt itself is what is trained and saved."""
        if self.network is None:
            return
        weight = nn.Parameter(self.evaluated(), requires_grad=self.weight.requires_grad)
        self.weight, self.network = weight, None


def prefix_mlp(size: int, hidden: int, width: int) -> nn.Sequential:
    """The reparametrisation of prefix tuning: [P, size] -> [P, width]."""
    return nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, width))


def prompt_mlp(size: int, hidden: int) -> nn.Sequential:
    """The MLP of P-tuning as PEFT has it: two hidden layers with ReLU. [P, size] -> [P, size]"""
    return nn.Sequential(
        nn.Linear(size, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, size),
    )


class PromptLSTM(nn.Module):
    """P-tuning's encoder: a bidirectional LSTM over the prompt, then an MLP. [P, size] -> same.

    With hidden = size / 2 the MLP is size, ReLU, size: the paper's.
    """

    def __init__(self, size: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            size,
            hidden,
            num_layers=layers,
            dropout=dropout if layers > 1 else 0.0,
            bidirectional=True,
            batch_first=True,
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, size)
        )

    def forward(self, prompt: Tensor) -> Tensor:
        encoded: Tensor = self.mlp(self.lstm(prompt[None])[0])[0]
        return encoded


def prompt_network(config: Any, size: int) -> nn.Module:
    """The encoder that a PTuningConfig asks for; size: the model's hidden size."""
    if config.encoder_reparameterization_type == "MLP":
        return prompt_mlp(size, config.encoder_hidden_size or size)
    hidden = config.encoder_hidden_size or max(1, size // 2)
    return PromptLSTM(size, hidden, config.encoder_num_layers, config.encoder_dropout)
