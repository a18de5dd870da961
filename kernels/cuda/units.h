// SPDX-License-Identifier: Apache-2.0
// What counts float16 states in powers of two, in the order in which kernels hand it on: ranges of the inputs
// of each chunk, sums in units of their bounds, units of the states between chunks. A slot is chunk * heads_kv
// + head. bfloat16 has the range of float32 and needs none of it: null pointers.
#pragma once

namespace powerattn::cuda {

// What the inputs of one chunk and head allow, with the weights w of its tokens, x and u, |.| the largest
// element:
struct alignas(16) Range {
  float weigh_s = 1.f, weigh_z = 1.f;  // powers of two that bring w phi(x), w x into float16
  float bound_s = 0.f, bound_z = 0.f;  // no element of the sums into S and Z is larger
};

// A bound on the states that the scan over chunks carries along, and the powers of two it gives for a slot:
// stored * unit = value, |stored| < 2^15.
struct Bounds {
  float s = 0.f, z = 0.f;
};
struct Units {
  float s = 1.f, z = 1.f;
};

}  // namespace powerattn::cuda
