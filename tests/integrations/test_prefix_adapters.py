"""Several prefixes in a fused model: chosen, disabled, mixed in a batch, saved and loaded."""

import copy
import functools

import prefix_models
import pytest
import torch
from model_equality import assert_near
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners import lora
from tolerance import assert_same

import fusetune
from fusetune.integrations.peft import FusedLinear

MODELS = {
    "llama": prefix_models.llama,
    "llama-eager": functools.partial(prefix_models.llama, attn_implementation="eager"),
    "mistral": functools.partial(prefix_models.mistral, window=7),
    "mistral-eager": functools.partial(
        prefix_models.mistral, window=7, attn_implementation="eager"
    ),
    "gpt2": prefix_models.gpt2,
    "bert": functools.partial(prefix_models.encoder, "Bert", "TokenClassification"),
    "roberta": functools.partial(prefix_models.encoder, "Roberta", "TokenClassification"),
    "t5": prefix_models.t5,
    "bart": prefix_models.bart,
}


def with_two(make, tokens=2):
    model, task = prefix_models.prefix_tuned(make)
    torch.manual_seed(1)
    model.add_adapter("short", PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens))
    return model, task


def logits(model, inputs, **options):
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if "decoder_start_token_id" in model.config.to_dict() and model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"][:, :6]
    with torch.no_grad():
        return model.eval()(**given, **options)[0]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_for_each_row(name, padding):
    model, task = with_two(MODELS[name])
    inputs = prefix_models.inputs(task, batch=4, padding=padding)
    names = ["short", "default", "__base__", "default"]
    by_adapter = {"__base__": logits(model.base_model, inputs)}
    for adapter in ("short", "default"):
        model.set_adapter(adapter)
        by_adapter[adapter] = logits(model, inputs)
    expected = torch.stack([by_adapter[adapter][row] for row, adapter in enumerate(names)])
    fusetune.fuse(model)
    got = logits(model, inputs, adapter_names=names)
    seen = inputs.get("attention_mask", torch.ones(4, 12)).bool()
    if task == "SEQ_2_SEQ_LM":
        seen = seen[:, :6] | True
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert (by_adapter["short"] - by_adapter["default"]).abs().max() > 1e-2


def test_rows_train_their_own_adapters():
    model, task = with_two(prefix_models.llama)
    model.prompt_encoder.requires_grad_(True)
    inputs = prefix_models.inputs(task, batch=4)
    names = ["short", "default", "__base__", "default"]
    expected = {}
    for adapter, rows in {"short": [0], "default": [1, 3]}.items():
        model.set_adapter(adapter)
        part = {key: value[rows] for key, value in inputs.items()}
        count = (part["labels"][:, 1:] != -100).sum()
        model.zero_grad()
        (model(**part).loss * count).backward()
        encoder = model.prompt_encoder[adapter]
        expected[adapter] = encoder.embedding.weight.grad.clone()
    fusetune.fuse(model)
    model.zero_grad()
    count = (inputs["labels"][:, 1:] != -100).sum()
    (model(**inputs, adapter_names=names).loss * count).backward()
    for adapter, grad in expected.items():
        got = model.prompt_encoder[adapter].embedding.weight.grad
        assert (got - grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "nobody", "default"], r"adapter_names: 'nobody' is none of \['default', 'sh"),
        (["default", "short"], "one for each row of the batch, got 2 for 3"),
        ("default", "adapter_names must be a list of names, got 'default'"),
        (["default", 3, "short"], "adapter_names must be a list of names"),
    ],
)
def test_names_that_fit_nothing_are_refused(names, message):
    model, task = with_two(prefix_models.llama)
    fusetune.fuse(model)
    with pytest.raises(ValueError, match=message):
        model(**prefix_models.inputs(task), adapter_names=names)


def test_rows_without_any_adapter_are_the_base_model():
    model, task = with_two(prefix_models.llama)
    inputs = prefix_models.inputs(task, padding="left")
    fusetune.fuse(model)
    got = logits(model, inputs, adapter_names=["__base__"] * 3)
    torch.testing.assert_close(got[1:], logits(model.base_model, inputs)[1:])


