"""What PEFT's users do with a model, with prompts in it."""

import copy
import json

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from prompt_models import base, layer, logits, prompted
from transformers import BertConfig, BertForSequenceClassification

import fusetune
from fusetune.methods import PrefixTuningConfig, PromptTuningConfig, PTuningConfig, PTuningV2Config

FAMILIES = ("llama", "bert", "gpt2", "t5")
KINDS = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, encoder_hidden_size=16),
    "p-tuning v2": lambda: PTuningV2Config(num_virtual_tokens=4),
    "p-tuning": lambda: PTuningConfig(template=[2, "{0}", 2]),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4),
}
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")


def train_step(model, inputs, lr=1.0):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_loads(family, kind, tmp_path):
    model, inputs = prompted(family, KINDS[kind])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, inputs)
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert trained
    assert all(".prompt_layer.prompt_encoders.default." in name for name in trained)
    # Everything that requires a gradient got one.
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family)[0], tmp_path)
    # A network is dropped for what it computes, in fp32 at least.
    torch.testing.assert_close(logits(loaded, inputs), expected, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])
    loaded.save_pretrained(tmp_path / "again")
    more = PeftModel.from_pretrained(base(family)[0], tmp_path / "again", is_trainable=True)
    assert torch.equal(logits(more.eval(), inputs), logits(loaded, inputs))
    names = [n for n, p in more.named_parameters() if p.requires_grad]
    assert names
    assert all(name.endswith(".weight") and ".network." not in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_and_unloaded_it_is_the_base_model(family, kind):
    stock, _ = base(family)
    model, inputs = prompted(family, KINDS[kind])
    expected = logits(stock, inputs)
    got = logits(model, inputs)
    assert got.shape != expected.shape or not torch.allclose(got, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(model, inputs, adapter_names=["default"] * 2), expected)
    assert torch.equal(logits(model, inputs), got)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert set(unloaded.state_dict()) == set(stock.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
    for module in unloaded.modules():
        if hasattr(module, "config"):
            assert module.config._attn_implementation == "sdpa"
    again = get_peft_model(unloaded, KINDS[kind]())
    assert not torch.equal(logits(again.eval(), inputs), expected) or family == "t5"


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind, tmp_path):
    model, inputs = prompted("bert", KINDS[kind], names=("first", "second"))
    results = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(f".{name}." in n for n in trained)
        results[name] = logits(model, inputs)
    assert not torch.allclose(results["first"], results["second"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("bert")[0], tmp_path / "second", adapter_name="other")
    torch.testing.assert_close(logits(loaded, inputs), results["second"], atol=1e-6, rtol=0)
    loaded.load_adapter(tmp_path / "first", adapter_name="more")
    assert loaded.active_adapters == ["other"]
    loaded.set_adapter("more")
    torch.testing.assert_close(logits(loaded, inputs), results["first"], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="cannot be active together"):
        loaded.base_model.set_adapter(["other", "more"])
    with pytest.raises(ValueError, match="adapter_name: no adapter 'none'"):
        loaded.base_model.set_adapter("none")
    assert loaded.active_adapters == ["more"]


@pytest.mark.parametrize("kind", KINDS)
def test_delete(kind):
    model, inputs = prompted("bert", KINDS[kind], names=("first", "second"))
    model.set_adapter("second")
    expected = logits(model, inputs)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model, inputs), expected)
    assert list(layer(model).prompt_configs) == ["second"]
    assert not any(".first." in n for n, _ in model.named_parameters())
    model.base_model.delete_adapter("second")
    assert torch.equal(logits(model.base_model.model, inputs), logits(base("bert")[0], inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_adding_an_adapter_changes_nothing(kind):
    model, inputs = prompted("llama", KINDS[kind])
    expected = logits(model, inputs)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for number, make in enumerate(KINDS.values()):
        model.add_adapter(f"more{number}", make())
    assert torch.equal(logits(model, inputs), expected)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_is_independent(kind):
    model, inputs = prompted("llama", KINDS[kind])
    expected = logits(model, inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in layer(model).parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(copied, inputs), expected)
    assert not torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_model_keeps_wide_prompts(kind):
    exact, inputs = prompted("llama", KINDS[kind], dtype=torch.float32)
    model, _ = prompted("llama", KINDS[kind], dtype=torch.bfloat16)
    layer(model).load_state_dict(layer(exact).state_dict())
    assert {p.dtype for p in layer(model).parameters()} == {torch.float32}
    got = logits(model, inputs)
    assert got.dtype == torch.bfloat16
    error = (got.double() - logits(exact, inputs).double()).abs().max()
    with model.disable_adapter(), exact.disable_adapter():
        plain_error = (logits(model, inputs).double() - logits(exact, inputs).double()).abs().max()
    assert error <= 4 * plain_error
    train_step(model, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_low_cpu_mem_usage(kind, tmp_path):
    model, inputs = prompted("bert", KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("bert")[0], tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-6, rtol=0)
    loaded.load_adapter(tmp_path, adapter_name="more", low_cpu_mem_usage=True)
    loaded.set_adapter("more")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_trained_and_saved_with_it(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        return BertForSequenceClassification(config).eval()

    config = KINDS[kind]()
    config.task_type = TaskType.SEQ_CLS
    model = get_peft_model(make(), config)
    inputs = {"input_ids": torch.randint(1, 97, (2, 9)), "labels": torch.tensor([0, 1])}
    train_step(model, inputs)
    wrapper = model.base_model.model.classifier
    assert not torch.equal(
        wrapper.original_module.weight, wrapper.modules_to_save["default"].weight
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_status_and_merging(kind):
    model, _ = prompted("llama", KINDS[kind])
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (
        True,
        ["default"],
        1,
    )
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="no weight of the model"):
            merge()
    assert layer(model).prompt_configs


def test_config_file(tmp_path):
    config = PTuningConfig(template=[2, [5, 6], "{0}", 1], encoder_dropout=0.1)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert PTuningConfig.from_pretrained(tmp_path) == config
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "twist": 1}))
    with pytest.raises(ValueError, match="twist"):
        PeftConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "odd"}))
    with pytest.raises(ValueError, match="kind must be one of"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_file_of_another_shape_says_which_key(tmp_path):
    model, _ = prompted("llama", KINDS["prompt"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_virtual_tokens": 6}))
    with pytest.raises(RuntimeError, match=r"prompt_encoders\.default\.weight.*\[4, 64\].*\[6, 64"):
        PeftModel.from_pretrained(base("llama")[0], tmp_path)


@pytest.mark.parametrize(
    "name", ["weight", "decoder", "self", "network", "0", "a.b", "keys", "", "embed_tokens"]
)
def test_names_that_peft_could_not_tell_apart_are_refused(name):
    model, inputs = prompted("llama", KINDS["prefix"], names=("first",))
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match="adapter_name"):
        model.add_adapter(name, KINDS["prefix"]())
    assert list(model.peft_config) == ["first"]
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("length", [0, -1, 2.5, True, None])
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PTuningV2Config, PromptTuningConfig])
def test_lengths_that_cannot_be(kind, length):
    with pytest.raises(ValueError, match="num_virtual_tokens must be a positive integer"):
        kind(num_virtual_tokens=length)


