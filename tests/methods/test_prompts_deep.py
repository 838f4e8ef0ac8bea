"""Prefixes in every layer: against PEFT and against attention worked out plainly."""

import peft
import prompt_models
import pytest
import torch
from peft import get_peft_model
from prompt_models import TASKS, assert_equal, base, encoder, layer, logits, prompted

from fusetune.methods import PrefixTuningConfig, PromptTuningConfig, PTuningV2Config

P = 5
FAMILIES = ("llama", "gpt2", "bert", "t5")
T5 = {"encoder": False, "cross": False}  # PEFT's prefix is the decoder's self-attention's


def flat(length=P, **changes):
    return PrefixTuningConfig(num_virtual_tokens=length, prefix_projection=False, **changes)


def with_mlp(**changes):
    return PrefixTuningConfig(num_virtual_tokens=P, encoder_hidden_size=24, **changes)


def step(model, inputs):
    """(loss, logits, gradients by the parameters' names)"""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits.detach(), grads


def same_steps(got, expected):
    assert_equal(got[1], expected[1])
    assert_equal(got[0], expected[0])
    assert got[2].keys() == expected[2].keys()
    for name, grad in got[2].items():
        # The loss is in fp32, and so is what comes back from it.
        torch.testing.assert_close(grad, expected[2][name], atol=1e-9, rtol=1e-6)
        assert grad.abs().max() > 1e-7


def peft_pair(family):
    """(fusetune's model, PEFT's with the same prefix, inputs)"""
    stock, _ = base(family)
    task = TASKS[family] or "SEQ_CLS"
    other = get_peft_model(
        stock, peft.PrefixTuningConfig(num_virtual_tokens=P, task_type=task)
    ).eval()
    other.prompt_encoder.double()
    model, inputs = prompted(family, flat(**(T5 if family == "t5" else {})))
    mine = encoder(model, site="decoder" if family == "t5" else "self").weight
    source = other.prompt_encoder["default"].embedding.weight.data
    if family == "t5":  # PEFT gives both of this model's layers the first layer's
        source = source[:, : source.shape[1] // 2].repeat(1, 2)
    mine.data.copy_(source)
    return model, other, inputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_same_as_peft(family, side):
    model, other, inputs = peft_pair(family)
    ids, mask = prompt_models.padded(inputs["input_ids"], side)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss, got, grads = step(model, inputs)
    other_loss, expected, other_grads = step(other, inputs)
    real = mask.bool() if family != "t5" else slice(None)
    assert_equal(got[real], expected[real])
    assert_equal(loss, other_loss)
    (grad,), (other_grad,) = grads.values(), other_grads.values()
    if family == "t5":
        grad = grad.unflatten(1, (2, -1)).sum(1)
        other_grad = other_grad[:, : grad.shape[1]]
    torch.testing.assert_close(grad, other_grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_as_peft(family, beams):
    model, other, inputs = peft_pair(family)
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


def test_bert_by_hand():
    """One layer's attention over [prefix | tokens], positions from P on, in plain operations."""
    model, inputs = prompted("bert", flat)
    stock = base("bert")[0].bert
    attention = stock.encoder.layer[0].attention.self
    seen = {}
    module = model.get_base_model().bert.encoder.layer[0].attention.self
    module.register_forward_hook(lambda _, __, output: seen.update(out=output[0]))
    ids = inputs["input_ids"]
    logits(model, {"input_ids": ids})
    with torch.no_grad():
        positions = torch.arange(P, P + ids.shape[1])[None]
        hidden = stock.embeddings(input_ids=ids, position_ids=positions)
        q, k, v = (getattr(attention, n)(hidden) for n in ("query", "key", "value"))
        prefix = encoder(model, site="self").weight.view(P, 2, 2, 64)[:, 0]
        k, v = (
            torch.cat((prefix[:, i].expand(2, -1, -1), part), 1) for i, part in enumerate((k, v))
        )
        q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(2, 3) / 4).softmax(-1)
        expected = (weights @ v).transpose(1, 2).flatten(2)
    assert_equal(seen["out"].flatten(2), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_dropped_after_training_computes_the_same(family, tmp_path):
    model, inputs = prompted(family, with_mlp)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval(), inputs)
    assert any(".network." in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        stock, _ = base(family)
        loaded = peft.PeftModel.from_pretrained(stock, tmp_path, is_trainable=trainable).eval()
        trained = [(n, tuple(p.shape)) for n, p in loaded.named_parameters() if p.requires_grad]
        sites = ("encoder", "decoder", "cross") if family == "t5" else ("self",)
        width = 128 if family == "llama" else 256
        expected_names = [f"default.{site}.weight" for site in sites]
        assert bool(trained) == trainable
        assert [n.split("prompt_encoders.")[1] for n, _ in trained] == expected_names * trainable
        assert {shape for _, shape in trained} <= {(P, width)}
        assert_equal(logits(loaded, inputs), expected)
    # In a model that has the MLP yet, loading drops it.
    model, _ = prompted(family, with_mlp)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert not any(".network." in name for name, _ in model.named_parameters())
    assert_equal(logits(model.eval(), inputs), expected)


def test_the_mlp_has_gradients():
    model, inputs = prompted("llama", with_mlp)
    _, _, grads = step(model, inputs)
    assert len(grads) == 5
    found = encoder(model, site="self")
    plain, _ = prompted("llama", flat)
    encoder(plain, site="self").weight.data.copy_(found().detach())
    (upper,) = step(plain, inputs)[2].values()
    expected = torch.autograd.grad(found(), list(found.parameters()), upper)
    for parameter, grad in zip(found.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-10, rtol=1e-6)


# --- encoder-decoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [["encoder"], ["decoder"], ["cross"], ["encoder", "cross"]])
def test_places_of_t5(sites):
    """Each only where it is asked for, and of effect there."""
    chosen = {name: name in sites for name in ("encoder", "decoder", "cross")}
    model, inputs = prompted("t5", flat(**chosen))
    assert list(layer(model).prompt_encoders["default"]) == sites
    stock, _ = base("t5")
    plain = logits(stock, inputs)
    full = logits(model, inputs)
    assert (full - plain).abs().max() > 1e-3
    with torch.no_grad():
        got = model.get_base_model().get_encoder()(input_ids=inputs["input_ids"])[0]
        expected = stock.encoder(input_ids=inputs["input_ids"])[0]
    assert torch.allclose(got, expected) == ("encoder" not in sites)
    _, _, grads = step(model, inputs)
    assert {name.split(".")[-2] for name in grads} == set(sites)


def test_cross_attention_by_hand():
    model, inputs = prompted("t5", flat(encoder=False, decoder=False))
    stock, _ = base("t5")
    seen = {}
    block = model.get_base_model().decoder.block[0].layer[1].EncDecAttention
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(
            hidden=args[0] if args else kwargs["hidden_states"], states=kwargs["key_value_states"]
        ),
        with_kwargs=True,
    )
    block.register_forward_hook(lambda _, __, output: seen.update(out=output[0]))
    logits(model, inputs)
    mine = stock.decoder.block[0].layer[1].EncDecAttention
    prefix = encoder(model, site="cross").weight.view(P, 2, 2, 64)[:, 0]
    with torch.no_grad():
        q = mine.q(seen["hidden"])
        k, v = (
            torch.cat((prefix[:, i].expand(2, -1, -1), part(seen["states"])), 1)
            for i, part in enumerate((mine.k, mine.v))
        )
        q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)  # T5 does not scale
        expected = mine.o((weights @ v).transpose(1, 2).flatten(2))
    assert_equal(seen["out"], expected)


