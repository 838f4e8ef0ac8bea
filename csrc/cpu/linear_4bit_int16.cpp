// y = x . W^T for up to 8 rows of x, in 16-bit fixed point: the opt-in decode path.
//
// Each 64 activations share a scale and become int16; the codebook becomes 14-bit integers; multiply-add pairs words
// into int32 and every 64 products are scaled into the fp32 accumulator. The error, about 1e-4 of the result's norm, is
// that of the codebook's rounding. Tiling and bytes are those of gemv.h; per 64 weights it needs a third of the
// instructions.
#include <cmath>
#include <type_traits>

#include "gemv.h"

namespace fusetune {
namespace FUSETUNE_ISA {
#if defined(FUSETUNE_HAS_INT16)
namespace {

constexpr int kScaled = 64;  // activations that share a scale
// Eight products of 15-bit and 13-bit magnitudes fit an int32 lane: 8 * 32767 * 8191 < 2^31.
constexpr float kMaxWord = 32767.f, kMaxCode = 8191.f;

// words [steps][m][kWords], scales [steps][m][kLanes], a step being kWords elements of k, rounded up with zeros. False
// if x is not finite.
bool quantize_rows(const Matrix& x, int64_t m, int64_t k, float scale, int16_t* words, float* scales) {
  F check = zero();  // a NaN may be lost in max, but not in a sum of products with zero
  for (int64_t d = 0; d < k; d += kWords) {
    for (int64_t s = 0; s < m; ++s, words += kWords, scales += kLanes) {
      alignas(64) float v[kWords] = {};
      float of_part[2] = {};
      load_floats(x.data, x.dtype, s * x.ld + d, std::min<int64_t>(kWords, k - d), v);
      for (int part = 0; part < kWords / kScaled; ++part) {
        float* first = v + part * kScaled;
        F largest = zero();
        for (int i = 0; i < kScaled; i += kLanes) {
          largest = max(largest, abs(load(first + i)));
          check = fma(load(first + i), zero(), check);
        }
        const float absmax = hmax(largest);
        const float inverse = absmax > 0 ? kMaxWord / absmax : 0.f;
        if (!std::isfinite(inverse)) return false;
        of_part[part] = absmax / kMaxWord * scale;
        // Rounded, the integer is in the low bits after adding 1.5 * 2^23.
        for (int i = 0; i < kScaled; i += kLanes) {
          store(first + i, add(mul(load(first + i), set1(inverse)), set1(12582912.f)));
        }
      }
      store(scales, word_scales(of_part[0], of_part[1]));
      for (int i = 0; i < kWords; ++i) words[i] = static_cast<int16_t>(float_to_bits(v[word_element(i)]));
    }
  }
  return hsum(check) == 0.f;
}

struct WordArgs {
  const int16_t* words;
  const float* scales;
  WordCodebook code;
};

// As dot_rows of gemv.h.
template <int m, int rows, bool nested>
void dot_rows_of_words(const Row4bit<nested>& source, const WordArgs& x, const GemvArgs& args, int64_t row,
                       F (*sums)[m]) {
  RowAbsmax<nested> state[rows];
  F acc[rows][m];
  for (auto& of_row : acc) {
    for (F& v : of_row) v = zero();
  }
  const WordCodebook code = x.code;
  const int16_t* words = x.words;
  const float* scales = x.scales;
  const auto step = [&](int64_t i, auto whole) {
    F absmax[rows];
    U w[rows][kWordVectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const uint64_t at = static_cast<uint64_t>((row + r) * args.k + i);
      prefetch_4bit<nested>(source.w, source.shift, at);
      const float first = state[r].at(source.w, at >> source.shift);
      if constexpr (whole.value) {
        absmax[r] = word_scales(first, state[r].at(source.w, (at + kWords - kScaled) >> source.shift));
        decode_words(source.w.packed + at / 2, code, w[r]);
      } else {
        absmax[r] = set1(first);
        decode_64_words(source.w.packed + at / 2, code, w[r]);
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < m; ++s) {
      const F scale = load(scales + s * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        acc[r][s] = fma(dot_words(w[r], words + s * kWords), mul(absmax[r], scale), acc[r][s]);
      }
    }
    words += m * kWords;
    scales += m * kLanes;
  };
  for (int64_t i = 0; i < args.k;) {
    const int64_t end = std::min(i + source.span(), args.k);
    for (int r = 0; r < rows; ++r) source.prepare(state[r], row + r, i);
#pragma GCC unroll 4
    for (; i + kWords <= end; i += kWords) step(i, std::true_type{});
    if (i < end) step(i, std::false_type{}), i = end;
  }
  for (int r = 0; r < rows; ++r) std::copy_n(acc[r], m, sums[r]);
}

template <bool nested, int m = 1>
void dispatch_rows(int64_t rows, const Row4bit<nested>& source, const WordArgs& x, const GemvArgs& args) {
  // A single row of x is bound by memory, which is read best as one stream.
  constexpr int kRows = m == 1 ? 1 : kRowsAtOnce;
  if (rows == m) {
    return for_rows<m, kRows>(args, [&](auto at_once, int64_t row, F(*sums)[m]) {
      dot_rows_of_words<m, at_once.value>(source, x, args, row, sums);
    });
  }
  if constexpr (m < 8) dispatch_rows<nested, m + 1>(rows, source, x, args);
}

}  // namespace

bool linear_4bit_int16(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight4bit& w, const float* bias,
                       const LowRank& tail, const MutMatrix& y) {
  if (m < 1 || m > 8 || w.blocksize % kScaled || k % w.blocksize) return false;
  float largest = 0;
  for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(w.code[i]));
  if (!(largest > 0)) return false;
  int16_t code[16];
  for (int i = 0; i < 16; ++i) code[i] = static_cast<int16_t>(std::lrint(w.code[i] * (kMaxCode / largest)));

  const int64_t vectors = (k + kWords - 1) / kWords * m;
  float* scales = workspace(m * tail.rank + vectors * (kLanes + kWords / 2));
  auto* words = reinterpret_cast<int16_t*>(scales + vectors * kLanes);
  float* left = scales + vectors * (kLanes + kWords / 2);
  if (!quantize_rows(x, m, k, largest / kMaxCode, words, scales)) return false;
  for (int64_t i = 0; i < m * tail.rank; ++i) left[i] = tail.left[i] * tail.scale;

  const GemvArgs args{n, k, nullptr, bias, left, tail.right, tail.rank, y};
  const WordArgs word_args{words, scales, make_word_codebook(code)};
  const Weight weight{&w, {}};
  const Rows rows = weight_rows(weight);
  if (w.absmax_q) {
    dispatch_rows(m, Row4bit<true>(rows), word_args, args);
  } else {
    dispatch_rows(m, Row4bit<false>(rows), word_args, args);
  }
  return true;
}

#endif
}  // namespace FUSETUNE_ISA
}  // namespace fusetune
