"""What PEFT's users do with a model, with bottleneck adapters in it."""

import copy
import json

import adapter_models
import pytest
import tiny_models
import torch
from adapter_models import adapted, houlsby, parallel, pfeiffer
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fusetune.methods import BottleneckConfig
from fusetune.methods.bottleneck.layer import BottleneckLayer

FAMILIES = ("llama", "bert", "gpt2", "t5", "vit")
KINDS = {"houlsby": houlsby, "pfeiffer": pfeiffer, "parallel": parallel}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def train_step(model, inputs, lr=0.1):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def plain(family):
    torch.manual_seed(0)
    return getattr(tiny_models, family)()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_loads(family, kind, tmp_path):
    model, inputs = adapted(family, KINDS[kind])
    base, _ = plain(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, inputs)
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert trained
    assert all(".bn_adapters.default." in n or ".modules_to_save.default." in n for n in trained)
    # Everything that requires a gradient got one.
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.eval(), tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].kind == "bottleneck"


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_and_unloaded_it_is_the_base_model(family):
    base, _ = plain(family)
    model, inputs = adapted(family, pfeiffer)
    expected = logits(base.eval(), inputs)
    assert not torch.equal(logits(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(model, inputs), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert not any(isinstance(m, BottleneckLayer) for m in unloaded.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
    assert set(unloaded.state_dict()) == set(base.state_dict())


def test_a_new_adapter_is_near_the_identity():
    for config, bound in ((BottleneckConfig.houlsby, 1e-2), (BottleneckConfig.parallel, 0.0)):
        base, inputs = plain("llama")
        expected = logits(base.eval(), inputs)
        model = get_peft_model(base, config()).eval()
        assert (logits(model, inputs) - expected).abs().max() <= bound


def test_houlsby_trains_norms_and_head_and_restores_them():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(1, 97, (2, 9))}
    expected = logits(model, inputs)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(names) == 5
    model = get_peft_model(model, houlsby(task_type=TaskType.SEQ_CLS))
    saved = model.peft_config["default"].modules_to_save
    assert set(names) <= set(saved)
    assert "classifier" in saved
    train_step(model, {**inputs, "labels": torch.tensor([0, 1])})
    for name in names:
        wrapper = model.base_model.model.get_submodule(name)
        original, copied = wrapper.original_module, wrapper.modules_to_save["default"]
        assert not torch.equal(original.weight, copied.weight)
    assert not torch.allclose(logits(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind, tmp_path):
    model, inputs = adapted("bert", KINDS[kind], names=("first", "second"))
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
    base, _ = plain("bert")
    loaded = PeftModel.from_pretrained(base.eval(), tmp_path / "second", adapter_name="other")
    assert torch.equal(logits(loaded, inputs), results["second"])
    loaded.load_adapter(tmp_path / "first", adapter_name="more")
    assert torch.equal(logits(loaded, inputs), results["second"])
    loaded.set_adapter("more")
    assert torch.equal(logits(loaded, inputs), results["first"])


def test_delete():
    model, inputs = adapted("bert", pfeiffer, names=("first", "second"))
    model.set_adapter("second")
    expected = logits(model, inputs)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model, inputs), expected)
    assert not any(".first." in n for n, _ in model.named_parameters())
    base, _ = plain("bert")
    model.base_model.delete_adapter("second")
    assert torch.equal(logits(model.base_model.model, inputs), logits(base.eval(), inputs))


def test_delete_of_an_adapter_that_is_not_everywhere():
    """PEFT would let every layer choose another active adapter, by what it has."""
    configs = [pfeiffer(leave_out=[0]), pfeiffer(), pfeiffer(leave_out=[1])]
    base, _ = plain("bert")
    model = get_peft_model(base.eval(), configs[0], adapter_name="c")
    model.add_adapter("b", configs[1])
    model.add_adapter("x", configs[2])
    model.set_adapter("x")
    model.delete_adapter("x")
    assert model.active_adapters == ["b"]
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    assert all(layer.active_adapters == ["b"] for layer in layers)


def test_modules_to_save(tmp_path):
    base, inputs = plain("bert")
    name = "cls.predictions.transform.dense"
    expected = base.get_submodule(name).weight.detach().clone()
    model = get_peft_model(base.eval(), pfeiffer(modules_to_save=[name]))
    train_step(model, inputs)
    wrapper = model.base_model.model.get_submodule(name)
    assert torch.equal(wrapper.original_module.weight, expected)
    assert not torch.equal(wrapper.modules_to_save["default"].weight, expected)
    result = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain("bert")[0].eval(), tmp_path)
    assert torch.equal(logits(loaded, inputs), result)


