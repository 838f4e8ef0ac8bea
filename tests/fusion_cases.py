"""Arguments of adapter_fusion, its definition on them, and how far from it a result may be."""

import torch

from fusetune.ops import adapter_fusion
from fusetune.reference import adapter_fusion as reference
from fusetune.reference.dropout import new_seed

NAMES = ("query", "values", "query_weight", "query_bias", "key_weight", "key_bias")
ALL = (*NAMES, "value_weight", "residual")
CPU = torch.device("cpu")


def inputs(n, m, h, dtype=torch.float32, weights=None, scale=1.0, leave_out=()):
    """Every tensor argument, by name."""
    shapes = {
        "query": (m, h),
        "values": (n, m, h),
        "query_weight": (h, h),
        "query_bias": (h,),
        "key_weight": (h, h),
        "key_bias": (h,),
        "value_weight": (h, h),
        "residual": (m, h),
    }
    made = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape) * (h**-0.5 if name.endswith("weight") else 1)
        if name == "query":
            tensor *= scale
        kind = weights or dtype if name.endswith(("weight", "bias")) else dtype
        made[name] = None if name in leave_out else tensor.to(kind).requires_grad_()
    return made


def in_dtype(tensors, dtype):
    return {
        k: t if t is None else t.detach().to(dtype).requires_grad_() for k, t in tensors.items()
    }


def definition(tensors, temperature=1.0, dropout_p=0.0):
    seed = new_seed(CPU) if dropout_p else None
    positional = [tensors[name] for name in (*NAMES, "value_weight")]
    return reference.adapter_fusion(*positional, temperature, dropout_p, seed, tensors["residual"])[
        0
    ]


def fused(tensors, temperature=1.0, dropout_p=0.0, values=None):
    named = {**tensors, **({} if values is None else {"values": values})}
    return adapter_fusion(**named, temperature=temperature, dropout_p=dropout_p)


def eager(tensors, temperature=1.0, dropout_p=0.0):
    """As AdapterHub computes it, in the dtype of the tensors; scores dropped out by our mask."""

    def linear(x, weight, bias):
        return x if weight is None else torch.nn.functional.linear(x, weight, bias)

    stack = tensors["values"].permute(1, 0, 2)
    query = linear(tensors["query"], tensors["query_weight"], tensors["query_bias"])
    key = linear(stack, tensors["key_weight"], tensors["key_bias"])
    scores = torch.matmul(query.unsqueeze(1), key.transpose(-2, -1)).squeeze(1)
    seed = new_seed(CPU) if dropout_p else None
    p = torch.softmax(reference.dropout(scores, dropout_p, seed) / temperature, -1)
    value = linear(stack, tensors["value_weight"], None)
    out = torch.matmul(p.unsqueeze(1), value).squeeze(1)
    return out if tensors["residual"] is None else out + tensors["residual"]


def run(function, tensors, upper, **options):
    """The output and the gradients of all tensors there are."""
    torch.manual_seed(1)
    out = function(tensors, **options)
    leaves = [t for t in tensors.values() if t is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, upper.to(out.dtype))]


def magnitudes(tensors, upper, temperature, dropout_p):
    """What rounding errors scale with: each result with absolute values in the place of its terms.

    An error of a score is a relative error of p, and the sizes of scores count as such. dropout_p
    enters by the factor of what is kept.
    """
    a = {name: None if t is None else t.detach().double().abs() for name, t in tensors.items()}
    query, values, upper = a["query"], a["values"], upper.double().abs()
    identity = torch.eye(query.shape[1], dtype=torch.float64)
    w_q, w_k, w_v = (
        identity if a[name] is None else a[name]
        for name in ("query_weight", "key_weight", "value_weight")
    )
    zeros = query.new_zeros(query.shape[1])
    b_q, b_k = (zeros if a[name] is None else a[name] for name in ("query_bias", "key_bias"))
    slope = (1 / (1 - dropout_p) if dropout_p < 1 else 0) / temperature
    q, k = query @ w_q.T + b_q, values @ w_k.T + b_k
    score = slope * torch.einsum("mh,nmh->mn", q, k)
    p = 1 + score.amax(1, keepdim=True).expand_as(score)  # p <= 1, times its relative error
    attended = torch.einsum("mn,nmh->mh", p, values)
    dctx = upper @ w_v
    dp = torch.einsum("mh,nmh->mn", dctx, values)
    ds = slope * p * (dp + dp.amax(1, keepdim=True))
    dq, dk = torch.einsum("mn,nmh->mh", ds, k), torch.einsum("mn,mh->nmh", ds, q)
    flat = dk.flatten(0, 1)
    residual = 0 if a["residual"] is None else a["residual"]
    return {
        "out": attended @ w_v.T + residual,
        "query": dq @ w_q,
        "values": torch.einsum("mn,mh->nmh", p, dctx) + dk @ w_k,
        "query_weight": dq.T @ query,
        "query_bias": dq.sum(0),
        "key_weight": flat.T @ values.flatten(0, 1),
        "key_bias": flat.sum(0),
        "value_weight": upper.T @ attended,
        "residual": upper,
    }


def compare(tensors, temperature=1.0, dropout_p=0.0):
    """Ours against float64: within 4 roundings, in the dtype of the intermediate results."""
    upper = torch.randn_like(tensors["query"])
    options = {"temperature": temperature, "dropout_p": dropout_p}
    got = run(fused, tensors, upper, **options)
    exact = run(definition, in_dtype(tensors, torch.float64), upper, **options)
    sizes = magnitudes(tensors, upper, **options)
    limits = torch.finfo(tensors["query"].dtype)
    names = ["out", *(name for name, t in tensors.items() if t is not None)]
    for name, ours, true in zip(names, got, exact, strict=True):
        kind = tensors["query" if name == "out" else name].dtype
        assert ours.dtype == kind, f"{name}: {ours.dtype}"
        assert ours.shape == true.shape, f"{name}: {list(ours.shape)}"
        error = (ours.double() - true).abs()
        allowed = 4 * limits.eps * (sizes[name] + limits.smallest_normal)
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3g} of what is allowed"
