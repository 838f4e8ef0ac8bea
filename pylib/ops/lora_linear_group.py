"""lora_linear_group: LoRA linear layers over one x (q, k and v; gate and up), in one autograd node.

What separate layers do several times is done once: x is kept once, on a GPU its narrow products
read it once each way, and dX is one tensor that every projection adds to, where autograd would make
one for each and add them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops._lora_arguments import any_requires_grad, check_arguments, fold_scaling
from fusetune.ops._lora_linear_group import BACKWARD, FORWARD
from fusetune.ops._registry import Impl, Op, plain
from fusetune.ops._weight import Weight, as_rows
from fusetune.ops.lora_linear import bias_grads, lora_linear
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference import lora_linear_group as reference
from fusetune.reference.dropout import new_seed
from fusetune.reference.lora_linear_group import Need, Projection

Tensor = torch.Tensor


class LoraProjection(NamedTuple):
    """One layer of a group; its fields are arguments of `lora_linear`."""

    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None
    lora_bias: Tensor | None = None
    dropout_p: float = 0.0


def lora_linear_group(
    x: Tensor, projections: Sequence[LoraProjection], *, training: bool = True
) -> list[Tensor]:
    """`lora_linear` of x with each of `projections`: every y [..., N_i], in x's dtype.

    Their weights may be dense and 4-bit, of any N, their adapters of any rank. With `training` each
    drops out x with a seed of its own, drawn in the order of `projections`. Where an op on its own
    is asked for (torch.compile, fake tensors, weights of several dtypes) it is `lora_linear` that
    is called for each.

    Raises TypeError or ValueError, naming the projection and the argument, as `lora_linear`.
    """
    if not projections:
        raise ValueError("projections must not be empty")
    grad = torch.is_grad_enabled()
    for i, one in enumerate(projections):
        _check_projection(i, x, one, grad)
    kinds = {one.weight.dtype if isinstance(one.weight, Tensor) else None for one in projections}
    if torch.compiler.is_compiling() or not plain(x) or len(kinds) > 1:
        return [_alone(x, one, training) for one in projections]
    group = [_prepared(x, one, training) for one in projections]
    parameters = [t for p in group for t in (p.lora_A, p.lora_B, p.bias, p.lora_bias)]
    if grad and any_requires_grad(x, *parameters):
        return list(_LoraLinearGroup.apply(x, group, *parameters))
    return _forward(x, group)[0]


def _check_projection(i: int, x: Tensor, one: LoraProjection, grad: bool) -> None:
    try:
        check_arguments(
            x,
            one.weight,
            one.lora_A,
            one.lora_B,
            one.bias,
            one.lora_bias,
            one.dropout_p,
            grad,
        )
        if not isinstance(one.scaling, float | int | Tensor):
            kind = type(one.scaling).__name__
            raise TypeError(f"scaling must be a number or a 0-d tensor, got {kind}")
    except (TypeError, ValueError) as error:
        raise type(error)(f"projections[{i}]: {error}") from None


def _alone(x: Tensor, one: LoraProjection, training: bool) -> Tensor:
    return lora_linear(
        x,
        one.weight,
        one.lora_A,
        one.lora_B,
        one.scaling,
        bias=one.bias,
        lora_bias=one.lora_bias,
        dropout_p=one.dropout_p,
        training=training,
    )


def _prepared(x: Tensor, one: LoraProjection, training: bool) -> Projection:
    """With a number for its scaling, and the seed of its dropout."""
    lora_B, lora_bias, scaling = one.lora_B, one.lora_bias, one.scaling
    if isinstance(scaling, Tensor):
        lora_B, lora_bias = fold_scaling(scaling, x, lora_B, lora_bias)
        scaling = 1.0
    seed = new_seed(x.device) if training and one.dropout_p > 0 else None
    return Projection(
        one.weight, one.lora_A, lora_B, scaling, one.bias, lora_bias, one.dropout_p, seed
    )


# --- implementations ---- -------------------------------------------------------------------------

OP = Op(
    "lora_linear_group",
    *FORWARD,
    Impl("reference", reference.lora_linear_group, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "lora_linear_group_backward",
    *BACKWARD,
    Impl("reference", reference.lora_linear_group_backward, lambda case: None, 0),
)


def _case(x: Tensor, group: Sequence[Projection]) -> tuple[str, torch.dtype, torch.dtype | None]:
    weight = group[0].weight
    return x.device.type, x.dtype, weight.dtype if isinstance(weight, Tensor) else None


def _forward(x: Tensor, group: Sequence[Projection]) -> tuple[list[Tensor], list[Tensor]]:
    rows = as_rows(x, x.shape[-1])
    ys, s = OP.run(*_case(x, group))(rows, group)
    if x.dim() == 2:
        return ys, s
    # No views: of an op with several results these may not be changed in place.
    shape = x.shape[:-1]
    return [torch.ops.aten._unsafe_view.default(y, [*shape, y.shape[-1]]) for y in ys], s


class _Settings(NamedTuple):
    """What the backward pass needs of a projection besides saved tensors."""

    quantized: QuantizedWeight | None
    scaling: float
    dropout_p: float
    bias: torch.dtype | None
    lora_bias: torch.dtype | None


class _LoraLinearGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: list[Projection], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, s = _forward(x, group)
        kept: list[Tensor | None] = []
        ctx.settings = []
        for i, (p, low) in enumerate(zip(group, s, strict=True)):
            dense = p.weight if isinstance(p.weight, Tensor) else None
            kept += [p.lora_A, p.lora_B, low, p.seed, dense]
            needs = ctx.needs_input_grad[4 * i + 4 : 4 * i + 6]
            dtypes = [
                tensor.dtype if tensor is not None and need else None
                for tensor, need in zip((p.bias, p.lora_bias), needs, strict=True)
            ]
            quantized = None if isinstance(p.weight, Tensor) else p.weight
            ctx.settings.append(_Settings(quantized, p.scaling, p.dropout_p, *dtypes))
        # Detached: the graph keeps x's memory, and not the tensor that the caller has.
        ctx.save_for_backward(x.detach(), *kept)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (4 * len(dys))
        used = [i for i, dy in enumerate(dys) if dy is not None]
        rows, group, lows, needs = [], [], [], []
        for i in used:
            lora_A, lora_B, low, seed, dense = kept[5 * i : 5 * i + 5]
            quantized, scaling, p, bias, lora_bias = ctx.settings[i]
            dy: Any = dys[i]
            weight = dense if quantized is None else quantized
            group.append(Projection(weight, lora_A, lora_B, scaling, None, None, p, seed))
            rows.append(as_rows(dy, dy.shape[-1]))
            lows.append(low)
            needs.append(Need(*ctx.needs_input_grad[4 * i + 2 : 4 * i + 4]))
            grads[4 * i + 2 : 4 * i + 4] = bias_grads(dy, scaling, bias, lora_bias)
        need_x = ctx.needs_input_grad[0]
        if not used or not (need_x or any(any(need) for need in needs)):
            return None, None, *grads
        run = OP_BACKWARD.run(*_case(x, group))
        dx, found = run(rows, as_rows(x, x.shape[-1]), group, lows, need_x, needs)
        for i, pair in zip(used, found, strict=True):
            grads[4 * i : 4 * i + 2] = pair
        return None if dx is None else dx.view(x.shape), None, *grads
