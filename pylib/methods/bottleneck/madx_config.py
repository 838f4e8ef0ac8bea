"""The config of MAD-X's language adapters: a bottleneck adapter with an invertible block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fusetune.methods.bottleneck.config import BottleneckConfig, adapter_kind
from fusetune.methods.bottleneck.coupling import COUPLINGS


@adapter_kind
@dataclass
class MadXConfig(BottleneckConfig):
    """MAD-X (Pfeiffer et al. 2020, arXiv:2005.00052): the adapter of a language.

    A Pfeiffer adapter of half the hidden size, and an invertible block: on the embeddings before
    the first layer, and backwards before the output embedding. In a composition the block of the
    leftmost adapter is used:

        model = get_peft_model(model, MadXConfig(), "en")    # language, with a language model
        model.add_adapter("task", MadXConfig.task())         # task, with the language frozen
        fusetune.compose(model, Stack("en", "task"))
        fusetune.compose(model, Stack("qu", "task"))         # another language, at test time

    Args:
        inv_adapter: "nice" (the paper's) or "glow", see coupling.py.
        inv_adapter_reduction_factor: half the hidden size over the hidden size of the block's
            networks.
        Others as in BottleneckConfig.
    """

    kind: str = "madx"
    mh_adapter: bool = False
    original_ln_before: bool = True
    reduction_factor: float | dict[str, float] = 2.0
    inv_adapter: str = "nice"
    inv_adapter_reduction_factor: float = 2.0

    @classmethod
    def houlsby(cls, **changes: Any) -> BottleneckConfig:
        """The placements of Houlsby et al. 2019, with an invertible block."""
        return super().houlsby(**{"mh_adapter": True, "original_ln_before": False, **changes})

    @classmethod
    def parallel(cls, **changes: Any) -> BottleneckConfig:
        """The placement of He et al. 2022, with an invertible block."""
        return super().parallel(**{"original_ln_before": False, **changes})

    @staticmethod
    def task(**changes: Any) -> BottleneckConfig:
        """The task's adapter, that is stacked on a language's: Pfeiffer's."""
        return BottleneckConfig.pfeiffer(**changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_of("inv_adapter", tuple(COUPLINGS))
        factor = self.inv_adapter_reduction_factor
        if not isinstance(factor, int | float) or factor <= 0:
            raise ValueError(f"inv_adapter_reduction_factor must be positive, got {factor!r}")

    def make_coupling(self, hidden_size: int) -> nn.Module:
        make = COUPLINGS[self.inv_adapter]
        return make(hidden_size, self.inv_adapter_reduction_factor, self.activation)
