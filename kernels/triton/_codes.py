"""What kernels over a 4-bit weight share: its tensors, the absmax of its blocks, its codes' values.

Bytes: half one an element, and its block's absmax; the tables are read by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Packed(NamedTuple):
    """The tensors of a 4-bit weight. Plain: absmax fp32, and the nested ones None."""

    packed: torch.Tensor
    codebook: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    blocksize: int
    nested_blocksize: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The kernels' pointers; any tensor stands in for one that is not read."""
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            none = self.codebook
            return self.packed, self.codebook, self.absmax, none, none, none
        nested = self.nested_absmax, self.nested_code, self.nested_offset
        return self.packed, self.codebook, self.absmax, *nested


@triton.jit
def _block_scale(
    absmax,
    nested_absmax,
    nested_table,
    nested_offset,
    block,
    valid,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    """absmax of some blocks of quantisation, fp32. block: 1-d."""
    if NESTED:
        code = tl.load(absmax + block, mask=valid, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_BLOCK, mask=valid, other=0.0)
        scale = tl.gather(nested_table, code, 0) * outer + nested_offset
    else:
        scale = tl.load(absmax + block, mask=valid, other=0.0)
    return scale


@triton.jit
def _decode(words, table, ROWS: tl.constexpr, COLS: tl.constexpr):
    """words, int32 [ROWS, COLS], to the codebook's values, fp32 [ROWS, COLS, 8], in order."""
    shift = 4 * (tl.arange(0, 8) ^ 1)  # of a byte the high nibble comes first
    codes = (words[:, :, None] >> shift[None, None, :]) & 15
    return tl.gather(table, codes.reshape(ROWS * COLS * 8), 0).reshape(ROWS, COLS, 8)
