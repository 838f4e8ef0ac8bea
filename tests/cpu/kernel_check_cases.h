// The cases of kernel_check.cpp: one function per kernel. Included there, inside its namespace.

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr Dropout kNoDropout{0, 0, 1};
const Dropout kSomeDropout{0x123456789abcdefull, 1u << 30, 4.0f / 3.0f};

std::string describe(int64_t m, int64_t n, int64_t k, int64_t rank, Dtype dtype) {
  return "m " + std::to_string(m) + ", n " + std::to_string(n) + ", k " + std::to_string(k) + ", rank " +
         std::to_string(rank) + ", dtype " + std::to_string(static_cast<int>(dtype));
}

// Against a search through the midpoints of the sorted codebook, which for nf4 is the codebook.
Result check_quantize_4bit(const Kernels& kernels) {
  Result result;
  for (Dtype dtype : kDtypes) {
    for (int64_t blocksize : {32, 64, 256, 4096}) {
      for (int64_t n : {1, 64, 4097, 70001}) {
        Stored x(1, n, dtype);
        x.randomize();
        std::vector<uint8_t> packed(static_cast<size_t>((n + 1) / 2));
        Floats absmax(static_cast<size_t>((n + blocksize - 1) / blocksize));
        kernels.quantize_4bit(x.bytes.data(), dtype, n, 0, blocksize, packed.data(), absmax.data());
        float largest = 0;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t block = i / blocksize, first = block * blocksize, end = std::min(n, first + blocksize);
          if (i == first) {
            largest = 0;
            for (int64_t j = first; j < end; ++j) largest = std::max(largest, std::fabs(float(x.at(0, j))));
          }
          const bool whole = end - first == blocksize;
          const float v = whole ? float(x.at(0, i)) * (1.0f / largest) : float(x.at(0, i)) / largest;
          int code = 0;
          while (code < 15 && (kNf4[code] + kNf4[code + 1]) / 2 < v) ++code;
          const uint8_t byte = packed[static_cast<size_t>(i / 2)];
          const bool right = code == (i % 2 ? byte & 15 : byte >> 4) && absmax[static_cast<size_t>(block)] == largest;
          ++result.checked;
          if (right) continue;
          result.worst = INFINITY;
          result.where = "n " + std::to_string(n) + ", blocksize " + std::to_string(blocksize);
        }
      }
    }
  }
  return result;
}

Result check_dequantize_4bit(const Kernels& kernels) {
  Result result;
  for (Dtype dtype : kDtypes) {
    for (bool nested : {false, true}) {
      for (int64_t cols : {1, 31, 4096, 60001}) {
        const Quantized q(3, cols, 64, nested);
        Stored out(1, 3 * cols, dtype), exact(1, 3 * cols, dtype);
        for (int64_t i = 0; i < 3 * cols; ++i) exact.set(0, i, q.value(i));
        kernels.dequantize_4bit(q.w, out.bytes.data(), dtype);
        ++result.checked;
        if (out.bytes == exact.bytes) continue;
        result.worst = INFINITY;
        result.where = "cols " + std::to_string(cols) + (nested ? ", nested" : "");
      }
    }
  }
  return result;
}

// Calls f(m, n, k, rank, x dtype, weight, its values, name) for 4-bit and dense weights.
template <class F>
void for_linear_cases(const F& f) {
  const int64_t shapes[][4] = {{1, 64, 64, 0},  {1, 7, 130, 3},   {3, 33, 192, 1},   {5, 33, 192, 16},
                               {8, 70, 512, 0}, {27, 40, 832, 8}, {25, 8, 1088, 3}, {33, 40, 320, 8}, {70, 9, 64, 1},
                               {70, 257, 129, 17}, {131, 43, 700, 5}, {130, 610, 50, 16}, {530, 20, 64, 2}};
  for (const auto& [m, n, k, rank] : shapes) {
    for (Dtype dtype : kDtypes) {
      for (bool nested : {false, true}) {
        const Quantized q(n, k, 64, nested);
        f(m, n, k, rank, dtype, Weight{&q.w, {}}, q.values(),
          describe(m, n, k, rank, dtype) + (nested ? " nested" : ""));
      }
      Stored dense(n, k, dtype);
      dense.randomize();
      f(m, n, k, rank, dtype, Weight{nullptr, dense.matrix()}, dense.values(),
        describe(m, n, k, rank, dtype) + " dense");
    }
  }
}

