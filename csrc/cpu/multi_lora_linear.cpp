// The low-rank products of a linear layer under several LoRA adapters, each serving rows of its own or all rows:
// s = drop(x) A^T, y += scale (s B^T) + bias forward; ds = scale dy B, dB = scale dy^T s, dA = ds^T drop(x) and
// dx += drop'(ds A) backward. The base products are linear's and linear_dx's.
//
// Tiling: that of lora_linear.cpp, but a task's rows are looked up in its adapter's list. Where all adapters serve all
// rows a task does all of them for one buffer of x (or dy), except that with dropout each adapter has a mask, and so a
// buffer, of its own. Expanding takes tasks of up to 256 rows x 512 columns: for 128 columns the adapters' factors are
// laid out as [rank][128] in L2, and 32 rows of y (or dx) at a time are read, get all that is theirs, and are written.
//
// Bytes: x and dy once, y and dx read and written once more than by the base product alone; for the rows of one adapter
// r (N + K) products each, whatever other adapters there are.
#include <cstring>

#include "lora.h"
#include "parallel.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

int64_t row_at(const LoraAdapter& a, int64_t i) {
  return a.blocks ? a.blocks[i / a.block] * a.block + i % a.block : i;
}

// How many of the adapter's rows lie before row r.
int64_t rows_before(const LoraAdapter& a, int64_t r) {
  if (!a.blocks || a.rows == 0) return least(r, a.rows);
  int64_t count = 0;
  for (int64_t b = 0; b < a.rows / a.block && a.blocks[b] * a.block < r; ++b) {
    count += least(a.block, r - a.blocks[b] * a.block);
  }
  return count;
}

// Adapters [first, end), of which a task takes rows [row, end_row) of their lists and columns from `col`.
struct Task {
  int64_t first, end, row, end_row, col;
};

// How the adapters are cut into tasks: those that read the same are served together.
class Tasks {
 public:
  // step: the rows of a task, as a function of an adapter's rows. masked: whether dropout makes what is read differ.
  Tasks(const LoraAdapters& all, bool masked, int64_t (*step)(int64_t), int64_t cols, int64_t col_step)
      : all_(all), step_(step), col_step_(col_step), col_parts_(ceil_div(cols, col_step)) {
    bool same = true;
    for (int64_t a = 0; a < all.count; ++a) same = same && !all.data[a].blocks && !(masked && all.data[a].dropout.threshold);
    size_ = same ? all.count : 1;
  }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t a = 0; a < all_.count; a += size_) total += row_parts(a) * col_parts_;
    return total;
  }
  Task at(int64_t index) const {
    int64_t a = 0;
    for (; index >= row_parts(a) * col_parts_; a += size_) index -= row_parts(a) * col_parts_;
    const int64_t rows = all_.data[a].rows, row = index % row_parts(a) * step_(rows);
    return {a, a + size_, row, least(rows, row + step_(rows)), index / row_parts(a) * col_step_};
  }
  int64_t row_parts(int64_t a) const { return ceil_div(all_.data[a].rows, step_(all_.data[a].rows)); }

 private:
  LoraAdapters all_;
  int64_t (*step_)(int64_t);
  int64_t col_step_, col_parts_, size_;
};

int64_t dot_rows(int64_t) { return kDotRows; }

// Calls f(adapter) for each, all threads at one where there are few.
template <class F>
void for_adapters(const LoraAdapters& all, const F& f) {
  if (all.count >= num_threads()) return parallel_chunks(all.count, [&](int64_t a) { f(a); });
  for (int64_t a = 0; a < all.count; ++a) f(a);
}

// ---- expanding

