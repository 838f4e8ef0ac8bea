"""Undoes the layout into which bitsandbytes repacks 4-bit weights for its own CPU kernel.

On a CPU with AVX512-BF16 the first inference puts the codes into the order of that kernel and
replaces the statistics by bfloat16 ones, [K / blocksize, N], no longer quantised themselves.
bitsandbytes' inverse brings the codes back. The statistics it leaves in the kernel's layout, or
quantises anew, so they are restored here: as fp32, which holds each bfloat16 value exactly. That
is the weight the layer has computed with since; what rounding took from it before is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch

_ADVICE = "fuse before the first evaluation, or load the model again"


def is_packed(param: Any) -> bool:
    """Whether the 4-bit parameter is in the layout of bitsandbytes' CPU kernel."""
    return bool(getattr(param.quant_state, "packing_format_for_cpu", False))


def unpack(param: Any) -> Callable[[], None] | str:
    """Gives a packed Params4bit the plain layout, in place; its QuantState stays the same object.

    Returns a function that packs it again, or the reason why nothing was changed: the plain weight
    must give the present one, bit for bit, when bitsandbytes packs it.
    """
    pack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    inverse = getattr(bnb.functional, "_convert_weight_packed_for_cpu_inverse", None)
    if pack is None or inverse is None:
        return f"bitsandbytes repacked the weight and this version has no inverse: {_ADVICE}"
    state = param.quant_state
    # Not inference mode: autograd could not use what is made in it.
    with torch.inference_mode(False), torch.no_grad():
        try:
            data, plain = _plain(inverse, param.data, state)
            again, check = pack(data, copy.copy(plain))
            exact = torch.equal(again, param.data) and _same(check.absmax, state.absmax)
        except Exception as error:  # a private function of another library: any
            return f"bitsandbytes repacked the weight and its inverse failed ({error}): {_ADVICE}"
        if not exact:
            return f"bitsandbytes repacked the weight and its inverse is not exact: {_ADVICE}"
        packed_state = dict(vars(state))
        _set(param, data, vars(plain))

    def undo() -> None:
        _set(param, pack(param.data, copy.copy(state))[0], packed_state)

    return undo


def _plain(inverse: Any, packed: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """(codes, QuantState) in the plain layout, of copies."""
    codes_only = copy.copy(state)
    codes_only.original_nested = False
    data, _ = inverse(packed, codes_only)
    plain = bnb.functional.QuantState(
        absmax=state.absmax.T.reshape(-1).float(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.original_dtype,
    )
    return data, plain


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; NaNs, which corrupt statistics may hold, are."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _set(param: Any, data: torch.Tensor, state: dict[str, Any]) -> None:
    # In place: the layer, and layers that share the weight, refer to the same QuantState.
    param.data = data
    vars(param.quant_state).clear()
    vars(param.quant_state).update(state)
