"""The table of architectures against the models' own forwards: what it says of h, r and LN."""

import itertools

import pytest
import torch
from adapter_models import randomise
from peft import get_peft_model
from tolerance import assert_same
from transformers import AutoConfig, AutoModel

from fusetune.methods import BottleneckConfig
from fusetune.methods.bottleneck.architectures import ARCHITECTURES
from fusetune.methods.bottleneck.layer import BottleneckLayer

IDS = torch.arange(1, 13).view(2, 6)
_DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
_BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "is_decoder": True,
    "add_cross_attention": True,
}
_CROSS = {
    "encoder_hidden_states": torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
}
# model_type: (config, more inputs)
MODELS = {
    "bert": (_BERT, _CROSS),
    "roberta": (_BERT, _CROSS),
    "distilbert": (
        {"vocab_size": 40, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        {},
    ),
    "gpt2": (
        {
            "vocab_size": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "add_cross_attention": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        _CROSS,
    ),
    "t5": (
        {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        {"decoder_input_ids": IDS},
    ),
    "vit": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        None,
    ),
    **{
        name: (_DECODER, {})
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
    },
}


def test_all_are_tested():
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_table_says_what_the_model_computes(model_type):
    """What a sub-layer gives, by the table, is the residual input of the next one in the model."""
    options, inputs = MODELS[model_type]
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    for parameter in base.parameters():  # RMSNorms at one, or zero, would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    cross = any(layers.cross is not None for layers in ARCHITECTURES[model_type].layers)
    config = BottleneckConfig.parallel(
        mh_adapter=True, cross_adapter=cross, reduction_factor=8, scaling=0.5
    )
    model = randomise(get_peft_model(base, config)).eval()
    seen = {}
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer):
            layer.register_forward_pre_hook(lambda layer, _: seen.update({layer: [layer._stream]}))
            layer.register_forward_hook(lambda layer, args, output: seen[layer].append(output))
    with torch.no_grad():
        if inputs is None:
            model(pixel_values=torch.randn(2, 3, 8, 8))
        else:
            model(input_ids=IDS, **inputs)
    assert len(seen) == sum(isinstance(m, BottleneckLayer) for m in model.modules())
    compared = 0
    for (layer, (stream, given)), (after, (next_stream, _)) in itertools.pairwise(seen.items()):
        location = layer.place.location
        assert stream.shape == given.shape
        if layer.place.layer_key.rpartition(".")[0] != after.place.layer_key.rpartition(".")[0]:
            continue  # from the encoder to the decoder
        norm = layer._apply_norm
        with torch.no_grad():
            if location.norm is None:
                expected = given + stream
            elif location.norm_on_branch:
                expected = stream + norm(given)
            else:
                expected = norm(given + stream)
        assert_same(next_stream, expected, layer.place.key)
        compared += 1
    assert compared == len(seen) - len(ARCHITECTURES[model_type].layers)


@pytest.mark.parametrize("model_type", MODELS)
def test_sub_layers_that_end_with_the_adapter(model_type):
    """With original_ln_after=False the next sub-layer's residual input is the adapter's result."""
    options, inputs = MODELS[model_type]
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    config = BottleneckConfig(
        original_ln_before=True,
        original_ln_after=False,
        residual_before_ln=False,
        reduction_factor=8,
        cross_adapter=any(layers.cross for layers in ARCHITECTURES[model_type].layers),
    )
    model = randomise(get_peft_model(base, config)).eval()
    seen = {}
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer):
            layer.register_forward_pre_hook(lambda layer, _: seen.update({layer: [layer._stream]}))
            layer.bn_adapters["default"].register_forward_hook(
                lambda _, args, output, layer=layer: seen[layer].append(output)
            )
    with torch.no_grad():
        if inputs is None:
            model(pixel_values=torch.randn(2, 3, 8, 8))
        else:
            model(input_ids=IDS, **inputs)
    pairs = itertools.pairwise(seen.items())
    for (layer, (_, result)), (after, (next_stream, _)) in pairs:
        if layer.place.layer_key.rpartition(".")[0] == after.place.layer_key.rpartition(".")[0]:
            assert_same(next_stream, result, layer.place.key)
