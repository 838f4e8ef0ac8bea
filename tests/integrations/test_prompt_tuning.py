"""PEFT's prompt tuning and p-tuning: fused, the same numbers; a prompt for each row."""

import copy

import pytest
import tiny_models
import torch
from peft import (
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

from fusetune import fuse, unfuse
from fusetune.integrations import peft_prompt_embed

pytestmark = pytest.mark.usefixtures("stock_base")

LENGTH = 5
MODELS = {
    "llama": (tiny_models.llama, TaskType.CAUSAL_LM),
    "gpt2": (tiny_models.gpt2, TaskType.CAUSAL_LM),
    "t5": (tiny_models.t5, TaskType.SEQ_2_SEQ_LM),
}
KINDS = {
    "prompt": lambda task, length: PromptTuningConfig(task_type=task, num_virtual_tokens=length),
    "mlp": lambda task, length: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=length, encoder_hidden_size=24
    ),
    "lstm": lambda task, length: PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=length,
        encoder_hidden_size=24,
        encoder_reparameterization_type="LSTM",
    ),
}


def make(name, kind, length=LENGTH, dtype=torch.float32):
    torch.manual_seed(0)
    model, inputs = MODELS[name][0]()
    return get_peft_model(model.to(dtype), KINDS[kind](MODELS[name][1], length)), inputs


def without_swiglu(model):
    """With an activation that is not fused: the prompt alone makes no difference to the bit."""
    for layer in model.base_model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    return model


def masks(inputs, side):
    mask = torch.ones_like(inputs["input_ids"])
    if side == "left":
        mask[0, :4] = 0
    if side == "right":
        mask[0, -4:] = 0
        inputs["labels"][0, -4:] = -100
    return mask


def assert_equal_steps(stock, inputs, count, out=1e-5):
    """The fused copy's loss and logits, and the gradients of all `count` trained parameters."""
    ours = copy.deepcopy(stock)
    assert fuse(ours, loss=False).stock == []
    assert type(ours) is not type(stock)
    results = [tiny_models.loss_and_grads(model, inputs) for model in (stock, ours)]
    (want_loss, want_logits, want), (loss, logits, got) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, want_logits, rtol=out, atol=out)
    assert got.keys() == want.keys()
    assert len(got) == count
    for name in want:
        scale = want[name].abs().max()
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5 * scale.item())
        assert scale > 0
    return ours


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("kind", "count"), [("prompt", 1), ("mlp", 7), ("lstm", 21)])
@pytest.mark.parametrize("name", MODELS)
def test_one_step(name, kind, count, side):
    model, inputs = make(name, kind)
    if side != "none":
        inputs["attention_mask"] = masks(inputs, side)
    assert_equal_steps(model, inputs, count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_16_bits(dtype):
    """The prompt stays in fp32. To the bit: sums over two rows have one rounding."""
    model, inputs = make("llama", "prompt", dtype=dtype)
    ours = copy.deepcopy(without_swiglu(model))
    fuse(ours, loss=False)
    want, got = (tiny_models.loss_and_grads(m, inputs) for m in (model, ours))
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])
    for name in want[2]:
        assert got[2][name].dtype == torch.float32
        torch.testing.assert_close(got[2][name], want[2][name])


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_bert(task, kind):
    import transformers

    classes = {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "QUESTION_ANS": "QuestionAnswering",
        "FEATURE_EXTRACTION": "Model",
    }
    base, inputs = tiny_models.bert()
    prefix = "" if task == "FEATURE_EXTRACTION" else "For"
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{prefix}{classes[task]}")(base.config)
    stock = get_peft_model(model, KINDS[kind](TaskType[task], LENGTH)).eval()
    given = {"input_ids": inputs["input_ids"], "attention_mask": masks(inputs, "right")}
    if task != "QUESTION_ANS":
        types = torch.arange(12).expand(2, -1) // 6
        given["token_type_ids"] = types if task != "FEATURE_EXTRACTION" else None
    ours = copy.deepcopy(stock)
    assert fuse(ours).stock == []
    if task == "SEQ_CLS":
        given["labels"] = torch.tensor([0, 1])
        assert_equal_steps(stock, given, 1 + 2 if kind == "prompt" else 9)
    if task == "QUESTION_ANS":
        given.update(start_positions=torch.tensor([1, 6]), end_positions=torch.tensor([9, 8]))
        want, got = (model(**given) for model in (stock, ours))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    want, got = (model(**given, return_dict=False) for model in (stock, ours))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate(name, kind, options):
    model, inputs = make(name, kind)
    given = {"input_ids": inputs["input_ids"], "attention_mask": masks(inputs, "left")}
    given.update(max_new_tokens=8, do_sample=False, min_new_tokens=8, **options)
    want = model.eval().generate(**given)
    fuse(model)
    got = model.generate(**given)
    assert torch.equal(got, want)
    without = {k: v for k, v in given.items() if k != "attention_mask"}
    assert model.generate(**without).shape == want.shape


