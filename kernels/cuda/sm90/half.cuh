// SPDX-License-Identifier: Apache-2.0
// float16 has the digits but not the range: what becomes an operand of a product is counted in powers of two,
// one for each row of weights or of features, which are undone on float32 sums. bfloat16 has the range of
// float32 and needs none: its versions of these cost nothing.
#pragma once

#include "device.cuh"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/units.cuh"

namespace powerattn::cuda::sm90 {

template <int kN>
__device__ __forceinline__ void scale_rows(float (&o)[kN], float (&l)[2], float f0, float f1) {
#pragma unroll
  for (int i = 0; i < kN; i += 4) {
    o[i] *= f0;
    o[i + 1] *= f0;
    o[i + 2] *= f1;
    o[i + 3] *= f1;
  }
  l[0] *= f0;
  l[1] *= f1;
}

// ---- Rows of q --------------------------------------------------------------------------------------------

// The power of two, twice in float16, that brings the largest element of a row to 2^6 .. 2^7, so that products
// of two stay below 2^14 and small elements keep their digits. Not more than 2^15: for elements below 2^-9.
__device__ __forceinline__ uint32_t row_power(uint32_t most) {
  const uint32_t exponent = most >> 10;
  return (min(36u - exponent, 30u) << 10) * 0x10001u;
}
__device__ __forceinline__ float value_of(uint32_t power) {
  return __uint_as_float(((power >> 10 & 31u) + 112u) << 23);
}
// Multiplies row g + 8 h of a lane's fragments of 16 rows x 16 kN columns by its power.
template <int kN>
__device__ __forceinline__ uint32_t scale_row(uint32_t (&x)[kN][4], int h) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) most = most_bits(most_bits(most, x[i][h]), x[i][h + 2]);
  most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
  most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
  const uint32_t power = row_power(most);
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    x[i][h] = mul2<__half>(x[i][h], power);
    x[i][h + 2] = mul2<__half>(x[i][h + 2], power);
  }
  return power;
}
// The same of a row of 128 elements, of which sixteen lanes have eight each.
__device__ __forceinline__ uint32_t row_power(uint4 v) {
  uint32_t most = most_bits(0, v);
#pragma unroll
  for (int other = 1; other < 16; other *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, other));
  return row_power(most);
}
__device__ __forceinline__ uint4 times(uint4 v, uint32_t power) {
  using T = __half;
  return make_uint4(mul2<T>(v.x, power), mul2<T>(v.y, power), mul2<T>(v.z, power), mul2<T>(v.w, power));
}
// What a row's weights are multiples of for the power stored at `at`: its kDegree-th power.
template <typename T, int kDegree>
__device__ __forceinline__ float weight_power(uint32_t at) {
  if constexpr (!kCounted<T>) return 1.f;
  return power<kDegree>(value_of(static_cast<uint32_t>(load_i1(at))));
}

// ---- Weights of rows --------------------------------------------------------------------------------------

// What the weights of a lane's rows g and g + 8 are counted in: they and their sums are `unit` times what they
// stand for. A row starts with the largest unit. A block whose weights would pass 2^15 lowers it until they are
// about 8; where gates have decayed what was summed, it is raised again. So the row's sum stays above 8 or
// holds nothing but what is new, and a weight that is rounded to a multiple of 2^-24 loses nothing of the sum.
constexpr float kFirstUnit = 0x1p30f, kMostWeight = 0x1p15f;

template <typename T>
struct RowUnits {
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ float operator[](int) const { return 1.f; }
  __device__ __forceinline__ float raise(int, float, float f) { return f; }
};
template <>
struct RowUnits<__half> {
  float unit[2];
  __device__ __forceinline__ void start() { unit[0] = unit[1] = kFirstUnit; }
  __device__ __forceinline__ float operator[](int h) const { return unit[h]; }
  // The factor for a row whose sums (of weights: `l`, this lane's) are to be multiplied by the gate f <= 1.
  __device__ __forceinline__ float raise(int h, float l, float f) {
    const float x = fabsf(quad_sum(l)) * f;
    float g = 1.f;
    if (x < 8.f) g = fminf(power_over(3, x), kFirstUnit * inverse_power(fmaxf(unit[h], 0x1p-90f)));
    unit[h] *= g;
    return f * g;
  }
  // `most`: this lane's sums of the magnitudes of a block's weights w.
  template <int kN>
  __device__ __forceinline__ void make_room(const float (&most)[2], float (&w)[32], float (&o)[kN],
                                            float (&l)[2]) {
    if (!__any_sync(0xffffffffu, most[0] > kMostWeight || most[1] > kMostWeight)) return;
    float f[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float x = quad_max(most[h]);
      f[h] = x > kMostWeight ? power_over(3, x) : 1.f;
      unit[h] *= f[h];
    }
    scale_rows(o, l, f[0], f[1]);
#pragma unroll
    for (int i = 0; i < 32; ++i) w[i] *= f[i / 2 & 1];
  }
};

// ---- Weights of the backward ------------------------------------------------------------------------------

// Powers of two that weights w_ij = c gamma_ij r_i s_ij^p are multiplied by, and their gradients e_ij = w_ij
// (m_ij - delta_i) / s_ij over that, from the four limits of a slot. Normalised, w_ij <= 1, and so
//   |e_ij| <= (c r_i)^(1/p) (|dy_i| |v_j| + |delta_i|);
// else |s_ij| <= |q_i| |k_j|. Of a bound's 2^15 gradients leave 2^3 free, for what rounding adds.
struct Lifts {
  float weight = 1.f, ratio = 1.f;
  __device__ __forceinline__ float gradient() const { return weight * ratio; }
  __device__ __forceinline__ float gradient() const volatile { return weight * ratio; }
};
template <typename T>
__device__ __forceinline__ Lifts lifts_of(const Shape &p, const int32_t *limits, int64_t slot) {
  Lifts x;
  if constexpr (kCounted<T>) {
    float most[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = __int_as_float(limits[slot * 4 + i]);
    float bound = most[2] * most[0] + most[3];
    x.weight = 32.f;
    if (!p.normalize) {
      const float s = most[2] * most[1];
      float weights = fabsf(p.scale_p);
      for (int i = 1; i < p.degree; ++i) weights *= s;
      bound = weights * most[3] * most[0];
      x.weight = inverse_power(unit_of(weights * s));
    }
    x.ratio = 0.125f * inverse_power(unit_of(bound)) / x.weight;
  }
  return x;
}

}  // namespace powerattn::cuda::sm90
