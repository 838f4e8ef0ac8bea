"""prefix_attend on a GPU: none yet.

What an implementation is given, and in which order, is what reference/prefix_attention.py says.
Tensors of [B, H, T, D] and prefixes have contiguous elements in their last dimension and any other
strides; lse is contiguous. The result may be written over base_out and base_lse, and a dquery that
is given may be added to in place: the caller gives them up.
"""

from __future__ import annotations

from fusetune.ops._registry import Impl

GPU_FORWARD: tuple[Impl, ...] = ()
GPU_BACKWARD: tuple[Impl, ...] = ()
