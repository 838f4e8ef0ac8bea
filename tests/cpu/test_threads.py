"""The kernels run on torch's threads, as many as torch.set_num_threads says, also after a fork."""

import ctypes
import re
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fusetune import _native, ops

C = _native.C
pytestmark = pytest.mark.skipif(C is None, reason=str(_native.reason))


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def work() -> torch.Tensor:
    """The result of a kernel with far more chunks than threads."""
    x = torch.arange(2**20, dtype=torch.float32).sin_().view(1024, 1024)
    # No use_backend: it is for the whole process, and tests call this from several threads at once.
    return ops.quantize_4bit(x).packed


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_threads_as_torch_uses(threads, count):
    threads(count)
    assert C.num_threads() == count
    work()
    assert C.last_region_threads() == count


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_they_are_really_that_many(run_python):
    """Counts the operating system's threads that used CPU time, not what the pool says."""
    code = """
import os, torch
torch.set_num_threads(3)
from fusetune import _native
x = torch.randn(2**22)
packed, absmax = torch.empty(2**21, dtype=torch.uint8), torch.empty(2**16)
def used():
    def ticks(task):
        return int(open(f"/proc/self/task/{task}/schedstat").read().split()[0])
    return {task: ticks(task) for task in os.listdir("/proc/self/task")}
def run(n):
    for _ in range(n):
        _native.C.quantize_4bit(x.data_ptr(), 0, 2**22, 0, 64, packed.data_ptr(), absmax.data_ptr())
run(1)
before = used()
run(20)
after = used()
print(sum(after[task] - before.get(task, 0) > 1_000_000 for task in after))
"""
    assert int(run_python(code)) == 3


def test_one_thread_from_a_fresh_python_thread(threads):
    threads(1)
    seen = []

    def body():
        work()
        seen.append(C.last_region_threads())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [1]


def test_inside_another_parallel_region(threads):
    """A kernel called from a worker of torch's pool runs on that worker alone, and right."""
    library = _native.libtorch_cpu()
    if not _native.address(library, "torch_parallel_for"):
        pytest.skip("this torch (before 2.10) has no C function of a parallel loop")
    threads(2)
    expected = work()
    results = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
        lambda begin, end, ctx: results.append((work(), C.last_region_threads()))
    )
    library.torch_parallel_for(
        ctypes.c_int64(0), ctypes.c_int64(2), ctypes.c_int64(1), body, ctypes.c_void_p()
    )
    assert len(results) == 2
    for packed, _ in results:
        assert torch.equal(packed, expected)
    assert results[-1][1] == 1


def test_result_does_not_depend_on_threads(threads):
    x, a, b = torch.randn(700, 300), torch.randn(8, 300), torch.randn(90, 8)
    weight = torch.randn(90, 300)
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(1)
        with ops.use_backend("cpu"):
            y = ops.lora_linear(leaves[0], weight, leaves[1], leaves[2], 2.0, dropout_p=0.1)
            y.sin().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime(run_python):
    code = """
import torch, bitsandbytes
from fusetune import _native
x = torch.randn(2**20)
packed, absmax = torch.empty(2**19, dtype=torch.uint8), torch.empty(2**14)
_native.C.quantize_4bit(x.data_ptr(), 0, 2**20, 0, 64, packed.data_ptr(), absmax.data_ptr())
(x.view(1024, 1024) @ x.view(1024, 1024)).sum()
print(open("/proc/self/maps").read())
"""
    maps = run_python(code)
    runtimes = set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", maps))
    assert len(runtimes) == 1, runtimes


def test_gomp_pool(run_python):
    """The way for a torch without the C function of a parallel loop (before 2.10)."""
    code = """
import threading, torch
from fusetune import _native
C = _native.C
C.set_torch_pool(0, 0)
library = _native.libtorch_cpu()
names = _native.GOMP_PARALLEL, _native.AT_GET_NUM_THREADS
C.set_gomp_pool(*(_native.address(library, name) for name in names))
assert C.pool_name() == "gomp"
x = torch.randn(2**20)
packed, absmax = torch.empty(2**19, dtype=torch.uint8), torch.empty(2**14)
def run():
    C.quantize_4bit(x.data_ptr(), 0, 2**20, 0, 64, packed.data_ptr(), absmax.data_ptr())
    return C.last_region_threads()
seen = []
for n in (3, 1):
    torch.set_num_threads(n)
    seen.append(run())
    thread = threading.Thread(target=lambda: seen.append(run()))
    thread.start()
    thread.join()
print(seen)
"""
    if not _native.address(_native.libtorch_cpu(), _native.AT_GET_NUM_THREADS):
        pytest.skip("this torch has no at::get_num_threads")
    assert run_python(code) == "[3, 3, 1, 1]"


@pytest.mark.parametrize("prepare", ["torch.set_num_threads(1)", ""])
def test_forked_child(run_python, prepare):
    """After the parent has used the pool, a kernel works in a child: with one thread set, as in
    DataLoader's workers, and without, where torch's own parallel operations hang."""
    code = f"""
import os, signal, torch
torch.set_num_threads(2)
from fusetune import _native
x = torch.arange(2**20, dtype=torch.float32).sin()
packed, absmax = torch.empty(2**19, dtype=torch.uint8), torch.empty(2**14)
def run():
    packed.numpy()[:] = 0
    addresses = packed.data_ptr(), absmax.data_ptr()
    _native.C.quantize_4bit(x.data_ptr(), 0, 2**20, 0, 64, *addresses)
    return bytes(packed.numpy())
expected = run()
assert _native.C.last_region_threads() == 2
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    {prepare or "pass"}
    os._exit(0 if run() == expected and _native.C.last_region_threads() == 1 else 3)
_, status = os.waitpid(pid, 0)
assert run() == expected and _native.C.last_region_threads() == 2
print(os.waitstatus_to_exitcode(status))
"""
    assert run_python(code, PYTHONWARNINGS="ignore") == "0"


class Quantised(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return work()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dataloader_workers():
    expected = work()
    loader = DataLoader(Quantised(), batch_size=2, num_workers=2, timeout=60)
    batches = list(loader)
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch, expected.expand_as(batch))
