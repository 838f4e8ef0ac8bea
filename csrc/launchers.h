// The place of the GPU kernels' launchers: plain functions on device pointers and a stream, in the style of
// cpu/kernels.h, defined in csrc/cuda/*.cu and called by bindings.cpp. There are none yet: whoever adds the first
// has setup.py compile that folder where it finds nvcc, and define FUSETUNE_HAS_CUDA then.
#pragma once

namespace fusetune {

#ifdef FUSETUNE_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

}  // namespace fusetune