def test_places_that_a_model_does_not_have():
    for place in ("encoder", "decoder", "cross"):
        with pytest.raises(ValueError, match=f"{place} is for encoder-decoder models"):
            prompted("llama", flat(**{place: True}))
    with pytest.raises(ValueError, match="one of encoder, decoder and cross must be true"):
        prompted("t5", flat(encoder=False, decoder=False, cross=False))


# --- prompt dropout ------------------------------------------------------------------------------


def v2(p, length=P, **changes):
    return PTuningV2Config(num_virtual_tokens=length, prompt_dropout=p, **changes)


def test_prompt_dropout_is_of_training_only():
    model, inputs = prompted("llama", lambda: v2(0.5))
    expected = logits(model, inputs)
    assert torch.equal(logits(model, inputs), expected)
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    assert torch.equal(logits(model.eval(), inputs), expected)
    torch.manual_seed(7)
    first = logits(model.train(), inputs)
    torch.manual_seed(7)
    assert torch.equal(logits(model, inputs), first)
    none, _ = prompted("llama", lambda: v2(0.0))
    assert torch.equal(logits(none.train(), inputs), logits(none.eval(), inputs))


def test_prompt_dropout_keeps_the_expected_value():
    """Values dropped of a prefix whose keys are zero: attention's result is linear in them."""
    p, repeats = 0.4, 4000
    model, _ = prompted("bert", lambda: v2(p))
    site = encoder(model, site="self")
    parts = site.weight.data.view(P, 2, 2, 64)
    parts[:, :, 0] = 0
    seen = []
    module = model.get_base_model().bert.encoder.layer[0].attention.self
    module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    ids = torch.full((repeats, 2), 5)
    torch.manual_seed(0)
    logits(model, {"input_ids": ids[:1]})
    logits(model.train(), {"input_ids": ids})
    exact, samples = seen[0].flatten(1), seen[1].flatten(1)
    # Rows differ, so each has drawn its own; their mean is the result without dropout.
    assert (samples.std(0) > 1e-3).all()
    deviations = (samples.mean(0) - exact[0]) / (samples.std(0) / repeats**0.5)
    assert deviations.abs().max() < 5
    # The variance of a mean of inverted dropout: w^2 v^2 p / (1 - p), w the attention weight.
    scores = 1 / (P + 2)  # at most: keys of tokens are of the order of the zeros
    variance = (scores * parts[:, 0, 1]).square().sum(0) * p / (1 - p)
    ratio = samples.var(0).view(2, 64) / variance
    assert ratio.min() > 0.5
    assert ratio.max() < 2


