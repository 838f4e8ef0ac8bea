// y = x . W^T for up to 8 rows of x, in 16-bit fixed point: the opt-in decode path.
//
// Each 64 activations share a scale and become int16; the codebook becomes 14-bit integers; multiply-add pairs words
// into int32 and every 64 products are scaled into the fp32 accumulator. The error, about 1e-4 of the result's norm, is
// that of the codebook's rounding. Tiling and bytes are those of gemv.h; per 64 weights it needs a third of the
// instructions.
#include <cmath>

#include "gemv.h"

namespace fusetune {
namespace FUSETUNE_ISA {
#if defined(FUSETUNE_HAS_INT16)
namespace {

constexpr int kWords = 64;
// Eight products of 15-bit and 13-bit magnitudes fit an int32 lane: 8 * 32767 * 8191 < 2^31.
constexpr float kMaxWord = 32767.f, kMaxCode = 8191.f;

// words [k / 64][m][64], scales [k / 64][m]. False if x is not finite.
bool quantize_rows(const Matrix& x, int64_t m, int64_t k, float scale, int16_t* words, float* scales) {
  for (int64_t c = 0; c < k / kWords; ++c) {
    for (int64_t s = 0; s < m; ++s, words += kWords, ++scales) {
      alignas(64) float v[kWords] = {};
      load_floats(x.data, x.dtype, s * x.ld + c * kWords, kWords, v);
      F largest = zero();
      for (int i = 0; i < kWords; i += kLanes) largest = max(largest, abs(load(v + i)));
      // A NaN may be lost in max, but not in a sum of products with zero.
      F check = zero();
      for (int i = 0; i < kWords; i += kLanes) check = fma(load(v + i), zero(), check);
      if (hsum(check) != 0.f) return false;
      const float absmax = hmax(largest), inverse = absmax > 0 ? kMaxWord / absmax : 0.f;
      if (!std::isfinite(inverse)) return false;
      *scales = absmax / kMaxWord * scale;
      for (int i = 0; i < kWords; ++i) {
        // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
        words[i] = static_cast<int16_t>(float_to_bits(v[word_element(i)] * inverse + 12582912.f));
      }
    }
  }
  return true;
}

struct WordArgs {
  const int16_t* words;
  const float* scales;
  WordCodebook code;
};

// y[0 .. m)[row .. row + rows)
template <int m, int rows, bool nested>
void dot_rows_of_words(const Row4bit<nested>& source, const WordArgs& x, const GemvArgs& args, int64_t row) {
  RowAbsmax<nested> state[rows];
  F acc[rows][m];
  for (auto& of_row : acc) {
    for (F& v : of_row) v = zero();
  }
  const WordCodebook code = x.code;
  const int16_t* words = x.words;
  const float* scales = x.scales;
  for (int64_t i = 0; i < args.k;) {
    const int64_t end = std::min(i + source.span(), args.k);
    for (int r = 0; r < rows; ++r) source.prepare(state[r], row + r, i);
#pragma GCC unroll 4
    for (; i < end; i += kWords, words += m * kWords, scales += m) {
      F absmax[rows];
      U w[rows][kWordVectors];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const uint64_t at = static_cast<uint64_t>((row + r) * args.k + i);
        prefetch_4bit<nested>(source.w, source.shift, at);
        absmax[r] = set1(state[r].at(source.w, at >> source.shift));
        decode_words(source.w.packed + at / 2, code, w[r]);
      }
#pragma GCC unroll 8
      for (int s = 0; s < m; ++s) {
        const F scale = set1(scales[s]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          acc[r][s] = fma(dot_words(w[r], words + s * kWords), mul(absmax[r], scale), acc[r][s]);
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) finish_row(args, row + r, acc[r]);
}

template <int m, bool nested>
void rows_of_words(const Row4bit<nested>& source, const WordArgs& x, const GemvArgs& args) {
  // A single row of x is bound by memory, which is read best as one stream.
  constexpr int kRows = m == 1 ? 1 : kRowsAtOnce;
  const int64_t step = rows_of_chunk(args.n);
  parallel_chunks((args.n + step - 1) / step, [&](int64_t chunk) {
    const int64_t end = std::min((chunk + 1) * step, args.n);
    int64_t row = chunk * step;
    for (; row + kRows <= end; row += kRows) dot_rows_of_words<m, kRows>(source, x, args, row);
    for (; row < end; ++row) dot_rows_of_words<m, 1>(source, x, args, row);
  });
}

template <bool nested, int m = 1>
void dispatch_rows(int64_t rows, const Row4bit<nested>& source, const WordArgs& x, const GemvArgs& args) {
  if (rows == m) return rows_of_words<m>(source, x, args);
  if constexpr (m < 8) dispatch_rows<nested, m + 1>(rows, source, x, args);
}

}  // namespace

bool linear_4bit_int16(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight4bit& w, const float* bias,
                       const LowRank& tail, const MutMatrix& y) {
  if (m < 1 || m > 8 || w.blocksize % kWords || k % w.blocksize) return false;
  float largest = 0;
  for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(w.code[i]));
  if (!(largest > 0)) return false;
  int16_t code[16];
  for (int i = 0; i < 16; ++i) code[i] = static_cast<int16_t>(std::lrint(w.code[i] * (kMaxCode / largest)));

  const int64_t chunks = k / kWords;
  float* left = workspace(m * tail.rank + chunks * m * (1 + kWords / 2));
  float* scales = left + m * tail.rank;
  auto* words = reinterpret_cast<int16_t*>(scales + chunks * m);
  if (!quantize_rows(x, m, k, largest / kMaxCode, words, scales)) return false;
  for (int64_t i = 0; i < m * tail.rank; ++i) left[i] = tail.left[i] * tail.scale;

  const GemvArgs args{n, k, nullptr, bias, left, tail.right, tail.rank, y};
  const WordArgs word_args{words, scales, make_word_codebook(code)};
  const Weight weight{&w, {}};
  const Rows rows = weight_rows(weight);
  if (w.absmax_q) {
    dispatch_rows(m, Row4bit<true>{w, rows.code, rows.block_shift, rows.nested_shift}, word_args, args);
  } else {
    dispatch_rows(m, Row4bit<false>{w, rows.code, rows.block_shift, 0}, word_args, args);
  }
  return true;
}

#endif
}  // namespace FUSETUNE_ISA
}  // namespace fusetune
