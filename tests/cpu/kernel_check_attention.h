// The case of attention, with dropout of its weights and to a prefix. Included by kernel_check_cases.h, inside
// kernel_check.cpp's namespace.

struct AttentionResults {
  Result out, lse, dquery, dkey, dvalue, dprefix_key, dprefix_value;

  Named named() const {
    return {{"attention: out", out}, {"attention: lse", lse}, {"attention: dquery", dquery},
            {"attention: dkey", dkey}, {"attention: dvalue", dvalue}, {"attention: dprefix_key", dprefix_key},
            {"attention: dprefix_value", dprefix_value}};
  }
};

// All there is of a call, in rows of D: queries are rows (b, head, i), keys (b, h, j), those of prefixes (g, j, h).
struct AttentionCase {
  int64_t batch, heads, kv_heads, tokens, keys, dim, groups, prefix;
  bool causal;
  Dtype dtype;
  Dropout dropout;
  Stored query{batch * heads * tokens, dim, dtype}, out{batch * heads * tokens, dim, dtype};
  Stored dout{batch * heads * tokens, dim, dtype}, dquery{batch * heads * tokens, dim, dtype};
  Stored key{batch * kv_heads * keys, dim, dtype}, value{batch * kv_heads * keys, dim, dtype};
  Stored dkey{batch * kv_heads * keys, dim, dtype}, dvalue{batch * kv_heads * keys, dim, dtype};
  Stored prefix_key{groups * prefix * kv_heads, dim, dtype}, prefix_value{groups * prefix * kv_heads, dim, dtype};
  std::vector<int64_t> rows_of_prefix{};  // the last row has none, where there are several
  Floats bias{};
  static constexpr float kScale = 0.3f;

  void randomize() {
    for (Stored* x : {&query, &dout, &key, &value, &prefix_key, &prefix_value}) x->randomize();
    for (int64_t b = 0; b < batch && groups > 1; ++b) rows_of_prefix.push_back(b + 1 < batch ? b % groups : -1);
    bias = random_floats(heads * tokens * keys);
    if (keys && !causal) std::fill_n(bias.data(), keys, -INFINITY);  // the first query sees nothing
  }
  static Heads rows(Stored& x, int64_t heads, int64_t count) {
    return {x.bytes.data(), heads * count * x.ld, count * x.ld, x.ld, x.dtype};
  }
  Heads queries(Stored& x) const { return rows(x, heads, tokens); }
  Heads of_keys(Stored& x) const { return rows(x, kv_heads, keys); }
  Heads of_prefix(Stored& x) const {
    return {x.bytes.data(), prefix * kv_heads * x.ld, x.ld, kv_heads * x.ld, x.dtype};
  }
  int64_t prefix_of(int64_t b) const { return groups > 1 ? rows_of_prefix[static_cast<size_t>(b)] : 0; }
  Attention attention() {
    return {batch, heads, kv_heads, tokens, keys, dim, queries(query), of_keys(key), of_keys(value),
            bias.data(), 0, tokens * keys, keys, causal, kScale, dropout,
            {of_prefix(prefix_key), of_prefix(prefix_value), groups, prefix,
             groups > 1 ? rows_of_prefix.data() : nullptr}};
  }
};

// Everything in double precision, with magnitudes of the terms; an error of a score is a relative error of its weight.
struct AttentionExact {
  Doubles out, out_size, lse, lse_size, dquery, dquery_size, dkey, dkey_size, dvalue, dvalue_size;
  Doubles dprefix_key, dprefix_key_size, dprefix_value, dprefix_value_size;

