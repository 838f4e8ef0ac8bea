"""What describes a prompt to PEFT, and is written to adapter_config.json: what all kinds share.

One PEFT type for all kinds, since PEFT refuses a model with several; `kind` says which class a file
is of. A kind registers itself: `@prompt_kind` on a dataclass that derives from PromptConfig and
sets the default of `kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig

from fusetune.methods._kinds import class_of

PEFT_TYPE = "PROMPTS"
KINDS: dict[str, type[PromptConfig]] = {}


def prompt_kind(cls: type[PromptConfig]) -> type[PromptConfig]:
    """Class decorator: files of the class's `kind` are read as this class."""
    KINDS[cls.kind] = cls
    return cls


@dataclass
class PromptConfig(PeftConfig):
    """What all kinds share. `PromptConfig(kind=..., ...)` makes one of that kind.

    num_virtual_tokens: P, how many positions are trained.
    tokenizer_name_or_path: whose tokens texts are cut into, where a config has texts.
    modules_to_save: as in PEFT, names of modules that are trained and saved with the prompt.
    """

    kind: str = ""
    num_virtual_tokens: int | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    # PEFT reads it; there is one place for prompts in a model.
    target_modules: ClassVar[None] = None
    # Whether the prompt is keys and values of every layer; else it is input embeddings.
    deep: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> PromptConfig:
        if cls is not PromptConfig:
            return super().__new__(cls)
        return super().__new__(class_of(KINDS, "", kwargs))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # A file's: it holds the prompt itself, whatever it was trained through, and needs neither
        # the encoder nor what the prompt began as. PEFT clears inference_mode to train further.
        self.trained = self.inference_mode

    @property
    def length(self) -> int:
        """P, of a checked config."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens

    def _check_length(self) -> None:
        count = self.num_virtual_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"num_virtual_tokens must be a positive integer, got {count!r}")

    def _check_one_of(self, name: str, allowed: Sequence[Any]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def _check_probability(self, name: str) -> None:
        if not 0 <= getattr(self, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def _check_size(self, name: str) -> None:
        size = getattr(self, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")

    def _check_needs(self, needing: str, *names: str) -> None:
        """One of `names` must be given, and a text also says whose tokens it is cut into."""
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{needing} needs one of {names}, got {given or 'none'}")
        if not given[0].endswith("_ids") and self.tokenizer_name_or_path is None:
            raise ValueError(f"{needing} with {given[0]} needs tokenizer_name_or_path")
