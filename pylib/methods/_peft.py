"""Makes the methods known to PEFT, by string keys in its tables.

PEFT's own function for it takes names of its enumeration only.
"""

from __future__ import annotations

from typing import Any

from peft import mapping
from peft.tuners.tuners_utils import BaseTuner

from fusetune.methods.bitfit.config import PEFT_TYPE as BITFIT
from fusetune.methods.bitfit.config import BitFitConfig
from fusetune.methods.bitfit.model import BitFitModel
from fusetune.methods.bottleneck.config import PEFT_TYPE, AdapterConfig
from fusetune.methods.bottleneck.model import BottleneckModel
from fusetune.methods.prompts.config import PEFT_TYPE as PROMPTS
from fusetune.methods.prompts.config import PromptConfig
from fusetune.methods.prompts.model import PromptModel


def register() -> None:
    """Enters the methods into PEFT's tables. Raises ImportError for a PEFT that is too old."""
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise ImportError("fusetune's methods need peft 0.21 or newer: pip install -U peft")
    tables: Any = mapping  # their keys are typed as PEFT's enumeration, whose members are strings
    methods = (
        (PEFT_TYPE, AdapterConfig, BottleneckModel),
        (PROMPTS, PromptConfig, PromptModel),
        (BITFIT, BitFitConfig, BitFitModel),
    )
    for name, config, tuner in methods:
        tables.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        tables.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
        tables.PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix
