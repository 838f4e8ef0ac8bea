"""Checkpoints of PEFT's own prefix tuning, prompt tuning and p-tuning: read, written, refused."""

import json

import peft
import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from prompt_models import TASKS, assert_equal, base, encoder, layer, logits, prompted
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from fusetune import load_peft_prompts, save_peft_prompts
from fusetune.methods import PrefixTuningConfig, PromptTuningConfig, PTuningConfig, PTuningV2Config

P = 5
THEIRS = {
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=P),
    "prefix with MLP": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=P),
    "p-tuning, MLP": lambda: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=16),
    "p-tuning, LSTM": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=P, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
}
OURS = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=P, encoder_hidden_size=16),
    "p-tuning v2": lambda: PTuningV2Config(num_virtual_tokens=P),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=P),
    "p-tuning": lambda: PTuningConfig(num_virtual_tokens=P),
}
# A network is evaluated in fp32 or wider before it is dropped.
LOOSE = {"atol": 1e-5, "rtol": 0}


def saved_by_peft(folder, family="llama", kind="prompt"):
    """What stock PEFT computes of the checkpoint that it has put into the folder; the inputs."""
    model, inputs = base(family)
    config = THEIRS[kind]()
    config.task_type = TASKS[family]
    torch.manual_seed(3)
    get_peft_model(model, config).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(family)[0], folder)
    loaded.prompt_encoder.double()
    return logits(loaded.eval(), inputs), inputs


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_loads_what_peft_saved(family, kind, tmp_path):
    expected, inputs = saved_by_peft(tmp_path, family, kind)
    model = load_peft_prompts(base(family)[0], tmp_path)
    assert model.active_adapter == "default"
    assert type(model).__name__.startswith("PeftModelFor")
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert_equal(logits(model, inputs), expected)
    trained = load_peft_prompts(base(family)[0], tmp_path, "again", is_trainable=True)
    names = [n for n, p in trained.named_parameters() if p.requires_grad]
    site = {"t5": ".decoder"}.get(family, ".self") if kind.startswith("prefix") else ""
    assert [n.split("prompt_encoders.")[1] for n in names] == [f"again{site}.weight"]
    trained(**inputs).loss.backward()
    assert next(p for p in trained.parameters() if p.requires_grad).grad.any()


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_peft_loads_what_we_saved(family, kind, tmp_path):
    model, inputs = prompted(family, OURS[kind])
    if family == "bert":
        model.peft_config["default"].task_type = TaskType.FEATURE_EXTRACTION
    expected = logits(model, inputs)
    save_peft_prompts(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    stock = PeftModel.from_pretrained(base(family)[0], tmp_path).eval()
    stock.prompt_encoder.double()
    if family == "bert":
        inputs = {"input_ids": inputs["input_ids"]}
    torch.testing.assert_close(logits(stock, inputs), expected, **LOOSE)
    again = load_peft_prompts(base(family)[0], tmp_path)
    torch.testing.assert_close(logits(again, inputs), expected, **LOOSE)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p-tuning, MLP"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_back_and_forth(family, kind, tmp_path):
    """PEFT's file, through our model, is the same file."""
    expected, inputs = saved_by_peft(tmp_path / "theirs", family, kind)
    model = load_peft_prompts(base(family)[0], tmp_path / "theirs")
    save_peft_prompts(model, tmp_path / "ours")
    stock = PeftModel.from_pretrained(base(family)[0], tmp_path / "ours").eval()
    stock.prompt_encoder.double()
    assert_equal(logits(stock, inputs), expected)
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"]
        for name in ("theirs", "ours")
    )
    if family == "llama":
        assert torch.equal(theirs, ours.float())


