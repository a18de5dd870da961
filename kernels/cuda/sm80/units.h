// SPDX-License-Identifier: Apache-2.0
// float16 has the digits but not the range: what it has to hold is counted in powers of two that an upper bound
// gives, and the power is undone on float32 sums. Multiplying by a power of two is exact, so nothing is lost
// down to 2^-28 of the bound; below that it is rounded to 2^-39 of the bound.
#pragma once

#include <cstdint>

#include "args.h"
#include "kernels/cuda/units.cuh"
#include "mma.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

// The units of a slot from bounds on S and Z. The gradient kernels add up Z x and S u in the unit of S, which
// must not be too small for Z.
__device__ __forceinline__ Units units_of(float bound_s, float bound_z) {
  Units u;
  u.z = unit_of(bound_z);
  u.s = fmaxf(unit_of(bound_s), 0x1p-40f * u.z);
  return u;
}

// The power of two that divides the weights of a row in float16, `top`. When a weight of a step would pass 2^14
// of it, it becomes 2^-10 of the largest of that step: room to grow by 16 before the next change, and weights
// down to 2^-24 of the largest keep all their bits.
constexpr float kLeastTop = 0x1p-100f;
// By a vote of the warp first, since changes are rare. `most`: this lane's largest weights of each row. `scale`
// multiplies what was summed of row (m, h) by old / new.
template <int kM, typename Scale>
__device__ __forceinline__ void raise_tops(float (&top)[kM][2], const float (&most)[kM][2],
                                           const Scale &scale) {
  bool high = false;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) high |= most[m][h] > top[m][h] * 16384.f;
  if (!__any_sync(0xffffffffu, high)) return;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float largest = quad_max(most[m][h]);
      if (!(largest > top[m][h] * 16384.f)) continue;
      const uint32_t exponent = __float_as_uint(largest) & 0x7f800000u;
      const float grown = __uint_as_float(exponent > (10u << 23) ? exponent - (10u << 23) : 0x00800000u);
      scale(m, h, top[m][h] * inverse_power(grown));
      top[m][h] = grown;
    }
}
// The first top of a row whose sums hold `most` from the state already: far enough below for the sums to stay
// finite and for the weights to keep their bits.
__device__ __forceinline__ float first_top(float most) {
  const uint32_t exponent = __float_as_uint(quad_max(most)) & 0x7f800000u;
  return fmaxf(kLeastTop, exponent > (24u << 23) ? __uint_as_float(exponent - (24u << 23)) : 0.f);
}
// For sums that the gate f <= 1 is about to multiply: lowers the top to what that leaves, since weights to come
// may be as small, and returns the factor in its units. `h`: of the two rows in o; `most`: of what else is
// summed.
template <int kN>
__device__ __forceinline__ float lower_top(float *top, float f, const float (&o)[kN][4], int h, float most) {
#pragma unroll
  for (int i = 0; i < kN; ++i) most = fmaxf(most, fmaxf(fabsf(o[i][2 * h]), fabsf(o[i][2 * h + 1])));
  // No factor beyond float32; what is so far below is nothing beside any weight.
  const float lower = fminf(*top, fmaxf(first_top(most * *top * f), *top * 0x1p-100f));
  f *= *top * inverse_power(lower);
  *top = lower;
  return f;
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
