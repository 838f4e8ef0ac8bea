"""Sums over rows, the gradient of any bias: against float64, for any number of threads the same."""

import pytest
import torch
from lora_cases import DTYPES
from tolerance import assert_close, one_thread

from fusetune.ops._scale_columns import column_sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (64, 33), (129, 2049), (1000, 8)])
def test_sums_over_rows(shape, dtype):
    dy = torch.randn(shape).to(dtype)
    exact = dy.double().sum(0)
    assert_close("sum", column_sums(dy), exact, dy.float().sum(0), dy.double().abs().sum(0))


def test_sums_of_views():
    """Columns that are not adjacent, rows with gaps, and a negation that is still to be done."""
    whole = torch.randn(70, 40)
    negated = torch.complex(whole, whole).conj().imag
    assert negated.is_neg()
    for dy in (whole[:, ::2], whole.T, whole[:, 3:20], whole[:1].expand(70, 40), negated):
        assert torch.equal(column_sums(dy), column_sums(dy.clone().contiguous()))
    torch.testing.assert_close(column_sums(negated), -column_sums(whole))


# Few elements, columns shared by threads, chunks of rows shared by them.
@pytest.mark.parametrize("shape", [(200, 40), (128, 1100), (129, 1100), (4099, 130), (300, 5000)])
def test_sums_do_not_depend_on_threads(shape):
    dy = torch.randn(shape)
    with one_thread():
        alone = column_sums(dy)
    assert all(torch.equal(column_sums(dy), alone) for _ in range(3))


def test_opcheck_of_sums(backend):
    dy = torch.randn(70, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.fusetune.column_sums.default, (dy,), atol=1e-5, rtol=0)
