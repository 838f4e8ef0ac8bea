// The contract of the CPU kernels: one table of function pointers per instruction set. Arguments: arguments.h.
//
// Accumulation is fp32 whatever the storage type. Kernels trust their caller: shapes, dtypes and pointers are
// checked in Python.
#pragma once
#include "arguments.h"

namespace fusetune {

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
  // y [M, N] = weight * x * rstd, rstd [M] = 1 / sqrt(mean(x^2) + eps); and the gradient of x. y, dy and dx are of
  // the dtype of x.
  void (*rms_norm)(const Matrix& x, int64_t m, int64_t n, const float* weight, float eps, const MutMatrix& y,
                   float* rstd);
  void (*rms_norm_dx)(const Matrix& dy, const Matrix& x, int64_t m, int64_t n, const float* weight, const float* rstd,
                      const MutMatrix& dx);
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
  // out = x * cos + (-x2, x1) * sin, x1 and x2 the halves of a head; transposed: its backward pass. Elements lie side by
  // side in the last dimension.
  void (*rotary)(const Heads& x, const RotaryShape& shape, const Heads& cos, const Heads& sin, bool transposed,
                 const Heads& out);
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
