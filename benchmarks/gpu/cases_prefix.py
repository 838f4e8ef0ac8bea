"""Attention to a prefix, beside keys and values that are joined, and a prompt's embeddings."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.gpu import schemes_prefix
from benchmarks.gpu.measured import Entry, Measured, half_dtype
from fusetune import ops
from fusetune.bench import prefix_cases, prompt_cases
from fusetune.bench.timing import Result, Run

Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # query, key, value, flat prefix


class Layer(NamedTuple):
    """Causal attention of B rows of T tokens."""

    batch: int
    tokens: int
    heads: int
    heads_kv: int
    dim: int


SMOLLM2, LLAMA = Layer(8, 512, 9, 3, 64), Layer(8, 512, 32, 8, 128)


def attention(layer: Layer, count: int, *, wide: bool, train: bool) -> Measured:
    """Forward without gradients, or forward and backward to query, key, value and prefix.

    count: P. wide: a prefix in fp32 beside 16-bit activations; else PEFT's cast is before the op.
    """
    batch, tokens, heads, heads_kv, dim = layer
    dtype = half_dtype()
    kind = torch.float32 if wide else dtype
    # As a model has them: heads behind tokens.
    query, dout = (_by_tokens(layer, heads, dtype) for _ in range(2))
    key, value = (_by_tokens(layer, heads_kv, dtype) for _ in range(2))
    flat = torch.randn(count, 2 * heads_kv * dim).to(kind)
    mask = schemes_prefix.causal_mask(batch, tokens, count)

    def run(attend: Attention, convert: Callable[[Tensor], Tensor]) -> Run:
        given = [convert(t) for t in (query, key, value, flat)]
        upper = convert(dout)

        def call() -> Result:
            leaves = [t.detach().requires_grad_(train) for t in given]
            with torch.set_grad_enabled(train):
                out = attend(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, upper)) if train else out

        return call

    def ours(query: Tensor, key: Tensor, value: Tensor, flat: Tensor) -> Tensor:
        prefix = flat.view(count, 2, heads_kv, dim).unbind(1)
        return ops.prefix_attention(query, key, value, *prefix, is_causal=True)

    def masked(scheme: schemes_prefix.Scheme) -> Attention:
        return lambda *tensors: scheme(*tensors, mask)

    def same(tensor: Tensor) -> Tensor:
        return tensor

    schemes = schemes_prefix.SCHEMES.items()
    runs = {"ours": run(ours, same), **{n: run(masked(scheme), same) for n, scheme in schemes}}
    exact = run(masked(schemes_prefix.joined_eager), Tensor.double)
    return Measured(runs, exact, prefix_cases.TOLERANCE[dtype])


def _by_tokens(layer: Layer, heads: int, dtype: torch.dtype) -> Tensor:
    shape = layer.batch, layer.tokens, heads, layer.dim
    return torch.randn(shape).to(dtype).transpose(1, 2)


def prompt(batch: int, tokens: int, count: int, hidden: int, vocabulary: int) -> Measured:
    """A batch's input of P prompt and T token embeddings, and the prompt's gradient."""
    dtype = half_dtype()
    ids = torch.randint(vocabulary, (batch, tokens))
    weight, first = torch.randn(vocabulary, hidden).to(dtype), torch.randn(count, hidden)
    dout = torch.randn(batch, count + tokens, hidden).to(dtype)

    def run(embed: Callable[[Tensor, Tensor, Tensor], Tensor], wide: bool) -> Run:
        table, trained, upper = (t.double() if wide else t for t in (weight, first, dout))

        def call() -> Result:
            leaf = trained.detach().requires_grad_()
            out = embed(ids, table, leaf)
            return out.detach(), *torch.autograd.grad(out, leaf, upper)

        return call

    runs = {"ours": run(ops.prompt_embed, False), "eager": run(schemes_prefix.embedded, False)}
    exact = run(schemes_prefix.embedded, True)
    return Measured(runs, exact, prompt_cases.TOLERANCE[dtype])


def prefix_entries() -> Iterator[Entry]:
    models = {"SmolLM2": SMOLLM2, "LLaMA": LLAMA}
    for wide in (False, True):
        for count in (32, 128):
            for name, layer in models.items():
                key = f"prefix attention {name} P={count}{', fp32' * wide}"
                options = {"wide": wide, "train": True}
                yield key, lambda s=layer, p=count, o=options: attention(s, p, **o)
    for tokens, count, hidden, vocabulary in ((512, 20, 576, 49152), (512, 100, 4096, 32000)):
        sizes = 8, tokens, count, hidden, vocabulary
        yield f"prompt {hidden} P={count}", lambda s=sizes: prompt(*s)
    for name, layer in models.items():
        key = f"prefix attention {name} P=32, forward"
        yield key, lambda s=layer: attention(s, 32, wide=False, train=False)


def simulated_prefix() -> Iterator[Entry]:
    layer = Layer(2, 9, 4, 2, 16)
    yield "prefix attention P=5", lambda: attention(layer, 5, wide=False, train=True)
    yield "prefix attention P=5, fp32", lambda: attention(layer, 5, wide=True, train=True)
    yield "prefix attention P=5, forward", lambda: attention(layer, 5, wide=False, train=False)
    yield "prompt 40 P=3", lambda: prompt(2, 7, 3, 40, 50)
