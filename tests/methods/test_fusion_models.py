"""AdapterFusion in models, by PEFT's interface: the second stage of training, and its state."""

import copy
from dataclasses import asdict

import pytest
import tiny_models
import torch
from adapter_models import houlsby, parallel, pfeiffer, randomise
from peft import PeftModel, get_peft_model

import fusetune
from fusetune.methods import AdapterFusionConfig, BottleneckConfig, Fuse, Stack
from fusetune.methods.bottleneck.fusion import AdapterFusion

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")


def plain(family):
    torch.manual_seed(0)
    return getattr(tiny_models, family)()


def fused(family="bert", config=pfeiffer, names="ab", **options):
    """(a model with adapters and a fusion of them, active; inputs)."""
    base, inputs = plain(family)
    model = get_peft_model(base, config(), names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    randomise(model)
    model.add_adapter(",".join(names), AdapterFusionConfig(adapters=list(names), **options))
    fusetune.compose(model, Fuse(*names))
    return model, inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def fusions(model):
    return [module for module in model.modules() if isinstance(module, AdapterFusion)]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", [pfeiffer, houlsby, parallel])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_the_second_stage_trains_the_fusion_alone(family, config):
    model, inputs = fused(family, config, names="abc")
    assert trained(model)
    assert all(".bn_fusions.a,b,c." in name for name in trained(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        losses.append(loss.item())
        (loss + fusetune.fusion_regularization(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    # The key's bias shifts all scores alike: its gradient is zero, but it has one, as all have.
    (model(**inputs).loss).backward()
    named = dict(model.named_parameters())
    assert all(named[name].grad is not None for name in trained(model))
    assert not any(named[name].grad.any() for name in trained(model) if name.endswith("key.bias"))
    assert changed <= trained(model)
    assert {name for name in trained(model) if not name.endswith("key.bias")} <= changed


def test_the_fusion_by_its_name_is_the_composition():
    model, inputs = fused()
    expected = logits(model.eval(), inputs)
    model.set_adapter("a")
    alone = logits(model, inputs)
    assert not torch.equal(alone, expected)
    assert all(".a." in name for name in trained(model))
    model.set_adapter("a,b")
    assert torch.equal(logits(model, inputs), expected)
    fusetune.compose(model, Fuse("a", "b", name="a,b"))
    assert torch.equal(logits(model, inputs), expected)
    assert str(model.base_model.composition) == "Fuse('a', 'b', name='a,b')"


def test_two_fusions_of_the_same_adapters_need_a_name():
    model, inputs = fused()
    model.add_adapter("other", AdapterFusionConfig.static(adapters=["a", "b"]))
    with pytest.raises(ValueError, match="more than one fusion"):
        fusetune.compose(model, Fuse("a", "b"))
    expected = logits(model.eval(), inputs)
    fusetune.compose(model, Fuse("a", "b", name="other"))
    assert not torch.equal(logits(model, inputs), expected)
    assert all(".bn_fusions.other." in name for name in trained(model))


def test_a_fusion_of_one_adapter_at_first_is_that_adapter():
    """The weight of the only output is one, and the value matrix the identity (but for 1e-6)."""
    base, inputs = plain("bert")
    model = randomise(get_peft_model(base, pfeiffer(), "a")).eval()
    expected = logits(model, inputs)
    model.add_adapter("f", AdapterFusionConfig(adapters=["a"]))
    fusetune.compose(model, Fuse("a"))
    torch.testing.assert_close(logits(model.eval(), inputs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [False, True, 4.0])
def test_saved_and_loaded_with_its_temperature(temperature, tmp_path):
    model, inputs = fused(temperature=temperature)
    model.train()
    for _ in range(5):
        model(**inputs)
    for parameter in fusions(model)[0].parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    base, _ = plain("bert")
    loaded = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    for name in ("b", "a,b"):
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    assert type(loaded.peft_config["a,b"]) is AdapterFusionConfig
    assert asdict(loaded.peft_config["a,b"])["temperature"] == temperature
    fusetune.compose(loaded, Fuse("a", "b"))
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    wanted = {False: 1.0, True: 49.8, 4.0: 4.0}[temperature]
    got = {round(f.current_temperature().item(), 4) for f in fusions(loaded)}
    assert got == {wanted}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_temperature_steps_once_a_forward_under_checkpointing(use_reentrant):
    model, inputs = fused(temperature=True)
    model.train()

    def gradients():
        for fusion in fusions(model):
            fusion.steps.fill_(960)  # near 2, where a step is felt
        model.zero_grad()
        model(**inputs).loss.backward()
        assert [int(fusion.steps) for fusion in fusions(model)] == [961] * len(fusions(model))
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients()
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_temperatures_of_what_is_not_active_do_not_move():
    model, inputs = fused(temperature=True)
    model.train()
    model.add_adapter("other", AdapterFusionConfig(adapters=["b", "a"], temperature=True))
    model(**inputs)
    fusetune.compose(model, "a")
    model(**inputs)
    with model.disable_adapter():
        model(**inputs)
    fusetune.compose(model, Stack("a", Fuse("b", "a")))
    model(**inputs)
    model.eval()
    model(**inputs)
    steps = {
        name: int(f.steps) for name, f in model.named_modules() if isinstance(f, AdapterFusion)
    }
    assert steps
    assert set(steps.values()) == {1}


def test_attention_follows_the_query_and_prefers_what_is_trained_to_be():
    """Scores move the output towards one adapter: with a key that only b's output answers."""
    model, inputs = fused()
    for fusion in fusions(model):
        for layer in (fusion.query, fusion.key):
            layer.weight.data.zero_()
        fusion.query.bias.data.fill_(0.0)
    uniform = logits(model.eval(), inputs)
    for fusion in fusions(model):
        fusion.query.bias.data.normal_(std=5.0)
        fusion.key.weight.data.copy_(torch.eye(64))
    assert (logits(model, inputs) - uniform).abs().max() > 1e-3


def test_adapters_that_are_not_in_every_layer():
    """adapters raises KeyError where one of them has no module."""
    base, inputs = plain("bert")
    model = get_peft_model(base, pfeiffer(leave_out=[0]), "a")
    model.add_adapter("b", pfeiffer(leave_out=[1]))
    randomise(model)
    model.add_adapter("a,b", AdapterFusionConfig(adapters=["a", "b"]))
    fusetune.compose(model, Fuse("a", "b"))
    out = model(**inputs)
    out.loss.backward()
    assert out.logits.isfinite().all()
    # Where there is one, its weight is one whatever the scores.
    for name, parameter in model.named_parameters():
        if ".bn_fusions." not in name:
            continue
        if name.endswith(".value.weight"):
            assert parameter.grad.abs().max() > 0
        elif parameter.grad is not None:
            assert parameter.grad.abs().max() < 1e-6


def test_dropout_is_the_models_unless_given():
    """adapters takes an explicit 0.0 for a missing value, and drops out with the model's 0.1."""
    for given, expected in ((None, 0.25), (0.0, 0.0), (0.5, 0.5)):
        base, _ = plain("bert")
        base.config.attention_probs_dropout_prob = 0.25
        model = get_peft_model(base, pfeiffer(), "a")
        model.add_adapter("f", AdapterFusionConfig(adapters=["a"], dropout_prob=given))
        assert {fusion.dropout_p for fusion in fusions(model)} == {expected}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generates_the_same_with_and_without_a_cache(family):
    model, inputs = fused(family)
    ids = inputs["input_ids"][:, :5]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.eval()
    cached, whole = (
        model.generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [False, True])
def test_compiled(temperature, fresh_compiler):
    """A schedule in the graph: no recompilation at each step, and the same results."""
    model, inputs = fused(temperature=temperature)
    model.train()
    other = copy.deepcopy(model)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, made = torch.compile(other, backend=count), []
    for _ in range(4):
        expected = model(**inputs).loss
        torch.testing.assert_close(compiled(**inputs).loss, expected, atol=1e-5, rtol=1e-5)
        made.append(len(graphs))
    assert made[-1] == made[0]
    assert [int(f.steps) for f in fusions(other) if temperature] == [
        int(f.steps) for f in fusions(model) if temperature
    ]


def test_unloaded_and_deleted():
    model, inputs = fused()
    base, _ = plain("bert")
    expected = logits(base.eval(), inputs)
    with pytest.raises(ValueError, match=r"the fusions \['a,b'\] are over 'a'"):
        model.delete_adapter("a")
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), inputs), expected)
    model.set_adapter("a")
    model.delete_adapter("a,b")
    assert not fusions(model)
    model.delete_adapter("b")
    assert torch.equal(logits(model.unload(), inputs), expected)


def test_a_fusion_is_over_adapters_that_are_there():
    base, _ = plain("bert")
    with pytest.raises(ValueError, match="a fusion is over adapters of the model"):
        get_peft_model(base, AdapterFusionConfig(adapters=["a"]), "f")
    model = get_peft_model(plain("bert")[0], pfeiffer(), "a")
    with pytest.raises(ValueError, match=r"\['b'\] are none"):
        model.add_adapter("f", AdapterFusionConfig(adapters=["a", "b"]))
    model.add_adapter("f", AdapterFusionConfig(adapters=["a"]))
    with pytest.raises(ValueError, match=r"\['f'\] are none"):
        model.add_adapter("g", AdapterFusionConfig(adapters=["f"]))
    assert list(model.peft_config) == ["a", "f"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapters": []}, ValueError, "adapters must be one or more different names"),
        ({"adapters": ["a", "a"]}, ValueError, "adapters must be one or more different names"),
        ({"adapters": "ab"}, TypeError, "adapters must be a list of names"),
        ({"adapters": ["a"], "temperature": 0.0}, ValueError, "temperature must be"),
        ({"adapters": ["a"], "temperature": -1}, ValueError, "temperature must be"),
        ({"adapters": ["a"], "dropout_prob": 1.0}, ValueError, "dropout_prob must be in"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        AdapterFusionConfig(**arguments)


def test_static_and_dynamic():
    static = AdapterFusionConfig.static(adapters=["a"])
    assert (static.value, static.regularization, static.value_initialized) == (False,) * 3
    assert AdapterFusionConfig.dynamic(["a"]) == AdapterFusionConfig(adapters=["a"])
    assert not isinstance(static, BottleneckConfig)
