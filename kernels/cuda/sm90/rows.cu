// SPDX-License-Identifier: Apache-2.0
// What the backward needs of every query: delta_i = dy_i . y_i, r_i = 1 / row_norm_i (0 where it is 0), and in
// the chunked form its weights in the sums that become dS and dZ:
//   weight_i = c exp(G_i) r_i,   norm_weight_i = -delta_i weight_i,   c = scale^p
// `begin` makes it together with the tables and gate sums where nothing of these is needed for it.
#include <algorithm>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/launch.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kThreads = 256;

// The rows of one tile and head. kLanes = head_dim / 8 lanes share a row, 16 bytes of y and dy each.
template <typename T, int kLanes>
__device__ __forceinline__ void tile_rows(const RowsArgs &a, const Tile &tile, int head) {
  const Shape &p = a.p;
  const int lane = threadIdx.x % kLanes;
  const int batch = static_cast<int>(batch_of(p.packed, tile.sequence));
  for (int row = threadIdx.x / kLanes; row < tile.length; row += kThreads / kLanes) {
    const int64_t token = tile.start + row, at = token_row(p, batch, p.heads_q, head, token);
    float delta = 0.f, r = 1.f;
    if (a.row_norm.data) {
      const T *y = row_pointer<T>(a.y, batch, head, token) + lane * 8;
      const T *dy = row_pointer<T>(a.dy, batch, head, token) + lane * 8;
      if (a.y.vector && a.dy.vector) {
        const uint4 u = *reinterpret_cast<const uint4 *>(y), v = *reinterpret_cast<const uint4 *>(dy);
        const uint32_t us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 f = unpack2<T>(us[i]), g = unpack2<T>(vs[i]);
          delta += f.x * g.x + f.y * g.y;
        }
      } else {
        for (int i = 0; i < 8; ++i) delta += static_cast<float>(y[i]) * static_cast<float>(dy[i]);
      }
#pragma unroll
      for (int d = kLanes / 2; d > 0; d /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, d, kLanes);
      const float norm = *row_pointer<float>(a.row_norm, batch, head, token);
      r = norm != 0.f ? 1.f / norm : 0.f;
    }
    if (lane == 0) {
      if (a.r) a.r[at] = r;
      if (a.delta) a.delta[at] = delta;
      if (a.weight) {
        const double g = a.gate ? a.gate[token_row(p, batch, p.heads_kv, head / p.group, token)] : 0.0;
        const float w = p.scale_p * r * exp2f(static_cast<float>(g) * kLog2e);
        a.weight[at] = w;
        if (a.norm_weight) a.norm_weight[at] = -delta * w;
      }
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ RowsArgs a) {
  wait_for_kernel_before();
  tile_rows<T, kLanes>(a, a.p.table.tiles[blockIdx.x / a.p.heads_q],
                       static_cast<int>(blockIdx.x % a.p.heads_q));
}

// Blocks for rows come first, then those for gates, then those for tables and zeros.
struct BeginWork {
  UniformTables tables;
  powerattn_tensor log_g;
  double *gate;
  float *g;
  int32_t *zeros[2];
  int64_t zero_count[2];
  uint32_t row_blocks, gate_blocks;
};
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const __grid_constant__ RowsArgs a, const __grid_constant__ BeginWork w) {
  wait_for_kernel_before();
  uint32_t block = blockIdx.x;
  if (block < w.row_blocks) {
    tile_rows<T, kLanes>(a, uniform_tile(w.tables, block / a.p.heads_q), static_cast<int>(block % a.p.heads_q));
    return;
  }
  block -= w.row_blocks;
  if (block < w.gate_blocks) {
    const int64_t heads = a.p.heads_kv;
    scan_gates<kThreads>(uniform_chunk(w.tables, block / heads), static_cast<const float *>(w.log_g.data),
                         w.log_g, false, block % heads, heads, a.p.tokens, w.g, w.gate);
    return;
  }
  const int64_t id = (block - w.gate_blocks) * int64_t(kThreads) + threadIdx.x;
  fill_uniform_tables(w.tables, id);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (id < w.zero_count[i]) w.zeros[i][id] = 0;
  }
}

}  // namespace

cudaError_t rows(const RowsArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.p.table.num_tiles * a.p.heads_q;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = a.p.half ? (a.p.head_dim == 64 ? rows_kernel<__half, 8> : rows_kernel<__half, 16>)
                      : a.p.head_dim == 64 ? rows_kernel<__nv_bfloat16, 8>
                                           : rows_kernel<__nv_bfloat16, 16>;
  return launch_early(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
}

cudaError_t begin(const BeginArgs &a, cudaStream_t stream) {
  const ChunkTable &table = a.p.table;
  if (table.num_sequences == 0) return cudaSuccess;
  BeginWork w = {};
  w.tables = {const_cast<Sequence *>(table.sequences),
              const_cast<Chunk *>(table.chunks),
              const_cast<Tile *>(table.tiles),
              table.num_sequences,
              a.p.tokens,
              static_cast<int32_t>(table.num_chunks / table.num_sequences),
              table.chunk,
              table.num_chunks > 0 ? table.num_tiles / table.num_chunks : 0,
              table.tile};
  w.log_g = a.log_g;
  w.gate = a.gate;
  w.g = a.g;
  int64_t entries = std::max({table.num_sequences, table.num_chunks, table.num_tiles});
  for (int i = 0; i < 2; ++i) {
    w.zeros[i] = a.zeros[i];
    w.zero_count[i] = a.zero_count[i];
    entries = std::max(entries, a.zero_count[i]);
  }
  if (a.log_g.data != nullptr) w.gate_blocks = static_cast<uint32_t>(table.num_chunks * a.p.heads_kv);
  RowsArgs rows;
  rows.p = a.p;
  if (a.rows != nullptr) {
    rows = *a.rows;
    w.row_blocks = static_cast<uint32_t>(table.num_tiles * a.p.heads_q);
  }
  const int64_t blocks = w.row_blocks + w.gate_blocks + (entries + kThreads - 1) / kThreads;
  const auto kernel = a.p.half ? (a.p.head_dim == 64 ? begin_kernel<__half, 8> : begin_kernel<__half, 16>)
                      : a.p.head_dim == 64 ? begin_kernel<__nv_bfloat16, 8>
                                           : begin_kernel<__nv_bfloat16, 16>;
  return launch_early(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, rows, w);
}

}  // namespace powerattn::cuda::sm90
