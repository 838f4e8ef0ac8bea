"""The CUDA runtime in libcudart's place: compiled launchers, from host code to results."""

import ctypes
import gc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fusetune import ops
from fusetune.ops import _cuda
from fusetune.sim import OutOfBounds, cuda_build, cuda_runtime, cuda_sim


def nvcc():
    try:
        return cuda_build.find_nvcc()
    except cuda_build.CannotBuild as error:
        pytest.skip(str(error))


SOURCE = Path(__file__).with_name("launchers.cu")
LAUNCH_FAILED = 719


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture(scope="module", params=[75, 80, 120])
def arch(request):
    nvcc()
    return request.param


@contextmanager
def launchers(arch):
    library = cuda_build.build("launchers", [SOURCE], [], [], arch)
    with cuda_runtime.device_of(library, arch) as device:
        yield ctypes.CDLL(str(library)), device


def line(library, x, y, n):
    slope, offset = ctypes.c_float(2), ctypes.c_float(0.5)
    return library.launch_line(pointer(x), slope, offset, pointer(y), n, None)


def test_a_struct_with_a_pointer(arch):
    x, y = torch.randn(300), torch.full((300,), torch.nan)
    with launchers(arch) as (library, device):
        assert line(library, x, y, 300) == 0
        device.raise_error()
    table = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(75)
    assert torch.equal(y, torch.addcmul(table * 0.5, torch.tensor(2.0), x))
    (launch,) = device.run.launches
    assert (launch.grid, launch.block) == ((3, 1, 1), (128, 1, 1))
    assert launch.counts.global_store_bytes == 1200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_templates_and_dynamic_shared_memory(arch, dtype):
    x, y = torch.randn(4, 64, dtype=dtype), torch.full((4, 64), torch.nan, dtype=dtype)
    with launchers(arch) as (library, device):
        assert library.launch_reverse(pointer(x), pointer(y), 4, 64, dtype.itemsize, None) == 0
        device.raise_error()
    assert torch.equal(y, x.flip(1))
    assert device.run.launches[0].counts.barriers == 4


def test_the_last_cta(arch):
    counter, out = torch.full((1,), 99, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with launchers(arch) as (library, device):
        assert library.launch_last(pointer(counter), pointer(out), 200, None) == 0
        device.raise_error()
    assert counter.item() == out.item() == 200


def test_what_the_device_says_it_is(arch):
    with launchers(arch) as (library, _):
        assert library.capability() == arch


def test_an_error_is_returned_and_kept(arch):
    x, y = torch.randn(299), torch.zeros(300)
    with launchers(arch) as (library, device):
        assert line(library, x, y, 300) == LAUNCH_FAILED
        with pytest.raises(OutOfBounds, match=r"launchers\.cu:\d+ by thread 43 of CTA \(2, 0, 0\)"):
            device.raise_error()
        device.raise_error()  # once
        assert line(library, x, y, 299) == 0  # and is forgotten by the runtime too
        assert not device.run.launches[:-1]


def test_addresses_that_were_taken_before(arch):
    """Hosts keep addresses; their tensors are found all the same, and end where they end."""
    x, y = torch.randn(64), torch.zeros(65)
    address_x, address_y = pointer(x), pointer(y)
    slope, offset = ctypes.c_float(1), ctypes.c_float(0)
    with launchers(arch) as (library, device):
        assert library.launch_line(address_x, slope, offset, address_y, 64, None) == 0
        assert library.launch_line(address_x, slope, offset, address_y, 65, None) == LAUNCH_FAILED
        with pytest.raises(OutOfBounds):
            device.raise_error()
    assert torch.equal(y[:64], x)


def test_memory_of_dead_tensors_is_out_of_bounds(arch):
    y = torch.zeros(64)
    with launchers(arch) as (library, device):
        address = pointer(torch.randn(64))
        gc.collect()
        slope, offset = ctypes.c_float(1), ctypes.c_float(0)
        code = library.launch_line(address, slope, offset, pointer(y), 64, None)
        assert code == LAUNCH_FAILED
        with pytest.raises(OutOfBounds):
            device.raise_error()


def test_two_architectures_in_one_process():
    nvcc()
    x = torch.randn(8)
    for arch in (80, 75, 80):
        y = torch.full((8,), torch.nan)
        with launchers(arch) as (library, device):
            assert library.capability() == arch
            assert line(library, x, y, 8) == 0
            assert len(device.run.launches) == 1
        assert not y.isnan().any()


def test_without_a_simulation_launches_fail():
    nvcc()
    with launchers(80) as (library, _):
        pass
    assert line(library, torch.zeros(4), torch.zeros(4), 4) != 0


@pytest.mark.slow
def test_the_ops_run_on_it():
    nvcc()
    before, data_ptr = _cuda.MODULE, torch.Tensor.data_ptr
    weight = torch.randn(64, 128, dtype=torch.float16)
    quantized = ops.quantize_4bit(weight)
    with ops.use_backend("reference"):
        expected = ops.dequantize_4bit(quantized)
    with cuda_sim(80) as run:
        assert ops.backend() == "cuda"
        assert torch.equal(ops.dequantize_4bit(quantized), expected)
    assert [launch.counts.global_store_bytes for launch in run.launches] == [64 * 128 * 2]
    assert _cuda.MODULE is before
    assert torch.Tensor.data_ptr is data_ptr
    assert ops.backend() == "auto"
    assert "cpu" not in _cuda.DEVICES


def test_without_nvcc_it_says_so(monkeypatch):
    monkeypatch.setattr(cuda_build.os, "access", lambda *_: False)
    with pytest.raises(cuda_build.CannotBuild, match="nvcc was not found"):
        cuda_build.find_nvcc()


def test_compile_errors_are_shown(tmp_path, monkeypatch):
    nvcc()
    monkeypatch.setenv("FUSETUNE_CACHE_DIR", str(tmp_path))
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("this is no code")
    with pytest.raises(cuda_build.CannotBuild, match=r"wrong\.cu"):
        cuda_build.build("wrong", [wrong], [], [], 80)


def test_unknown_architecture():
    with pytest.raises(ValueError, match="arch must be one of"), cuda_sim(70):
        pass
