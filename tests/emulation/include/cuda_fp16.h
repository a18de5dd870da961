// SPDX-License-Identifier: Apache-2.0
// float16, as much as the kernels use.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  explicit inline operator float() const;
};
struct __half2 {
  alignas(4) __half x;
  __half y;
};

inline float __half2float(__half x) {
  const unsigned sign = unsigned(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31,
                 fraction = x.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(fraction) * 0x1p-24f;
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline __half::operator float() const { return __half2float(*this); }
namespace emulation {
inline __half to_half(double x) {  // to nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double m = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (m < 0x1p-14)
    return {uint16_t(sign | unsigned(std::nearbyint(m * 0x1p24)))};  // subnormal; 1024 is the first normal
  if (m >= 65520.0) return {uint16_t(sign | 0x7c00)};
  int exponent;
  const double fraction = std::frexp(m, &exponent);                     // [0.5, 1)
  const unsigned digits = unsigned(std::nearbyint(fraction * 2048.0));  // 1024 to 2048
  return {uint16_t(sign | ((unsigned(exponent + 13) << 10) + digits))};
}
}  // namespace emulation
inline __half __float2half_rn(float x) { return emulation::to_half(x); }
inline __half __float2half(float x) { return emulation::to_half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
// Products and sums of float16 numbers are exact in double.
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {emulation::to_half(double(__half2float(a.x)) * __half2float(b.x)),
          emulation::to_half(double(__half2float(a.y)) * __half2float(b.y))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {emulation::to_half(double(__half2float(a.x)) * __half2float(b.x) + __half2float(c.x)),
          emulation::to_half(double(__half2float(a.y)) * __half2float(b.y) + __half2float(c.y))};
}
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
inline float __low2float(__half2 a) { return __half2float(a.x); }
inline float __high2float(__half2 a) { return __half2float(a.y); }
