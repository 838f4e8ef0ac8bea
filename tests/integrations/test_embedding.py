"""LoRA on token embeddings, fused: equal to PEFT's, stock where it cannot be."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

import fusetune
from fusetune.integrations.peft_embedding import FusedEmbedding

LAYER = "base_model.model.model.embed_tokens"
NAME = "default"


def pair(dtype=torch.float32, layers=1, **options):
    options = {"target_modules": ["embed_tokens", "q_proj"], **options}
    stock, inputs = tiny_models.lora_llama(layers=layers, dtype=dtype, **options)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    return stock, fused, inputs


def layer(model):
    return model.get_submodule(LAYER)


def reason(model):
    return {row.module: row.reason for row in fusetune.fuse(model).rows}[LAYER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.0, "r": 3}, {"use_rslora": True}])
def test_loss_and_gradients_are_pefts(dtype, options, calls):
    stock, fused, inputs = pair(dtype, **options)
    assert fusetune.fuse(fused).stock == []
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert calls.count("lora_embedding") == 1


def test_adapters_in_the_tables_dtype(calls):
    stock, fused, inputs = pair(torch.bfloat16)
    for model in (stock, fused):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert calls.count("lora_embedding") == 1


def test_padding_token_gets_no_gradient(calls):
    stock, fused, inputs = pair()
    inputs["input_ids"][:, 3] = 5
    grads = []
    for model in (stock, fused):
        layer(model).base_layer.padding_idx = 5
        grads.append(step(model, inputs))
    assert_near(grads[1], grads[0], step(float64_copy(stock), inputs))
    [gradient] = [value for name, value in grads[1].items() if "lora_embedding_A" in name]
    assert not gradient[:, 5].any()
    assert gradient.any()
    assert calls.count("lora_embedding") == 1


def test_peft_applies_no_dropout_to_embeddings_and_neither_do_we(calls):
    stock, fused, _ = pair(lora_dropout=0.5)
    ids = torch.arange(40)
    assert layer(stock).lora_dropout[NAME].training
    torch.testing.assert_close(layer(fused)(ids), layer(stock)(ids))
    assert calls == ["lora_embedding"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings(dtype, calls):
    """Gemma multiplies what it looks up; PEFT multiplies the adapter by the same number."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    model = nn.Sequential(Gemma3TextScaledWordEmbedding(50, 32, 0, embed_scale=32**0.5)).to(dtype)
    stock = tiny_models.with_lora(model, target_modules=["0"])
    fused, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    rounded = torch.tensor(32**0.5).to(dtype)  # the scale as the model uses it
    exact.base_model.model[0].base_layer.embed_scale = rounded.double()
    assert fusetune.fuse(fused).stock == []
    ids, results = torch.arange(49).view(7, 7), []
    for each in (fused, stock, exact):
        y = each(ids)
        y.square().sum().backward()
        named = each.named_parameters()
        results.append({n: p.grad for n, p in named if p.requires_grad} | {"y": y.detach()})
    assert_near(*results)
    assert calls == ["lora_embedding"]


def test_other_embeddings_are_left_to_peft(calls):
    class Positional(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 2)

    torch.manual_seed(0)
    stock = tiny_models.with_lora(nn.Sequential(Positional(50, 8)), target_modules=["0"])
    fused = copy.deepcopy(stock)
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "base_layer is a Positional, not a plain Embedding"
    assert torch.equal(fused(torch.arange(40)), stock(torch.arange(40)))
    assert calls == []


# --- guards ---------------------------------------------------------------------------------------


def hook_on_base(model):
    layer(model).base_layer.register_forward_hook(lambda module, args, output: output * 2)


def own_forward_of_base(model):
    base = layer(model).base_layer
    base.forward = lambda ids: nn.functional.embedding(ids, base.weight) + 1


def max_norm(model):
    layer(model).base_layer.max_norm = 0.5


def scale_grad_by_freq(model):
    layer(model).base_layer.scale_grad_by_freq = True


