// SPDX-License-Identifier: Apache-2.0
// The gates of a chunk's keys.
#include "kernels/cuda/launch.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {
namespace {

// weight_t = exp(G_end - G_t): one block per (chunk, head).
__global__ void __launch_bounds__(256) key_weights_kernel(const __grid_constant__ GateArgs a) {
  const int64_t slot = blockIdx.x;
  const Chunk c = a.p.table.chunks[slot / a.p.heads_kv];
  if (c.length == 0) return;
  const int head = static_cast<int>(slot % a.p.heads_kv);
  const int64_t row =
      token_row(a.p, static_cast<int>(batch_of(a.p.packed, c.sequence)), a.p.heads_kv, head, c.start);
  const double end = a.gate[row + c.length - 1];
  for (int t = threadIdx.x; t < c.length; t += 256)
    a.weight[row + t] = exp2f(static_cast<float>(end - a.gate[row + t]) * kLog2e);
}

}  // namespace

cudaError_t key_weights(const GateArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.p.table.num_chunks * a.p.heads_kv;
  if (blocks) launch_kernel(key_weights_kernel, static_cast<unsigned>(blocks), 256, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace powerattn::cuda::sm90
