"""The oracle's tiny base models, as (transformers class, adapters class, config), and weights.

Plain data where possible: ``cases.json`` repeats it, so that tests rebuild the same models with the
transformers they run on.
"""

import adapters
import torch
import transformers

SEED = 20261124
BATCH, LENGTH, SOURCE_LENGTH = 3, 7, 5
VOCABULARY, HIDDEN, INNER = 60, 16, 24

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
}
MODELS = {
    "bert": ("BertModel", "BertAdapterModel", _ENCODER),
    "bert_mlm": ("BertForMaskedLM", "BertAdapterModel", _ENCODER),
    "roberta": ("RobertaModel", "RobertaAdapterModel", {**_ENCODER, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertAdapterModel",
        {
            "vocab_size": VOCABULARY,
            "dim": HIDDEN,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": INNER,
            "max_position_embeddings": 16,
        },
    ),
    "vit": (
        "ViTModel",
        "ViTAdapterModel",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": INNER,
            "image_size": 8,
            "patch_size": 4,
        },
    ),
    "gpt2": (
        "GPT2Model",
        "GPT2AdapterModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 16,
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": INNER,
        },
    ),
    "llama": (
        "LlamaModel",
        "LlamaAdapterModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "use_cache": False,
        },
    ),
    "mistral": (
        "MistralModel",
        "MistralAdapterModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 16,
            "use_cache": False,
        },
    ),
    # No adapters class: adapters' plug-in interface hooks the projections.
    "qwen3": (
        "Qwen3ForCausalLM",
        None,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 16,
            "use_cache": False,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        None,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 16,
            "use_cache": False,
        },
    ),
    # Saved from a bare model: the checkpoint keys have no prefix.
    "bare_bert": ("BertModel", None, _ENCODER),
    "t5": (
        "T5Model",
        "T5AdapterModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": INNER,
            "num_layers": 2,
            "num_heads": 2,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
    ),
}


def base_model(name):
    """The transformers model, eval and eager, with weights so large that every part matters."""
    class_name, _, options = MODELS[name]
    cls = getattr(transformers, class_name)
    model = cls._from_config(cls.config_class(**options), attn_implementation="eager").eval()
    randomize(model.named_parameters(), seed=SEED)
    return model


def adapter_model(name, base):
    """The adapters model around the weights of ``base``: (model, base model inside it)."""
    _, class_name, _ = MODELS[name]
    if class_name is None:
        adapters.init(base)
        return base, base
    model = getattr(adapters, class_name)(base.config).eval()
    inner = getattr(model, model.base_model_prefix)
    if name == "bert_mlm":
        return _with_head(model, inner, base), model
    _load(inner, base)
    return model, inner


def _load(inner, base):
    """Copies the weights; adapters' own modules and a pooler have none in ``base``."""
    missing, unexpected = inner.load_state_dict(base.state_dict(), strict=False)
    missing = [key for key in missing if not key.startswith(("prompt_tuning.", "pooler."))]
    if missing or unexpected:
        raise RuntimeError(f"weights of {type(base).__name__}: {missing}, {unexpected}")


def _with_head(model, inner, base):
    """adapters' own masked LM head with the weights of transformers' one."""
    _load(inner, base.bert)
    model.add_masked_lm_head("head", activation_function="gelu")
    head, source = model.heads["head"], base.cls.predictions
    for target, module in ((0, source.transform.dense), (2, source.transform.LayerNorm)):
        head[target].load_state_dict(module.state_dict())
    head[3].load_state_dict(source.decoder.state_dict())
    model.active_head = "head"
    return model


def randomize(parameters, seed):
    """Linear and embedding weights of unit gain, norms near one, everything else far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                gain = 0.4 if ".adapter_fusion_layer." in name else 1.0
                fan_in = (
                    4 if "embed" in name or "wte" in name or "wpe" in name else noise[0].numel()
                )
                parameter.copy_(gain * noise / fan_in**0.5)
            elif name.endswith("weight") or name.endswith("scaling"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)


def inputs(name):
    """Fixed inputs; the second row of token models is padded."""
    generator = torch.Generator().manual_seed(SEED + 1)
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if name != "t5":
        return {"input_ids": ids, "attention_mask": mask}
    target = torch.randint(3, VOCABULARY, (BATCH, SOURCE_LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
