// Runs every kernel of every instruction set that this CPU has, on several shapes, against sums in double precision.
//
// Built by test_kernel_check.py: natively with AddressSanitizer and UBSan, and for aarch64 (run by qemu). It needs
// neither Python nor torch. All arrays have exactly the size the contract of kernels.h asks for, so that the
// sanitizer sees a read or write that goes too far. Prints one line per instruction set and kernel; exit status 1
// where one is wrong. An argument limits it to one instruction set.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "parallel.h"
#define FUSETUNE_ISA check  // the portable conversions, once more for this file
#include "cpu/isa/isa.h"

using namespace fusetune;
using check::bf16;
using check::f16;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

namespace {

constexpr double kUnit = 0x1p-24;  // rounding of fp32
std::mt19937 generator(1);

// ---- a pool of three threads, in the shape of torch's

int32_t three_threads(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* ctx) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(f, i, i + 1, ctx);
  for (auto& thread : threads) thread.join();
  return 0;
}
int32_t count_threads(uint32_t* n) {
  *n = 3;
  return 0;
}

// ---- results

struct Result {
  double worst = 0;  // in units of what is allowed
  int64_t checked = 0;
  std::string where;
};

using Named = std::vector<std::pair<const char*, Result>>;

struct Report {
  const char* isa;
  int failures = 0;

  void operator()(const char* kernel, const Result& r) {
    const bool ok = r.worst <= 1 && r.checked > 0;
    failures += !ok;
    std::printf("%-7s %-24s %9lld values, worst error %.3f of the bound %s\n", isa, kernel,
                static_cast<long long>(r.checked), r.worst, ok ? "" : ("WRONG at " + r.where).c_str());
  }
  void operator()(const Named& results) {
    for (const auto& [kernel, result] : results) (*this)(kernel, result);
  }
};

// Dots of `terms` ^ 2 products in fp32: error about terms * u * sum |products|; the factor 4 covers products that are
// themselves rounded (a decoded weight, a dropped x) and scale factors; errors of random sums grow as sqrt(terms). Then
// one rounding to the output type, and 1e-7 for the subnormal fp16.
void compare(Result& result, const Doubles& got, const Doubles& exact, const Doubles& magnitude, double terms,
             Dtype dtype, const std::string& where) {
  const double rounding = dtype == Dtype::f32 ? kUnit : dtype == Dtype::f16 ? 0x1p-11 : 0x1p-8;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double bound = 4 * terms * kUnit * magnitude[i] + rounding * std::fabs(exact[i]) + 1e-7;
    const double error = std::fabs(got[i] - exact[i]) / bound;
    ++result.checked;
    if (error <= result.worst) continue;  // false for NaN too
    result.worst = std::isnan(error) ? INFINITY : error;
    result.where = where + " element " + std::to_string(i);
  }
}

// ---- matrices

Floats random_floats(int64_t n) {
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(n));
  for (float& v : values) v = normal(generator);
  return values;
}

// A row-major matrix in one of the storage types, with a gap after each row but the last.
struct Stored {
  int64_t rows, cols, ld;
  Dtype dtype;
  std::vector<uint8_t> bytes;

  Stored(int64_t rows, int64_t cols, Dtype dtype)
      : rows(rows), cols(cols), ld(cols + 3), dtype(dtype),
        bytes(static_cast<size_t>(rows ? ((rows - 1) * ld + cols) * size() : 0), 0xff) {}

  int64_t size() const { return dtype == Dtype::f32 ? 4 : 2; }

  double at(int64_t i, int64_t j) const {
    const uint8_t* p = bytes.data() + (i * ld + j) * size();
    if (dtype == Dtype::f32) return read<float>(p);
    return dtype == Dtype::f16 ? check::to_float(read<f16>(p)) : check::to_float(read<bf16>(p));
  }
  void set(int64_t i, int64_t j, float v) {
    uint8_t* p = bytes.data() + (i * ld + j) * size();
    if (dtype == Dtype::f32) return write(p, v);
    if (dtype == Dtype::f16) return write_as<f16>(p, v);
    write_as<bf16>(p, v);
  }
  void randomize() {
    const Floats values = random_floats(rows * cols);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) set(i, j, values[static_cast<size_t>(i * cols + j)]);
    }
  }
  Doubles values() const {
    Doubles all;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) all.push_back(at(i, j));
    }
    return all;
  }
  Matrix matrix() const { return {bytes.data(), ld, dtype}; }
  MutMatrix mut() { return {bytes.data(), ld, dtype}; }

 private:
  template <class T>
  static T read(const uint8_t* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T>
  static void write(uint8_t* p, const T& v) {
    std::memcpy(p, &v, sizeof v);
  }
  template <class T>
  static void write_as(uint8_t* p, float v) {
    T out;
    check::from_float(v, out);
    write(p, out);
  }
};

