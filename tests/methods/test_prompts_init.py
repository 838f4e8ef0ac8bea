"""Where prompts begin."""

import prompt_models
import pytest
import tiny_models
import torch
from prompt_models import assert_equal, base, encoder, layer, logits, prompted
from safetensors.torch import save_file

from fusetune.methods import PrefixTuningConfig, PromptTuningConfig, PTuningConfig, PTuningV2Config
from fusetune.methods.prompts.geometry import geometry_of

H, V = 64, tiny_models.VOCABULARY


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return prompt_models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def weight_of(config, family="llama"):
    model, _ = prompted(family, config)
    return encoder(model).weight.detach(), model.get_input_embeddings().weight.detach()


def rows_of(weight, embeddings):
    """Which token's embedding each row is."""
    same = (weight[:, None] == embeddings[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.long().argmax(1).tolist()


def test_uniform():
    weight, _ = weight_of(PromptTuningConfig(num_virtual_tokens=500, init="uniform"))
    assert weight.shape == (500, H)
    assert -0.5 <= weight.min() < -0.4999
    assert 0.4999 < weight.max() <= 0.5
    # The mean of 32,000 numbers of variance 1/12 is within five of its deviations.
    assert weight.mean().abs() < 5 * (1 / 12 / weight.numel()) ** 0.5
    assert weight.var().item() == pytest.approx(1 / 12, rel=0.02)
    narrow, _ = weight_of(PromptTuningConfig(num_virtual_tokens=50, init="uniform", init_range=0.1))
    assert 0.09 < narrow.abs().max() <= 0.1


def test_sampled_from_the_commonest_without_replacement():
    config = PromptTuningConfig(num_virtual_tokens=20, init="sampled_vocab", init_vocab_size=20)
    rows = rows_of(*weight_of(config))
    assert sorted(rows) == list(range(20))
    assert rows != sorted(rows)


def test_the_default_samples_5000_at_most():
    config = PromptTuningConfig(num_virtual_tokens=V)
    assert (config.init, config.init_vocab_size) == ("sampled_vocab", 5000)
    assert sorted(rows_of(*weight_of(config))) == list(range(V))
    with pytest.raises(ValueError, match=r"init_vocab_size: 98 of 97 tokens"):
        weight_of(PromptTuningConfig(num_virtual_tokens=V + 1))


def test_sampled_from_given_ids():
    ids = [3, 90, 41, 7, 7]
    config = PromptTuningConfig(num_virtual_tokens=4, init_token_ids=ids)
    assert sorted(rows_of(*weight_of(config))) == [3, 7, 41, 90]
    with pytest.raises(ValueError, match="init_token_ids: 5 of 4 tokens"):
        weight_of(PromptTuningConfig(num_virtual_tokens=5, init_token_ids=ids))


def test_seed():
    def make(seed):
        return weight_of(PromptTuningConfig(num_virtual_tokens=8, init_seed=seed))[0]

    assert torch.equal(make(3), make(3))
    assert not torch.equal(make(3), make(4))


def test_class_labels_are_means_and_the_rest_is_sampled(words):
    config = PromptTuningConfig(
        num_virtual_tokens=5,
        init="class_labels",
        class_labels=["w4", "w10 w20 w30"],
        init_token_ids=[50, 51, 52],
        tokenizer_name_or_path=words,
    )
    weight, embeddings = weight_of(config)
    assert torch.equal(weight[0], embeddings[4])
    torch.testing.assert_close(weight[1], embeddings[[10, 20, 30]].mean(0))
    assert sorted(rows_of(weight[2:], embeddings)) == [50, 51, 52]


@pytest.mark.parametrize("length", [2, 3, 5])
def test_text_is_repeated_or_cut(words, length):
    expected = [5, 9, 2, 5, 9][:length]
    config = PromptTuningConfig(
        num_virtual_tokens=length, init="text", init_text="w5 w9 w2", tokenizer_name_or_path=words
    )
    assert rows_of(*weight_of(config)) == expected
    config = PromptTuningConfig(num_virtual_tokens=length, init="text", init_token_ids=[5, 9, 2])
    assert rows_of(*weight_of(config)) == expected


def test_text_gives_what_the_model_would_see_of_it():
    """So that a new prompt is that text in front of the input."""
    ids = [5, 9, 2]
    model, inputs = prompted(
        "llama", PromptTuningConfig(num_virtual_tokens=3, init="text", init_token_ids=ids)
    )
    stock, _ = base("llama")
    full = torch.cat((torch.tensor(ids).expand(2, -1), inputs["input_ids"]), 1)
    assert_equal(logits(model, inputs), logits(stock, {"input_ids": full}))


def test_file(tmp_path):
    values = torch.randn(4, H)
    path = tmp_path / "prompt.safetensors"
    save_file({"prompt_embeddings": values}, path)
    config = PromptTuningConfig(num_virtual_tokens=4, init="file", init_file=str(path))
    assert torch.equal(weight_of(config)[0], values.double())
    save_file({"a": values, "b": values + 1}, path)
    config = PromptTuningConfig(
        num_virtual_tokens=4, init="file", init_file=str(path), init_file_key="b"
    )
    assert torch.equal(weight_of(config)[0], (values + 1).double())


def test_bad_files(tmp_path):
    path = tmp_path / "prompt.safetensors"

    def make(**changes):
        return weight_of(
            PromptTuningConfig(num_virtual_tokens=4, init="file", init_file=str(path), **changes)
        )

    with pytest.raises(FileNotFoundError, match="init_file: there is no file"):
        make()
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"init_file: .* is not a safetensors file"):
        make()
    save_file({"a": torch.randn(4, H), "b": torch.randn(5, H)}, path)
    with pytest.raises(ValueError, match=r"init_file_key must be one of \['a', 'b'\].*got None"):
        make()
    with pytest.raises(ValueError, match=r"init_file: b must be floats of shape \[4, 64\].*5, 64"):
        make(init_file_key="b")
    save_file({"a": torch.full((4, H), float("nan"))}, path)
    with pytest.raises(ValueError, match="init_file: a has values that are not finite"):
        make()


def test_p_tuning_begins_at_random():
    config = PTuningConfig(num_virtual_tokens=300)
    weight, _ = weight_of(config)
    assert weight.shape == (300, H)
    assert weight.std().item() == pytest.approx(1, rel=0.02)


# --- prefixes ------------------------------------------------------------------------------------


def test_prefixes_at_random():
    for config in (
        PrefixTuningConfig(num_virtual_tokens=100, prefix_projection=False),
        PTuningV2Config(num_virtual_tokens=100),
    ):
        model, _ = prompted("llama", config)
        weight = encoder(model, site="self").weight
        assert weight.shape == (100, 2 * 2 * 2 * 16)
        assert weight.std().item() == pytest.approx(1, rel=0.02)


def test_the_mlp_has_the_papers_sizes():
    model, _ = prompted("llama", PrefixTuningConfig(num_virtual_tokens=7))
    found = encoder(model, site="self")
    shapes = [tuple(p.shape) for p in found.parameters()]
    assert shapes == [(7, H), (512, H), (512,), (128, 512), (128,)]


@pytest.mark.parametrize("projection", [False, True])
def test_zero_prefix(projection):
    """Keys and values of zero, with the MLP as without."""
    config = PrefixTuningConfig(
        num_virtual_tokens=3, init_weights="zero", prefix_projection=projection
    )
    model, _ = prompted("llama", config)
    assert torch.equal(encoder(model, site="self")(), torch.zeros(3, 128, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_words_make_the_model_see_them(family):
    """The prefix of a text is that text, read before the input: exactly."""
    ids = [5, 9, 2, 33]
    config = PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=False, init_weights="text", init_token_ids=ids
    )
    model, inputs = prompted(family, config)
    stock, _ = base(family)
    full = torch.cat((torch.tensor(ids).expand(2, -1), inputs["input_ids"]), 1)
    expected = logits(stock, {"input_ids": full})[:, 4:]
    assert_equal(logits(model, inputs), expected)
    assert (logits(stock, inputs) - expected).abs().max() > 1e-3


def test_words_of_an_encoder():
    """BERT's first layer sees the words' keys at its tokens' positions, worked out by hand."""
    ids = torch.tensor([5, 9, 2])
    config = PrefixTuningConfig(
        num_virtual_tokens=3,
        prefix_projection=False,
        init_weights="text",
        init_token_ids=ids.tolist(),
    )
    model, _ = prompted("bert", config)
    bert = base("bert")[0].bert
    attention = bert.encoder.layer[0].attention.self
    with torch.no_grad():
        embedded = bert.embeddings(input_ids=ids[None])[0]
        expected = torch.stack((attention.key(embedded), attention.value(embedded)), 1)
    got = encoder(model, site="self").weight.view(3, 2, 2, H)[:, 0]
    assert_equal(got.detach(), expected)


def test_words_of_t5_at_all_places():
    ids = torch.tensor([5, 9, 2])
    config = PrefixTuningConfig(
        num_virtual_tokens=3,
        prefix_projection=False,
        init_weights="text",
        init_token_ids=ids.tolist(),
    )
    model, _ = prompted("t5", config)
    stock, _ = base("t5")
    with torch.no_grad():
        out = stock(input_ids=ids[None], decoder_input_ids=ids[None], use_cache=True)
        block = stock.encoder.block[0].layer[0]
        normed = block.layer_norm(stock.shared(ids))
        first = torch.stack((block.SelfAttention.k(normed), block.SelfAttention.v(normed)), 1)
    cache = out.past_key_values
    for site, layers in (
        ("decoder", cache.self_attention_cache.layers),
        ("cross", cache.cross_attention_cache.layers),
    ):
        states = [s[0].transpose(0, 1) for each in layers for s in (each.keys, each.values)]
        expected = torch.stack(states, 1).reshape(3, -1)
        assert_equal(encoder(model, site=site).weight.detach(), expected)
    assert_equal(encoder(model, site="encoder").weight.detach().view(3, 2, 2, H)[:, 0], first)


def test_words_are_read_by_the_model_alone():
    """A second adapter's words do not see the first adapter, and what was in training is again."""
    ids = [5, 9, 2, 33]

    def config():
        return PrefixTuningConfig(
            num_virtual_tokens=4, prefix_projection=False, init_weights="text", init_token_ids=ids
        )

    model, _ = prompted("llama", PTuningV2Config(num_virtual_tokens=3), names=("first",))
    model.train()
    model.add_adapter("second", config())
    assert model.get_base_model().training
    alone, _ = prompted("llama", config())
    expected = encoder(alone, site="self").weight
    assert torch.equal(encoder(model, "second", "self").weight, expected)


def test_words_by_a_tokenizer(words):
    weights = []
    for given in (
        {"init_text": "w5 w9", "tokenizer_name_or_path": words},
        {"init_token_ids": [5, 9, 5]},
    ):
        config = PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=False, init_weights="text", **given
        )
        weights.append(encoder(prompted("llama", config)[0], site="self").weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (PromptTuningConfig, {"init": "random"}, "init must be one of"),
        (PromptTuningConfig, {"init_range": 0}, "init_range must be positive"),
        (PromptTuningConfig, {"init_vocab_size": 0}, "init_vocab_size must be a positive"),
        (PromptTuningConfig, {"init": "class_labels"}, "needs a list of class_labels"),
        (PromptTuningConfig, {"init": "class_labels", "class_labels": "ab"}, "needs a list"),
        (PromptTuningConfig, {"init": "class_labels", "class_labels": list("abcde")}, "5 labels"),
        (PromptTuningConfig, {"init": "class_labels", "class_labels": ["a"]}, "tokenizer_name"),
        (PromptTuningConfig, {"init": "text"}, "needs one of"),
        (PromptTuningConfig, {"init": "text", "init_text": "a"}, "needs tokenizer_name_or_path"),
        (PromptTuningConfig, {"init": "file"}, "needs init_file"),
        (PrefixTuningConfig, {"init_weights": "ones"}, "init_weights must be one of"),
        (PrefixTuningConfig, {"init_weights": "text"}, "needs prefix_projection=False"),
        (
            PrefixTuningConfig,
            {"init_weights": "text", "prefix_projection": False},
            r"needs one of \('init_text', 'init_token_ids'\)",
        ),
    ],
)
def test_configs_that_cannot_be(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind(num_virtual_tokens=4, **given)


@pytest.mark.parametrize("ids", [[97], [-1], []])
def test_tokens_that_the_model_does_not_have(ids):
    model, inputs = base("llama")
    expected = logits(model, inputs)
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    for config in (
        PromptTuningConfig(num_virtual_tokens=2, init="text", init_token_ids=ids),
        PrefixTuningConfig(
            num_virtual_tokens=2, prefix_projection=False, init_weights="text", init_token_ids=ids
        ),
    ):
        with pytest.raises(ValueError, match="init_token_ids"):
            prompt_models.get_peft_model(model, config)
        assert not hasattr(model, "prompt_layer")
        assert {n: p.requires_grad for n, p in model.named_parameters()} == state
        assert torch.equal(logits(model, inputs), expected)


def test_prompts_are_wide_where_the_model_is_narrow():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for config in (
            PromptTuningConfig(num_virtual_tokens=2),
            PTuningV2Config(num_virtual_tokens=2),
        ):
            model, _ = prompted("llama", config, dtype=dtype)
            assert {p.dtype for p in layer(model).parameters()} == {expected}
            assert geometry_of(model.get_base_model()).embedding.weight.dtype == dtype
