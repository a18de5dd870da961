// SPDX-License-Identifier: Apache-2.0
// What the backward needs of every query: delta_i = dy_i . y_i, r_i = 1 / row_norm_i (0 where it is 0), and in
// the chunked form its weights in the sums that become dS and dZ:
//   weight_i = c exp(G_i) r_i,   norm_weight_i = -delta_i weight_i,   c = scale^p
#include "kernels/cuda/launch.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kThreads = 256;

// kLanes = head_dim / 8 lanes share a row, 16 bytes of y and dy each.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ RowsArgs a) {
  const Shape &p = a.p;
  const Tile tile = p.table.tiles[blockIdx.x / p.heads_q];
  const int head = blockIdx.x % p.heads_q, lane = threadIdx.x % kLanes;
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

}  // namespace

cudaError_t rows(const RowsArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.p.table.num_tiles * a.p.heads_q;
  if (blocks == 0) return cudaSuccess;
  if (a.p.head_dim == 64)
    launch_kernel(rows_kernel<__nv_bfloat16, 8>, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
  else
    launch_kernel(rows_kernel<__nv_bfloat16, 16>, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace powerattn::cuda::sm90
