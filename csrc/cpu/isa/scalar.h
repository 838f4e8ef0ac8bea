// Portable primitives: one lane. The reference of the vector instruction sets, and the fallback of every CPU.
#pragma once
#include <cmath>

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kLanes = 1;
using F = float;
using U = uint32_t;
using Mask = bool;

template <class T>
FUSETUNE_INLINE F load(const T* p) {
  return to_float(*p);
}
template <class T>
FUSETUNE_INLINE void store(T* p, F v) {
  from_float(v, *p);
}
template <class T>
FUSETUNE_INLINE F load_part(const T* p, int n) {
  return n > 0 ? to_float(*p) : 0.f;
}
template <class T>
FUSETUNE_INLINE void store_part(T* p, F v, int n) {
  if (n > 0) from_float(v, *p);
}
FUSETUNE_INLINE F set1(float v) { return v; }
FUSETUNE_INLINE F zero() { return 0.f; }
// Not fused: without hardware FMA std::fma is a slow library call.
FUSETUNE_INLINE F fma(F a, F b, F c) { return a * b + c; }
FUSETUNE_INLINE F add(F a, F b) { return a + b; }
FUSETUNE_INLINE F sub(F a, F b) { return a - b; }
FUSETUNE_INLINE F mul(F a, F b) { return a * b; }
FUSETUNE_INLINE F div(F a, F b) { return a / b; }
FUSETUNE_INLINE F min(F a, F b) { return a < b ? a : b; }
FUSETUNE_INLINE F max(F a, F b) { return a > b ? a : b; }
FUSETUNE_INLINE F abs(F a) { return bits_to_float(float_to_bits(a) & 0x7fffffffu); }
FUSETUNE_INLINE float hsum(F v) { return v; }
FUSETUNE_INLINE float hmax(F v) { return v; }
FUSETUNE_INLINE Mask gt(F a, F b) { return a > b; }
FUSETUNE_INLINE F select(Mask m, F a, F b) { return m ? a : b; }

FUSETUNE_INLINE U load_u32(const uint32_t* p) { return *p; }
FUSETUNE_INLINE void store_u32(uint32_t* p, U v) { *p = v; }
FUSETUNE_INLINE U set1_u32(uint32_t v) { return v; }
FUSETUNE_INLINE U iota() { return 0; }
FUSETUNE_INLINE U add(U a, U b) { return a + b; }
FUSETUNE_INLINE U bit_xor(U a, U b) { return a ^ b; }
FUSETUNE_INLINE U bit_or(U a, U b) { return a | b; }
template <int n>
FUSETUNE_INLINE U shl(U a) {
  return a << n;
}
template <int n>
FUSETUNE_INLINE U shr(U a) {
  return a >> n;
}
FUSETUNE_INLINE void mul_wide(U a, U b, U& hi, U& lo) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(product >> 32);
  lo = static_cast<uint32_t>(product);
}
FUSETUNE_INLINE Mask ge(U a, U b) { return a >= b; }
FUSETUNE_INLINE U select(Mask m, U a, U b) { return m ? a : b; }
FUSETUNE_INLINE void store_u8(uint8_t* p, U v) { *p = static_cast<uint8_t>(v); }

struct Codebook {
  const float* values;
};
FUSETUNE_INLINE Codebook make_codebook(const float* values) { return {values}; }
FUSETUNE_INLINE void decode32(const uint8_t* p, const Codebook& code, F (&out)[32]) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = code.values[p[i] >> 4];
    out[2 * i + 1] = code.values[p[i] & 15];
  }
}

struct ScaledCodebook {
  const Codebook* code;
  F scale;
};
FUSETUNE_INLINE ScaledCodebook scale_codebook(const Codebook& code, float scale) { return {&code, set1(scale)}; }
FUSETUNE_INLINE void decode32(const uint8_t* p, const ScaledCodebook& scaled, F (&out)[32 / kLanes]) {
  decode32(p, *scaled.code, out);
  for (F& v : out) v = mul(v, scaled.scale);
}

FUSETUNE_INLINE void transpose(F (&)[1]) {}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
