// AVX-512 F/BW/VL/DQ primitives: 16 lanes. With FUSETUNE_ISA_AVX512_BF16 also BF16, VNNI and VBMI (Zen 4, Sapphire
// Rapids and newer).
#pragma once
// GCC 12's own AVX-512 header warns about its undefined pass-through operands.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kLanes = 16;
using F = __m512;
using U = __m512i;
using Mask = __mmask16;

FUSETUNE_INLINE Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }

FUSETUNE_INLINE F from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FUSETUNE_INLINE __m256i to_bf16(F v) {
  const U bits = _mm512_castps_si512(v);
  const U odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const U rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const U quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

FUSETUNE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FUSETUNE_INLINE F load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FUSETUNE_INLINE F load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FUSETUNE_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
FUSETUNE_INLINE void store(f16* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
FUSETUNE_INLINE void store(bf16* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }

FUSETUNE_INLINE F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FUSETUNE_INLINE F load_part(const f16* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FUSETUNE_INLINE F load_part(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
FUSETUNE_INLINE void store_part(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
FUSETUNE_INLINE void store_part(f16* p, F v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
FUSETUNE_INLINE void store_part(bf16* p, F v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(v)); }

FUSETUNE_INLINE F set1(float v) { return _mm512_set1_ps(v); }
FUSETUNE_INLINE F zero() { return _mm512_setzero_ps(); }
FUSETUNE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FUSETUNE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FUSETUNE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FUSETUNE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FUSETUNE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
FUSETUNE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
FUSETUNE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
FUSETUNE_INLINE F abs(F a) { return _mm512_abs_ps(a); }
FUSETUNE_INLINE float hsum(F v) { return _mm512_reduce_add_ps(v); }
FUSETUNE_INLINE float hmax(F v) { return _mm512_reduce_max_ps(v); }
FUSETUNE_INLINE Mask gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
FUSETUNE_INLINE F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }

FUSETUNE_INLINE U load_u32(const uint32_t* p) { return _mm512_loadu_si512(p); }
FUSETUNE_INLINE void store_u32(uint32_t* p, U v) { _mm512_storeu_si512(p, v); }
FUSETUNE_INLINE U set1_u32(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
FUSETUNE_INLINE U iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
FUSETUNE_INLINE U add(U a, U b) { return _mm512_add_epi32(a, b); }
FUSETUNE_INLINE U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
FUSETUNE_INLINE U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
template <int n>
FUSETUNE_INLINE U shl(U a) {
  return _mm512_slli_epi32(a, n);
}
template <int n>
FUSETUNE_INLINE U shr(U a) {
  return _mm512_srli_epi32(a, n);
}
FUSETUNE_INLINE void mul_wide(U a, U b, U& hi, U& lo) {
  const U even = _mm512_mul_epu32(a, b);
  const U odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  hi = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  lo = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
FUSETUNE_INLINE Mask ge(U a, U b) { return _mm512_cmpge_epu32_mask(a, b); }
FUSETUNE_INLINE U select(Mask m, U a, U b) { return _mm512_mask_blend_epi32(m, b, a); }
FUSETUNE_INLINE void store_u8(uint8_t* p, U v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

// vpermps looks up all 16 entries by the low four bits of each lane.
struct Codebook {
  F values;
};
FUSETUNE_INLINE Codebook make_codebook(const float* values) { return {_mm512_loadu_ps(values)}; }

// 8 bytes -> 16 values: lanes 0-7 hold the first dword, lanes 8-15 the second, each shifted to its own nibble. Both
// broadcasts are loads, which leaves one shift and one permute, neither of which an FMA waits for on Zen 5.
FUSETUNE_INLINE F decode16_beside_fma(const uint8_t* p, const Codebook& code) {
  const U shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const U dwords =
      _mm512_mask_broadcastd_epi32(_mm512_broadcastd_epi32(_mm_loadu_si32(p)), 0xff00, _mm_loadu_si32(p + 4));
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords, shifts), code.values);
}
#if defined(FUSETUNE_ISA_AVX512_BF16)
// The same with one load less: it puts all bytes into every lane's qword, from which each lane takes the eight bits that
// begin with its nibble. One multishift, which takes an FMA's place on Zen 5, and one permute.
FUSETUNE_INLINE F decode16(const uint8_t* p, const Codebook& code) {
  const U first_bits = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56);
  int64_t bytes;
  memcpy(&bytes, p, 8);
  return _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(first_bits, _mm512_set1_epi64(bytes)), code.values);
}
#else
FUSETUNE_INLINE F decode16(const uint8_t* p, const Codebook& code) { return decode16_beside_fma(p, code); }
#endif
FUSETUNE_INLINE void decode32(const uint8_t* p, const Codebook& code, F (&out)[2]) {
  out[0] = decode16(p, code);
  out[1] = decode16(p + 8, code);
}

// Scaling the 16 values instead of what is looked up: one multiplication per block.
using ScaledCodebook = Codebook;
FUSETUNE_INLINE ScaledCodebook scale_codebook(const Codebook& code, float scale) {
  return {_mm512_mul_ps(code.values, _mm512_set1_ps(scale))};
}

#if defined(FUSETUNE_ISA_AVX512_BF16)
#define FUSETUNE_HAS_BF16_DOT 1
FUSETUNE_INLINE F to_pairs(F a, F b) { return reinterpret_cast<F>(_mm512_cvtne2ps_pbh(b, a)); }
FUSETUNE_INLINE F zip_pairs(F a, F b) {
  const U order = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                    0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(to_pairs(a, b))));
}
FUSETUNE_INLINE F dot_pairs(F a, F b, F c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
FUSETUNE_INLINE __m256 dot_pairs(__m256 a, __m256 b, __m256 c) {
  return _mm256_dpbf16_ps(c, reinterpret_cast<__m256bh>(a), reinterpret_cast<__m256bh>(b));
}
#endif

#if defined(FUSETUNE_ISA_AVX512_BF16)
// Any table of 256 floats, looked up 64 at a time: each of a float's four bytes has a table of its own, in four
// registers. A chain of scalar loads takes four times as long.
#define FUSETUNE_HAS_BYTE_LOOKUP 1
struct ByteTable {
  alignas(64) uint8_t planes[4][256];
};
static inline void make_byte_table(const float* values, ByteTable& table) {
  for (int i = 0; i < 256; ++i) {
    uint8_t bytes[4];
    memcpy(bytes, values + i, 4);
    for (int p = 0; p < 4; ++p) table.planes[p][i] = bytes[p];
  }
}
FUSETUNE_INLINE void lookup_64(const ByteTable& table, const uint8_t* q, F (&out)[4]) {
  // The unpacking below works within 128 bits: their dwords change places first.
  const U order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const U index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(q));
  const __mmask64 upper = _mm512_movepi8_mask(index);
  U plane[4];
  for (int p = 0; p < 4; ++p) {
    const uint8_t* t = table.planes[p];
    const U below = _mm512_permutex2var_epi8(_mm512_load_si512(t), index, _mm512_load_si512(t + 64));
    const U above = _mm512_permutex2var_epi8(_mm512_load_si512(t + 128), index, _mm512_load_si512(t + 192));
    plane[p] = _mm512_mask_blend_epi8(upper, below, above);
  }
  const U a = _mm512_unpacklo_epi8(plane[0], plane[1]), b = _mm512_unpacklo_epi8(plane[2], plane[3]);
  const U c = _mm512_unpackhi_epi8(plane[0], plane[1]), d = _mm512_unpackhi_epi8(plane[2], plane[3]);
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
  out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
  out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(c, d));
  out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(c, d));
}
#endif

