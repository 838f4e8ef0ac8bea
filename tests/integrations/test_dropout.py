"""Dropout of transformers' own models, fused: its rates and seeds, and stock where it cannot be."""

import copy
import pickle

import pytest
import tiny_models
import torch
from model_equality import assert_near
from torch import nn

import fusetune
from fusetune.integrations.transformers_dropout import FusedDropout
from fusetune.nn import fused_sdpa
from fusetune.reference.dropout import keep_mask, new_seed

RATE = 0.3
BERT = {"hidden_dropout_prob": RATE, "attention_probs_dropout_prob": RATE}
GPT2 = {"resid_pdrop": RATE, "embd_pdrop": RATE, "attn_pdrop": RATE}


def bert(lora=None, **options):
    return tiny_models.with_lora(tiny_models.bert(**{**BERT, **options})[0], **(lora or {}))


def gpt2(**options):
    return tiny_models.with_lora(tiny_models.gpt2(**{**GPT2, **options})[0])


def padded():
    inputs = tiny_models.token_inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 5:] = 0
    return inputs


def methods(report):
    return {row.method for row in report.rows if row.method in ("dropout", "attention")}


class SameMask(nn.Dropout):
    """Dropout written out, with the mask that our seed stands for."""

    def forward(self, x):
        if not self.training:
            return x
        kept = keep_mask(x.shape[:-1].numel(), x.shape[-1], self.p, new_seed(x.device))
        return x * kept.view(x.shape) / (1 - self.p)


