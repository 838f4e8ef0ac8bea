"""What describes an adapter to PEFT, and is written to adapter_config.json.

One PEFT type for all kinds, since PEFT refuses a model with several; `kind` says which class a file
is of. A kind registers itself: `@adapter_kind` on a dataclass that derives from AdapterConfig and
sets the default of `kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from fusetune.methods._kinds import class_of
from fusetune.ops.bottleneck import ACTIVATIONS

PEFT_TYPE = "BOTTLENECK"
KINDS: dict[str, type[AdapterConfig]] = {}
# Other names of activations, those of transformers and of adapters.
_SYNONYMS = {"swish": "silu", "linear": "identity", "gelu_pytorch_tanh": "gelu_new"}
_INITS = ("bert", "mam_adapter", "houlsby")


def adapter_kind(cls: type[AdapterConfig]) -> type[AdapterConfig]:
    """Class decorator: files of the class's `kind` are read as this class."""
    KINDS[cls.kind] = cls
    return cls


@dataclass
class AdapterConfig(PeftConfig):
    """What all kinds share. `AdapterConfig(kind=..., ...)` makes one of that kind.

    modules_to_save: as in PEFT, names of modules that are trained and saved with the adapter.
    """

    kind: str = "bottleneck"
    modules_to_save: list[str] | None = None
    # PEFT reads it; where adapters go is decided by the architecture, not by names of modules.
    target_modules: ClassVar[None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        if cls is not AdapterConfig:
            return super().__new__(cls)
        return super().__new__(class_of(KINDS, "bottleneck", kwargs))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def prepare(self, model_config: dict[str, Any]) -> None:
        """Called before injection with the model's config: fills in what depends on it."""

    def make_coupling(self, hidden_size: int) -> nn.Module | None:
        """The invertible block at the embeddings, with `forward` and `inverse`; None: none."""
        return None

    def make_fusion(self, hidden_size: int) -> nn.Module | None:
        """For a fusion: the module of one location; None: this is no fusion."""
        return None


@adapter_kind
@dataclass
class BottleneckConfig(AdapterConfig):
    """A bottleneck adapter, with the options of the library `adapters` by their names.

    With h the output of a sub-layer, r its residual input and LN the LayerNorm that closes it (none
    in models that normalise before a sub-layer), f the activation and s the scaling:

        A(x) = s (W_u f(W_d x + b_d) + b_u)
        default              LN(A(h) + h + r)
        original_ln_before   LN(A(LN(h + r)) + h + r)
        is_parallel          LN(A(r) + h + r)

    Args:
        mh_adapter, output_adapter, cross_adapter: adapters after attention, after the feed-forward
            network, after cross-attention.
        reduction_factor: the hidden size over the bottleneck's; a number, or one for each layer:
            {"0": 8, "default": 16}.
        non_linearity: f, one of `fusetune.ops.bottleneck.ACTIVATIONS`, or "swish".
        original_ln_before: the input goes through LN(h + r) first (h + r without LN).
        original_ln_after: the result does; False: the sub-layer ends with the adapter's result.
        residual_before_ln: what is added to A: True h; "post_add" h + r; False LN(h + r).
        ln_before, ln_after: LayerNorms of the adapter's own, on its input and on its result;
        adapter_residual_before_ln: the residual is added before the latter.
        is_parallel: the input is r.
        scaling: a number, "learned" (one) or "channel" (one for each feature).
        use_gating: A is multiplied by the mean over a sequence of sigmoid(w_g x + b_g).
        dropout: probability, on A. stochastic_depth: probability that a sequence skips A.
        init_weights: "bert": normal, 0.02; "houlsby": truncated normal, 0.01, so near identity;
            "mam_adapter": W_u is zero, so identity. init_weights_seed: makes it reproducible.
        leave_out: numbers of layers without adapters (encoder first, then decoder).
        train_layer_norm: the model's own norms are trained and saved too.
        architecture: where a model's sub-layers are, as `architectures.Architecture` by a dict;
            None: by the model's type.
    """

    kind: str = "bottleneck"
    mh_adapter: bool = True
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | dict[str, float] = 16.0
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    leave_out: list[int] = field(default_factory=list)
    train_layer_norm: bool = False
    architecture: dict[str, Any] | None = None

    @classmethod
    def houlsby(cls, **changes: Any) -> BottleneckConfig:
        """Houlsby et al. 2019: after attention and feed-forward; LayerNorms are trained."""
        defaults = {"non_linearity": "gelu", "init_weights": "houlsby", "train_layer_norm": True}
        return cls(**{**defaults, **changes})

    @classmethod
    def pfeiffer(cls, **changes: Any) -> BottleneckConfig:
        """Pfeiffer et al. 2020: after the feed-forward network, between its LayerNorm twice."""
        return cls(**{"mh_adapter": False, "original_ln_before": True, **changes})

    @classmethod
    def parallel(cls, **changes: Any) -> BottleneckConfig:
        """He et al. 2022: beside the feed-forward network, scaled by 4; the identity at first."""
        defaults = {
            "mh_adapter": False,
            "is_parallel": True,
            "reduction_factor": 2.0,
            "scaling": 4.0,
            "init_weights": "mam_adapter",
        }
        return cls(**{**defaults, **changes})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ValueError("one of mh_adapter, output_adapter and cross_adapter must be true")
        self._check_one_of("residual_before_ln", (True, False, "post_add"))
        self._check_one_of("init_weights", _INITS)
        if self.activation not in ACTIVATIONS:
            known = (*ACTIVATIONS, *_SYNONYMS)
            raise ValueError(f"non_linearity must be one of {known}, got {self.non_linearity!r}")
        if isinstance(self.scaling, str):
            self._check_one_of("scaling", ("learned", "channel"))
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError('residual_before_ln="post_add" needs original_ln_before=True')
        self._check_reduction()

    @property
    def activation(self) -> str:
        """The op's name of the non-linearity."""
        name = self.non_linearity.lower()
        return _SYNONYMS.get(name, name)

    @property
    def needs_residual(self) -> bool:
        """Whether r is read, and not only added by the model."""
        return self.is_parallel or self.original_ln_before or not self.original_ln_after

    def bottleneck_size(self, hidden_size: int, layer: int) -> int:
        """d of a layer, at least 1. Raises ValueError for a layer without a reduction factor."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            if str(layer) not in factor and "default" not in factor:
                raise ValueError(f'reduction_factor has neither layer "{layer}" nor "default"')
            factor = factor.get(str(layer), factor.get("default", 1.0))
        return max(1, int(hidden_size // factor))

    def _check_one_of(self, name: str, allowed: Sequence[Any]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def _check_reduction(self) -> None:
        factor = self.reduction_factor
        if isinstance(factor, dict):
            self.reduction_factor = factor = {str(key): value for key, value in factor.items()}
        values = factor.values() if isinstance(factor, dict) else (factor,)
        if not all(isinstance(value, int | float) and value > 0 for value in values):
            raise ValueError(f"reduction_factor must be positive, got {self.reduction_factor}")
