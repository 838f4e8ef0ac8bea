"""What is measured of bottleneck adapters: one branch, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fusetune import ops

from . import composed
from .timing import Case, Result, Run

Tensor = torch.Tensor
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Up to four roundings in a row: z, f(z), dz, the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def bottleneck(
    m: int,
    h: int,
    d: int,
    dtype: torch.dtype,
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    rows: list[int] | None = None,
) -> Case:
    """Forward, and backward to x, the residual and all parameters, as a training step runs it."""
    lead = () if rows is None else (len(rows),)
    parameters = [torch.randn(*lead, d, h) / h**0.5, torch.randn(*lead, d)]
    parameters += [torch.randn(*lead, h, d) / d**0.5, torch.randn(*lead, h)]
    x, residual, dy = (torch.randn(m, h).to(dtype) for _ in range(3))

    def step(branch: Callable[..., Tensor], convert: Callable[[Tensor], Tensor]) -> Run:
        leaves = [convert(t).detach().requires_grad_() for t in (x, *parameters, residual)]

        def run() -> Result:
            y = branch(*leaves)
            # In a model x and the residual are no leaves: gradients are handed on, not copied.
            return y.detach(), *torch.autograd.grad(y, leaves, convert(dy))

        return run

    def ours(*leaves: Tensor) -> Tensor:
        *given, residual = leaves
        options = {"activation": activation, "dropout_p": dropout, "rows": rows}
        return ops.bottleneck(*given, residual=residual, **options)  # type: ignore[arg-type]

    def exact() -> Result:
        with ops.use_backend("reference"):
            return step(ours, Tensor.double)()

    def plain(*leaves: Tensor) -> Tensor:
        *given, residual = leaves
        return composed.bottleneck(*given, activation=activation, residual=residual)

    notes = f", dropout {dropout:g}" if dropout else ""
    notes += "" if rows is None else f", {len(rows)} groups"
    comparable = activation == "relu" and not dropout and rows is None
    return Case(
        op="bottleneck",
        name=f"forward + backward {NAMES[dtype]}, {activation}, d={d}{notes}",
        shape=f"{m} × {h}",
        ours=step(ours, lambda t: t),
        peers={"torch": step(plain, lambda t: t)} if comparable else {},
        exact=exact,
        tolerance=TOLERANCE[dtype],
        flops=12.0 * m * h * d,
    )


def bottleneck_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    """Of the sizes of a BERT base and of a 7B model, whatever the caller's sizes of a weight."""
    yield bottleneck(4096, 768, 48, torch.float32)
    if full:
        yield bottleneck(2048, 4096, 64, torch.float32)
        yield bottleneck(4096, 768, 48, torch.bfloat16)
        yield bottleneck(4096, 768, 48, torch.float32, dropout=0.1)
        yield bottleneck(4096, 768, 48, torch.float32, rows=[1024] * 4)
