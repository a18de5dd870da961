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
constexpr int kStages = 8;  // steps of which a thread holds 16 bytes of tiles, 16 or 32 KB a block
constexpr int kAheadZ = 8;  // loads of Z in flight per thread; the carry depends on none of them

__device__ __forceinline__ const float *gates_of(const ScanArgs &a, const Sequence &seq, int sequence,
                                                 int head) {
  if (!a.g) return nullptr;
  const int64_t batch = a.shape.packed ? 0 : sequence;
  return a.g + (batch * a.shape.heads_kv + head) * a.shape.seq_len + seq.start;
}

// float16: a bound on the first carry.
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

__device__ __forceinline__ int chunk_at(const ScanArgs &a, const Sequence &seq, int step) {
  return a.reverse ? seq.chunks - 1 - step : step;
}
// Z takes kAheadZ steps at a time, of which the first may be fewer: where the first group begins, at or below
// 0. So what is of the last chunk alone stands once in the code.
__device__ __forceinline__ int first_group(const Sequence &seq) {
  return -((kAheadZ - seq.chunks % kAheadZ) % kAheadZ);
}

// The decays e^{g_end} of 32 steps, and float16 the bounds of their sums, one step a lane.
template <typename T>
struct Steps {
  float decay = 1.f;
  Bounds bounds;

  Steps() = default;
  __device__ Steps(const ScanArgs &a, const Sequence &seq, const float *g, int64_t first_slot, int base) {
    const int step = base + static_cast<int>(threadIdx.x & 31);
    const int n = chunk_at(a, seq, min(max(step, 0), seq.chunks - 1));
    if (g) decay = __expf(g[min((n + 1) * a.shape.table.chunk, seq.length) - 1]);
    if constexpr (kCounted<T>) {
      const Range r = a.ranges[first_slot + static_cast<int64_t>(n) * a.shape.heads_kv];
      bounds = {r.bound_s, r.bound_z};
    }
  }
  __device__ float decay_of(int i) const { return __shfl_sync(0xffffffffu, decay, i); }
  // float16: the bound on the carry runs along with it, bound = e^{g_end[n]} bound + bound of local[n]. Returns
  // the bounds of that sum.
  __device__ Bounds advance(Bounds *carry, int i) const {
    const float f = decay_of(i);
    const Bounds b = {__shfl_sync(0xffffffffu, bounds.s, i), __shfl_sync(0xffffffffu, bounds.z, i)};
    carry->s = carry->s * f + b.s;
    carry->z = carry->z * f + b.z;
    return b;
  }
};

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

__device__ __forceinline__ float *product_of(const ScanArgs &a, int64_t slot) {
  return a.products.out + slot * product_parts(a.shape.degree, a.shape.head_dim);
}

// The state that the product of chunk n takes: that of a slot of the sequence, the initial one, or none where a
// side is zero. `first`, `last`: initial state and final gradient.
constexpr int kInitial = -1, kNone = -2;
__device__ __forceinline__ int partner(const ScanArgs &a, const Sequence &seq, int n, const void *first,
                                       const void *last) {
  if (n + 1 == seq.chunks && (a.products.after || last == nullptr)) return kNone;
  if (a.products.after) return n + 1;
  if (n > 0) return n;
  return first != nullptr ? kInitial : kNone;
}

// Which row and 8 columns of which tile 16 bytes of a slot hold.
struct Place {
  int tile = 0, row = 0, column = 0;
  int i = 0, j = 0;  // features
  int64_t canonical = 0;
  float in_scale = 1.f, out_scale = 1.f;
};
__device__ __forceinline__ Place place_of(const Shape &s, int v) {
  const int d = s.head_dim, pieces = d / 8;
  Place p;
  p.tile = v / (kTileRows * pieces);
  const int at = v % (kTileRows * pieces);
  if (d == 32) {
    p.row = at / 4;
    p.column = 8 * ((at & 3) ^ ((p.row >> 1) & 3));
  } else {
    p.row = (at / 8) % kTileRows;
    p.column = at / (8 * kTileRows) * 64 + 8 * ((at & 7) ^ (p.row & 7));
  }
  if (s.degree == 1) {
    p.i = p.j = p.tile * kTileRows + p.row;
    p.canonical = p.i;
    return p;
  }
  int ib, jb;
  tile_pair(d / 8, p.tile, &ib, &jb);
  p.i = 8 * ib + p.row / 8;
  p.j = 8 * jb + p.row % 8;
  p.canonical = canonical_row(d, min(p.i, p.j), max(p.i, p.j));
  p.in_scale = tile_scale(ib == jb, p.i == p.j);
  p.out_scale = tile_unscale(ib == jb, p.i == p.j);
  return p;
}

