"""Saved tensors whose memory a backward pass may write over: nobody else reads them afterwards."""

from __future__ import annotations

import sys
from typing import Any

import torch

_autograd: Any = torch._C._autograd
_count: Any = getattr(torch._C, "_storage_Use_Count", None)
# None of these is public: where a torch lacks one, nothing is written over.
_KNOWN = _count is not None and all(
    hasattr(_autograd, name)
    for name in ("_top_saved_tensors_default_hooks", "_get_current_graph_task_keep_graph")
)


def hooked() -> bool:
    """Whether what is saved now goes through hooks (checkpointing, offloading), which may keep it.

    To be asked in the forward pass; `owned` holds only where it is False.
    """
    return not _KNOWN or _autograd._top_saved_tensors_default_hooks(False) is not None


def owned(saved: torch.Tensor) -> bool:
    """Whether a tensor saved for the backward pass that runs now is that pass's alone.

    The graph is not kept for another pass, and nothing else holds the memory: no output that the
    caller kept, no view of it, no other node's saved tensor. It has to be saved detached, as views
    keep their base alive, which hides who else does.
    """
    if _autograd._get_current_graph_task_keep_graph() or not saved.is_contiguous():
        return False
    return _holders(saved) == _ALONE


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """References to the storage: of tensors, and of the one Python object that it may have."""
    storage = tensor.untyped_storage()
    return _count(storage._cdata), sys.getrefcount(storage)


_ALONE = _holders(torch.empty(1, device="cpu")) if _KNOWN else None
