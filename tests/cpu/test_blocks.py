"""Memory for large results: kept when freed, never shared, given back when asked for."""

import subprocess
import sys
import threading

import pytest
import torch

from fusetune import _native, ops
from fusetune.ops import _cpu

MIB = 1 << 20
pytestmark = pytest.mark.skipif(_native.C is None, reason=str(_native.reason))


@pytest.fixture(autouse=True)
def _nothing_kept():
    ops.empty_cache()


def block(mib, dtype=torch.float32):
    return _cpu.empty(mib, MIB // dtype.itemsize, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_an_ordinary_tensor(dtype):
    tensor = block(3, dtype)
    assert tensor.dtype == dtype
    assert tensor.shape == (3, MIB // dtype.itemsize)
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    assert not tensor.requires_grad
    tensor.zero_().add_(1)
    assert torch.equal(tensor.clone(), torch.ones(tensor.shape, dtype=dtype))


def test_freed_memory_is_taken_again_and_only_then():
    first = block(2)
    address = first.data_ptr()
    second = block(2)
    assert second.data_ptr() != address
    view = first[1:]
    del first
    assert block(2).data_ptr() != address  # the view still holds it
    del view
    assert block(2).data_ptr() == address


def test_empty_cache_gives_it_back():
    tensor = block(5)
    assert ops.empty_cache() == 0
    del tensor
    assert ops.empty_cache() == 5 * MIB
    assert ops.empty_cache() == 0


def test_no_more_is_kept_than_was_in_use_at_once():
    for mib in (2, 3, 4, 5, 6):
        block(mib)  # freed at once
    assert ops.empty_cache() <= 6 * MIB


def test_threads_do_not_share_a_block():
    def work(number):
        for _ in range(200):
            tensor = block(1).fill_(number)
            wrong.extend([number] * int((tensor != number).any()))

    wrong = []
    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tensors_may_outlive_the_interpreter():
    code = (
        "import builtins, torch\n"
        "from fusetune.ops import _cpu\n"
        "builtins.kept = _cpu.empty(4, 1 << 20, dtype=torch.float32)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