// tile [rank + 1][kCols]: columns [col, col + width) of the factor, scaled, and the bias; zeros up to whole vectors.
void fill_tile(const LoraAdapter& a, bool backward, int64_t cols, int64_t col, int64_t width, float* tile) {
  const int64_t padded = whole_vectors(width);
  if (backward) {
    for (int64_t j = 0; j < a.rank; ++j) load_floats(a.lora_A, Dtype::f32, j * cols + col, width, tile + j * kCols);
    return;
  }
  transpose_to(a.lora_B + col * a.rank, a.rank, width, a.rank, tile, kCols, padded);
  const F scale = set1(a.scale);
  for (int64_t j = 0; j < a.rank; ++j) {
    for (int64_t c = 0; c < padded; c += kLanes) store(tile + j * kCols + c, mul(load(tile + j * kCols + c), scale));
  }
  if (a.bias) load_floats(a.bias, Dtype::f32, col, width, tile + a.rank * kCols);
}

void add_row(const float* from, int64_t padded, float* to) {
  for (int64_t c = 0; c < padded; c += kLanes) store(to + c, add(load(to + c), load(from + c)));
}

// What adapter a adds to rows [row, row + n) of `out`, of which buffer [kRows][kCols] has the columns from `col`;
// present: which of them it has by now.
void add_adapter(const MutMatrix& out, const LoraAdapter& a, bool backward, const float* tile, int64_t row, int64_t n,
                 int64_t cols, int64_t col, int64_t width, float* buffer, bool* present) {
  const int64_t first = rows_before(a, row), end = rows_before(a, row + n), padded = whole_vectors(width);
  if (first == end) return;
  for (int64_t i = first; i < end; ++i) {
    const int64_t to = row_at(a, i) - row;
    if (!present[to]) load_floats(out.data, out.dtype, (row + to) * out.ld + col, width, buffer + to * kCols);
    present[to] = true;
    if (!backward && a.bias) add_row(tile + a.rank * kCols, padded, buffer + to * kCols);
  }
  const float* const low = (backward ? a.ds : a.s) + first * a.rank;
  const bool masked = backward && a.dropout.threshold;
  const int64_t start = row_at(a, first);
  if (!masked && row_at(a, end - 1) - start == end - 1 - first) {
    return add_outer({low, a.rank, 1}, end - first, {tile, kCols}, padded, a.rank, true,
                     buffer + (start - row) * kCols, kCols);
  }
  alignas(64) float terms[kRows * kCols];
  add_outer({low, a.rank, 1}, end - first, {tile, kCols}, padded, a.rank, false, terms, kCols);
  for (int64_t i = first; i < end; ++i) {
    float* const term = terms + (i - first) * kCols;
    if (masked) apply_dropout(a.dropout, row_at(a, i) * cols + col, width, term);
    add_row(term, padded, buffer + (row_at(a, i) - row) * kCols);
  }
}

// Rows [row, end_row) and columns [col, col + width) of `out`.
void expand_columns(const MutMatrix& out, const LoraAdapters& all, bool backward, int64_t row, int64_t end_row,
                    int64_t cols, int64_t col, int64_t width) {
  int64_t ranks = 0;
  for (int64_t a = 0; a < all.count; ++a) ranks += all.data[a].rank + 1;
  float* const tiles = workspace(ranks * kCols);
  float* tile = tiles;
  for (int64_t a = 0; a < all.count; tile += (all.data[a].rank + 1) * kCols, ++a) {
    const bool used = rows_before(all.data[a], row) < rows_before(all.data[a], end_row);
    if (used) fill_tile(all.data[a], backward, cols, col, width, tile);
  }
  alignas(64) float buffer[kRows * kCols];
  for (; row < end_row; row += kRows) {
    const int64_t n = least(kRows, end_row - row);
    bool present[kRows] = {};
    tile = tiles;
    for (int64_t a = 0; a < all.count; tile += (all.data[a].rank + 1) * kCols, ++a) {
      add_adapter(out, all.data[a], backward, tile, row, n, cols, col, width, buffer, present);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (present[i]) store_floats(buffer + i * kCols, out.data, out.dtype, (row + i) * out.ld + col, width);
    }
  }
}

// ---- ds and dB

// An adapter's operands with ranks padded to whole vectors, and the parts of its sums.
struct Scratch {
  int64_t ld, row_parts;
  const float* B;      // [N][ld]
  float *padded_B, *s;  // s: scaled, [rows][ld]
  float *ds, *dB;      // [column parts][rows][ld], [row parts][N][ld]
};

