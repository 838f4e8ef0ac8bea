// The arguments of the CPU kernels.
//
// Matrices are row-major with unit stride in the last dimension; `ld` is the distance of two rows in elements.
#pragma once
#include <cstdint>

namespace fusetune {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

struct Matrix {
  const void* data;
  int64_t ld;
  Dtype dtype;
};

struct MutMatrix {
  void* data;
  int64_t ld;
  Dtype dtype;
};

// A 4-bit weight [rows, cols] in bitsandbytes' layout: two codes a byte, the earlier one in the high nibble,
// blocks of `blocksize` consecutive elements of the flattened weight sharing one absmax.
// Plain: `absmax` fp32. Nested: absmax = nested_code[absmax_q[i]] * nested_absmax[i / nested_blocksize] + offset.
struct Weight4bit {
  const uint8_t* packed;
  const float* code;  // 16 values
  const float* absmax;
  const uint8_t* absmax_q;
  const float* nested_code;  // 256 values
  const float* nested_absmax;
  float nested_offset;
  int64_t nested_blocksize;
  int64_t blocksize;
  int64_t rows, cols;
};

// Either a 4-bit weight (`quantized` not null) or a dense one.
struct Weight {
  const Weight4bit* quantized;
  Matrix dense;
};

// Low-rank tail of a matmul: out += scale * left . right. rank 0: none.
// Forward: left = s [M, r], right = lora_B^T given as lora_B [N, r]. dX: left = ds [M, r], right = lora_A [r, K].
struct LowRank {
  const float* left;
  const float* right;
  int64_t rank;
  float scale;
};

// Inverted dropout by counter: element (row, col) of a [M, K] matrix is kept when
// philox(seed, row * K + col) >= threshold, and then multiplied by `scale`. threshold 0: no dropout.
// The exact generator is defined in pylib/reference/dropout.py.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;
};

// One of several LoRA adapters over a layer, and the rows of x that it serves: ascending blocks of `block` rows each,
// `rows` in all; no blocks: every row. What a kernel does not name may be null.
struct LoraAdapter {
  int64_t rank, rows;
  const int64_t* blocks;
  int64_t block;
  const float *lora_A, *lora_B;  // [rank, K], [N, rank]
  const float* bias;             // [N], scaled; null: none
  float scale;
  Dropout dropout;               // of x [M, K]: masks are those of x's own rows
  float *s, *ds;                 // [rows, rank]
  float *dA, *dB;                // null where not needed
};
struct LoraAdapters {
  const LoraAdapter* data;
  int64_t count;
};

// What N adapters gave for the same rows: a matrix [M, H] each, all of one dtype.
struct FusionValues {
  const void* const* data;
  const int64_t* ld;
  int64_t count;
  Dtype dtype;
};

enum class Activation : int { relu, gelu, gelu_new, silu, tanh, leakyrelu, sigmoid, identity };

// Bottleneck adapters; group g serves the g-th run of rows. down [groups * bottleneck, hidden], up [groups * hidden,
// bottleneck], both without gaps; biases [groups, bottleneck] and [groups, hidden], or null.
struct Adapters {
  int64_t groups, hidden, bottleneck;
  const int64_t* rows;
  Matrix down, up;
  const float *down_bias, *up_bias;
  Activation activation;
};

// What bottleneck_backward writes, null where it need not: dx, and gradients of the shapes that Adapters has.
struct AdapterGradients {
  MutMatrix dx, down, up;
  float *down_bias, *up_bias;
};

// Where prompts lie in the sequences of `batch` rows, each of `length` vectors of a prompt and `tokens` tokens. slots:
// their places, strictly ascending, those of a row `slots_ld` after the last row's (0: all rows' alike); null: in
// front. rows [batch]: which of the `groups` prompts a row has, -1 none; null: the first.
struct PromptLayout {
  int64_t batch, tokens, length, groups;
  const int64_t* slots;
  int64_t slots_ld;
  const int64_t* rows;
};

// Vectors of D elements without gaps, for each batch row, head and token, at these distances in elements.
struct Heads {
  void* data;
  int64_t batch, head, token;
  Dtype dtype;
};

// The log-sum-exp of an attention, at such distances. An infinity: nothing is attended to.
struct BaseLse {
  const float* data;
  int64_t batch, head, token;
};

// Attention of query [B, Hq, T, D] to a prefix of P keys and values, one of G: [G, P, Hkv, D], whose first dimension is
// the batch and whose second one the tokens of `key` and `value`. bias, or null: fp32, without gaps along P. rows [B]:
// the prefix of each batch row, -1 none; null: the first. lengths [G]: how many keys a prefix has; null: P. window > 0:
// key j of n is seen by query i where n + position + i - j < window. The dropout's matrix is [2 B, P Hkv D], keys and
// then values, for each batch row by itself.
struct Prefix {
  int64_t batch, heads, kv_heads, tokens, dim, groups, count;
  Heads query, key, value;
  const float* bias;
  int64_t bias_batch, bias_head, bias_token;
  const int64_t *rows, *lengths;
  float scale;
  int64_t window, position;
  Dropout dropout;
};

// From dout, and out and lse [B, Hq, T] of the merged attention: dquery, added to what it holds where `add`; dkey and
// dvalue [G, P, Hkv, D]. Null where not needed.
struct PrefixGradients {
  Heads dout, out;
  const float* lse;
  Heads dquery;
  bool add;
  float *dkey, *dvalue;
};

// Keys and values [G, Hkv, P, D] that all queries of a batch row see besides those of attention: its row of `rows`, -1
// for none; null: the first. count 0: there are none.
struct JoinedPrefix {
  Heads key, value;
  int64_t groups, count;
  const int64_t* rows;
};

// Softmax attention of query [B, Hq, T, D] to key and value [B, Hkv, S, D], with dropout of its weights, a matrix
// [B Hq T, S], and to a prefix. bias, or null: fp32, without gaps along S. causal: query i sees keys up to i.
struct Attention {
  int64_t batch, heads, kv_heads, tokens, keys, dim;
  Heads query, key, value;
  const float* bias;
  int64_t bias_batch, bias_head, bias_token;
  bool causal;
  float scale;
  Dropout dropout;
  JoinedPrefix prefix;
};

// From dout, out and its lse [B, Hq, T]; null where not needed. Of the prefix: [G, P, Hkv, D], both or neither.
struct AttentionGradients {
  Heads dout, out;
  const float* lse;
  Heads dquery, dkey, dvalue;
  float *dprefix_key, *dprefix_value;
};

// x [B, H, T, D], cos and sin [B, 1, T, D]; D is even.
struct RotaryShape {
  int64_t batch, heads, tokens, dim;
};

// Many small matrices, fp32 without gaps, and their moving averages. grads[i] null: those of i stay as they are. first:
// where the scores of each begin.
struct ImportanceMatrices {
  int64_t count;
  const float *const *weights, *const *grads;
  float *const *sensitivity, *const *uncertainty;
  const int64_t *rows, *cols, *first;
};

}  // namespace fusetune
