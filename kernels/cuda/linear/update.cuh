// SPDX-License-Identifier: Apache-2.0
// Sums of one chunk: a walk that gives no output. One block per chunk and kv head; three stages of 64 tokens.
#pragma once

#include "block.cuh"
#include "kernels/cuda/launch.cuh"

namespace powerattn::cuda::linear {

template <int D>
struct UpdateForm : Form<D> {
  static constexpr int kStages = 3;
  // Stages of x and u | gates of two blocks       d = 64: 50 KB, d = 128: 98 KB
  static constexpr int kGates = kStages * 2 * Form<D>::kTileBytes;
  static constexpr int kShared = kGates + 2 * sizeof(Gates);
};

// Blocks per multiprocessor, by registers.
template <int D, bool kExact>
constexpr int update_blocks() {
  if (D == 128) return 1;
  return kExact ? 3 : 4;
}

template <int D, bool kExact>
__global__ void __launch_bounds__(UpdateForm<D>::kThreads, update_blocks<D, kExact>())
    update_kernel(const __grid_constant__ UpdateArgs a) {
  using F = UpdateForm<D>;
  unsigned char *shared = dynamic_shared<unsigned char>();
  const uint32_t base = shared_address(shared);
  Gates *const gates = reinterpret_cast<Gates *>(shared + F::kGates);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, quad = lane & 3;

  const Shape &shape = a.shape;
  const int64_t slot = blockIdx.x;
  const Chunk chunk = chunk_at(shape, slot / shape.heads_kv);
  const int head_kv = static_cast<int>(slot % shape.heads_kv);
  if (chunk.length == 0) return;
  const int64_t batch = batch_of(shape.packed, chunk.sequence);
  const int group = shape.heads_q / shape.heads_kv;
  // The sum is at the chunk's end, so it grows from its start; reverse the other way round.
  const Walk walk(chunk, a.reverse, group);
  const int total = walk.blocks * walk.parts;
  const int head_x = a.reverse ? head_kv * group : head_kv;
  const T *const x = row_pointer<T>(a.x, batch, chunk.start, head_x);
  const T *const u = row_pointer<T>(a.u, batch, chunk.start, head_x);
  const float *const log_g =
      shape.log_g.data != nullptr ? row_pointer<float>(shape.log_g, batch, chunk.start, head_kv) : nullptr;
  const bool weighted = log_g != nullptr || a.scale != 1.f;

  const auto fetch = [&](int n) {
    if (n < total) {
      const Step s = walk.at(n);
      const uint32_t dst = base + n % F::kStages * 2 * F::kTileBytes;
      load_rows<kBlock, D, F::kThreads>(dst, x + s.part * a.x.stride_h + s.token * a.x.stride_t, a.x.stride_t,
                                        s.valid, thread);
      load_rows<kBlock, D, F::kThreads>(dst + F::kTileBytes, u + s.part * a.u.stride_h + s.token * a.u.stride_t,
                                        a.u.stride_t, s.valid, thread);
    }
    copy_commit();
  };
  fetch(0);
  fetch(1);
  float2 ahead = make_float2(0.f, 0.f);
  if (warp == 0) {
    const int64_t stride = shape.log_g.stride_t;
    put_gates(&gates[0], load_gates(log_g, stride, walk.token(0), walk.length, lane), a.reverse, 1.f, a.scale,
              lane);
    if (walk.blocks > 1) ahead = load_gates(log_g, stride, walk.token(1), walk.length, lane);
  }

  float sum[D / 8][4] = {}, z[4] = {};
  float log_decay = 0.f;
#pragma unroll 1
  for (int n = 0; n < total; ++n) {
    const Step s = walk.at(n);
    copy_wait<1>();
    __syncthreads();
    fetch(n + 2);
    const Gates &now = gates[s.block & 1];
    if (s.part == 0) {
      if (warp == 0 && s.block + 1 < walk.blocks) {
        put_gates(&gates[(s.block + 1) & 1], ahead, a.reverse, 1.f, a.scale, lane);
        if (s.block + 2 < walk.blocks)
          ahead = load_gates(log_g, shape.log_g.stride_t, walk.token(s.block + 2), walk.length, lane);
      }
      if (log_g != nullptr) {
        const float decay = now.decay;
        log_decay += now.end;
#pragma unroll
        for (int c = 0; c < D / 8; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[c][e] *= decay;
        z[0] *= decay, z[2] *= decay;
      }
    }
    const uint32_t src = base + n % F::kStages * 2 * F::kTileBytes;
    const SharedTile<D> xs{src, kBlock}, us{src + F::kTileBytes, kBlock};
    add_block<D, kExact ? 3 : 2, true>(sum, z, xs, us, now.weight, weighted, warp, lane);
  }

  float *const local = a.local + slot * D * D;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + 8 * h + lane / 4;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
      *reinterpret_cast<float2 *>(local + row * D + 8 * c + 2 * quad) =
          make_float2(sum[c][2 * h], sum[c][2 * h + 1]);
    if (a.z_local != nullptr && quad == 0) a.z_local[slot * D + row] = z[2 * h];
  }
  if (log_g != nullptr && thread == 0) a.decay[slot] = expf(log_decay);
}

template <int D>
cudaError_t launch_update(const UpdateArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.shape.table.num_chunks * a.shape.heads_kv;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(a.exact ? update_kernel<D, true> : update_kernel<D, false>,
                       static_cast<unsigned>(blocks), UpdateForm<D>::kThreads, UpdateForm<D>::kShared, stream,
                       a);
}

}  // namespace powerattn::cuda::linear
