"""The base matmul of a linear layer on a GPU with LoRA in its tail: which of several ways to take.

    y = x W^T + scaling s B^T + bias          dX = dY W + mask * (scaling dS A)

- cuda: few rows, straight from the packed weight, one kernel;
- triton: the weight decoded in one launch, then one matmul that starts from the tail: the result
  is written once;
- addmm: the weight decoded, the vendor's matmul, and the tail added in place;
- augmented: the vendor's matmul of [x | s] and [W | scaling B]: no tail, but x is copied.

What is best depends on the GPU, M, N, K, r and the dtype. With FUSETUNE_TUNE=1 every way is timed
the first time a case comes up, M rounded up to a power of two, and the choice kept in
`cache_path()`; what was measured once is used from then on, with or without the variable. Cases
that were not measured take `default`.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fusetune.ops import _cuda, _triton
from fusetune.ops._registry import Case, backend
from fusetune.ops._weight import Weight
from fusetune.ops.dequantize_4bit import dequantize_4bit
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.dropout import dropout as reference_dropout

Tensor = torch.Tensor
# (s fp32 [M, r], B [N, r], scaling); in dX (dS, A [r, K], scaling).
Tail = tuple[Tensor, Tensor, float]
Mask = tuple[float, Tensor]  # dropout's probability and seed, of dX's tail
Ways = dict[str, Callable[[], Tensor]]

_VERSION = 1
_REPEAT = 10
# Where Triton's matmul is known to come near the vendor's; elsewhere the vendor's is the default.
_TRITON_MATMUL = (80, 86, 89, 90)


# --- forward --------------------------------------------------------------------------------------


def linear(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    tail: Tail | None = None,
    col_scale: Tensor | None = None,
) -> Tensor:
    """y [M, N] in rows' dtype. rows: [M, K], rows contiguous; weight: [N, K]; bias: fp32 [N].

    col_scale: fp32 [N], multiplies x W^T + tail but not bias (DoRA).
    """
    (m, k), n = rows.shape, weight.shape[0]
    if m == 0 or n == 0 or k == 0:
        return _without_product(rows, n, bias)
    ways: Ways = {}
    if _cuda_takes(m, n, k, rows.dtype, weight) and col_scale is None:
        ways["cuda"] = lambda: _cuda.linear_4bit(rows, weight, bias, tail)  # type: ignore[arg-type]
    if _triton_takes(rows, weight):
        ways["triton"] = lambda: _triton_linear(rows, _dense(weight, rows), bias, tail, col_scale)
    ways["addmm"] = lambda: _addmm(rows, _dense(weight, rows), bias, tail, col_scale)
    if _augments(weight, k, tail) and col_scale is None and _triton_takes(rows, weight):
        ways["augmented"] = lambda: _augmented(rows, weight, bias, tail)  # type: ignore[arg-type]
    return _choose(_key("y", rows, m, n, k, tail, False), rows, ways)()


def _without_product(rows: Tensor, n: int, bias: Tensor | None) -> Tensor:
    y = torch.zeros(rows.shape[0], n, dtype=rows.dtype, device=rows.device)
    return y if bias is None else y.add_(bias)


def _triton_linear(
    rows: Tensor, w: Tensor, bias: Tensor | None, tail: Tail | None, col_scale: Tensor | None
) -> Tensor:
    from fusetune._triton.linear import Tail as KernelTail
    from fusetune._triton.linear import launch_linear

    y = torch.empty(rows.shape[0], w.shape[0], dtype=rows.dtype, device=rows.device)
    with _triton.on(y.device):
        launch_linear(
            rows,
            w,
            y,
            arch=_triton.capability(y.device),
            tail=None if tail is None else KernelTail(*tail),
            bias=bias,
            col_scale=col_scale,
        )
    return y


def _addmm(
    rows: Tensor, w: Tensor, bias: Tensor | None, tail: Tail | None, col_scale: Tensor | None
) -> Tensor:
    y = rows @ w.T
    if tail is not None:
        s, b, scaling = tail
        y.addmm_(s.to(y.dtype), b.to(y.dtype).T, alpha=scaling)
    if col_scale is not None:
        y.mul_(col_scale)
    return y if bias is None else y.add_(bias)


def _augmented(rows: Tensor, weight: Weight, bias: Tensor | None, tail: Tail) -> Tensor:
    from fusetune._triton.dequantize_4bit import launch_rows

    s, b, scaling = tail
    k, (n, r) = rows.shape[1], b.shape
    width = k + _padded(r)
    w = torch.empty(n, width, dtype=rows.dtype, device=rows.device)
    source = weight if isinstance(weight, Tensor) else _triton.packed(weight)
    with _triton.on(w.device):
        launch_rows(source, n, k, lora_B=b, scaling=scaling, out=w)
    y = _beside(rows, s, width) @ w.T
    return y if bias is None else y.add_(bias)


# --- gradient -------------------------------------------------------------------------------------


def linear_dx(
    dy: Tensor, weight: Weight, tail: Tail | None = None, mask: Mask | None = None
) -> Tensor:
    """dX [M, K] in dy's dtype. dy: [M, N], rows contiguous; weight: [N, K]."""
    (m, n), k = dy.shape, weight.shape[1]
    if m == 0 or n == 0 or k == 0:
        return torch.zeros(m, k, dtype=dy.dtype, device=dy.device)
    ways: Ways = {}
    if _cuda_takes(m, n, k, dy.dtype, weight, dx=True):
        ways["cuda"] = lambda: _cuda.linear_4bit_dx(dy, weight, tail, mask)  # type: ignore[arg-type]
    if _triton_takes(dy, weight):
        ways["triton"] = lambda: _triton_dx(dy, _dense(weight, dy), tail, mask)
    ways["addmm"] = lambda: _addmm_dx(dy, _dense(weight, dy), tail, mask)
    if _augments(weight, k, tail) and mask is None:
        ways["augmented"] = lambda: _augmented_dx(dy, weight, tail)  # type: ignore[arg-type]
    return _choose(_key("dx", dy, m, n, k, tail, mask is not None), dy, ways)()


