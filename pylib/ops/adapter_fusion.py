"""adapter_fusion: attention over the outputs of N adapters, token by token.

Neither keys nor values are projected: the key's weight is folded into the query, and the value's
applied to the weighted sum. That leaves two matmuls, one of them by W_q^T W_k, or three where there
are fewer rows than columns, instead of 1 + 2 N; and no tensor of the size of the values is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch.nn import functional

from fusetune.ops import _check
from fusetune.ops._adapter_fusion import OP, attend
from fusetune.ops._adapter_fusion_blocks import Maps, Options, fuse, in_blocks
from fusetune.ops._lora_linear_cpu import torch_crawls
from fusetune.reference.dropout import new_seed
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor
Values = Tensor | Sequence[Tensor]
Map = tuple[Tensor | None, Tensor | None]  # weight [out, in] (None: the identity), bias [out]


@overload
def adapter_fusion(
    query: Tensor,
    values: Values,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None = ...,
    *,
    temperature: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    residual: Tensor | None = ...,
    return_attention: Literal[False] = ...,
) -> Tensor: ...


@overload
def adapter_fusion(
    query: Tensor,
    values: Values,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None = ...,
    *,
    temperature: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    residual: Tensor | None = ...,
    return_attention: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def adapter_fusion(
    query: Tensor,
    values: Values,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    residual: Tensor | None = None,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247), with the key and value folded away.

    query: [..., H]; values: [N, ..., H], or N tensors [..., H], which need not be stacked then;
    query_weight, key_weight: [D, H], biases [D]; value_weight: [H, H]; residual: [..., H]. Each
    float16, bfloat16, float32 or float64, values all the same. A weight of None is the identity.

        out = residual + sum_i p_i values_i value_weight^T
        p = softmax_i(drop(s_i) / temperature)
        s_i = (query query_weight^T + query_bias) . (values_i key_weight^T + key_bias)

    With `training` and dropout_p > 0 scores are dropped out, with a seed from torch's generator.
    Returns out [..., H] in values' dtype; with return_attention also p [..., N], fp32 (float64 for
    float64), which carries no gradient.

    Differentiable, once, in all tensors. key_bias shifts all scores of a token alike: without
    dropout its gradient is zero. Raises TypeError or ValueError, naming the argument, for shapes,
    dtypes, devices or values that do not fit. Definition: reference/adapter_fusion.py.
    """
    parts = _stacks(values)
    _check_arguments(query, parts, residual, temperature, dropout_p)
    _check_weights(query, query_weight, query_bias, key_weight, key_bias, value_weight)
    h = query.shape[-1]
    rows = query.reshape(-1, h)
    seed = new_seed(query.device) if training and dropout_p > 0 else None
    query_maps = _query_maps(rows, query_weight, query_bias, key_weight, key_bias)
    score_map: Map = (None, None)
    if seed is not None and key_bias is not None:
        score_map = _score_map(query_weight, query_bias, key_bias)
    maps = Maps(*query_maps[0], *score_map, value_weight)
    residual = None if residual is None else residual.reshape(-1, h)
    stacks = [part.reshape(len(part), -1, h) for part in parts]
    options = Options(float(temperature), float(dropout_p), seed)
    if len(query_maps) == 1 and in_blocks(rows, maps, residual, stacks):
        out, p = fuse(rows, maps, residual, stacks, options)
    else:
        out, p = _at_once(rows, query_maps, maps, residual, stacks, options)
    out = out.view(query.shape)
    return (out, p.view(*query.shape[:-1], -1)) if return_attention else out


def _stacks(values: Values) -> list[Tensor]:
    """values as tensors [n, ..., H], without a copy."""
    if isinstance(values, Tensor):
        if values.dim() < 2:
            raise ValueError(f"values must have shape [N, ..., H], got {list(values.shape)}")
        return [values]
    if not isinstance(values, Sequence):
        raise TypeError(f"values must be a tensor or tensors, got {type(values).__name__}")
    for i, part in enumerate(values):
        _check.check_float(f"values[{i}]", part)
    return [part.unsqueeze(0) for part in values]


# --- the matmuls, in torch ---- -------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in the wider of their dtypes: fp32 weights stay fp32 beside a 16-bit x.

    In fp32 where torch takes ten times as long for 16 bits.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    within = torch.float32 if _crawls(x.device.type, dtype) else dtype
    b = None if bias is None else bias.to(within)
    y = functional.linear(x.to(within), weight.to(within), b)
    return y if within == dtype else y.to(dtype)


def _crawls(device: str, dtype: torch.dtype) -> bool:
    """Not where the simulator stands for a GPU, nor under autocast, which takes its own dtype."""
    if device != "cpu" or not torch_crawls(dtype) or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu") and OP.carrier("cpu", dtype, dtype) in (
        "cpu",
        "reference",
    )


