// SPDX-License-Identifier: Apache-2.0
// bfloat16, as much as the kernels use.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
  explicit operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
struct __nv_bfloat162 {
  alignas(4) __nv_bfloat16 x;
  __nv_bfloat16 y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
// To nearest, ties to even; a NaN stays one.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__bfloat162float(a.x) * __bfloat162float(b.x),
                               __bfloat162float(a.y) * __bfloat162float(b.y));
}
namespace emulation {
// a b + c, rounded once: exact in double (8-bit fractions), then to nearest bfloat16 by way of an odd-rounded
// float.
inline __nv_bfloat16 fused(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  const double exact = double(__bfloat162float(a)) * double(__bfloat162float(b)) + double(__bfloat162float(c));
  float f = float(exact);
  if (double(f) != exact && std::isfinite(f)) {
    unsigned u = __float_as_uint(f);
    if (std::fabs(double(f)) > std::fabs(exact)) --u;  // towards zero
    f = __uint_as_float(u | 1);
  }
  return __float2bfloat16_rn(f);
}
}  // namespace emulation
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {emulation::fused(a.x, b.x, c.x), emulation::fused(a.y, b.y, c.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }
inline float __low2float(__nv_bfloat162 a) { return __bfloat162float(a.x); }
inline float __high2float(__nv_bfloat162 a) { return __bfloat162float(a.y); }
