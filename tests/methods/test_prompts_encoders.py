"""The networks that prompts are trained through, against numbers worked out by hand."""

import pytest
import torch

from fusetune.methods.prompts.encoders import Encoder, PromptLSTM, prefix_mlp, prompt_mlp
from fusetune.methods.prompts.initialisation import build
from fusetune.methods.prompts.shallow_config import PTuningConfig


class Sizes:
    """Of a model, as far as a shallow prompt asks."""

    hidden_size = 6


def set_(parameter, values):
    parameter.data.copy_(torch.tensor(values, dtype=parameter.dtype))


def test_prefix_mlp_by_hand():
    network = prefix_mlp(2, 2, 3).double()
    set_(network[0].weight, [[1.0, -1.0], [0.5, 2.0]])
    set_(network[0].bias, [0.0, 0.25])
    set_(network[2].weight, [[1.0, 0.0], [2.0, -1.0], [0.0, 3.0]])
    set_(network[2].bias, [0.1, 0.0, -0.5])
    # First row: W x + b = (1 - 0.5, 0.5 + 1 + 0.25) = (0.5, 1.75);
    # tanh: 0.46211715726, 0.94137553849. Second row: (0, 0.25); tanh: 0, 0.24491866240.
    expected = [
        [0.46211715726 + 0.1, 2 * 0.46211715726 - 0.94137553849, 3 * 0.94137553849 - 0.5],
        [0.1, -0.24491866240, 3 * 0.24491866240 - 0.5],
    ]
    got = network(torch.tensor([[1.0, 0.5], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_prompt_mlp_by_hand():
    network = prompt_mlp(1, 2).double()
    set_(network[0].weight, [[1.0], [-1.0]])
    set_(network[0].bias, [0.5, 0.0])
    set_(network[2].weight, [[1.0, 2.0], [1.0, -1.0]])
    set_(network[2].bias, [0.0, -1.0])
    set_(network[4].weight, [[3.0, 5.0]])
    set_(network[4].bias, [0.25])
    # x = 2: (2.5, 0) -> (2.5, 1.5) -> 7.5 + 7.5 + 0.25; x = -1: (0, 1) -> (2, 0) -> 6.25
    got = network(torch.tensor([[2.0], [-1.0]], dtype=torch.float64))
    assert got.flatten().tolist() == [15.25, 6.25]


def cell(x, h, c, lstm, suffix):
    """One step of an LSTM (Hochreiter and Schmidhuber 1997): gates in the order i, f, g, o."""
    w, u = getattr(lstm, f"weight_ih_{suffix}"), getattr(lstm, f"weight_hh_{suffix}")
    b = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}")
    i, f, g, o = (w @ x + u @ h + b).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def by_hand(network, prompt):
    lstm, mlp = network.lstm, network.mlp
    sequence = list(prompt)
    for number in range(lstm.num_layers):
        forward, backward = [], []
        for steps, order, suffix in (
            (forward, sequence, f"l{number}"),
            (backward, sequence[::-1], f"l{number}_reverse"),
        ):
            h = c = torch.zeros(lstm.hidden_size, dtype=prompt.dtype)
            for x in order:
                h, c = cell(x, h, c, lstm, suffix)
                steps.append(h)
        sequence = [torch.cat(pair) for pair in zip(forward, backward[::-1], strict=True)]
    hidden = [(mlp[0].weight @ x + mlp[0].bias).clamp(min=0) for x in sequence]
    return torch.stack([mlp[2].weight @ x + mlp[2].bias for x in hidden])


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("layers", [1, 2])
def test_lstm_step_by_step(length, layers):
    torch.manual_seed(0)
    network = PromptLSTM(6, 3, layers, 0.0).double()
    prompt = torch.randn(length, 6, dtype=torch.float64)
    torch.testing.assert_close(network(prompt), by_hand(network, prompt), atol=1e-14, rtol=1e-12)


def test_lstm_by_hand():
    """One unit each way, one position: numbers."""
    network = PromptLSTM(1, 1, 1, 0.0).double()
    for name, parameter in network.lstm.named_parameters():
        value = 0.0 if "bias" in name else 1.0
        set_(parameter, [value] * 4 if "bias" in name else [[value]] * 4)
    set_(network.lstm.weight_ih_l0_reverse, [[-1.0]] * 4)
    for linear, weight in ((network.mlp[0], [[1.0, 0.0], [0.0, -1.0]]), (network.mlp[2], [[1, 1]])):
        set_(linear.weight, weight)
        set_(linear.bias, [0.0] * len(weight))
    # x = 1 from zeros. Forward: gates sigmoid(1) = 0.7310585786, c = 0.7310585786 tanh(1) =
    # 0.5567699411, h = 0.7310585786 tanh(c) = 0.3696063529. Backward with -1: gates 0.2689414214,
    # c = -0.2048242148, h = 0.2689414214 tanh(c) = -0.0543280905. The MLP: h_f + (-h_b).
    got = network(torch.ones(1, 1, dtype=torch.float64)).item()
    assert got == pytest.approx(0.3696063529 + 0.0543280905, abs=1e-9)


def test_lstm_has_the_papers_sizes():
    """Hidden size h/2 in each direction, then h - ReLU - h."""
    network = build(PTuningConfig(num_virtual_tokens=4), None, Sizes()).network
    lstm = network.lstm
    assert (lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bidirectional) == (6, 3, 2, 1)
    shapes = [tuple(p.shape) for p in network.mlp.parameters()]
    assert shapes == [(6, 6), (6,), (6, 6), (6,)]


def test_lstm_dropout_is_of_training_only():
    torch.manual_seed(0)
    config = PTuningConfig(num_virtual_tokens=4, encoder_dropout=0.5)
    encoder = build(config, None, Sizes())
    assert not torch.equal(encoder(), encoder())
    before = encoder.evaluated()
    assert encoder.training
    # A kernel of its own without a gradient: equal up to rounding.
    torch.testing.assert_close(before, encoder.eval()().detach())


@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
def test_dropping_the_network_keeps_the_prompt(kind):
    config = PTuningConfig(num_virtual_tokens=4, encoder_reparameterization_type=kind)
    encoder = build(config, None, Sizes())
    prompt = encoder().detach()
    encoder.drop_network()
    torch.testing.assert_close(encoder().detach(), prompt)
    assert [name for name, _ in encoder.named_parameters()] == ["weight"]
    assert encoder.weight.requires_grad


def test_a_prompt_without_network_is_its_weight():
    encoder = Encoder(torch.randn(2, 3))
    assert encoder() is encoder.weight