def test_the_encoder_runs_once_in_a_generation():
    model, inputs = make("llama", "lstm")
    fuse(model.eval())
    calls = []
    model.prompt_encoder["default"].register_forward_hook(lambda *_: calls.append(1))
    model.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False)
    assert len(calls) == 1


def test_a_static_cache_runs_pefts_code():
    model, inputs = make("llama", "prompt")
    given = {"input_ids": inputs["input_ids"], "max_new_tokens": 5, "do_sample": False}
    given["cache_implementation"] = "static"
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(model.eval().generate(**given).tolist())
        except Exception as error:  # PEFT's own may fail: then so does ours
            outcomes.append(str(error))
        fuse(model)
    assert outcomes[0] == outcomes[1]


# --- a prompt for each row ------------------------------------------------------------------------


def three_adapters(name, kind="prompt"):
    """An adapter of 5 vectors, "short" of 2, "wide" of 5; PEFT has all of one kind."""
    model, _ = make(name, kind)
    model.add_adapter("short", KINDS[kind](MODELS[name][1], 2))
    model.add_adapter("wide", KINDS[kind](MODELS[name][1], LENGTH))
    torch.manual_seed(1)
    ids = torch.randint(1, tiny_models.VOCABULARY, (5, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[4, :2] = 0
    return model.eval(), ids, mask


def alone(model, name, ids, mask, **more):
    """Logits of one row by PEFT's own code, without its prompt's."""
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=ids, attention_mask=mask, **more).logits
    model.set_adapter(name)
    length = model.peft_config[name].num_virtual_tokens
    seq2seq = "labels" in more
    return model(input_ids=ids, attention_mask=mask, **more).logits[:, 0 if seq2seq else length :]


NAMES = ["default", "short", "__base__", "wide", "short"]


@pytest.mark.parametrize("names", [NAMES, ["wide", "default"] * 2 + ["wide"], ["__base__"] * 5])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["prompt", "mlp"])
def test_rows_have_their_own(name, names, kind):
    model, ids, mask = three_adapters(name, kind)
    more = {"labels": ids} if name == "t5" else {}
    with torch.no_grad():
        rows = [
            alone(
                model,
                who,
                ids[i : i + 1],
                mask[i : i + 1],
                **{k: v[i : i + 1] for k, v in more.items()},
            )
            for i, who in enumerate(names)
        ]
        fuse(model)
        model.set_adapter("default")
        got = model(input_ids=ids, attention_mask=mask, adapter_names=names, **more).logits
    if name != "t5":
        got = got[:, -ids.shape[1] :]
    for i, want in enumerate(rows):
        seen = mask[i].bool() if name != "t5" else slice(None)
        torch.testing.assert_close(got[i][seen], want[0][seen], rtol=1e-4, atol=1e-5)


