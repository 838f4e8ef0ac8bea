// A CUDA runtime without a GPU, linked into the launchers in libcudart's place: device memory is host memory, and a
// kernel launch goes to a callback together with the kernel's PTX, which nvcc has put, uncompressed, into the module.
//
// The entry points with two underscores are those that nvcc's generated host code calls (crt/host_runtime.h).
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))
// The runtime stays inside this module: a process may hold the real one as well.
#define SIM_HIDDEN extern "C" __attribute__((visibility("hidden")))

namespace {

// (fat binary, mangled name, grid, block, dynamic shared memory, addresses of the arguments) -> error code
using Launch = int (*)(const void* image, const char* kernel, const unsigned* grid, const unsigned* block,
                       size_t shared, void** args);

struct Kernel {
  const void* image;
  std::string name;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

struct FatBinaryWrapper {  // fatbinary_section.h
  int magic, version;
  const void* data;
  void* filename_or_fatbins;
};

Launch launch_callback = nullptr;
int device_arch = 80;
cudaError_t last_error = cudaSuccess;

std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> map;  // registration runs before main: made at the first use
  return map;
}

std::vector<Configuration>& configurations() {
  static thread_local std::vector<Configuration> stack;
  return stack;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t run(const void* function, dim3 grid, dim3 block, void** args, size_t shared) {
  auto found = kernels().find(function);
  if (found == kernels().end() || launch_callback == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  const Kernel& kernel = found->second;
  return remember(static_cast<cudaError_t>(launch_callback(kernel.image, kernel.name.c_str(), g, b, shared, args)));
}

}  // namespace

SIM_EXPORT void fusetune_sim_start(int arch, Launch callback) {
  device_arch = arch;
  launch_callback = callback;
  last_error = cudaSuccess;
}

// ---- what nvcc's host code registers and calls ----------------------------------------------------------------------

SIM_HIDDEN void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(const_cast<void*>(static_cast<FatBinaryWrapper*>(wrapper)->data));
}
SIM_HIDDEN void __cudaRegisterFatBinaryEnd(void**) {}
SIM_HIDDEN void __cudaUnregisterFatBinary(void**) {}
SIM_HIDDEN char __cudaInitModule(void**) { return 0; }
SIM_HIDDEN void __cudaRegisterFunction(void** image, const char* function, char*, const char* name, int, void*, void*,
                                       void*, void*, int*) {
  kernels()[function] = {image, name};
}
SIM_HIDDEN void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
SIM_HIDDEN unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
SIM_HIDDEN cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration top = configurations().back();
  configurations().pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                          cudaStream_t) {
  return run(kernel, grid, block, args, shared);
}
SIM_HIDDEN cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                                               size_t shared, cudaStream_t) {
  return run(kernel, grid, block, args, shared);
}

// ---- the runtime API that launchers use; another function fails at link time ------------------------------------------

SIM_HIDDEN cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t) {
  return run(function, grid, block, args, shared);
}
SIM_HIDDEN cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
SIM_HIDDEN cudaError_t cudaPeekAtLastError() { return last_error; }
SIM_HIDDEN const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the simulated launch failed";
}
SIM_HIDDEN const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorSimulated";
}
SIM_HIDDEN cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaSetDevice(int) { return cudaSuccess; }
SIM_HIDDEN cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
SIM_HIDDEN cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device_arch / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device_arch % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = device_arch == 75 ? 40 : 108; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device_arch == 75 ? 65536 : 166912; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device_arch == 75 ? 65536 : 167936; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device_arch == 75 ? 1024 : 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = device_arch == 75 ? 4 << 20 : 40 << 20; break;
    default: return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                              unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
SIM_HIDDEN cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
SIM_HIDDEN cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
