// SPDX-License-Identifier: Apache-2.0
// Powers of two that keep float16 in its range.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace powerattn::cuda {

template <typename T>
inline constexpr bool kCounted = std::is_same_v<T, __half>;

// The largest magnitude of `most` and two (eight) float16 numbers, as its 15 bits, which have the order of the
// numbers.
__device__ __forceinline__ uint32_t most_bits(uint32_t most, uint32_t v) {
  return max(most, max(v & 0x7fffu, v >> 16 & 0x7fffu));
}
__device__ __forceinline__ uint32_t most_bits(uint32_t most, uint4 v) {
  return most_bits(most_bits(most_bits(most_bits(most, v.x), v.y), v.z), v.w);
}

// 1 / p of a power of two in 2^-126 .. 2^126.
__device__ __forceinline__ float inverse_power(float p) {
  return __uint_as_float(0x7f000000u - __float_as_uint(p));
}

// 2^(n - k) for 2^k <= x < 2^(k + 1), at most 2^most; x = 0 counts as 2^-127.
__device__ __forceinline__ float power_over(int n, float x, int most = 127) {
  const int field = n + 254 - static_cast<int>(__float_as_uint(x) >> 23);
  return __uint_as_float(static_cast<uint32_t>(max(1, min(field, 127 + most))) << 23);
}

// The power of two, 2^-100 or more, for which 2^14 <= bound / unit < 2^15: room for a sum's rounding errors
// below the 2^16 of float16. Zero, infinity and NaN get finite units, too.
__device__ __forceinline__ float unit_of(float bound) {
  const uint32_t exponent = (__float_as_uint(bound) & 0x7fffffffu) >> 23;
  return __uint_as_float((exponent < 27u + 14u ? 27u : exponent - 14u) << 23);
}

}  // namespace powerattn::cuda
