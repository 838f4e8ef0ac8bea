"""Compiling for all architectures, and reading what the kernels need."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton_samples as samples

from fusetune.sim import compile as offline
from fusetune.sim import cuda_build

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UT.*MMA", 120: "HMMA"}


@pytest.mark.parametrize("arch", TENSOR_CORES)
def test_matmul(arch):
    a, b = torch.zeros(128, 128).bfloat16(), torch.zeros(128, 128).bfloat16()
    c = torch.zeros(128, 128).bfloat16()
    with offline.triton_kernels(arch) as kernels:
        samples.matmul[(2, 2)](
            a, b, c, 128, 128, 128, BM=64, BN=64, BK=32, PRECISION="ieee", num_stages=3
        )
    assert not c.any()  # nothing was executed
    (kernel,) = kernels
    assert (kernel.name, kernel.grid, kernel.block[1:]) == ("matmul", (2, 2, 1), (1, 1))
    usage = kernel.usage
    assert usage.count(TENSOR_CORES[arch]) > 0
    assert usage.spills == usage.stack == 0
    assert 16 <= usage.registers <= 255
    # Three stages of two 64 x 32 tiles are in flight, two of them beside the one that is used.
    assert 2 * 2 * 64 * 32 * 2 <= usage.shared <= offline.MAX_SHARED[arch]
    assert usage.count(r"LDGSTS\b.*128") > 0


def test_wide_loads_are_told_from_narrow_ones():
    x, out = torch.zeros(1024), torch.zeros(1024)
    with offline.triton_kernels(75) as kernels:
        samples.add[(1,)](x, x, out, 1024, BLOCK=1024)
        samples.add[(1,)](x[1:], x[1:], out, 1023, BLOCK=1024)
    wide, narrow = (kernel.usage for kernel in kernels)
    assert wide.count(r"LDG\b.*\.128") == 4
    assert narrow.count(r"LDG\b.*\.128") == 0
    assert narrow.count(r"LDG\b") == 16


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x, int n) {
  float v[128];
  #pragma unroll
  for (int i = 0; i < 128; ++i) v[i] = x[i * n + threadIdx.x];
  #pragma unroll
  for (int i = 0; i < 128; ++i) x[i * n + threadIdx.x] = v[127 - i] * v[(i * 37) % 128];
}
extern "C" __global__ void fits(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[63 - threadIdx.x];
}
"""


def test_cuda_kernels_and_their_spills(tmp_path: Path):
    try:
        cuda_build.find_nvcc()
    except cuda_build.CannotBuild as error:
        pytest.skip(str(error))
    source = tmp_path / "kernels.cu"
    source.write_text(SPILLING)
    usage = offline.cuda_kernels(source, 80)
    assert set(usage) == {"spills", "fits"}
    assert usage["fits"].spills == 0
    assert usage["fits"].static_shared == 256
    assert usage["fits"].count(r"BAR\b") == 1
    assert usage["spills"].registers <= 64  # 65536 for 1024 threads
    assert usage["spills"].stack > 0
    assert usage["spills"].spills > 0
