// The cases of bottleneck adapters and of AdapterFusion. Included by kernel_check_cases.h, inside kernel_check.cpp's
// namespace.

// A row-major matrix without gaps.
Stored without_gaps(int64_t rows, int64_t cols, Dtype dtype) {
  Stored all(rows, cols, dtype);
  all.ld = cols;
  all.bytes.assign(static_cast<size_t>(rows * cols * all.size()), 0xff);
  return all;
}

struct ValueSlope {
  double value, slope;
};
ValueSlope activated(Activation kind, double z) {
  if (kind == Activation::relu) return {std::max(z, 0.0), z > 0 ? 1.0 : 0.0};
  if (kind == Activation::gelu) {
    const double below = 0.5 * std::erfc(-z / std::sqrt(2.0));
    return {z * below, below + z * std::exp(-0.5 * z * z) / std::sqrt(2 * 3.14159265358979323846)};
  }
  if (kind == Activation::gelu_new) {
    const double root = std::sqrt(2 / 3.14159265358979323846), t = std::tanh(root * (z + 0.044715 * z * z * z));
    return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * 0.044715 * z * z)};
  }
  const double s = 1 / (1 + std::exp(-z));
  return {z * s, s * (1 + z * (1 - s))};
}
constexpr double kSteepest = 1.2;  // of all slopes above, for an error of z in f(z), and in f'(z)

struct BottleneckResults {
  Result y, z, dx, down, down_bias, up, up_bias;

  Named named() const {
    return {{"bottleneck: y", y}, {"bottleneck: z", z}, {"bottleneck: dx", dx}, {"bottleneck: d_down", down},
            {"bottleneck: d_down_bias", down_bias}, {"bottleneck: d_up", up}, {"bottleneck: d_up_bias", up_bias}};
  }
};

struct Sums {
  Doubles exact, size;
  explicit Sums(int64_t n) : exact(static_cast<size_t>(n)), size(static_cast<size_t>(n)) {}
  void add(int64_t at, double term, double own_size) {
    exact[static_cast<size_t>(at)] += term;
    size[static_cast<size_t>(at)] += own_size;
  }
  void add(int64_t at, double term) { add(at, term, std::fabs(term)); }
  double operator[](int64_t at) const { return exact[static_cast<size_t>(at)]; }
  double of(int64_t at) const { return size[static_cast<size_t>(at)]; }
};

