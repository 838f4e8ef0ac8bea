"""Prompts among the input embeddings: against the model run on them, and against PEFT."""

import peft
import prompt_models
import pytest
import torch
from peft import get_peft_model
from prompt_models import TASKS, assert_equal, base, encoder, logits, prompted
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from fusetune.methods import PromptTuningConfig, PTuningConfig

P = 5
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def prompt_tuning(length=P):
    return PromptTuningConfig(num_virtual_tokens=length, init="uniform")


def joined(stock, prompt, ids):
    """[prompt | tokens] embedded."""
    return torch.cat((prompt.expand(len(ids), -1, -1), stock.get_input_embeddings()(ids)), 1)


def step(model, inputs):
    """(loss, logits, gradients of what is trained, by the end of their names)"""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return out.loss.detach(), out.logits.detach(), grads


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_is_the_model_run_on_prompt_and_tokens(family):
    model, inputs = prompted(family, prompt_tuning)
    stock, _ = base(family)
    loss, got, (grad,) = step(model, inputs)
    prompt = encoder(model).weight.detach().clone().requires_grad_()
    labels = torch.nn.functional.pad(inputs["labels"], (P, 0), value=-100)
    out = stock(inputs_embeds=joined(stock, prompt, inputs["input_ids"]), labels=labels)
    out.loss.backward()
    assert_equal(got, out.logits.detach())
    assert_equal(loss, out.loss.detach())
    # The loss is in fp32, and so is what comes back from it.
    torch.testing.assert_close(grad, prompt.grad, atol=1e-9, rtol=1e-6)
    assert prompt.grad.abs().max() > 1e-5


def peft_pair(family, theirs, ours):
    """(fusetune's model, PEFT's with the same weights, inputs)"""
    stock, _ = base(family)
    theirs.task_type = TASKS[family]
    other = get_peft_model(stock, theirs).eval()
    other.prompt_encoder.double()
    model, inputs = prompted(family, ours)
    source, mine = other.prompt_encoder["default"], encoder(model)
    mine.weight.data.copy_(source.embedding.weight.data[: len(mine.weight)])
    if mine.network is None:
        return model, other, inputs
    lstm = getattr(source, "lstm_head", None)
    if lstm is None:
        mine.network.load_state_dict(source.mlp_head.state_dict())
    else:
        mine.network.lstm.load_state_dict(lstm.state_dict())
        mine.network.mlp.load_state_dict(source.mlp_head.state_dict())
    return model, other, inputs


