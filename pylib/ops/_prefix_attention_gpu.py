"""prefix_attend on a GPU, by Triton: one launch forward, one backward and one that sums its shares.

What an implementation is given, and in which order, is what reference/prefix_attention.py says.
Tensors of [B, H, T, D] and prefixes have contiguous elements in their last dimension and any other
strides; lse is contiguous. The result is written over base_out and base_lse, and a dquery that is
given is added to in place: the caller gives them up. Heads of more elements than a program holds
(MOST_DIMS) are torch's, as the reference does them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.ops import _triton
from fusetune.ops._registry import Impl
from fusetune.reference import prefix_attention as reference
from fusetune.reference.prefix_attention import Options

if TYPE_CHECKING:
    from fusetune._triton._prefix import Options as LaunchOptions

Tensor = torch.Tensor


def _launch_options(options: Options) -> LaunchOptions:
    from fusetune._triton._prefix import Options as LaunchOptions

    bias, rows, lengths, scale, window, position, dropout_p, seed = options
    return LaunchOptions(
        bias if bias is None or bias.dtype in _triton.DTYPES else bias.float(),
        None if rows is None else rows.contiguous(),
        None if lengths is None else lengths.contiguous(),
        *(scale, window, position, seed),
        **_triton.mask(dropout_p, seed),
    )


def _forward(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    base_out: Tensor,
    base_lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    from fusetune._triton.prefix_attention import MOST_DIMS, launch_prefix_attend

    if query.shape[-1] > MOST_DIMS:
        prefix = prefix_key, prefix_value
        return reference.prefix_attend(query, *prefix, base_out, base_lse, options)
    lse, arch = base_lse.contiguous(), _triton.capability(query.device)
    with _triton.on(query.device):
        launch_prefix_attend(
            *(query, prefix_key, prefix_value, base_out, lse), _launch_options(options), arch=arch
        )
    return base_out, lse


def _backward(
    dout: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    dquery: Tensor | None,
    need_dquery: bool,
    need_dprefix: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from fusetune._triton.prefix_attention import MOST_DIMS
    from fusetune._triton.prefix_attention_backward import launch_prefix_attend_backward

    tensors = dout, query, prefix_key, prefix_value, out, lse
    wanted = dquery, need_dquery, need_dprefix
    if query.shape[-1] > MOST_DIMS:
        return reference.prefix_attend_backward(*tensors, options, *wanted)
    if not (need_dquery or need_dprefix):
        return None, None, None
    arch = _triton.capability(query.device)
    with _triton.on(query.device):
        return launch_prefix_attend_backward(*tensors, _launch_options(options), *wanted, arch=arch)


GPU_FORWARD = (Impl("triton", _forward, _triton.supports_mixed, 20),)
GPU_BACKWARD = (Impl("triton", _backward, _triton.supports_mixed, 20),)
