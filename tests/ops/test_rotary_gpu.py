"""rotary by Triton, simulated: values, strides, launches and bytes, reasons."""

import pytest
import torch
from backends import TRITON, simulated
from rotary_cases import (
    DTYPES,
    SHAPES,
    all_of,
    assert_matches_float64,
    assert_same_numbers_as_transformers,
    inputs,
)

from fusetune import ops
from fusetune.ops._registry import OPS, Case

BF16 = torch.bfloat16


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, dtype):
    assert_matches_float64(*inputs(shape, dtype))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers_as_transformers_in_fp32(backend, shape):
    assert_same_numbers_as_transformers(*inputs(shape))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_tables_and_strides(backend):
    """One row of positions for all, tables in fp32, heads of which a part is turned, no batch."""
    assert_matches_float64(*inputs((3, 2, 1, 4, 16), rows=1))
    query, key, cos, sin = inputs((2, 2, 1, 4, 16), BF16)
    assert_matches_float64(query, key, cos.float(), sin.float())
    query, key, cos, sin = inputs((2, 3, 3, 5, 24))
    by_columns = key.transpose(-1, -2).contiguous().transpose(-1, -2)
    tables = (t[..., ::2][..., :10] for t in (cos, sin))
    assert_matches_float64(query[..., 3:13], by_columns[..., :10], *tables)
    assert_matches_float64(query[:, :1].expand(-1, 3, -1, -1), key, cos, sin)
    for shape in ((0, 2, 1, 3, 4), (2, 2, 1, 0, 4)):
        query, key, cos, sin = inputs(shape)
        assert [t.shape for t in ops.rotary(query, key, cos, sin)] == [query.shape, key.shape]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_launches_and_bytes(dtype):
    """One launch each way for both, each element once; the tables by both warps of a program."""
    batch, heads, kv_heads, tokens, dim = 2, 8, 2, 16, 64
    query, key, cos, sin = inputs((batch, heads, kv_heads, tokens, dim), dtype)
    with simulated("triton-sim") as run:
        all_of(ops.rotary, query, key, cos, sin, (query, key))
    assert [launch.kernel for launch in run.launches] == ["_rotary"] * 2
    both = batch * (heads + kv_heads) * tokens * dim * dtype.itemsize
    programs = 2 * batch * tokens  # for the queries and for the keys
    tables = programs * 2 * 2 * dim * dtype.itemsize
    for launch in run.launches:
        assert 32 * launch.counts.global_load_sectors == both + tables
        assert 32 * launch.counts.global_store_sectors == both


def test_reasons():
    with simulated("triton-sim"), ops.use_backend("auto"):
        assert OPS["rotary"].select(Case("cpu", BF16, torch.float32)).name == "triton"
        reasons = dict(OPS["rotary"].explain(Case("cpu", torch.float64, torch.float64)))
        assert "float64" in reasons["triton"]
