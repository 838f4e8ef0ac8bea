"""Cases of an op, against the libraries whose place it takes. `selection` has those to be measured.

A peer is left out where its library is not installed. Sizes are M rows of activations and a weight
[N, K]; they are fixed by the caller, so that the same code makes a short and a full run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fusetune import QuantizedWeight, ops
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of

from .timing import Case, Result, Run

EXACT = {torch.float32: 5e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Allowed relative error by dtype of the result: for 16 bits one rounding, at most half an ulp."""
INT16_ERROR = 2e-4
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
HAS_PEFT = HAS_BNB and importlib.util.find_spec("peft") is not None


def quantized(n: int, k: int, double_quant: bool = False) -> QuantizedWeight:
    return ops.quantize_4bit(torch.randn(n, k) / k**0.5, double_quant=double_quant)


def no_grad(run: Run) -> Run:
    def call() -> Result:
        with torch.no_grad():
            return run()

    return call


def linear_4bit(
    m: int, n: int, k: int, dtype: torch.dtype, *, double_quant: bool = False, int16: bool = False
) -> Case:
    """y = x W^T with an NF4 weight, no gradients."""
    w = quantized(n, k, double_quant)
    x = torch.randn(m, k).to(dtype)
    dense = dense_of(w, dtype)

    def ours() -> torch.Tensor:
        before = ops.decode_int16()
        ops.set_decode_int16(int16)
        try:
            return ops.linear_4bit(x, w)
        finally:
            ops.set_decode_int16(before)

    peers: dict[str, Run] = {"torch dense": no_grad(lambda: functional.linear(x, dense))}
    if HAS_BNB:
        param = w.to_bnb()
        peers = {"bitsandbytes": no_grad(lambda: bnb_matmul(x, param)), **peers}
    notes = (", double quant" if double_quant else "") + (", int16 activations" if int16 else "")
    return Case(
        op="linear_4bit",
        name=f"forward {NAMES[dtype]}{notes}",
        shape=f"{m} × {n} × {k}",
        ours=no_grad(ours),
        peers=peers,
        exact=lambda: x.double() @ dense_of(w, torch.float64).T,
        tolerance=INT16_ERROR if int16 else EXACT[dtype],
        flops=0.0 if int16 else 2.0 * m * n * k,
    )


def bnb_matmul(x: torch.Tensor, param: Any) -> torch.Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, param.data.t(), quant_state=param.quant_state)


