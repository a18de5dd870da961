// SPDX-License-Identifier: Apache-2.0
// What the backward needs per row, and the gradient of the gates from per-row dot products.
#include "args.h"
#include "kernels/cuda/launch.cuh"
#include "load.h"
#include "weights.h"

namespace powerattn {
namespace cuda {
namespace sm80 {
namespace {

constexpr int kThreads = 256;

// r_i = 1 / l_i, delta_i = sum_e d_y_ie y_ie. One warp per row of a tile and head.
template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ RowsArgs a) {
  const Shape &s = a.shape;
  const int lane = threadIdx.x & 31;
  const Tile tile = s.table.tiles[blockIdx.x / s.heads_q];
  const int head = blockIdx.x % s.heads_q;
  const int64_t batch = s.packed ? 0 : tile.sequence;
  for (int row = threadIdx.x / 32; row < tile.length; row += kThreads / 32) {
    const T *const y = row_pointer<T>(a.y, batch, tile.start + row, head);
    const T *const dy = row_pointer<T>(a.d_y, batch, tile.start + row, head);
    float sum = 0.f;
    for (int e = lane; e < s.head_dim; e += 32) sum += Pair<T>::to_float(y[e]) * Pair<T>::to_float(dy[e]);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0) {
      const int64_t at = (batch * s.heads_q + head) * s.seq_len + tile.start + row;
      a.delta[at] = sum;
      a.r[at] = safe_inverse(*row_pointer<float>(a.row_norm, batch, tile.start + row, head));
    }
  }
}

// Sum of a float over the block, in a fixed order.
__device__ __forceinline__ float block_sum(float v, float *scratch) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < kThreads / 32; ++w) sum += scratch[w];
  return sum;
}

// A state as stored: tiles, or at the ends of a sequence canonical numbers; null: zero.
struct StateView {
  const uint4 *tiles = nullptr;
  const float *canonical = nullptr;
  __device__ bool present() const { return tiles != nullptr || canonical != nullptr; }
};

// Columns 8 piece .. + 7 of the canonical row of features (i, j), which is `row` of tile (ib, jb).
__device__ __forceinline__ void load_state(float (&x)[8], const StateView &s, int d, int64_t canonical,
                                           int tile, int row, int piece, float unscale) {
  if (s.canonical != nullptr) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = s.canonical[canonical * d + piece * 8 + e];
  } else {
    const uint4 p = s.tiles[tile * (kTileRows * d / 8) + tile_element(d, row, piece * 8) / 8];
    const uint32_t w[4] = {p.x, p.y, p.z, p.w};
    using B = Pair<__nv_bfloat16>;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      x[2 * e] = unscale * B::lo(w[e]);
      x[2 * e + 1] = unscale * B::hi(w[e]);
    }
  }
}