def _triton_dx(
    dy: Tensor | None, w: Tensor | None, tail: Tail | None, mask: Mask | None, dx: Any = None
) -> Tensor:
    """Without dy and w: the tail alone is added to dx."""
    from fusetune._triton.linear import Dropout, launch_linear
    from fusetune._triton.linear import Tail as KernelTail

    if dy is not None and w is not None:
        dx = torch.empty(dy.shape[0], w.shape[1], dtype=dy.dtype, device=dy.device)
    with _triton.on(dx.device):
        launch_linear(
            dy,
            None if w is None else w.T,
            dx,
            arch=_triton.capability(dx.device),
            tail=None if tail is None else KernelTail(tail[0], tail[1].T, tail[2]),
            dropout=None if mask is None else Dropout(mask[1], **_triton.mask(*mask)),
        )
    result: Tensor = dx
    return result


def _addmm_dx(dy: Tensor, w: Tensor, tail: Tail | None, mask: Mask | None) -> Tensor:
    dx = dy @ w
    if tail is None:
        return dx
    ds, a, scaling = tail
    if mask is None:
        return dx.addmm_(ds.to(dx.dtype), a.to(dx.dtype), alpha=scaling)
    if _triton_takes(dx, w):
        return _triton_dx(None, None, tail, mask, dx)
    return dx.add_(reference_dropout(scaling * (ds @ a.float()), mask[0], mask[1]))


def _augmented_dx(dy: Tensor, weight: Weight, tail: Tail) -> Tensor:
    ds, a, scaling = tail
    n, (r, k) = dy.shape[1], a.shape
    height = n + _padded(r)
    w = torch.zeros(height, k, dtype=dy.dtype, device=dy.device)
    if isinstance(weight, Tensor):
        w[:n] = weight
    else:
        dequantize_4bit(weight, out=w[:n])
    w[n : n + r] = a * scaling
    return _beside(dy, ds, height) @ w


# --- shared by the ways ---------------------------------------------------------------------------


def _dense(weight: Weight, like: Tensor) -> Tensor:
    """The weight, decoded if it has to be, in like's dtype."""
    if isinstance(weight, QuantizedWeight):
        return dequantize_4bit(weight, like.dtype)
    return weight.resolve_neg()


