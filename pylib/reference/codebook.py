"""The number formats: NF4 and FP4 for weights, an 8-bit dynamic map for nested statistics.

All are bitsandbytes' values, bit for bit, so that its checkpoints can be read in place.
"""

from functools import cache

import torch

# NormalFloat4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of N(0, 1),
# eight above zero, zero, seven below, scaled so that the largest is 1. With p = 0.9677083, the mean
# of 1 - 1/32 and 1 - 1/30: ndtri(linspace(p, 1/2, 9))[:-1] and -ndtri(linspace(p, 1/2, 8))[:-1].
# (tests/ops/test_quantize_4bit.py derives them again.)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# FP4 of bitsandbytes, indexed by bit pattern (sign, two exponent bits, mantissa bit) and divided by
# the largest value, 12. Not IEEE-like: the exponent field does not order the magnitudes.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(m / 12 for m in _FP4_MAGNITUDES) + tuple(-m / 12 + 0.0 for m in _FP4_MAGNITUDES)

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Block of the second quantisation, of absmax itself. The only one bitsandbytes writes.
NESTED_BLOCKSIZE = 256


_ON_CPU = {
    name: torch.tensor(values, dtype=torch.float32, device="cpu")
    for name, values in (("nf4", NF4), ("fp4", FP4))
}


def codebook(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit format, fp32, indexed by code. Not to be written to."""
    return _ON_CPU[quant_type] if device.type == "cpu" else _on_device(quant_type, device)


@cache
def _on_device(quant_type: str, device: torch.device) -> torch.Tensor:
    return _ON_CPU[quant_type].to(device)


@cache
def boundaries(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(midpoints between neighbouring values, ascending; code of each interval between them)."""
    code = codebook(quant_type, device)
    order = torch.argsort(code, stable=True)  # stable: of FP4's two zeros the positive comes first
    ascending = code[order]
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 values, fp32 ascending, of bitsandbytes' signed dynamic 8-bit type.

    Dettmers et al. 2021, arXiv:2110.02861, section 2.2. Decade 10^(i-6), i = 0..6, holds 2^i values
    of either sign: the midpoints of equal parts of [0.1, 1]. Zero and one complete it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += positive.tolist() + (-positive).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
