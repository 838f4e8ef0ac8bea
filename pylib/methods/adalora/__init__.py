"""What PEFT's AdaLoRA leaves to the user: the allocation of ranks in training, and dropping them.

Layers: fusetune.integrations.peft_adalora. Paper: Zhang et al. 2023, arXiv:2303.10512.
"""

from fusetune.methods.adalora.allocator import update_and_allocate
from fusetune.methods.adalora.compact import compact

__all__ = ["compact", "update_and_allocate"]
