// AVX2 + FMA + F16C primitives: 8 lanes.
#pragma once
#include <immintrin.h>

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kLanes = 8;
using F = __m256;
using U = __m256i;
using Mask = __m256i;  // all bits of a lane set or clear

FUSETUNE_INLINE Mask first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FUSETUNE_INLINE F from_16(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
FUSETUNE_INLINE F from_16(__m128i bits, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FUSETUNE_INLINE __m128i to_16(F v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FUSETUNE_INLINE __m128i to_16(F v, bf16) {
  const U bits = _mm256_castps_si256(v);
  const U odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const U rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const U quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const Mask nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const U words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

FUSETUNE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
FUSETUNE_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
FUSETUNE_INLINE F load_part(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
FUSETUNE_INLINE void store_part(float* p, F v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }

template <class T>
FUSETUNE_INLINE F load(const T* p) {
  return from_16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
FUSETUNE_INLINE void store(T* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_16(v, T{}));
}
template <class T>
FUSETUNE_INLINE F load_part(const T* p, int n) {
  alignas(16) T buffer[8] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FUSETUNE_INLINE void store_part(T* p, F v, int n) {
  alignas(16) T buffer[8];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

FUSETUNE_INLINE F set1(float v) { return _mm256_set1_ps(v); }
FUSETUNE_INLINE F zero() { return _mm256_setzero_ps(); }
FUSETUNE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FUSETUNE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FUSETUNE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FUSETUNE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FUSETUNE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
FUSETUNE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
FUSETUNE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FUSETUNE_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
FUSETUNE_INLINE float hsum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FUSETUNE_INLINE float hmax(F v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
FUSETUNE_INLINE Mask gt(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
FUSETUNE_INLINE F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }

FUSETUNE_INLINE U load_u32(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FUSETUNE_INLINE void store_u32(uint32_t* p, U v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
FUSETUNE_INLINE U set1_u32(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
FUSETUNE_INLINE U iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FUSETUNE_INLINE U add(U a, U b) { return _mm256_add_epi32(a, b); }
FUSETUNE_INLINE U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
FUSETUNE_INLINE U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
template <int n>
FUSETUNE_INLINE U shl(U a) {
  return _mm256_slli_epi32(a, n);
}
template <int n>
FUSETUNE_INLINE U shr(U a) {
  return _mm256_srli_epi32(a, n);
}
FUSETUNE_INLINE void mul_wide(U a, U b, U& hi, U& lo) {
  const U even = _mm256_mul_epu32(a, b);
  const U odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
FUSETUNE_INLINE Mask ge(U a, U b) { return _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a); }
FUSETUNE_INLINE U select(Mask m, U a, U b) { return _mm256_blendv_epi8(b, a, m); }
FUSETUNE_INLINE void store_u8(uint8_t* p, U v) {
  const U low = _mm256_and_si256(v, _mm256_set1_epi32(0xff));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

// The four bytes of the 16 values as four planes, each looked up by one pshufb and put together by unpacks: exact,
// and faster than two vpermps and a blend.
struct Codebook {
  U byte0, byte1, byte2, byte3;  // named: GCC copies an array through the stack
};
FUSETUNE_INLINE U codebook_plane(const float* values, int byte) {
  alignas(16) uint8_t plane[16];
  for (int i = 0; i < 16; ++i) plane[i] = static_cast<uint8_t>(float_to_bits(values[i]) >> (8 * byte));
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(plane)));
}
FUSETUNE_INLINE Codebook make_codebook(const float* values) {
  return {codebook_plane(values, 0), codebook_plane(values, 1), codebook_plane(values, 2), codebook_plane(values, 3)};
}
// 16 bytes of nibbles -> a byte for each of the 32. Both 128-bit lanes need 8 bytes, spread so that unpacking leaves
// the values in order: quads 0, 2, 4, 6 of four values in the low lane and 1, 3, 5, 7 in the high lane.
FUSETUNE_INLINE U spread_nibbles(__m128i bytes) {
  const U spread = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes),
                                       _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3,
                                                        6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
  // Each byte stands twice: keep its high nibble in the first, its low nibble in the second.
  return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(spread, 4), _mm256_set1_epi16(0x000f)),
                         _mm256_and_si256(spread, _mm256_set1_epi16(0x0f00)));
}
// decode32, scaled, in four parts of some ten instructions that need three registers at a time.
struct DecodeParts {
  U codes, low01, high01, low23, high23;

  FUSETUNE_INLINE_METHOD void unpack_nibbles(const uint8_t* p) {
    codes = spread_nibbles(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  FUSETUNE_INLINE_METHOD void look_up_low(const Codebook& code) {
    const U b0 = _mm256_shuffle_epi8(code.byte0, codes), b1 = _mm256_shuffle_epi8(code.byte1, codes);
    low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
  }
  FUSETUNE_INLINE_METHOD void look_up_high(const Codebook& code) {
    const U b2 = _mm256_shuffle_epi8(code.byte2, codes), b3 = _mm256_shuffle_epi8(code.byte3, codes);
    low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
  }
  FUSETUNE_INLINE_METHOD void store_scaled(float scale, float* dst) const {
    const F factor = set1(scale);
    store(dst, mul(_mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23)), factor));
    store(dst + 8, mul(_mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23)), factor));
    store(dst + 16, mul(_mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23)), factor));
    store(dst + 24, mul(_mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23)), factor));
  }
};

// codes: as spread_nibbles leaves them, or the even ones in the low lane and the odd ones in the high lane.
FUSETUNE_INLINE void look_up_codes(const U& codes, const Codebook& code, F (&out)[4]) {
  DecodeParts parts;
  parts.codes = codes;
  parts.look_up_low(code);
  parts.look_up_high(code);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(parts.low01, parts.low23));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(parts.low01, parts.low23));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(parts.high01, parts.high23));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(parts.high01, parts.high23));
}
FUSETUNE_INLINE void decode32(const uint8_t* p, const Codebook& code, F (&out)[4]) {
  look_up_codes(spread_nibbles(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), code, out);
}