// The weight as it is multiplied: AMX's tiles hold it rounded to bf16, as x is, where its rows are whole tiles.
Doubles as_multiplied(const Kernels& kernels, int64_t k, Dtype dtype, const Weight& w, const Doubles& values) {
  Doubles all = values;
  if (std::strcmp(kernels.isa, "amx") || dtype != Dtype::bf16 || !w.quantized || k % 32) return all;
  for (double& v : all) {
    bf16 rounded;
    check::from_float(static_cast<float>(v), rounded);
    v = check::to_float(rounded);
  }
  return all;
}

Result check_linear(const Kernels& kernels) {
  Result result;
  for_linear_cases([&](int64_t m, int64_t n, int64_t k, int64_t rank, Dtype dtype, const Weight& w,
                       const Doubles& values, const std::string& name) {
    Stored x(m, k, dtype), y(m, n, dtype);
    x.randomize();
    const Floats bias = random_floats(n), left = random_floats(m * rank), right = random_floats(n * rank);
    kernels.linear(x.matrix(), m, n, k, w, rank % 2 ? nullptr : bias.data(), {left.data(), right.data(), rank, 0.5f},
                   y.mut());
    Doubles exact(static_cast<size_t>(m * n)), magnitude = exact;
    for (int64_t i = 0; i < m * n && rank % 2 == 0; ++i) {
      exact[static_cast<size_t>(i)] = bias[static_cast<size_t>(i % n)];
      magnitude[static_cast<size_t>(i)] = std::fabs(exact[static_cast<size_t>(i)]);
    }
    const Doubles xs = x.values(), l = doubles(left), r = doubles(right);
    const bool few = m <= 3;  // rows, which are left to the kernels without tiles
    const Doubles multiplied = few ? values : as_multiplied(kernels, k, dtype, w, values);
    add_product(exact, magnitude, m, n, k, {xs, k, 1}, {multiplied, 1, k});
    add_product(exact, magnitude, m, n, rank, {l, rank, 1}, {r, 1, rank}, 0.5);
    compare(result, y.values(), exact, magnitude, std::sqrt(double(k + rank)), dtype, name);
  });
  return result;
}

Result check_linear_dx(const Kernels& kernels) {
  Result result;
  for_linear_cases([&](int64_t m, int64_t n, int64_t k, int64_t rank, Dtype dtype, const Weight& w,
                       const Doubles& values, const std::string& name) {
    Stored dy(m, n, dtype), dx(m, k, dtype);
    dy.randomize();
    const Floats left = random_floats(m * rank), right = random_floats(rank * k);
    const Doubles dys = dy.values(), l = doubles(left), r = doubles(right);
    const Doubles multiplied = as_multiplied(kernels, k, dtype, w, values);
    for (const Dropout& drop : {kNoDropout, kSomeDropout}) {
      const LowRank tail{left.data(), right.data(), rank, 0.5f};
      kernels.linear_dx(dy.matrix(), m, n, k, w, tail, drop, false, dx.mut());
      Doubles exact(static_cast<size_t>(m * k)), magnitude = exact;
      const std::vector<bool> keep = kept(drop, m, k);
      add_product(exact, magnitude, m, k, rank, {l, rank, 1}, {r, k, 1}, 0.5 * drop.scale, &keep);
      add_product(exact, magnitude, m, k, n, {dys, n, 1}, {multiplied, k, 1});
      compare(result, dx.values(), exact, magnitude, std::sqrt(double(n + rank)), dtype,
              name + (drop.threshold ? " dropout" : ""));
      dx.randomize();
      const Doubles before = dx.values();
      for (size_t i = 0; i < before.size(); ++i) exact[i] += before[i], magnitude[i] += std::fabs(before[i]);
      kernels.linear_dx(dy.matrix(), m, n, k, w, tail, drop, true, dx.mut());
      compare(result, dx.values(), exact, magnitude, std::sqrt(double(n + rank)), dtype,
              name + (drop.threshold ? " dropout, added" : " added"));
    }
  });
  return result;
}

