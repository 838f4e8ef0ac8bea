"""How the kernels of prefixes and prompts are called at given sizes: cases of gpu_kernels.py."""

from __future__ import annotations

import torch

from benchmarks.gpu_launches import DROPOUT, Sizes, fp32, half
from fusetune.reference.dropout import threshold_and_scale

BATCH, HEADS, HEADS_KV = 2, 6, 2


def prefix_attend(
    sizes: Sizes,
    arch: int,
    backward: bool = False,
    prefix: torch.dtype | None = None,
    dropout: bool = False,
    every: bool = False,
) -> None:
    """m: tokens, n: keys of the prefix, k: elements of a head. every: all options there are."""
    from fusetune._triton._prefix import Options
    from fusetune._triton.prefix_attention import launch_prefix_attend
    from fusetune._triton.prefix_attention_backward import launch_prefix_attend_backward

    t, p, d = sizes
    query, out, dout, dquery = (half(arch, BATCH, t, HEADS, d).transpose(1, 2) for _ in range(4))
    key, value = (half(arch, 1, p, HEADS_KV, d, dtype=prefix) for _ in range(2))
    lse, options = fp32(BATCH, HEADS, t), Options(None, None, None, d**-0.5, 0, 0)
    if every:
        rows, lengths = torch.zeros(BATCH, dtype=torch.int64), torch.tensor([p])
        options = Options(fp32(1, HEADS, t, p), rows, lengths, d**-0.5, t, 3)
    if dropout or every:
        threshold, factor = threshold_and_scale(DROPOUT)
        options = options._replace(seed=torch.tensor([1]), threshold=threshold, factor=factor)
    if not backward:
        launch_prefix_attend(query, key, value, out, lse, options, arch=arch)
        return
    tensors = dout, query, key, value, out, lse
    launch_prefix_attend_backward(*tensors, options, dquery, True, True, arch=arch)


def prompt_embed(sizes: Sizes, arch: int, backward: bool = False) -> None:
    """m: tokens, n: vectors of the prompt, k: the model's width."""
    from fusetune._triton.prompt_embed import launch_dprompt, launch_prompt_embed

    t, p, h = sizes
    if backward:
        launch_dprompt(half(arch, BATCH, p + t, h), None, None, 1, p)
        return
    ids = torch.zeros(BATCH, t, dtype=torch.int64)
    launch_prompt_embed(ids, half(arch, 100, h), half(arch, 1, p, h), None, None, 1.0)
