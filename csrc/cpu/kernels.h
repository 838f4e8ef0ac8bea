// The contract of the CPU kernels: argument structs and one table of function pointers per instruction set.
//
// Matrices are row-major with unit stride in the last dimension; `ld` is the distance of two rows in elements.
// Accumulation is fp32 whatever the storage type. Kernels trust their caller: shapes, dtypes and pointers are
// checked in Python.
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

// Softmax attention of query [B, Hq, T, D] to key and value [B, Hkv, S, D], with dropout of its weights, a matrix
// [B Hq T, S]. bias, or null: fp32, without gaps along S. causal: query i sees keys up to i.
struct Attention {
  int64_t batch, heads, kv_heads, tokens, keys, dim;
  Heads query, key, value;
  const float* bias;
  int64_t bias_batch, bias_head, bias_token;
  bool causal;
  float scale;
  Dropout dropout;
};

// From dout, out and its lse [B, Hq, T]; null where not needed.
struct AttentionGradients {
  Heads dout, out;
  const float* lse;
  Heads dquery, dkey, dvalue;
};

// Many small matrices, fp32 without gaps, and their moving averages. grads[i] null: those of i stay as they are. first:
// where the scores of each begin.
struct ImportanceMatrices {
  int64_t count;
  const float *const *weights, *const *grads;
  float *const *sensitivity, *const *uncertainty;
  const int64_t *rows, *cols, *first;
};

struct Kernels {
  const char* isa;
  int lanes;  // fp32 lanes of a vector

  // packed [n/2 rounded up], absmax [blocks]; code and boundaries follow quant_type (0 nf4, 1 fp4).
  void (*quantize_4bit)(const void* x, Dtype dtype, int64_t n, int quant_type, int64_t blocksize, uint8_t* packed,
                        float* absmax);
  void (*dequantize_4bit)(const Weight4bit& w, void* out, Dtype dtype);

  // y [M, rows] = x [M, cols] . W^T (+ bias) (+ low-rank tail)
  void (*linear)(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight& w, const float* bias,
                 const LowRank& tail, const MutMatrix& y);
  // dx [M, cols] = dy [M, rows] . W (+ mask * low-rank tail); with `add`, added to what dx holds
  void (*linear_dx)(const Matrix& dy, int64_t m, int64_t n, int64_t k, const Weight& w, const LowRank& tail,
                    const Dropout& dropout, bool add, const MutMatrix& dx);
  // Opt-in decode path, m <= 8: activations in int16 per block of 64. Returns false where it does not apply.
  bool (*linear_4bit_int16)(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight4bit& w,
                            const float* bias, const LowRank& tail, const MutMatrix& y);