bool is_direct(const LoraAdapter& a, int64_t row_parts) { return row_parts == 1 && whole_vectors(a.rank) == a.rank; }

Scratch* make_scratch(const LoraAdapters& all, const Tasks& tasks, int64_t n, int64_t col_parts) {
  auto* const scratch =
      reinterpret_cast<Scratch*>(workspace<Purpose::shared>(all.count * int64_t{sizeof(Scratch) / sizeof(float)}));
  int64_t size = 0;
  const auto place = [&](float* memory) {
    size = 0;
    const auto take = [&](int64_t count) {
      size += count;
      return memory ? memory + size - count : nullptr;
    };
    for (int64_t i = 0; i < all.count; ++i) {
      const LoraAdapter& a = all.data[i];
      const int64_t ld = whole_vectors(a.rank), row_parts = tasks.row_parts(i);
      Scratch& to = scratch[i];
      to.ld = ld, to.row_parts = row_parts;
      to.padded_B = ld == a.rank ? nullptr : take(n * ld);
      to.B = ld == a.rank ? a.lora_B : to.padded_B;
      to.s = take(a.rows * ld);
      to.ds = take(col_parts * a.rows * ld);
      to.dB = !a.dB ? nullptr : is_direct(a, row_parts) ? a.dB : take(row_parts * n * ld);
    }
  };
  place(nullptr);
  place(workspace(size));
  return scratch;
}

}  // namespace

void multi_lora_shrink(const Matrix& x, int64_t k, const LoraAdapters& all) {
  for (int64_t a = 0; k == 0 && a < all.count; ++a) {
    memset(all.data[a].s, 0, static_cast<size_t>(all.data[a].rows * all.data[a].rank) * sizeof(float));
  }
  const Tasks tasks(all, true, dot_rows, 1, 1);
  parallel_chunks(tasks.count(), [&](int64_t index) {
    const Task task = tasks.at(index);
    alignas(64) float buffer[kDotRows * kDepth];
    const int64_t rows = task.end_row - task.row;
    const LoraAdapter& any = all.data[task.first];
    for (int64_t d = 0; d < k; d += kDepth) {
      const int64_t depth = least(kDepth, k - d);
      for (int64_t i = 0; i < rows; ++i) {
        load_row(x, row_at(any, task.row + i), d, depth, any.dropout, k, buffer + i * kDepth);
      }
      for (int64_t at = task.first; at < task.end; ++at) {
        const LoraAdapter& a = all.data[at];
        float* const s = a.s + task.row * a.rank;
        if (rows == kDotRows) {
          dot_ranks<kDotRows>(buffer, a.lora_A + d, k, depth, a.rank, d > 0, s);
          continue;
        }
        for (int64_t i = 0; i < rows; ++i) {
          dot_ranks<1>(buffer + i * kDepth, a.lora_A + d, k, depth, a.rank, d > 0, s + i * a.rank);
        }
      }
    }
  });
}

void multi_lora_expand(const MutMatrix& out, int64_t m, int64_t cols, const LoraAdapters& all, bool backward) {
  const int64_t task_rows = rows_of_task(m), row_parts = ceil_div(m, task_rows);
  parallel_chunks(row_parts * ceil_div(cols, kTaskCols), [&](int64_t task) {
    const int64_t row = task % row_parts * task_rows, first_col = task / row_parts * kTaskCols;
    const int64_t end_col = least(cols, first_col + kTaskCols);
    for (int64_t col = first_col; col < end_col; col += kCols) {
      expand_columns(out, all, backward, row, least(m, row + task_rows), cols, col, least(kCols, end_col - col));
    }
  });
}