def test_a_failed_adapter_leaves_no_trace():
    """Of a first adapter, and of one more: the model is as it was."""
    bad = PromptTuningConfig(num_virtual_tokens=98)  # more than there are tokens
    model, inputs = base("llama")
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match="init_vocab_size"):
        get_peft_model(model, bad)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "prompt_layer")
    assert torch.equal(logits(model, inputs), expected)
    for make in (KINDS["prompt"], KINDS["prefix"]):
        model, inputs = prompted("llama", make)
        expected = logits(model, inputs)
        state = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match="init_vocab_size"):
            model.add_adapter("bad", bad)
        assert list(model.peft_config) == ["default"]
        assert list(layer(model).prompt_encoders) == ["default"]
        assert {n: p.requires_grad for n, p in model.named_parameters()} == state
        assert torch.equal(logits(model, inputs), expected)


def test_no_transformers_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for make in KINDS.values():
        with pytest.raises((TypeError, ValueError), match="model"):
            get_peft_model(model, make())


def rows_of(model):
    return {row.module: row for row in fusetune.fuse(model, loss=False).rows}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_what_carries_a_prompt(kind):
    model, _ = prompted("llama", KINDS[kind], dtype=torch.float32)
    name = "base_model.model.prompt_layer"
    row = rows_of(model)[name]
    assert (row.method, row.backend, row.reason) == ("prompts", "cpu", None)
    with model.disable_adapter():
        assert rows_of(model)[name].reason == "adapters are disabled, or none is active"
    base_model = model.get_base_model()
    if layer(model).prompt_configs["default"].deep:
        base_model.set_attn_implementation("eager")
        logits(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
        assert "eager" in rows_of(model)[name].reason
    else:
        base_model.get_input_embeddings().register_forward_hook(lambda *_: None)
        assert rows_of(model)[name].reason == "the token embeddings have hooks"


def test_public_names():
    for name in ("PrefixTuningConfig", "PTuningV2Config", "PTuningConfig", "PromptTuningConfig"):
        assert name in dir(fusetune)
        assert getattr(fusetune, name).__name__ == name
    assert peft.PrefixTuningConfig is not fusetune.PrefixTuningConfig


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "p-tuning v2"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_prompt_learns(family, kind):
    """Ten steps on one batch: the loss falls, of the prompt's training alone."""
    model, inputs = prompted(family, KINDS[kind], dtype=torch.float32)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    torch.manual_seed(0)
    for _ in range(10):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("kind", ["prompt", "p-tuning v2"])
def test_compiles(kind):
    """In one graph, and what is active is looked at again."""
    model, inputs = prompted("llama", KINDS[kind], names=("a", "b"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
