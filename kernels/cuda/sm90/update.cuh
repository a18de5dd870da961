// SPDX-License-Identifier: Apache-2.0
// Parts that the update kernels of both head sizes share.
#pragma once

#include "half.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {

struct UnitMeta {
  int32_t slice;   // < 0: no more units; behind the last slice: Z
  int32_t stages;  // of 64 tokens, over all heads of the group
  int32_t slot;    // chunk * heads_kv + head
  int32_t end;     // of UpdateArgs::end, or < 0
  float factor;    // float16: what undoes the lifted weights and counts the sum in its unit
};

// The power of two that the weights of a sum into S (Z: norm) are multiplied by, and what undoes it; sums into
// the tiles of S are counted in a unit, those that leave the call (end) and Z are not.
__device__ __forceinline__ float lift_of(const Range &r, bool norm) { return norm ? r.weigh_z : r.weigh_s; }
__device__ __forceinline__ float sum_factor(const Range &r, bool norm, bool end) {
  const float lowered = inverse_power(lift_of(r, norm));
  return norm || end ? lowered : lowered * inverse_power(unit_of(r.bound_s));
}

// A operand w_t k_t of 16 tokens from `token` on and this warp's 16 features, in two parts. `keys`: the tile of
// k that has the features in its columns; `weights`: those of the tokens for this lane, 2c, +1, +8, +9.
template <typename T>
__device__ __forceinline__ void weighed_keys(uint32_t (&high)[4], uint32_t (&low)[4], uint32_t keys, int token,
                                             uint32_t weights, int warp, int lane) {
  const int row = token + (lane & 15), block = 2 * warp + (lane >> 4);
  uint32_t x[4];  // features g, then g + 8; of each: tokens 2c, then 2c + 8
  ldmatrix4_trans(x, keys + row * 128 + ((block ^ (row & 7)) << 4));
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float2 w = load_f2(weights + (r >> 1) * 32), v = unpack2<T>(x[(r & 1) * 2 + (r >> 1)]);
    const float v0 = v.x * w.x, v1 = v.y * w.y;
    high[r] = pack2<T>(v0, v1);
    const float2 top = unpack2<T>(high[r]);
    low[r] = pack2<T>(v0 - top.x, v1 - top.y);
  }
}

}  // namespace powerattn::cuda::sm90