// e^{g_end} (<S before the chunk, dS after it> + <Z, dZ>), over canonical rows; without k_state_dot S and Z
// after the chunk, as they are.
__global__ void __launch_bounds__(kThreads) boundary_kernel(const __grid_constant__ GateArgs a) {
  __shared__ float scratch[kThreads / 32];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int head = static_cast<int>(slot % s.heads_kv), d = s.head_dim;
  const bool whole = a.k_state_dot == nullptr, end = chunk.index + 1 == chunk.count;
  const bool first = chunk.index == 0 && !whole;
  const int64_t slot_before = whole ? slot + s.heads_kv : slot;
  float sum = 0.f;
  // What the ends have; an inner chunk has tiles.
  const auto at_end = [&](const void *p, int64_t stride_n, int64_t stride_h) {
    return p == nullptr ? nullptr : static_cast<const float *>(p) + chunk.sequence * stride_n + head * stride_h;
  };
  const int tiles = tile_count(s.degree, d), pieces = d / 8;
  const int64_t vectors = static_cast<int64_t>(tiles) * kTileRows * pieces;
  StateView before, after;
  if (first)
    before.canonical = at_end(a.initial.s, a.initial.s_stride_n, a.initial.s_stride_h);
  else
    before.tiles = static_cast<const uint4 *>(a.s_tiles) + slot_before * vectors;
  if (end)
    after.canonical = at_end(a.d_final.s, a.d_final.s_stride_n, a.d_final.s_stride_h);
  else
    after.tiles = static_cast<const uint4 *>(a.ds_tiles) + slot * vectors;
  if (before.present() && after.present()) {
    int ib = 0, jb = 0;
    for (int t = 0; t < tiles; ++t) {
      for (int v = threadIdx.x; v < kTileRows * pieces; v += kThreads) {
        const int row = v / pieces, piece = v % pieces;
        const int i = s.degree == 1 ? t * kTileRows + row : 8 * ib + row / 8;
        const int j = s.degree == 1 ? i : 8 * jb + row % 8;
        if (j >= d || i > j) continue;  // padding; the other order of a diagonal tile
        const int64_t canonical = s.degree == 1 ? i : canonical_row(d, i, j);
        const float unscale = s.degree == 1 ? 1.f : tile_unscale(ib == jb, i == j);
        float x[8], y[8];
        load_state(x, before, d, canonical, t, row, piece, unscale);
        load_state(y, after, d, canonical, t, row, piece, unscale);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += x[e] * y[e];
      }
      if (++jb == d / 8) jb = ++ib;
    }
  }
  const float *const z0 = at_end(a.initial.z, a.initial.z_stride_n, a.initial.z_stride_h);
  const float *const dz1 = at_end(a.d_final.z, a.d_final.z_stride_n, a.d_final.z_stride_h);
  if (a.z_tiles != nullptr && a.dz_tiles != nullptr && !(first && z0 == nullptr) && !(end && dz1 == nullptr)) {
    // Parts lie d rows apart: an element and its low part are d * d elements from each other (d >= 64), or in
    // the second half of the only tile (d = 32).
    const int64_t z_elements = static_cast<int64_t>(2) * d * d;
    const auto *const z = static_cast<const __nv_bfloat16 *>(a.z_tiles) + slot_before * z_elements;
    const auto *const dz = static_cast<const __nv_bfloat16 *>(a.dz_tiles) + slot * z_elements;
    for (int v = threadIdx.x; v < d * d; v += kThreads) {
      const int i = v / d, j = v % d;
      const int64_t high = (i / kTileRows) * kTileRows * d + tile_element(d, i % kTileRows, j);
      const int64_t low = ((i + d) / kTileRows) * kTileRows * d + tile_element(d, (i + d) % kTileRows, j);
      const int64_t canonical = canonical_row(d, min(i, j), max(i, j));
      const float scale = i == j ? 1.f : 0.70710678118654752f;
      const auto value = [&](bool canonical_end, const float *c, const __nv_bfloat16 *parts) {
        if (canonical_end) return scale * c[canonical];
        return __bfloat162float(parts[high]) + __bfloat162float(parts[low]);
      };
      sum += value(first, z0, z) * value(end, dz1, dz);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    const int64_t batch = s.packed ? 0 : chunk.sequence;
    const float *const g = a.g ? a.g + (batch * s.heads_kv + head) * s.seq_len + chunk.start : nullptr;
    a.boundary[slot] = g && !whole ? sum * __expf(g[chunk.length - 1]) : sum;
  }
}

// Suffix sums of one chunk and kv head, from the chunk's end, kThreads * kPerThread tokens at a time: sums of a
// thread's own, then of the warp's, then of the warps before.
constexpr int kPerThread = 4;

__global__ void __launch_bounds__(kThreads) gates_kernel(const __grid_constant__ GateArgs a) {
  __shared__ float warps[kThreads / 32];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const int head = static_cast<int>(slot % s.heads_kv), thread = threadIdx.x, warp = thread / 32;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int64_t batch = s.packed ? 0 : chunk.sequence;
  const int group = s.heads_q / s.heads_kv;
  const float inverse = 1.f / static_cast<float>(s.degree);
  const int64_t row0 = (batch * s.heads_kv + head) * s.seq_len + chunk.start;
  float carry = 0.f;
  if (a.s_tiles != nullptr) {
    float own = 0.f;
    if (a.k_state_dot != nullptr)
      for (int t = thread; t < chunk.length; t += kThreads) own += a.k_state_dot[row0 + t];
    carry = a.boundary[slot] + inverse * block_sum(own, warps);
    __syncthreads();
  }
  for (int end = chunk.length; end > 0; end -= kThreads * kPerThread) {
    const int last = end - 1 - thread * kPerThread;  // thread 0 holds the last tokens
    float v[kPerThread], own = 0.f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int t = last - i;
      if (t >= 0) {
        for (int h = head * group; h < (head + 1) * group; ++h) {
          const int64_t at = (batch * s.heads_q + h) * s.seq_len + chunk.start + t;
          own += a.q_dot ? a.q_dot[at] * inverse : a.eps * a.r[at] * a.delta[at];
        }
        own -= a.k_dot[row0 + t] * inverse;
      }
      v[i] = own;
    }
    float inclusive = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, inclusive, d);
      if ((thread & 31) >= d) inclusive += other;
    }
    if ((thread & 31) == 31) warps[warp] = inclusive;
    __syncthreads();
    float before = carry + (inclusive - own);
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warps[w];
      carry += warps[w];
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (last - i >= 0) *row_pointer<float>(a.d_log_g, batch, chunk.start + last - i, head) = before + v[i];
    __syncthreads();
  }
}

}  // namespace

cudaError_t rows(const RowsArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.shape.table.num_tiles * a.shape.heads_q;
  if (blocks == 0) return cudaSuccess;
  if (a.shape.dtype == Dtype::kFloat16)
    launch_kernel(rows_kernel<__half>, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
  else
    launch_kernel(rows_kernel<__nv_bfloat16>, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
  return cudaGetLastError();
}

cudaError_t gate_gradient(const GateArgs &a, cudaStream_t stream) {
  const int64_t slots = a.shape.table.num_chunks * a.shape.heads_kv;
  if (slots == 0) return cudaSuccess;
  if (a.s_tiles != nullptr)
    launch_kernel(boundary_kernel, static_cast<unsigned>(slots), kThreads, 0, stream, a);
  launch_kernel(gates_kernel, static_cast<unsigned>(slots), kThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