  explicit AttentionExact(AttentionCase& c) {
    const int64_t queries = c.batch * c.heads * c.tokens, all_keys = c.batch * c.kv_heads * c.keys;
    out.resize(static_cast<size_t>(queries * c.dim)), lse.resize(static_cast<size_t>(queries));
    out_size = dquery = dquery_size = out, lse_size = lse;
    dkey.resize(static_cast<size_t>(all_keys * c.dim));
    dkey_size = dvalue = dvalue_size = dkey;
    dprefix_key.resize(static_cast<size_t>(c.groups * c.prefix * c.kv_heads * c.dim));
    dprefix_key_size = dprefix_value = dprefix_value_size = dprefix_key;
    std::vector<bool> keep(static_cast<size_t>(queries * c.keys), true);
    if (c.dropout.threshold) keep = kept(c.dropout, queries, c.keys);
    for (int64_t row = 0; row < queries; ++row) {
      const int64_t b = row / (c.heads * c.tokens), head = row / c.tokens % c.heads, i = row % c.tokens;
      const int64_t g = c.prefix_of(b), h = head / (c.heads / c.kv_heads), joined = g < 0 ? 0 : c.prefix;
      const int64_t seen = joined + (c.causal ? std::min(c.keys, i + 1) : c.keys);  // the prefix's first
      const auto key_row = [&](int64_t j) {
        return j < joined ? (g * c.prefix + j) * c.kv_heads + h : (b * c.kv_heads + h) * c.keys + j - joined;
      };
      const auto key = [&](int64_t j, int64_t d) { return (j < joined ? c.prefix_key : c.key).at(key_row(j), d); };
      const auto value = [&](int64_t j, int64_t d) { return (j < joined ? c.prefix_value : c.value).at(key_row(j), d); };
      const auto factor = [&](int64_t j) {
        if (j < joined) return 1.0;
        return keep[static_cast<size_t>(row * c.keys + j - joined)] ? double(c.dropout.scale) : 0.0;
      };
      Doubles weight(static_cast<size_t>(seen));
      double total = 0, largest = 0;
      for (int64_t j = 0; j < seen; ++j) {
        double score = j < joined ? 0 : c.bias[static_cast<size_t>((head * c.tokens + i) * c.keys + j - joined)];
        double size = std::isinf(score) ? 0 : std::fabs(score);
        for (int64_t d = 0; d < c.dim; ++d) {
          const double product = double(AttentionCase::kScale) * c.query.at(row, d) * key(j, d);
          score += product, size += std::fabs(product);
        }
        largest = std::max(largest, size);
        total += weight[static_cast<size_t>(j)] = std::exp(score);
      }
      const double grown = 1 + largest;
      for (double& w : weight) w = total > 0 ? w / total : 0;
      lse[static_cast<size_t>(row)] = total > 0 ? std::log(total) : INFINITY;
      lse_size[static_cast<size_t>(row)] = grown;
      double delta = 0, delta_size = 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        const size_t at = static_cast<size_t>(row * c.dim + d);
        for (int64_t j = 0; j < seen; ++j) {
          const double term = weight[static_cast<size_t>(j)] * factor(j) * value(j, d);
          out[at] += term, out_size[at] += grown * std::fabs(term);
        }
        delta += c.dout.at(row, d) * out[at], delta_size += std::fabs(c.dout.at(row, d)) * out_size[at];
      }
      for (int64_t j = 0; j < seen; ++j) {
        double dp = 0, dp_size = 0;
        for (int64_t d = 0; d < c.dim; ++d) {
          const double product = c.dout.at(row, d) * value(j, d) * factor(j);
          dp += product, dp_size += std::fabs(product);
        }
        const double p = weight[static_cast<size_t>(j)], ds = p * (dp - delta) * double(AttentionCase::kScale);
        const double ds_size = p * grown * (dp_size + delta_size) * double(AttentionCase::kScale);
        for (int64_t d = 0; d < c.dim; ++d) {
          const size_t at = static_cast<size_t>(row * c.dim + d), to = static_cast<size_t>(key_row(j) * c.dim + d);
          const double k = key(j, d), q = c.query.at(row, d), upper = c.dout.at(row, d) * factor(j);
          dquery[at] += ds * k, dquery_size[at] += ds_size * std::fabs(k);
          (j < joined ? dprefix_key : dkey)[to] += ds * q;
          (j < joined ? dprefix_key_size : dkey_size)[to] += ds_size * std::fabs(q);
          (j < joined ? dprefix_value : dvalue)[to] += p * upper;
          (j < joined ? dprefix_value_size : dvalue_size)[to] += p * grown * std::fabs(upper);
        }
      }
    }
  }
};

