"""The config of an AdapterFusion: what is fused, and how its attention is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fusetune.methods.bottleneck.config import AdapterConfig, adapter_kind
from fusetune.methods.bottleneck.fusion import AdapterFusion

# Where the models' configs have the dropout of their attention.
_MODEL_DROPOUTS = (
    "attention_probs_dropout_prob",
    "attention_dropout",
    "attn_pdrop",
    "dropout_rate",
)


@adapter_kind
@dataclass
class AdapterFusionConfig(AdapterConfig):
    """AdapterFusion (Pfeiffer et al. 2021), with the options of the library `adapters`.

    An adapter of this config is a fusion of adapters that the model has; while it is active, only
    the fusion is trained. By custom its name is theirs with commas, "a,b".

        out = residual + sum_i p_i W_v u_i
        p = softmax_i(drop((W_q q + b_q) . (W_k u_i + b_k)) / T)

    u_i is what adapter i computes, without its residual; q is the input of the last one.

    Args:
        adapters: names of the adapters, in order.
        query, key, value: whether there are W_q and b_q, W_k and b_k, W_v.
        query_before_ln: q is the sub-layer's output h, not the adapters' input, LN(h + r).
        residual_before: the residual is added to each u_i and not to the sum.
        temperature: T, a number; False: 1; True: 50 in the first forward in training, 0.05 less in
            each one after it, down to 1. How far it is, is saved with the weights.
        value_initialized: W_v is the identity at first (1e-6 off the diagonal), else as W_q.
        regularization: `fusion_regularization` counts this fusion.
        value_before_softmax: whether u_i or the sum is multiplied by W_v. The result is the same,
            since W_v has no bias; here it is always the sum.
        dropout_prob: of the scores. None: as the model's attention has it.
    """

    kind: str = "fusion"
    adapters: list[str] = field(default_factory=list)
    query: bool = True
    key: bool = True
    value: bool = True
    query_before_ln: bool = False
    residual_before: bool = False
    temperature: bool | float = False
    value_initialized: bool = True
    regularization: bool = True
    value_before_softmax: bool = True
    dropout_prob: float | None = None

    @classmethod
    def dynamic(cls, adapters: list[str], **changes: Any) -> AdapterFusionConfig:
        """With a value matrix, as in the paper: the defaults."""
        return cls(adapters=adapters, **changes)

    @classmethod
    def static(cls, adapters: list[str], **changes: Any) -> AdapterFusionConfig:
        """Without a value matrix: the result is a mean of the adapters' outputs."""
        defaults = {"value": False, "value_initialized": False, "regularization": False}
        return cls(adapters=adapters, **{**defaults, **changes})

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.adapters
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"adapters must be a list of names, got {names!r}")
        self.adapters = list(names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"adapters must be one or more different names, got {names}")
        if not isinstance(self.temperature, bool) and not self.temperature > 0:
            raise ValueError(f"temperature must be True, False or positive, got {self.temperature}")
        if self.dropout_prob is not None and not 0 <= self.dropout_prob < 1:
            raise ValueError(f"dropout_prob must be in [0, 1), got {self.dropout_prob}")
        self._model_dropout = 0.0

    def prepare(self, model_config: dict[str, Any]) -> None:
        super().prepare(model_config)
        found = (model_config.get(name) for name in _MODEL_DROPOUTS)
        self._model_dropout = next((float(p) for p in found if p is not None), 0.0)

    def make_fusion(self, hidden_size: int) -> nn.Module:
        # A 0.0 that is given is meant, and not a missing value.
        p = self._model_dropout if self.dropout_prob is None else self.dropout_prob
        return AdapterFusion(
            hidden_size,
            query=self.query,
            key=self.key,
            value=self.value,
            value_initialized=self.value_initialized,
            residual_before=self.residual_before,
            regularization=self.regularization,
            temperature=self.temperature,
            dropout_p=p,
        )
