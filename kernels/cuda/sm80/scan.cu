// SPDX-License-Identifier: Apache-2.0
// The scan over chunks. Elementwise, so every thread walks its own elements: 8 of a tile row, or one of Z.
#include "args.h"
#include "kernels/cuda/launch.cuh"
#include "mma.h"

namespace powerattn {
namespace cuda {
namespace sm80 {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 4;  // loads in flight per thread; the carry depends on none of them

__device__ __forceinline__ const float *gates_of(const ScanArgs &a, const Sequence &seq, int sequence,
                                                 int head) {
  if (!a.g) return nullptr;
  const int64_t batch = a.shape.packed ? 0 : sequence;
  return a.g + (batch * a.shape.heads_kv + head) * a.shape.seq_len + seq.start;
}

// e^{g_end} of chunk n of a sequence.
__device__ __forceinline__ float decay(const float *g, const Sequence &seq, int64_t chunk, int n) {
  if (!g) return 1.f;
  const int64_t end = min((n + 1) * chunk, seq.length);
  return __expf(g[end - 1]);
}

// prefix[n] = carry; carry = e^{g_end[n]} carry + local[n], n ascending (reverse: descending).
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(const __grid_constant__ ScanArgs a, int vectors, int blocks) {
  const Shape &s = a.shape;
  const int64_t pair = blockIdx.x / blocks;
  const int v = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (v >= vectors) return;
  const int sequence = static_cast<int>(pair / s.heads_kv), head = static_cast<int>(pair % s.heads_kv);
  const Sequence seq = s.table.sequences[sequence];
  const int d = s.head_dim, pieces = d / 8;

  // Which row and columns the 16 bytes at v hold.
  const int tile = v / (kTileRows * pieces), at = v % (kTileRows * pieces);
  int row, piece;
  if (d == 32) {
    row = at / 4;
    piece = (at & 3) ^ ((row >> 1) & 3);
  } else {
    row = (at / 8) % kTileRows;
    piece = at / (8 * kTileRows) * 8 + ((at & 7) ^ (row & 7));
  }
  int i, j;
  int64_t canonical;
  float in_scale = 1.f, out_scale = 1.f;
  if (s.degree == 1) {
    i = j = tile * kTileRows + row;
    canonical = i;
  } else {
    int ib, jb;
    tile_pair(d / 8, tile, &ib, &jb);
    i = 8 * ib + row / 8;
    j = 8 * jb + row % 8;
    canonical = canonical_row(d, min(i, j), max(i, j));
    in_scale = tile_scale(ib == jb, i == j);
    out_scale = tile_unscale(ib == jb, i == j);
  }

  float carry[8] = {};
  if (a.initial.s) {
    const float *p = static_cast<const float *>(a.initial.s) + sequence * a.initial.s_stride_n +
                     head * a.initial.s_stride_h + canonical * d + piece * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) carry[e] = in_scale * p[e];
  }
  const int64_t slot_vectors = static_cast<int64_t>(tile_count(s.degree, d)) * kTileRows * pieces;
  uint4 *const local = static_cast<uint4 *>(a.tiles) +
                       (static_cast<int64_t>(seq.first_chunk) * s.heads_kv + head) * slot_vectors + v;
  const int64_t stride = s.heads_kv * slot_vectors;
  const float *const g = gates_of(a, seq, sequence, head);
  using B = Pair<__nv_bfloat16>;
  const auto packed = [&] {
    return make_uint4(B::pack(carry[0], carry[1]), B::pack(carry[2], carry[3]), B::pack(carry[4], carry[5]),
                      B::pack(carry[6], carry[7]));
  };
  const int inner = seq.chunks - (a.end_local != nullptr && seq.chunks > 0);  // sums that stand in `tiles`
  for (int n0 = 0; n0 < inner; n0 += kAhead) {
    uint4 in[kAhead];
    float f[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < inner) {
        in[q] = local[n * stride];
        f[q] = decay(g, seq, s.table.chunk, n);
      }
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < inner) {
        local[n * stride] = packed();
        const uint32_t w[4] = {in[q].x, in[q].y, in[q].z, in[q].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          carry[2 * e] = carry[2 * e] * f[q] + B::lo(w[e]);
          carry[2 * e + 1] = carry[2 * e + 1] * f[q] + B::hi(w[e]);
        }
      }
    }
  }
  if (inner < seq.chunks) {
    const int n = a.reverse ? 0 : seq.chunks - 1;
    const float f = decay(g, seq, s.table.chunk, n);
    local[n * stride] = packed();
    const float *const end =
        a.end_local + (pair * tile_rows(s.degree, d) + tile * kTileRows + row) * d + piece * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) carry[e] = carry[e] * f + end[e];
  }
  if (a.final.s && i <= j) {
    float *p = static_cast<float *>(a.final.s) + sequence * a.final.s_stride_n + head * a.final.s_stride_h +
               canonical * d + piece * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) p[e] = out_scale * carry[e];
  }
}

