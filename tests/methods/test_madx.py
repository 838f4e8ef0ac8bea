"""MAD-X: invertible blocks at both ends of a model, a task on a language, another language."""

import copy

import pytest
import tiny_models
import torch
from adapter_models import randomise
from peft import PeftModel, get_peft_model

import fusetune
from fusetune.methods import BottleneckConfig, Fuse, MadXConfig, Stack

# Where the embeddings leave, and the output embedding.
ENDS = {
    "bert": ("bert.embeddings", "cls.predictions.decoder"),
    "gpt2": ("transformer.drop", "lm_head"),
    "llama": ("model.embed_tokens", "lm_head"),
    "t5": ("encoder.embed_tokens", "lm_head"),
}
KINDS = ("nice", "glow")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


def plain(family, **changes):
    torch.manual_seed(0)
    return getattr(tiny_models, family)(**changes)


def language_model(family="bert", kind="nice", names=("en",), **options):
    """(a model with a language adapter of each name, inputs), in evaluation."""
    base, inputs = plain(family)
    config = {"inv_adapter": kind, "non_linearity": "gelu", **options}
    model = get_peft_model(base, MadXConfig(**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, MadXConfig(**config))
    return randomise(model).eval(), inputs


def with_task(family="bert", kind="nice"):
    """Languages en and qu and a task."""
    model, inputs = language_model(family, kind, ("en", "qu"))
    model.add_adapter("task", MadXConfig.task(reduction_factor=8))
    return randomise(model).eval(), inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def block(model, name):
    (found,) = (m for key, m in model.named_modules() if key.endswith(f".bn_couplings.{name}"))
    return found


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_defaults_are_those_of_the_paper():
    language, task = MadXConfig(), MadXConfig.task()
    assert (language.inv_adapter, language.reduction_factor) == ("nice", 2)
    assert language.inv_adapter_reduction_factor == 2
    assert (task.reduction_factor, task.non_linearity) == (16, "relu")
    for config in (language, task):  # Pfeiffer's placement
        assert config.original_ln_before
        assert not config.mh_adapter
    assert not isinstance(task, MadXConfig)
    assert MadXConfig.houlsby().mh_adapter
    assert not MadXConfig.houlsby().original_ln_before
    assert not MadXConfig.parallel().original_ln_before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ENDS)
def test_forward_after_the_embeddings_and_inverse_before_the_output(family, kind):
    """Bottlenecks that are the identity: what is left is the plain model between the blocks."""
    model, inputs = language_model(family, kind, init_weights="mam_adapter")
    for name, parameter in model.named_parameters():
        if ".bn_adapters." in name and ".up." in name:
            parameter.data.zero_()
    got = logits(model, inputs)
    base, _ = plain(family)
    expected_without = logits(base.eval(), inputs)
    coupling = block(model, "en")
    start, end = map(base.get_submodule, ENDS[family])
    start.register_forward_hook(lambda module, args, output: coupling(output))
    end.register_forward_pre_hook(lambda module, args: (coupling.inverse(args[0]),))
    assert (got - expected_without).abs().max() > 1e-3
    # In T5 both stacks embed by one module, and only the encoder's has the block.
    if family != "t5":
        torch.testing.assert_close(got, logits(base, inputs), atol=2e-6, rtol=1e-5)
    else:
        base.decoder.embed_tokens = copy.deepcopy(base.decoder.embed_tokens)
        base.decoder.embed_tokens._forward_hooks.clear()
        torch.testing.assert_close(got, logits(base, inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ENDS)
def test_embeddings_given_are_transformed_too(family):
    """adapters leaves inputs_embeds of LLaMA as they are, and so their logits differ."""
    model, inputs = language_model(family)
    expected = logits(model, inputs)
    ids = inputs.pop("input_ids")
    embedding = model.get_base_model().get_input_embeddings()
    got = logits(model, {**inputs, "inputs_embeds": embedding(ids)})
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_only_the_leftmost_adapters_block_is_used():
    model, inputs = with_task()
    fusetune.compose(model, Stack("task", "en"))
    first = logits(model, inputs)
    with torch.no_grad():
        for parameter in block(model, "en").parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(model, inputs), first)
    fusetune.compose(model, Stack("en", "task"))
    second = logits(model, inputs)
    with torch.no_grad():
        for parameter in block(model, "en").parameters():
            parameter.sub_(0.9)
    assert not torch.equal(logits(model, inputs), second)
    fusetune.compose(model, Stack("en", "qu"))
    third = logits(model, inputs)
    with torch.no_grad():
        for parameter in block(model, "qu").parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(model, inputs), third)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_language_is_swapped_at_test_time(family, kind):
    """The same as a model that only ever had that language."""
    model, inputs = with_task(family, kind)
    fusetune.compose(model, Stack("en", "task"))
    english = logits(model, inputs)
    fusetune.compose(model, Stack("qu", "task"))
    quechua = logits(model, inputs)
    assert (english - quechua).abs().max() > 1e-3
    alone, _ = plain(family)
    config = {"inv_adapter": kind, "non_linearity": "gelu"}
    alone = get_peft_model(alone, MadXConfig(**config), "qu")
    alone.add_adapter("task", MadXConfig.task(reduction_factor=8))
    alone.load_state_dict(model.state_dict(), strict=False)
    fusetune.compose(alone, Stack("qu", "task"))
    assert torch.equal(logits(alone.eval(), inputs), quechua)
    fusetune.compose(model, Stack("en", "task"))
    assert torch.equal(logits(model, inputs), english)


