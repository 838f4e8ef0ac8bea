"""Coupling blocks: the definition, that the inverse undoes it, and that gradients are right."""

import itertools

import pytest
import torch
from tolerance import assert_close

from fusetune.methods.bottleneck import coupling

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "tanh", "leakyrelu", "sigmoid", "identity")
EPS = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 3e-2}


def block(kind, hidden_size=16, reduction_factor=2, activation="relu", gain=1.0):
    """A block whose networks matter: weights of unit gain, times gain."""
    module = coupling.COUPLINGS[kind](hidden_size, reduction_factor, activation)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.copy_(gain * noise / fan_in**0.5)
    return module


def network(part, x, f):
    hidden = f(x @ part["0"].weight.T + part["0"].bias)
    return hidden @ part["2"].weight.T + part["2"].bias


def defined(module, x):
    """The formulas of coupling.py, in x's dtype."""
    f = coupling.ACTIVATIONS[module.activation][0]
    h1 = x.shape[-1] // 2
    x1, x2 = x[..., :h1], x[..., h1:]
    if isinstance(module, coupling.NiceCoupling):
        y1 = x1 + network(module.F, x2, f)
        y2 = x2 + network(module.G, y1, f)
        return torch.cat((y1, y2), -1)
    bound = coupling.LOG_SCALE_BOUND
    s, t = network(module.F, x2, f).split(h1, -1)
    y1 = x1 * torch.exp(bound * torch.tanh(s / bound)) + t
    s, t = network(module.G, y1, f).split(x.shape[-1] - h1, -1)
    y2 = x2 * torch.exp(bound * torch.tanh(s / bound)) + t
    return torch.cat((y1, y2), -1)


@pytest.mark.parametrize("hidden_size", [16, 17, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_forward_and_gradients_are_those_of_the_definition(kind, activation, hidden_size):
    module = block(kind, hidden_size, activation=activation)
    x = torch.randn(3, 5, hidden_size)
    projection = torch.randn_like(x)

    def run(function, dtype, tokens=slice(None)):
        module.to(dtype).zero_grad()
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = function(leaf)
        (y * projection.to(dtype))[tokens].sum().backward()
        named = {n: p.grad.clone() for n, p in module.named_parameters()}
        return {"y": y.detach(), "x": leaf.grad, **named}

    exact = run(lambda leaf: defined(module, leaf), torch.float64)
    eager = run(lambda leaf: defined(module, leaf), torch.float32)
    # Gradients of weights are sums over tokens of either sign, which may all but cancel.
    parts = [
        run(lambda leaf: defined(module, leaf), torch.float64, (i, j))
        for i in range(3)
        for j in range(5)
    ]
    got = run(module, torch.float32)
    for name in exact:
        magnitude = exact[name].abs() + exact[name].abs().max()
        if name not in ("x", "y"):
            magnitude = sum(part[name].abs() for part in parts) * 2
        assert_close(name, got[name], exact[name], eager[name], magnitude)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("hidden_size", [64, 65, 2])
@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_inverse_undoes_forward(kind, hidden_size, dtype):
    """To 1e-6 of the largest value in fp32, in either order."""
    module = block(kind, hidden_size, activation="gelu", gain=0.3).to(dtype)
    x = torch.randn(4, 7, hidden_size, dtype=dtype)
    for first, second in itertools.permutations((module.forward, module.inverse)):
        y = first(x)
        assert (y - x).abs().max() > 0.05  # it does something
        assert (second(y) - x).abs().max() <= EPS[dtype] * x.abs().max()


@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_inverse_with_large_weights(kind):
    """The error of the inverse is amplified by the networks' slopes, and by nothing else."""
    module = block(kind, 32, gain=3.0).double()
    x = 100 * torch.randn(64, 32, dtype=torch.float64)
    assert (module.inverse(module(x)) - x).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_gradients_pass_through_the_inverse(kind):
    """Down and up again is the identity; so is its derivative, and that by the weights is zero."""
    module = block(kind, 16, activation="tanh").double()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    projection = torch.randn_like(x)
    (module.inverse(module(x)) * projection).sum().backward()
    torch.testing.assert_close(x.grad, projection)
    for parameter in module.parameters():
        assert parameter.grad.abs().max() < 1e-12
    module.zero_grad()
    (module.inverse(x) * projection).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-3 for parameter in module.parameters())


def test_nice_keeps_volume_and_glow_does_not():
    """What sets affine coupling apart: the logarithm of |det| is the sum of the log scales."""
    x = torch.randn(8, dtype=torch.float64)
    nice = torch.autograd.functional.jacobian(block("nice", 8, activation="tanh").double(), x)
    glow = torch.autograd.functional.jacobian(block("glow", 8, activation="tanh").double(), x)
    assert torch.linalg.det(nice).item() == pytest.approx(1, abs=1e-12)
    assert abs(torch.linalg.det(glow).log().item()) > 0.1


def test_log_scales_of_glow_are_bounded():
    module = block("glow", 8, gain=1e4).double()
    scale, _ = module._scale_and_shift(module.F, torch.randn(100, 4, dtype=torch.float64))
    assert scale.abs().max() <= coupling.LOG_SCALE_BOUND


def test_a_new_block_is_near_the_identity():
    x = torch.randn(6, 64)
    assert torch.equal(coupling.GlowCoupling(64, 2, "relu")(x), x)
    assert (coupling.NiceCoupling(64, 2, "relu")(x) - x).abs().max() < 0.1


def test_16_bit_values_with_32_bit_weights():
    """PEFT keeps adapters in fp32: nothing but the result is rounded to x's dtype."""
    for kind, hidden_size in (("nice", 16), ("nice", 17), ("glow", 16)):
        module = block(kind, hidden_size)
        x = torch.randn(3, hidden_size, dtype=torch.bfloat16)
        y = module(x)
        assert y.dtype == torch.bfloat16
        exact = defined(block_as(module, torch.float64), x.double())
        # y1 rounded feeds G, whose slope is about one: three roundings of it all.
        assert (y.double() - exact).abs().max() < 3 * 2**-8 * exact.abs().max()


def block_as(module, dtype):
    copy = coupling.COUPLINGS["nice" if isinstance(module, coupling.NiceCoupling) else "glow"](
        sum(module.split), 2, module.activation
    ).to(dtype)
    copy.load_state_dict(module.state_dict())
    return copy


@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_compiles_in_one_graph(kind, fresh_compiler):
    module = block(kind, 16)
    x = torch.randn(5, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_empty_batch():
    for kind in coupling.COUPLINGS:
        assert block(kind, 16)(torch.empty(0, 16)).shape == (0, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 2, "relu"), "hidden_size must be at least 2"),
        ((16, 0, "relu"), "reduction_factor must be positive"),
        ((16, 2, "swish"), "activation must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        coupling.NiceCoupling(*arguments)


def test_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 16\]"):
        coupling.NiceCoupling(16, 2, "relu")(torch.randn(2, 15))