// Activations become 16-bit integers per block of 64: an error of 2^-13 of the block's largest value, so of the
// magnitudes' sum times a few.
Result check_linear_4bit_int16(const Kernels& kernels) {
  Result result;
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 64, 64}, {1, 33, 4096}, {8, 70, 192}}) {
    const Quantized q(n, k, 64, false);
    Stored x(m, k, Dtype::f32), y(m, n, Dtype::f32);
    x.randomize();
    const Floats bias = random_floats(n);
    if (!kernels.linear_4bit_int16(x.matrix(), m, n, k, q.w, bias.data(), {nullptr, nullptr, 0, 0}, y.mut())) continue;
    Doubles exact(static_cast<size_t>(m * n)), magnitude = exact;
    const Doubles xs = x.values(), ws = q.values();
    add_product(exact, magnitude, m, n, k, {xs, k, 1}, {ws, 1, k});
    for (int64_t i = 0; i < m * n; ++i) exact[static_cast<size_t>(i)] += bias[static_cast<size_t>(i % n)];
    compare(result, y.values(), exact, magnitude, 0x1p-12 / kUnit / 4, Dtype::f32, describe(m, n, k, 0, Dtype::f32));
  }
  return result;
}

Result check_dora_norm(const Kernels& kernels) {
  Result result;
  for_linear_cases([&](int64_t, int64_t n, int64_t k, int64_t rank, Dtype dtype, const Weight& w,
                       const Doubles& values, const std::string& name) {
    if (rank == 0 || (w.quantized && dtype != Dtype::f32)) return;  // no adapter; the same weight again
    const Floats A = random_floats(rank * k), B = random_floats(n * rank);
    Floats norm(static_cast<size_t>(n));
    kernels.dora_norm(w, n, k, A.data(), B.data(), rank, 0.5f, norm.data());
    const Doubles a = doubles(A), b = doubles(B);
    Doubles merged = values, magnitude(values.size()), exact;
    for (size_t i = 0; i < values.size(); ++i) magnitude[i] = std::fabs(values[i]);
    add_product(merged, magnitude, n, k, rank, {b, rank, 1}, {a, k, 1}, 0.5);
    // An error in an element moves the norm by no more than itself times the element over the norm.
    Doubles bound;
    for (int64_t i = 0; i < n; ++i) {
      double squares = 0, of_magnitudes = 0;
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = static_cast<size_t>(i * k + j);
        squares += merged[at] * merged[at], of_magnitudes += magnitude[at] * magnitude[at];
      }
      exact.push_back(std::sqrt(squares)), bound.push_back(std::sqrt(of_magnitudes));
    }
    compare(result, doubles(norm), exact, bound, std::sqrt(double(k + rank)), Dtype::f32, name);
  });
  return result;
}

struct LoraResults {
  Result shrink, ds, dB, dA, dropout;

  Named named() const {
    return {{"lora_shrink", shrink}, {"lora_ds_db: ds", ds}, {"lora_ds_db: dB", dB}, {"lora_da", dA},
            {"dropout", dropout}};
  }
};

