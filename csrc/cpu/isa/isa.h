// The primitives all CPU kernels are written in, for the instruction set this file is compiled for.
//
// Every kernel file is compiled once per instruction set with FUSETUNE_ISA naming its namespace. All that is
// defined here has internal linkage or lives in that namespace, so the linker can never put a function compiled
// for AVX-512 into the AVX2 build. Kernels open `namespace fusetune::FUSETUNE_ISA` and see, besides the
// functions below, `kLanes` (fp32 lanes), the vector types F (fp32), U (uint32) and Mask.
//
//   load(p) store(p, v)            p: float*, f16* or bf16*; conversion rounds to nearest even, NaN stays NaN
//   load_part(p, n) store_part     the first n lanes only (0 <= n <= kLanes), other lanes read as 0
//   set1 zero fma(a, b, c)=a*b+c   fma is one rounding, except on `scalar`
//   add sub mul div min max abs    hsum hmax (over the lanes)
//   gt(F, F) ge(U, U) -> Mask      select(mask, a, b) = mask ? a : b
//   load_u32 store_u32 set1_u32 iota  add bit_xor bit_or shl<n> shr<n>  mul_wide(a, b, hi, lo): 32 x 32 -> 64 bit
//   store_u8(p, U)                 the low byte of each lane
//   decode32(p, codebook, out)     16 bytes -> 32 codebook values in order, in 32 / kLanes vectors
//   scale_codebook(codebook, absmax)  the codebook of a block: decode32 with it gives value * absmax
//   to_pairs(a, b) zip_pairs(a, b) dot_pairs(a, b, c)  vectors of bf16 pairs (FUSETUNE_HAS_BF16_DOT): a then b rounded
//                                  to bf16; (a[i], b[i]) rounded; c + the sum of each pair's products
//   decode_words dot_words         kWords (64 or 128) values in 16-bit fixed point, for the dot product with as many
//                                  words of x stored in the order of word_element (x86 only: FUSETUNE_HAS_INT16)
//   decode_64_words                the first 64 of them only, for the end of a row
//   word_scales(a, b)              in every lane the factor of the 64 values it sums: a of the first, b of the others
//   transpose(v)                   kLanes x kLanes in place
//
// Kernels that come in two vector widths are templates over Wide or Narrow: the few operations a register tile
// needs, as static functions. Narrow has half the lanes where that is worth having (AVX-512, for M <= 8).
#pragma once
#include <cstdint>
#include <cstring>

#ifndef FUSETUNE_ISA
#error "kernel files are compiled per instruction set: define FUSETUNE_ISA"
#endif

#define FUSETUNE_INLINE static inline __attribute__((always_inline))
#define FUSETUNE_INLINE_METHOD inline __attribute__((always_inline))

namespace fusetune {
namespace FUSETUNE_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

FUSETUNE_INLINE float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
FUSETUNE_INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// One element to and from fp32, on every instruction set.
FUSETUNE_INLINE float to_float(float v) { return v; }
FUSETUNE_INLINE float to_float(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
FUSETUNE_INLINE float to_float(f16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}
FUSETUNE_INLINE void from_float(float v, float& out) { out = v; }
FUSETUNE_INLINE void from_float(float v, bf16& out) {
  const uint32_t bits = float_to_bits(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FUSETUNE_INLINE void from_float(float v, f16& out) {
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves value / 2^-24, rounded, in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune

#if defined(FUSETUNE_ISA_AVX512)
#include "avx512.h"
#elif defined(FUSETUNE_ISA_AVX2)
#include "avx2.h"
#elif defined(FUSETUNE_ISA_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

namespace fusetune {
namespace FUSETUNE_ISA {

struct Wide {
  using V = F;
  static constexpr int lanes = kLanes, elements = 1;
  FUSETUNE_INLINE V load(const float* p) { return FUSETUNE_ISA::load(p); }
  FUSETUNE_INLINE void store(float* p, V v) { FUSETUNE_ISA::store(p, v); }
  FUSETUNE_INLINE V set1(float v) { return FUSETUNE_ISA::set1(v); }
  FUSETUNE_INLINE V fma(V a, V b, V c) { return FUSETUNE_ISA::fma(a, b, c); }
  FUSETUNE_INLINE V add(V a, V b) { return FUSETUNE_ISA::add(a, b); }
};
#if defined(FUSETUNE_ISA_AVX512)
struct Narrow {
  using V = __m256;
  static constexpr int lanes = 8, elements = 1;
  FUSETUNE_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  FUSETUNE_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  FUSETUNE_INLINE V set1(float v) { return _mm256_set1_ps(v); }
  FUSETUNE_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  FUSETUNE_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
};
#else
using Narrow = Wide;
#endif

// What a GEMM's tiles multiply: vectors of floats, or of pairs of bf16, each pair in the place of a float. A pair's two
// products are summed into the fp32 accumulator (vdpbf16ps), which rounds to nearest and takes denormals for zero.
struct Floats {
  using WideVec = Wide;
  using NarrowVec = Narrow;
};
#if defined(FUSETUNE_HAS_BF16_DOT)
struct WidePairs : Wide {
  static constexpr int elements = 2;
  FUSETUNE_INLINE V fma(V a, V b, V c) { return dot_pairs(a, b, c); }
};
struct NarrowPairs : Narrow {
  static constexpr int elements = 2;
  FUSETUNE_INLINE V fma(V a, V b, V c) { return dot_pairs(a, b, c); }
};
struct Pairs {
  using WideVec = WidePairs;
  using NarrowVec = NarrowPairs;
  FUSETUNE_INLINE F to_pairs(F a, F b) { return FUSETUNE_ISA::to_pairs(a, b); }
  FUSETUNE_INLINE F zip_pairs(F a, F b) { return FUSETUNE_ISA::zip_pairs(a, b); }
};
#endif

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
