"""What describes a BitFit adapter to PEFT, and is written to adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig

PEFT_TYPE = "BITFIT"
SUBSETS = ("all", "bq_bm2")


@dataclass
class BitFitConfig(PeftConfig):
    """Bias terms alone are trained (Ben Zaken et al. 2022, arXiv:2106.10199, section 3).

    Args:
        subset: which biases.
            "all": those of every layer of the encoder or decoder, LayerNorms' included; not the
            head's, which the paper trains whole: `modules_to_save`.
            "bq_bm2": the paper's two that do nearly as well, half of all: those of the queries
            (b_q) and of the middle of the MLP (b_m2: the projection to the intermediate size).
            A list: names of modules. A name stands for the module of that path and for all whose
            path ends with it; it may be a regular expression for the whole path.
        modules_to_save: as in PEFT, names of modules that are trained and saved with the adapter.
    """

    subset: str | list[str] = "all"
    modules_to_save: list[str] | None = None
    # PEFT reads it; which modules are meant is decided by `subset`.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.subset, str):
            if self.subset not in SUBSETS:
                raise ValueError(
                    f"subset must be one of {SUBSETS} or a list of modules' names, "
                    f"got {self.subset!r}"
                )
            return
        self.subset = list(self.subset)
        if not self.subset or not all(isinstance(name, str) for name in self.subset):
            raise ValueError(
                f"subset must be one of {SUBSETS} or a list of modules' names, got {self.subset!r}"
            )
