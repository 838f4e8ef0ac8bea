"""Tiny models with PEFT's prefix tuning, one of each kind of attention, positions and windows.

Weights are larger than a fresh model's, so that attention is far from uniform.
"""

import tiny_models
import torch
from peft import PrefixTuningConfig, get_peft_model

P = 5
STD = 0.25
SIZES = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": STD,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None}


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **GROUPED, **options})), "CAUSAL_LM"


def qwen3(**options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **GROUPED, **options})), "CAUSAL_LM"


def mistral(window=9, **options):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**SIZES, **GROUPED, "sliding_window": window, **options})
    return MistralForCausalLM(config), "CAUSAL_LM"


def gemma2(**options):
    """Logits of attention capped, and every second layer with a window: eager, so joined."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options = {"sliding_window": 9, "query_pre_attn_scalar": 8, **options}
    config = Gemma2Config(**{**SIZES, **GROUPED, **options})
    return Gemma2ForCausalLM(config), "CAUSAL_LM"


def gemma3(**options):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    options = {"sliding_window": 9, "sliding_window_pattern": 2, **options}
    config = Gemma3TextConfig(**{**SIZES, **GROUPED, "query_pre_attn_scalar": 8, **options})
    return Gemma3ForCausalLM(config), "CAUSAL_LM"


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    given = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **NO_DROPOUT_GPT2}
    names = ("vocab_size", "initializer_range", "pad_token_id")
    sizes = {name: SIZES[name] for name in names}
    config = GPT2Config(**{**given, **sizes, "bos_token_id": 1, "eos_token_id": None, **options})
    return GPT2LMHeadModel(config), "CAUSAL_LM"


NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def opt(**options):
    from transformers import OPTConfig, OPTForCausalLM

    given = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": STD}
    config = OPTConfig(**{**SIZES, **given, "bos_token_id": 1, "eos_token_id": None, **options})
    return OPTForCausalLM(config), "CAUSAL_LM"


def encoder(name, kind, **options):
    """BERT or RoBERTa with a head."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{
            **SIZES,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 2 if kind == "QuestionAnswering" else 3,
            **options,
        }
    )
    task = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    task |= {"QuestionAnswering": "QUESTION_ANS", "Model": "FEATURE_EXTRACTION"}
    head = kind if kind == "Model" else f"For{kind}"
    return getattr(transformers, f"{name}{head}")(config), task[kind]


def t5(**options):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=tiny_models.VOCABULARY,
        **{
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 3,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
            **options,
        },
    )
    return T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM"


def bart(**options):
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=tiny_models.VOCABULARY,
        **{
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "init_std": STD,
            "eos_token_id": None,
            "forced_eos_token_id": None,
            "decoder_start_token_id": 2,
            **options,
        },
    )
    return BartForConditionalGeneration(config), "SEQ_2_SEQ_LM"


def inputs(task, batch=3, length=12, padding=None, padded=3):
    """Inputs of a task with labels; padding "left" or "right" in row 0."""
    given = tiny_models.token_inputs(batch, length)
    if task == "SEQ_CLS":
        given["labels"] = torch.randint(0, 3, (batch,))
    if task == "TOKEN_CLS":
        given["labels"] = torch.randint(0, 3, (batch, length))
    if task == "QUESTION_ANS":
        given = {"input_ids": given["input_ids"]}
        given["start_positions"] = torch.randint(0, length, (batch,))
        given["end_positions"] = torch.randint(0, length, (batch,))
    if task == "FEATURE_EXTRACTION":
        del given["labels"]
    if padding is not None:
        mask = torch.ones(batch, length, dtype=torch.long)
        hidden = slice(None, padded) if padding == "left" else slice(-padded, None)
        mask[0, hidden] = 0
        given["attention_mask"] = mask
        given["input_ids"][0, hidden] = 0
        if "labels" in given and given["labels"].shape == mask.shape:
            given["labels"][0, hidden] = -100
    return given


def prefix_tuned(make, *, adapter=None, seed=0, dtype=torch.float32, scale=1.0, **options):
    """(a model of `make` with prefix tuning, its task); the same for the same arguments."""
    torch.manual_seed(seed)
    model, task = make()
    model = model.to(dtype)
    config = PrefixTuningConfig(task_type=task, **{"num_virtual_tokens": P, **options})
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter *= scale
    return model, task


def step(model, given):
    """{name: loss, logits or gradient of a trained parameter} of one step."""
    model.zero_grad()
    out = model(**given)
    loss = loss_of(out)
    loss.backward()
    result = {"loss": loss.detach(), "logits": out[1 if "loss" in out else 0].detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[name] = parameter.grad.clone()
    return result


def loss_of(out):
    """A model's own loss, or one for a model without head."""
    return out.loss if "loss" in out else (out[0] * directions(out[0])).square().mean()


def directions(x):
    """Fixed numbers like x, to make it a loss whose gradient is none of zeros."""
    return torch.linspace(-1, 1, x.numel()).sin().view_as(x)


def assert_equal_steps(got, expected, *, gradient=1e-5, loss=1e-6):
    """Losses to 1e-6, logits and gradients to 1e-5, of their norms.

    A gradient that is zero but for rounding (a bias before a softmax) is measured by the others.
    """
    assert got.keys() == expected.keys()
    largest = max(value.norm() for name, value in expected.items() if name.count("."))
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        norm = value.double().norm()
        norm = max(norm, 1e-2 * largest) if name.count(".") else norm
        error = (got[name].double() - value.double()).norm() / norm
        assert error <= (loss if name == "loss" else gradient), (name, error.item())