  // s [M, r] = drop(x [M, K]) . lora_A [r, K]^T
  void (*lora_shrink)(const Matrix& x, int64_t m, int64_t k, const float* lora_A, int64_t rank, const Dropout& dropout,
                      float* s);
  // ds [M, r] = scale * dy [M, N] . lora_B [N, r]; dB [N, r] = scale * dy^T . s; both from one read of dy.
  void (*lora_ds_db)(const Matrix& dy, int64_t m, int64_t n, const float* lora_B, const float* s, int64_t rank,
                     float scale, float* ds, float* dB);
  // dA [r, K] = ds [M, r]^T . drop(x [M, K])
  void (*lora_da)(const Matrix& x, int64_t m, int64_t k, const float* ds, int64_t rank, const Dropout& dropout,
                  float* dA);
  // For each adapter, over the rows that it serves: s = drop(x [M, K]) . lora_A^T
  void (*multi_lora_shrink)(const Matrix& x, int64_t k, const LoraAdapters& adapters);
  // Added to the rows of out [M, cols]: scale * s . lora_B^T + bias; backward: drop'(ds . lora_A).
  void (*multi_lora_expand)(const MutMatrix& out, int64_t m, int64_t cols, const LoraAdapters& adapters, bool backward);
  // ds = scale * dy [M, N] . lora_B and dB = scale * dy^T . s; dB is zero where no row is served.
  void (*multi_lora_ds_db)(const Matrix& dy, int64_t n, const LoraAdapters& adapters);
  // dA = ds^T . drop(x [M, K])
  void (*multi_lora_da)(const Matrix& x, int64_t k, const LoraAdapters& adapters);
  // norm [N] = || W [N, K] + scale * lora_B [N, r] . lora_A [r, K] || by rows
  void (*dora_norm)(const Weight& w, int64_t n, int64_t k, const float* lora_A, const float* lora_B, int64_t rank,
                    float scale, float* norm);
  // y [M, N] = weight * x * rstd, rstd [M] = 1 / sqrt(mean(x^2) + eps); and the gradient of x. All fp32, y and dx
  // without gaps.
  void (*rms_norm)(const Matrix& x, int64_t m, int64_t n, const float* weight, float eps, float* y, float* rstd);
  void (*rms_norm_dx)(const Matrix& dy, const Matrix& x, int64_t m, int64_t n, const float* weight, const float* rstd,
                      float* dx);
  // z [M, d] = x [M, H] . down^T + down_bias, y [M, H] = addend + drop(f(z) . up^T + up_bias). addend: [M, H] or null.
  void (*bottleneck)(const Matrix& x, int64_t m, const Adapters& adapters, const Matrix& addend, const Dropout& dropout,
                     const MutMatrix& y, const MutMatrix& z);
  // The gradients from dy [M, H], x and z. addend, dy or null, is added to dx.
  void (*bottleneck_backward)(const Matrix& dy, const Matrix& x, const Matrix& z, int64_t m, const Adapters& adapters,
                              const Matrix& addend, const Dropout& dropout, const AdapterGradients& out);
  // loss [M] and lse [M] (log-sum-exp) of logits [M, V]; both 0 in rows whose target is ignore_index. Returns the first
  // row with any other target outside [0, V), before anything is written, or -1.
  int64_t (*cross_entropy)(const Matrix& logits, int64_t m, int64_t v, const int64_t* target, int64_t ignore_index,
                           float smoothing, float* loss, float* lse);
  // dlogits [M, V], in the dtype of logits, from dloss [M]; it may be the logits themselves.
  void (*cross_entropy_backward)(const Matrix& logits, int64_t m, int64_t v, const int64_t* target,
                                 int64_t ignore_index, float smoothing, const float* lse, const float* dloss,
                                 const MutMatrix& dlogits);
  // p [M, N] = softmax_i(drop(g [M, H] . values_i + offset [M]) / temperature), ctx [M, H] = sum_i p_i values_i.
  // offset may be null. The dropout's matrix is [.., N]; these are its rows from first_row.
  void (*fusion_attend)(const Matrix& g, int64_t m, int64_t h, const FusionValues& values, const float* offset,
                        float temperature, const Dropout& dropout, int64_t first_row, const MutMatrix& ctx, float* p);
  // dg [M, H], doffset [M] and, unless they are null, dvalues: N matrices [M, H] without gaps in the values' dtype, and
  // ctx once more. g is read for dvalues only.
  void (*fusion_attend_backward)(const Matrix& dctx, const Matrix& g, int64_t m, int64_t h, const FusionValues& values,
                                 const float* p, float temperature, const Dropout& dropout, int64_t first_row,
                                 const MutMatrix& dg, const MutMatrix& ctx, void* const* dvalues, float* doffset);
  // out [batch * (length + tokens), H], in weight's dtype: rows of weight [V, H] by input_ids [batch * tokens], times
  // `scale`, and of prompt [groups * length, H]. Returns the first id outside [0, V), before anything is written, or -1.
  int64_t (*prompt_embed)(const int64_t* input_ids, const PromptLayout& layout, const Matrix& weight,
                          int64_t vocabulary, int64_t h, const Matrix& prompt, float scale, const MutMatrix& out);
  // dprompt [groups * length, H] from dout, like out.
  void (*prompt_embed_dprompt)(const Matrix& dout, const PromptLayout& layout, int64_t h, float* dprompt);
  // dweight [V, H], in dout's dtype. ids [batch * tokens] is ascending, and `order` says which token each one is.
  // padding_idx: a row that stays zero, or -1.
  void (*prompt_embed_dweight)(const Matrix& dout, const PromptLayout& layout, int64_t h, const int64_t* ids,
                               const int64_t* order, int64_t vocabulary, float scale, int64_t padding_idx,
                               const MutMatrix& dweight);
  // Merges attention to a prefix into out [B, Hq, T, D], in query's dtype, which holds another attention's result, and
  // its log-sum-exp into lse [B, Hq, T]. Where nothing is attended to out is 0 and lse infinite.
  void (*prefix_attend)(const Prefix& prefix, const Heads& out, const BaseLse& base_lse, float* lse);
  void (*prefix_attend_backward)(const Prefix& prefix, const PrefixGradients& given);
  // out [B, Hq, T, D] and lse [B, Hq, T] of the weights before dropout. Where nothing is seen out is 0 and lse infinite.
  void (*attention)(const Attention& a, const Heads& out, float* lse);
  void (*attention_backward)(const Attention& a, const AttentionGradients& given);
  // y = f(gate) * up, all [M, N] and of one dtype; f: silu, gelu or gelu_new.
  void (*glu)(const Matrix& gate, const Matrix& up, int64_t m, int64_t n, Activation kind, const MutMatrix& y);
  // dgate and dup, null where not needed; either may be dy, gate or up itself.
  void (*glu_backward)(const Matrix& dy, const Matrix& gate, const Matrix& up, int64_t m, int64_t n, Activation kind,
                       const MutMatrix& dgate, const MutMatrix& dup);
  // y = scale [N] * x + bias [N], both [M, N] and of one dtype; y may be x. bias: or null.
  void (*scale_columns)(const Matrix& x, int64_t m, int64_t n, const float* scale, const float* bias,
                        const MutMatrix& y);
  // dx = scale * dy, which may be dy itself; dscale [N] and dbias [N]: the sums over rows of dy * x and of dy. Null for
  // those that are not needed; x is read for dscale only, and scale for dx.
  void (*scale_columns_backward)(const Matrix& dy, const Matrix& x, int64_t m, int64_t n, const float* scale,
                                 const MutMatrix& dx, float* dscale, float* dbias);
  // Updates the averages; the means of sensitivity times uncertainty over each row (or column) to scores. rest1 and
  // rest2: 1 - beta1 and 1 - beta2.
  void (*importance)(const ImportanceMatrices& all, float beta1, float rest1, float beta2, float rest2, bool by_column,
                     float* scores);
  // out [M, K] = x [M, K] with the dropout of `dropout` applied; out may be x.
  void (*dropout)(const Matrix& x, int64_t m, int64_t k, const Dropout& dropout, const MutMatrix& out);
  // fp32 FMA peak of the calling core in GF/s, measured for about `seconds`: what benchmarks divide by.
  double (*fma_peak)(double seconds);
};

// The table in use: the best this CPU has, or what FUSETUNE_CPU_ISA names. Throws std::invalid_argument where
// that variable names something that is not available here.
const Kernels& kernels();
// Tables this build and this CPU can run, best first, ended by null.
const Kernels* const* available_kernels();
// Why an instruction set is not available here (unknown, not built, not on this CPU), or null.
const char* isa_unavailable_reason(const char* isa);
// Forces an instruction set by name; false where it is not available. "auto" takes the best.
bool set_isa(const char* isa);

}  // namespace fusetune
