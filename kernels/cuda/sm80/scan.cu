// SPDX-License-Identifier: Apache-2.0
// The scan over chunks. Elementwise, so every thread walks its own elements: 8 of a tile row, or one of Z.
#include "args.h"
#include "kernels/cuda/launch.cuh"
#include "units.h"

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

// float16: a bound on the carry, which runs along with it: bound = e^{g_end[n]} bound + bound of local[n].
__device__ __forceinline__ Bounds first_bound(const ScanArgs &a, int64_t pair) {
  Bounds b;
  if (a.peaks != nullptr)
    for (int part = 0; part < kPeaks; ++part) {
      const Bounds p = a.peaks[pair * kPeaks + part];
      b.s = fmaxf(b.s, p.s);
      b.z = fmaxf(b.z, p.z);
    }
  return {1.5f * b.s, 1.5f * b.z};  // tile_scale is sqrt(2) at most
}
__device__ __forceinline__ void advance(Bounds *b, float decay, const Range &r) {
  b->s = b->s * decay + r.bound_s;
  b->z = b->z * decay + r.bound_z;
}

// The largest elements of the initial states, in kPeaks parts.
__global__ void __launch_bounds__(kThreads) peaks_kernel(const __grid_constant__ ScanArgs a, int64_t rows) {
  __shared__ float most_s[kThreads], most_z[kThreads];
  const Shape &s = a.shape;
  const int64_t pair = blockIdx.x / kPeaks;
  const int part = blockIdx.x % kPeaks;
  const int64_t sequence = pair / s.heads_kv, head = pair % s.heads_kv;
  const auto most = [&](const void *state, int64_t stride_n, int64_t stride_h, int64_t count) {
    float x = 0.f;
    if (state == nullptr) return x;
    const float *const p = static_cast<const float *>(state) + sequence * stride_n + head * stride_h;
#pragma unroll 8
    for (int64_t i = part * kThreads + threadIdx.x; i < count; i += kPeaks * kThreads)
      x = fmaxf(x, fabsf(p[i]));
    return x;
  };
  Bounds all;
  all.s = most(a.initial.s, a.initial.s_stride_n, a.initial.s_stride_h, rows * s.head_dim);
  all.z = most(a.initial.z, a.initial.z_stride_n, a.initial.z_stride_h, rows);
  most_s[threadIdx.x] = all.s;
  most_z[threadIdx.x] = all.z;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    all.s = fmaxf(all.s, most_s[i]);
    all.z = fmaxf(all.z, most_z[i]);
  }
  a.peaks[blockIdx.x] = all;
}

