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

template <typename T, int D, bool kExact>
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
  // From the chunk's end to its start (reverse: the other way), which is where the walk that follows begins: it
  // finds the last rows of this one in the cache.
  const Walk walk(chunk, !a.reverse, a.reverse ? group : 1);
  const int head_x = a.reverse ? head_kv * group : head_kv;
  const T *const x = row_pointer<T>(a.x, batch, chunk.start, head_x);
  const T *const u = row_pointer<T>(a.u, batch, chunk.start, head_x);
  const float *const log_g =
      shape.log_g.data != nullptr ? row_pointer<float>(shape.log_g, batch, chunk.start, head_kv) : nullptr;
  const bool weighted = log_g != nullptr || a.scale != 1.f;

  Step next;  // to be copied
  int stage = 0;
  const auto fetch = [&] {
    if (next.block < walk.blocks) {
      const int token = walk.token(next.block), valid = min(kBlock, walk.length - token);
      const uint32_t dst = base + stage * 2 * F::kTileBytes;
      load_rows<kBlock, D, F::kThreads>(dst, x + next.part * a.x.stride_h + token * a.x.stride_t, a.x.stride_t,
                                        valid, thread);
      load_rows<kBlock, D, F::kThreads>(dst + F::kTileBytes,
                                        u + next.part * a.u.stride_h + token * a.u.stride_t, a.u.stride_t,
                                        valid, thread);
      next = walk.after(next);
      stage = stage + 1 == F::kStages ? 0 : stage + 1;
    }
    copy_commit();
  };
  fetch();
  fetch();
  float2 ahead = make_float2(0.f, 0.f);
  float seen = 0.f;  // warp 0: the log gates between this block and the place of the sum
  if (warp == 0) {
    const int64_t stride = shape.log_g.stride_t;
    seen = put_gates(&gates[0], load_gates(log_g, stride, walk.token(0), walk.length, lane), a.reverse, 1.f,
                     a.scale, lane);
    if (log_g == nullptr) put_gates(&gates[1], ahead, a.reverse, 1.f, a.scale, lane);
    if (walk.blocks > 1) ahead = load_gates(log_g, stride, walk.token(1), walk.length, lane);
  }

  float sum[D / 8][4] = {}, z[4] = {};
  int read = 0;  // stage
#pragma unroll 1
  for (Step s; s.block < walk.blocks; s = walk.after(s)) {
    copy_wait<1>();
    __syncthreads();
    fetch();
    const Gates &now = gates[s.block & 1];
    if (s.part == 0 && warp == 0 && log_g != nullptr && s.block + 1 < walk.blocks) {
      seen += put_gates(&gates[(s.block + 1) & 1], ahead, a.reverse, 1.f, a.scale * expf(seen), lane);
      if (s.block + 2 < walk.blocks)
        ahead = load_gates(log_g, shape.log_g.stride_t, walk.token(s.block + 2), walk.length, lane);
    }
    const uint32_t src = base + read * 2 * F::kTileBytes;
    read = read + 1 == F::kStages ? 0 : read + 1;
    const SharedTile<D> xs{src, kBlock}, us{src + F::kTileBytes, kBlock};
    add_block<T, D, kExact ? 3 : 2, true>(sum, z, xs, us, now.weight, weighted, warp, lane);
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
  if (log_g != nullptr && thread == 0) a.decay[slot] = expf(seen);
}

template <typename T, int D>
cudaError_t launch_update(const UpdateArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.shape.table.num_chunks * a.shape.heads_kv;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(a.exact ? update_kernel<T, D, true> : update_kernel<T, D, false>,
                       static_cast<unsigned>(blocks), UpdateForm<D>::kThreads, UpdateForm<D>::kShared, stream,
                       a);
}

}  // namespace powerattn::cuda::linear
