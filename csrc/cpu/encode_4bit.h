// Nearest 4-bit code of scaled values, 16 values (8 bytes) a step, for each instruction set.
//
// The index of a value v is the number of the 15 boundaries b (midpoints of the sorted codebook) for which
// !(b >= v): this is torch.bucketize and sends NaN to 15, as bitsandbytes does. With 16-lane permutes the boundaries
// are searched in 4 steps; elsewhere 15 compares cost less than a search without them.
// Values need no clamping to [-1, 1]: all boundaries lie inside.
#pragma once
#include "isa/isa.h"

namespace fusetune {
namespace FUSETUNE_ISA {

struct Boundaries {
  float values[16];  // the 15 midpoints; the last entry is unused
  uint8_t code[16];  // index in the sorted codebook -> code
};

// nf4's codebook is sorted. fp4's codes are sign and magnitude, with two zeros (codes 0 and 8).
constexpr Boundaries kBoundaries[2] = {
    {{-0x1.b239b0p-1f, -0x1.38a4e0p-1f, -0x1.d70900p-2f, -0x1.5bd4ecp-2f, -0x1.e079d8p-3f, -0x1.1a7178p-3f,
      -0x1.74f0e2p-5f, 0x1.45f5fep-5f, 0x1.ec90c4p-4f, 0x1.a0cfc0p-3f, 0x1.2b05a8p-2f, 0x1.8ea7f2p-2f, 0x1.00da08p-1f,
      0x1.491b5ep-1f, 0x1.b913b4p-1f, 0.0f},
     {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    {{-0x1.aaaaacp-1f, -0x1.2aaaacp-1f, -0x1.aaaaacp-2f, -0x1.2aaaacp-2f, -0x1.aaaaacp-3f, -0x1.600000p-4f,
      -0x1.555556p-9f, 0.0f, 0x1.555556p-9f, 0x1.600000p-4f, 0x1.aaaaacp-3f, 0x1.2aaaacp-2f, 0x1.aaaaacp-2f,
      0x1.2aaaacp-1f, 0x1.aaaaacp-1f, 0.0f},
     {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}},
};

#if defined(FUSETUNE_ISA_AVX512)

struct Encoder {
  // Binary search in a tree of boundaries: a step's table is indexed by the bits found so far.
  __m512 root, step2, step3, step4;
  __m512i code;

  explicit Encoder(const Boundaries& b) {
    const float* v = b.values;
    root = _mm512_set1_ps(v[7]);
    step2 = _mm512_setr_ps(v[3], v[11], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    step3 = _mm512_setr_ps(v[1], v[5], v[9], v[13], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    step4 = _mm512_setr_ps(v[0], v[2], v[4], v[6], v[8], v[10], v[12], v[14], 0, 0, 0, 0, 0, 0, 0, 0);
    code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b.code)));
  }

  static __m512i descend(__m512i bits, __m512 boundary, __m512 v) {
    const __m512i twice = _mm512_add_epi32(bits, bits);
    const __mmask16 above = _mm512_cmp_ps_mask(boundary, v, _CMP_NGE_UQ);
    return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
  }

  void operator()(const float* x, float scale, uint8_t* packed) const {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale));
    __m512i index = descend(_mm512_setzero_si512(), root, v);
    index = descend(index, _mm512_permutexvar_ps(index, step2), v);
    index = descend(index, _mm512_permutexvar_ps(index, step3), v);
    index = descend(index, _mm512_permutexvar_ps(index, step4), v);
    const __m512i q = _mm512_permutexvar_epi32(index, code);
    // Two 32-bit codes make a 64-bit lane whose low byte becomes first << 4 | second.
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pairs));
  }
};

#elif defined(FUSETUNE_ISA_AVX2)

struct Encoder {
  const float* values;
  __m128i code;

  explicit Encoder(const Boundaries& b)
      : values(b.values), code(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b.code))) {}

  void operator()(const float* x, float scale, uint8_t* packed) const {
    const __m256 s = _mm256_set1_ps(scale);
    const __m256 v0 = _mm256_mul_ps(_mm256_loadu_ps(x), s), v1 = _mm256_mul_ps(_mm256_loadu_ps(x + 8), s);
    __m256i n0 = _mm256_setzero_si256(), n1 = n0;
    for (int i = 0; i < 15; ++i) {
      const __m256 b = _mm256_broadcast_ss(values + i);
      n0 = _mm256_sub_epi32(n0, _mm256_castps_si256(_mm256_cmp_ps(b, v0, _CMP_NGE_UQ)));
      n1 = _mm256_sub_epi32(n1, _mm256_castps_si256(_mm256_cmp_ps(b, v1, _CMP_NGE_UQ)));
    }
    // packs works within 128-bit halves; the permute restores the order of the 16-bit values.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(n0, n1), 0xd8);
    const __m128i index = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i q = _mm_shuffle_epi8(code, index);
    const __m128i pairs = _mm_maddubs_epi16(q, _mm_set1_epi16(0x0110));  // 16 * first + second
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm_packus_epi16(pairs, pairs));
  }
};

#elif defined(FUSETUNE_ISA_NEON)

struct Encoder {
  const float* values;
  uint8x16_t code;

  explicit Encoder(const Boundaries& b) : values(b.values), code(vld1q_u8(b.code)) {}

  void operator()(const float* x, float scale, uint8_t* packed) const {
    float32x4_t v[4];
    uint32x4_t below[4];  // boundaries >= v
    for (int j = 0; j < 4; ++j) {
      v[j] = vmulq_n_f32(vld1q_f32(x + 4 * j), scale);
      below[j] = vdupq_n_u32(15);
    }
    for (int i = 0; i < 15; ++i) {
      const float32x4_t b = vdupq_n_f32(values[i]);
      for (int j = 0; j < 4; ++j) below[j] = vaddq_u32(below[j], vcgeq_f32(b, v[j]));
    }
    const uint16x8_t low = vcombine_u16(vmovn_u32(below[0]), vmovn_u32(below[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32(below[2]), vmovn_u32(below[3]));
    const uint8x16_t q = vqtbl1q_u8(code, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
    const uint16x8_t pairs = vreinterpretq_u16_u8(q);  // first | second << 8
    vst1_u8(packed, vmovn_u16(vorrq_u16(vshlq_n_u16(pairs, 4), vshrq_n_u16(pairs, 8))));
  }
};

#else

struct Encoder {
  const Boundaries& b;

  explicit Encoder(const Boundaries& boundaries) : b(boundaries) {}

  uint8_t encode(float v) const {
    int index = 0;
    for (int i = 0; i < 15; ++i) index += !(b.values[i] >= v);
    return b.code[index];
  }

  void operator()(const float* x, float scale, uint8_t* packed) const {
    for (int i = 0; i < 8; ++i) {
      packed[i] = static_cast<uint8_t>(encode(x[2 * i] * scale) << 4 | encode(x[2 * i + 1] * scale));
    }
  }
};

#endif

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
