"""A 4-bit weight to a dense one, in one launch whatever its statistics are; also with LoRA in it.

Tiling: a program decodes `tiles` tiles of TILE words of eight codes. A thread takes whole words:
16 bytes in, full vectors out. The codebook and, for a nested absmax, the 256 values of its 8-bit
type are read once by a program and looked up with tl.gather, which keeps them in shared memory: 16
neighbouring values lie in 16 banks, so that a look-up never conflicts.

Bytes, for n elements in blocks of b and o bytes of output each: n/2 + n o, and 4 n/b of absmax or,
nested, n/b + 4 n/(256 b). Beside what has to be moved only the tables, 1 kB for each 64 k elements
where n is large: below 1.02 times that.

A nested absmax is a product and then a sum, each rounded, as in bitsandbytes. Kernels whose values
have to equal bitsandbytes' are therefore compiled without fusing the two to an FMA.

`_dequantize_rows` works on whole rows instead and can add scaling B A to them, write scaling B
beside them and sum their squares: see the launchers, and dora_norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusetune._triton._codes import Packed, _block_scale, _decode

TILE = 2048  # words of a tile: 16384 elements
_WARPS = 8
_ROWS, _COLS, _RANKS = 16, 256, 16  # tile of `_dequantize_rows`, and of the rank inside it


@triton.jit
def _dequantize(
    packed,
    codebook,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    out,
    words,
    numel,
    tiles,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    BLOCK_WORDS: tl.constexpr = BLOCK // 8
    BLOCKS: tl.constexpr = TILE // BLOCK_WORDS
    table = tl.load(codebook + tl.arange(0, 16))
    nested_table = tl.load(nested_code + tl.arange(0, 256 if NESTED else 1))
    offset = tl.load(nested_offset)
    block = tl.arange(0, BLOCKS)
    word = block[:, None] * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
    element = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    source = packed.to(tl.pointer_type(tl.int32), bitcast=True)
    first = tl.program_id(0).to(tl.int64) * (tiles * TILE)
    for _ in range(tiles):
        left = tl.minimum(words - first, TILE).to(tl.int32)
        valid = word < left
        w = tl.load(source + first + word, mask=valid, other=0)
        scale = _block_scale(
            absmax,
            nested_absmax,
            nested_table,
            offset,
            first // BLOCK_WORDS + block,
            block * BLOCK_WORDS < left,
            NESTED,
            NESTED_BLOCK,
        )
        values = _decode(w, table, BLOCKS, BLOCK_WORDS) * scale[:, None, None]
        target = out + first * 8 + element
        tl.store(target, values.to(out.dtype.element_ty), mask=valid[:, :, None])
        first += TILE
    if RAGGED and tl.program_id(0) == 0:  # the last, incomplete word
        index = tl.full((8,), words, tl.int64) * 8 + tl.arange(0, 8)
        valid = index < numel
        byte = tl.load(packed + index // 2, mask=valid, other=0).to(tl.int32)
        value = tl.gather(table, (byte >> (4 * (1 - (index & 1).to(tl.int32)))) & 15, 0)
        scale = _block_scale(
            absmax,
            nested_absmax,
            nested_table,
            offset,
            index // BLOCK,
            valid,
            NESTED,
            NESTED_BLOCK,
        )
        tl.store(out + index, (value * scale).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _dequantize_rows(
    packed,
    codebook,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    dense,
    lora_A,
    lora_B,
    scaling,
    out,
    norm,
    N,
    K,
    r,
    stride_dense,
    stride_out,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    MERGE: tl.constexpr,
    AUGMENT: tl.constexpr,
    STORE: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """ROWS rows of W (+ scaling B A), COLS columns at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_valid = row < N
    col = tl.arange(0, COLS)
    word = tl.arange(0, COLS // 8)
    rank = tl.arange(0, RANKS)
    if QUANTIZED:
        table = tl.load(codebook + tl.arange(0, 16))
        nested_table = tl.load(nested_code + tl.arange(0, 256 if NESTED else 1))
        offset = tl.load(nested_offset)
        source = packed.to(tl.pointer_type(tl.int32), bitcast=True)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, K, COLS):
        valid = row_valid[:, None] & (k + col < K)[None, :]
        if QUANTIZED:
            # K is a multiple of 8: a word lies in one row, and so in one block.
            at = row.to(tl.int64)[:, None] * (K // 8) + (k // 8 + word)[None, :]
            word_valid = row_valid[:, None] & (k + word * 8 < K)[None, :]
            w = tl.load(source + at, mask=word_valid, other=0)
            scale = _block_scale(
                absmax,
                nested_absmax,
                nested_table,
                offset,
                (at // (BLOCK // 8)).reshape(ROWS * COLS // 8),
                word_valid.reshape(ROWS * COLS // 8),
                NESTED,
                NESTED_BLOCK,
            ).reshape(ROWS, COLS // 8)
            values = _decode(w, table, ROWS, COLS // 8) * scale[:, :, None]
            values = values.reshape(ROWS, COLS)
        else:
            at = row.to(tl.int64)[:, None] * stride_dense + (k + col)[None, :]
            values = tl.load(dense + at, mask=valid, other=0.0).to(tl.float32)
        if MERGE:
            delta = tl.zeros((ROWS, COLS), tl.float32)
            for r0 in range(0, r, RANKS):
                rank_valid = r0 + rank < r
                b = tl.load(
                    lora_B + row[:, None] * r + (r0 + rank)[None, :],
                    mask=row_valid[:, None] & rank_valid[None, :],
                    other=0.0,
                ).to(tl.float32)
                a = tl.load(
                    lora_A + (r0 + rank)[:, None] * K + (k + col)[None, :],
                    mask=rank_valid[:, None] & (k + col < K)[None, :],
                    other=0.0,
                ).to(tl.float32)
                delta = tl.dot(b, a, delta, input_precision="ieee")
            values += scaling * delta
        if NORM:
            squares += tl.where(valid, values * values, 0.0)
        if STORE:
            target = out + row.to(tl.int64)[:, None] * stride_out + (k + col)[None, :]
            tl.store(target, values.to(out.dtype.element_ty), mask=valid)
    if NORM:
        tl.store(norm + row, tl.sqrt(tl.sum(squares, 1)), mask=row_valid)
    if AUGMENT:
        # Columns K to stride_out: scaling B, and zeros up to the end.
        for r0 in range(0, stride_out - K, RANKS):
            b = tl.load(
                lora_B + row[:, None] * r + (r0 + rank)[None, :],
                mask=row_valid[:, None] & (r0 + rank < r)[None, :],
                other=0.0,
            ).to(tl.float32)
            target = out + row.to(tl.int64)[:, None] * stride_out + (K + r0 + rank)[None, :]
            inside = row_valid[:, None] & (K + r0 + rank < stride_out)[None, :]
            tl.store(target, (scaling * b).to(out.dtype.element_ty), mask=inside)


def launch_dequantize_4bit(w: Packed, out: torch.Tensor) -> None:
    """out: contiguous, fp32, fp16 or bf16, of any shape; w.packed aligned to 4 bytes."""
    numel = out.numel()
    if numel == 0:
        return
    words = numel // 8
    # A program reads its tables once; below some size more programs matter more.
    tiles = 4 if words >= 512 * TILE else 1
    _dequantize[(max(1, triton.cdiv(words, TILE * tiles)),)](
        *w.tensors,
        out,
        words,  # apart: that it is a multiple of 16 lets the mask be one for a whole vector
        numel,
        tiles,
        NESTED=w.nested_absmax is not None,
        BLOCK=w.blocksize,
        NESTED_BLOCK=w.nested_blocksize,
        TILE=TILE,
        RAGGED=numel % 8 != 0,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


def launch_rows(
    weight: Packed | torch.Tensor,
    n: int,
    k: int,
    *,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
    out: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    arch: int = 80,
) -> None:
    """Decodes `weight` [n, k] row by row. k a multiple of 8 where it is 4-bit.

    With lora_A [r, k] and lora_B [n, r], contiguous: scaling B A is added in fp32. With lora_B
    alone: out has more than k columns, the first r of them beyond k get scaling B, the rest zeros.
    out: rows contiguous, n of them; None: not written. norm: fp32 [n], the rows' Euclidean norms.
    arch: the GPU's, as 80 for sm_80.
    """
    if n == 0:
        return
    merge = lora_A is not None
    augment = lora_B is not None and not merge
    pointers: tuple[torch.Tensor, ...]
    if isinstance(weight, torch.Tensor):
        quantized, pointers, stride = None, (weight,) * 7, weight.stride(0)
    else:
        quantized, pointers, stride = weight, (*weight.tensors, weight.packed), 0
    none = pointers[0]
    # Below sm_80 the operands of B A lie in registers: half as many threads would spill some.
    warps = _WARPS if merge and arch < 80 else _WARPS // 2
    _dequantize_rows[(triton.cdiv(n, _ROWS),)](
        *pointers,
        none if lora_A is None else lora_A,
        none if lora_B is None else lora_B,
        scaling,
        none if out is None else out,
        none if norm is None else norm,
        n,
        k,
        0 if lora_B is None else lora_B.shape[1],
        stride,
        0 if out is None else out.stride(0),
        NESTED=quantized is not None and quantized.nested_absmax is not None,
        BLOCK=quantized.blocksize if quantized is not None else 64,
        NESTED_BLOCK=quantized.nested_blocksize if quantized is not None else 256,
        QUANTIZED=quantized is not None,
        MERGE=merge,
        AUGMENT=augment,
        STORE=out is not None,
        NORM=norm is not None,
        ROWS=_ROWS,
        COLS=_COLS,
        RANKS=_RANKS,
        num_warps=warps,
        enable_fp_fusion=merge,
    )
