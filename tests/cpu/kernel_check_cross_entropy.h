// The cases of cross entropy. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct CrossEntropyResults {
  Result forward, backward;

  Named named() const { return {{"cross_entropy", forward}, {"cross_entropy_backward", backward}}; }
};

CrossEntropyResults check_cross_entropy(const Kernels& kernels) {
  CrossEntropyResults results;
  const float smoothing = 0.1f;
  for (const auto& [m, v] : {std::array<int64_t, 2>{1, 2}, {5, 17}, {9, 4099}}) {
    for (Dtype dtype : kDtypes) {
      Stored logits(m, v, dtype), gradient(m, v, dtype);
      logits.randomize();
      std::vector<int64_t> target;
      for (int64_t i = 0; i < m; ++i) target.push_back(i == 2 ? -100 : static_cast<int64_t>(generator() % uint64_t(v)));
      const Floats dloss = random_floats(m);
      Floats loss(static_cast<size_t>(m)), lse = loss;
      Doubles exact, d_exact;
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0, total = 0;
        for (int64_t j = 0; j < v; ++j) sum += std::exp(logits.at(i, j)), total += logits.at(i, j);
        const int64_t t = target[static_cast<size_t>(i)];
        const double log_sum = std::log(sum);
        const bool ignored = t == -100;
        exact.push_back(ignored ? 0 : log_sum - (1 - smoothing) * logits.at(i, t) - smoothing * total / double(v));
        for (int64_t j = 0; j < v; ++j) {
          const double goal = (j == t ? 1 - smoothing : 0) + smoothing / double(v);
          d_exact.push_back(ignored ? 0 : dloss[static_cast<size_t>(i)] * (std::exp(logits.at(i, j)) / sum - goal));
        }
      }
      const int64_t bad = kernels.cross_entropy(logits.matrix(), m, v, target.data(), -100, smoothing, loss.data(),
                                                lse.data());
      kernels.cross_entropy_backward(logits.matrix(), m, v, target.data(), -100, smoothing, lse.data(), dloss.data(),
                                     gradient.mut());
      const std::string name = describe(m, v, v, 0, dtype) + (bad == -1 ? "" : " says bad target");
      compare(results.forward, doubles(loss), exact, Doubles(exact.size(), 10), std::sqrt(double(v)), Dtype::f32, name);
      compare(results.backward, gradient.values(), d_exact, Doubles(d_exact.size(), 1), 1, dtype, name);
    }
  }
  return results;
}
