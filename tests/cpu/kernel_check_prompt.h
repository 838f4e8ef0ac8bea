// The case of prompt and token embeddings. Included by kernel_check_cases.h, inside kernel_check.cpp's namespace.

struct PromptResults {
  Result embed, dprompt, dweight;

  Named named() const {
    return {{"prompt_embed", embed}, {"prompt_embed_dprompt", dprompt}, {"prompt_embed_dweight", dweight}};
  }
};

// Which vector lies at each place of [batch, length + tokens]: a row of the prompts, then of the tokens; -1: zeros.
struct PromptPlaces {
  std::vector<int64_t> prompt, token;  // at most one of them is not -2

  PromptPlaces(const PromptLayout& layout, const std::vector<int64_t>& slots) {
    for (int64_t b = 0; b < layout.batch; ++b) {
      const int64_t group = layout.rows[b];
      for (int64_t place = 0, j = 0, t = 0; place < layout.length + layout.tokens; ++place) {
        const bool mine = j < layout.length && slots[static_cast<size_t>(b * layout.slots_ld + j)] == place;
        prompt.push_back(!mine ? -2 : group < 0 ? -1 : group * layout.length + j);
        token.push_back(mine ? -2 : b * layout.tokens + t);
        mine ? ++j : ++t;
      }
    }
  }
};

void check_prompt_case(const Kernels& kernels, const PromptLayout& layout, const std::vector<int64_t>& slots,
                       int64_t h, Dtype dtype, Dtype prompt_dtype, PromptResults& results) {
  const int64_t vocabulary = 40, places = layout.batch * (layout.length + layout.tokens);
  const float scale = layout.slots ? 1.0f : 1.75f;
  Stored weight(vocabulary, h, dtype), prompt(layout.groups * layout.length, h, prompt_dtype), out(places, h, dtype);
  Stored dout(places, h, dtype), dweight(vocabulary, h, dtype);
  weight.randomize(), prompt.randomize(), dout.randomize();
  std::vector<int64_t> ids, order;
  for (int64_t i = 0; i < layout.batch * layout.tokens; ++i) {
    ids.push_back(static_cast<int64_t>(generator() % uint64_t(vocabulary / 2)) * 2);
    order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return ids[static_cast<size_t>(a)] < ids[static_cast<size_t>(b)]; });
  std::vector<int64_t> sorted;
  for (const int64_t i : order) sorted.push_back(ids[static_cast<size_t>(i)]);

  const int64_t padding = 6;
  const PromptPlaces at(layout, slots);
  Doubles exact, d_prompt(static_cast<size_t>(prompt.rows * h)), d_weight(static_cast<size_t>(vocabulary * h));
  Doubles prompt_size = d_prompt, weight_size = d_weight;
  for (int64_t place = 0; place < places; ++place) {
    const int64_t p = at.prompt[static_cast<size_t>(place)], t = at.token[static_cast<size_t>(place)];
    const int64_t id = t < 0 ? -1 : ids[static_cast<size_t>(t)];
    for (int64_t c = 0; c < h; ++c) {
      exact.push_back(t >= 0 ? double(scale) * weight.at(id, c) : p >= 0 ? prompt.at(p, c) : 0);
      const double upper = dout.at(place, c);
      if (p >= 0) d_prompt[size_t(p * h + c)] += upper, prompt_size[size_t(p * h + c)] += std::fabs(upper);
      if (t < 0 || id == padding) continue;
      d_weight[size_t(id * h + c)] += double(scale) * upper;
      weight_size[size_t(id * h + c)] += double(scale) * std::fabs(upper);
    }
  }
  const std::string name = describe(layout.batch, layout.tokens, h, layout.length, dtype);
  const int64_t bad = kernels.prompt_embed(ids.data(), layout, weight.matrix(), vocabulary, h, prompt.matrix(), scale,
                                           out.mut());
  compare(results.embed, out.values(), exact, Doubles(exact.size()), 0, dtype, name + (bad < 0 ? "" : ", a bad id"));
  Floats dprompt(static_cast<size_t>(prompt.rows * h));
  kernels.prompt_embed_dprompt(dout.matrix(), layout, h, dprompt.data());
  compare(results.dprompt, doubles(dprompt), d_prompt, prompt_size, double(layout.batch), Dtype::f32, name);
  kernels.prompt_embed_dweight(dout.matrix(), layout, h, sorted.data(), order.data(), vocabulary, scale, padding,
                               dweight.mut());
  const double terms = double(layout.batch * layout.tokens);
  compare(results.dweight, dweight.values(), d_weight, weight_size, terms, dtype, name);
  if (ids.empty()) return;
  ids.back() = vocabulary;
  const auto found = kernels.prompt_embed(ids.data(), layout, weight.matrix(), vocabulary, h, prompt.matrix(), scale,
                                          out.mut());
  if (found != static_cast<int64_t>(ids.size()) - 1) results.embed.worst = INFINITY, results.embed.where = "a bad id";
}

PromptResults check_prompt(const Kernels& kernels) {
  PromptResults results;
  const int64_t shapes[][5] = {// batch, tokens, length, prompts, columns
                               {1, 1, 1, 1, 1}, {3, 5, 4, 2, 37}, {2, 70, 40, 1, 600}, {4, 6, 3, 3, 1030},
                               {2, 4, 0, 1, 9}, {2, 0, 5, 2, 17}};
  for (const auto& [batch, tokens, length, groups, h] : shapes) {
    std::vector<int64_t> rows, front, slots;
    for (int64_t b = 0; b < batch; ++b) {
      rows.push_back(b % (groups + 1) - (groups > 1 ? 1 : 0));
      if (groups == 1) rows.back() = 0;
      for (int64_t j = 0; j < length; ++j) {
        front.push_back(j);
        // Every second place from b on, as far as there are tokens between.
        slots.push_back(j + std::min(tokens, j + b % 2));
      }
    }
    for (Dtype dtype : kDtypes) {
      for (Dtype prompt_dtype : {Dtype::f32, dtype}) {
        const PromptLayout in_front{batch, tokens, length, groups, nullptr, length, rows.data()};
        check_prompt_case(kernels, in_front, front, h, dtype, prompt_dtype, results);
        const PromptLayout in_slots{batch, tokens, length, groups, slots.data(), length, rows.data()};
        check_prompt_case(kernels, in_slots, slots, h, dtype, prompt_dtype, results);
      }
    }
  }
  return results;
}
