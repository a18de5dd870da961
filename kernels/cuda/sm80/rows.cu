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

// Sum of a float over the block, in a fixed order; the result is valid in thread 0.
__device__ __forceinline__ float block_sum(float v, float *scratch) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < kThreads / 32; ++w) sum += scratch[w];
  return sum;
}

// X = <S after the chunk, dS after the chunk> + <Z, dZ>. Both tiles carry W, the product wants it once:
// a diagonal tile counts both orders of i != j, an off-diagonal one is halved.
__global__ void __launch_bounds__(kThreads) boundary_kernel(const __grid_constant__ GateArgs a) {
  __shared__ float scratch[kThreads / 32];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int64_t pair = static_cast<int64_t>(chunk.sequence) * s.heads_kv + slot % s.heads_kv;
  const bool end = chunk.index + 1 == chunk.count;
  float sum = 0.f;
  if (!end || a.last != nullptr) {
    const int d = s.head_dim, tiles = tile_count(s.degree, d), vectors = kTileRows * d / 8;
    const int64_t elements = static_cast<int64_t>(tiles) * vectors;
    const uint4 *const x = end ? static_cast<const uint4 *>(a.last) + pair * elements
                               : static_cast<const uint4 *>(a.s_tiles) + (slot + s.heads_kv) * elements;
    const uint4 *const y = static_cast<const uint4 *>(a.ds_tiles) + slot * elements;
    using B = Pair<__nv_bfloat16>;
    int ib = 0, jb = 0;
    for (int t = 0; t < tiles; ++t) {
      const float weight = s.degree == 2 && ib < jb ? 0.5f : 1.f;
      float part = 0.f;
      const int used = s.degree == 1 ? min(vectors, d * d / 8) : vectors;
      for (int v = threadIdx.x; v < used; v += kThreads) {
        const uint4 p = x[t * vectors + v], q = y[t * vectors + v];
        part += B::lo(p.x) * B::lo(q.x) + B::hi(p.x) * B::hi(q.x) + B::lo(p.y) * B::lo(q.y) +
                B::hi(p.y) * B::hi(q.y) + B::lo(p.z) * B::lo(q.z) + B::hi(p.z) * B::hi(q.z) +
                B::lo(p.w) * B::lo(q.w) + B::hi(p.w) * B::hi(q.w);
      }
      sum += weight * part;
      if (++jb == d / 8) jb = ++ib;
    }
    if (a.z_tiles != nullptr && a.dz_tiles != nullptr) {
      // Parts lie d rows apart: an element and its low part are d * d elements from each other (d >= 64), or
      // in the second half of the only tile (d = 32).
      const int64_t z_elements = static_cast<int64_t>(2) * d * d;
      const __nv_bfloat16 *const dz = static_cast<const __nv_bfloat16 *>(a.dz_tiles) + slot * z_elements;
      const __nv_bfloat16 *const z =
          static_cast<const __nv_bfloat16 *>(a.z_tiles) + (slot + s.heads_kv) * z_elements;
      for (int v = threadIdx.x; v < d * d; v += kThreads) {
        const int i = v / d, j = v % d;
        const int64_t high = (i / kTileRows) * kTileRows * d + tile_element(d, i % kTileRows, j);
        const int64_t low = ((i + d) / kTileRows) * kTileRows * d + tile_element(d, (i + d) % kTileRows, j);
        const float before =
            end ? a.z_last[pair * d * d + v] : __bfloat162float(z[high]) + __bfloat162float(z[low]);
        sum += before * (__bfloat162float(dz[high]) + __bfloat162float(dz[low]));
      }
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) a.boundary[slot] = sum;
}

// Suffix sums of one chunk and kv head, from the chunk's end, kThreads tokens at a time.
__global__ void __launch_bounds__(kThreads) gates_kernel(const __grid_constant__ GateArgs a) {
  __shared__ float scan[kThreads];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const int head = static_cast<int>(slot % s.heads_kv), thread = threadIdx.x;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int64_t batch = s.packed ? 0 : chunk.sequence;
  const int group = s.heads_q / s.heads_kv;
  const float inverse = 1.f / static_cast<float>(s.degree);
  float carry = a.s_tiles != nullptr ? a.boundary[slot] : 0.f;
  for (int end = chunk.length; end > 0; end -= kThreads) {
    const int t = end - 1 - thread;  // thread 0 holds the last token
    float v = 0.f;
    if (t >= 0) {
      for (int h = head * group; h < (head + 1) * group; ++h) {
        const int64_t at = (batch * s.heads_q + h) * s.seq_len + chunk.start + t;
        v += a.q_dot ? a.q_dot[at] * inverse : a.eps * a.r[at] * a.delta[at];
      }
      v -= a.k_dot[(batch * s.heads_kv + head) * s.seq_len + chunk.start + t] * inverse;
    }
    scan[thread] = v;
    __syncthreads();
    for (int d = 1; d < kThreads; d *= 2) {
      const float other = thread >= d ? scan[thread - d] : 0.f;
      __syncthreads();
      scan[thread] += other;
      __syncthreads();
    }
    if (t >= 0) *row_pointer<float>(a.d_log_g, batch, chunk.start + t, head) = carry + scan[thread];
    carry += scan[kThreads - 1];
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
