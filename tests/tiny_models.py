"""Models of a few thousand parameters, from configs: no download, milliseconds a step."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

VOCABULARY = 97


def llama(layers=2, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config), token_inputs()


def bert(**options):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options},
    )
    return BertForMaskedLM(config), token_inputs()


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options},
    )
    return GPT2LMHeadModel(config), token_inputs()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), token_inputs()


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=5,
    )
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 3])}
    return ViTForImageClassification(config), inputs


def token_inputs(batch=2, length=12):
    ids = torch.randint(1, VOCABULARY, (batch, length))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def quantize(model, *, skip=("lm_head", "classifier", "wo"), **options):
    """Replaces linear layers of a model by bitsandbytes' 4-bit ones, as transformers does.

    `wo`: T5 casts its input to the weight's dtype, so transformers keeps it in fp32.
    """
    import bitsandbytes as bnb

    options = {"quant_type": "nf4", "compress_statistics": True, **options}
    compute_dtype = options.pop("compute_dtype", torch.float32)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.split(".")[-1] in skip:
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=compute_dtype,
            **options,
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data.clone(), requires_grad=False, module=layer, **options
        )
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.data.clone(), requires_grad=False)
        model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def with_lora(model, **options):
    """The model wrapped by PEFT, with a lora_B that is not zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    options.setdefault("init_lora_weights", False)
    return get_peft_model(model, LoraConfig(**options))


def lora_llama(*, four_bit=False, layers=2, dtype=torch.float32, seed=0, **options):
    """(a LLaMA with LoRA on all linear layers, inputs); the same for the same arguments."""
    torch.manual_seed(seed)
    model, inputs = llama(layers)
    model = model.to(dtype)
    if four_bit:
        quantize(model)
    return with_lora(model, **options), inputs


def loss_and_grads(model, inputs):
    """(loss, logits, {name: gradient of a trained parameter}) of one step."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits.detach(), grads
