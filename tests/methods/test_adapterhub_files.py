"""AdapterHub's files: names, prefixes, old forms; what does not fit, and what is not exported."""

from pathlib import Path

import pytest
import torch
from adapterhub_folders import copied, edit, edit_weights, inputs_of, randomize, weights
from oracle_cases import FOLDER, base_model, result, tensors
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel

import fusetune.methods as methods
from fusetune.integrations import _adapterhub_keys as keys
from fusetune.integrations.adapterhub import load_adapterhub, save_adapterhub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
]


def test_under_another_name():
    stored = tensors("seq_bn_inv")
    model = load_adapterhub(base_model("bert_mlm"), FOLDER / "seq_bn_inv" / "a", "german")
    assert list(model.peft_config) == ["german"]
    assert model.active_adapter == "german"
    with torch.no_grad():
        got = result(model.eval()(**inputs_of(stored)))
    torch.testing.assert_close(got, stored["output.logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_trainable_as_in_peft(is_trainable):
    model = base_model("bert")
    for name in "ab":
        model = load_adapterhub(model, FOLDER / "stack" / name, is_trainable=is_trainable)
    assert model.active_adapter == "a"  # the second is not activated
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert bool(trained) == is_trainable
    assert all(".a." in name for name in trained)
    assert model.peft_config["b"].inference_mode != is_trainable


def test_a_bare_models_file_in_a_model_with_a_head_and_back():
    """The library accepts both; so must we."""
    bare = FOLDER / "bare_bert_seq_bn_inv" / "a"
    with_head = load_adapterhub(base_model("bert_mlm"), bare)
    parameters = dict(keys.parameters(with_head, with_head.get_base_model(), "a"))
    stored = weights(bare)
    assert set(parameters) == set(stored)
    assert all(torch.equal(parameters[key], value) for key, value in stored.items())
    headed = FOLDER / "seq_bn" / "a"
    model = load_adapterhub(base_model("bare_bert"), headed)
    parameters = dict(keys.parameters(model, model.get_base_model(), "a"))
    assert {f"bert.{key}" for key in parameters} == set(weights(headed))


def test_names_of_adapter_transformers_1(tmp_path):
    """Other keys, a nested invertible adapter, no version and "gelu" for its approximation."""
    folder = copied("seq_bn_inv", tmp_path)

    def old(header):
        config = header["config"]
        del header["version"], config["inv_adapter"], config["inv_adapter_reduction_factor"]
        config["invertible_adapter"] = {"block_type": "nice", "reduction_factor": 2}
        for key in [key for key in config if key.startswith("phm_") or key == "stochastic_depth"]:
            del config[key]
        config["non_linearity"] = "gelu"

    edit(folder, old)
    edit_weights(
        folder,
        lambda state: {
            key.replace("output.adapters.", "output.layer_text_lang_adapters.").replace(
                ".invertible_adapters.", ".invertible_lang_adapters."
            ): value
            for key, value in state.items()
        },
    )
    assert any("layer_text_lang_adapters" in key for key in weights(folder))
    model = load_adapterhub(base_model("bert_mlm"), folder)
    config = model.peft_config["a"]
    assert isinstance(config, methods.MadXConfig)
    assert config.activation == "gelu_new"
    assert config.inv_adapter_reduction_factor == 2
    parameters = dict(keys.parameters(model, model.get_base_model(), "a"))
    expected = weights(FOLDER / "seq_bn_inv" / "a")
    assert all(torch.equal(parameters[k.removeprefix("bert.")], v) for k, v in expected.items())
    edit(folder, lambda header: header["config"].update(non_linearity="gelu_orig"))
    assert load_adapterhub(base_model("bert_mlm"), folder).peft_config["a"].activation == "gelu"


def test_old_task_adapters_say_they_have_a_block_and_have_none(tmp_path):
    folder = copied("seq_bn", tmp_path)
    edit(
        folder,
        lambda header: header["config"].update(inv_adapter="nice", inv_adapter_reduction_factor=2),
    )
    with pytest.raises(
        ValueError, match=r"invertible_adapters\.a\.F\.0\.weight \[4, 8\] is missing"
    ):
        load_adapterhub(base_model("bert"), folder)
    edit(folder, lambda header: header.update(type="text_task"))
    config = load_adapterhub(base_model("bert"), folder).peft_config["a"]
    assert not isinstance(config, methods.MadXConfig)


@pytest.mark.parametrize(
    ("name", "case"),
    [("pfeiffer", "seq_bn"), ("houlsby", "double_seq_bn"), ("seq_bn", "seq_bn")],
)
def test_configs_by_name(name, case, tmp_path):
    """These have a reduction factor of 16, of which the oracle's files have the quarter."""
    folder = copied(case, tmp_path)
    edit(folder, lambda header: header.update(config=name))
    with pytest.raises(
        ValueError, match=r"adapter_down\.0\.weight has shape \[4, 16\], the model needs \[1, 16\]"
    ):
        load_adapterhub(base_model("bert"), folder)


def test_int_scaling_is_a_number(tmp_path):
    """adapters refuses 4 where it takes 4.0."""
    folder = copied("par_bn", tmp_path)
    edit(folder, lambda header: header["config"].update(scaling=4))
    model = load_adapterhub(base_model("bert"), folder)
    save_adapterhub(model, tmp_path / "again", "a")
    text = (tmp_path / "again" / "adapter_config.json").read_text()
    assert '"scaling": 4.0' in text


def test_unknown_keys_are_named_and_ignored(tmp_path):
    folder = copied("seq_bn", tmp_path)
    edit(folder, lambda header: header["config"].update(shade="blue"))
    with pytest.warns(UserWarning, match=r"keys without a meaning.*'shade'"):
        load_adapterhub(base_model("bert"), folder)


def test_a_head_beside_it_is_not_loaded_without_a_word(tmp_path):
    folder = copied("seq_bn", tmp_path)
    torch.save({}, folder / "pytorch_model_head.bin")
    with pytest.warns(UserWarning, match="prediction head"):
        load_adapterhub(base_model("bert"), folder)


# --- what does not fit ----------------------------------------------------------------------------

FIRST = "bert.encoder.layer.0.output.adapters.a.adapter_down.0.weight"
SHORT = FIRST.removeprefix("bert.")


def without(state):
    del state[FIRST]


def narrower(state):
    state[FIRST] = state[FIRST][:, :8].clone()


def another(state):
    state["bert.encoder.layer.7.output.adapters.a.adapter_up.bias"] = torch.zeros(16)


def not_a_number(state):
    state[FIRST][0, 0] = torch.nan


def whole_numbers(state):
    state[FIRST] = state[FIRST].long()


def sparse(state):
    state[FIRST] = state[FIRST].to_sparse()


def no_tensor(state):
    state[FIRST] = [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, rf"{SHORT} \[4, 16\] is missing"),
        (narrower, rf"{SHORT} has shape \[4, 8\], the model needs \[4, 16\]"),
        (another, r"encoder\.layer\.7\.output\S+ \[16\] has no place in the model"),
        (not_a_number, rf"{FIRST} \[4, 16\] has values that are not finite"),
        (whole_numbers, rf"{FIRST} must be a dense float tensor, got torch\.int64"),
        (sparse, rf"{FIRST} must be a dense float tensor"),
        (no_tensor, rf"{FIRST} must be a tensor, got list"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(change, message, first, tmp_path):
    folder = copied("seq_bn", tmp_path)
    edit_weights(folder, change)
    model = base_model("bert")
    if not first:
        model = load_adapterhub(model, FOLDER / "double_seq_bn" / "a", "other")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stored = tensors("double_seq_bn")
    output = result(model(**inputs_of(stored)))
    with pytest.raises(ValueError, match=message) as raised:
        load_adapterhub(model, folder)
    assert "pytorch_adapter.bin" in str(raised.value)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(result(model(**inputs_of(stored))), output)
    if first:
        assert not hasattr(model, "peft_config")
        load_adapterhub(model, FOLDER / "seq_bn" / "a")  # and a good file still fits
    else:
        assert list(model.peft_config) == ["other"]
        assert model.active_adapter == "other"


def test_a_file_that_does_not_fit_leaves_the_composition(tmp_path):
    folder = copied("seq_bn", tmp_path)
    edit_weights(folder, narrower)
    model = base_model("bert")
    for name in ("lang", "task"):
        model = load_adapterhub(model, FOLDER / "seq_bn" / "a", name, is_trainable=True)
    methods.compose(model, methods.Stack("lang", "task"), trainable=["task"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for _ in range(2):
        with pytest.raises(ValueError, match="has shape"):
            load_adapterhub(model, folder)
        assert repr(model.base_model.composition) == "Stack('lang', 'task')"
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    load_adapterhub(model, FOLDER / "seq_bn" / "a")
    assert repr(model.base_model.composition) == "Stack('lang', 'task')"
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_two_copies_of_one_tensor_must_agree(tmp_path):
    folder = copied("ln_before", tmp_path)
    key = "bert.encoder.layer.0.output.adapters.a.adapter_norm_before.weight"
    edit_weights(folder, lambda state: {**state, key: state[key] + 1})
    with pytest.raises(ValueError, match="are one tensor, but differ"):
        load_adapterhub(base_model("bert"), folder)


def test_code_in_a_pickle_is_not_run(tmp_path):
    folder = copied("seq_bn", tmp_path)

    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({FIRST: Bomb()}, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"pytorch_adapter\.bin cannot be read as tensors"):
        load_adapterhub(base_model("bert"), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].update(phm_layer=True), "phm_layer is not supported"),
        (
            lambda h: h["config"].update(inv_adapter="glow", inv_adapter_reduction_factor=2),
            "'glow' is not supported",
        ),
        (lambda h: h["config"].update(architecture="lora"), "architecture 'lora' is not supported"),
        (lambda h: h["config"].pop("non_linearity"), "the config has no 'non_linearity'"),
        (lambda h: h["config"].update(non_linearity="mish"), "non_linearity must be one of"),
        (
            lambda h: h["config"].update(inv_adapter="nice"),
            "inv_adapter_reduction_factor must be a number",
        ),
        (lambda h: h.update(config="compacter"), "config 'compacter' is not known"),
        (lambda h: h.pop("name"), "'name' must be a str, got None"),
        (lambda h: h.update(config=3), "'config' must be a dict or str, got 3"),
        (
            lambda h: h.update(model_type="roberta"),
            "for models of type 'roberta', the model is 'bert'",
        ),
        (lambda h: h.update(hidden_size=32), "for hidden_size 32, the model has 16"),
    ],
)
def test_a_config_that_is_not_supported_is_named(change, message, tmp_path):
    folder = copied("seq_bn", tmp_path)
    edit(folder, change)
    model = base_model("bert")
    with pytest.raises(ValueError, match=message) as raised:
        load_adapterhub(model, folder)
    assert str(folder) in str(raised.value)
    assert not hasattr(model, "peft_config")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither adapter_config\.json nor adapter_fusion"):
        load_adapterhub(base_model("bert"), tmp_path)
    folder = copied("seq_bn", tmp_path)
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither adapter\.safetensors nor pytorch_adapter"
    ):
        load_adapterhub(base_model("bert"), folder)
    (folder / "adapter.safetensors").write_bytes(b"12345678 no")
    with pytest.raises(ValueError, match=r"adapter\.safetensors is not a safetensors file"):
        load_adapterhub(base_model("bert"), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        load_adapterhub(base_model("bert"), folder)


def test_a_folder_of_peft_is_told_apart(tmp_path):
    model = get_peft_model(base_model("bert"), methods.BottleneckConfig.pfeiffer(), "a")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is PEFT's: use PeftModel\.from_pretrained"):
        load_adapterhub(base_model("bert"), tmp_path / "a")


def test_names_that_cannot_be():
    model = load_adapterhub(base_model("bert"), FOLDER / "fusion_dynamic" / "a")
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        load_adapterhub(model, FOLDER / "seq_bn" / "a")
    with pytest.raises(ValueError, match=r"'x\.y' cannot be a name"):
        load_adapterhub(model, FOLDER / "seq_bn" / "a", "x.y")
    with pytest.raises(ValueError, match=r"the model has no adapters \['b'\]"):
        load_adapterhub(model, FOLDER / "fusion_dynamic" / "fusion")
    assert list(model.peft_config) == ["a"]


def test_models_without_a_layout_are_refused():
    with pytest.raises(TypeError, match="must be a transformers model"):
        load_adapterhub(torch.nn.Linear(2, 2), FOLDER / "seq_bn" / "a")
    model = base_model("bert")
    model.config.model_type = "electric"
    with pytest.raises(ValueError, match="no AdapterHub layout for model_type 'electric'"):
        load_adapterhub(model, FOLDER / "seq_bn" / "a")


# --- what cannot be exported ----------------------------------------------------------------------


def tiny(config, name="x", **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertModel(BertConfig(**sizes, intermediate_size=24, vocab_size=60, **changes))
    return get_peft_model(base, config, name)


def test_glow_is_not_exported(tmp_path):
    model = tiny(methods.MadXConfig(inv_adapter="glow"))
    with pytest.raises(ValueError, match="'glow' cannot be exported"):
        save_adapterhub(model, tmp_path / "x", "x")
    assert not (tmp_path / "x").exists()


def test_trained_layer_norms_are_not_exported(tmp_path):
    model = tiny(methods.BottleneckConfig.houlsby())
    with pytest.raises(ValueError, match="LayerNorms are trained"):
        save_adapterhub(model, tmp_path, "x")


def test_blocks_of_gemma_are_refused_both_ways(tmp_path):
    """adapters has them on unscaled embeddings; ours is after Gemma's scaling."""
    model = get_peft_model(base_model("gemma2"), methods.MadXConfig(), "x")
    with pytest.raises(ValueError, match="before the embeddings are scaled"):
        save_adapterhub(model, tmp_path / "x", "x")
    folder = copied("qwen3_inv", tmp_path)
    edit(folder, lambda header: header.update(model_type="gemma2"))
    with pytest.raises(ValueError, match="before the embeddings are scaled"):
        load_adapterhub(base_model("gemma2"), folder)


def test_norms_of_gemma_are_warned_of(tmp_path):
    """adapters takes the last layer's norm in all layers, by a late-bound name."""
    model = get_peft_model(base_model("gemma2"), methods.BottleneckConfig.pfeiffer(), "x")
    with pytest.warns(UserWarning, match="uses the last layer's norm"):
        save_adapterhub(model, tmp_path / "x", "x")
    with pytest.warns(UserWarning, match="uses the last layer's norm"):
        load_adapterhub(base_model("gemma2"), tmp_path / "x")


def test_temperatures_are_exported_in_the_query(tmp_path):
    for fusion in ({"temperature": 2.5}, {"temperature": 2.5, "query": False}):
        model = base_model("bert")
        for name in "ab":
            model = load_adapterhub(model, FOLDER / "fusion_dynamic" / name)
        model.add_adapter("a,b", methods.AdapterFusionConfig(adapters=["a", "b"], **fusion))
        randomize(model)
        methods.compose(model, methods.Fuse("a", "b"))
        arguments = inputs_of(tensors("fusion_dynamic"))
        folder = tmp_path / str(len(fusion))
        for name in ("a", "b", "a,b"):
            save_adapterhub(model, folder / name, name)
        again = base_model("bert")
        for name in ("a", "b", "a,b"):
            again = load_adapterhub(again, folder / name)
        assert again.peft_config["a,b"].temperature is False
        methods.compose(again, methods.Fuse("a", "b"))
        with torch.no_grad():
            expected, got = (result(m.eval()(**arguments)) for m in (model, again))
        torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)
    model = base_model("bert")
    for name in "ab":
        model = load_adapterhub(model, FOLDER / "fusion_dynamic" / name)
    config = methods.AdapterFusionConfig(
        adapters=["a", "b"], temperature=2.0, query=False, key=False
    )
    model.add_adapter("a,b", config)
    with pytest.raises(ValueError, match="temperature 2 cannot be expressed"):
        save_adapterhub(model, tmp_path / "none", "a,b")


def test_bad_arguments_of_save(tmp_path):
    model = tiny(methods.BottleneckConfig.pfeiffer())
    with pytest.raises(ValueError, match=r"no adapter 'y', only \['x'\]"):
        save_adapterhub(model, tmp_path, "y")
    with pytest.raises(TypeError, match="model must be a PeftModel"):
        save_adapterhub(model.get_base_model(), tmp_path, "x")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_adapterhub(model, tmp_path / "file", "x")


def test_16_bit_models_take_and_give_32_bit_checkpoints(tmp_path):
    model = load_adapterhub(base_model("bert", torch.bfloat16), FOLDER / "seq_bn" / "a")
    assert isinstance(model, PeftModel)
    save_adapterhub(model, tmp_path, "a")
    expected, got = weights(FOLDER / "seq_bn" / "a"), weights(tmp_path)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
