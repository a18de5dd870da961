// SPDX-License-Identifier: Apache-2.0
// One step of a walk: the gates of 64 tokens as factors, and what the tokens add to the state.
#pragma once

#include "../sm80/load.h"
#include "args.h"
#include "kernels/cuda/units.cuh"

namespace powerattn::cuda::linear {

using namespace ptx;
using sm80::aligned_rows;
using sm80::load_rows;
using sm80::row_pointer;
using sm80::SharedTile;

template <int D>
struct Form {
  static constexpr int kWarps = D / 16;  // each owns 16 rows of the state
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileBytes = kBlock * D * 2;
};

// Chunk `id`: arithmetic, or out of the table of packed sequences.
__device__ __forceinline__ Chunk chunk_at(const Shape &s, int64_t id) {
  if (s.packed) return s.table.chunks[id];
  const int32_t sequence = static_cast<int32_t>(id / s.per_sequence);
  const int32_t index = static_cast<int32_t>(id % s.per_sequence);
  const int64_t start = index * s.table.chunk;
  return {start, static_cast<int32_t>(min(s.table.chunk, s.seq_len - start)), sequence, index, s.per_sequence};
}

// Where a walk stands: its block of tokens and, reverse, the query head of the group.
struct Step {
  int block = 0;  // in the order of the walk
  int part = 0;
};
struct Walk {
  int length, blocks, parts;
  bool reverse;
  __device__ __forceinline__ Walk(const Chunk &chunk, bool backwards, int heads)
      : length(chunk.length), blocks((chunk.length + kBlock - 1) / kBlock), parts(heads), reverse(backwards) {}
  // First token of a block in its chunk.
  __device__ __forceinline__ int token(int block) const {
    return (reverse ? blocks - 1 - block : block) * kBlock;
  }
  __device__ __forceinline__ Step after(Step s) const {
    const bool last = s.part + 1 == parts;
    return {s.block + last, last ? 0 : s.part + 1};
  }
};

// The gates of 64 tokens, g = cumulative log gate in the block:
//   row    e^{g_r}             reverse: e^{g_end - g_r}   of a row, for what the state gives
//   weight e^{g_end - g_t}     reverse: e^{g_t}           of what a token adds to the state
//   g      g / log 2           reverse: -g / log 2        so that a pair has 2^{g_row - g_column}
struct Gates {
  float g[kBlock], row[kBlock], weight[kBlock];
  float decay;  // e^{g_end}
  float unused[3];
};

// Two of the 64 per lane.
__device__ __forceinline__ float2 load_gates(const float *log_g, int64_t stride, int token, int length,
                                             int lane) {
  const int t = token + 2 * lane;
  float2 v = make_float2(0.f, 0.f);
  if (log_g != nullptr && t < length) v.x = log_g[t * stride];
  if (log_g != nullptr && t + 1 < length) v.y = log_g[(t + 1) * stride];
  return v;
}

// Returns g_end.
__device__ __forceinline__ float put_gates(Gates *to, float2 v, bool reverse, float row_scale,
                                           float weight_scale, int lane) {
  v.x = v.x < kResetLogGate ? kResetLogGate : v.x;  // keeps NaN
  v.y = v.y < kResetLogGate ? kResetLogGate : v.y;
  float sum = v.x + v.y;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  const float end = __shfl_sync(0xffffffffu, sum, 31);
  const float2 g = make_float2(sum - v.y, sum);
  const float2 from_start = make_float2(expf(g.x), expf(g.y));
  const float2 to_end = make_float2(expf(end - g.x), expf(end - g.y));
  const float2 row = reverse ? to_end : from_start, weight = reverse ? from_start : to_end;
  const float unit = reverse ? -1.4426950408889634f : 1.4426950408889634f;
  reinterpret_cast<float2 *>(to->g)[lane] = make_float2(unit * g.x, unit * g.y);
  reinterpret_cast<float2 *>(to->row)[lane] = make_float2(row_scale * row.x, row_scale * row.y);
  reinterpret_cast<float2 *>(to->weight)[lane] = make_float2(weight_scale * weight.x, weight_scale * weight.y);
  if (lane == 0) to->decay = expf(end);
  return end;
}

// sum += sum_t w_t x_t u_t^T over 64 tokens, rows 16 `strip` .. + 15 (features of x), all columns of u; kZ: z
// likewise with u = 1, the same number in every column. A weighed x is the sum of kParts numbers of T: 1 where
// the state is rounded to T after all, 2 for a relative error of 2^-17 (bfloat16), 3 for float32's.
template <typename T, int D, int kParts, bool kZ>
__device__ __forceinline__ void add_block(float (&sum)[D / 8][4], float (&z)[4], const SharedTile<D> &xs,
                                          const SharedTile<D> &us, const float *weight, bool weighted,
                                          int strip, int lane) {
  // float16 has no room for three parts of small numbers: a row's are counted in a power of two.
  constexpr bool kLifted = kCounted<T> && kParts == 3;
  constexpr uint32_t kOnes = kCounted<T> ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll(kParts == 3 ? 1 : D == 128 ? 2 : kBlock / 16)
  for (int k = 0; k < kBlock / 16; ++k) {
    // x^T: feature g of the first eight (f[0..1]) and the other eight (f[2..3]), tokens 2c, 2c + 1 (+ 8)
    uint32_t f[4], parts[kParts][4];
    [[maybe_unused]] float unit[2] = {1.f, 1.f};  // of rows g and g + 8 of weighed x
    ldmatrix4_trans(f, xs.at(16 * k + (lane & 15), 2 * strip + (lane >> 4)));
    if (weighted) {
      const float *const w = weight + 16 * k + 2 * (lane & 3);
      const float2 pairs[2] = {*reinterpret_cast<const float2 *>(w), *reinterpret_cast<const float2 *>(w + 8)};
      if constexpr (kLifted) {
        float most[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          most[i >> 1] = fmaxf(most[i >> 1], fmaxf(fabsf(Pair<T>::lo(f[i]) * pairs[i & 1].x),
                                                   fabsf(Pair<T>::hi(f[i]) * pairs[i & 1].y)));
#pragma unroll
        for (int h = 0; h < 2; ++h) unit[h] = unit_of(quad_max(most[h]));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = (i >> 1) + 2 * (i & 1);  // f: eight rows, then tokens; a fragment: rows, then k
        float left0 = Pair<T>::lo(f[i]) * pairs[i & 1].x, left1 = Pair<T>::hi(f[i]) * pairs[i & 1].y;
        if constexpr (kLifted) {
          const float lift = inverse_power(unit[i >> 1]);
          left0 *= lift;
          left1 *= lift;
        }
#pragma unroll
        for (int m = 0; m < kParts; ++m) {
          parts[m][to] = Pair<T>::pack(left0, left1);
          left0 -= Pair<T>::lo(parts[m][to]);
          left1 -= Pair<T>::hi(parts[m][to]);
        }
      }
    } else {
      parts[0][0] = f[0], parts[0][1] = f[2], parts[0][2] = f[1], parts[0][3] = f[3];
    }
    // to += (all parts) b. Three parts: in a sum of their own, smallest first, that float32 adds up, since the
    // sums inside a product are cut off and not rounded.
    const auto multiply = [&](float(&to)[4], uint32_t b0, uint32_t b1) {
      float own[4] = {};
#pragma unroll
      for (int m = kParts - 1; m >= 0; --m)
        if (m == 0 || weighted) mma<T>(kParts == 3 ? own : to, parts[m], b0, b1);
      if constexpr (kParts == 3) {
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e] += kLifted ? unit[e >> 1] * own[e] : own[e];
      }
    };
    if constexpr (kZ) multiply(z, kOnes, kOnes);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t b[4];
      us.b_trans(b, 16 * k, c, lane);
      multiply(sum[2 * c], b[0], b[1]);
      multiply(sum[2 * c + 1], b[2], b[3]);
    }
  }
}

}  // namespace powerattn::cuda::linear
