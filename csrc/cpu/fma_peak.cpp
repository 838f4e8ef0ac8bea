// What one core can do: the rate of independent fused multiply-adds in registers, in GF/s.
//
// Twelve chains, twice the eight that two FMA units of four cycles' latency need. No memory is touched. The
// benchmark calls this around each timed batch: clocks drift, so a share of peak is only honest against a
// calibration of the same moment.
#include <chrono>

#include "isa/isa.h"

namespace fusetune {
namespace FUSETUNE_ISA {

double fma_peak(double seconds) {
  const F x = set1(0.999f), y = set1(1e-3f);
  // Named: an array of accumulators may be spilled to the stack. Different: equal chains would be merged.
  F a = set1(1), b = set1(2), c = set1(3), d = set1(4), e = set1(5), f = set1(6);
  F g = set1(7), h = set1(8), i = set1(9), j = set1(10), k = set1(11), l = set1(12);
  constexpr int kIterations = 4096;
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  for (auto start = Clock::now(); start < deadline;) {
    for (int n = 0; n < kIterations; ++n) {
      a = fma(a, x, y), b = fma(b, x, y), c = fma(c, x, y), d = fma(d, x, y);
      e = fma(e, x, y), f = fma(f, x, y), g = fma(g, x, y), h = fma(h, x, y);
      i = fma(i, x, y), j = fma(j, x, y), k = fma(k, x, y), l = fma(l, x, y);
    }
    const auto end = Clock::now();
    const double rate = 2e-9 * 12 * kLanes * kIterations / std::chrono::duration<double>(end - start).count();
    best = rate > best ? rate : best;
    start = end;
  }
  const F sum = add(add(add(a, b), add(c, d)), add(add(add(e, f), add(g, h)), add(add(i, j), add(k, l))));
  return hsum(sum) == 12345.f ? 0 : best;  // keeps the chains alive
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
