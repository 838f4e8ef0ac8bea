"""What nvcc made of the CUDA kernels, for every architecture: the built module is taken apart."""

import re
from pathlib import Path

import pytest

import fusetune

compiled = pytest.importorskip("fusetune.sim.compile", reason="reads cubins by Triton's tools")
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    """{(architecture, mangled name): usage}."""
    built = [*Path(fusetune.__file__).parent.glob("_cuda.*.so")]
    if not built:
        pytest.skip("the CUDA kernels are not built: that takes nvcc")
    return compiled.built_kernels(built[0])


def of(kernels, pattern):
    """Kernels by name, without those that an architecture cannot have: bf16 on sm_75."""
    chosen = {
        key: usage
        for key, usage in kernels.items()
        if re.search(pattern, key[1]) and not (key[0] < 80 and "bfloat16" in key[1])
    }
    assert chosen
    return chosen


MATMULS = "linear_4bit_(stream|tile|dx)"


def test_every_architecture_has_every_kernel(kernels):
    archs = {arch for arch, _ in kernels}
    names = {name for _, name in kernels}
    assert len(names) >= 19
    assert {(arch, name) for arch in archs for name in names} == set(kernels)


def test_no_kernel_spills(kernels):
    assert {key: u.stack for key, u in kernels.items() if u.stack or u.spills} == {}


def test_shared_memory_is_what_every_launch_may_have(kernels):
    assert {key: u.shared for key, u in kernels.items() if u.shared > 48 * 1024} == {}


def test_registers_leave_room_for_the_ctas_of_the_tiling(kernels):
    """Two CTAs of 128 threads, three of 256, of 65536 registers."""
    assert all(u.registers <= 255 for u in of(kernels, "linear_4bit_(tile|dx)").values())
    assert all(u.registers <= 80 for u in of(kernels, "linear_4bit_stream").values())
    assert all(u.registers <= 64 for u in of(kernels, "dequantize|fp32|sum_splits").values())


def test_matmuls_run_on_tensor_cores_and_load_16_bytes(kernels):
    for (arch, name), usage in of(kernels, MATMULS).items():
        assert usage.count("HMMA") >= 8, (arch, name)
        wide = usage.count(r"LDG\.E\.(\w+\.)*128") + usage.count(r"LDGSTS\.E\.(\w+\.)*128")
        assert wide >= 4, (arch, name, usage.opcodes)


def test_tiles_are_copied_beside_the_multiplication(kernels):
    for (arch, name), usage in of(kernels, "linear_4bit_(tile|dx)").items():
        assert (usage.count("LDGSTS") > 0) == (arch >= 80), (arch, name)


def test_results_of_dequantisation_are_stored_16_bytes_at_a_time(kernels):
    for (arch, name), usage in of(kernels, "dequantize").items():
        assert usage.count(r"STG\.E\.(\w+\.)*128") >= 1, (arch, name)