// 128 values in 16-bit fixed point from one vector of 32 words: nibble after nibble of each word is shifted to where
// vpermw reads. The first 64 values are in the lower half of the lanes.
#define FUSETUNE_HAS_INT16 1
constexpr int kWords = 128, kWordVectors = 4;
struct WordCodebook {
  U values;  // twice over: vpermw reads five bits of a nibble's four
};
FUSETUNE_INLINE WordCodebook make_word_codebook(const int16_t* values) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)))};
}
FUSETUNE_INLINE int word_element(int position) { return position % 32 * 4 + (position / 32 ^ 1); }
FUSETUNE_INLINE void decode_words_of(U bytes, const WordCodebook& code, U (&out)[kWordVectors]) {
  out[0] = _mm512_permutexvar_epi16(bytes, code.values);
  out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), code.values);
  out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), code.values);
  out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 12), code.values);
}
FUSETUNE_INLINE void decode_words(const uint8_t* p, const WordCodebook& code, U (&out)[kWordVectors]) {
  decode_words_of(_mm512_loadu_si512(p), code, out);
}
FUSETUNE_INLINE void decode_64_words(const uint8_t* p, const WordCodebook& code, U (&out)[kWordVectors]) {
  decode_words_of(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), code, out);
}
FUSETUNE_INLINE F word_scales(float first, float second) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second));
}
FUSETUNE_INLINE F dot_words(const U (&w)[kWordVectors], const int16_t* x) {
  U sum = _mm512_madd_epi16(w[0], _mm512_loadu_si512(x));
  for (int v = 1; v < kWordVectors; ++v) {
#if defined(FUSETUNE_ISA_AVX512_BF16)
    sum = _mm512_dpwssd_epi32(sum, w[v], _mm512_loadu_si512(x + 32 * v));
#else
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w[v], _mm512_loadu_si512(x + 32 * v)));
#endif
  }
  return _mm512_cvtepi32_ps(sum);
}

FUSETUNE_INLINE void transpose(F (&v)[16]) {
  F t[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks within each 128-bit lane
    const F a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const F c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // then the 4 x 4 of 128-bit lanes
    const F a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xee);
    const F c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x44), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xee);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