def test_merging_is_refused():
    model, _ = adapted("bert", pfeiffer)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="not linear"):
            merge()
    assert any(isinstance(m, BottleneckLayer) for m in model.modules())


def test_deepcopy_is_independent():
    """The copy's hooks read the copy."""
    model, inputs = adapted("bert", pfeiffer)
    expected = logits(model, inputs)
    copied = copy.deepcopy(model)
    adapter_models.randomise(model, seed=2)
    assert torch.equal(logits(copied, inputs), expected)
    assert not torch.equal(logits(model, inputs), expected)


def test_adding_an_adapter_changes_nothing():
    model, inputs = adapted("bert", houlsby)
    expected = logits(model, inputs)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("more", houlsby())
    assert torch.equal(logits(model, inputs), expected)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_half_precision_model_keeps_fp32_adapters():
    base, inputs = plain("llama")
    exact = adapter_models.randomise(get_peft_model(copy.deepcopy(base), pfeiffer())).eval()
    model = get_peft_model(base.to(torch.bfloat16), pfeiffer())
    adapter_models.randomise(model).eval()
    dtypes = {p.dtype for n, p in model.named_parameters() if ".bn_adapters." in n}
    assert dtypes == {torch.float32}
    got = logits(model, inputs)
    assert got.dtype == torch.bfloat16
    error = (got.double() - logits(exact, inputs).double()).abs().max()
    with model.disable_adapter(), exact.disable_adapter():
        plain_error = (logits(model, inputs).double() - logits(exact, inputs).double()).abs().max()
    assert error <= 4 * plain_error
    train_step(model, inputs)


def test_low_cpu_mem_usage(tmp_path):
    model, inputs = adapted("bert", pfeiffer)
    model.save_pretrained(tmp_path)
    base, _ = plain("bert")
    loaded = PeftModel.from_pretrained(base.eval(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_config_file(tmp_path):
    config = pfeiffer(scaling="channel", reduction_factor={0: 4, "default": 8}, leave_out=[1])
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert BottleneckConfig.from_pretrained(tmp_path) == config
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "twist": 1}))
    with pytest.raises(ValueError, match="twist"):
        PeftConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "odd"}))
    with pytest.raises(ValueError, match="kind must be one of"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["output", "weight", "down", "value", "0", "a.b", "keys", ""])
def test_names_that_peft_could_not_tell_apart_are_refused(name):
    model, inputs = adapted("bert", pfeiffer, names=("first",))
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match="adapter_name"):
        model.add_adapter(name, pfeiffer())
    assert list(model.peft_config) == ["first"]
    assert torch.equal(logits(model, inputs), expected)


def test_seed_makes_weights_reproducible():
    weights = []
    for _ in range(2):
        base, _ = plain("bert")
        model = get_peft_model(base, pfeiffer(init_weights_seed=3))
        torch.rand(3)
        weights.append([p for n, p in model.named_parameters() if "down.weight" in n])
    assert all(map(torch.equal, *weights))
    # Layers differ from each other; in adapters one seed makes them all the same.
    assert not torch.equal(weights[0][0], weights[0][1])
    base, _ = plain("bert")
    state = torch.random.get_rng_state()
    get_peft_model(base, pfeiffer(init_weights_seed=3))
    assert torch.equal(state, torch.random.get_rng_state())