def test_rows_train_their_own():
    model, ids, mask = three_adapters("llama")
    fuse(model)
    labels = ids.masked_fill(mask == 0, -100)
    for adapter in ("default", "short", "wide"):
        model.prompt_encoder[adapter].requires_grad_(True)
    model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=NAMES).loss.backward()
    for adapter in ("default", "short", "wide"):
        assert model.prompt_encoder[adapter].embedding.weight.grad.any(), adapter


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_generate_their_own(name, options):
    model, ids, mask = three_adapters(name)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    rows = []
    for i, who in enumerate(NAMES):
        one = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1], **given}
        if who == "__base__":
            rows.append(model.get_base_model().generate(**one))
        else:
            model.set_adapter(who)
            rows.append(model.generate(**one))
    fuse(model)
    model.set_adapter("wide")
    got = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **given)
    assert torch.equal(got, torch.cat(rows))


def test_rows_have_their_own_classifier():
    from transformers import BertForSequenceClassification

    base, inputs = tiny_models.bert()
    torch.manual_seed(0)
    model = BertForSequenceClassification(base.config)
    model = get_peft_model(model, KINDS["prompt"](TaskType.SEQ_CLS, LENGTH))
    model.add_adapter("other", KINDS["prompt"](TaskType.SEQ_CLS, LENGTH))
    heads = model.base_model.classifier.modules_to_save
    torch.nn.init.normal_(heads["other"].weight)
    names, ids = ["other", "default"], inputs["input_ids"]
    model.eval()
    rows = []
    for i, who in enumerate(names):
        model.set_adapter(who)
        rows.append(model(input_ids=ids[i : i + 1], attention_mask=torch.ones(1, 12)).logits)
    fuse(model)
    got = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(got, torch.cat(rows), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="what a bert pools is the first place"):
        model(input_ids=ids, adapter_names=["other", "__base__"])


def test_where_positions_cannot_be_given():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    model = get_peft_model(RobertaModel(config), KINDS["prompt"](TaskType.FEATURE_EXTRACTION, 4))
    fuse(model)
    ids = torch.randint(2, 97, (2, 6))
    assert model(input_ids=ids, adapter_names=["default"] * 2)[0].shape == (2, 10, 32)
    with pytest.raises(ValueError, match="a roberta cannot be given"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "none"], "'none' is none of"),
        (["default"] * 3, "must name an adapter for each of 2 rows, got 3"),
        ([], "must name an adapter for each of 2 rows, got 0"),
    ],
)
def test_wrong_names(names, message):
    model, inputs = make("llama", "prompt")
    fuse(model)
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=names)


# --- a model's life -------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, reentrant):
    model, inputs = make("llama", kind)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    count = {"prompt": 1, "mlp": 7, "lstm": 21}[kind]
    ours = assert_equal_steps(model, inputs, count)
    assert ours.word_embeddings._forward_hooks


@pytest.mark.parametrize(("kind", "method"), [("prompt", "prompt tuning"), ("mlp", "p-tuning")])
def test_disabled_switched_and_unfused(kind, method):
    model, inputs = make("llama", kind)
    model.add_adapter("other", KINDS[kind](TaskType.CAUSAL_LM, 3))
    without_swiglu(model).eval()

    def results():
        found = []
        for name in ("default", "other"):
            model.set_adapter(name)
            found.append(model(**inputs).loss.item())
            with model.disable_adapter():
                found.append(model(**inputs).loss.item())
        return found

    want = results()
    report = fuse(model, loss=False)
    assert [(row.method, row.fused) for row in report.rows] == [(method, True)]
    assert results() == pytest.approx(want, rel=1e-6)
    with model.disable_adapter():
        assert [row.reason for row in report.refresh().rows] == ["adapters are disabled"]
    unfuse(model)
    assert type(model).__module__ == "peft.peft_model"
    assert results() == want


def test_save_and_load(tmp_path):
    model, inputs = make("llama", "lstm")
    fuse(model)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_models.llama()[0], tmp_path)
    want = loaded(**inputs).loss
    torch.testing.assert_close(want, model(**inputs).loss, rtol=1e-6, atol=0)
    fuse(loaded)
    torch.testing.assert_close(loaded(**inputs).loss, want, rtol=1e-6, atol=0)


