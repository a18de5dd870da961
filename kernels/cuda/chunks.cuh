// SPDX-License-Identifier: Apache-2.0
// Tables and gate sums by one thread or block, for the kernels that make them.
#pragma once

#include "kernels/cuda/chunks.h"
#include "kernels/cuda/numeric.cuh"

namespace powerattn::cuda {

// The tables of sequences of one length: nothing depends on what a device array holds.
struct UniformTables {
  Sequence *sequences;
  Chunk *chunks;
  Tile *tiles;
  int64_t n;       // sequences
  int64_t tokens;  // of each
  int32_t per_sequence;
  int64_t chunk;
  int64_t per_chunk;
  int64_t tile;
};
__device__ inline Chunk uniform_chunk(const UniformTables &t, int64_t id) {
  const int32_t index = int32_t(id % t.per_sequence);
  return {index * t.chunk, int32_t(min(t.tokens - index * t.chunk, t.chunk)), int32_t(id / t.per_sequence),
          index, t.per_sequence};
}
__device__ inline Tile uniform_tile(const UniformTables &t, int64_t id) {
  const int64_t c = id / t.per_chunk, index = c % t.per_sequence, offset = id % t.per_chunk * t.tile;
  const int64_t length = min(t.tokens - index * t.chunk, t.chunk);
  if (offset >= length) return {0, 0, 0, 0, 0};
  return {index * t.chunk + offset, int32_t(min(length - offset, t.tile)), int32_t(c / t.per_sequence),
          int32_t(c), int32_t(offset)};
}
// Entry `id` of every table that has one.
__device__ inline void fill_uniform_tables(const UniformTables &t, int64_t id) {
  if (id < t.n) t.sequences[id] = {0, t.tokens, int32_t(id * t.per_sequence), t.per_sequence};
  if (id < t.n * t.per_sequence) t.chunks[id] = uniform_chunk(t, id);
  if (id < t.n * t.per_sequence * t.per_chunk) t.tiles[id] = uniform_tile(t, id);
}

// G_t = G_{t-1} + max(log_g_t, reset) of one chunk and head by a block; a tile of kBlock * kPerThread tokens at
// a time: thread sums, warp scan, scan of the warps.
template <int kBlock>
__device__ inline void scan_gates(const Chunk &c, const float *log_g, const powerattn_tensor &shape,
                                  bool packed, int64_t head, int64_t heads, int64_t seq_len, float *g,
                                  double *g64) {
  constexpr int kPerThread = kGatesPerThread;
  __shared__ double warp_totals[kBlock / 32];
  const int64_t b = batch_of(packed, c.sequence);
  const float *in =
      log_g + (packed ? 0 : b * shape.stride_b) + head * shape.stride_h + c.start * shape.stride_t;
  const int64_t row = (b * heads + head) * seq_len + c.start;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  double carry = 0;
  for (int64_t base = 0; base < c.length; base += kBlock * kPerThread) {
    const int64_t first = base + threadIdx.x * kPerThread;
    double value[kPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float x = first + i < c.length ? in[(first + i) * shape.stride_t] : 0.0f;
      sum += x < kResetLogGate ? kResetLogGate : x;  // keeps NaN
      value[i] = sum;
    }
    const double inclusive = warp_scan(sum);
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    double before = carry + (inclusive - sum), total = carry;
    for (int w = 0; w < kBlock / 32; ++w) {
      if (w < warp) before += warp_totals[w];
      total += warp_totals[w];
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (first + i >= c.length) break;
      if (g) g[row + first + i] = float(before + value[i]);
      if (g64) g64[row + first + i] = before + value[i];
    }
    carry = total;
    __syncthreads();
  }
}

}  // namespace powerattn::cuda