def test_dropouts_of_a_batch():
    model, inputs = prompted("llama", lambda: v2(0.5), names=("a",))
    model.add_adapter("b", v2(0.1))
    ids = inputs["input_ids"]
    logits(model, {"input_ids": ids}, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match=r"adapter_names: .* differ in prompt_dropout"):
        model.train()(input_ids=ids, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="prompt_dropout must be in"):
        v2(1.0)


# --- gradient checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, reentrant, first):
    """Enabled before wrapping or after it: the same step."""
    model, inputs = prompted(family, flat)
    expected = step(model.train(), inputs)
    if first:
        stock, _ = base(family)
        stock.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        config = flat()
        config.task_type = TASKS[family]
        model = get_peft_model(stock, config).train()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same_steps(step(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_dropout_again(reentrant):
    model, inputs = prompted("llama", lambda: v2(0.3))
    model.train()
    torch.manual_seed(3)
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    same_steps(step(model, inputs), expected)


# --- one adapter for each row --------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(4, 4), (2, 6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_names(family, lengths):
    model, inputs = prompted(family, lambda: flat(lengths[0]), names=("a",))
    model.add_adapter("b", flat(lengths[1]))
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
        assert_equal(got[index], expected)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_adapter_names_in_generate(family, beams):
    model, inputs = prompted(family, lambda: flat(3), names=("a",))
    model.add_adapter("b", flat(6))
    ids, mask = prompt_models.padded(inputs["input_ids"], "left" if family == "llama" else "right")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    got = model.generate(input_ids=ids, attention_mask=mask, adapter_names=["a", "b"], **options)
    for row, row_ids, row_mask, name in zip(got, ids, mask, ("a", "b"), strict=True):
        model.set_adapter(name)
        alone = model.generate(input_ids=row_ids[row_mask.bool()][None], **options)[0]
        assert torch.equal(row[-6:], alone[-6:])


def test_adapter_names_in_training():
    model, inputs = prompted("llama", lambda: flat(3), names=("a",))
    model.add_adapter("b", flat(5))
    model.set_requires_grad(["a", "b"])
    ids = torch.cat((inputs["input_ids"], inputs["input_ids"].flip(1)))

    def grads(rows, **options):
        model.zero_grad()
        model(input_ids=ids[rows], **options).logits.square().sum().backward()
        return {n: encoder(model, n, "self").weight.grad for n in "ab"}

    both = grads([0, 1, 2], adapter_names=["b", "a", "b"])
    for name, rows in (("a", [1]), ("b", [0, 2])):
        model.set_adapter(name)
        assert_equal(both[name], grads(rows)[name])


def test_prefixes_and_prompts_are_adapters_of_one_model():
    """One after the other, but not in one batch."""
    model, inputs = prompted("llama", flat, names=("deep",))
    model.add_adapter("shallow", PromptTuningConfig(num_virtual_tokens=3))
    ids = inputs["input_ids"]
    deep = logits(model, {"input_ids": ids})
    model.set_adapter("shallow")
    shallow = logits(model, {"input_ids": ids})
    assert shallow.shape[1] == deep.shape[1] + 3
    alone, _ = prompted("llama", flat)
    encoder(alone, site="self").weight.data.copy_(encoder(model, "deep", "self").weight)
    assert_equal(logits(alone, {"input_ids": ids}), deep)
    model.set_adapter("deep")
    assert_equal(logits(model, {"input_ids": ids}), deep)
    with pytest.raises(ValueError, match=r"adapter_names: .* mixes prefixes and prompts"):
        model(input_ids=ids, adapter_names=["deep", "shallow"])


def test_adapters_at_different_places_cannot_share_a_batch():
    model, inputs = prompted("t5", lambda: flat(encoder=False), names=("a",))
    model.add_adapter("b", flat())
    with pytest.raises(ValueError, match=r"not all have a prefix in the attention 'encoder'"):
        model(**inputs, adapter_names=["a", "b"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_function_may_be_set_anew(attention):
    model, inputs = prompted("llama", flat)
    expected = logits(model, inputs)
    model.get_base_model().set_attn_implementation(attention)
    # eager's softmax is in fp32.
    tolerance = {"atol": 1e-6, "rtol": 0} if attention == "eager" else prompt_models.TOLERANCE
    torch.testing.assert_close(logits(model, inputs), expected, **tolerance)
    with model.disable_adapter():
        assert (logits(model, inputs) - expected).abs().max() > 1e-3
    model.unload()
    assert model.get_base_model().config._attn_implementation == attention


def test_a_set_function_is_not_used_without_the_prefix_in_silence():
    model, inputs = prompted("llama", flat)
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="attention function was set anew"):
        model.get_base_model()(input_ids=inputs["input_ids"])


def test_models_without_the_interface_are_refused():
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = DebertaV2Model(config)
    with pytest.raises(ValueError, match=r"model: DebertaV2Model does not take its attention"):
        get_peft_model(model, flat())
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "prompt_layer")