// The same for Z = sum w k k^T, [d][d] float; out: high and low bfloat16 parts, Z = high + low to 2^-17.
__global__ void __launch_bounds__(kThreads) z_kernel(const __grid_constant__ ScanArgs a, int blocks) {
  const Shape &s = a.shape;
  const int64_t pair = blockIdx.x / blocks;
  const int d = s.head_dim, v = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (v >= d * d) return;
  const int i = v / d, j = v % d;
  const int sequence = static_cast<int>(pair / s.heads_kv), head = static_cast<int>(pair % s.heads_kv);
  const Sequence seq = s.table.sequences[sequence];
  const int64_t canonical = canonical_row(d, min(i, j), max(i, j));
  float carry = 0.f;
  if (a.initial.z)
    carry = static_cast<const float *>(
                a.initial.z)[sequence * a.initial.z_stride_n + head * a.initial.z_stride_h + canonical] *
            (i == j ? 1.f : 0.70710678118654752f);
  const int64_t stride = static_cast<int64_t>(s.heads_kv) * d * d;
  const int64_t first = (static_cast<int64_t>(seq.first_chunk) * s.heads_kv + head) * d * d;
  const float *const local = a.z_local + first + v;
  __nv_bfloat16 *const out = static_cast<__nv_bfloat16 *>(a.z_tiles) + 2 * first;
  const int64_t high = (i / kTileRows) * kTileRows * d + tile_element(d, i % kTileRows, j);
  const int64_t low = ((i + d) / kTileRows) * kTileRows * d + tile_element(d, (i + d) % kTileRows, j);
  const float *const g = gates_of(a, seq, sequence, head);
  for (int n0 = 0; n0 < seq.chunks; n0 += kAhead) {
    float in[kAhead], f[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < seq.chunks) {
        in[q] = local[n * stride];
        f[q] = decay(g, seq, s.table.chunk, n);
      }
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < seq.chunks) {
        const __nv_bfloat16 top = __float2bfloat16_rn(carry);
        out[2 * n * stride + high] = top;
        out[2 * n * stride + low] = __float2bfloat16_rn(carry - __bfloat162float(top));
        carry = carry * f[q] + in[q];
      }
    }
  }
  if (a.final.z && i <= j)
    static_cast<float *>(a.final.z)[sequence * a.final.z_stride_n + head * a.final.z_stride_h + canonical] =
        carry * (i == j ? 1.f : 1.41421356237309505f);
}

}  // namespace

cudaError_t scan(const ScanArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t pairs = s.table.num_sequences * s.heads_kv;
  if (pairs == 0) return cudaSuccess;
  const int d = s.head_dim;
  const int vectors = s.degree == 1 ? d * d / 8 : tile_rows(2, d) * d / 8;
  const int blocks = (vectors + kThreads - 1) / kThreads, z_blocks = (d * d + kThreads - 1) / kThreads;
  launch_kernel(tiles_kernel, static_cast<unsigned>(pairs * blocks), kThreads, 0, stream, a, vectors, blocks);
  if (a.z_local != nullptr)
    launch_kernel(z_kernel, static_cast<unsigned>(pairs * z_blocks), kThreads, 0, stream, a, z_blocks);
  return cudaGetLastError();
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
