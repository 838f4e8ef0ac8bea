// The case of attention to a prefix. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct PrefixResults {
  Result out, lse, dquery, dkey, dvalue;

  Named named() const {
    return {{"prefix_attend: out", out}, {"prefix_attend: lse", lse}, {"prefix_attend: dquery", dquery},
            {"prefix_attend: dkey", dkey}, {"prefix_attend: dvalue", dvalue}};
  }
};

// All there is of a call, in rows of D: queries are rows (b, head, i) of [B, Hq, T], keys are rows (g, j, head) of
// [G, P, Hkv].
struct PrefixCase {
  int64_t batch, heads, kv_heads, tokens, dim, groups, count, window;
  Dtype dtype;
  Dropout dropout;
  std::vector<int64_t> rows, lengths;
  Stored query{batch * heads * tokens, dim, dtype}, base{batch * heads * tokens, dim, dtype};
  Stored dout{batch * heads * tokens, dim, dtype}, dquery{batch * heads * tokens, dim, dtype};
  Stored key{groups * count * kv_heads, dim, dtype}, value{groups * count * kv_heads, dim, dtype};
  Floats base_lse{}, bias{};
  static constexpr float kScale = 0.3f;
  static constexpr int64_t kPosition = 2;

  void randomize() {
    for (Stored* x : {&query, &base, &dout, &dquery, &key, &value}) x->randomize();
    base_lse = random_floats(batch * heads * tokens);
    bias = random_floats(heads * tokens * count);
    base_lse[0] = -INFINITY;
    for (int64_t b = 0; b < batch; ++b) rows.push_back(b % (groups + 1) - (groups > 1 ? 1 : 0));
    if (groups == 1) rows.assign(static_cast<size_t>(batch), 0);
    for (int64_t g = 0; g < groups; ++g) lengths.push_back(count - std::min(count, g));
  }
  static Heads queries(Stored& x, int64_t heads, int64_t tokens) {
    return {x.bytes.data(), heads * tokens * x.ld, tokens * x.ld, x.ld, x.dtype};
  }
  Heads keys(Stored& x) const { return {x.bytes.data(), count * kv_heads * x.ld, x.ld, kv_heads * x.ld, x.dtype}; }
  Prefix prefix() {
    return {batch, heads, kv_heads, tokens, dim, groups, count, queries(query, heads, tokens), keys(key), keys(value),
            bias.data(), 0, tokens * count, count, rows.data(), lengths.data(), kScale, window, kPosition, dropout};
  }
};

// Everything in double precision, with magnitudes of the terms; an error of a score is a relative error of its weight.
struct PrefixExact {
  Doubles out, out_size, lse, lse_size, dquery, dquery_size, dkey, dkey_size, dvalue, dvalue_size;

  explicit PrefixExact(PrefixCase& c) {
    const int64_t queries = c.batch * c.heads * c.tokens, elements = c.count * c.kv_heads * c.dim;
    out.resize(static_cast<size_t>(queries * c.dim)), lse.resize(static_cast<size_t>(queries));
    out_size = dquery = dquery_size = out, lse_size = lse;
    dkey.resize(static_cast<size_t>(c.groups * elements));
    dkey_size = dvalue = dvalue_size = dkey;
    std::vector<bool> keep(static_cast<size_t>(2 * c.batch * elements), true);
    if (c.dropout.threshold) keep = kept(c.dropout, 2 * c.batch, elements);
    const Doubles before = c.dquery.values();
    for (int64_t row = 0; row < queries; ++row) {
      const int64_t b = row / (c.heads * c.tokens), head = row / c.tokens % c.heads, i = row % c.tokens;
      const int64_t g = c.rows[static_cast<size_t>(b)], h = head / (c.heads / c.kv_heads);
      const int64_t length = g < 0 ? 0 : c.lengths[static_cast<size_t>(g)];
      const auto key_row = [&](int64_t j) { return (g * c.count + j) * c.kv_heads + h; };
      const auto factor = [&](int64_t j, int64_t d, bool of_value) {
        const int64_t at = ((b * c.count + j) * c.kv_heads + h) * c.dim + d + (of_value ? c.batch * elements : 0);
        return keep[static_cast<size_t>(at)] ? double(c.dropout.scale) : 0.0;
      };
      const float base_lse = c.base_lse[static_cast<size_t>(row)];
      double total = std::exp(double(base_lse)), largest = std::isinf(base_lse) ? 0 : std::fabs(double(base_lse));
      Doubles weight(static_cast<size_t>(length));
      for (int64_t j = 0; j < length; ++j) {
        double score = c.bias[static_cast<size_t>((head * c.tokens + i) * c.count + j)], size = std::fabs(score);
        for (int64_t d = 0; d < c.dim; ++d) {
          const double product = double(PrefixCase::kScale) * c.query.at(row, d) * c.key.at(key_row(j), d) *
                                 factor(j, d, false);
          score += product, size += std::fabs(product);
        }
        const bool seen = c.window == 0 || length + PrefixCase::kPosition + i - j < c.window;
        largest = std::max(largest, size);
        total += weight[static_cast<size_t>(j)] = seen ? std::exp(score) : 0;
      }
      const double grown = 1 + largest, share = total > 0 ? std::exp(double(base_lse)) / total : 0;
      for (double& w : weight) w = total > 0 ? w / total : 0;
      lse[static_cast<size_t>(row)] = total > 0 ? std::log(total) : INFINITY;
      lse_size[static_cast<size_t>(row)] = grown;
      double delta = 0, delta_size = 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        const size_t at = static_cast<size_t>(row * c.dim + d);
        const auto add = [&](double term) { out[at] += term, out_size[at] += grown * std::fabs(term); };
        add(share * c.base.at(row, d));
        for (int64_t j = 0; j < length; ++j) {
          add(weight[static_cast<size_t>(j)] * factor(j, d, true) * c.value.at(key_row(j), d));
        }
        dquery[at] = before[at], dquery_size[at] = std::fabs(before[at]);
        delta += c.dout.at(row, d) * out[at], delta_size += std::fabs(c.dout.at(row, d)) * out_size[at];
      }
      for (int64_t j = 0; j < length; ++j) {
        double dp = 0, dp_size = 0;
        for (int64_t d = 0; d < c.dim; ++d) {
          const double product = c.dout.at(row, d) * c.value.at(key_row(j), d) * factor(j, d, true);
          dp += product, dp_size += std::fabs(product);
        }
        const double p = weight[static_cast<size_t>(j)], ds = p * (dp - delta) * double(PrefixCase::kScale);
        const double ds_size = p * grown * (dp_size + delta_size) * double(PrefixCase::kScale);
        for (int64_t d = 0; d < c.dim; ++d) {
          const size_t at = static_cast<size_t>(row * c.dim + d), to = static_cast<size_t>(key_row(j) * c.dim + d);
          const double k = c.key.at(key_row(j), d) * factor(j, d, false), q = c.query.at(row, d) * factor(j, d, false);
          const double upper = c.dout.at(row, d) * factor(j, d, true);
          dquery[at] += ds * k, dquery_size[at] += ds_size * std::fabs(k);
          dkey[to] += ds * q, dkey_size[to] += ds_size * std::fabs(q);
          dvalue[to] += p * upper, dvalue_size[to] += p * grown * std::fabs(upper);
        }
      }
    }
  }
};

