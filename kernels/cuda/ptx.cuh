// All inline assembly of the CUDA kernels, and what depends on the architecture they are compiled for.
//
// It is volatile throughout: mma wants the whole warp, so it may not sink into a branch, and a load that runs ahead of
// the multiplication has to stay there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fusetune {

#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;  // the host's pass over the source
#endif

// Whether tensor cores multiply T here: fp16 from sm_75, bf16 from sm_80.
template <class T>
constexpr bool kHasMma = kArch >= 800 || (kArch >= 750 && std::is_same_v<T, __half>);

// d += a b: d fp32 16x8, a 16x16 row-major, b 16x8 column-major. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0] row g, columns 2t and 2t+1; a[1] row g+8, the same columns; a[2], a[3] the same rows, columns 8 further;
//   b0 rows 2t and 2t+1 of column g; b1 rows 8 further;
//   d[0], d[1] row g, columns 2t and 2t+1; d[2], d[3] row g+8.
// The inner index may be permuted at will as long as a and b agree; the kernels do, to load 16 bytes at a time.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half> && kArch < 800) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 16 bytes that are read once: they need not displace what is read again from the L1 cache.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}

// Copies 16 bytes from global to shared memory, or writes zeros there without reading. On sm_80 and newer the copy
// runs on its own until copies_wait(); before, it goes through registers. Either way a barrier makes it visible.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool valid) {
  if constexpr (kArch >= 800) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
  }
}

// Waits for all copies of this thread.
__device__ __forceinline__ void copies_wait() {
  if constexpr (kArch >= 800) asm volatile("cp.async.wait_all;" ::: "memory");
}

// Two values rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

template <class T>
__device__ __forceinline__ T rounded(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

}  // namespace fusetune