def linear_4bit_dx(m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    """dx = dy W with an NF4 weight: the backward pass of a frozen layer, through autograd."""
    w = quantized(n, k)
    dy = torch.randn(m, n).to(dtype)
    dense = dense_of(w, dtype)

    def backward(forward: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        x = torch.zeros(m, k, dtype=dtype, requires_grad=True)
        y = forward(x)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    peers = {"torch dense": backward(lambda x: functional.linear(x, dense))}
    if HAS_BNB:
        param = w.to_bnb()
        peers = {"bitsandbytes": backward(lambda x: bnb_matmul(x, param)), **peers}
    return Case(
        op="linear_4bit",
        name=f"dX {NAMES[dtype]}",
        shape=f"{m} × {n} × {k}",
        ours=backward(lambda x: ops.linear_4bit(x, w)),
        peers=peers,
        exact=lambda: dy.double() @ dense_of(w, torch.float64),
        tolerance=EXACT[dtype],
        flops=2.0 * m * n * k,
    )


def lora_linear(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    rank: int,
    dropout: float,
    dense: bool,
    train: bool,
) -> Case:
    """A LoRA layer: forward, or forward and backward to x, lora_A and lora_B."""
    w = quantized(n, k, double_quant=True)
    weight: Any = dense_of(w, dtype) if dense else w
    a, b = torch.randn(rank, k) / k**0.5, torch.randn(n, rank)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    a.requires_grad_(train), b.requires_grad_(train)
    scaling = 2.0

    def layer(
        forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, params: list[torch.Tensor]
    ) -> Result:
        """y, or the gradients of x and of the adapter."""
        if not train:
            return forward(x)
        x = x.detach().requires_grad_()
        return torch.autograd.grad(forward(x), [x, *params], dy.to(x.dtype))

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Result:
        options: dict[str, Any] = {"dropout_p": dropout, "training": train}
        return layer(lambda x: ops.lora_linear(x, weight, a, b, scaling, **options), x, [a, b])

    peers: dict[str, Run] = {}
    if HAS_PEFT:
        peer, parameters = peft_layer(weight, n, k, dtype, a, b, scaling, dropout, train)
        name = "PEFT" if dense else "PEFT + bitsandbytes"
        peers[name] = grad_mode(train, lambda: layer(peer, x, parameters))

    def exact() -> Result:
        a64, b64 = (p.detach().double().requires_grad_(train) for p in (a, b))
        with ops.use_backend("reference"):
            return fused(x.double(), a64, b64)

    passes = "forward + backward" if train else "forward"
    kind = "dense" if dense else "NF4"
    notes = f", dropout {dropout:g}" if dropout else ""
    return Case(
        op="lora_linear",
        name=f"{passes} {NAMES[dtype]} {kind}, r={rank}{notes}",
        shape=f"{m} × {n} × {k}",
        ours=grad_mode(train, lambda: fused(x, a, b)),
        peers=peers,
        exact=exact,
        tolerance=4 * EXACT[dtype],  # up to four roundings in a row: s, ds, their product, the sum
        flops=(4.0 if train else 2.0) * m * n * k,
    )


def grad_mode(train: bool, run: Run) -> Run:
    return run if train else no_grad(run)


def peft_layer(
    weight: Any,
    n: int,
    k: int,
    dtype: torch.dtype,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dropout: float,
    train: bool,
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """PEFT's own layer around a dense or a 4-bit base layer, with the same numbers in it."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    if isinstance(weight, QuantizedWeight):
        base: Any = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype)
        base.weight = weight.to_bnb()
        base.quant_state = base.weight.quant_state
        # Packs its weight anew for inference in bfloat16 on some CPUs, and trains wrongly after it.
        base.support_avx512bf16_for_cpu = False
    else:
        base = torch.nn.Linear(k, n, bias=False, dtype=dtype)
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
    rank = a.shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=int(scaling * rank), lora_dropout=dropout, target_modules=["0"]
    )
    model: Any = inject_adapter_in_model(config, torch.nn.Sequential(base))
    layer = model[0]
    for target, value in ((layer.lora_A, a), (layer.lora_B, b)):
        target["default"].weight = torch.nn.Parameter(value.detach().clone(), requires_grad=train)
    layer.train(train)
    return layer, [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def quantize_4bit(n: int, k: int, dtype: torch.dtype, *, double_quant: bool = False) -> Case:
    """Bytes must equal bitsandbytes' bit for bit: its packed codes are the exact result."""
    weight = torch.randn(n, k).to(dtype)
    reference = packed_by_reference(weight)
    peers: dict[str, Run] = {}
    if HAS_BNB:
        from bitsandbytes.functional import quantize_4bit as bnb_quantize

        peers["bitsandbytes"] = lambda: bnb_quantize(
            weight, quant_type="nf4", compress_statistics=double_quant
        )[0].flatten()
    return Case(
        op="quantize_4bit",
        name=f"{NAMES[dtype]}{', double quant' if double_quant else ''}",
        shape=f"{n} × {k}",
        ours=lambda: ops.quantize_4bit(weight, double_quant=double_quant).packed,
        peers=peers,
        exact=lambda: reference,
        tolerance=0.0,
    )


def packed_by_reference(weight: torch.Tensor) -> torch.Tensor:
    with ops.use_backend("reference"):
        return ops.quantize_4bit(weight).packed.double()


def dequantize_4bit(n: int, k: int, dtype: torch.dtype, *, double_quant: bool = False) -> Case:
    w = quantized(n, k, double_quant)
    out = torch.empty(n, k, dtype=dtype)
    peers: dict[str, Run] = {}
    if HAS_BNB:
        from bitsandbytes.functional import dequantize_4bit as bnb_dequantize

        state = w.to_bnb().quant_state
        state.dtype = dtype
        packed = w.packed.view(-1, 1)
        peers["bitsandbytes"] = lambda: bnb_dequantize(packed, state)
    return Case(
        op="dequantize_4bit",
        name=f"{NAMES[dtype]}{', double quant' if double_quant else ''}",
        shape=f"{n} × {k}",
        ours=lambda: ops.dequantize_4bit(w, dtype, out=out),
        peers=peers,
        exact=lambda: dense_of(w, torch.float64),
        tolerance=EXACT[dtype],
    )


def cross_entropy(m: int, n: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of m rows of n logits."""
    logits, target = 3 * torch.randn(m, n).to(dtype), torch.randint(n, (m,))
    target[0] = -100

    def both(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> Run:
        def run() -> Result:
            x = logits.to(dtype).detach().requires_grad_()
            value = loss(x, target)
            return value.detach(), *torch.autograd.grad(value, x)

        return run

    return Case(
        op="cross_entropy",
        name=f"forward + backward {NAMES[dtype]}",
        shape=f"{m} × {n}",
        ours=both(ops.cross_entropy, dtype),
        peers={"torch": both(functional.cross_entropy, dtype)},
        exact=both(functional.cross_entropy, torch.float64),
        tolerance=4 * EXACT[dtype],  # exp and its sum round too
    )
