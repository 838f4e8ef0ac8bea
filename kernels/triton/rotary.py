"""Rotary position embedding of queries and keys, in one launch each way.

Tiling: a program takes one token and a block of its heads, of the queries or of the keys, both
halves of each in registers; cos and sin are read once for all heads of the block.

Bytes, for T tokens of H heads in all of D elements of o bytes: T H D o read and as many written,
2 T D o' of cos and sin for each block of heads.

Products and sums are rounded one by one, as PyTorch's operators round them: in fp32 the numbers are
the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 1024  # pairs that a program turns at once


@triton.jit
def _turn(
    x,
    out,
    cos,
    sin,
    place,
    first,
    heads,
    HALF,
    stride,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A block of heads of one token: x at its first head, out at the first of all tokens."""
    head, pair = first + tl.arange(0, HEADS), tl.arange(0, PAIRS)
    c1 = tl.load(cos + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    inside = (head < heads)[:, None] & (pair < HALF)[None, :]
    source = x + head.to(tl.int64)[:, None] * stride + pair[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    target = out + (place * heads + head)[:, None] * 2 * HALF + pair[None, :]
    tl.store(target, y1.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, y2.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    query,
    key,
    cos,
    sin,
    out_query,
    out_key,
    T,
    HEADS_Q,
    HEADS_K,
    HALF,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    table_batch,
    BLOCKS_Q: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    place, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = place // T, place % T
    cos += b * table_batch + t * 2 * HALF
    sin += b * table_batch + t * 2 * HALF
    if block < BLOCKS_Q:
        x, first = query + b * q_batch + t * q_token, block * HEADS
        _turn(
            *(x, out_query, cos, sin, place, first, HEADS_Q, HALF, q_head),
            *(TRANSPOSED, HEADS, PAIRS),
        )
    else:
        x, first = key + b * k_batch + t * k_token, (block - BLOCKS_Q) * HEADS
        _turn(
            *(x, out_key, cos, sin, place, first, HEADS_K, HALF, k_head),
            *(TRANSPOSED, HEADS, PAIRS),
        )


def launch_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, Hq, T, D] and key [B, Hkv, T, D] turned, in new tensors that lie by tokens.

    Both of one dtype, fp32, fp16 or bf16, their heads contiguous; cos and sin: [1 or B, T, D] of
    one dtype of these, contiguous.
    """
    batch, heads_q, tokens, dim = query.shape
    heads_k = key.shape[1]
    out_q, out_k = (
        torch.empty(batch, tokens, x.shape[1], dim, dtype=x.dtype, device=x.device).transpose(1, 2)
        for x in (query, key)
    )
    if batch * tokens * dim == 0 or heads_q + heads_k == 0:
        return out_q, out_k
    pairs = triton.next_power_of_2(dim // 2)
    heads = min(triton.next_power_of_2(max(heads_q, heads_k)), max(1, _TILE // pairs))
    blocks = triton.cdiv(heads_q, heads)
    _rotary[(batch * tokens, blocks + triton.cdiv(heads_k, heads))](
        query,
        key,
        cos,
        sin,
        out_q,
        out_k,
        tokens,
        heads_q,
        heads_k,
        dim // 2,
        *query.stride()[:3],
        *key.stride()[:3],
        0 if len(cos) == 1 else tokens * dim,
        BLOCKS_Q=blocks,
        TRANSPOSED=transposed,
        HEADS=heads,
        PAIRS=pairs,
        num_warps=max(1, min(4, heads * pairs // 128)),
        enable_fp_fusion=False,
    )
    return out_q, out_k