KINDS = {
    "prompt tuning": (lambda: peft.PromptTuningConfig(num_virtual_tokens=P), prompt_tuning),
    "p-tuning, LSTM": (
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=P, encoder_reparameterization_type="LSTM", encoder_hidden_size=32
        ),
        lambda: PTuningConfig(num_virtual_tokens=P),
    ),
    "p-tuning, MLP": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=24),
        lambda: PTuningConfig(
            num_virtual_tokens=P, encoder_reparameterization_type="MLP", encoder_hidden_size=24
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_same_as_peft(family, kind):
    if (family, kind) == ("t5", "p-tuning, LSTM"):
        pytest.skip("PEFT's LSTM goes on over a second prompt that it does not use")
    theirs, ours = KINDS[kind]
    model, other, inputs = peft_pair(family, theirs(), ours)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -2:] = 0
    loss, got, grads = step(model, inputs)
    other_loss, expected, other_grads = step(other, inputs)
    assert_equal(got, expected)
    assert_equal(loss, other_loss)
    assert len(grads) == len(other_grads)
    for mine, their in zip(grads, other_grads, strict=True):
        # PEFT's second half of an encoder-decoder's prompt gets none.
        torch.testing.assert_close(mine, their[: len(mine)], atol=1e-9, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning, MLP"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_as_peft(family, kind, beams):
    theirs, ours = KINDS[kind]
    model, other, inputs = peft_pair(family, theirs(), ours)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    options.update(return_dict_in_generate=True, output_scores=True)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got, expected = (m.generate(**inputs, **options) for m in (model, other))
    assert torch.equal(got.sequences, expected.sequences)
    assert_equal(torch.stack(got.scores), torch.stack(expected.scores))
    with model.disable_adapter():
        plain = model.generate(**inputs, **options)
    assert not torch.allclose(torch.stack(plain.scores), torch.stack(got.scores))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_with_padding_is_generate_without(use_cache):
    """Row by row, without the padding."""
    model, inputs = prompted("llama", prompt_tuning)
    ids, mask = prompt_models.padded(inputs["input_ids"], "left")
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    both = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, row_ids, row_mask in zip(both, ids, mask, strict=True):
        alone = model.generate(input_ids=row_ids[row_mask.bool()][None], **options)[0]
        assert torch.equal(row[ids.shape[1] :], alone[-6:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    """With positions of the tokens, a padded row is the row."""
    model, inputs = prompted("llama", prompt_tuning)
    ids, mask = prompt_models.padded(inputs["input_ids"], side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    for row, row_ids, row_mask in zip(got, ids, mask, strict=True):
        keep = row_mask.bool()
        alone = logits(model, {"input_ids": row_ids[keep][None]})[0]
        assert_equal(row[torch.cat((torch.ones(P, dtype=torch.bool), keep))], alone)


def test_t5_sees_its_padding():
    model, inputs = prompted("t5", prompt_tuning)
    ids, mask = prompt_models.padded(inputs["input_ids"], "right")
    got = logits(model, {"input_ids": ids, "attention_mask": mask, "labels": inputs["labels"]})
    alone = logits(model, {"input_ids": ids[:1, mask[0].bool()], "labels": inputs["labels"][:1]})
    assert_equal(got[:1], alone)


# --- one adapter for each row --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("lengths", [(4, 4), (2, 6)])
def test_adapter_names(family, lengths):
    model, inputs = prompted(family, lambda: prompt_tuning(lengths[0]), names=("a",))
    model.add_adapter("b", prompt_tuning(lengths[1]))
    ids = torch.cat((inputs["input_ids"], inputs["input_ids"].flip(1)))
    more = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    names = ["a", "__base__", "b", "a"]
    got = logits(model, {"input_ids": ids, **more}, adapter_names=names)
    for index, name in enumerate(names):
        row = {"input_ids": ids[index : index + 1]}
        row.update({key: value[index : index + 1] for key, value in more.items()})
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, row)[0]
        else:
            model.set_adapter(name)
            expected = logits(model, row)[0]
        assert_equal(got[index, got.shape[1] - len(expected) :], expected)
    with pytest.raises(ValueError, match=r"adapter_names must name .* 4 sequences, got 2"):
        model(input_ids=ids, **more, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match=r"adapter_names: 'c' is none of \['a', 'b', '__b"):
        model(input_ids=ids, **more, adapter_names=["a", "b", "a", "c"])
    with pytest.raises(ValueError, match="adapter_names must be a list"):
        model(input_ids=ids, **more, adapter_names="abab")


def test_adapter_names_in_training():
    """Each adapter's gradient is that of its rows."""
    model, inputs = prompted("llama", lambda: prompt_tuning(3), names=("a",))
    model.add_adapter("b", prompt_tuning(5))
    model.set_requires_grad(["a", "b"])
    ids = torch.cat((inputs["input_ids"], inputs["input_ids"].flip(1)))

    def grads(rows, **options):
        model.zero_grad()
        logits_ = model(input_ids=ids[rows], **options).logits
        logits_[:, -ids.shape[1] :].square().sum().backward()
        return {n: encoder(model, n).weight.grad for n in "ab"}

    both = grads([0, 1, 2], adapter_names=["b", "a", "b"])
    for name, rows in (("a", [1]), ("b", [0, 2])):
        model.set_adapter(name)
        alone = grads(rows)
        assert_equal(both[name], alone[name])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_adapter_names_in_generate(family, beams):
    model, inputs = prompted(family, lambda: prompt_tuning(3), names=("a",))
    model.add_adapter("b", prompt_tuning(6))
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    for names in (["a", "b"], ["b", "__base__"]):
        got = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options
        )
        for row, row_ids, name in zip(got, ids, names, strict=True):
            one = {"input_ids": row_ids[None], "attention_mask": torch.ones_like(row_ids)[None]}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(**one, **options)[0]
            else:
                model.set_adapter(name)
                alone = model.generate(**one, **options)[0]
            assert torch.equal(row, alone)


def test_templates_cannot_be_mixed():
    model, inputs = prompted("llama", lambda: PTuningConfig(template=[1, 1]), names=("a", "b"))
    with pytest.raises(ValueError, match=r"adapter_names: of \['a', 'b'\], one has a template"):
        model(input_ids=inputs["input_ids"], adapter_names=["a", "b"])
    # All rows with one of them are no mixture.
    got = logits(model, {"input_ids": inputs["input_ids"]}, adapter_names=["b", "b"])
    model.set_adapter("b")
    assert torch.equal(got, logits(model, {"input_ids": inputs["input_ids"]}))


# --- kinds of models -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_a_decoder_that_classifies_by_the_last_token(side, names):
    """Padding or not, by the last real one; given embeddings, transformers takes the last."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3, pad_token_id=0))
    model = get_peft_model(model.double(), prompt_tuning(3), adapter_name="a").eval()
    model.add_adapter("b", prompt_tuning(6))
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.ones_like(ids)
    if side != "none":
        ids, mask = prompt_models.padded(ids, side)
    options = {} if names is None else {"adapter_names": names}
    if side == "left":
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, {"input_ids": ids, "attention_mask": mask}, **options)
    for row, row_ids, row_mask, name in zip(got, ids, mask, names or ["a", "a"], strict=True):
        model.set_adapter(name)
        alone = logits(model, {"input_ids": row_ids[row_mask.bool()][None]})[0]
        assert_equal(row, alone)


def test_question_answering_counts_from_behind_the_prompt():
    torch.manual_seed(0)
    stock = BertForQuestionAnswering(BertConfig(**SMALL)).double().eval()
    ids = torch.randint(1, 97, (2, 9))
    spans = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 8])}
    for config, added in (
        (prompt_tuning(), torch.tensor([P, P])),
        (PTuningConfig(template=[2, "{0}", 3]), torch.tensor([2, 2])),
    ):
        model = get_peft_model(stock, config).eval()
        out = model(input_ids=ids, **spans)
        assert out.start_logits.shape == (2, 9 + config.num_virtual_tokens)
        losses = [
            torch.nn.functional.cross_entropy(values, places + added)
            for values, places in zip(
                (out.start_logits, out.end_logits), spans.values(), strict=True
            )
        ]
        torch.testing.assert_close(out.loss, sum(losses) / 2)
        stock = model.unload()


def test_token_classification_and_token_types():
    torch.manual_seed(0)
    stock = BertForTokenClassification(BertConfig(**SMALL, num_labels=4)).double().eval()
    ids, labels = torch.randint(1, 97, (2, 9)), torch.randint(4, (2, 9))
    types = torch.arange(9).expand(2, -1) // 5
    model = get_peft_model(stock, prompt_tuning()).eval()
    out = model(input_ids=ids, token_type_ids=types, labels=labels)
    prompt = encoder(model).weight
    with model.disable_adapter():
        expected = stock(
            inputs_embeds=joined(stock, prompt, ids),
            token_type_ids=torch.nn.functional.pad(types, (P, 0)),
            labels=torch.nn.functional.pad(labels, (P, 0), value=-100),
        )
    assert_equal(out.logits.detach(), expected.logits.detach())
    assert_equal(out.loss.detach(), expected.loss.detach())


@pytest.mark.parametrize("config", [prompt_tuning, lambda: PTuningConfig(template=[2, "{0}", 1])])
def test_embeddings_that_are_scaled_or_trained(config):
    """Gemma scales tokens' embeddings in their module: the prompt is not scaled."""
    torch.manual_seed(0)
    shape = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
    stock = Gemma3ForCausalLM(Gemma3TextConfig(**shape)).double().eval()
    ids = torch.randint(1, 97, (2, 9))
    plain = stock.get_input_embeddings()(ids)
    model = get_peft_model(stock, config()).eval()
    got = logits(model, {"input_ids": ids})
    prompt = encoder(model)().expand(2, -1, -1)
    parts = [prompt, plain] if prompt.shape[1] == P else [prompt[:, :2], plain, prompt[:, 2:]]
    with model.disable_adapter():
        expected = logits(stock, {"inputs_embeds": torch.cat(parts, 1)})
    assert_equal(got, expected)


def test_embeddings_that_are_trained_too():
    model, inputs = prompted(
        "llama",
        PromptTuningConfig(num_virtual_tokens=P, modules_to_save=["embed_tokens"]),
    )
    _, got, grads = step(model, inputs)
    stock, _ = base("llama")
    table = stock.get_input_embeddings()
    prompt = encoder(model).weight.detach().clone().requires_grad_()
    labels = torch.nn.functional.pad(inputs["labels"], (P, 0), value=-100)
    stock.requires_grad_(False)
    table.requires_grad_(True)
    out = stock(inputs_embeds=joined(stock, prompt, inputs["input_ids"]), labels=labels)
    out.loss.backward()
    assert_equal(got, out.logits.detach())
    assert len(grads) == 2
    for grad in grads:
        like = prompt.grad if grad.shape == prompt.shape else table.weight.grad
        torch.testing.assert_close(grad, like, atol=1e-9, rtol=1e-6)


def test_a_call_with_embeddings_or_by_position():
    model, inputs = prompted("llama", prompt_tuning)
    ids, mask = prompt_models.padded(inputs["input_ids"], "right")
    expected = logits(model, {"input_ids": ids, "attention_mask": mask})
    embedded = model.get_input_embeddings()(ids)
    assert_equal(logits(model, {"inputs_embeds": embedded, "attention_mask": mask}), expected)
    with torch.no_grad():
        assert torch.equal(model.get_base_model()(ids, mask).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning, LSTM"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradient_checkpointing(family, kind, reentrant):
    model, inputs = prompted(family, KINDS[kind][1])
    model.train()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step(model, inputs)
    assert_equal(got[0], expected[0])
    for mine, plain in zip(got[2], expected[2], strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-7)


def test_masks_of_other_shapes_are_refused():
    model, inputs = prompted("llama", prompt_tuning)
    ids = inputs["input_ids"]
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask: with a prompt.*\[2, 1, 12, 12\]"):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        model.generate(input_ids=ids, max_new_tokens=3, cache_implementation="static")
    out = model(input_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask has 1 columns; the cache and the new tok"):
        model(input_ids=ids[:, :1], attention_mask=mask[:, 0, :1, 0], past_key_values=out[1])


def test_what_comes_behind_a_cache():
    """In two calls as in one."""
    model, inputs = prompted("llama", prompt_tuning)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        second = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=first[1])
    assert_equal(torch.cat((first.logits, second.logits), 1), whole)
