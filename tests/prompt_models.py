"""Tiny float64 models with prompts, by fusetune's methods and by PEFT's."""

import tiny_models
import torch
from peft import get_peft_model

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": None, "t5": "SEQ_2_SEQ_LM"}
# Roundings of a few layers of float64; the values are of the order of one.
TOLERANCE = {"atol": 1e-12, "rtol": 1e-10}


def base(family, dtype=torch.float64):
    """(the same model every time, its inputs), in evaluation."""
    torch.manual_seed(0)
    model, inputs = getattr(tiny_models, family)()
    return model.to(dtype).eval(), inputs


def prompted(family, config, names=("default",), dtype=torch.float64):
    """(a model with an adapter of each name, its inputs), in evaluation."""
    model, inputs = base(family, dtype)
    torch.manual_seed(1)
    configs = [config() if callable(config) else config for _ in names]
    for each in configs:
        each.task_type = TASKS[family]
    model = get_peft_model(model, configs[0], adapter_name=names[0])
    for name, each in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, each)
    return model.eval(), inputs


def layer(model):
    return model.get_base_model().prompt_layer


def encoder(model, name="default", site=None):
    found = layer(model).prompt_encoders[name]
    return found if site is None else found[site]


def logits(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes}).logits


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, **TOLERANCE)


def padded(ids, side, width=3, pad=0):
    """(ids, attention mask) with `width` padding at one side of row 0, and as much text at the
    other's end for the other rows."""
    torch.manual_seed(5)
    batch = len(ids)
    more = torch.randint(1, tiny_models.VOCABULARY, (batch, width))
    longer = torch.cat((ids, more), 1)
    mask = torch.ones_like(longer)
    if side == "right":
        longer[0, -width:], mask[0, -width:] = pad, 0
    else:
        longer[0] = torch.cat((torch.full((width,), pad), ids[0]))
        mask[0, :width] = 0
    return longer, mask


def tokenizer(folder):
    """A tokenizer of whole words in a folder: "w5" is token 5. Returns the folder's name."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, **{f"w{i}": i for i in range(1, tiny_models.VOCABULARY)}}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    # A special token that initialisations must not take for a word.
    built.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]")
    fast.save_pretrained(folder)
    return str(folder)
