"""The main job from end to end: QLoRA with the stock stack, then the same fused.

`run(Settings())` is what `fusetune demo` calls.
"""

from .job import Interrupted, Settings, run

__all__ = ["Interrupted", "Settings", "run"]
