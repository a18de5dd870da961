// SPDX-License-Identifier: Apache-2.0
// dq = p * (the sum that the joint kernel left), and q . dq. The sums lie as that kernel's registers held them:
// 64 rows x 64 columns are [warp][i][lane][4 accumulators 4 i ..], of rows 16 warp + lane / 4 (+ 8) and columns
// 8 i + 2 (lane % 4) (+ 1); the halves of 128 columns follow one another.
#include "half.cuh"
#include "output.cuh"

namespace powerattn::cuda::sm90 {
namespace {

template <typename T, int kDim>
__global__ void __launch_bounds__(128) joint_queries_kernel(const __grid_constant__ JointQueriesArgs a) {
  wait_for_kernel_before();
  const Shape &p = a.p;
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.heads_q)), lane = threadIdx.x % 32,
            warp = threadIdx.x / 32;
  const int64_t part = blockIdx.x / static_cast<unsigned>(p.heads_q);  // 64 rows of a tile of 256
  const Tile tile = p.table.tiles[part / 4];
  const int row = static_cast<int>(part % 4) * 64 + warp * 16;
  if (row >= tile.length) return;
  const int batch = static_cast<int>(batch_of(p.packed, tile.sequence));
  const float4 *from = reinterpret_cast<const float4 *>(
                           a.sums + ((part / 2 * p.heads_q + head) * kJointRows + part % 2 * 64) * kDim) +
                       warp * 256 + lane;
  float factor = static_cast<float>(p.degree);
  if constexpr (kCounted<T>)
    factor /= lifts_of<T>(p, a.limits, int64_t(tile.chunk) * p.heads_kv + head / p.group).gradient();
  const int64_t token = tile.start + row;
  const T *const q = row_pointer<T>(a.q, batch, head, token);
  T *const to = const_cast<T *>(row_pointer<T>(a.dq, batch, head, token));
  float dot[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < kDim / 64; ++half, from += 1024) {
    float dq[32];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 v = __ldcs(from + i * 32);
      dq[4 * i] = v.x, dq[4 * i + 1] = v.y, dq[4 * i + 2] = v.z, dq[4 * i + 3] = v.w;
    }
    if (a.dot) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row + lane / 4 + 8 * h >= tile.length) continue;
        const T *x = q + (lane / 4 + 8 * h) * a.q.stride_t + half * 64 + (lane & 3) * 2;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          dot[h] += dq[4 * i + 2 * h] * static_cast<float>(x[8 * i]) +
                    dq[4 * i + 2 * h + 1] * static_cast<float>(x[8 * i + 1]);
      }
    }
    store_rows<T, true>(dq, factor, factor, shared_address(dynamic_shared<unsigned char>()) + warp * 2048, a.dq,
                        to + (a.dq.floats ? 128 : 64) * half, tile.length - row, lane);
  }
  if (a.dot == nullptr) return;
  float *const sums = a.dot + token_row(p, batch, p.heads_q, head, token) + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = factor * quad_sum(dot[h]);
    if ((lane & 3) == 0 && row + lane / 4 + 8 * h < tile.length) sums[8 * h] = sum;
  }
}

}  // namespace

cudaError_t joint_queries(const JointQueriesArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.p.table.num_tiles * 4 * a.p.heads_q;
  if (blocks == 0) return cudaSuccess;
  const auto kernel =
      a.p.half ? (a.p.head_dim == 128 ? joint_queries_kernel<__half, 128> : joint_queries_kernel<__half, 64>)
      : a.p.head_dim == 128 ? joint_queries_kernel<__nv_bfloat16, 128>
                            : joint_queries_kernel<__nv_bfloat16, 64>;
  return launch_early(kernel, static_cast<unsigned>(blocks), 128, 4 * 2048, stream, a);
}

}  // namespace powerattn::cuda::sm90
