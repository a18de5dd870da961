// SPDX-License-Identifier: Apache-2.0
// The gradient of the gates from per-row dot products and the states at chunk ends, one block per chunk and
// head.
#include "block.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"

namespace powerattn::cuda::linear {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Sum over the block, in a fixed order; `scratch` may be used again after the next barrier.
__device__ __forceinline__ float block_sum(float v, float *scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

__global__ void __launch_bounds__(kThreads) gates_kernel(const __grid_constant__ GateArgs a) {
  __shared__ float scratch[kWarps], totals[2][kWarps];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x, chunk_id = slot / s.heads_kv;
  const int head = static_cast<int>(slot % s.heads_kv), thread = threadIdx.x, lane = thread & 31,
            warp = thread >> 5;
  const Chunk chunk = chunk_at(s, chunk_id);
  if (chunk.length == 0) return;
  const int64_t batch = batch_of(s.packed, chunk.sequence);
  const int group = s.heads_q / s.heads_kv, d = s.head_dim, planes = d / 64;

  // <S_C, R_C> + z_C . r_C
  const bool last = chunk.index + 1 == chunk.count;
  float carry = 0.f;
  if (a.state != nullptr && (!last || a.end != nullptr)) {
    const int64_t next = last ? static_cast<int64_t>(chunk.sequence) * s.heads_kv + head : slot + s.heads_kv;
    const float *const before = (last ? a.end : a.state) + next * d * d;
    const float *const after = a.d_state + slot * d * d;
    float sum = 0.f;
    for (int i = thread; i < d * d; i += kThreads) sum += before[i] * after[i];
    if (a.d_z != nullptr && thread < d)
      sum += ((last ? a.z_end : a.z) + next * d)[thread] * a.d_z[slot * d + thread];
    carry = block_sum(sum, scratch);
  }

  // Thread 0 holds the last token: a scan over threads is a sum over later tokens.
  int turn = 0;
  for (int end = chunk.length; end > 0; end -= kThreads, turn ^= 1) {
    const int t = end - 1 - thread;
    float v = 0.f;
    if (t >= 0) {
      for (int m = 0; m < planes; ++m) {
        for (int h = head * group; h < (head + 1) * group; ++h)
          v += a.q_dot[m * a.q_plane + (batch * s.heads_q + h) * s.seq_len + chunk.start + t];
        v -= a.k_dot[m * a.k_plane + (batch * s.heads_kv + head) * s.seq_len + chunk.start + t];
      }
    }
    float sum = warp_scan(v);
    if (lane == 31) totals[turn][warp] = sum;
    __syncthreads();
    sum += carry;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) sum += totals[turn][w];
      carry += totals[turn][w];
    }
    // A sequence's first gate decays its initial state and nothing else.
    if (t == 0 && chunk.index == 0 && !a.first_has_state && fabsf(sum) <= INFINITY) sum = 0.f;
    if (t >= 0) *row_pointer<float>(a.d_log_g, batch, chunk.start + t, head) = sum;
  }
}

}  // namespace

cudaError_t gate_gradient(const GateArgs &a, cudaStream_t stream) {
  const int64_t slots = a.shape.table.num_chunks * a.shape.heads_kv;
  if (slots == 0) return cudaSuccess;
  return launch_kernel(gates_kernel, static_cast<unsigned>(slots), kThreads, 0, stream, a);
}

}  // namespace powerattn::cuda::linear
