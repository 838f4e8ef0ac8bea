"""Methods by PEFT's interface: bottleneck adapters and what is built on them, and prompts.

Importing this registers them with PEFT.
"""

from fusetune.methods import _peft
from fusetune.methods.bitfit.config import BitFitConfig
from fusetune.methods.bottleneck.architectures import (
    Architecture,
    Layers,
    Location,
    register_architecture,
)
from fusetune.methods.bottleneck.compose import compose
from fusetune.methods.bottleneck.composition import (
    Average,
    BatchSplit,
    Fuse,
    Parallel,
    Split,
    Stack,
)
from fusetune.methods.bottleneck.config import BottleneckConfig
from fusetune.methods.bottleneck.fusion import fusion_regularization
from fusetune.methods.bottleneck.fusion_config import AdapterFusionConfig
from fusetune.methods.bottleneck.madx_config import MadXConfig
from fusetune.methods.prompts.deep_config import PrefixTuningConfig, PTuningV2Config
from fusetune.methods.prompts.shallow_config import PromptTuningConfig, PTuningConfig

_peft.register()

__all__ = [
    "AdapterFusionConfig",
    "Architecture",
    "Average",
    "BatchSplit",
    "BitFitConfig",
    "BottleneckConfig",
    "Fuse",
    "Layers",
    "Location",
    "MadXConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "Parallel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Split",
    "Stack",
    "compose",
    "fusion_regularization",
    "register_architecture",
]
