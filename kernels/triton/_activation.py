"""Activations of bottleneck adapters and their derivatives, in fp32; NaN stays NaN."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

_LEAKY = tl.constexpr(0.01)
_HALF_ROOT = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """f(z), z fp32. NAME: one of the op's ACTIVATIONS."""
    if NAME == "relu":
        out = tl.where(z < 0, 0.0, z)
    elif NAME == "gelu":
        out = 0.5 * z * (1 + tl.erf(z * _HALF_ROOT))
    elif NAME == "gelu_new":
        out = 0.5 * z * (1 + libdevice.tanh(_TANH_SCALE * (z + _TANH_CUBE * z * z * z)))
    elif NAME == "silu":
        out = z * tl.sigmoid(z)
    elif NAME == "tanh":
        out = libdevice.tanh(z)
    elif NAME == "leakyrelu":
        out = tl.where(z < 0, _LEAKY * z, z)
    elif NAME == "sigmoid":
        out = tl.sigmoid(z)
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        out = z
    return out


@triton.jit
def slope(z, NAME: tl.constexpr):
    """f'(z), z fp32."""
    if NAME == "relu":
        out = tl.where(z > 0, 1.0, 0.0)
    elif NAME == "gelu":
        out = 0.5 * (1 + tl.erf(z * _HALF_ROOT)) + z * _DENSITY * tl.exp(-0.5 * z * z)
    elif NAME == "gelu_new":
        t = libdevice.tanh(_TANH_SCALE * (z + _TANH_CUBE * z * z * z))
        inner = _TANH_SCALE * (1 + 3 * _TANH_CUBE * z * z)
        out = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner
    elif NAME == "silu":
        s = tl.sigmoid(z)
        out = s * (1 + z * (1 - s))
    elif NAME == "tanh":
        t = libdevice.tanh(z)
        out = 1 - t * t
    elif NAME == "leakyrelu":
        out = tl.where(z > 0, 1.0, _LEAKY)
    elif NAME == "sigmoid":
        s = tl.sigmoid(z)
        out = s * (1 - s)
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        out = tl.full(z.shape, 1.0, tl.float32)
    return out
