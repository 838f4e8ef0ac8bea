"""Blockwise 4-bit quantisation, equal to bitsandbytes' on the CPU bit for bit."""

from functools import cache

import torch

from fusetune.reference.codebook import NESTED_BLOCKSIZE, boundaries, dynamic_map

_SMALLEST = 1e-38  # a block of zeros divides by this and not by zero
_BINS = 65536


def quantize_4bit(
    weight: torch.Tensor, quant_type: str, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises `weight` (any shape and floating dtype, read in row-major order).

    Returns packed, uint8 [ceil(n / 2)], the earlier code of a pair in the high nibble, and absmax,
    fp32 [ceil(n / blocksize)].
    """
    midpoints, codes = boundaries(quant_type, weight.device)
    flat = weight.reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    # bitsandbytes multiplies by the reciprocal, but divides in a last, partial block.
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).flatten()
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, flat[full:] / last])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    code = codes[torch.bucketize(scaled.clamp(-1, 1), midpoints)]
    return (code[::2] << 4) | code[1::2], absmax


@cache
def _dynamic_lookup(device: torch.device) -> torch.Tensor:
    """Nearest code of the dynamic map for each of 65536 equidistant points of [-1, 1]."""
    values = dynamic_map(device)
    points = -1.0 + (2.0 * torch.arange(_BINS, dtype=torch.float32, device=device)) / (_BINS - 1)
    return torch.bucketize(points, 0.5 * (values[:-1] + values[1:])).to(torch.uint8)


def quantize_absmax(
    absmax: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises absmax, fp32 [B], to 8 bits ("double" or nested quantisation).

    Returns codes, uint8 [B], nested absmax, fp32 [ceil(B / 256)], and the offset, fp32 [], that was
    taken off first. As bitsandbytes' CPU library does, a value is rounded to one of 65536 points
    before the nearest code is looked up.
    """
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCKSIZE))
    blocks = padded.view(-1, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested_absmax).unsqueeze(1)).clamp(-1, 1)
    # half * 65535 + 0.5 with one rounding, as bitsandbytes' FMA: float64 holds it exactly.
    half = (scaled + 1.0) * 0.5
    point = (half.double() * (_BINS - 1) + 0.5).float().nan_to_num(0.0).long()
    code = _dynamic_lookup(absmax.device)[point]
    code.masked_fill_((nested_absmax == 0).unsqueeze(1), 0)
    return code.flatten()[: absmax.numel()], nested_absmax, offset
