// The cases of f(gate) * up. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct GluResults {
  Result y, dgate, dup;

  Named named() const { return {{"glu", y}, {"glu: dgate", dgate}, {"glu: dup", dup}}; }
};

// Sizes of the slope's terms, which cancel where it crosses zero.
double slope_size(Activation kind, double z) {
  const double root = std::sqrt(2 / 3.14159265358979323846);
  if (kind == Activation::gelu) {
    return 0.5 * std::erfc(-z / std::sqrt(2.0)) + std::fabs(z) * std::exp(-0.5 * z * z) * root / 2;
  }
  const bool silu = kind == Activation::silu;
  const double inner = silu ? z : 2 * root * (z + 0.044715 * z * z * z);
  const double by_z = silu ? 1 : 2 * root * (1 + 0.134145 * z * z), s = 1 / (1 + std::exp(-inner));
  return s + std::fabs(z) * s * (1 - s) * by_z;
}

void check_glu_case(const Kernels& kernels, int64_t m, int64_t n, Dtype dtype, Activation kind, GluResults& results) {
  Stored gate(m, n, dtype), up(m, n, dtype), dy(m, n, dtype), y(m, n, dtype), dgate(m, n, dtype), dup(m, n, dtype);
  gate.randomize(), up.randomize(), dy.randomize();
  Doubles exact, exact_dgate, exact_dup, size, dgate_size, dup_size;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double z = gate.at(i, j), upper = dy.at(i, j);
      const ValueSlope f = activated(kind, z);
      exact.push_back(f.value * up.at(i, j)), size.push_back(std::fabs(exact.back()));
      exact_dup.push_back(upper * f.value), dup_size.push_back(std::fabs(exact_dup.back()));
      exact_dgate.push_back(upper * up.at(i, j) * f.slope);
      dgate_size.push_back(std::fabs(upper * up.at(i, j)) * slope_size(kind, z));
    }
  }
  kernels.glu(gate.matrix(), up.matrix(), m, n, kind, y.mut());
  kernels.glu_backward(dy.matrix(), gate.matrix(), up.matrix(), m, n, kind, dgate.mut(), dup.mut());
  const std::string name = describe(m, n, 0, static_cast<int>(kind), dtype);
  // A few roundings each, and exp to within two units: 4 * terms of them.
  compare(results.y, y.values(), exact, size, 2, dtype, name);
  compare(results.dup, dup.values(), exact_dup, dup_size, 2, dtype, name);
  compare(results.dgate, dgate.values(), exact_dgate, dgate_size, 2, dtype, name);
  // A gradient may take its input's place.
  kernels.glu_backward(dy.matrix(), gate.matrix(), up.matrix(), m, n, kind, gate.mut(), up.mut());
  if (gate.bytes != dgate.bytes || up.bytes != dup.bytes) {
    results.dgate.worst = INFINITY, results.dgate.where = name + ", in place";
  }
}

GluResults check_glu(const Kernels& kernels) {
  GluResults results;
  const int64_t shapes[][2] = {{1, 1}, {3, 15}, {5, 17}, {40, 1000}, {2, 33}};
  for (const auto& [m, n] : shapes) {
    for (Dtype dtype : kDtypes) {
      for (Activation kind : {Activation::silu, Activation::gelu, Activation::gelu_new}) {
        check_glu_case(kernels, m, n, dtype, kind, results);
      }
    }
  }
  return results;
}
