// The cases of layers under several LoRA adapters. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct MultiLoraResults {
  Result s, y, ds, dB, dA, dx;

  Named named() const {
    return {{"multi_lora_shrink", s}, {"multi_lora_expand: y", y}, {"multi_lora_expand: dx", dx},
            {"multi_lora_ds_db: ds", ds}, {"multi_lora_ds_db: dB", dB}, {"multi_lora_da", dA}};
  }
};

// One adapter's arrays, of exactly the size that the contract asks for, and the rows of x that it serves.
struct OwnedAdapter {
  int64_t rank;
  std::vector<int64_t> blocks, rows;
  bool all = false;
  Floats lora_A, lora_B, bias, s, ds, dA, dB;

  OwnedAdapter(int64_t rank, int64_t n, int64_t k) : rank(rank), lora_A(random_floats(rank * k)),
                                                     lora_B(random_floats(n * rank)), bias(random_floats(n)) {}

  LoraAdapter adapter(int64_t block, const Dropout& dropout, bool last) {
    for (Floats* low : {&s, &ds}) *low = random_floats(static_cast<int64_t>(rows.size()) * rank);
    dA.assign(lora_A.size(), NAN);
    dB.assign(lora_B.size(), NAN);
    return {rank, static_cast<int64_t>(rows.size()), all ? nullptr : blocks.data(), block, lora_A.data(), lora_B.data(),
            last ? nullptr : bias.data(), 0.5f, dropout, s.data(), ds.data(), dA.data(), last ? nullptr : dB.data()};
  }
};