@pytest.mark.usefixtures("stock_base")
def test_set_and_disable_and_delete():
    model, task = with_two(prefix_models.llama)
    inputs = prefix_models.inputs(task, padding="left")
    expected = {}
    for adapter in ("default", "short"):
        model.set_adapter(adapter)
        expected[adapter] = logits(model, inputs)
    base = logits(model.base_model, inputs)
    report = fusetune.fuse(model)
    for adapter in ("default", "short", "default"):
        model.set_adapter(adapter)
        torch.testing.assert_close(logits(model, inputs), expected[adapter])
        with model.disable_adapter():
            torch.testing.assert_close(logits(model, inputs), base)
            assert report.refresh().stock[0].reason == "adapters are disabled"
        torch.testing.assert_close(logits(model, inputs), expected[adapter])
    assert not report.refresh().stock
    model.delete_adapter("short")
    torch.testing.assert_close(logits(model, inputs), expected["default"])


def test_fuse_and_unfuse_after_an_adapter_was_disabled():
    """PEFT leaves bound methods in the instance then, of the class it had."""
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    inputs = prefix_models.inputs(task)
    expected = logits(model, inputs)
    with model.disable_adapter():
        pass
    assert "forward" in model.__dict__
    assert not fusetune.fuse(model).stock
    torch.testing.assert_close(logits(model, inputs), expected)
    with model.disable_adapter():
        pass
    fusetune.unfuse(model)
    assert model.forward.__func__ is type(model).forward
    torch.testing.assert_close(logits(model, inputs), expected)
    tokens = {"input_ids": inputs["input_ids"]}
    model.generate(**tokens, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("projection", [False, True])
def test_saved_by_one_and_loaded_into_the_other(tmp_path, projection):
    options = {"prefix_projection": projection, "encoder_hidden_size": 16}
    model, task = prefix_models.prefix_tuned(prefix_models.llama, **options)
    inputs = prefix_models.inputs(task, padding="left")
    expected = logits(model, inputs)
    exact = logits(copy.deepcopy(model).double(), inputs)
    with fusetune.fused(model):
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(prefix_models.llama()[0], tmp_path)
    assert_same(logits(stock, inputs), expected)
    assert not fusetune.fuse(stock).stock
    assert_near(*({"logits": each} for each in (logits(stock, inputs), expected, exact)))
    stock.load_adapter(tmp_path, "again")
    stock.set_adapter("again")
    assert_near(*({"logits": each} for each in (logits(stock, inputs), expected, exact)))


@pytest.mark.parametrize("under", [True, False])
def test_lora_of_another_adapter_stays_what_it_is(under):
    torch.manual_seed(0)
    base, task = prefix_models.llama()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=5))
    inputs = prefix_models.inputs(task)
    base.set_adapter("default") if under else base.disable_adapters()
    expected = prefix_models.step(model, inputs)
    before = {name: p.clone() for name, p in base.named_parameters()}
    report = fusetune.fuse(model)
    layer = base.model.layers[0].self_attn.q_proj
    assert type(layer) is FusedLinear
    methods = {
        "LoRA",
        "prefix tuning",
        "swiglu",
        "rms norm",
        "rotary",
        "frozen linear",
        "cross-entropy",
    }
    assert {row.method for row in report.rows} == methods
    prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    fusetune.unfuse(model)
    assert type(layer) is lora.Linear


def test_a_lora_model_is_no_prompt_model():
    model, _ = prefix_models.llama()
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    kind = type(model)
    report = fusetune.fuse(model)
    assert type(model) is kind
    assert "prefix tuning" not in {row.method for row in report.rows}


def test_a_prompt_of_embeddings_runs_as_ever():
    torch.manual_seed(0)
    base, task = prefix_models.llama()
    model = get_peft_model(base, PromptTuningConfig(task_type=task, num_virtual_tokens=5))
    inputs = prefix_models.inputs(task)
    expected = prefix_models.step(model, inputs)
    with fusetune.fused(model):
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)
