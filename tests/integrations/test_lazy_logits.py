"""Logits that only the loss needs: the same numbers, and the logits for those who read them."""

import copy
import pickle

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from transformers.loss.loss_utils import ForCausalLMLoss

import fusetune
from fusetune.integrations._lazy_logits import LazyLogits, lazy_logits, source_of
from fusetune.integrations.transformers import causal_lm_loss

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
BF16 = 16 * 2**-9  # of a gradient's norm: sixteen roundings, two layers' worth


def lora(kind, targets="all-linear", **options):
    model, inputs = getattr(tiny_models, kind)(**options)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    inputs["labels"][0, :5] = -100
    return model.train(), inputs


def step(model, inputs, loss=lambda outputs: outputs.loss):
    """(loss, gradients, outputs) of a step; the logits are not read."""
    model.zero_grad()
    outputs = model(**inputs)
    value = loss(outputs)
    value.backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return value.detach(), trained, outputs


def state(model):
    """Why the logits are not lazy; None where they are."""
    [row] = [row for row in fusetune.fuse(model).rows if row.method == "lazy logits"]
    return row.reason


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 9}], ids=str)
def test_a_step(kind, options, calls):
    model, inputs = lora(kind)
    inputs |= options
    expected = step(copy.deepcopy(model), inputs)
    report = fusetune.fuse(model, lazy_logits=True)
    assert {row.method: row.reason for row in report.rows}["lazy logits"] is None
    got = step(model, inputs)
    torch.testing.assert_close(got[:2], expected[:2], **CLOSE)
    logits = got[2].logits
    assert type(logits) is LazyLogits
    assert not logits.source.read
    assert (logits.shape, logits.dtype) == (expected[2].logits.shape, torch.float32)
    assert "linear_cross_entropy" in calls
    assert state(model) is None


def test_with_checkpointing():
    model, inputs = lora("llama")
    expected = step(copy.deepcopy(model), inputs)
    fusetune.fuse(model, lazy_logits=True)
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step(model, inputs)
        torch.testing.assert_close(got[:2], expected[:2], **CLOSE)
        assert type(got[2].logits) is LazyLogits


def test_whoever_reads_them_gets_them_and_their_gradient():
    model, inputs = lora("llama")

    def distilled(outputs):
        return outputs.loss + outputs.logits.float().square().mean()

    expected = step(copy.deepcopy(model), inputs, distilled)
    fusetune.fuse(model, lazy_logits=True)
    got = step(model, inputs, distilled)
    torch.testing.assert_close(got[:2], expected[:2], **CLOSE)
    torch.testing.assert_close(got[2].logits + 0, expected[2].logits, **CLOSE)
    assert "reads the logits" in state(model)
    got = step(model, inputs, distilled)  # computed at once now
    assert type(got[2].logits) is torch.Tensor
    torch.testing.assert_close(got[:2], expected[:2], **CLOSE)
    fusetune.fuse(model, lazy_logits=True)
    assert state(model) is None
    assert type(step(model, inputs)[2].logits) is LazyLogits


def test_a_loss_of_ones_own_reads_them():
    model, inputs = lora("llama")
    labels = inputs.pop("labels")

    def loss(outputs):
        return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1])

    expected = step(copy.deepcopy(model), inputs, loss)
    fusetune.fuse(model, lazy_logits=True)
    got = step(model, inputs, loss)
    torch.testing.assert_close(got[:2], expected[:2], **CLOSE)


