// SPDX-License-Identifier: Apache-2.0
// Powers of two that keep float16 in its range.
#pragma once

#include <cstdint>

#include "kernels/cuda/units.h"

namespace powerattn::cuda {

// 1 / p of a power of two in 2^-126 .. 2^126.
__device__ __forceinline__ float inverse_power(float p) {
  return __uint_as_float(0x7f000000u - __float_as_uint(p));
}

// The power of two, 2^-100 or more, for which 2^14 <= bound / unit < 2^15: room for a sum's rounding errors
// below the 2^16 of float16. Zero, infinity and NaN get finite units, too.
__device__ __forceinline__ float unit_of(float bound) {
  const uint32_t exponent = (__float_as_uint(bound) & 0x7fffffffu) >> 23;
  return __uint_as_float((exponent < 27u + 14u ? 27u : exponent - 14u) << 23);
}

}  // namespace powerattn::cuda