void multi_lora_ds_db(const Matrix& dy, int64_t n, const LoraAdapters& all) {
  const Tasks tasks(all, false, rows_of_task, n, kTaskCols);
  const int64_t col_parts = ceil_div(n, kTaskCols);
  Scratch* const scratch = make_scratch(all, tasks, n, col_parts);
  for_adapters(all, [&](int64_t i) {
    const LoraAdapter& a = all.data[i];
    pad_rows(a.s, a.rows, a.rank, a.scale, scratch[i].ld, scratch[i].s);
    if (scratch[i].padded_B) pad_rows(a.lora_B, n, a.rank, 1.0f, scratch[i].ld, scratch[i].padded_B);
  });
  parallel_chunks(tasks.count(), [&](int64_t index) {
    const Task task = tasks.at(index);
    const LoraAdapter& any = all.data[task.first];
    visit_buffers(dy, task.row, task.end_row, task.col, least(n, task.col + kTaskCols), n, {},
                  [&](int64_t i) { return row_at(any, i); },
                  [&](const float* buffer, int64_t row, int64_t rows, int64_t col, int64_t width) {
      for (int64_t i = task.first; i < task.end; ++i) {
        const Scratch& own = scratch[i];
        const int64_t ld = own.ld;
        add_outer({buffer, kCols, 1}, rows, {own.B + col * ld, ld}, ld, width, col != task.col,
                  own.ds + (col / kTaskCols * all.data[i].rows + row) * ld, ld);
        if (!own.dB) continue;
        add_outer({buffer, 1, kCols}, width, {own.s + row * ld, ld}, ld, rows, row != task.row,
                  own.dB + (row / rows_of_task(all.data[i].rows) * n + col) * ld, ld);
      }
    });
  });
  for_adapters(all, [&](int64_t i) {
    const LoraAdapter& a = all.data[i];
    const Scratch& own = scratch[i];
    add_parts(own.ds, col_parts, a.rows, own.ld, a.rank, a.scale, a.ds);
    if (a.dB && own.dB != a.dB) add_parts(own.dB, own.row_parts, n, own.ld, a.rank, 1.0f, a.dB);
  });
}

void multi_lora_da(const Matrix& x, int64_t k, const LoraAdapters& all) {
  const Tasks tasks(all, true, rows_of_task, k, kTaskCols);
  const int64_t ld = whole_vectors(k);
  // An adapter's parts [row parts][rank][ld]; in dA itself where there is one of its size.
  const auto is_direct = [&](int64_t i) { return tasks.row_parts(i) == 1 && ld == k; };
  const auto size = [&](int64_t i) {
    return is_direct(i) || !all.data[i].dA ? 0 : tasks.row_parts(i) * all.data[i].rank * ld;
  };
  int64_t total = 0;
  for (int64_t i = 0; i < all.count; ++i) total += size(i);
  float* const memory = workspace(total);
  const auto parts = [&](int64_t i) {
    if (is_direct(i)) return all.data[i].dA;
    float* at = memory;
    for (int64_t before = 0; before < i; ++before) at += size(before);
    return at;
  };
  parallel_chunks(tasks.count(), [&](int64_t index) {
    const Task task = tasks.at(index);
    const LoraAdapter& any = all.data[task.first];
    visit_buffers(x, task.row, task.end_row, task.col, least(k, task.col + kTaskCols), k, any.dropout,
                  [&](int64_t i) { return row_at(any, i); },
                  [&](const float* buffer, int64_t row, int64_t rows, int64_t col, int64_t width) {
      for (int64_t i = task.first; i < task.end; ++i) {
        const LoraAdapter& a = all.data[i];
        if (!a.dA) continue;
        float* const part = parts(i) + row / rows_of_task(a.rows) * a.rank * ld + col;
        add_outer({a.ds + row * a.rank, 1, a.rank}, a.rank, {buffer, kCols}, whole_vectors(width), rows,
                  row != task.row, part, ld);
      }
    });
  });
  for_adapters(all, [&](int64_t i) {
    const LoraAdapter& a = all.data[i];
    if (a.dA && !is_direct(i)) add_parts(parts(i), tasks.row_parts(i), a.rank, ld, k, 1.0f, a.dA);
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