def test_scaled_embeddings():
    """Gemma's and BART's multiply what they look up."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_activation="tanh",  # is not fused: see without_swiglu
    )
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        base = Gemma3ForCausalLM(config).to(dtype)
        stock = get_peft_model(base, KINDS["prompt"](TaskType.CAUSAL_LM, LENGTH))
        inputs = tiny_models.token_inputs()
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        ours = copy.deepcopy(stock)
        assert fuse(ours, loss=False).stock == []
        want, got = (model.eval()(**inputs) for model in (stock, ours))
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0)


def reasons():
    yield "a hook", lambda m: m.word_embeddings.register_forward_hook(lambda *_: None), "have hooks"
    yield "max_norm", lambda m: setattr(m.word_embeddings, "max_norm", 1.0), "max_norm"
    own = torch.nn.Embedding.forward
    yield (
        "an own forward",
        lambda m: m.word_embeddings.__dict__.update(forward=own.__get__(m.word_embeddings)),
        "forward of their own",
    )
    odd = type("Odd", (torch.nn.Embedding,), {})
    yield "a subclass", lambda m: setattr(m.word_embeddings, "__class__", odd), "are a Odd"


@pytest.mark.parametrize(
    ("change", "reason"), [r[1:] for r in reasons()], ids=[r[0] for r in reasons()]
)
def test_reasons_to_run_pefts_code(change, reason):
    model, inputs = make("llama", "prompt")
    report = fuse(model, loss=False)
    assert report.stock == []
    change(model)
    (row,) = report.refresh().stock
    assert reason in row.reason
    stock = type(model).stock_class.forward(model, **inputs)
    assert torch.equal(model(**inputs).logits, stock.logits)
    with pytest.raises(ValueError, match=f"adapter_names: .*{reason}"):
        model(**inputs, adapter_names=["default"] * 2)


def test_given_embeddings():
    model, inputs = make("llama", "prompt")
    embedded = without_swiglu(model).word_embeddings(inputs["input_ids"])
    want = model(inputs_embeds=embedded).logits
    fuse(model)
    assert torch.equal(model(inputs_embeds=embedded).logits, want)
    with pytest.raises(ValueError, match=r"adapter_names: .*inputs_embeds"):
        model(inputs_embeds=embedded, adapter_names=["default"] * 2)


def test_what_peft_ignores_is_ignored_with_a_warning():
    model, inputs = make("llama", "prompt")
    inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    want = model(**inputs).loss
    fuse(model, loss=False)
    with pytest.warns(UserWarning, match="position_ids"):
        torch.testing.assert_close(model(**inputs).loss, want, rtol=1e-6, atol=0)


def test_a_model_without_a_task():
    """PEFT itself uses no prompt then."""
    base, inputs = tiny_models.llama()
    config = PromptTuningConfig(num_virtual_tokens=3, num_transformer_submodules=1)
    model = without_swiglu(PeftModel(base, config))
    want = model(**inputs).logits
    (row,) = fuse(model, loss=False).rows
    assert "task type is None" in row.reason
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled():
    model, inputs = make("llama", "prompt")
    fuse(model, loss=False)
    want = model(**inputs).loss
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).loss, want)


def test_nothing_of_the_prompt_is_repeated(monkeypatch):
    """No tensor of a row's prompt, no ones for the mask: what PEFT makes is not made."""
    model, inputs = make("llama", "prompt")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    fuse(model, loss=False)
    called = []
    monkeypatch.setattr(torch.Tensor, "repeat", lambda *_: called.append("repeat"))
    original = peft_prompt_embed.prompt_embed
    monkeypatch.setattr(
        peft_prompt_embed,
        "prompt_embed",
        lambda *args, **kwargs: called.append("prompt_embed") or original(*args, **kwargs),
    )
    model(**inputs).loss.backward()
    assert called == ["prompt_embed"]
