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