void check_bottleneck_case(const Kernels& kernels, const std::vector<int64_t>& rows, int64_t h, int64_t d, Dtype dtype,
                           Activation kind, const Dropout& drop, bool plain, BottleneckResults& results) {
  int64_t m = 0, groups = static_cast<int64_t>(rows.size());
  std::vector<int64_t> group_of;
  for (int64_t g = 0; g < groups; ++g) {
    m += rows[static_cast<size_t>(g)];
    group_of.resize(static_cast<size_t>(m), g);
  }
  Stored x(m, h, dtype), residual(m, h, dtype), y(m, h, dtype), z(m, d, dtype), dy(m, h, dtype), dx(m, h, dtype);
  Stored down = without_gaps(groups * d, h, dtype), up = without_gaps(groups * h, d, dtype);
  Stored d_down = without_gaps(groups * d, h, dtype), d_up = without_gaps(groups * h, d, dtype);
  for (Stored* s : {&x, &residual, &dy, &down, &up}) s->randomize();
  const Floats down_bias = random_floats(groups * d), up_bias = random_floats(groups * h);
  Floats d_down_bias(down_bias.size()), d_up_bias(up_bias.size());
  const Adapters adapters{groups, h, d, rows.data(), down.matrix(), up.matrix(), plain ? nullptr : down_bias.data(),
                          plain ? nullptr : up_bias.data(), kind};
  const Matrix none{nullptr, 0, Dtype::f32};
  kernels.bottleneck(x.matrix(), m, adapters, plain ? none : residual.matrix(), drop, y.mut(), z.mut());
  kernels.bottleneck_backward(dy.matrix(), x.matrix(), z.matrix(), m, adapters, plain ? none : dy.matrix(), drop,
                              {dx.mut(), d_down.mut(), d_up.mut(), d_down_bias.data(), d_up_bias.data()});

  std::vector<bool> keep(static_cast<size_t>(m * h), true);
  if (drop.threshold) keep = kept(drop, m, h);
  Sums ez(m * d), ey(m * h), edx(m * h), e_down(groups * d * h), e_up(groups * h * d), e_db(groups * d), e_ub(groups * h);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t g = group_of[static_cast<size_t>(i)];
    const auto factor = [&](int64_t c) { return keep[static_cast<size_t>(i * h + c)] ? double(drop.scale) : 0.0; };
    for (int64_t k = 0; k < d; ++k) {
      for (int64_t c = 0; c < h; ++c) ez.add(i * d + k, x.at(i, c) * down.at(g * d + k, c));
      if (!plain) ez.add(i * d + k, down_bias[static_cast<size_t>(g * d + k)]);
    }
    for (int64_t c = 0; c < h; ++c) {
      for (int64_t k = 0; k < d; ++k) {
        const double f = activated(kind, ez[i * d + k]).value, weight = factor(c) * up.at(g * h + c, k);
        ey.add(i * h + c, f * weight, std::fabs(weight) * (std::fabs(f) + kSteepest * ez.of(i * d + k)));
      }
      if (plain) continue;
      ey.add(i * h + c, factor(c) * up_bias[static_cast<size_t>(g * h + c)]);
      ey.add(i * h + c, residual.at(i, c));
      edx.add(i * h + c, dy.at(i, c));
    }
    for (int64_t k = 0; k < d; ++k) {
      const ValueSlope f = activated(kind, z.at(i, k));
      double dz = 0, size = 0;
      for (int64_t c = 0; c < h; ++c) {
        const double du = factor(c) * dy.at(i, c), term = du * up.at(g * h + c, k);
        dz += term, size += std::fabs(term);
        e_up.add((g * h + c) * d + k, du * f.value);
        if (k == 0) e_ub.add(g * h + c, du);
      }
      size = size * (std::fabs(f.slope) + kSteepest), dz *= f.slope;
      e_db.add(g * d + k, dz, size);
      for (int64_t c = 0; c < h; ++c) {
        e_down.add((g * d + k) * h + c, dz * x.at(i, c), size * std::fabs(x.at(i, c)));
        const double weight = down.at(g * d + k, c);
        edx.add(i * h + c, dz * weight, size * std::fabs(weight));
      }
    }
  }
  const std::string name = describe(m, h, d, groups, dtype) + (drop.threshold ? ", dropout" : "");
  const double terms = double(h + d + m + 8);
  compare(results.z, z.values(), ez.exact, ez.size, terms, dtype, name);
  compare(results.y, y.values(), ey.exact, ey.size, terms, dtype, name);
  compare(results.dx, dx.values(), edx.exact, edx.size, terms, dtype, name);
  compare(results.down, d_down.values(), e_down.exact, e_down.size, terms, dtype, name);
  compare(results.up, d_up.values(), e_up.exact, e_up.size, terms, dtype, name);
  compare(results.down_bias, doubles(d_down_bias), e_db.exact, e_db.size, terms, Dtype::f32, name);
  compare(results.up_bias, doubles(d_up_bias), e_ub.exact, e_ub.size, terms, Dtype::f32, name);
}

BottleneckResults check_bottleneck(const Kernels& kernels) {
  BottleneckResults results;
  const std::vector<int64_t> groups[] = {{1}, {7}, {130}, {3, 0, 98}};
  const int64_t sizes[][2] = {{1, 1}, {17, 3}, {64, 16}, {150, 33}};  // hidden, bottleneck
  const Activation kinds[] = {Activation::relu, Activation::gelu, Activation::silu};
  int turn = 0;
  for (const auto& rows : groups) {
    for (const auto& [h, d] : sizes) {
      for (Dtype dtype : kDtypes) {
        const Activation kind = kinds[turn++ % 3];
        check_bottleneck_case(kernels, rows, h, d, dtype, kind, kNoDropout, turn % 2 == 0, results);
        check_bottleneck_case(kernels, rows, h, d, dtype, kind, kSomeDropout, false, results);
      }
    }
  }
  return results;
}

struct FusionResults {
  Result ctx, p, dg, dvalues, doffset;

  Named named() const {
    return {{"fusion_attend: ctx", ctx}, {"fusion_attend: p", p}, {"fusion_attend: dg", dg},
            {"fusion_attend: dvalues", dvalues}, {"fusion_attend: doffset", doffset}};
  }
};