def test_the_task_is_trained_and_the_language_is_not():
    model, inputs = with_task()
    fusetune.compose(model, Stack("en", "task"), trainable=["task"])
    assert trained(model)
    assert all(".bn_adapters.task." in name for name in trained(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, inputs)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == trained(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ENDS)
def test_language_modelling_trains_the_block(family, kind):
    """Everything of the language, and each of its parameters, from both ends of the model."""
    model, inputs = language_model(family, kind)
    model.set_adapter("en")
    assert any(".bn_couplings.en.G.2.weight" in name for name in trained(model))
    losses = [step(model, inputs) for _ in range(8)]
    assert losses[-1] < losses[0]
    model.zero_grad()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if ".bn_couplings." in name:
            assert parameter.grad.abs().max() > 0, name


def step(model, inputs, lr=0.02):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return loss.item()


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_tied_embeddings_stay_tied(family):
    model, inputs = language_model(family)
    base = model.get_base_model()
    weight = base.get_input_embeddings().weight
    assert base.get_output_embeddings().weight is weight
    assert not weight.requires_grad
    before = weight.clone()
    step(model, inputs)
    assert torch.equal(base.get_output_embeddings().weight, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_saved_and_loaded(family, kind, tmp_path):
    model, inputs = with_task(family, kind)
    fusetune.compose(model, Stack("en", "task"))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    base, _ = plain(family)
    loaded = PeftModel.from_pretrained(base, tmp_path / "en", adapter_name="en")
    loaded.load_adapter(tmp_path / "task", adapter_name="task")
    assert type(loaded.peft_config["en"]) is MadXConfig
    assert loaded.peft_config["en"].inv_adapter == kind
    assert type(loaded.peft_config["task"]) is BottleneckConfig
    fusetune.compose(loaded, Stack("en", "task"))
    assert torch.equal(logits(loaded.eval(), inputs), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_the_same_with_and_without_a_cache(family):
    model, inputs = with_task(family)
    fusetune.compose(model, Stack("en", "task"))
    ids = {"input_ids": inputs["input_ids"][:, :5]}
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached, whole = (model.generate(**ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    base, _ = plain(family)
    with model.disable_adapter():
        disabled = model.generate(**ids, **options)
    expected = base.eval().generate(**ids, **options)
    assert torch.equal(disabled.sequences, expected.sequences)
    for a, b in zip(disabled.logits, expected.logits, strict=True):
        # Attention rounds by how its operands lie in memory.
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_disabled_deleted_and_unloaded():
    model, inputs = with_task()
    base, _ = plain("bert")
    expected = logits(base.eval(), inputs)
    fusetune.compose(model, Stack("en", "task"))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(model, inputs), expected)
    fusetune.compose(model, Stack("qu", "task"))
    model.delete_adapter("en")
    assert not any(".en." in name for name in model.state_dict())
    fusetune.compose(model, Stack("qu", "task"))
    assert torch.equal(logits(model.unload(), inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_checkpointing(kind, use_reentrant):
    model, inputs = language_model("bert", kind)
    model.train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients(model, inputs)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind, fresh_compiler):
    model, inputs = language_model("bert", kind)
    expected = logits(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, inputs), expected, atol=1e-5, rtol=1e-5)


def test_16_bit_model():
    """The block computes in fp32 and rounds once at each end."""
    base, inputs = plain("llama")
    model = get_peft_model(base.to(torch.bfloat16), MadXConfig(), "en")
    assert all(p.dtype == torch.float32 for p in block(model, "en").parameters())
    randomise(model)
    out = model(**inputs)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert block(model, "en").F["0"].weight.grad.abs().max() > 0


def test_a_fused_pair_of_languages_uses_the_first_ones_block():
    model, inputs = language_model("bert", "nice", ("en", "qu"))
    model.add_adapter("en,qu", fusetune.AdapterFusionConfig(adapters=["en", "qu"]))
    fusetune.compose(model, Fuse("en", "qu"))
    expected = logits(model, inputs)
    with torch.no_grad():
        block(model, "qu").F["2"].bias.add_(1.0)
    assert torch.equal(logits(model, inputs), expected)
    with torch.no_grad():
        block(model, "en").F["2"].bias.add_(1.0)
    assert not torch.equal(logits(model, inputs), expected)


def test_models_without_tokens_are_refused():
    base, _ = plain("vit")
    with pytest.raises(ValueError, match="invertible adapter needs a model whose inputs are tok"):
        get_peft_model(base, MadXConfig(), "en")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inv_adapter": "nvp"}, "inv_adapter must be one of"),
        ({"inv_adapter_reduction_factor": 0}, "inv_adapter_reduction_factor must be positive"),
        ({"inv_adapter_reduction_factor": None}, "inv_adapter_reduction_factor must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MadXConfig(**arguments)
