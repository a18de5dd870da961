// SPDX-License-Identifier: Apache-2.0
// Elements of every dtype as double, one at a time. For the reference and for conversions of states; the fast
// kernels have their own vector loads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "problem.h"

namespace powerattn {

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t h) { return float_from_bits(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
inline uint16_t bfloat16_from_float(float x) {
  uint32_t bits = bits_from_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * float_from_bits(0x33800000u);  // 2^-24
  return sign ? -subnormal : subnormal;
}

inline uint16_t float16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to Inf
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24; adding 0.5 makes the FPU round there
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_from_float(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Rounds once, straight from double: going through float first could round twice.
inline float float_round_to_odd(double x) {
  float f = static_cast<float>(x);
  if (static_cast<double>(f) == x || std::isnan(x) || std::isinf(f)) return f;
  uint32_t bits = bits_from_float(f);
  if ((bits & 1u) == 0) {
    // f is even and inexact: the neighbour towards x is odd and keeps which side of a tie x lies on.
    bits += (std::fabs(static_cast<double>(f)) < std::fabs(x)) ? 1u : ~0u;
    f = float_from_bits(bits);
  }
  return f;
}

inline double load_element(Dtype type, const void *data, int64_t index) {
  switch (type) {
    case Dtype::kFloat64:
      return static_cast<const double *>(data)[index];
    case Dtype::kFloat32:
      return static_cast<const float *>(data)[index];
    case Dtype::kFloat16:
      return float16_to_float(static_cast<const uint16_t *>(data)[index]);
    case Dtype::kBfloat16:
      return bfloat16_to_float(static_cast<const uint16_t *>(data)[index]);
  }
  return 0;
}

inline void store_element(Dtype type, void *data, int64_t index, double x) {
  switch (type) {
    case Dtype::kFloat64:
      static_cast<double *>(data)[index] = x;
      break;
    case Dtype::kFloat32:
      static_cast<float *>(data)[index] = static_cast<float>(x);
      break;
    case Dtype::kFloat16:
      static_cast<uint16_t *>(data)[index] = float16_from_float(float_round_to_odd(x));
      break;
    case Dtype::kBfloat16:
      static_cast<uint16_t *>(data)[index] = bfloat16_from_float(float_round_to_odd(x));
      break;
  }
}

}  // namespace powerattn
