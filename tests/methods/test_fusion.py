"""AdapterFusion: the module against its definition, the schedule, the regulariser, the method."""

import copy

import pytest
import torch
from tolerance import assert_close

from fusetune.methods.bottleneck import fusion

B, T, H = 2, 5, 16


def module(n_seed=0, **options):
    """A fusion whose every projection matters."""
    torch.manual_seed(n_seed)
    layer = fusion.AdapterFusion(H, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.4 / H**0.5))
    return layer


def tensors(n):
    return torch.randn(B, T, H), [torch.randn(B, T, H) for _ in range(n)], torch.randn(B, T, H)


def defined(layer, query, outputs, residual, temperature):
    """The formulas of fusion.py, unfolded: every u_i is projected."""
    stack = torch.stack(outputs)
    if layer.residual_before:
        stack = stack + residual
    q = query if layer.query is None else query @ layer.query.weight.T + layer.query.bias
    k = stack if layer.key is None else stack @ layer.key.weight.T + layer.key.bias
    v = stack if layer.value is None else stack @ layer.value.weight.T
    p = torch.softmax((q * k).sum(-1) / temperature, dim=0)
    out = (p.unsqueeze(-1) * v).sum(0)
    return out if layer.residual_before else out + residual


OPTIONS = [
    {},
    {"value": False},
    {"query": False},
    {"key": False},
    {"query": False, "key": False},
    {"query": False, "key": False, "value": False},
    {"residual_before": True},
    {"temperature": 3.0},
    {"temperature": True},
    {"temperature": True, "query": False},
]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradients_are_those_of_the_definition(options, n):
    layer = module(**options)
    temperature = {True: 50.0, False: 1.0}.get(options.get("temperature", False), 3.0)
    query, outputs, residual = tensors(n)
    projection = torch.randn(B, T, H)

    def run(function, dtype):
        layer.to(dtype).zero_grad()
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (query, *outputs, residual)]
        out = function(leaves[0], leaves[1:-1], leaves[-1])
        (out * projection.to(dtype)).sum().backward()
        named = {
            name: p.grad.clone()
            for name, p in layer.named_parameters()
            if name != "key.bias"  # zero, but for rounding
        }
        return {"out": out.detach(), **{str(i): t.grad for i, t in enumerate(leaves)}, **named}

    def expected(*arguments):
        return defined(layer, *arguments, temperature)

    exact, eager = run(expected, torch.float64), run(expected, torch.float32)
    got = run(lambda *arguments: layer(*arguments)[0], torch.float32)
    for name in exact:
        magnitude = exact[name].abs() + exact[name].abs().max()
        assert_close(name, got[name], exact[name], eager[name], magnitude)


def test_attention_sums_to_one_and_is_softmax():
    layer = module()
    query, outputs, residual = tensors(3)
    _, p = layer(query, outputs, residual)
    assert p.shape == (B, T, 3)
    torch.testing.assert_close(p.sum(-1), torch.ones(B, T))
    assert p.std() > 0.01  # not uniform: the scores matter


def test_no_scores_are_dropped_in_evaluation():
    layer = module(dropout_p=0.5)
    query, outputs, residual = tensors(3)
    first, second = (layer(query, outputs, residual)[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    first, second = (layer(query, outputs, residual)[0] for _ in range(2))
    assert torch.equal(first, second)


class Model(torch.nn.Module):
    """Two fusions, whose temperatures are stepped at the entry."""

    def __init__(self):
        super().__init__()
        self.first = module(temperature=True)
        self.second = module(temperature=True)

    def forward(self, query, outputs, residual):
        self.first.step()
        self.second.step()
        return self.second(self.first(query, outputs, residual)[0], outputs, residual)[0]


def temperatures(model):
    return [round(layer.current_temperature().item(), 4) for layer in (model.first, model.second)]


def test_temperature_steps_in_training_only():
    """adapters steps in evaluation too, so that the same input gives another output each time."""
    model = Model()
    arguments = tensors(2)
    assert temperatures(model) == [50, 50]
    for expected in (50, 49.95, 49.9):
        model(*arguments)
        assert temperatures(model) == [expected, expected]
    model.eval()
    outputs = [model(*arguments) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert temperatures(model) == [49.9, 49.9]


def test_temperature_ends_at_one():
    model = Model()
    model.first.steps.fill_(981)
    assert model.first.current_temperature() == 1
    model.first.steps.fill_(980)
    assert model.first.current_temperature().item() == pytest.approx(1.05, abs=1e-5)
    model.first.steps.fill_(5000)
    assert model.first.current_temperature() == 1


def test_temperature_is_saved():
    """adapters keeps it in a Python attribute: a loaded fusion starts again at 50."""
    model = Model()
    for _ in range(7):
        model(*tensors(2))
    loaded = Model()
    loaded.load_state_dict(model.state_dict())
    assert temperatures(loaded) == temperatures(model) == [49.7, 49.7]
    assert temperatures(copy.deepcopy(model)) == [49.7, 49.7]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_takes_the_same_temperature_twice(use_reentrant):
    model = Model()
    query, outputs, residual = tensors(2)
    layer = model.first

    def gradients(recompute):
        model.zero_grad()
        layer.step()
        leaf = query.clone().requires_grad_()

        def run(q):
            return layer(q, outputs, residual)[0]

        if recompute:
            out = torch.utils.checkpoint.checkpoint(run, leaf, use_reentrant=use_reentrant)
        else:
            out = run(leaf)
        out.square().sum().backward()
        return [leaf.grad, *(p.grad for p in layer.parameters())]

    layer.steps.fill_(960)  # at 2.05, where a step is felt
    plain = gradients(False)
    layer.steps.fill_(960)
    for a, b in zip(plain, gradients(True), strict=True):
        assert torch.equal(a, b)
    assert layer.steps == 961


def test_regularization():
    layer = module()
    identity = torch.eye(H, dtype=torch.float64)
    exact = 0.01 * (identity - layer.value.weight.double()).square().sum()
    assert layer.regularization().item() == pytest.approx(exact.item(), rel=1e-6)
    layer.regularization().backward()
    torch.testing.assert_close(
        layer.value.weight.grad, (-0.02 * (identity - layer.value.weight)).float()
    )
    with pytest.raises(ValueError, match="no value matrix"):
        module(value=False).regularization()


def test_regularization_of_a_model_counts_what_is_trained():
    layers = torch.nn.ModuleList(
        [module(), module(value=False), module(regularization=False), module(n_seed=1)]
    )
    both = layers[0].regularization() + layers[3].regularization()
    torch.testing.assert_close(fusion.fusion_regularization(layers), both)
    layers[3].requires_grad_(False)
    assert fusion.fusion_regularization(layers) == layers[0].regularization()
    layers.requires_grad_(False)
    assert fusion.fusion_regularization(layers) == 0


def test_value_is_the_identity_at_first():
    weight = fusion.AdapterFusion(H).value.weight
    assert torch.equal(weight.diagonal(), torch.ones(H))
    off = weight - torch.diag(weight.diagonal())
    assert (off[~torch.eye(H, dtype=torch.bool)] == fusion.OFF_DIAGONAL).all()
    other = fusion.AdapterFusion(H, value_initialized=False).value.weight
    assert 0.01 < other.std() < 0.03
