// SPDX-License-Identifier: Apache-2.0
// What mma and wgmma share: elements, fragments, and one product. The products and the accumulator are added
// exactly (in double) and the sum is rounded towards zero, as the tensor cores do.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"

namespace emulation {

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double truncated(double x) {  // to float32, towards zero (not exact where the result is subnormal)
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits &= ~uint64_t(0x1fffffff);
  std::memcpy(&x, &bits, 8);
  return x;
}
inline float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const float sign = h & 0x8000 ? -1.f : 1.f, fraction = float(h & 0x3ff);
  if (exponent == 31)
    return fraction != 0.f ? std::numeric_limits<float>::quiet_NaN()
                           : sign * std::numeric_limits<float>::infinity();
  return exponent == 0 ? sign * std::ldexp(fraction, -24) : sign * std::ldexp(1024.f + fraction, exponent - 25);
}
inline const float *half_table() {
  static float table[65536];
  static const bool filled = [] {
    for (uint32_t i = 0; i < 65536; ++i) table[i] = half_value(uint16_t(i));
    return true;
  }();
  (void)filled;
  return table;
}
inline float value(Element element, uint16_t bits) {
  return element == Element::kBfloat16 ? from_bits(uint32_t(bits) << 16) : half_table()[bits];
}

// Row and column of the two elements of register r of an A fragment (16 x 16).
inline int a_row(int lane, int r) { return lane / 4 + 8 * (r & 1); }
inline int a_column(int lane, int r) { return 2 * (lane % 4) + 8 * (r >> 1); }

// sums[m][n] += a[m][k] b[k][n] for 16 rows, truncated once.
template <int kDepth>
void product(const float (*a)[16], const float *b, float *sums, int columns) {
  for (int m = 0; m < 16; ++m) {
    double row[256];
    float *to = sums + m * columns;
    for (int n = 0; n < columns; ++n) row[n] = to[n];
    for (int k = 0; k < kDepth; ++k) {
      const double x = a[m][k];
      const float *from = b + k * columns;
      for (int n = 0; n < columns; ++n) row[n] += x * from[n];
    }
    for (int n = 0; n < columns; ++n) to[n] = float(truncated(row[n]));
  }
}

}  // namespace emulation