def trained_base(model):
    layer(model).base_layer.weight.requires_grad_(True)


def partitioned(model):
    layer(model).base_layer.weight.ds_id = 1


def float64_adapter(model):
    for parameter in (layer(model).lora_embedding_A, layer(model).lora_embedding_B):
        parameter[NAME].data = parameter[NAME].data.double()


def tensor_parallel(model):
    layer(model).input_fns[NAME] = lambda inputs: inputs[0].flip(0)


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


def two_active_adapters(model):
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter("second", config)
    model.base_model.set_adapter([NAME, "second"])


def dora(model):
    config = LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    torch.manual_seed(1)
    model.add_adapter("second", config)
    model.set_adapter("second")


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (hook_on_base, "base_layer has hooks"),
        (own_forward_of_base, "base_layer has a forward of its own"),
        (max_norm, "max_norm"),
        (scale_grad_by_freq, "scale_grad_by_freq or sparse"),
        (trained_base, "the base weight is trained"),
        (partitioned, "partitioned by DeepSpeed"),
        (float64_adapter, "lora_embedding_A is torch.float64"),
        (tensor_parallel, "tensor parallelism"),
        (disabled, "adapters are disabled"),
        (merged, "the adapter is merged"),
        (two_active_adapters, "2 active adapters"),
        (dora, "DoraEmbeddingVariant is not fused"),
    ],
)
def test_what_is_left_to_peft(tamper, why, calls):
    stock, fused, _ = pair()
    tamper(stock)
    tamper(fused)
    ids = torch.arange(40)
    assert torch.equal(layer(fused)(ids), layer(stock)(ids))
    assert calls == []
    assert why in reason(fused)


def test_mixed_batch_and_transforms(calls):
    stock, fused, _ = pair()
    ids = torch.arange(6).view(3, 2)
    names = {"adapter_names": [NAME, "__base__", NAME]}
    assert torch.equal(layer(fused)(ids, **names), layer(stock)(ids, **names))
    torch.testing.assert_close(torch.vmap(layer(fused))(ids), layer(stock)(ids))
    assert calls == []


# --- what PEFT and torch do with the layer --------------------------------------------------------


def test_lifecycle(tmp_path, calls):
    stock, fused, inputs = pair()
    ids = {"input_ids": inputs["input_ids"]}
    assert type(layer(fused)) is FusedEmbedding
    assert list(fused.state_dict()) == list(stock.state_dict())
    expected = stock(**ids).logits
    with fused.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(fused(**ids).logits, stock(**ids).logits)
    fused.merge_adapter()
    torch.testing.assert_close(fused(**ids).logits, expected)
    fused.unmerge_adapter()
    calls.clear()
    for each in (fused, copy.deepcopy(fused)):
        torch.testing.assert_close(each(**ids).logits, expected)
    assert calls.count("lora_embedding") == 2
    plain = fused.merge_and_unload()
    assert type(plain.model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(plain(**ids).logits, expected)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    fusetune.unfuse(fused)
    assert type(layer(fused)) is lora.Embedding


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    plain, fused, inputs = pair(layers=2)
    options = {"use_reentrant": reentrant}
    for model in (plain, fused):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
        model.train()
    assert_near(step(fused, inputs), step(plain, inputs), step(float64_copy(plain), inputs))
    assert calls.count("lora_embedding") == 1


def test_autocast(calls):
    stock, fused, inputs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = step(fused, inputs), step(stock, inputs)
        ids = torch.arange(5)
        assert layer(fused)(ids).dtype == layer(stock)(ids).dtype == torch.float32
    assert_near(got, eager, step(float64_copy(stock), inputs))
    assert calls.count("lora_embedding") == 2


def test_compiled(fresh_compiler, calls):
    _, fused, _ = pair()
    ids = torch.arange(12)
    expected = layer(fused)(ids)
    compiled = torch.compile(layer(fused), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), expected)
