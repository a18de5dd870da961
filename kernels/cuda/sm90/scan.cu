// SPDX-License-Identifier: Apache-2.0
// The gates of a chunk's keys, and the scan over chunks: slot n holds the sum of chunk n and becomes the carry
// before it (reverse: after it), in place, fp32 carry:
//   out_n = carry;   carry = exp(g_n) carry + local_n
#include "kernels/cuda/launch.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kAhead =
    8;  // chunks whose loads are in flight: 16 bytes x 8 per thread fill the memory's latency

// weight_t = exp(G_end - G_t), decay = exp(G_end): one block per (chunk, head).
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
  if (threadIdx.x == 0) a.decay[slot] = exp2f(static_cast<float>(end) * kLog2e);
}

__device__ __forceinline__ int64_t slot_of(const ScanArgs &a, const Sequence &s, int i, int head) {
  return int64_t(s.first_chunk + (a.reverse ? s.chunks - 1 - i : i)) * a.p.heads_kv + head;
}

// One thread owns eight neighbouring elements of a state over all chunks of its sequence.
template <typename T>
__global__ void __launch_bounds__(128) scan_state_kernel(const __grid_constant__ ScanArgs a, int64_t packs) {
  const int64_t pack = blockIdx.x * int64_t(128) + threadIdx.x;
  if (pack >= packs) return;
  const int head = blockIdx.y % a.p.heads_kv;
  const int64_t m = blockIdx.y / a.p.heads_kv + int64_t(blockIdx.z) * (gridDim.y / a.p.heads_kv);
  if (m >= a.p.table.num_sequences) return;
  const Sequence s = a.p.table.sequences[m];
  float carry[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
    carry[j] = a.first_state ? a.first_state[((m * a.p.heads_kv + head) * packs + pack) * 8 + j] : 0.f;
  uint4 *base = static_cast<uint4 *>(a.state) + pack;
  for (int i = 0; i < s.chunks; i += kAhead) {
    uint4 x[kAhead];
    float g[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k < s.chunks) {
        const int64_t slot = slot_of(a, s, i + k, head);
        x[k] = __ldcs(base + slot * packs);
        g[k] = a.decay ? a.decay[slot] : 1.f;
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k < s.chunks) {
        base[slot_of(a, s, i + k, head) * packs] =
            make_uint4(pack2<T>(carry[0], carry[1]), pack2<T>(carry[2], carry[3]), pack2<T>(carry[4], carry[5]),
                       pack2<T>(carry[6], carry[7]));
        const uint32_t w[4] = {x[k].x, x[k].y, x[k].z, x[k].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = unpack2<T>(w[j]);
          carry[2 * j] = g[k] * carry[2 * j] + v.x;
          carry[2 * j + 1] = g[k] * carry[2 * j + 1] + v.y;
        }
      }
    }
  }
  if (a.last_state) {
#pragma unroll
    for (int j = 0; j < 8; ++j) a.last_state[((m * a.p.heads_kv + head) * packs + pack) * 8 + j] = carry[j];
  }
}

// The same for Z [d, d] in fp32; the carry goes out as two tiles that sum to it, high and low part.
template <typename T>
__global__ void __launch_bounds__(128) scan_norm_kernel(const __grid_constant__ ScanArgs a) {
  const int d = a.p.head_dim, packs = d * d / 4;
  const int pack = blockIdx.x * 128 + threadIdx.x;
  const int head = blockIdx.y % a.p.heads_kv;
  const int64_t m = blockIdx.y / a.p.heads_kv + int64_t(blockIdx.z) * (gridDim.y / a.p.heads_kv);
  if (m >= a.p.table.num_sequences) return;
  const Sequence s = a.p.table.sequences[m];
  const int row = pack * 4 / d, col = pack * 4 % d;
  // Tiles of 64 rows; wider than 64 columns: halves of 64 one after the other.
  const int64_t at = int64_t(row / 64) * 64 * d * 2 + (col / 64) * 8192 +
                     swizzle<64>(64, row % 64, col % 64 / 8) + col % 8 * 2;
  float4 carry = a.first_norm
                     ? reinterpret_cast<const float4 *>(a.first_norm)[(m * a.p.heads_kv + head) * packs + pack]
                     : make_float4(0.f, 0.f, 0.f, 0.f);
  for (int i = 0; i < s.chunks; i += kAhead) {
    float4 x[kAhead];
    float g[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k < s.chunks) {
        const int64_t slot = slot_of(a, s, i + k, head);
        x[k] = reinterpret_cast<const float4 *>(a.norm)[slot * packs + pack];
        g[k] = a.decay ? a.decay[slot] : 1.f;
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k < s.chunks) {
        char *out = static_cast<char *>(a.norm_tiles) + slot_of(a, s, i + k, head) * (int64_t(packs) * 16) + at;
        const uint32_t h0 = pack2<T>(carry.x, carry.y), h1 = pack2<T>(carry.z, carry.w);
        const float2 f0 = unpack2<T>(h0), f1 = unpack2<T>(h1);
        *reinterpret_cast<uint2 *>(out) = make_uint2(h0, h1);
        *reinterpret_cast<uint2 *>(out + d * d * 2) =
            make_uint2(pack2<T>(carry.x - f0.x, carry.y - f0.y), pack2<T>(carry.z - f1.x, carry.w - f1.y));
        carry.x = g[k] * carry.x + x[k].x;
        carry.y = g[k] * carry.y + x[k].y;
        carry.z = g[k] * carry.z + x[k].z;
        carry.w = g[k] * carry.w + x[k].w;
      }
    }
  }
  if (a.last_norm) reinterpret_cast<float4 *>(a.last_norm)[(m * a.p.heads_kv + head) * packs + pack] = carry;
}

}  // namespace

cudaError_t key_weights(const GateArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.p.table.num_chunks * a.p.heads_kv;
  if (blocks) launch_kernel(key_weights_kernel, static_cast<unsigned>(blocks), 256, 0, stream, a);
  return cudaGetLastError();
}

cudaError_t scan(const ScanArgs &a, cudaStream_t stream) {
  const int64_t heads = a.p.heads_kv, rows = a.p.table.num_sequences * heads;
  if (rows == 0) return cudaSuccess;
  const int64_t slab = 65535 / heads * heads;  // grid y limit, whole sequences
  const unsigned y = static_cast<unsigned>(rows < slab ? rows : slab),
                 z = static_cast<unsigned>((rows + slab - 1) / slab);
  const int64_t packs = state_bytes(a.p.head_dim, a.p.degree) / 16;
  launch_kernel(scan_state_kernel<__nv_bfloat16>, dim3(static_cast<unsigned>((packs + 127) / 128), y, z), 128,
                0, stream, a, packs);
  if (a.norm)
    launch_kernel(scan_norm_kernel<__nv_bfloat16>,
                  dim3(static_cast<unsigned>(a.p.head_dim * a.p.head_dim / 4 / 128), y, z), 128, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace powerattn::cuda::sm90
