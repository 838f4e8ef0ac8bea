// Launchers as the library's are, for tests of the simulated CUDA runtime: a C ABI, an error code back.
#include <cuda_runtime.h>

namespace {

__constant__ float kTable[4] = {1.f, 2.f, 4.f, 8.f};

struct Line {
  const float* x;
  float slope, offset;
};

__global__ void line(Line line, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = line.slope * line.x[i] + line.offset * kTable[i % 4];
}

// y[i] = x[i] reversed within blocks of blockDim.x, through dynamic shared memory.
template <typename T>
__global__ void reverse(const T* x, T* y) {
  extern __shared__ char memory[];
  T* tile = reinterpret_cast<T*>(memory);
  const int base = blockIdx.x * blockDim.x;
  tile[threadIdx.x] = x[base + threadIdx.x];
  __syncthreads();
  y[base + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// Every CTA adds its part; the last one to finish writes how many there were.
__global__ void last(int* counter, int* out) {
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(counter, 1) == gridDim.x - 1) *out = gridDim.x;
}

}  // namespace

extern "C" {

int launch_line(const float* x, float slope, float offset, float* y, int n, cudaStream_t stream) {
  line<<<(n + 127) / 128, 128, 0, stream>>>(Line{x, slope, offset}, y, n);
  return cudaGetLastError();
}

int launch_reverse(const void* x, void* y, int blocks, int threads, int size, cudaStream_t stream) {
  const size_t shared = size_t(threads) * size;
  if (size == 8) {
    reverse<<<blocks, threads, shared, stream>>>(static_cast<const double*>(x), static_cast<double*>(y));
  } else {
    reverse<<<blocks, threads, shared, stream>>>(static_cast<const float*>(x), static_cast<float*>(y));
  }
  return cudaGetLastError();
}

int launch_last(int* counter, int* out, int blocks, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(counter, 0, sizeof(int), stream);
  if (error != cudaSuccess) return error;
  last<<<blocks, 32, 0, stream>>>(counter, out);
  return cudaGetLastError();
}

int capability() {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  return 10 * major + minor;
}

}
