// SPDX-License-Identifier: Apache-2.0
// float16, backward: the largest lengths |.| of rows of a chunk and key head, from which lifts_of (half.cuh)
// gets the powers of two that its weights and their gradients are counted in. With c = scale^p and (19):
//   normalised    max |v_j|, 0,         max (c r_i)^(1/p) |dy_i|, max (c r_i)^(1/p) |delta_i|
//   unnormalised  max |v_j|, max |k_j|, max |q_i|,                max |dy_i|
#include "half.cuh"
#include "kernels/cuda/launch.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kThreads = 256;

// The square of the length of a row; kLanes = head_dim / 8 lanes share it.
template <int kLanes>
__device__ __forceinline__ float square(const Tensor &x, int batch, int head, int64_t token, int lane) {
  const __half *p = row_pointer<__half>(x, batch, head, token) + lane * 8;
  float sum = 0.f;
  if (x.vector) {
    const uint4 v = *reinterpret_cast<const uint4 *>(p);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = unpack2<__half>(w[i]);
      sum += f.x * f.x + f.y * f.y;
    }
  } else {
    for (int i = 0; i < 8; ++i) sum += static_cast<float>(p[i]) * static_cast<float>(p[i]);
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d, kLanes);
  return sum;
}

// A block for each tile and key head; all lanes of a warp take part in every sum.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) limits_kernel(const __grid_constant__ LimitsArgs a) {
  __shared__ float most[4][kThreads / 32];
  wait_for_kernel_before();
  const Shape &p = a.p;
  const Tile tile = p.table.tiles[blockIdx.x / p.heads_kv];
  if (tile.length == 0) return;
  const int head_kv = static_cast<int>(blockIdx.x % p.heads_kv), lane = threadIdx.x % kLanes,
            batch = static_cast<int>(batch_of(p.packed, tile.sequence));
  float x[4] = {0.f, 0.f, 0.f, 0.f};
  const auto raise = [](float &to, float value) { to = fmaxf(to, value); };
#pragma unroll 1
  for (int first = 0; first < tile.length; first += kThreads / kLanes) {
    const int row = min(first + static_cast<int>(threadIdx.x) / kLanes, tile.length - 1);  // the last one again
    const int64_t token = tile.start + row;
    raise(x[0], square<kLanes>(a.v, batch, head_kv, token, lane));
    if (!p.normalize) raise(x[1], square<kLanes>(a.k, batch, head_kv, token, lane));
#pragma unroll 1
    for (int head = head_kv * p.group; head < (head_kv + 1) * p.group; ++head) {
      const float dy = square<kLanes>(a.dy, batch, head, token, lane);
      if (p.normalize) {
        const int64_t at = token_row(p, batch, p.heads_q, head, token);
        const float root = exp2f(log2f(fabsf(p.scale_p * a.r[at])) / static_cast<float>(p.degree));
        raise(x[2], root * sqrtf(dy));
        raise(x[3], root * fabsf(a.delta[at]));
      } else {
        raise(x[2], square<kLanes>(a.q, batch, head, token, lane));
        raise(x[3], dy);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) raise(x[i], __shfl_xor_sync(0xffffffffu, x[i], d));
    if (threadIdx.x % 32 == 0) most[i][threadIdx.x / 32] = x[i];
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  const int i = static_cast<int>(threadIdx.x);
  float value = 0.f;
  for (int w = 0; w < kThreads / 32; ++w) raise(value, most[i][w]);
  if (i < 2 || !p.normalize) value = sqrtf(value);
  // Numbers that are not negative have the order of their bits, so that the largest does not depend on turns.
  atomicMax(a.out + (int64_t(tile.chunk) * p.heads_kv + head_kv) * 4 + i, __float_as_int(value));
}

}  // namespace

cudaError_t limits(const LimitsArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.p.table.num_tiles * a.p.heads_kv;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = a.p.head_dim == 64 ? limits_kernel<8> : limits_kernel<16>;
  return launch_early(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
}

}  // namespace powerattn::cuda::sm90
