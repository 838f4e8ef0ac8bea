"""The fused loss equals transformers', is installed only over it, and can be taken out again."""

import copy

import pytest
import tiny_models
import torch
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

import fusetune
from fusetune.integrations.transformers import causal_lm_loss, masked_lm_loss

PAIRS = [(ForCausalLMLoss, causal_lm_loss), (ForMaskedLMLoss, masked_lm_loss)]


def batch(dtype=torch.float32, vocabulary=33):
    logits = torch.randn(2, 7, vocabulary).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, 7))
    labels[0, 2:4] = -100
    return logits, labels, vocabulary


def value_and_gradient(loss, logits, *args, **kwargs):
    value = loss(logits, *args, **kwargs)
    return value, *torch.autograd.grad(value, logits)


@pytest.mark.parametrize(("stock", "fused"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(9)},
        {"ignore_index": 3},
        {"use_cache": False, "anything": None},
    ],
    ids=str,
)
def test_loss_and_gradient(stock, fused, dtype, options, calls):
    args = batch(dtype)
    args[1][0, 2:4] = options.get("ignore_index", -100)
    expected = value_and_gradient(stock, *args, **options)
    got = value_and_gradient(fused, *args, **options)
    assert calls == ["cross_entropy"]
    torch.testing.assert_close(got, expected)
    assert got[0].dtype == torch.float32


@pytest.mark.parametrize(("stock", "fused"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(9)}], ids=str)
def test_what_has_no_kernel_is_stock(stock, fused, options, calls):
    args = batch(torch.float64)
    expected = value_and_gradient(stock, *args, **options)
    got = value_and_gradient(fused, *args, **options)
    assert all(map(torch.equal, got, expected))
    assert not calls


def losses(model, **options):
    return [row for row in fusetune.fuse(model, **options).rows if row.method == "cross-entropy"]


def test_labels_that_come_shifted():
    logits, labels, vocabulary = batch()
    options = {"shift_labels": labels.roll(1)}
    expected = value_and_gradient(ForCausalLMLoss, logits, None, vocabulary, **options)
    got = value_and_gradient(causal_lm_loss, logits, None, vocabulary, **options)
    torch.testing.assert_close(got, expected)


def test_all_labels_ignored_gives_nan_as_stock():
    logits, labels, vocabulary = batch()
    labels.fill_(-100)
    assert ForCausalLMLoss(logits, labels, vocabulary).isnan()
    assert causal_lm_loss(logits, labels, vocabulary).isnan()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_installed_on_language_models(kind, calls):
    model, inputs = getattr(tiny_models, kind)()
    expected = tiny_models.loss_and_grads(copy.deepcopy(model), inputs)
    [row] = losses(model)
    assert (row.method, row.module, row.reason) == ("cross-entropy", "", None)
    got = tiny_models.loss_and_grads(model, inputs)
    assert calls.count("cross_entropy") == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    clone = copy.deepcopy(model)
    fusetune.unfuse(model)
    assert "_loss_function" not in model.__dict__
    model(**inputs)
    assert calls.count("cross_entropy") == 1
    clone(**inputs)
    assert calls.count("cross_entropy") == 2


def test_a_loss_of_ones_own_is_left_alone(calls):
    model, inputs = tiny_models.llama()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert losses(model) == []
    model(**inputs)
    assert "cross_entropy" not in calls
    fusetune.unfuse(model)
    assert model.loss_function.__name__ == "<lambda>"


@pytest.mark.parametrize("kind", ["vit", "bert", "t5"])
def test_models_with_another_loss_are_left_alone(kind):
    """An image classifier, and two whose forward does not ask for the loss function."""
    model, _ = getattr(tiny_models, kind)()
    assert "cross-entropy" not in {row.method for row in fusetune.fuse(model).rows}
    assert "_loss_function" not in model.__dict__


def test_can_be_left_out():
    model, _ = tiny_models.llama()
    assert losses(model, loss=False) == []
    assert "_loss_function" not in model.__dict__
