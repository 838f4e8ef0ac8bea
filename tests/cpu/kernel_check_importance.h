// The case of AdaLoRA's importance. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct ImportanceResults {
  Result averages, scores;

  Named named() const { return {{"importance: averages", averages}, {"importance: scores", scores}}; }
};

ImportanceResults check_importance(const Kernels& kernels) {
  ImportanceResults results;
  const int64_t shapes[][2] = {{1, 1}, {3, 1}, {1, 5}, {5, 17}, {12, 1100}, {1100, 12}, {2, 2100}, {0, 3}, {40, 33}};
  constexpr float kBeta1 = 0.85f, kRest1 = 0.15f, kBeta2 = 0.9f, kRest2 = 0.1f;
  for (bool by_column : {false, true}) {
    for (bool update : {true, false}) {
      std::vector<Floats> kept[4];
      std::vector<const float*> weights, grads;
      std::vector<float*> sensitivity, uncertainty;
      std::vector<int64_t> rows, cols, first;
      int64_t next = 0;
      for (const auto& [m, n] : shapes) {
        for (auto& of : kept) of.push_back(random_floats(m * n));
        rows.push_back(m), cols.push_back(n), first.push_back(next);
        next += by_column ? n : m;
      }
      for (size_t i = 0; i < rows.size(); ++i) {
        weights.push_back(kept[0][i].data()), grads.push_back(update ? kept[1][i].data() : nullptr);
        sensitivity.push_back(kept[2][i].data()), uncertainty.push_back(kept[3][i].data());
      }
      Doubles exact(static_cast<size_t>(next), 0), size(static_cast<size_t>(next), 0), exact_averages, average_sizes;
      for (size_t i = 0; i < rows.size(); ++i) {
        for (int64_t j = 0; j < rows[i] * cols[i]; ++j) {
          const size_t at = static_cast<size_t>(j);
          double s = kept[2][i][at], u = kept[3][i][at], s_size = std::fabs(s), u_size = std::fabs(u);
          if (update) {
            const double now = std::fabs(double(kept[0][i][at]) * kept[1][i][at]);
            s = kBeta1 * s + kRest1 * now, s_size = kBeta1 * s_size + kRest1 * now;
            u = kBeta2 * u + kRest2 * std::fabs(now - s), u_size = kBeta2 * u_size + kRest2 * (now + s_size);
          }
          exact_averages.push_back(s), exact_averages.push_back(u);
          average_sizes.push_back(s_size), average_sizes.push_back(u_size);
          const size_t to = static_cast<size_t>(first[i] + (by_column ? j % cols[i] : j / cols[i]));
          const double count = double(by_column ? rows[i] : cols[i]);
          exact[to] += s * u / count, size[to] += s_size * u_size / count;
        }
      }
      Floats scores(static_cast<size_t>(next), NAN);
      const ImportanceMatrices all = {int64_t(rows.size()), weights.data(), grads.data(), sensitivity.data(),
                                      uncertainty.data(), rows.data(), cols.data(), first.data()};
      kernels.importance(all, kBeta1, kRest1, kBeta2, kRest2, by_column, scores.data());
      Doubles averages;
      for (size_t i = 0; i < rows.size(); ++i) {
        for (size_t j = 0; j < kept[2][i].size(); ++j) {
          averages.push_back(kept[2][i][j]), averages.push_back(kept[3][i][j]);
        }
      }
      const std::string name = std::string(by_column ? "columns" : "rows") + (update ? "" : ", no update");
      compare(results.averages, averages, exact_averages, average_sizes, 2, Dtype::f32, name);
      if (by_column) {  // the mean of no rows is NaN
        for (int64_t j = 0; j < cols[7]; ++j) {
          float& empty = scores[static_cast<size_t>(first[7] + j)];
          empty = std::isnan(empty) ? 0 : INFINITY;
        }
      }
      compare(results.scores, doubles(scores), exact, size, std::sqrt(2100.0), Dtype::f32, name);
    }
  }
  return results;
}
