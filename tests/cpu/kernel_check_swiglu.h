// The case of silu(gate) * up. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct SwigluResults {
  Result y, dgate, dup;
};

SwigluResults check_swiglu(const Kernels& kernels) {
  SwigluResults results;
  const int64_t shapes[][2] = {{1, 1}, {3, 15}, {5, 17}, {40, 1000}, {2, 33}};
  for (const auto& [m, n] : shapes) {
    for (Dtype dtype : kDtypes) {
      Stored gate(m, n, dtype), up(m, n, dtype), dy(m, n, dtype), y(m, n, dtype), dgate(m, n, dtype), dup(m, n, dtype);
      gate.randomize(), up.randomize(), dy.randomize();
      Doubles exact, exact_dgate, exact_dup, size, dgate_size, dup_size;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double z = gate.at(i, j), s = 1 / (1 + std::exp(-z)), upper = dy.at(i, j);
          exact.push_back(z * s * up.at(i, j)), size.push_back(std::fabs(exact.back()));
          exact_dup.push_back(upper * z * s), dup_size.push_back(std::fabs(exact_dup.back()));
          exact_dgate.push_back(upper * up.at(i, j) * (s + z * s * (1 - s)));
          dgate_size.push_back(std::fabs(upper * up.at(i, j)) * (s + std::fabs(z) * s * (1 - s)));
        }
      }
      kernels.swiglu(gate.matrix(), up.matrix(), m, n, y.mut());
      kernels.swiglu_backward(dy.matrix(), gate.matrix(), up.matrix(), m, n, dgate.mut(), dup.mut());
      const std::string name = describe(m, n, 0, 0, dtype);
      // A few roundings each, and exp to within two units: 4 * terms of them.
      compare(results.y, y.values(), exact, size, 2, dtype, name);
      compare(results.dup, dup.values(), exact_dup, dup_size, 2, dtype, name);
      compare(results.dgate, dgate.values(), exact_dgate, dgate_size, 2, dtype, name);
      // A gradient may take its input's place.
      kernels.swiglu_backward(dy.matrix(), gate.matrix(), up.matrix(), m, n, gate.mut(), up.mut());
      if (gate.bytes != dgate.bytes || up.bytes != dup.bytes) {
        results.dgate.worst = INFINITY, results.dgate.where = name + ", in place";
      }
    }
  }
  return results;
}
