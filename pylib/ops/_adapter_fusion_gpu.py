"""fusion_attend on a GPU, by Triton: one launch each way.

Rows longer than a program holds in registers (MOST_COLS) are torch's, as the reference does them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.ops import _triton
from fusetune.ops._registry import Impl
from fusetune.reference import adapter_fusion as reference

Tensor = torch.Tensor


def _forward(
    g: Tensor,
    values: Sequence[Tensor],
    offset: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from fusetune._triton.adapter_fusion import MOST_COLS, launch_fusion_attend

    if g.shape[1] > MOST_COLS:
        return reference.fusion_attend(g, values, offset, temperature, dropout_p, seed)
    offset = None if offset is None else offset.float().contiguous()
    mask = _triton.mask(dropout_p, seed)
    with _triton.on(g.device):
        return launch_fusion_attend(g, values, offset, temperature, seed, **mask)


def _backward(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dvalues: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    from fusetune._triton.adapter_fusion import MOST_COLS
    from fusetune._triton.adapter_fusion_backward import launch_fusion_attend_backward

    if g.shape[1] > MOST_COLS:
        return reference.fusion_attend_backward(
            dctx, g, values, p, temperature, dropout_p, seed, need_dvalues
        )
    mask, p = _triton.mask(dropout_p, seed), p.contiguous()
    with _triton.on(g.device):
        return launch_fusion_attend_backward(
            dctx, g, values, p, temperature, need_dvalues, seed, **mask
        )


GPU_FORWARD = Impl("triton", _forward, _triton.supports_mixed, 20)
GPU_BACKWARD = Impl("triton", _backward, _triton.supports_mixed, 20)