// Where the exact one is infinite, so is the kernel's.
void compare_lse(Result& result, const Floats& lse, const Doubles& exact, const Doubles& sizes, double terms,
                 const std::string& name) {
  Doubles finite, got, size;
  for (size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(exact[i]) && lse[i] == INFINITY) continue;
    got.push_back(lse[i]), finite.push_back(exact[i]), size.push_back(sizes[i]);
  }
  compare(result, got, finite, size, terms, Dtype::f32, name);
}

// What `out` is rounded by in its storage type, which comes to delta.
double rounding_of_out(Dtype dtype) {
  return dtype == Dtype::f32 ? 0 : dtype == Dtype::f16 ? 0x1p-11 / kUnit : 0x1p-8 / kUnit;
}

void check_attention_case(const Kernels& kernels, AttentionCase& c, AttentionResults& results,
                          const std::string& name) {
  c.randomize();
  const AttentionExact exact(c);
  Floats lse(exact.lse.size());
  kernels.attention(c.attention(), c.queries(c.out), lse.data());
  const double terms = std::sqrt(double(c.dim + c.prefix + c.keys));
  compare(results.out, c.out.values(), exact.out, exact.out_size, terms, c.dtype, name);
  compare_lse(results.lse, lse, exact.lse, exact.lse_size, terms, name);

  Floats dprefix_key(exact.dprefix_key.size()), dprefix_value = dprefix_key;
  kernels.attention_backward(
      c.attention(), {c.queries(c.dout), c.queries(c.out), lse.data(), c.queries(c.dquery), c.of_keys(c.dkey),
                      c.of_keys(c.dvalue), dprefix_key.data(), dprefix_value.data()});
  const double of_out = rounding_of_out(c.dtype);
  const double sums = std::sqrt(double(c.heads / c.kv_heads * c.tokens)) + terms + of_out;
  compare(results.dquery, c.dquery.values(), exact.dquery, exact.dquery_size, terms + of_out, c.dtype, name);
  compare(results.dkey, c.dkey.values(), exact.dkey, exact.dkey_size, sums, c.dtype, name);
  compare(results.dvalue, c.dvalue.values(), exact.dvalue, exact.dvalue_size, sums, c.dtype, name);
  const double over_batch = std::sqrt(double(c.batch * c.heads * c.tokens)) + terms + of_out;
  const auto compare_prefix = [&](Result& result, const Floats& got, const Doubles& value, const Doubles& size) {
    compare(result, doubles(got), value, size, over_batch, Dtype::f32, name);
  };
  compare_prefix(results.dprefix_key, dprefix_key, exact.dprefix_key, exact.dprefix_key_size);
  compare_prefix(results.dprefix_value, dprefix_value, exact.dprefix_value, exact.dprefix_value_size);
}

AttentionResults check_attention(const Kernels& kernels) {
  AttentionResults results;
  const int64_t shapes[][8] = {// batch, heads, kv heads, tokens, keys, dim, prefixes, length
                               {1, 1, 1, 1, 1, 1, 1, 0},      {2, 6, 3, 7, 5, 20, 1, 1},   {1, 2, 1, 100, 70, 17, 1, 33},
                               {1, 1, 1, 200, 50, 32, 1, 16}, {2, 2, 2, 3, 0, 8, 1, 5},    {1, 4, 2, 50, 60, 64, 1, 0},
                               {4, 2, 1, 5, 9, 16, 2, 7},     {19, 1, 1, 2, 3, 8, 1, 20}};
  for (const auto& [batch, heads, kv_heads, tokens, keys, dim, groups, prefix] : shapes) {
    for (Dtype dtype : kDtypes) {
      for (bool causal : {false, true}) {
        for (const Dropout& drop : {kNoDropout, kSomeDropout}) {
          AttentionCase c{batch, heads, kv_heads, tokens, keys, dim, groups, prefix, causal, dtype, drop};
          const std::string name = describe(batch * heads * tokens, keys, dim, prefix, dtype);
          const std::string kind = std::string(causal ? ", causal" : "") + (drop.threshold ? ", dropout" : "");
          check_attention_case(kernels, c, results, name + kind);
        }
      }
    }
  }
  return results;
}
