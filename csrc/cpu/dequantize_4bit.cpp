// A whole 4-bit weight to fp32, fp16 or bf16.
//
// Tiling: one task is about 64 Ki elements of whole blocks; 32 elements (16 bytes) a step. Results above 4 MB are
// written past the caches, as far as the stores are aligned: a normal store would first read the line it overwrites.
// Bytes per element: 0.5 + 4 / blocksize read, 4 (or 2) written; at 4096 x 4096 to fp32, block 64: 8.4 + 1.0 + 67.1
// MB. Measured there into memory that is mapped already, one Zen 4 core: 2.6 ms, 29 GB/s, the memory's limit; torch's
// copy of an fp32 weight takes 5.4 ms.
#include "isa_kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

#if defined(FUSETUNE_ISA_AVX512)
void stream(float* p, F v) { _mm512_stream_ps(p, v); }
void stream(f16* p, F v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
void stream(bf16* p, F v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }
void end_stream() { _mm_sfence(); }
#elif defined(FUSETUNE_ISA_AVX2)
void stream(float* p, F v) { _mm256_stream_ps(p, v); }
template <class T>
void stream(T* p, F v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_16(v, T{}));
}
void end_stream() { _mm_sfence(); }
#else
template <class T>
void stream(T* p, F v) {
  store(p, v);
}
void end_stream() {}
#endif

template <bool streaming, class T>
void decode_block(const Codebook& code, const uint8_t* packed, F absmax, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += 32) {
    F values[32 / kLanes];
    decode32(packed + i / 2, code, values);
    for (int j = 0; j < 32 / kLanes; ++j) {
      T* to = out + i + j * kLanes;
      const F v = mul(values[j], absmax);
      streaming ? stream(to, v) : store(to, v);
    }
  }
}

// The rest of the last block: n is no multiple of 32.
template <class T>
void decode_rest(const float* code, const uint8_t* packed, float absmax, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int q = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
    from_float(code[q] * absmax, out[i]);
  }
}

template <class T>
void dequantize(const Weight4bit& w, T* out) {
  constexpr int64_t kStreamBytes = 4 << 20;
  const int64_t n = w.rows * w.cols, blocks = (n + w.blocksize - 1) / w.blocksize;
  const int64_t blocks_per_task = 65536 / w.blocksize;
  const bool streaming = n * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
                         reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0;
  const int nested_shift = w.absmax_q ? __builtin_ctzll(static_cast<unsigned long long>(w.nested_blocksize)) : 0;
  const Codebook code = make_codebook(w.code);
  parallel_chunks((blocks + blocks_per_task - 1) / blocks_per_task, [&](int64_t task) {
    const int64_t end = (task + 1) * blocks_per_task < blocks ? (task + 1) * blocks_per_task : blocks;
    for (int64_t b = task * blocks_per_task; b < end; ++b) {
      const int64_t first = b * w.blocksize, count = n - first < w.blocksize ? n - first : w.blocksize;
      const int64_t whole = count - count % 32;
      const uint8_t* packed = w.packed + first / 2;
      const uint64_t block = static_cast<uint64_t>(b);
      const float absmax =
          w.absmax_q ? block_absmax<true>(w, nested_shift, block) : block_absmax<false>(w, 0, block);
      streaming ? decode_block<true>(code, packed, set1(absmax), whole, out + first)
                : decode_block<false>(code, packed, set1(absmax), whole, out + first);
      decode_rest(w.code, packed + whole / 2, absmax, count - whole, out + first + whole);
    }
    if (streaming) end_stream();
  });
}

}  // namespace

void dequantize_4bit(const Weight4bit& w, void* out, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return dequantize(w, static_cast<float*>(out));
    case Dtype::f16: return dequantize(w, static_cast<f16*>(out));
    case Dtype::bf16: return dequantize(w, static_cast<bf16*>(out));
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
