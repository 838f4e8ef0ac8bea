"""`python -m benchmarks.bench_methods` on tiny models, and what it counts and times with."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks and examples are no part of the package

pytest.importorskip("peft")
pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")

from benchmarks import bench_methods, methods, operators, readme  # noqa: E402
from benchmarks.own_process import in_own_process  # noqa: E402
from examples.minilm import MeanPooled  # noqa: E402
from fusetune import ops  # noqa: E402
from fusetune.bench import composed  # noqa: E402
from fusetune.bench.in_turn import in_turn  # noqa: E402

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 97}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a LLaMA, a BERT), of three layers: what the calls are counted on."""
    import transformers

    torch.manual_seed(0)
    decoder, encoder = (tmp_path_factory.mktemp(name) for name in ("decoder", "encoder"))
    llama = transformers.LlamaConfig(**SIZE, num_hidden_layers=3, num_key_value_heads=2)
    transformers.LlamaForCausalLM(llama).save_pretrained(decoder)
    bert = transformers.BertConfig(**SIZE, num_hidden_layers=3, num_labels=methods.LABELS)
    MeanPooled(bert).save_pretrained(encoder)
    return decoder, encoder


def test_every_method(folders, tmp_path, monkeypatch, capsys):
    path, picture = tmp_path / "methods.json", tmp_path / "methods.png"
    command = ["bench_methods", "--base", folders[0], "--encoder", folders[1], "--threads", "1"]
    command += ["--batch", "2", "--tokens", "8", "--pairs", "1", "--json", path, "--plot", picture]
    command = [str(part) for part in command]
    monkeypatch.setattr(sys, "argv", [*command, "--part", "calls", "--part", "time"])
    bench_methods.main()
    found = json.loads(path.read_text())
    rows = found["rows"]
    assert list(rows) == [method.name for method in methods.METHODS]
    for name, row in rows.items():
        assert row["loss_difference"] < 1e-5, name
        assert row["calls"]["stock"]["kernels"] == 0, name
        for kind in ("stock", "fused"):
            assert row["step_s"][kind] > 0
            assert row["calls"][kind]["forward"] > 0
        bare = found["bare"][row["model"]]
        assert row["calls"]["stock"]["forward"] >= bare["forward"] > 0
    assert rows["LoRA"]["calls"]["fused"]["kernels"] >= 7 * 2  # linear layers, both ways
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(readme, "METHODS", path)
    rendered = readme.section("methods")
    assert "| AdapterFusion" in rendered
    assert rendered in capsys.readouterr().out

    # Another part, of one method: the rest is kept. Here, as a process takes seconds to start.
    monkeypatch.setattr(bench_methods, "in_own_process", lambda run, *args: run(*args))
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "ia3", "--part", "memory"])
    bench_methods.main()
    again = json.loads(path.read_text())["rows"]
    memory = again["IA3"].pop("memory_mib", None)
    assert again == rows
    if sys.platform == "linux":
        assert memory.keys() == {"stock", "fused"}


def test_calls_are_counted_by_hand():
    x = torch.randn(4, 6, requires_grad=True)
    layer = nn.Linear(6, 3)
    with operators.counted() as forward:
        y = layer(x.view(2, 2, 6)).transpose(0, 1).relu()
    # One product with its bias and the ReLU; views, and the weight's transpose, are none.
    assert dict(forward) == {"aten.addmm": 1, "aten.relu": 1}
    with operators.counted() as backward:
        y.sum().backward()
    assert backward["aten.mm"] == 2
    assert operators.kernels(forward + backward) == 0


def test_kernels_are_counted_forward_and_backward():
    x = torch.randn(4, 64, requires_grad=True)
    parameters = [torch.randn(*shape, requires_grad=True) for shape in ((8, 64), (8,), (64, 8))]
    if ops.OPS["bottleneck"].select(ops.Case("cpu", torch.float32)).name != "cpu":
        pytest.skip("no kernels for this CPU")
    with operators.counted() as calls:
        ops.bottleneck(x, *parameters, None).sum().backward()
    assert calls["fusetune.bottleneck"] == calls["fusetune.bottleneck_backward"] == 1
    with operators.counted() as calls, composed.in_place_of_ops():
        ops.bottleneck(x, *parameters, None).sum().backward()
    assert operators.kernels(calls) == 0
    assert calls["aten.addmm"] == 1


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_composed_bottleneck_is_the_op(activation):
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    parameters = (torch.randn(4, 16), torch.randn(4), torch.randn(16, 4), torch.randn(16))
    options = {"activation": activation, "scaling": 0.5, "residual": residual}
    expected = ops.bottleneck(x, *parameters, **options)
    got = composed.bottleneck(x, *parameters, **options)
    torch.testing.assert_close(got, expected)


def test_composed_fusion_is_the_op():
    query, residual, *values = (torch.randn(2, 3, 16) for _ in range(5))
    weights = (torch.randn(16, 16) / 16, torch.randn(16), torch.randn(16, 16) / 16)
    weights = (*weights, torch.randn(16), torch.randn(16, 16))
    options = {"residual": residual, "temperature": 2.0, "return_attention": True}
    expected = ops.adapter_fusion(query, values, *weights, **options)
    got = composed.adapter_fusion(query, values, *weights, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_turns_alternate_and_the_first_is_not_timed():
    order, rounds = [], []

    def step(kind, number):
        order.append(kind)
        return 2.0 if kind == "fused" else 1.0 + number

    turns = in_turn(("stock", "fused"), step, 2, after=lambda: rounds.append(len(order)))
    assert order == ["stock", "fused", "fused", "stock", "stock", "fused"]
    assert rounds == [2, 4, 6]
    assert [len(times) for times in turns.seconds.values()] == [2, 2]
    assert turns.losses == {"stock": [1.0, 2.0, 3.0], "fused": [2.0] * 3}
    assert turns.loss_difference("fused", "stock") == 1.0


def test_ratio_is_the_median_of_pairs():
    from fusetune.bench.in_turn import Turns

    turns = Turns({"a": [1.0, 8.0, 3.0], "b": [1.0, 2.0, 1.5]}, {})
    assert turns.ratio("a", "b") == 2.0
    assert turns.median("a") == 3.0


def test_own_process_is_another_one():
    import os

    assert in_own_process(os.getpid) != os.getpid()
    assert in_own_process(divmod, 7, 2) == (3, 1)