def _beside(rows: Tensor, low: Tensor, width: int) -> Tensor:
    """[rows | low | zeros], `width` columns."""
    out = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    first, last = rows.shape[1], rows.shape[1] + low.shape[1]
    out[:, :first] = rows
    out[:, first:last] = low
    out[:, last:] = 0
    return out


def _padded(r: int) -> int:
    return -(-r // 16) * 16


def _augments(weight: Weight, k: int, tail: Tail | None) -> bool:
    if tail is None:
        return False
    if isinstance(weight, Tensor):
        return weight.stride(1) == 1
    return k % 8 == 0


def _triton_takes(rows: Tensor, weight: Weight) -> bool:
    if backend() == "cuda":
        return False
    dense = weight.dtype if isinstance(weight, Tensor) else None
    return _triton.supports(Case(rows.device.type, rows.dtype, dense)) is None


def _cuda_takes(
    m: int, n: int, k: int, dtype: torch.dtype, weight: Weight, *, dx: bool = False
) -> bool:
    if backend() == "triton" or weight.device.type not in _cuda.DEVICES:
        return False
    return _cuda.refuses(m, n, k, dtype, weight, dx=dx) is None


# --- the choice -----------------------------------------------------------------------------------


def default(arch: int, m: int, dtype: torch.dtype, tail: bool, ways: Ways) -> str:
    """The way taken where nothing was measured. Whatever the GPU, it is one of `ways`."""
    if "cuda" in ways:
        return "cuda"
    if "triton" in ways and tail and dtype != torch.float32 and arch in _TRITON_MATMUL:
        return "triton"
    return "addmm"


def _key(what: str, rows: Tensor, m: int, n: int, k: int, tail: Tail | None, masked: bool) -> str:
    rank = 0 if tail is None else tail[0].shape[1]
    rows_up = 1 << (m - 1).bit_length()
    dtype = str(rows.dtype).removeprefix("torch.")
    name = _device_name(rows.device)
    return f"{name}: {what} M {rows_up} N {n} K {k} r {rank} {dtype}{' dropout' if masked else ''}"


_forced: str | None = None


@contextmanager
def use_way(name: str) -> Iterator[None]:
    """Takes one way wherever it is to be had, for the length of a with block."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _choose(key: str, rows: Tensor, ways: Ways) -> Callable[[], Tensor]:
    if _forced in ways:
        return ways[_forced]
    if len(ways) == 1:
        return next(iter(ways.values()))
    measured = _measured()
    name = measured.get(key)
    if name in ways:
        return ways[name]
    if tuning() and not _capturing(rows.device):
        name = min(ways, key=lambda way: _seconds(ways[way], rows.device))
        measured[key] = name
        _save(measured)
    else:
        arch = _triton.capability(rows.device) if "triton" in ways else 0
        m = rows.shape[0]
        name = default(arch, m, rows.dtype, " r 0 " not in key, ways)
    return ways[name]


def tuning() -> bool:
    """Whether cases that come up for the first time are measured."""
    return os.environ.get("FUSETUNE_TUNE", "") not in ("", "0")


def cache_path() -> Path:
    """Where measured choices are kept, for all processes of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusetune" / "linear.json"


@cache
def _measured() -> dict[str, str]:
    """What was measured before, by key; empty where the file is missing or cannot be read."""
    try:
        content = json.loads(cache_path().read_text())
        if content["version"] == _VERSION:
            return {str(key): str(name) for key, name in content["choices"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"fusetune ignores {cache_path()}: {error}", stacklevel=2)
    return {}


def forget() -> None:
    """Reads the file anew at the next call."""
    _measured.cache_clear()


def _save(measured: dict[str, str]) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"version": _VERSION, "choices": measured}, indent=1))
        draft.replace(path)  # at once: another process never reads half of it
    except OSError as error:
        warnings.warn(f"fusetune cannot keep what it measured: {error}", stacklevel=2)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of one call, on the GPU; once warm."""
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_REPEAT):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / _REPEAT / 1e3


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"simulated sm_{_triton.capability(device)}" if "cpu" in _triton.DEVICES else "cpu"
    return torch.cuda.get_device_name(device)
