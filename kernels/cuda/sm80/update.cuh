// SPDX-License-Identifier: Apache-2.0
// Sums of one chunk, local = W sum_t w_t phi(x_t) u_t^T, as a product with tokens as the inner dimension: the
// A operand phi(x)^T is built from transposed fragments of x, weights included, u is the B operand as it is.
// float16: the weights carry a power of two that brings the largest feature below 2^15, undone on the sums.
// A warp owns one unit: a tile (degree 2, 64 rows) or 16 features (degree 1), times at most 64 columns of u.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "load.h"
#include "shapes.h"
#include "units.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

template <typename T, int D, int P>
__global__ void __launch_bounds__(UpdateShape<D, P>::kThreads, UpdateShape<D, P>::kBlocksPerSM)
    update_kernel(const __grid_constant__ UpdateArgs a) {
  using S = UpdateShape<D, P>;
  unsigned char *shared = dynamic_shared<unsigned char>();
  const uint32_t base = shared_address(shared);
  float *const weights = reinterpret_cast<float *>(shared + S::kStages * 2 * S::kTileBytes);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, quad = lane & 3;

  const Shape &shape = a.shape;
  const int slice = blockIdx.x % S::kSlices;
  const int64_t slot = blockIdx.x / S::kSlices;
  const int64_t chunk_id = slot / shape.heads_kv;
  const int head_kv = static_cast<int>(slot % shape.heads_kv);
  const Chunk chunk = shape.table.chunks[chunk_id];
  if (chunk.length == 0) return;
  const int64_t batch = shape.packed ? 0 : chunk.sequence;
  const int group = a.reverse ? shape.heads_q / shape.heads_kv : 1;
  const float *const g = a.g ? a.g + (batch * shape.heads_kv + head_kv) * shape.seq_len + chunk.start : nullptr;
  const float g_end = g ? g[chunk.length - 1] : 0.f;

  float lift = 1.f, lowered = 1.f;
  if constexpr (kCounted<T>) {
    lift = a.as_z ? a.ranges[slot].weigh_z : a.ranges[slot].weigh_s;
    lowered = inverse_power(lift);
  }

  const int unit = slice * S::kWarps + warp;
  const int index = unit / S::kHalves, half = unit % S::kHalves;
  int ib = 0, jb = 0;
  if constexpr (P == 2) {
    if (unit < S::kUnits) tile_pair(D / 8, index, &ib, &jb);
  } else {
    ib = 2 * index;
    jb = 2 * index + 1;
  }

  const int blocks = (chunk.length + S::kTokens - 1) / S::kTokens;
  const int total = blocks * group;
  auto fetch = [&](int n) {
    if (n < total) {
      const int part = n / blocks, t0 = (n % blocks) * S::kTokens, valid = chunk.length - t0;
      const int head = a.reverse ? head_kv * group + part : head_kv, stage = n % S::kStages;
      const uint32_t dst = base + stage * 2 * S::kTileBytes;
      load_rows<S::kTokens, D, S::kThreads>(dst, row_pointer<T>(a.x, batch, chunk.start + t0, head),
                                            a.x.stride_t, valid, thread);
      load_rows<S::kTokens, D, S::kThreads>(
          dst + S::kTileBytes, row_pointer<T>(a.u, batch, chunk.start + t0, head), a.u.stride_t, valid, thread);
      // w_t = e^{g_end - g_t}; reverse: c e^{g_t} r_t (-delta_t)
      const int64_t at = (batch * shape.heads_q + head) * shape.seq_len + chunk.start + t0;
      for (int t = thread; t < S::kTokens; t += S::kThreads) {
        float w = 0.f;
        if (t < valid) {
          w = a.scale;
          if (g) w *= __expf(a.reverse ? g[t0 + t] : g_end - g[t0 + t]);
          if (a.r) w *= a.r[at + t];
          if (a.delta) w *= -a.delta[at + t];
          if constexpr (kCounted<T>) w *= lift;
        }
        weights[stage * S::kTokens + t] = w;
      }
    }
    copy_commit();
  };

  float acc[S::kM][S::kCols / 8][4] = {};
  fetch(0);
  fetch(1);
#pragma unroll 1
  for (int n = 0; n < total; ++n) {
    copy_wait<1>();
    __syncthreads();
    fetch(n + 2);
    const int stage = n % S::kStages;
    const SharedTile<D> xs{base + stage * 2 * S::kTileBytes, S::kTokens};
    const SharedTile<D> us{base + stage * 2 * S::kTileBytes + S::kTileBytes, S::kTokens};
    if (unit >= S::kUnits) continue;
#pragma unroll
    for (int k = 0; k < S::kTokens / 16; ++k) {
      // x^T of blocks ib (f[0..1]) and jb (f[2..3]): feature g, tokens 2c, 2c + 1 (+ 8)
      uint32_t f[4];
      ldmatrix4_trans(f, xs.at(16 * k + (lane & 15), lane < 16 ? ib : jb));
      const float *const w = weights + stage * S::kTokens + 16 * k + 2 * quad;
      const float2 w0 = *reinterpret_cast<const float2 *>(w), w1 = *reinterpret_cast<const float2 *>(w + 8);
      uint32_t phi[S::kM][4], low[4];
      if constexpr (P == 2) {
        uint32_t k0[2], k1[2];
        weigh<T>(k0, f[2], w0);
        weigh<T>(k1, f[3], w1);
        uint32_t s[8][2];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          s[i][0] = __shfl_sync(0xffffffffu, f[0], 4 * i + quad);
          s[i][1] = __shfl_sync(0xffffffffu, f[1], 4 * i + quad);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
          update_fragment<T>(phi[m], k0, k1, s[2 * m][0], s[2 * m][1], s[2 * m + 1][0], s[2 * m + 1][1]);
      } else {
        // Weights in two parts, two products: Z is the row sum, which nothing averages.
        const float2 pair_weights[2] = {w0, w1};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t parts[2];
          weigh<T>(parts, f[i], pair_weights[i & 1]);
          const int to = (i >> 1) + 2 * (i & 1);  // f: block, then tokens; a fragment: rows, then k
          phi[0][to] = parts[0];
          low[to] = parts[1];
        }
      }
#pragma unroll
      for (int c = 0; c < S::kCols / 16; ++c) {
        uint32_t b[4];
        us.b_trans(b, 16 * k, half * (S::kCols / 16) + c, lane);
#pragma unroll
        for (int m = 0; m < S::kM; ++m) {
          mma<T>(acc[m][2 * c], phi[m], b[0], b[1]);
          mma<T>(acc[m][2 * c + 1], phi[m], b[2], b[3]);
        }
        if constexpr (P == 1) {
          mma<T>(acc[0][2 * c], low, b[0], b[1]);
          mma<T>(acc[0][2 * c + 1], low, b[2], b[3]);
        }
      }
    }
  }
  if (unit >= S::kUnits) return;

  const bool end = a.end_local != nullptr && (a.reverse ? chunk.index == 0 : chunk.index + 1 == chunk.count);
  const int64_t pair = static_cast<int64_t>(chunk.sequence) * shape.heads_kv + head_kv;
  const float weight = (P == 2 && ib < jb ? 2.f : 1.f) * lowered;
  float inverse_unit = 1.f;
  if constexpr (kCounted<T>) inverse_unit = inverse_power(unit_of(a.ranges[slot].bound_s));
  const int row0 = P == 1 ? 16 * index : 0;  // degree 1: feature; degree 2: row of the tile
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 16 * m + 8 * h + lane / 4;
      if (a.as_z) {
        float *const out = static_cast<float *>(a.local) + (slot * D + row) * D + half * S::kCols + 2 * quad;
#pragma unroll
        for (int c = 0; c < S::kCols / 8; ++c)
          *reinterpret_cast<float2 *>(out + 8 * c) =
              make_float2(lowered * acc[m][c][2 * h], lowered * acc[m][c][2 * h + 1]);
      } else if (end) {
        const int64_t tiles_row = int64_t(P == 1 ? 0 : index * kTileRows) + row;
        float *const out = a.end_local + (pair * tile_rows(P, D) + tiles_row) * D + half * S::kCols + 2 * quad;
#pragma unroll
        for (int c = 0; c < S::kCols / 8; ++c)
          *reinterpret_cast<float2 *>(out + 8 * c) =
              make_float2(weight * acc[m][c][2 * h], weight * acc[m][c][2 * h + 1]);
      } else {
        const int tile = P == 1 ? row / kTileRows : index;
        unsigned char *const out = static_cast<unsigned char *>(a.local) +
                                   (slot * tile_count(P, D) + tile) * (kTileRows * D * 2) + 4 * quad;
#pragma unroll
        for (int c = 0; c < S::kCols / 8; ++c)
          *reinterpret_cast<uint32_t *>(out +
                                        swizzle<D>(kTileRows, row % kTileRows, half * (S::kCols / 8) + c)) =
              Pair<T>::pack(weight * acc[m][c][2 * h] * inverse_unit,
                            weight * acc[m][c][2 * h + 1] * inverse_unit);
      }
    }
}

template <typename T, int D, int P>
cudaError_t launch_update(const UpdateArgs &a, cudaStream_t stream) {
  using S = UpdateShape<D, P>;
  const int64_t blocks = a.shape.table.num_chunks * a.shape.heads_kv * S::kSlices;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(update_kernel<T, D, P>, static_cast<unsigned>(blocks), S::kThreads, S::kShared, stream,
                       a);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
