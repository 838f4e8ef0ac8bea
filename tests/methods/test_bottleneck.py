"""Every option of a bottleneck adapter against its definition in float64, with gradients."""

import itertools

import pytest
import torch
from tolerance import assert_close
from torch import nn
from torch.nn import functional

from fusetune.methods import BottleneckConfig
from fusetune.methods.bottleneck.adapter import BottleneckAdapter, groupable, grouped
from fusetune.reference.bottleneck import ACTIVATIONS

B, T, H, D = 3, 5, 16, 4

# Each option in what it may do to the others: the input and residual, and the result.
OPTIONS = [
    {},
    {"scaling": 0.5},
    {"scaling": 4},
    {"scaling": "learned"},
    {"scaling": "channel"},
    {"use_gating": True},
    {"ln_before": True},
    {"ln_after": True},
    {"ln_after": True, "adapter_residual_before_ln": True},
    {"ln_before": True, "ln_after": True, "use_gating": True, "scaling": "channel"},
    {"ln_after": True, "use_gating": True, "adapter_residual_before_ln": True},
]
PLACEMENTS = [
    {},
    {"original_ln_before": True},
    {"original_ln_before": True, "residual_before_ln": False},
    {"original_ln_before": True, "residual_before_ln": "post_add"},
    {"is_parallel": True},
]
NAMES = [name for name in ACTIVATIONS if name != "identity"]


def definition(adapter, hidden, stream, norm):
    """The result before the closing LayerNorm, from the config and plain PyTorch."""
    c, p = adapter.config, dict(adapter.named_parameters())

    def linear(name, x):
        return functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def layer_norm(name, x):
        return functional.layer_norm(x, (H,), p[f"{name}.weight"], p[f"{name}.bias"])

    if c.is_parallel:
        x = stream
    elif c.original_ln_before:
        x = norm(hidden + stream)
    else:
        x = hidden
    residual = {True: hidden, False: x, "post_add": hidden + stream}[c.residual_before_ln]
    if c.is_parallel:
        residual = hidden
    z = linear("down", layer_norm("norm_before", x) if c.ln_before else x)
    y = linear("up", ACTIVATIONS[c.activation][0](z))
    y = y * (p["scaling"] if isinstance(c.scaling, str) else c.scaling)
    if c.use_gating:
        y = y * torch.sigmoid(linear("gate", x)).mean(dim=1, keepdim=True)
    first = c.adapter_residual_before_ln and not c.is_parallel
    y = y + residual if first else y
    y = layer_norm("norm_after", y) if c.ln_after else y
    return y if first else y + residual


def make(config, dtype, seed=0):
    torch.manual_seed(seed)
    adapter = BottleneckAdapter(H, D, config).double()
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.5)
    return adapter.to(dtype)


def inputs(dtype):
    torch.manual_seed(1)
    hidden, stream, projection = (torch.randn(B, T, H, dtype=torch.float64) for _ in range(3))
    norm = nn.LayerNorm(H).double()
    norm.weight.data.normal_()
    tensors = [t.to(torch.float32).to(dtype) for t in (hidden, stream, projection)]
    return [t.requires_grad_() for t in tensors[:2]], tensors[2], norm.to(torch.float32).to(dtype)


def ours(adapter, hidden, stream, norm):
    x, residual = adapter.enter(hidden, stream, norm)
    return adapter(x, residual, hidden)


def run(function, config, dtype):
    """{name: result or gradient}."""
    adapter = make(config, torch.float32).to(dtype)
    (hidden, stream), projection, norm = inputs(dtype)
    y = function(adapter, hidden, stream, norm)
    (y * projection).sum().backward()
    results = {"y": y.detach(), "hidden": hidden.grad, "stream": stream.grad}
    results |= {n: p.grad for n, p in [*adapter.named_parameters(), *norm.named_parameters()]}
    return {name: result for name, result in results.items() if result is not None}


def check(config):
    exact = run(definition, config, torch.float64)
    eager = run(definition, config, torch.float32)
    got = run(ours, config, torch.float32)
    assert got.keys() == exact.keys()
    largest = max(result.abs().max() for result in exact.values())
    for name, result in got.items():
        magnitude = exact[name].abs() + largest  # sums of products of the others' size
        assert_close(name, result, exact[name], eager[name], magnitude)
    # And the same to float64's rounding in float64, where no chance hides a difference.
    for name, result in run(ours, config, torch.float64).items():
        assert torch.allclose(result, exact[name], rtol=1e-11, atol=1e-11 * float(largest)), name


@pytest.mark.parametrize(
    ("options", "placement"),
    list(itertools.product(OPTIONS, PLACEMENTS)),
    ids=lambda changes: ",".join(changes) or "default",
)
def test_options(options, placement):
    check(BottleneckConfig(reduction_factor=H / D, **options, **placement))


@pytest.mark.parametrize("name", [*NAMES, "swish", "linear"])
def test_activations(name):
    check(BottleneckConfig(non_linearity=name))