def written_out(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_
):
    """Attention of its definition, with that mask too."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif module.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1)
    if dropout:
        kept = keep_mask(weights.shape[:-1].numel(), weights.shape[-1], dropout, new_seed("cpu"))
        weights = weights * kept.view(weights.shape) / (1 - dropout)
    return (weights @ value).transpose(1, 2), None


def with_same_masks(model):
    """The stock model, with its dropouts written out."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("test_written_out", written_out)
    ALL_MASK_ATTENTION_FUNCTIONS.register("test_written_out", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = SameMask
    model.config._attn_implementation_internal = "test_written_out"
    return model


def step(model, inputs):
    torch.manual_seed(7)
    loss, logits, grads = tiny_models.loss_and_grads(model.train(), inputs)
    return {"loss": loss, "logits": logits, **grads}


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("inputs", [tiny_models.token_inputs(), padded()], ids=["all", "padded"])
def test_step_with_the_same_masks(make, inputs, calls):
    """Every mask is where the stock model has one: the same step once its masks are ours."""
    stock, fused = make(), make()
    fused.load_state_dict(stock.state_dict())
    want = with_same_masks(stock)
    report = fusetune.fuse(fused)
    assert methods(report) == {"dropout", "attention"}
    assert all(row.fused for row in report.rows), report
    exact = step(copy.deepcopy(want).double(), inputs)
    assert_near(step(fused, inputs), step(want, inputs), exact)
    assert calls.count("dropout") == sum(isinstance(m, SameMask) for m in unheld(want))


def unheld(model):
    """Modules that are called: not those that hold an attention's rate."""
    names = {
        f"{name}.{fused_sdpa.holder(module)}"
        for name, module in model.named_modules()
        if fused_sdpa.holder(module)
    }
    return [module for name, module in model.named_modules() if name not in names]


def test_seed_and_checkpointing():
    model = bert()
    fusetune.fuse(model)
    inputs = padded()
    first, again = step(model, inputs), step(model, inputs)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = step(model, inputs)
    for name, value in first.items():
        torch.testing.assert_close(value, recomputed[name], msg=name)


def test_eval_is_the_stock_model(calls):
    stock = bert().eval()
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    inputs = padded()
    torch.testing.assert_close(fused(**inputs).logits, stock(**inputs).logits)
    assert "dropout" not in calls


def test_not_without_being_asked():
    model = bert().train()
    report = fusetune.fuse(model, dropout=False)
    assert not methods(report)
    stock = copy.deepcopy(model)
    fusetune.unfuse(stock)
    inputs = padded()
    torch.manual_seed(7)
    want = stock(**inputs).logits
    torch.manual_seed(7)
    torch.testing.assert_close(model(**inputs).logits, want)
    assert methods(fusetune.fuse(model)) == {"dropout", "attention"}


def test_only_what_is_dropped_is_reported():
    assert methods(fusetune.fuse(bert())) == {"dropout", "attention"}
    assert methods(fusetune.fuse(bert(hidden_dropout_prob=0.0))) == {"attention"}


def test_dropouts_of_others_stay():
    """LoRA's own is its layers' matter, and one outside transformers' modules the user's."""
    model = nn.Sequential(bert({"lora_dropout": 0.1}), nn.Dropout(0.5))
    fusetune.fuse(model)
    kept = {name for name, module in model.named_modules() if type(module) is nn.Dropout}
    assert "1" in kept
    assert any("lora_dropout" in name for name in kept)
    assert not any(name.endswith("output.dropout") for name in kept)


def test_unfuse_copies_and_pickles():
    model = bert()
    name = model.config._attn_implementation
    fusetune.fuse(model)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    inputs = padded()
    torch.testing.assert_close(step(again, inputs)["loss"], step(model, inputs)["loss"])
    fusetune.unfuse(model)
    assert model.config._attn_implementation == name
    assert not any(isinstance(module, FusedDropout) for module in model.modules())
    with fusetune.fused(model):
        assert model.config._attn_implementation == fused_sdpa.NAME
    assert model.config._attn_implementation == name


def test_another_attention_function_is_left_alone():
    model = bert()
    model.set_attn_implementation("eager")
    assert methods(fusetune.fuse(model)) == {"dropout"}
    model.set_attn_implementation("sdpa")
    assert methods(fusetune.fuse(model)) == {"dropout", "attention"}
    model.set_attn_implementation("eager")
    assert step(model, padded())["loss"].isfinite()


@pytest.mark.parametrize("kind", ["float64", "a subclass", "vmap", "in place"])
def test_stock_where_it_cannot_be_fused(kind, calls):
    model = bert().train()
    fusetune.fuse(model)
    module = next(m for m in model.modules() if isinstance(m, FusedDropout))
    x = torch.randn(4, 8)
    if kind == "float64":
        x = x.double()
    if kind == "a subclass":
        x = x.as_subclass(type("Mine", (torch.Tensor,), {}))
    if kind == "in place":
        module.inplace = True
        assert "in place" in module.fused_reason()

    def run(function):
        torch.manual_seed(1)
        if kind == "vmap":
            return torch.vmap(function, randomness="different")(x.clone())
        return function(x.clone())

    assert torch.equal(run(module), run(nn.Dropout(module.p)))
    assert "dropout" not in calls


def test_a_prefix_takes_the_attention_over():
    """Prefix tuning fuses the same attention: dropped weights then are the stock function's."""
    from peft import PrefixTuningConfig, get_peft_model

    base, inputs = tiny_models.gpt2(**GPT2)
    fusetune.fuse(base)
    assert base.config._attn_implementation == fused_sdpa.NAME
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    report = fusetune.fuse(model)
    assert base.config._attn_implementation == "prefix_sdpa"
    assert "attention" not in methods(report)
    assert step(model, inputs)["loss"].isfinite()
    fusetune.unfuse(model)
    assert base.config._attn_implementation == "sdpa"


def test_autocast(calls):
    model = bert().train()
    fusetune.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**padded()).loss
    loss.backward()
    assert "dropout" in calls
    assert loss.isfinite()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled():
    """torch.compile draws its own masks, without a break of the graph."""
    model = bert().train()
    fusetune.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**padded()).loss
    loss.backward()
    assert loss.isfinite()