def test_t5_with_an_odd_number_of_layers(tmp_path):
    """Where PEFT's order of parts gives each layer its own."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    stock = T5(config).double().eval()
    ids = torch.randint(1, 97, (2, 6))
    only = {"encoder": False, "cross": False, "prefix_projection": False}
    model = get_peft_model(
        stock, PrefixTuningConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM", **only)
    ).eval()
    expected = logits(model, {"input_ids": ids, "labels": ids})
    save_peft_prompts(model, tmp_path)
    other = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    other.prompt_encoder.double()
    torch.testing.assert_close(logits(other, {"input_ids": ids, "labels": ids}), expected, **LOOSE)


def test_what_peft_cannot_express(tmp_path):
    model, _ = prompted("llama", PTuningConfig(template=[2, "{0}", 1]))
    with pytest.raises(ValueError, match=r"adapter_name: PEFT has no templates"):
        save_peft_prompts(model, tmp_path / "no")
    model, _ = prompted("t5", OURS["p-tuning v2"])
    with pytest.raises(ValueError, match=r"for \['cross', 'decoder', 'encoder'\]"):
        save_peft_prompts(model, tmp_path / "no")
    only = {"encoder": False, "cross": False}
    model, _ = prompted("t5", PTuningV2Config(num_virtual_tokens=P, **only))
    with pytest.raises(ValueError, match=r"layers i and i \+ 1 one prefix; this adapter's differ"):
        save_peft_prompts(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match="adapter_name: no adapter 'x', only"):
        save_peft_prompts(model, tmp_path / "no", "x")
    with pytest.raises(TypeError, match="model must be a PeftModel, got T5"):
        save_peft_prompts(model.get_base_model(), tmp_path / "no")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"directory: .* is a file"):
        save_peft_prompts(model, tmp_path / "file")


def test_one_more_adapter(tmp_path):
    """Into a model that has some of ours: added, not activated."""
    expected, inputs = saved_by_peft(tmp_path)
    model, _ = prompted("llama", OURS["p-tuning v2"])
    before = logits(model, inputs)
    assert load_peft_prompts(model, tmp_path, "theirs") is model
    assert torch.equal(logits(model, inputs), before)
    model.set_adapter("theirs")
    assert_equal(logits(model, inputs), expected)
    with pytest.raises(ValueError, match="adapter_name: the model has an adapter 'theirs' already"):
        load_peft_prompts(model, tmp_path, "theirs")


def test_a_head_comes_with_it(tmp_path):
    def make():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        return BertForSequenceClassification(config).double().eval()

    theirs = get_peft_model(
        make(), peft.PromptTuningConfig(num_virtual_tokens=P, task_type="SEQ_CLS")
    )
    with torch.no_grad():
        theirs.base_model.classifier.modules_to_save["default"].weight.normal_()
    theirs.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.randint(1, 97, (2, 9))}
    other = PeftModel.from_pretrained(make(), tmp_path).eval()
    other.prompt_encoder.double()
    expected = logits(other, inputs)
    model = load_peft_prompts(make(), tmp_path)
    assert_equal(logits(model, inputs), expected)
    save_peft_prompts(model, tmp_path / "ours")
    back = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    back.prompt_encoder.double()
    assert_equal(logits(back, inputs), expected)
    # Without the head's tensors, or with others, nothing is loaded.
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.classifier.weight"
    assert key in good
    for change, message in (
        ({key: None}, rf"{key} \[2, 64\] is missing"),
        ({key: torch.zeros(3, 64)}, rf"{key} has shape \[3, 64\], the model needs \[2, 64\]"),
        ({"odd": torch.zeros(2)}, r"odd \[2\] has no place in the model"),
    ):
        tensors = {k: v for k, v in {**good, **change}.items() if v is not None}
        save_file(tensors, path)
        stock = make()
        expected = logits(stock, inputs)
        with pytest.raises(ValueError, match=message):
            load_peft_prompts(stock, path.parent)
        assert not hasattr(stock, "prompt_layer")
        assert torch.equal(logits(stock, inputs), expected)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    header = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in header.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type must be one of .* got 'LORA'"),
        ({"peft_type": "PROMPTS"}, "is fusetune's own: use PeftModel.from_pretrained"),
        ({"peft_type": None}, "peft_type must be one of .* got None"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens must be a positive integer, got '5'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, got 0"),
        ({"num_virtual_tokens": 6}, r"shape \[5, 64\], the model needs \[6, 64\]"),
        ({"peft_type": "PREFIX_TUNING"}, r"shape \[5, 64\], the model needs \[5, 128\]"),
        ({"modules_to_save": [3]}, "modules_to_save must be names of modules"),
        ({"task_type": "WRITING"}, "Invalid task type"),
    ],
)
def test_bad_configs(changes, message, tmp_path):
    saved_by_peft(tmp_path)
    edit(tmp_path, **changes)
    unharmed(tmp_path, message)


def unharmed(folder, message, error=ValueError):
    """Loading raises, and first and further adapters leave the model as it was."""
    stock, inputs = base("llama")
    expected = logits(stock, inputs)
    with pytest.raises(error, match=message):
        load_peft_prompts(stock, folder)
    assert not hasattr(stock, "prompt_layer")
    assert all(p.requires_grad for p in stock.parameters())
    assert torch.equal(logits(stock, inputs), expected)
    model, _ = prompted("llama", OURS["prefix"])
    expected = logits(model, inputs)
    with pytest.raises(error, match=message):
        load_peft_prompts(model, folder, "other")
    assert list(model.peft_config) == ["default"]
    assert list(layer(model).prompt_encoders) == ["default"]
    assert encoder(model, site="self").weight.requires_grad
    assert torch.equal(logits(model, inputs), expected)


def test_bad_tensors(tmp_path):
    saved_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)["prompt_embeddings"]
    for tensors, message in (
        ({"prompt": good}, r"has no prompt_embeddings, only \['prompt'\]"),
        ({"prompt_embeddings": good[:, :60]}, r"shape \[5, 60\], the model needs \[5, 64\]"),
        ({"prompt_embeddings": good[0]}, r"shape \[64\], the model needs \[5, 64\]"),
        ({"prompt_embeddings": good.long()}, "must be a dense float tensor"),
        ({"prompt_embeddings": good / 0}, "not finite"),
        ({"prompt_embeddings": good, "x": good.clone()}, r"x \[5, 64\] has no place in the model"),
    ):
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        unharmed(tmp_path, message)
    path.write_bytes(b"nothing")
    unharmed(tmp_path, "is not a safetensors file")
    path.unlink()
    unharmed(tmp_path, "has neither", FileNotFoundError)
    (tmp_path / "adapter_model.bin").write_bytes(b"nothing")
    unharmed(tmp_path, "cannot be read as tensors")
    torch.save({"prompt_embeddings": good}, tmp_path / "adapter_model.bin")
    model = load_peft_prompts(base("llama")[0], tmp_path)
    assert torch.equal(encoder(model).weight, good.double())
    (tmp_path / "adapter_config.json").write_text("[")
    unharmed(tmp_path, "is not JSON")
    (tmp_path / "adapter_config.json").write_text("[]")
    unharmed(tmp_path, "must hold an object, got list")
    (tmp_path / "adapter_config.json").unlink()
    unharmed(tmp_path, "directory: there is no", FileNotFoundError)


def test_models_that_cannot_have_it(tmp_path):
    saved_by_peft(tmp_path)
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        load_peft_prompts(torch.nn.Linear(2, 2), tmp_path)
    lora = get_peft_model(base("llama")[0], peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"model has adapters of PEFT's type .*LORA"):
        load_peft_prompts(lora, tmp_path, "more")
    with pytest.raises(ValueError, match=r"adapter_name: 'a\.b' cannot name a module"):
        load_peft_prompts(base("llama")[0], tmp_path, "a.b")
