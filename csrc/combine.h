// The order in which partials are added, the same on every device: partial i goes to stripe
// i % kStripes, each stripe is added up in order, and the stripes are halved.
//
// Parallel enough for the last block of a GPU's grid, and cheap on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyreg {

constexpr int kStripes = 256;

// partials[i * step], i < n. (Beyond n stripes are zero: halving may begin where they end.)
inline double combine(const double* partials, int64_t n, int64_t step) {
  double stripe[kStripes];
  std::fill_n(stripe, kStripes, 0.0);
  for (int64_t begin = 0; begin < n; begin += kStripes) {
    const int m = static_cast<int>(std::min<int64_t>(n - begin, kStripes));
    for (int i = 0; i < m; ++i) stripe[i] += partials[(begin + i) * step];
  }
  for (int half = kStripes / 2; half > 0; half /= 2)
    if (n > half)
      for (int i = 0; i < half; ++i) stripe[i] += stripe[i + half];
  return stripe[0];
}

}  // namespace pyreg