void check_multi_lora_case(const Kernels& kernels, int64_t blocks, int64_t block, int64_t n, int64_t k, bool all,
                           const Dropout& drop, Dtype dtype, MultiLoraResults& results) {
  const int64_t m = blocks * block, ranks[] = {16, 3, 17, 1};
  const std::string name = describe(m, n, k, 0, dtype) + (all ? " all rows" : " own rows");
  std::vector<OwnedAdapter> owned;
  for (const int64_t rank : ranks) owned.emplace_back(rank, n, k);
  // Block b has the adapter 2 b mod 5, where that is none of the four none; the second has no row.
  for (size_t i = 0; i < owned.size(); ++i) {
    owned[i].all = all;
    for (int64_t b = 0; b < blocks; ++b) {
      if (!all && (i == 1 || 2 * b % 5 != static_cast<int64_t>(i))) continue;
      owned[i].blocks.push_back(b);
      for (int64_t t = 0; t < block; ++t) owned[i].rows.push_back(b * block + t);
    }
  }
  Stored x(m, k, dtype), dy(m, n, dtype), y(m, n, dtype), dx(m, k, dtype);
  for (Stored* matrix : {&x, &dy, &y, &dx}) matrix->randomize();
  std::vector<LoraAdapter> list;
  std::vector<Dropout> drops;
  for (size_t i = 0; i < owned.size(); ++i) {
    drops.push_back(i == 2 ? kNoDropout : Dropout{drop.seed + i, drop.threshold, drop.scale});
    list.push_back(owned[i].adapter(block, drops[i], i == 3));
  }
  const LoraAdapters adapters{list.data(), static_cast<int64_t>(list.size())};
  Doubles ey = y.values(), edx = dx.values(), sy = ey, sdx = edx;
  for (double& v : sy) v = std::fabs(v);
  for (double& v : sdx) v = std::fabs(v);

  kernels.multi_lora_shrink(x.matrix(), k, adapters);
  for (size_t i = 0; i < owned.size(); ++i) {
    const OwnedAdapter& a = owned[i];
    const Doubles used = dropped(x, drops[i]), factor = doubles(a.lora_A);
    Sums es(static_cast<int64_t>(a.s.size()));
    for (size_t r = 0; r < a.rows.size(); ++r) {
      for (int64_t j = 0; j < a.rank; ++j) {
        for (int64_t c = 0; c < k; ++c) {
          es.add(int64_t(r) * a.rank + j, used[size_t(a.rows[r] * k + c)] * factor[size_t(j * k + c)]);
        }
      }
    }
    compare(results.s, doubles(a.s), es.exact, es.size, std::sqrt(double(k)), Dtype::f32, name);
  }
  kernels.multi_lora_expand(y.mut(), m, n, adapters, false);
  // Backward from what ds_db gives: its own errors are small beside the bound of what follows.
  kernels.multi_lora_ds_db(dy.matrix(), n, adapters);
  kernels.multi_lora_da(x.matrix(), k, adapters);
  kernels.multi_lora_expand(dx.mut(), m, k, adapters, true);
  double depth = 1;
  for (size_t i = 0; i < owned.size(); ++i) {
    const OwnedAdapter& a = owned[i];
    const Doubles used = dropped(x, drops[i]);
    const std::vector<bool> keep = kept(drops[i], m, k);
    Sums eds(int64_t(a.rows.size()) * a.rank), edA(a.rank * k), edB(n * a.rank);
    for (size_t r = 0; r < a.rows.size(); ++r) {
      const int64_t row = a.rows[r];
      for (int64_t j = 0; j < a.rank; ++j) {
        const int64_t low = int64_t(r) * a.rank + j;
        const double s = a.s[size_t(low)], ds = a.ds[size_t(low)];
        for (int64_t c = 0; c < n; ++c) {
          const double b = a.lora_B[size_t(c * a.rank + j)];
          ey[size_t(row * n + c)] += 0.5 * s * b, sy[size_t(row * n + c)] += std::fabs(0.5 * s * b);
          eds.add(low, 0.5 * dy.at(row, c) * b);
          edB.add(c * a.rank + j, 0.5 * dy.at(row, c) * s);
        }
        for (int64_t c = 0; c < k; ++c) {
          edA.add(j * k + c, ds * used[size_t(row * k + c)]);
          const double factor = drops[i].threshold ? (keep[size_t(row * k + c)] ? drops[i].scale : 0.0) : 1.0;
          const double term = factor * ds * a.lora_A[size_t(j * k + c)];
          edx[size_t(row * k + c)] += term, sdx[size_t(row * k + c)] += std::fabs(term);
        }
      }
      for (int64_t c = 0; c < n && list[i].bias; ++c) {
        ey[size_t(row * n + c)] += a.bias[size_t(c)], sy[size_t(row * n + c)] += std::fabs(a.bias[size_t(c)]);
      }
    }
    depth += double(a.rank + 1);
    compare(results.ds, doubles(a.ds), eds.exact, eds.size, std::sqrt(double(n)), Dtype::f32, name);
    const double rows = std::sqrt(double(a.rows.size() + 1));
    compare(results.dA, doubles(a.dA), edA.exact, edA.size, rows, Dtype::f32, name);
    if (list[i].dB) compare(results.dB, doubles(a.dB), edB.exact, edB.size, rows, Dtype::f32, name);
  }
  compare(results.y, y.values(), ey, sy, std::sqrt(depth), dtype, name);
  compare(results.dx, dx.values(), edx, sdx, std::sqrt(depth), dtype, name);
}

MultiLoraResults check_multi_lora(const Kernels& kernels) {
  MultiLoraResults results;
  // Few rows, ragged ones, more than a task's 256 and 512 columns, none.
  const int64_t shapes[][4] = {{5, 1, 7, 9}, {7, 3, 33, 130}, {6, 50, 64, 128}, {3, 4, 530, 1030}, {0, 4, 8, 8}};
  for (const auto& [blocks, block, n, k] : shapes) {
    for (Dtype dtype : kDtypes) {
      for (bool all : {false, true}) {
        for (const Dropout& drop : {kNoDropout, kSomeDropout}) {
          check_multi_lora_case(kernels, blocks, block, n, k, all, drop, dtype, results);
        }
      }
    }
  }
  return results;
}