// prefix[n] = carry; carry = e^{g_end[n]} carry + local[n], n ascending (reverse: descending).
template <typename T>
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
  using B = Pair<T>;
  const auto packed = [&](float f) {
    return make_uint4(B::pack(f * carry[0], f * carry[1]), B::pack(f * carry[2], f * carry[3]),
                      B::pack(f * carry[4], f * carry[5]), B::pack(f * carry[6], f * carry[7]));
  };
  const int64_t first_slot = static_cast<int64_t>(seq.first_chunk) * s.heads_kv + head;
  Bounds bound;
  if constexpr (kCounted<T>) bound = first_bound(a, pair);
  const auto inverse_unit = [&](int n) {  // of the prefix of chunk n, which the first thread writes down
    if constexpr (!kCounted<T>) return 1.f;
    const Units u = units_of(bound.s, bound.z);
    if (v == 0) a.units[first_slot + static_cast<int64_t>(n) * s.heads_kv] = u;
    return inverse_power(u.s);
  };
  const int inner = seq.chunks - (a.end_local != nullptr && seq.chunks > 0);  // sums that stand in `tiles`
  for (int n0 = 0; n0 < inner; n0 += kAhead) {
    uint4 in[kAhead];
    float f[kAhead];
    [[maybe_unused]] Range range[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < inner) {
        in[q] = local[n * stride];
        f[q] = decay(g, seq, s.table.chunk, n);
        if constexpr (kCounted<T>) range[q] = a.ranges[first_slot + static_cast<int64_t>(n) * s.heads_kv];
      }
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < inner) {
        local[n * stride] = packed(inverse_unit(n));
        float unit = 1.f;  // of the local sum
        if constexpr (kCounted<T>) {
          unit = unit_of(range[q].bound_s);
          advance(&bound, f[q], range[q]);
        }
        const uint32_t w[4] = {in[q].x, in[q].y, in[q].z, in[q].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          carry[2 * e] = carry[2 * e] * f[q] + unit * B::lo(w[e]);
          carry[2 * e + 1] = carry[2 * e + 1] * f[q] + unit * B::hi(w[e]);
        }
      }
    }
  }
  if (inner < seq.chunks) {
    const int n = a.reverse ? 0 : seq.chunks - 1;
    const float f = decay(g, seq, s.table.chunk, n);
    local[n * stride] = packed(inverse_unit(n));
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

// The same for Z = sum w k k^T, [d][d] float; out: high and low parts, Z = high + low to 2^-17 (float16:
// 2^-22).
template <typename T>
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
  T *const out = static_cast<T *>(a.z_tiles) + 2 * first;
  const int64_t first_slot = static_cast<int64_t>(seq.first_chunk) * s.heads_kv + head;
  Bounds bound;
  if constexpr (kCounted<T>) bound = first_bound(a, pair);
  const int64_t high = (i / kTileRows) * kTileRows * d + tile_element(d, i % kTileRows, j);
  const int64_t low = ((i + d) / kTileRows) * kTileRows * d + tile_element(d, (i + d) % kTileRows, j);
  const float *const g = gates_of(a, seq, sequence, head);
  for (int n0 = 0; n0 < seq.chunks; n0 += kAhead) {
    float in[kAhead], f[kAhead];
    [[maybe_unused]] Range range[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < seq.chunks) {
        in[q] = local[n * stride];
        f[q] = decay(g, seq, s.table.chunk, n);
        if constexpr (kCounted<T>) range[q] = a.ranges[first_slot + static_cast<int64_t>(n) * s.heads_kv];
      }
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? seq.chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < seq.chunks) {
        float counted = carry;
        if constexpr (kCounted<T>) {
          counted *= inverse_power(unit_of(bound.z));
          advance(&bound, f[q], range[q]);
        }
        const T top = Pair<T>::from_float(counted);
        out[2 * n * stride + high] = top;
        out[2 * n * stride + low] = Pair<T>::from_float(counted - Pair<T>::to_float(top));
        carry = carry * f[q] + in[q];
      }
    }
  }
  if (a.final.z && i <= j)
    static_cast<float *>(a.final.z)[sequence * a.final.z_stride_n + head * a.final.z_stride_h + canonical] =
        carry * (i == j ? 1.f : 1.41421356237309505f);
}

template <typename T>
cudaError_t scan_type(const ScanArgs &a, int64_t pairs, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int d = s.head_dim;
  const int vectors = s.degree == 1 ? d * d / 8 : tile_rows(2, d) * d / 8;
  const int blocks = (vectors + kThreads - 1) / kThreads, z_blocks = (d * d + kThreads - 1) / kThreads;
  launch_kernel(tiles_kernel<T>, static_cast<unsigned>(pairs * blocks), kThreads, 0, stream, a, vectors,
                blocks);
  if (a.z_local != nullptr)
    launch_kernel(z_kernel<T>, static_cast<unsigned>(pairs * z_blocks), kThreads, 0, stream, a, z_blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t scan(const ScanArgs &args, cudaStream_t stream) {
  ScanArgs a = args;
  const Shape &s = a.shape;
  const int64_t pairs = s.table.num_sequences * s.heads_kv;
  if (pairs == 0) return cudaSuccess;
  if (s.dtype != Dtype::kFloat16) return scan_type<__nv_bfloat16>(a, pairs, stream);
  if (a.initial.s == nullptr && a.initial.z == nullptr) {
    a.peaks = nullptr;
  } else {
    const int64_t rows = s.degree == 1 ? s.head_dim : s.head_dim * (s.head_dim + 1) / 2;
    launch_kernel(peaks_kernel, static_cast<unsigned>(pairs * kPeaks), kThreads, 0, stream, a, rows);
  }
  return scan_type<__half>(a, pairs, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