LoraResults check_lora(const Kernels& kernels) {
  LoraResults results;
  const int64_t shapes[][3] = {{1, 64, 16}, {1, 5, 1}, {3, 100, 3}, {37, 1030, 8}, {300, 131, 17}, {64, 512, 64}};
  for (const auto& [m, k, rank] : shapes) {
    for (Dtype dtype : kDtypes) {
      Stored x(m, k, dtype);
      x.randomize();
      const Floats A = random_floats(rank * k), B = random_floats(k * rank), in = random_floats(m * rank);
      const Doubles as = doubles(A), bs = doubles(B), ins = doubles(in);
      const std::string name = describe(m, k, k, rank, dtype);
      for (const Dropout& drop : {kNoDropout, kSomeDropout}) {
        const Doubles xs = dropped(x, drop);
        Floats s(static_cast<size_t>(m * rank)), dA(static_cast<size_t>(rank * k));
        kernels.lora_shrink(x.matrix(), m, k, A.data(), rank, drop, s.data());
        Doubles exact(s.size()), magnitude = exact;
        add_product(exact, magnitude, m, rank, k, {xs, k, 1}, {as, 1, k});
        compare(results.shrink, doubles(s), exact, magnitude, std::sqrt(double(k)), Dtype::f32, name);

        kernels.lora_da(x.matrix(), m, k, in.data(), rank, drop, dA.data());
        exact.assign(dA.size(), 0), magnitude = exact;
        add_product(exact, magnitude, rank, k, m, {ins, 1, rank}, {xs, k, 1});
        compare(results.dA, doubles(dA), exact, magnitude, std::sqrt(double(m)), Dtype::f32, name);

        Stored out(m, k, dtype), expected(m, k, dtype);
        const std::vector<bool> keep = kept(drop, m, k);
        for (int64_t i = 0; i < m * k; ++i) {
          expected.set(i / k, i % k, keep[static_cast<size_t>(i)] ? float(x.at(i / k, i % k)) * drop.scale : 0.0f);
        }
        kernels.dropout(x.matrix(), m, k, drop, out.mut());
        compare(results.dropout, out.values(), expected.values(), Doubles(keep.size()), 0, Dtype::f32, name);
      }
      Floats ds(static_cast<size_t>(m * rank)), dB(static_cast<size_t>(k * rank));
      kernels.lora_ds_db(x.matrix(), m, k, B.data(), in.data(), rank, 0.5f, ds.data(), dB.data());
      const Doubles xs = x.values();
      Doubles exact(ds.size()), magnitude = exact;
      add_product(exact, magnitude, m, rank, k, {xs, k, 1}, {bs, rank, 1}, 0.5);
      compare(results.ds, doubles(ds), exact, magnitude, std::sqrt(double(k)), Dtype::f32, name);
      exact.assign(dB.size(), 0), magnitude = exact;
      add_product(exact, magnitude, k, rank, m, {xs, 1, k}, {ins, rank, 1}, 0.5);
      compare(results.dB, doubles(dB), exact, magnitude, std::sqrt(double(m)), Dtype::f32, name);
    }
  }
  return results;
}

#include "kernel_check_adapters.h"
#include "kernel_check_cross_entropy.h"
#include "kernel_check_multi_lora.h"
#include "kernel_check_importance.h"
#include "kernel_check_attention.h"
#include "kernel_check_prefix.h"
#include "kernel_check_rms_norm.h"
#include "kernel_check_rotary.h"
#include "kernel_check_prompt.h"
#include "kernel_check_glu.h"
#include "kernel_check_scale_columns.h"

int check_table(const Kernels& kernels) {
  Report report{kernels.isa};
  report("quantize_4bit", check_quantize_4bit(kernels));
  report("dequantize_4bit", check_dequantize_4bit(kernels));
  report("linear", check_linear(kernels));
  report("linear_dx", check_linear_dx(kernels));
  if (kernels.linear_4bit_int16) report("linear_4bit_int16", check_linear_4bit_int16(kernels));
  report(check_lora(kernels).named());
  report(check_multi_lora(kernels).named());
  report("dora_norm", check_dora_norm(kernels));
  report(check_cross_entropy(kernels).named());
  report(check_attention(kernels).named());
  report(check_prefix(kernels).named());
  report(check_rms_norm(kernels).named());
  report("rotary", check_rotary(kernels));
  report(check_prompt(kernels).named());
  report(check_bottleneck(kernels).named());
  report(check_fusion(kernels).named());
  report(check_glu(kernels).named());
  report(check_scale_columns(kernels).named());
  report(check_importance(kernels).named());
  return report.failures;
}