def _query_maps(
    rows: Tensor,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
) -> list[Map]:
    """g = (rows W_q^T + b_q) W_k as one linear map, or two to be applied in turn."""
    if key_weight is None:
        return [(query_weight, query_bias)]
    # The key's bias takes no part here, but as a parameter it has a gradient, of zeros.
    nothing = None if key_bias is None else (key_bias * 0).sum().expand(key_weight.shape[1])
    if query_weight is None:
        return [(key_weight.T, nothing)]
    (m, h), d = rows.shape, len(key_weight)
    if 2 * m * d <= m * h + h * d:  # fewer rows than columns: two thin matmuls cost less
        return [(query_weight, query_bias), (key_weight.T, nothing)]
    folded = _linear(key_weight.T, query_weight.T, None)
    bias = nothing if query_bias is None else _linear(query_bias, key_weight.T, nothing)
    return [(folded, bias)]


def _score_map(query_weight: Tensor | None, query_bias: Tensor | None, key_bias: Tensor) -> Map:
    """(rows W_q^T + b_q) . b_k as a linear map [1, H]."""
    if query_weight is None:
        return key_bias[None], None
    weight = _linear(key_bias[None], query_weight.T, None)
    return weight, None if query_bias is None else _linear(query_bias, key_bias[None], None)


def _at_once(
    rows: Tensor,
    query_maps: list[Map],
    maps: Maps,
    residual: Tensor | None,
    stacks: list[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(out [M, H] in values' dtype, p [M, N]): few rows, torch.compile, or a GPU."""
    g = rows
    for weight, bias in query_maps:
        g = g if weight is None else _linear(g, weight, bias)
    if g.dtype != stacks[0].dtype:
        g = g.to(accumulate_dtype(torch.promote_types(g.dtype, stacks[0].dtype)))
    offset = None
    if maps.score_weight is not None:
        offset = _linear(rows, maps.score_weight, maps.score_bias).squeeze(1)
        offset = offset.to(accumulate_dtype(g.dtype))
    ctx, p = attend(g, stacks, offset, *options)
    del g  # without a gradient its memory serves the output
    return _output(ctx, maps.value_weight, residual).to(stacks[0].dtype), p


def _output(ctx: Tensor, value_weight: Tensor | None, residual: Tensor | None) -> Tensor:
    """ctx W_v^T + residual."""
    if value_weight is None:
        return ctx if residual is None else ctx + residual
    if residual is None:
        return _linear(ctx, value_weight, None)
    dtype = torch.promote_types(ctx.dtype, value_weight.dtype)
    return torch.addmm(residual.to(dtype), ctx.to(dtype), value_weight.to(dtype).T)


# --- arguments ---- -------------------------------------------------------------------------------


def _check_arguments(
    query: Tensor,
    parts: list[Tensor],
    residual: Tensor | None,
    temperature: float,
    dropout_p: float,
) -> None:
    _check.check_float("query", query)
    if query.dim() == 0 or query.shape[-1] == 0:
        raise ValueError(f"query must have shape [..., H] with H > 0, got {list(query.shape)}")
    if not parts or not len(parts[0]):
        raise ValueError("values must hold at least one adapter's output, got none")
    for part in parts:
        _check.check_float("values", part)
        if part.shape[1:] != query.shape:
            raise ValueError(
                f"values must have shape {['N', *query.shape]} (or be N tensors "
                f"{list(query.shape)}), got {[len(part), *part.shape[1:]]}"
            )
        if part.dtype != parts[0].dtype:
            raise TypeError(f"values must be of one dtype, got {parts[0].dtype} and {part.dtype}")
        if part.device != query.device:
            raise ValueError(f"values are on {part.device}, query on {query.device}: move one")
    if residual is not None:
        _check.check_float("residual", residual)
        _check.check_shape("residual", residual, tuple(query.shape))
        _check_device("residual", residual, query)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move one")


def _check_weights(
    query: Tensor,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None,
) -> None:
    h = query.shape[-1]
    named = {"query_weight": query_weight, "key_weight": key_weight, "value_weight": value_weight}
    both = query_weight is not None and key_weight is not None
    d = query_weight.shape[:1].numel() if both and query_weight is not None else h
    for name, weight in named.items():
        if weight is None:
            continue
        _check.check_float(name, weight)
        _check.check_shape(name, weight, (h if name == "value_weight" else d, h))
        _check_device(name, weight, query)
    for name, bias in (("query", query_bias), ("key", key_bias)):
        if bias is None:
            continue
        if named[f"{name}_weight"] is None:
            raise ValueError(f"{name}_bias is given, but {name}_weight is None")
        _check.check_float(f"{name}_bias", bias)
        _check.check_shape(f"{name}_bias", bias, (d,))
        _check_device(f"{name}_bias", bias, query)