def test_a_model_that_changes_its_logits():
    """Gemma 2 caps them before the loss."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    model, inputs = Gemma2ForCausalLM(config), tiny_models.token_inputs()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).train()
    expected = step(copy.deepcopy(model), inputs)
    fusetune.fuse(model, lazy_logits=True)
    torch.testing.assert_close(step(model, inputs)[:2], expected[:2], **CLOSE)
    assert "reads the logits" in state(model)


def raw(dtype=torch.float32):
    x = torch.randn(2, 7, 8).to(dtype).requires_grad_()
    weight, bias = torch.randn(33, 8).to(dtype), torch.randn(33).to(dtype)
    labels = torch.randint(0, 33, (2, 7))
    return x, weight, bias, labels


def test_changed_in_place():
    x, weight, bias, labels = raw()

    def value(logits):
        logits /= 3
        logits[:, 0] = 0
        loss = causal_lm_loss(logits, labels, 33)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    expected = value(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(value(lazy_logits(x, weight, bias, [])), expected)


def test_cast_to_fp32_is_lazy_still():
    x, weight, bias, labels = raw(torch.bfloat16)
    logits = lazy_logits(x, weight, bias, []).float()
    assert type(logits) is LazyLogits
    assert logits.dtype == torch.float32
    loss = causal_lm_loss(logits, labels, 33)
    assert not logits.source.read
    stock = torch.nn.functional.linear(x, weight, bias).float()
    torch.testing.assert_close(logits + 0, stock)
    assert source_of(logits) is None
    expected = causal_lm_loss(stock, labels, 33)
    torch.testing.assert_close(loss, expected)
    got, true = (torch.autograd.grad(value, x)[0] for value in (loss, expected))
    # Rounded to bf16 in another order: three roundings at most.
    torch.testing.assert_close(got, true, rtol=3 * 2**-8, atol=2**-8 * float(true.abs().max()))


def pickled(tensor):
    return pickle.loads(pickle.dumps(tensor))


def test_another_vocabulary_than_the_losss():
    x, weight, bias, _ = raw()
    labels = torch.randint(0, 11, (2, 21))
    logits = lazy_logits(x, weight, bias, [])
    stock = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(
        causal_lm_loss(logits, labels, 11), causal_lm_loss(stock, labels, 11)
    )


@pytest.mark.parametrize("use", [repr, lambda t: t.tolist(), pickled, lambda t: t.detach().numpy()])
def test_reading(use):
    x, weight, bias, _ = raw()
    x = x.detach()
    stock = torch.nn.functional.linear(x, weight, bias)
    got = use(lazy_logits(x, weight, bias, []))
    if isinstance(got, str):
        assert "LazyLogits" in got
    else:
        torch.testing.assert_close(torch.as_tensor(got), stock)


def test_not_lazy_outside_training():
    model, inputs = lora("llama")
    fusetune.fuse(model, lazy_logits=True)
    with torch.no_grad():
        assert type(model(**inputs).logits) is torch.Tensor
    assert type(model.eval()(**inputs).logits) is torch.Tensor
    assert state(model) is None


def test_compiled_models_compute_them():
    model, inputs = lora("llama")
    expected = step(copy.deepcopy(model), inputs)
    fusetune.fuse(model, lazy_logits=True)
    got = step(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert type(got[2].logits) is torch.Tensor
    torch.testing.assert_close(got[0], expected[0], **CLOSE)
    assert state(model) is None


def test_under_autocast():
    model, inputs = lora("llama")
    expected = copy.deepcopy(model)
    fusetune.fuse(model, lazy_logits=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, stock = model(**inputs), expected(**inputs)
    assert type(got.logits) is LazyLogits
    assert got.logits.dtype == stock.logits.dtype == torch.bfloat16
    torch.testing.assert_close(got.loss, stock.loss, rtol=2**-7, atol=0)
    for outputs in (got, stock):
        outputs.loss.backward()
    parameters = zip(model.parameters(), expected.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in parameters if a.grad is not None]
    assert pairs
    for one, other in pairs:
        assert (one - other).norm() <= BF16 * other.norm()


def test_in_bf16():
    model, inputs = lora("llama")
    model = model.to(torch.bfloat16)
    expected = step(copy.deepcopy(model), inputs)
    fusetune.fuse(model, lazy_logits=True)
    got = step(model, inputs)
    assert type(got[2].logits) is LazyLogits
    torch.testing.assert_close(got[0], expected[0], rtol=2**-7, atol=0)
    for name, gradient in got[1].items():
        assert (gradient - expected[1][name]).norm() <= BF16 * expected[1][name].norm(), name


@pytest.mark.parametrize(
    ("targets", "reason"),
    [(["q_proj", "lm_head"], "the last layer is a"), (["q_proj"], "the weight is trained")],
)
def test_a_head_that_is_trained(targets, reason):
    model, inputs = lora("llama", targets)
    if "lm_head" not in targets:
        model.get_base_model().lm_head.weight.requires_grad_()
    expected = step(copy.deepcopy(model), inputs)
    fusetune.fuse(model, lazy_logits=True)
    assert reason in state(model)
    torch.testing.assert_close(step(model, inputs)[:2], expected[:2], **CLOSE)


def test_a_head_that_gets_an_adapter_later():
    model, inputs = tiny_models.llama()
    fusetune.fuse(model.requires_grad_(False).train(), lazy_logits=True)
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    stock = copy.deepcopy(model)
    fusetune.unfuse(stock)
    expected = step(stock, inputs)
    torch.testing.assert_close(step(model, inputs)[:2], expected[:2], **CLOSE)
    assert "peft.tuners.lora" in state(model)
    assert type(model.get_base_model().lm_head.base_layer) is torch.nn.Linear
    torch.testing.assert_close(step(model, inputs)[:2], expected[:2], **CLOSE)


def test_a_head_that_accelerate_wraps_later():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, inputs = lora("llama")
    expected = step(copy.deepcopy(model), inputs)
    fusetune.fuse(model, lazy_logits=True)
    add_hook_to_module(model.get_base_model().lm_head, ModelHook())
    assert "forward of its own" in state(model)
    for _ in range(2):
        torch.testing.assert_close(step(model, inputs)[:2], expected[:2], **CLOSE)
        fusetune.unfuse(model)


def test_a_weight_that_is_gone_after_the_call():
    """As FSDP has it, by hooks: the logits are computed in the call."""
    model, inputs = lora("llama")
    head = model.get_base_model().lm_head
    fusetune.fuse(model, lazy_logits=True)

    def take(*_):
        head.weight.data.zero_()

    head.register_forward_hook(take)
    got = step(model, inputs)
    assert type(got[2].logits) is torch.Tensor
    assert got[2].logits.any()
    assert "hooks" in state(model)


def test_a_weight_that_was_freed():
    """As FSDP frees it after the call of the whole model: an error, not what lies there now."""
    model, inputs = lora("llama")
    fusetune.fuse(model, lazy_logits=True)
    outputs = model(**inputs)
    model.get_base_model().lm_head.weight.untyped_storage().resize_(0)
    assert source_of(outputs.logits) is None
    with pytest.raises(RuntimeError, match="fuse without lazy_logits"):
        outputs.logits.sum()


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_model_with_another_loss(kind):
    model, inputs = getattr(tiny_models, kind)()
    fusetune.fuse(model, lazy_logits=True)
    assert "its loss is not one" in state(model)
    assert type(model.train()(**inputs).logits) is torch.Tensor
    fusetune.unfuse(model)
    assert not [key for key in model.__dict__ if "fusetune" in key]


def test_taken_out_again():
    model, inputs = lora("llama")
    head = model.get_base_model().lm_head
    fusetune.fuse(model, lazy_logits=True)
    clone = copy.deepcopy(model)
    fusetune.unfuse(model)
    assert type(head) is torch.nn.Linear
    assert not [key for key in head.__dict__ if "fusetune" in key]
    assert type(step(model, inputs)[2].logits) is torch.Tensor
    assert type(step(clone, inputs)[2].logits) is LazyLogits
    with fusetune.fused(model, lazy_logits=True):
        assert type(step(model, inputs)[2].logits) is LazyLogits
    assert type(head) is torch.nn.Linear
    fusetune.fuse(model)
    before = type(head)
    with fusetune.fused(model, lazy_logits=True):
        assert type(head) is not before
    assert type(head) is before
    assert type(step(model, inputs)[2].logits) is torch.Tensor


def test_needs_our_loss():
    model, _ = lora("llama")
    with pytest.raises(ValueError, match="lazy_logits needs loss=True"):
        fusetune.fuse(model, loss=False, lazy_logits=True)
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
