// AMX tiles of bf16 (Sapphire Rapids and newer): sixteen rows of 64 bytes, multiplied 16 x 16 x 32 at a time, and the
// decoding of 4-bit weights into them. Included where FUSETUNE_ISA_AMX is compiled, beside the AVX-512 primitives.
//
// A tile of the left operand holds 16 rows of 32 elements along the reduction, one of the right operand 16 pairs of
// steps of the reduction for 16 columns, each pair in a dword. In memory tiles follow each other without gaps.
#pragma once
#include <type_traits>

#include "../rows.h"
#include "isa.h"

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int64_t kTile = 16, kTileDepth = 32, kTileElements = kTile * kTileDepth;

// A thread's tile registers, all of the full size, while this lives. torch's own kernels set them up for themselves.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes_of_row[t] = 64, config.rows[t] = kTile;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// c [16 rows, 16 columns] += a . b over `steps` tiles; rows of tiles of a, and columns of b, lie `next` elements apart.
// Four sums in turn hide the latency of a product, 52 cycles for the 16 that it keeps the unit busy.
template <int rows, int columns>
__attribute__((noinline)) static void multiply_tiles(const bf16* a, const bf16* b, int64_t next, int64_t steps,
                                                     float* c, int64_t ld) {
  static_assert(rows <= 2 && columns <= 2, "eight registers");
  const int64_t c_bytes = ld * 4;
  _tile_loadd(0, c, c_bytes);
  if constexpr (columns == 2) _tile_loadd(1, c + kTile, c_bytes);
  if constexpr (rows == 2) _tile_loadd(2, c + kTile * ld, c_bytes);
  if constexpr (rows == 2 && columns == 2) _tile_loadd(3, c + kTile * ld + kTile, c_bytes);
  for (int64_t s = 0; s < steps; ++s, a += kTileElements, b += kTileElements) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns == 2) {
      _tile_loadd(7, b + next, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows == 2) {
      _tile_loadd(5, a + next, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (columns == 2) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (rows == 2) _tile_stored(2, c + kTile * ld, c_bytes);
  if constexpr (rows == 2 && columns == 2) _tile_stored(3, c + kTile * ld + kTile, c_bytes);
}

// 16 bytes in each 128 bits.
FUSETUNE_INLINE U four_times(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Looks up the low five bits of each word among 32 values in bf16.
FUSETUNE_INLINE U look_up_words(U words, U values) { return _mm512_permutexvar_epi16(words, values); }
FUSETUNE_INLINE void store_words(bf16* p, U v) { _mm512_storeu_si512(p, v); }

// Two codebooks of 16, scaled and rounded to bf16, in one register.
FUSETUNE_INLINE U word_codebooks(const Codebook& code, float first, float second) {
  return _mm512_castps_si512(to_pairs(mul(code.values, set1(first)), mul(code.values, set1(second))));
}

// Rows [row, row + count) of a 4-bit weight, from d of the reduction on, as tiles of a left operand: to [2][steps][16 x
// 32]. A row of them takes a load, two shuffles, a shift and a store. Rows behind `count` stay as they are. Asks for the
// codes `ahead` bytes further on.
template <bool nested>
static inline void decode_rows(const Rows& w, int64_t row, int64_t count, int64_t d, int64_t steps, int64_t ahead,
                               bf16* to) {
  const Weight4bit weight = *w.quantized;
  // Element k of the words lies in byte k / 2, the even ones in its upper half. The fifth bit is the other element's:
  // the codebook stands twice.
  const U bytes = _mm512_setr_epi32(  //
      0x80008000, 0x80018001, 0x80028002, 0x80038003, 0x80048004, 0x80058005, 0x80068006, 0x80078007, 0x80088008,
      0x80098009, 0x800a800a, 0x800b800b, 0x800c800c, 0x800d800d, 0x800e800e, 0x800f800f);
  const U shifts = set1_u32(4);
  for (int64_t r = 0; r < count; ++r) {
    const auto first = static_cast<uint64_t>((row + r) * w.ld + d);
    const uint8_t* p = weight.packed + first / 2;
    bf16* out = to + (r / kTile * steps * kTile + r % kTile) * kTileDepth;
    uint64_t block = ~uint64_t{0};
    U values = set1_u32(0);
    for (int64_t s = 0; s < steps; ++s, p += 16, out += kTileElements) {
      const uint64_t now = (first + static_cast<uint64_t>(s * kTileDepth)) >> w.block_shift;
      if (now != block) {
        const float absmax = block_absmax<nested>(weight, w.nested_shift, now);
        values = word_codebooks(w.code, absmax, absmax);
        block = now;
      }
      if (s % 4 == 0) __builtin_prefetch(p + ahead);
      const U words = _mm512_srlv_epi16(_mm512_shuffle_epi8(four_times(p), bytes), shifts);
      store_words(out, look_up_words(words, values));
    }
  }
}

// The same rows as pairs of steps of the reduction, in 32 columns from `column` on, as tiles of a right operand: to
// [2][steps][16 x 32]. Rows behind `count` are zeros.
template <bool nested>
static inline void decode_row_pairs(const Rows& w, int64_t row, int64_t count, int64_t column, int64_t steps,
                                    int64_t ahead, bf16* to) {
  const Weight4bit weight = *w.quantized;
  // Column k's nibbles lie in byte k / 2 of both rows, the even ones' in its upper half: the first row's becomes the
  // lower word of dword k, the second row's the upper one, which looks up the second codebook.
  const U lower = _mm512_setr_epi32(  //
      0x80808000, 0x80808000, 0x80808001, 0x80808001, 0x80808002, 0x80808002, 0x80808003, 0x80808003, 0x80808004,
      0x80808004, 0x80808005, 0x80808005, 0x80808006, 0x80808006, 0x80808007, 0x80808007);
  const U upper = _mm512_slli_epi32(lower, 16), next = set1_u32(0x00080008);
  const U shifts = _mm512_set1_epi64(0x0000000000040004), nibbles = set1_u32(0x000f000f), second = set1_u32(0x00100000);
  constexpr __mmask64 kUpper = 0xccccccccccccccccull;
  const auto block_of = [&](int64_t r) {
    return static_cast<uint64_t>((row + r) * w.ld + column) >> w.block_shift;
  };
  for (int64_t r = 0; r < steps * kTileDepth; r += 2) {
    bf16* out = to + r / kTileDepth * kTileElements + r % kTileDepth / 2 * kTileDepth;
    if (r >= count) {
      store_words(out, set1_u32(0));
      store_words(out + steps * kTileElements, set1_u32(0));
      continue;
    }
    const bool pair = r + 1 < count;
    const uint8_t* p = weight.packed + ((row + r) * w.ld + column) / 2;
    const uint8_t* q = pair ? p + w.ld / 2 : p;
    __builtin_prefetch(p + ahead);
    __builtin_prefetch(q + ahead);
    const U values = word_codebooks(w.code, block_absmax<nested>(weight, w.nested_shift, block_of(r)),
                                    pair ? block_absmax<nested>(weight, w.nested_shift, block_of(r + 1)) : 0.f);
    const U a = four_times(p), b = four_times(q);
    const auto columns_of = [&](U low, U high) __attribute__((always_inline)) {
      const U both = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(a, low), kUpper, b, high);
      const U words = _mm512_srlv_epi16(both, shifts);
      const U places = _mm512_ternarylogic_epi32(words, nibbles, second, 0xea);  // words & nibbles | second
      return look_up_words(places, values);
    };
    store_words(out, columns_of(lower, upper));
    store_words(out + steps * kTileElements, columns_of(_mm512_or_si512(lower, next), _mm512_or_si512(upper, next)));
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
