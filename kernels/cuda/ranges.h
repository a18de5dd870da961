// SPDX-License-Identifier: Apache-2.0
// The powers of two and bounds that keep the states of float16 in its range. Plain data.
#pragma once

namespace powerattn::cuda {

// float16 states are multiples of a power of two per slot: stored * unit = value, |stored| < 2^15. The unit
// comes from a bound on the values that the sums over chunks carry along. bfloat16 has the range of
// float32 and no units: null pointers below.
struct Units {
  float s = 1.f, z = 1.f;
};

struct Bounds {
  float s = 0.f, z = 0.f;
};

// What the inputs of one chunk and head allow, with w, x, u as in UpdateArgs and |.| the largest element:
struct alignas(16) Range {
  float weigh_s = 1.f, weigh_z = 1.f;  // powers of two that bring w phi(x), w x into float16
  float bound_s = 0.f, bound_z = 0.f;  // no element of the sums into S and Z is larger
};

}  // namespace powerattn::cuda
