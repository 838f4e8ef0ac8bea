"""The main job from end to end: QLoRA with the stock stack, then the same fused.

`run(Settings())` is what `fusetune demo` calls.
"""

from .job import Settings, run

__all__ = ["Settings", "run"]
