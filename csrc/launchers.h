// Launchers of the CUDA kernels in csrc/cuda, called by bindings.cpp: plain functions on device pointers and a
// stream, in the style of cpu/kernels.h. setup.py compiles csrc/cuda/*.cu and defines FUSETUNE_HAS_CUDA where it
// finds nvcc and such files.
#pragma once

namespace fusetune {

#ifdef FUSETUNE_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

}  // namespace fusetune
