"""orthogonality against its definition in float64, PEFT's number, and its interface."""

import copy

import pytest
import torch
from adalora_models import adalora
from tolerance import assert_close

import fusetune
from fusetune.ops import orthogonality
from fusetune.reference import orthogonality as reference


def matrices(dtype=torch.float32, *, requires_grad=True):
    rows = [torch.randn(4, 9), torch.randn(4, 9), torch.randn(3, 9), torch.randn(1, 1)]
    columns = [torch.randn(9, 4), torch.randn(4, 9), torch.randn(9, 4), torch.randn(5, 0)]
    cast = [[m.to(dtype).requires_grad_(requires_grad) for m in each] for each in (rows, columns)]
    return cast[0], cast[1]


def all_of(function, rows, columns):
    value = function(rows, columns)
    return value.detach(), *torch.autograd.grad(value, [*rows, *columns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients(dtype):
    rows, columns = matrices(dtype)
    exact_leaves = [
        [m.detach().double().requires_grad_() for m in each] for each in (rows, columns)
    ]
    got = all_of(orthogonality, rows, columns)
    eager = all_of(reference.orthogonality, rows, columns)
    exact = all_of(reference.orthogonality, *exact_leaves)
    assert got[0].dtype == torch.float32
    for i, (mine, true, theirs) in enumerate(zip(got, exact, eager, strict=True)):
        # Each is a sum of at most 9 products, and of terms of either sign.
        assert_close(str(i), mine, true, theirs, 16 * (true.abs() + 1))


def test_gradcheck_in_float64():
    rows, columns = matrices(torch.float64)
    rows, columns = rows[:3], columns[:3]
    assert torch.autograd.gradcheck(
        lambda *all_: orthogonality(all_[:3], all_[3:]), (*rows, *columns)
    )


def test_orthonormal_matrices_have_neither_value_nor_gradient():
    p = torch.eye(3, 7).requires_grad_()
    value = orthogonality([p])
    value.backward()
    assert value.item() == 0
    assert torch.equal(p.grad, torch.zeros(3, 7))


def test_only_what_asks_for_a_gradient_gets_one():
    rows, columns = matrices(requires_grad=False)
    columns[0].requires_grad_()
    orthogonality(rows, columns).backward()
    assert columns[0].grad is not None
    assert all(m.grad is None for m in [*rows, *columns[1:]])
    with torch.no_grad():
        assert not orthogonality(rows, columns).requires_grad


def test_autocast_does_not_round():
    rows, columns = matrices()
    with torch.autocast("cpu", torch.bfloat16):
        got = orthogonality(rows, columns)
    assert torch.equal(got, orthogonality(rows, columns))


def test_strided_matrices():
    base = torch.randn(9, 8)
    got = orthogonality([base[:, ::2].T], [base[:, 1::2]])
    torch.testing.assert_close(got, reference.orthogonality([base[:, ::2].T], [base[:, 1::2]]))


def test_compiled_is_one_graph(fresh_compiler):
    rows, columns = matrices()
    compiled = torch.compile(orthogonality, backend="aot_eager", fullgraph=True)
    for got, expected in zip(
        all_of(compiled, rows, columns), all_of(orthogonality, rows, columns), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("rows", "columns", "error", "message"),
    [
        ([], [], ValueError, "rows and columns are both empty"),
        ([torch.ones(3)], [], ValueError, r"rows\[0\] must be a matrix, got shape \[3\]"),
        ([], [torch.ones(2, 2), 3], TypeError, r"columns\[1\] must be a tensor, got int"),
        ([torch.ones(2, 2, dtype=torch.int32)], [], TypeError, r"rows\[0\] must be float16"),
        ([torch.ones(2, 2)], [torch.ones(2, 2, device="meta")], ValueError, r"is on meta"),
    ],
)
def test_wrong_arguments_are_refused_by_name(rows, columns, error, message):
    with pytest.raises(error, match=message):
        orthogonality(rows, columns)


# --- in PEFT's model ------------------------------------------------------------------------------


def test_it_is_pefts_number_in_the_loss():
    """What PEFT adds to the loss, and its gradient, from the parameters alone."""
    stock, inputs = adalora(orth_reg_weight=0.7, layers=2)
    fused, without = copy.deepcopy(stock), copy.deepcopy(stock)
    without.peft_config["default"].orth_reg_weight = 0.0
    fusetune.fuse(fused)
    added = [(m(**inputs).loss - without(**inputs).loss).item() for m in (fused, stock)]
    exact = [p.double() for n, p in stock.named_parameters() if "lora_A" in n]
    columns = [p.double() for n, p in stock.named_parameters() if "lora_B" in n]
    expected = 0.7 * reference.orthogonality(exact, columns).item()
    assert added == pytest.approx([expected] * 2, rel=1e-5)
    assert expected > 1


def test_evaluation_disabled_adapters_and_an_unusable_weight_are_as_in_peft():
    stock, inputs = adalora()
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    for model in (stock, fused):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(**inputs).loss, stock(**inputs).loss)
        with fused.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(fused(**inputs).loss, stock(**inputs).loss)
    assert fused(input_ids=inputs["input_ids"]).loss is None
    for model in (stock, fused):
        model.peft_config["default"].orth_reg_weight = -1.0
        with pytest.raises(ValueError, match="orth_reg_weight should be"):
            model(**inputs)
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "orth_reg_weight is negative"


def test_a_loss_without_a_trained_adapter_has_no_term(tmp_path):
    """PEFT raises there: it asks for the name of the trained adapter, which is missing."""
    import tiny_models
    from peft import PeftModel

    model, inputs = adalora()
    model.save_pretrained(tmp_path)
    model.peft_config["default"].orth_reg_weight = 0.0
    expected = model(**inputs).loss
    torch.manual_seed(0)
    base, _ = tiny_models.llama(1)
    loaded = PeftModel.from_pretrained(base, tmp_path).train()
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loaded(**inputs)
    fusetune.fuse(loaded)
    torch.testing.assert_close(loaded(**inputs).loss, expected)