def test_without_a_norm_the_sum_goes_in():
    adapter = make(BottleneckConfig(original_ln_before=True), torch.float64)
    (hidden, stream), _, _ = inputs(torch.float64)
    expected = definition(adapter, hidden, stream, lambda x: x)
    assert torch.allclose(ours(adapter, hidden, stream, None), expected)


def test_dropout_is_on_the_branch_alone():
    config = BottleneckConfig(dropout=0.5)
    adapter = make(config, torch.float32)
    (hidden, stream), _, norm = inputs(torch.float32)
    branch = adapter.output(hidden)
    dropped = ours(adapter, hidden, stream, norm) - hidden
    kept = dropped.abs() > 1e-6
    assert 0.2 < kept.float().mean() < 0.8
    assert torch.allclose(dropped[kept], 2 * branch[kept], atol=1e-5)
    adapter.eval()
    assert torch.allclose(ours(adapter, hidden, stream, norm) - hidden, branch, atol=1e-5)


def test_stochastic_depth_skips_whole_sequences():
    adapter = make(BottleneckConfig(stochastic_depth=0.5), torch.float32)
    hidden = torch.randn(64, T, H)
    branch = adapter.eval().output(hidden)
    adapter.train()
    ratio = (adapter(hidden, hidden, hidden) - hidden) / branch
    skipped = ratio.abs().amax(dim=(1, 2)) < 1e-3
    assert 0.2 < skipped.float().mean() < 0.8
    assert (ratio[~skipped] - 2).abs().max() < 1e-2
    # The parallel kind knows none, as in adapters.
    adapter.config = BottleneckConfig.parallel(stochastic_depth=0.5, scaling=1.0)
    assert torch.allclose(adapter(hidden, hidden, hidden) - hidden, branch, atol=1e-5)


@pytest.mark.parametrize(
    "scalings", [(1.0, 1.0), (0.5, 2.0), ("learned", "channel"), ("channel", 3.0)]
)
def test_a_group_equals_its_adapters(scalings):
    adapters = [make(BottleneckConfig(scaling=s), torch.float64, i) for i, s in enumerate(scalings)]
    for adapter in adapters:
        adapter.zero_grad()
    assert groupable(adapters)
    x = torch.randn(5, T, H, dtype=torch.float64, requires_grad=True)
    parts = (x[:2], x[2:])
    expected = torch.cat([a(part, part, part) for a, part in zip(adapters, parts, strict=True)])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *parameters(adapters)])
    got = grouped(adapters, x, x, [2, 3])
    assert torch.allclose(got, expected, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), [x, *parameters(adapters)]), wanted, strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-9)


def parameters(adapters):
    return [p for adapter in adapters for p in adapter.parameters()]


def test_what_makes_no_group():
    plain = make(BottleneckConfig(), torch.float32)
    for other in (
        make(BottleneckConfig(non_linearity="gelu"), torch.float32),
        make(BottleneckConfig(ln_before=True), torch.float32),
        make(BottleneckConfig(dropout=0.1), torch.float32),
        BottleneckAdapter(H, D + 1, BottleneckConfig()),
    ):
        assert not groupable([plain, other])
    assert groupable([plain, make(BottleneckConfig(), torch.float32)])


def test_initialisations():
    def weights(**changes):
        torch.manual_seed(0)
        return BottleneckAdapter(256, 128, BottleneckConfig(**changes))

    bert = weights(use_gating=True)
    for layer in (bert.down, bert.up, bert.gate):
        assert 0.017 < layer.weight.std() < 0.023
        assert not layer.bias.any()
    houlsby = weights(init_weights="houlsby")
    for layer in (houlsby.down, houlsby.up):
        assert layer.weight.abs().max() <= 0.02
        assert 0.0075 < layer.weight.std() < 0.0095  # of a normal of 0.01, cut at two deviations
        assert not layer.bias.any()
    zero = weights(init_weights="mam_adapter")
    assert not zero.up.weight.any()
    assert zero.down.weight.abs().max() <= 1 / 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mh_adapter": False, "output_adapter": False}, "one of mh_adapter"),
        ({"non_linearity": "mish"}, "non_linearity must be one of"),
        ({"scaling": "linear"}, "scaling must be one of"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"stochastic_depth": -0.1}, "stochastic_depth must be in"),
        ({"residual_before_ln": "after"}, "residual_before_ln must be one of"),
        ({"residual_before_ln": "post_add"}, "needs original_ln_before"),
        ({"init_weights": "zeros"}, "init_weights must be one of"),
        ({"reduction_factor": 0}, "reduction_factor must be positive"),
        ({"reduction_factor": {"default": "4"}}, "reduction_factor must be positive"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**changes)


def test_sizes():
    config = BottleneckConfig(reduction_factor={1: 3, "2": 0.5})
    assert config.bottleneck_size(16, 1) == 5
    assert config.bottleneck_size(16, 2) == 32
    with pytest.raises(ValueError, match='neither layer "0" nor "default"'):
        config.bottleneck_size(16, 0)
    assert BottleneckConfig(reduction_factor=100).bottleneck_size(16, 0) == 1
