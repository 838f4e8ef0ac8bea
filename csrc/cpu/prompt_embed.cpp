// Prompt and token embeddings in one sequence of P + T places for each of B rows, and the gradients of both.
//
// Tiling: forward, blocks of places of one row, some 64 KB of the result each. The prompt's gradient: one vector of one
// prompt and 1024 columns at a time, summed over the batch in its order, so that the result depends on no number of
// threads. The weight's gradient: blocks of the vocabulary; the tokens come sorted by id, each id's in order, and a
// vector is summed in fp32 and written once.
// Bytes, E to an element: forward 2 B (P + T) H E. (Look-up, repetition and concatenation: 4 B (P + T) H E.) The
// prompt's gradient B P H E read, 4 P H written; the weight's B T H E read, V H E written.
#include "../parallel.h"
#include "convert.h"
#include "isa_kernels.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kBlockElements = 16384;
constexpr int64_t kColumns = 1024;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The prompt's places in one row.
class Slots {
 public:
  Slots(const PromptLayout& layout, int64_t row)
      : slots_(layout.slots ? layout.slots + row * layout.slots_ld : nullptr), length_(layout.length) {}

  int64_t place(int64_t j) const { return slots_ ? slots_[j] : j; }
  // How many of them lie before a place.
  int64_t before(int64_t place) const {
    if (!slots_) return smaller(place, length_);
    return first([&](int64_t j) { return slots_[j] >= place; });
  }
  // The place of a token: slots_[j] - j tokens lie before slot j.
  int64_t place_of_token(int64_t t) const {
    if (!slots_) return length_ + t;
    return t + first([&](int64_t j) { return slots_[j] - j > t; });
  }

 private:
  // The first j for which an ascending condition holds, P if there is none.
  template <class Condition>
  int64_t first(const Condition& holds) const {
    int64_t low = 0, high = length_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (holds(middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  const int64_t* slots_;
  int64_t length_;
};

// Calls f with a null pointer of the element type.
template <class Function>
void with_type(Dtype dtype, const Function& f) {
  if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::f16) return f(static_cast<f16*>(nullptr));
  f(static_cast<bf16*>(nullptr));
}

template <class T>
void copy_scaled(const T* x, int64_t n, float factor, T* y) {
  if (factor == 1) {
    memcpy(y, x, n * sizeof(T));
    return;
  }
  const F scale = set1(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, mul(load(x + i), scale));
  if (i == n) return;
  const int lanes = static_cast<int>(n - i);
  store_part(y + i, mul(load_part(x + i, lanes), scale), lanes);
}

// y = x, from one type to another.
void convert(const Matrix& x, int64_t row, int64_t n, const MutMatrix& y, int64_t to) {
  float* buffer = workspace((n + kLanes - 1) / kLanes * kLanes);
  load_floats(x.data, x.dtype, row * x.ld, n, buffer);
  store_floats(buffer, y.data, y.dtype, to * y.ld, n);
}

// sum += factor x
template <class T>
void add_scaled(const T* x, int64_t n, float factor, float* sum) {
  const F scale = set1(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(sum + i, add(load(sum + i), mul(load(x + i), scale)));
  if (i == n) return;
  const int lanes = static_cast<int>(n - i);
  store_part(sum + i, add(load_part(sum + i, lanes), mul(load_part(x + i, lanes), scale)), lanes);
}

}  // namespace

int64_t prompt_embed(const int64_t* input_ids, const PromptLayout& layout, const Matrix& weight, int64_t vocabulary,
                     int64_t h, const Matrix& prompt, float scale, const MutMatrix& out) {
  for (int64_t i = 0; i < layout.batch * layout.tokens; ++i) {
    if (input_ids[i] < 0 || input_ids[i] >= vocabulary) return i;
  }
  const int64_t places = layout.length + layout.tokens, block = larger(1, kBlockElements / larger(1, h));
  const int64_t blocks = (places + block - 1) / block;
  with_type(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* table = static_cast<const T*>(weight.data);
    parallel_chunks(layout.batch * blocks, [&](int64_t chunk) {
      const int64_t row = chunk / blocks, begin = chunk % blocks * block, end = smaller(places, begin + block);
      const int64_t group = layout.rows ? layout.rows[row] : 0;
      const Slots slots(layout, row);
      int64_t j = slots.before(begin);
      for (int64_t place = begin; place < end; ++place) {
        const int64_t to = row * places + place;
        T* y = static_cast<T*>(out.data) + to * out.ld;
        if (j == layout.length || slots.place(j) != place) {
          const int64_t id = input_ids[row * layout.tokens + place - j];
          copy_scaled(table + id * weight.ld, h, scale, y);
          continue;
        }
        const int64_t from = group * layout.length + j++;
        if (group < 0) {
          memset(y, 0, h * sizeof(T));
        } else if (prompt.dtype == weight.dtype) {
          memcpy(y, static_cast<const T*>(prompt.data) + from * prompt.ld, h * sizeof(T));
        } else {
          convert(prompt, from, h, out, to);
        }
      }
    });
  });
  return -1;
}

void prompt_embed_dprompt(const Matrix& dout, const PromptLayout& layout, int64_t h, float* dprompt) {
  const int64_t places = layout.length + layout.tokens, blocks = (h + kColumns - 1) / kColumns;
  with_type(dout.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_chunks(layout.groups * layout.length * blocks, [&](int64_t chunk) {
      const int64_t vector = chunk / blocks, column = chunk % blocks * kColumns, n = smaller(kColumns, h - column);
      const int64_t group = vector / layout.length, j = vector % layout.length;
      float* sum = dprompt + vector * h + column;
      memset(sum, 0, n * sizeof(float));
      for (int64_t row = 0; row < layout.batch; ++row) {
        if ((layout.rows ? layout.rows[row] : 0) != group) continue;
        const int64_t from = row * places + Slots(layout, row).place(j);
        add_scaled(static_cast<const T*>(dout.data) + from * dout.ld + column, n, 1, sum);
      }
    });
  });
}

void prompt_embed_dweight(const Matrix& dout, const PromptLayout& layout, int64_t h, const int64_t* ids,
                          const int64_t* order, int64_t vocabulary, float scale, int64_t padding_idx,
                          const MutMatrix& dweight) {
  const int64_t places = layout.length + layout.tokens, count = layout.batch * layout.tokens;
  const int64_t block = larger(1, kBlockElements / larger(1, h));
  with_type(dout.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_chunks((vocabulary + block - 1) / block, [&](int64_t chunk) {
      const int64_t begin = chunk * block, end = smaller(vocabulary, begin + block);
      float* sum = workspace(h);
      int64_t low = 0, high = count;  // the first token of this block
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (ids[middle] < begin) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      for (int64_t id = begin; id < end; ++id) {
        T* y = static_cast<T*>(dweight.data) + id * dweight.ld;
        if (low == count || ids[low] != id || id == padding_idx) {
          memset(y, 0, h * sizeof(T));
          while (low < count && ids[low] == id) ++low;
          continue;
        }
        memset(sum, 0, h * sizeof(float));
        for (; low < count && ids[low] == id; ++low) {
          const int64_t row = order[low] / layout.tokens, t = order[low] % layout.tokens;
          const int64_t from = row * places + Slots(layout, row).place_of_token(t);
          add_scaled(static_cast<const T*>(dout.data) + from * dout.ld, h, scale, sum);
        }
        store_floats_of<T>(sum, y, 0, h);
      }
    });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
