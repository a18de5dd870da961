// SPDX-License-Identifier: Apache-2.0
// The 16-bit types by arithmetic (not by the bit tricks of the library), and random numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "power_attention.h"

namespace powerattn_test {

using Vector = std::vector<double>;

struct Format {
  int digits;        // of the significand, the hidden one included
  int min_exponent;  // of the smallest normal number
  int max_exponent;
};

inline Format format_of(int32_t dtype) {
  if (dtype == POWERATTN_FLOAT16) return {11, -14, 15};
  if (dtype == POWERATTN_BFLOAT16) return {8, -126, 127};
  if (dtype == POWERATTN_FLOAT32) return {24, -126, 127};
  return {53, -1022, 1023};
}

// Half of the gap between 1 and the next number: the relative error of one rounding.
inline double unit_roundoff(int32_t dtype) { return std::ldexp(1.0, -format_of(dtype).digits); }

inline size_t bytes_of(int32_t dtype) {
  return dtype == POWERATTN_FLOAT64 ? 8 : dtype == POWERATTN_FLOAT32 ? 4 : 2;
}

// The nearest number of the type, ties to even.
inline double round_to(int32_t dtype, double x) {
  if (dtype == POWERATTN_FLOAT64 || !std::isfinite(x) || x == 0) return x;
  if (dtype == POWERATTN_FLOAT32) return static_cast<float>(x);
  const Format f = format_of(dtype);
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double rounded =
      std::ldexp(std::nearbyint(std::ldexp(x, f.digits - 1 - exponent)), exponent - f.digits + 1);
  const double largest = std::ldexp(2.0, f.max_exponent);
  return std::fabs(rounded) >= largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

inline uint16_t encode16(int32_t dtype, double x) {
  const Format f = format_of(dtype);
  const int fraction_bits = f.digits - 1, exponent_bits = 16 - f.digits;
  const uint32_t sign = std::signbit(x) ? 0x8000u : 0u;
  const uint32_t all_ones = ((1u << exponent_bits) - 1u) << fraction_bits;
  x = std::fabs(round_to(dtype, x));
  if (std::isnan(x)) return static_cast<uint16_t>(sign | all_ones | (1u << (fraction_bits - 1)));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | all_ones);
  if (x == 0) return static_cast<uint16_t>(sign);
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const uint32_t significand = static_cast<uint32_t>(std::ldexp(x, fraction_bits - exponent));
  const bool normal = significand >> fraction_bits != 0;
  const uint32_t biased = normal ? static_cast<uint32_t>(exponent - f.min_exponent + 1) : 0u;
  return static_cast<uint16_t>(sign | (biased << fraction_bits) | (significand & ((1u << fraction_bits) - 1u)));
}

inline double decode16(int32_t dtype, uint16_t bits) {
  const Format f = format_of(dtype);
  const int fraction_bits = f.digits - 1, exponent_bits = 16 - f.digits;
  const uint32_t biased = (bits & 0x7fffu) >> fraction_bits, fraction = bits & ((1u << fraction_bits) - 1u);
  double x;
  if (biased == (1u << exponent_bits) - 1u) {
    x = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else {
    const uint32_t significand = fraction | (biased ? 1u << fraction_bits : 0u);
    x = std::ldexp(static_cast<double>(significand),
                   static_cast<int>(biased ? biased : 1u) - 1 + f.min_exponent - fraction_bits);
  }
  return bits & 0x8000u ? -x : x;
}

inline void encode(int32_t dtype, double x, char *at) {
  if (dtype == POWERATTN_FLOAT64) {
    std::memcpy(at, &x, 8);
  } else if (dtype == POWERATTN_FLOAT32) {
    const float f = static_cast<float>(x);
    std::memcpy(at, &f, 4);
  } else {
    const uint16_t h = encode16(dtype, x);
    std::memcpy(at, &h, 2);
  }
}

inline double decode(int32_t dtype, const char *at) {
  if (dtype == POWERATTN_FLOAT64) {
    double x;
    std::memcpy(&x, at, 8);
    return x;
  }
  if (dtype == POWERATTN_FLOAT32) {
    float x;
    std::memcpy(&x, at, 4);
    return static_cast<double>(x);
  }
  uint16_t h;
  std::memcpy(&h, at, 2);
  return decode16(dtype, h);
}

// splitmix64 and Box-Muller: the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }
  std::vector<double> normals(int64_t n, double mean, double deviation, int32_t dtype) {
    std::vector<double> x(static_cast<size_t>(n));
    for (double &one : x) one = round_to(dtype, mean + deviation * normal());
    return x;
  }

 private:
  uint64_t state_;
};

}  // namespace powerattn_test