// prefix[n] = carry; carry = e^{g_end[n]} carry + local[n], n ascending (reverse: descending).
template <typename T, bool kProducts>
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(const __grid_constant__ ScanArgs a, int vectors, int blocks) {
  const Shape &s = a.shape;
  const int64_t pair = blockIdx.x / blocks;
  const int v = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (v >= vectors) return;
  const int sequence = static_cast<int>(pair / s.heads_kv), head = static_cast<int>(pair % s.heads_kv);
  const Sequence seq = s.table.sequences[sequence];
  const int d = s.head_dim;
  const Place at = place_of(s, v);

  float carry[8] = {};
  if (a.initial.s) {
    const float *p = static_cast<const float *>(a.initial.s) + sequence * a.initial.s_stride_n +
                     head * a.initial.s_stride_h + at.canonical * d + at.column;
#pragma unroll
    for (int e = 0; e < 8; ++e) carry[e] = at.in_scale * p[e];
  }
  const int64_t slot_vectors = static_cast<int64_t>(tile_count(s.degree, d)) * kTileRows * (d / 8);
  const int64_t first_slot = static_cast<int64_t>(seq.first_chunk) * s.heads_kv + head;
  const int64_t local_at = first_slot * slot_vectors + v, stride = s.heads_kv * slot_vectors;
  uint4 *const local = static_cast<uint4 *>(a.tiles) + local_at;
  const float *const g = gates_of(a, seq, sequence, head);
  using B = Pair<T>;
  const auto packed = [&](float f) {
    return make_uint4(B::pack(f * carry[0], f * carry[1]), B::pack(f * carry[2], f * carry[3]),
                      B::pack(f * carry[4], f * carry[5]), B::pack(f * carry[6], f * carry[7]));
  };
  Bounds bound;
  if constexpr (kCounted<T>) bound = first_bound(a, pair);
  const auto inverse_unit = [&](int n) {  // of the prefix of chunk n, which the first thread writes down
    if constexpr (!kCounted<T>) return 1.f;
    const Units u = units_of(bound.s, bound.z);
    if (v == 0) a.units[first_slot + static_cast<int64_t>(n) * s.heads_kv] = u;
    return inverse_power(u.s);
  };
  // <S, dS> of this thread's numbers, dS being the carry, in the units of both; S as it stands in a slot.
  [[maybe_unused]] const auto multiply = [&](const uint4 &tile, float inverse) {
    const uint32_t w[4] = {tile.x, tile.y, tile.z, tile.w};
    float sum = 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sum += B::lo(w[e]) * (inverse * carry[2 * e]) + B::hi(w[e]) * (inverse * carry[2 * e + 1]);
    return at.out_scale * at.out_scale * sum;
  };
  // The same of the initial state, whose unit would be that of the first slot.
  [[maybe_unused]] const auto multiply_initial = [&](float inverse) {
    const powerattn_state &first = a.products.initial;
    const float *const p = static_cast<const float *>(first.s) + sequence * first.s_stride_n +
                           head * first.s_stride_h + at.canonical * d + at.column;
    float unit = at.out_scale, sum = 0.f;
    if constexpr (kCounted<T>) unit *= inverse_power(a.products.units[first_slot].s);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += unit * p[e] * (inverse * carry[e]);
    return sum;
  };
  float *const products = kProducts ? product_of(a, first_slot) + v / 32 : nullptr;
  const int64_t product_stride = s.heads_kv * product_parts(s.degree, d);
  // Copies run kStages - 1 steps ahead, each thread into its own pieces.
  const int held = seq.chunks - (a.end_local != nullptr);  // chunks whose sums stand in `tiles`
  const uint4 *const other =
      kProducts ? static_cast<const uint4 *>(a.products.tiles) + first_slot * slot_vectors + v : nullptr;
  // Shared memory: [kStages][local sums, S of the products][kThreads] pieces of 16 bytes.
  constexpr uint32_t kPart = kThreads * 16, kStage = kPart * (kProducts ? 2 : 1);
  const uint32_t own = shared_address(dynamic_shared<uint4>()) + threadIdx.x * 16;
  const auto copy = [&](int step) {
    const int n = chunk_at(a, seq, step);
    const uint32_t stage = own + step % kStages * kStage;
    if (step < held) copy16(stage, local + n * stride);
    if constexpr (kProducts) {
      const int with = step < seq.chunks ? partner(a, seq, n, a.products.initial.s, a.initial.s) : kNone;
      if (with >= 0) copy16(stage + kPart, other + with * stride);
    }
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  Steps<T> steps;
  for (int step = 0; step < seq.chunks; ++step) {
    if (step % 32 == 0) steps = Steps<T>(a, seq, g, first_slot, step);
    copy(step + kStages - 1);
    const int n = chunk_at(a, seq, step);
    const uint32_t stage = own + step % kStages * kStage;
    const bool last = step == seq.chunks - 1;
    const float inverse = inverse_unit(n);
    copy_wait<kStages - 1>();  // the sum is read: its place takes the carry
    local[n * stride] = packed(inverse);
    if constexpr (kProducts) {
      const int with = partner(a, seq, n, a.products.initial.s, a.initial.s);
      float sum = 0.f;
      if (at.i <= at.j && with >= 0) sum = multiply(load16(stage + kPart), inverse);
      if (at.i <= at.j && with == kInitial) sum = multiply_initial(inverse);
      sum = warp_sum(sum);
      if ((threadIdx.x & 31) == 0) products[n * product_stride] = sum;
    }
    const float f = steps.decay_of(step % 32);
    float unit = 1.f;  // of the local sum
    if constexpr (kCounted<T>) unit = unit_of(steps.advance(&bound, step % 32).s);
    if (last && a.end_local != nullptr) {
      const float *const end =
          a.end_local + (pair * tile_rows(s.degree, d) + at.tile * kTileRows + at.row) * d + at.column;
#pragma unroll
      for (int e = 0; e < 8; ++e) carry[e] = carry[e] * f + end[e];
    } else {
      const uint4 sum = load16(stage);
      const uint32_t w[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        carry[2 * e] = carry[2 * e] * f + unit * B::lo(w[e]);
        carry[2 * e + 1] = carry[2 * e + 1] * f + unit * B::hi(w[e]);
      }
    }
  }
  if (a.final.s && at.i <= at.j) {
    float *p = static_cast<float *>(a.final.s) + sequence * a.final.s_stride_n + head * a.final.s_stride_h +
               at.canonical * d + at.column;
#pragma unroll
    for (int e = 0; e < 8; ++e) p[e] = at.out_scale * carry[e];
  }
}

// The same for Z = sum w k k^T, [d][d] float; out: high and low parts, Z = high + low to 2^-17 (float16:
// 2^-22).
template <typename T, bool kProducts>
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
  float *const products = kProducts ? product_of(a, first_slot) + state_parts(s.degree, d) + v / 32 : nullptr;
  const int64_t product_stride = s.heads_kv * product_parts(s.degree, d);
  // The product of a warp's elements, dZ being the carry, in the units of both. All of [d][d] counts: a number
  // off the diagonal is sqrt(1/2) of the canonical one, twice.
  [[maybe_unused]] const auto multiply = [&](int n, const T(&parts)[2], float dz) {
    if (partner(a, seq, n, a.products.initial.z, a.initial.z) < 0) return 0.f;
    return (Pair<T>::to_float(parts[0]) + Pair<T>::to_float(parts[1])) * dz;
  };
  [[maybe_unused]] const auto multiply_initial = [&](float dz) {
    const powerattn_state &initial = a.products.initial;
    if (partner(a, seq, 0, initial.z, a.initial.z) != kInitial) return 0.f;
    float unit = i == j ? 1.f : 0.70710678118654752f;
    if constexpr (kCounted<T>) unit *= inverse_power(a.products.units[first_slot].z);
    return unit * dz *
           static_cast<const float *>(
               initial.z)[sequence * initial.z_stride_n + head * initial.z_stride_h + canonical];
  };
  const T *const other = kProducts ? static_cast<const T *>(a.products.z_tiles) + 2 * first : nullptr;
  const int begin = first_group(seq), after = a.products.after ? 1 : 0;
  for (int base = begin; base < seq.chunks; base += 32) {
    const Steps<T> steps(a, seq, g, first_slot, base);
    for (int n0 = base; n0 < min(base + 32, seq.chunks); n0 += kAheadZ) {
      float in[kAheadZ];
      [[maybe_unused]] T factor[kAheadZ][2];
#pragma unroll
      for (int q = 0; q < kAheadZ; ++q) {
        const int n = chunk_at(a, seq, max(n0 + q, 0));
        in[q] = local[n * stride];
        if constexpr (kProducts) {
          const T *const parts = other + 2 * min(n + after, seq.chunks - 1) * stride;
          factor[q][0] = parts[high];
          factor[q][1] = parts[low];
        }
      }
#pragma unroll
      for (int q = 0; q < kAheadZ; ++q) {
        if (n0 + q < 0) continue;
        const int n = chunk_at(a, seq, n0 + q);
        const float f = steps.decay_of(n0 + q - base);
        float counted = carry;
        if constexpr (kCounted<T>) {
          counted *= inverse_power(unit_of(bound.z));
          steps.advance(&bound, n0 + q - base);
        }
        if constexpr (kProducts) {
          float sum = multiply(n, factor[q], counted);
          if (q == kAheadZ - 1 && n0 + q == seq.chunks - 1) sum += multiply_initial(counted);
          sum = warp_sum(sum);
          if ((threadIdx.x & 31) == 0) products[n * product_stride] = sum;
        }
        const T top = Pair<T>::from_float(counted);
        out[2 * n * stride + high] = top;
        out[2 * n * stride + low] = Pair<T>::from_float(counted - Pair<T>::to_float(top));
        carry = carry * f + in[q];
      }
    }
  }
  if (a.final.z && i <= j)
    static_cast<float *>(a.final.z)[sequence * a.final.z_stride_n + head * a.final.z_stride_h + canonical] =
        carry * (i == j ? 1.f : 1.41421356237309505f);
}

template <typename T, bool kProducts>
cudaError_t scan_type(const ScanArgs &a, int64_t pairs, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int d = s.head_dim;
  const int vectors = s.degree == 1 ? d * d / 8 : tile_rows(2, d) * d / 8;
  const int blocks = (vectors + kThreads - 1) / kThreads, z_blocks = (d * d + kThreads - 1) / kThreads;
  const int shared = kStages * (kProducts ? 2 : 1) * kThreads * static_cast<int>(sizeof(uint4));
  launch_kernel(tiles_kernel<T, kProducts>, static_cast<unsigned>(pairs * blocks), kThreads, shared, stream, a,
                vectors, blocks);
  if (a.z_local != nullptr)
    launch_kernel(z_kernel<T, kProducts>, static_cast<unsigned>(pairs * z_blocks), kThreads, 0, stream, a,
                  z_blocks);
  return cudaGetLastError();
}
template <typename T>
cudaError_t scan_type(const ScanArgs &a, int64_t pairs, cudaStream_t stream) {
  return a.products.out != nullptr ? scan_type<T, true>(a, pairs, stream)
                                   : scan_type<T, false>(a, pairs, stream);
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
