// The case of columns times a vector. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct ScaleColumnsResults {
  Result y, dx, dscale, dbias;

  Named named() const {
    return {{"scale_columns", y}, {"scale_columns_backward: dx", dx}, {"scale_columns_backward: dscale", dscale},
            {"scale_columns_backward: dbias", dbias}};
  }
};

ScaleColumnsResults check_scale_columns(const Kernels& kernels) {
  ScaleColumnsResults results;
  const int64_t shapes[][2] = {{0, 3}, {1, 1}, {3, 15}, {64, 17}, {67, 33}, {131, 2051}};
  for (const auto& [m, n] : shapes) {
    for (Dtype dtype : kDtypes) {
      Stored x(m, n, dtype), dy(m, n, dtype), y(m, n, dtype), dx(m, n, dtype);
      x.randomize(), dy.randomize();
      const auto columns = static_cast<size_t>(n);
      Floats scale(columns), bias(columns), dscale(columns, NAN), dbias(columns, NAN), alone(columns, NAN);
      for (size_t j = 0; j < columns; ++j) scale[j] = float(j % 7) - 2, bias[j] = float(j % 5) / 4;
      Doubles exact, size, exact_dx, dx_size, exact_scale(columns), scale_size(columns), exact_bias(columns),
          bias_size(columns);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const auto column = static_cast<size_t>(j);
          const double value = x.at(i, j), upper = dy.at(i, j), factor = scale[column];
          exact.push_back(factor * value + bias[column]);
          size.push_back(std::fabs(factor * value) + bias[column]);
          exact_dx.push_back(factor * upper), dx_size.push_back(std::fabs(exact_dx.back()));
          exact_scale[column] += upper * value, scale_size[column] += std::fabs(upper * value);
          exact_bias[column] += upper, bias_size[column] += std::fabs(upper);
        }
      }
      kernels.scale_columns(x.matrix(), m, n, scale.data(), bias.data(), y.mut());
      kernels.scale_columns_backward(dy.matrix(), x.matrix(), m, n, scale.data(), dx.mut(), dscale.data(),
                                     dbias.data());
      const std::string name = describe(m, n, 0, 0, dtype);
      compare(results.y, y.values(), exact, size, 1, dtype, name);
      compare(results.dx, dx.values(), exact_dx, dx_size, 1, dtype, name);
      compare(results.dscale, doubles(dscale), exact_scale, scale_size, std::sqrt(double(m + 1)), Dtype::f32, name);
      compare(results.dbias, doubles(dbias), exact_bias, bias_size, std::sqrt(double(m + 1)), Dtype::f32, name);
      // Each alone gives the same, and dx may take dy's place.
      kernels.scale_columns_backward(dy.matrix(), {}, m, n, nullptr, {}, nullptr, alone.data());
      if (alone != dbias) results.dbias.worst = INFINITY, results.dbias.where = name + ", alone";
      kernels.scale_columns_backward(dy.matrix(), x.matrix(), m, n, scale.data(), dy.mut(), alone.data(), nullptr);
      if (alone != dscale) results.dscale.worst = INFINITY, results.dscale.where = name + ", in place";
      if (dy.bytes != dx.bytes) results.dx.worst = INFINITY, results.dx.where = name + ", in place";
      kernels.scale_columns(x.matrix(), m, n, scale.data(), bias.data(), x.mut());
      if (x.bytes != y.bytes) results.y.worst = INFINITY, results.y.where = name + ", in place";
    }
  }
  return results;
}