void check_fusion_case(const Kernels& kernels, int64_t m, int64_t h, int64_t n, Dtype dtype, const Dropout& drop,
                       int64_t first_row, FusionResults& results) {
  constexpr float kTemperature = 2.5f;
  Stored g(m, h, dtype), ctx(m, h, dtype), again(m, h, dtype), dctx(m, h, dtype), dg(m, h, dtype);
  std::vector<Stored> values(static_cast<size_t>(n), Stored(m, h, dtype));
  std::vector<Stored> dvalues(static_cast<size_t>(n), without_gaps(m, h, dtype));
  std::vector<const void*> data;
  std::vector<void*> written;
  for (Stored& v : values) v.randomize(), data.push_back(v.bytes.data());
  for (Stored& v : dvalues) written.push_back(v.bytes.data());
  const std::vector<int64_t> ld(static_cast<size_t>(n), values[0].ld);
  g.randomize(), dctx.randomize();
  const Floats offset = random_floats(m);
  Floats p(static_cast<size_t>(m * n)), doffset(static_cast<size_t>(m));
  const FusionValues all{data.data(), ld.data(), n, dtype};
  const float* const shift = drop.threshold ? offset.data() : nullptr;
  kernels.fusion_attend(g.matrix(), m, h, all, shift, kTemperature, drop, first_row, ctx.mut(), p.data());
  kernels.fusion_attend_backward(dctx.matrix(), g.matrix(), m, h, all, p.data(), kTemperature, drop, first_row,
                                 dg.mut(), again.mut(), written.data(), doffset.data());

  std::vector<bool> keep(static_cast<size_t>((first_row + m) * n), true);
  if (drop.threshold) keep = kept(drop, first_row + m, n);
  Sums ep(m * n), ectx(m * h), eagain(m * h), edg(m * h), eo(m);
  std::vector<Sums> ev(static_cast<size_t>(n), Sums(m * h));
  for (int64_t i = 0; i < m; ++i) {
    const auto value = [&](int64_t a, int64_t c) { return values[static_cast<size_t>(a)].at(i, c); };
    const auto factor = [&](int64_t a) {
      return keep[static_cast<size_t>((first_row + i) * n + a)] ? double(drop.scale) / kTemperature : 0.0;
    };
    Doubles score, score_size, dp, dp_size;
    double total = 0, mean = 0, mean_size = 0, largest = 0;
    for (int64_t a = 0; a < n; ++a) {
      double s = shift ? offset[static_cast<size_t>(i)] : 0, size = std::fabs(s), upper = 0, upper_size = 0;
      for (int64_t c = 0; c < h; ++c) {
        s += g.at(i, c) * value(a, c), size += std::fabs(g.at(i, c) * value(a, c));
        upper += dctx.at(i, c) * value(a, c), upper_size += std::fabs(dctx.at(i, c) * value(a, c));
      }
      score.push_back(std::exp(s * factor(a))), largest = std::max(largest, size * factor(a)), total += score.back();
      dp.push_back(upper), dp_size.push_back(upper_size);
      mean += p[static_cast<size_t>(i * n + a)] * upper, mean_size += p[static_cast<size_t>(i * n + a)] * upper_size;
    }
    for (int64_t a = 0; a < n; ++a) {
      const size_t at = static_cast<size_t>(a);
      const double exact = score[at] / total, given = p[static_cast<size_t>(i * n + a)];
      ep.add(i * n + a, exact, exact * (1 + 2 * largest));
      const double ds = given * (dp[at] - mean) * factor(a), size = given * (dp_size[at] + mean_size) * factor(a);
      eo.add(i, ds, size);
      for (int64_t c = 0; c < h; ++c) {
        const double v = value(a, c);
        ectx.add(i * h + c, exact * v, exact * (1 + 2 * largest) * std::fabs(v));
        eagain.add(i * h + c, given * v);
        edg.add(i * h + c, ds * v, size * std::fabs(v));
        ev[at].add(i * h + c, given * dctx.at(i, c));
        ev[at].add(i * h + c, ds * g.at(i, c), size * std::fabs(g.at(i, c)));
      }
    }
  }
  const std::string name = describe(m, n, h, first_row, dtype) + (drop.threshold ? ", dropout" : "");
  const double terms = double(h + n + 8);
  compare(results.p, doubles(p), ep.exact, ep.size, terms, Dtype::f32, name);
  compare(results.ctx, ctx.values(), ectx.exact, ectx.size, terms, dtype, name);
  compare(results.ctx, again.values(), eagain.exact, eagain.size, terms, dtype, name + ", again");
  compare(results.dg, dg.values(), edg.exact, edg.size, terms, dtype, name);
  compare(results.doffset, doubles(doffset), eo.exact, eo.size, terms, Dtype::f32, name);
  for (size_t a = 0; a < ev.size(); ++a) {
    compare(results.dvalues, dvalues[a].values(), ev[a].exact, ev[a].size, terms, dtype, name);
  }
}

FusionResults check_fusion(const Kernels& kernels) {
  FusionResults results;
  const int64_t shapes[][4] = {// rows, columns, adapters, first row
                               {1, 1, 1, 0}, {5, 37, 3, 2}, {70, 130, 8, 512}, {3, 64, 17, 1}};
  for (const auto& [m, h, n, first_row] : shapes) {
    for (Dtype dtype : kDtypes) {
      check_fusion_case(kernels, m, h, n, dtype, kNoDropout, 0, results);
      check_fusion_case(kernels, m, h, n, dtype, kSomeDropout, first_row, results);
    }
  }
  return results;
}
