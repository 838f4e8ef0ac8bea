// The case of rotary embedding. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

Result check_rotary(const Kernels& kernels) {
  Result result;
  const int64_t shapes[][4] = {{1, 1, 1, 2}, {2, 3, 5, 10}, {1, 2, 7, 64}, {2, 1, 0, 8}};  // batch, heads, tokens, dim
  for (const auto& [batch, heads, tokens, dim] : shapes) {
    for (Dtype dtype : kDtypes) {
      for (bool transposed : {false, true}) {
        Stored x(batch * heads * tokens, dim, dtype), out = x, cos(batch * tokens, dim, dtype), sin = cos;
        for (Stored* s : {&x, &cos, &sin}) s->randomize();
        const auto of = [&, tokens = tokens](Stored& s, int64_t count) {
          return Heads{s.bytes.data(), count * tokens * s.ld, tokens * s.ld, s.ld, s.dtype};
        };
        kernels.rotary(of(x, heads), {batch, heads, tokens, dim}, of(cos, 1), of(sin, 1), transposed, of(out, heads));
        Doubles exact, magnitude;
        for (int64_t row = 0; row < x.rows; ++row) {
          const int64_t at = row / (heads * tokens) * tokens + row % tokens, half = dim / 2;
          for (int64_t d = 0; d < dim; ++d) {
            const int64_t other = d < half ? d + half : d - half;
            const double kept = x.at(row, d) * cos.at(at, d);
            const double turned = x.at(row, other) * sin.at(at, transposed ? other : d);
            exact.push_back((d < half) == transposed ? kept + turned : kept - turned);
            magnitude.push_back(std::fabs(kept) + std::fabs(turned));
          }
        }
        compare(result, out.values(), exact, magnitude, 1, dtype, describe(x.rows, heads, dim, transposed, dtype));
      }
    }
  }
  return result;
}
