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

// This lane's part of y . dy of a row.
template <typename T>
struct RowPart {
  uint4 y, dy;
  __device__ __forceinline__ float dot() const {
    const uint32_t us[4] = {y.x, y.y, y.z, y.w}, vs[4] = {dy.x, dy.y, dy.z, dy.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = unpack2<T>(us[i]), g = unpack2<T>(vs[i]);
      sum += f.x * g.x + f.y * g.y;
    }
    return sum;
  }
};

// The rows of one tile and head. kLanes = head_dim / 8 lanes share a row, 16 bytes of y and dy each; a lane
// asks for kTogether of its rows at a time.
template <typename T, int kLanes>
__device__ __forceinline__ void tile_rows(const RowsArgs &a, const Tile &tile, int head) {
  constexpr int kStep = kThreads / kLanes, kTogether = 4;
  const Shape &p = a.p;
  const int lane = threadIdx.x % kLanes;
  const int batch = static_cast<int>(batch_of(p.packed, tile.sequence));
  for (int base = 0; base < tile.length; base += kTogether * kStep) {
    const int first = base + static_cast<int>(threadIdx.x) / kLanes;
    float delta[kTogether], norm[kTogether];
    if (a.row_norm.data) {
      RowPart<T> part[kTogether];
      const bool vector = a.y.vector && a.dy.vector;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int row = first + i * kStep;
        part[i] = {};
        norm[i] = delta[i] = 0.f;
        if (row >= tile.length) continue;
        const T *y = row_pointer<T>(a.y, batch, head, tile.start + row) + lane * 8;
        const T *dy = row_pointer<T>(a.dy, batch, head, tile.start + row) + lane * 8;
        norm[i] = *row_pointer<float>(a.row_norm, batch, head, tile.start + row);
        if (vector) {
          part[i] = {*reinterpret_cast<const uint4 *>(y), *reinterpret_cast<const uint4 *>(dy)};
        } else {
          for (int n = 0; n < 8; ++n) delta[i] += static_cast<float>(y[n]) * static_cast<float>(dy[n]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (vector) delta[i] = part[i].dot();
#pragma unroll
        for (int d = kLanes / 2; d > 0; d /= 2) delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], d, kLanes);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = first + i * kStep;
      if (lane != 0 || row >= tile.length) continue;
      const int64_t token = tile.start + row, at = token_row(p, batch, p.heads_q, head, token);
      float r = 1.f;
      if (a.row_norm.data != nullptr) r = norm[i] != 0.f ? 1.f / norm[i] : 0.f;
      const float d = a.row_norm.data == nullptr ? 0.f : delta[i];
      if (a.r) a.r[at] = r;
      if (a.delta) a.delta[at] = d;
      if (a.weight) {
        const double g = a.gate ? a.gate[token_row(p, batch, p.heads_kv, head / p.group, token)] : 0.0;
        const float w = p.scale_p * r * exp2f(static_cast<float>(g) * kLog2e);
        a.weight[at] = w;
        if (a.norm_weight) a.norm_weight[at] = -d * w;
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
  int32_t *zeros[3];
  int64_t zero_count[3];
  uint32_t row_blocks, gate_blocks;
};
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const __grid_constant__ RowsArgs a, const __grid_constant__ BeginWork w) {
  wait_for_kernel_before();
  let_kernel_after_begin();
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
  for (int i = 0; i < 3; ++i) {
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
  for (int i = 0; i < 3; ++i) {
    w.zeros[i] = static_cast<int32_t *>(a.zeros[i]);
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