Doubles doubles(const Floats& values) { return Doubles(values.begin(), values.end()); }

// c [m, n] += scale * a [m, k] . b [k, n] with strides, and the same of the magnitudes.
struct View {
  const Doubles& data;
  int64_t row, col;
  double operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * row + j * col)]; }
};
void add_product(Doubles& c, Doubles& magnitude, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
                 double scale = 1, const std::vector<bool>* keep = nullptr) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const size_t at = static_cast<size_t>(i * n + j);
      if (keep && !(*keep)[at]) continue;
      for (int64_t d = 0; d < k; ++d) {
        const double product = scale * a(i, d) * b(d, j);
        c[at] += product;
        magnitude[at] += std::fabs(product);
      }
    }
  }
}

// ---- weights

const float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct Quantized {
  std::vector<uint8_t> packed, absmax_q;
  Floats code{kNf4, kNf4 + 16}, absmax, nested_code, nested_absmax;
  Weight4bit w;

  Quantized(int64_t rows, int64_t cols, int64_t blocksize, bool nested) {
    const int64_t n = rows * cols, blocks = (n + blocksize - 1) / blocksize;
    packed.resize(static_cast<size_t>((n + 1) / 2));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(generator());
    w = {packed.data(), code.data(), nullptr, nullptr, nullptr, nullptr, 0, 0, blocksize, rows, cols};
    if (!nested) {
      absmax = random_floats(blocks);
      w.absmax = absmax.data();
      return;
    }
    absmax_q.resize(static_cast<size_t>(blocks));
    for (uint8_t& q : absmax_q) q = static_cast<uint8_t>(generator());
    nested_code = random_floats(256);
    nested_absmax = random_floats((blocks + 255) / 256);
    w.absmax_q = absmax_q.data();
    w.nested_code = nested_code.data();
    w.nested_absmax = nested_absmax.data();
    w.nested_offset = 0.25f;
    w.nested_blocksize = 256;
  }

  float value(int64_t i) const {
    const size_t block = static_cast<size_t>(i / w.blocksize);
    float scale;
    if (w.absmax_q) {
      const volatile float product = nested_code[absmax_q[block]] * nested_absmax[block / 256];  // no FMA
      scale = product + w.nested_offset;
    } else {
      scale = absmax[block];
    }
    const uint8_t byte = packed[static_cast<size_t>(i / 2)];
    return code[i % 2 ? byte & 15 : byte >> 4] * scale;
  }
  Doubles values() const {
    Doubles all;
    for (int64_t i = 0; i < w.rows * w.cols; ++i) all.push_back(value(i));
    return all;
  }
};

// ---- dropout, as pylib/reference/dropout.py defines it

std::vector<bool> kept(const Dropout& d, int64_t rows, int64_t cols) {
  std::vector<bool> keep;
  for (int64_t i = 0; i < rows * cols; ++i) {
    const uint64_t block = static_cast<uint64_t>(i) >> 2;
    uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0};
    uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
      const uint64_t p0 = uint64_t{0xd2511f53u} * c[0], p1 = uint64_t{0xcd9e8d57u} * c[2];
      const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                                static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
      std::memcpy(c, next, sizeof c);
    }
    keep.push_back(c[i & 3] >= d.threshold);
  }
  return keep;
}

Doubles dropped(const Stored& x, const Dropout& d) {
  Doubles values = x.values();
  if (!d.threshold) return values;
  const std::vector<bool> keep = kept(d, x.rows, x.cols);
  for (size_t i = 0; i < values.size(); ++i) values[i] = keep[i] ? values[i] * d.scale : 0;
  return values;
}

#include "kernel_check_cases.h"

}  // namespace

int main(int argc, char** argv) {
  set_torch_pool(reinterpret_cast<uintptr_t>(&three_threads), reinterpret_cast<uintptr_t>(&count_threads));
  int failures = 0;
  for (const Kernels* const* table = available_kernels(); *table; ++table) {
    if (argc > 1 && std::strcmp(argv[1], (*table)->isa) != 0) continue;
    generator.seed(1);
    failures += check_table(**table);
  }
  return failures > 0;
}