void check_prefix_case(const Kernels& kernels, PrefixCase& c, PrefixResults& results, const std::string& name) {
  c.randomize();
  const PrefixExact exact(c);
  const int64_t head = c.tokens, batch = c.heads * c.tokens;
  Floats lse(c.base_lse.size());
  Stored dout = c.dout;
  kernels.prefix_attend(c.prefix(), PrefixCase::queries(c.base, c.heads, c.tokens),
                        {c.base_lse.data(), batch, head, 1}, lse.data());
  const double terms = std::sqrt(double(c.dim + c.count));
  compare(results.out, c.base.values(), exact.out, exact.out_size, terms, c.dtype, name);
  compare_lse(results.lse, lse, exact.lse, exact.lse_size, terms, name);

  Floats dkey(exact.dkey.size()), dvalue = dkey;
  const Heads upper = PrefixCase::queries(dout, c.heads, c.tokens);
  const Heads out = PrefixCase::queries(c.base, c.heads, c.tokens);
  const Heads dquery = PrefixCase::queries(c.dquery, c.heads, c.tokens);
  kernels.prefix_attend_backward(c.prefix(), {upper, out, lse.data(), dquery, true, dkey.data(), dvalue.data()});
  const double of_out = rounding_of_out(c.dtype);
  const double sums = std::sqrt(double(c.batch * c.heads * c.tokens)) + terms + of_out;
  compare(results.dquery, c.dquery.values(), exact.dquery, exact.dquery_size, terms + of_out, c.dtype, name);
  compare(results.dkey, doubles(dkey), exact.dkey, exact.dkey_size, sums, Dtype::f32, name);
  compare(results.dvalue, doubles(dvalue), exact.dvalue, exact.dvalue_size, sums, Dtype::f32, name);
}

PrefixResults check_prefix(const Kernels& kernels) {
  PrefixResults results;
  const int64_t shapes[][8] = {// batch, heads, kv heads, tokens, dim, prefixes, length, window
                               {1, 1, 1, 1, 1, 1, 1, 0},    {2, 6, 3, 7, 20, 1, 5, 0},    {3, 2, 1, 1, 64, 2, 33, 0},
                               {2, 4, 2, 100, 17, 1, 37, 60}, {5, 3, 1, 50, 32, 3, 16, 40}, {1, 2, 2, 3, 8, 1, 0, 0}};
  for (const auto& [batch, heads, kv_heads, tokens, dim, groups, count, window] : shapes) {
    for (Dtype dtype : kDtypes) {
      for (const Dropout& drop : {kNoDropout, kSomeDropout}) {
        PrefixCase c{batch, heads, kv_heads, tokens, dim, groups, count, window, dtype, drop, {}, {}};
        const std::string name = describe(batch * heads * tokens, groups, dim, count, dtype);
        check_prefix_case(kernels, c, results, name + (drop.threshold ? ", dropout" : ""));
      }
    }
  }
  return results;
}
