// NEON (aarch64) primitives: 4 lanes.
#pragma once
#include <arm_neon.h>

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kLanes = 4;
using F = float32x4_t;
using U = uint32x4_t;
using Mask = uint32x4_t;  // all bits of a lane set or clear

FUSETUNE_INLINE F from_16(uint16x4_t bits, f16) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
FUSETUNE_INLINE F from_16(uint16x4_t bits, bf16) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
FUSETUNE_INLINE uint16x4_t to_16(F v, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
FUSETUNE_INLINE uint16x4_t to_16(F v, bf16) {
  const U bits = vreinterpretq_u32_f32(v);
  const U odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const U rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const U quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}

FUSETUNE_INLINE F load(const float* p) { return vld1q_f32(p); }
FUSETUNE_INLINE void store(float* p, F v) { vst1q_f32(p, v); }
template <class T>
FUSETUNE_INLINE F load(const T* p) {
  return from_16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), T{});
}
template <class T>
FUSETUNE_INLINE void store(T* p, F v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), to_16(v, T{}));
}
template <class T>
FUSETUNE_INLINE F load_part(const T* p, int n) {
  T buffer[4] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FUSETUNE_INLINE void store_part(T* p, F v, int n) {
  T buffer[4];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

FUSETUNE_INLINE F set1(float v) { return vdupq_n_f32(v); }
FUSETUNE_INLINE F zero() { return vdupq_n_f32(0.f); }
FUSETUNE_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
FUSETUNE_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
FUSETUNE_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
FUSETUNE_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
FUSETUNE_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
FUSETUNE_INLINE F min(F a, F b) { return vminq_f32(a, b); }
FUSETUNE_INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
FUSETUNE_INLINE F abs(F a) { return vabsq_f32(a); }
FUSETUNE_INLINE float hsum(F v) { return vaddvq_f32(v); }
FUSETUNE_INLINE float hmax(F v) { return vmaxvq_f32(v); }
FUSETUNE_INLINE Mask gt(F a, F b) { return vcgtq_f32(a, b); }
FUSETUNE_INLINE F select(Mask m, F a, F b) { return vbslq_f32(m, a, b); }

FUSETUNE_INLINE U load_u32(const uint32_t* p) { return vld1q_u32(p); }
FUSETUNE_INLINE void store_u32(uint32_t* p, U v) { vst1q_u32(p, v); }
FUSETUNE_INLINE U set1_u32(uint32_t v) { return vdupq_n_u32(v); }
FUSETUNE_INLINE U iota() {
  const uint32_t lanes[4] = {0, 1, 2, 3};
  return vld1q_u32(lanes);
}
FUSETUNE_INLINE U add(U a, U b) { return vaddq_u32(a, b); }
FUSETUNE_INLINE U bit_xor(U a, U b) { return veorq_u32(a, b); }
FUSETUNE_INLINE U bit_or(U a, U b) { return vorrq_u32(a, b); }
template <int n>
FUSETUNE_INLINE U shl(U a) {
  return vshlq_n_u32(a, n);
}
template <int n>
FUSETUNE_INLINE U shr(U a) {
  return vshrq_n_u32(a, n);
}
FUSETUNE_INLINE void mul_wide(U a, U b, U& hi, U& lo) {
  const U first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
  const U second = vreinterpretq_u32_u64(vmull_high_u32(a, b));
  lo = vuzp1q_u32(first, second);
  hi = vuzp2q_u32(first, second);
}
FUSETUNE_INLINE Mask ge(U a, U b) { return vcgeq_u32(a, b); }
FUSETUNE_INLINE U select(Mask m, U a, U b) { return vbslq_u32(m, a, b); }
FUSETUNE_INLINE void store_u8(uint8_t* p, U v) {
  const uint16x4_t words = vmovn_u32(v);
  vst1_lane_u32(reinterpret_cast<uint32_t*>(p), vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
}

// The four bytes of the 16 values as four planes, each looked up by one tbl and put together by zips.
struct Codebook {
  uint8x16_t byte0, byte1, byte2, byte3;  // named: GCC copies an array through the stack
};
FUSETUNE_INLINE Codebook make_codebook(const float* values) {
  const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(values));
  return {bytes.val[0], bytes.val[1], bytes.val[2], bytes.val[3]};
}
FUSETUNE_INLINE void decode32(const uint8_t* p, const Codebook& code, F (&out)[8]) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint8x16_t high = vshrq_n_u8(bytes, 4), low = vandq_u8(bytes, vdupq_n_u8(15));
  const uint8x16_t codes[2] = {vzip1q_u8(high, low), vzip2q_u8(high, low)};
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t b0 = vqtbl1q_u8(code.byte0, codes[i]), b1 = vqtbl1q_u8(code.byte1, codes[i]);
    const uint8x16_t b2 = vqtbl1q_u8(code.byte2, codes[i]), b3 = vqtbl1q_u8(code.byte3, codes[i]);
    const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low23 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
    const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
    const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
    out[4 * i] = vreinterpretq_f32_u16(vzip1q_u16(low01, low23));
    out[4 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(low01, low23));
    out[4 * i + 2] = vreinterpretq_f32_u16(vzip1q_u16(high01, high23));
    out[4 * i + 3] = vreinterpretq_f32_u16(vzip2q_u16(high01, high23));
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

FUSETUNE_INLINE void transpose(F (&v)[4]) {
  const F a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
  const F c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
  v[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
  v[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
  v[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
  v[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