// Of each eight first those with even indices, then the odd ones: what cutting bytes in two gives, without spreading
// them. For sums over the elements, with the other operand in that order too.
#define FUSETUNE_HAS_EVEN_ODD 1
FUSETUNE_INLINE F even_odd(F v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); }
FUSETUNE_INLINE void decode32_even_odd(const uint8_t* p, const Codebook& code, F (&out)[4]) {
  const U bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const U shifted = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0));
  look_up_codes(_mm256_and_si256(shifted, _mm256_set1_epi8(15)), code, out);
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

// 64 values in 16-bit fixed point: the high nibbles of 32 bytes, then the low ones, each in the order that unpacking
// the two byte planes gives.
#define FUSETUNE_HAS_INT16 1
constexpr int kWords = 64, kWordVectors = 4;
struct WordCodebook {
  U low, high;
};
FUSETUNE_INLINE WordCodebook make_word_codebook(const int16_t* values) {
  alignas(16) uint8_t low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    low[i] = static_cast<uint8_t>(values[i]);
    high[i] = static_cast<uint8_t>(values[i] >> 8);
  }
  return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low))),
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)))};
}
FUSETUNE_INLINE int word_element(int position) {
  const int vector = position / 16, word = position % 16;
  const int byte = word % 8 + word / 8 * 16 + vector % 2 * 8;
  return 2 * byte + vector / 2;
}
FUSETUNE_INLINE void decode_words(const uint8_t* p, const WordCodebook& code, U (&out)[kWordVectors]) {
  const U bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
  const U first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), second = _mm256_and_si256(bytes, mask);
  const U low0 = _mm256_shuffle_epi8(code.low, first), high0 = _mm256_shuffle_epi8(code.high, first);
  const U low1 = _mm256_shuffle_epi8(code.low, second), high1 = _mm256_shuffle_epi8(code.high, second);
  out[0] = _mm256_unpacklo_epi8(low0, high0);
  out[1] = _mm256_unpackhi_epi8(low0, high0);
  out[2] = _mm256_unpacklo_epi8(low1, high1);
  out[3] = _mm256_unpackhi_epi8(low1, high1);
}
FUSETUNE_INLINE void decode_64_words(const uint8_t* p, const WordCodebook& code, U (&out)[kWordVectors]) {
  decode_words(p, code, out);
}
FUSETUNE_INLINE F word_scales(float first, float) { return _mm256_set1_ps(first); }
FUSETUNE_INLINE F dot_words(const U (&w)[kWordVectors], const int16_t* x) {
  U sum = _mm256_setzero_si256();
  for (int v = 0; v < kWordVectors; ++v) {
    const U from_x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * v));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w[v], from_x));
  }
  return _mm256_cvtepi32_ps(sum);
}

FUSETUNE_INLINE void transpose(F (&v)[8]) {
  F t[8];
  for (int i = 0; i < 8; i += 4) {
    const F a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const F c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
