// What the module asks about devices.
#include "launch.h"

using namespace fusetune;

extern "C" int fusetune_device_count(int* error) {
  int count = 0;
  *error = cudaGetDeviceCount(&count);
  if (*error == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

extern "C" const char* fusetune_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int fusetune_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

extern "C" int fusetune_has_code(int capability) {
  // Machine code runs on the rest of its generation; of the newest architecture there is PTX, for what comes later.
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};  // 750, 800, ...: what nvcc compiles for
  int newest = 0;
  for (const int arch : kArchs) {
    if (arch / 100 == capability / 10 && arch / 10 <= capability) return 1;
    newest = std::max(newest, arch / 10);
  }
  return capability >= newest;
}
