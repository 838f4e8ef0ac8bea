// The cases of RMS norm. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct RmsNormResults {
  Result y, dx;

  Named named() const { return {{"rms_norm", y}, {"rms_norm_dx", dx}}; }
};

RmsNormResults check_rms_norm(const Kernels& kernels) {
  RmsNormResults results;
  const float eps = 1e-5f;
  const int64_t shapes[][2] = {{1, 1}, {3, 15}, {5, 17}, {40, 1000}, {0, 4}};
  for (const auto& [m, n] : shapes) {
    for (Dtype dtype : kDtypes) {
      Stored x(m, n, dtype), dy(m, n, dtype), y(m, n, dtype), dx(m, n, dtype);
      x.randomize(), dy.randomize();
      const Floats weight = random_floats(n);
      Floats rstd(static_cast<size_t>(m));
      kernels.rms_norm(x.matrix(), m, n, weight.data(), eps, y.mut(), rstd.data());
      kernels.rms_norm_dx(dy.matrix(), x.matrix(), m, n, weight.data(), rstd.data(), dx.mut());
      Doubles exact, size, exact_dx, dx_size;
      for (int64_t i = 0; i < m; ++i) {
        double squares = 0, along = 0, sizes = 0;
        for (int64_t j = 0; j < n; ++j) {
          const double product = dy.at(i, j) * weight[static_cast<size_t>(j)] * x.at(i, j);
          squares += x.at(i, j) * x.at(i, j), along += product, sizes += std::fabs(product);
        }
        const double r = 1 / std::sqrt(squares / double(n) + eps);
        for (int64_t j = 0; j < n; ++j) {
          const double w = weight[static_cast<size_t>(j)], upper = dy.at(i, j) * w, factor = r * r / double(n);
          exact.push_back(w * x.at(i, j) * r), size.push_back(std::fabs(exact.back()));
          exact_dx.push_back(r * (upper - x.at(i, j) * along * factor));
          dx_size.push_back(r * (std::fabs(upper) + std::fabs(x.at(i, j)) * sizes * factor));
        }
      }
      const std::string name = describe(m, n, 0, 0, dtype);
      compare(results.y, y.values(), exact, size, std::sqrt(double(n)), dtype, name);
      compare(results.dx, dx.values(), exact_dx, dx_size, std::sqrt(double(n)), dtype, name);
    }
  }
  return results;
}
