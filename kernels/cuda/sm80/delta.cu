// SPDX-License-Identifier: Apache-2.0
// delta without the rounding error of y, where it matters. With w_ij = c e^{G_i - G_j} s_ij^p and m_ij = d_y_i
// . v_j,
//   d s_ij = p w_ij r_i (m_ij - delta_i) / s_ij,     delta_i = sum_j w_ij m_ij / (sum_j w_ij + eps)
// A row whose weight lies on one or two keys with small s_ij has m_ij close to delta_i there, and divides their
// difference by s_ij: what rounding y left in d_y_i . y_i can be as large as the gradient. Such rows see few
// keys, at the start of a sequence or behind a steep gate. So where the last kWindow keys have all of a row's
// weight (its row norm says so), delta is their sum in float32.
#include "args.h"
#include "kernels/cuda/launch.cuh"
#include "load.h"
#include "weights.h"

namespace powerattn {
namespace cuda {
namespace sm80 {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 16, kWindow = 64;  // of a strip, a warp's; keys up to its last row
constexpr int kMostRows = 32 * kRows;    // of a tile

// A row's other keys may have this much of its weight: then leaving them out costs less than rounding y did.
template <typename T>
constexpr float kLeftOut = std::is_same_v<T, __half> ? 0x1p-14f : 0x1p-11f;
// Log gates over a window that are worth a look: e^-6 is 2^-8.7, and weights differ.
constexpr double kSteep = -6.;

// Elements `column` and column + 1 of a row. Whether all pairs are aligned is known at compile time: a choice
// before each load would wait for one load after the other.
template <bool kPairs, typename T>
__device__ __forceinline__ uint32_t load_pair(const T *row, int column) {
  const unsigned short *const p = reinterpret_cast<const unsigned short *>(row) + column;
  if constexpr (kPairs) return *reinterpret_cast<const uint32_t *>(p);
  return p[0] | static_cast<uint32_t>(p[1]) << 16;
}
__device__ __forceinline__ bool in_pairs(const powerattn_tensor &x) {
  const uint64_t strides =
      static_cast<uint64_t>(x.stride_b) | static_cast<uint64_t>(x.stride_t) | static_cast<uint64_t>(x.stride_h);
  return (((reinterpret_cast<uintptr_t>(x.data) >> 1) | strides) & 1) == 0;
}

// A operand of rows 0 .. 15, of which `rows` exist.
template <typename T, int D, bool kPairs>
__device__ __forceinline__ void load_a(uint32_t (&a)[D / 16][4], const powerattn_tensor &x, int64_t batch,
                                       int64_t token, int head, int rows, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i & 1), column = 2 * (lane % 4) + 8 * (i / 2);
    const T *const from = row_pointer<T>(x, batch, token + min(row, rows - 1), head);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t v = load_pair<kPairs>(from, 16 * k + column);
      a[k][i] = row < rows ? v : 0;
    }
  }
}
// acc = a x^T for the eight rows of x of which this lane has `row`.
template <typename T, int D, bool kPairs>
__device__ __forceinline__ void times_rows(float (&acc)[4], const uint32_t (&a)[D / 16][4], const T *row,
                                           int lane) {
  uint32_t b[D / 16][2];
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i) b[k][i] = load_pair<kPairs>(row, 16 * k + 8 * i + 2 * (lane % 4));
#pragma unroll
  for (int k = 0; k < D / 16; ++k) mma<T>(acc, a[k], b[k][0], b[k][1]);
}

// Rows `token` .. of a head, and the keys from `first` to the last of them.
struct Strip {
  int64_t batch, first, token;
  int head, head_kv, rows;
};
// `gates`: the sum of the gates from key `first` to each of the others.
template <typename T, int D, bool kPairs>
__device__ __forceinline__ void walk(const DeltaArgs &a, const Strip &r, const double *gates, int lane) {
  const int before = static_cast<int>(r.token - r.first), keys = before + r.rows;
  uint32_t q[D / 16][4], dy[D / 16][4];
  load_a<T, D, kPairs>(q, a.q, r.batch, r.token, r.head, r.rows, lane);
  load_a<T, D, kPairs>(dy, a.d_y, r.batch, r.token, r.head, r.rows, lane);
  float sum[2] = {0.f, 0.f}, dot[2] = {0.f, 0.f};  // of w, and of w m, of rows lane / 4 and + 8
#pragma unroll(kPairs ? 2 : 1)
  for (int key = 0; key < keys; key += 8) {
    const int64_t mine = r.first + min(key + lane / 4, keys - 1);
    float w[4] = {0.f, 0.f, 0.f, 0.f}, m[4] = {0.f, 0.f, 0.f, 0.f};
    times_rows<T, D, kPairs>(w, q, row_pointer<T>(a.k, r.batch, mine, r.head_kv), lane);
    times_rows<T, D, kPairs>(m, dy, row_pointer<T>(a.v, r.batch, mine, r.head_kv), lane);
    power<0>(w, a.shape.degree);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = before + lane / 4 + 8 * (e / 2), column = key + 2 * (lane % 4) + (e & 1);
      if (column > row || row >= keys) continue;
      if (a.log_g.data != nullptr) w[e] *= __expf(static_cast<float>(gates[row] - gates[column]));
      sum[e / 2] += w[e];
      dot[e / 2] += w[e] * m[e];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = a.scale * quad_sum(sum[h]) + a.eps, part = a.scale * quad_sum(dot[h]);
    const int row = lane / 4 + 8 * h;
    if (lane % 4 != 0 || row >= r.rows) continue;
    const float norm = *row_pointer<float>(a.row_norm, r.batch, r.token + row, r.head), delta = part / total;
    // Not of sums that left float32, nor of none.
    if (!(fabsf(norm - total) <= kLeftOut<T> * norm) || !(fabsf(delta) < INFINITY)) continue;
    const int64_t at = (r.batch * a.shape.heads_q + r.head) * a.shape.seq_len + r.token + row;
    a.delta[at] = delta;
    if (a.norm_weight != nullptr) a.norm_weight[at] = -delta * a.weight[at];
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 4) delta_kernel(const __grid_constant__ DeltaArgs a) {
  __shared__ double gates[kWarps][kWindow];
  const Shape &s = a.shape;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int head = static_cast<int>(blockIdx.x % s.heads_q), head_kv = head / (s.heads_q / s.heads_kv);
  const Tile tile = s.table.tiles[blockIdx.x / s.heads_q];
  const int64_t batch = batch_of(s.packed, tile.sequence),
                start = s.packed ? s.table.sequences[tile.sequence].start : 0;
  const bool gated = a.log_g.data != nullptr;
  const auto first_key = [&](int64_t token) { return max(start, token - (kWindow - kRows)); };

  // Each lane looks at one strip of rows: it is worth a walk at the start of a sequence, and where the gates
  // say so, whose sums are at hand inside a chunk. Most tiles have none.
  bool wanted = false;
  if (lane * kRows < tile.length) {
    const int64_t token = tile.start + lane * kRows, first = first_key(token);
    wanted = first == start || gated;
    if (first > start && gated && first >= tile.start - tile.offset) {
      const int64_t row = (batch * s.heads_kv + head_kv) * s.seq_len,
                    last = token + min(kRows, tile.length - lane * kRows) - 1;
      wanted = a.g64 != nullptr ? a.g64[row + last] - a.g64[row + first] <= kSteep
                                : a.g[row + last] - a.g[row + first] <= static_cast<float>(kSteep);
    }
  }
  const bool pairs = in_pairs(a.q) && in_pairs(a.k) && in_pairs(a.v) && in_pairs(a.d_y);
  int number = 0;
#pragma unroll 1
  for (uint32_t strips = __ballot_sync(0xffffffffu, wanted); strips != 0; strips &= strips - 1) {
    if (number++ % kWarps != warp) continue;
    const int offset = kRows * (__ffs(static_cast<int>(strips)) - 1);
    const int64_t token = tile.start + offset, first = first_key(token);
    const int rows = min(kRows, tile.length - offset), before = static_cast<int>(token - first),
              keys = before + rows;
    if (gated) {
      double carry = 0.;
      __syncwarp();  // the strip before has read its own
#pragma unroll
      for (int half = 0; half < kWindow; half += 32) {
        const int n = half + lane;
        double g = 0.;
        if (n < keys) g = fmaxf(*row_pointer<const float>(a.log_g, batch, first + n, head_kv), kResetLogGate);
        g = carry + warp_scan(g);
        gates[warp][n] = g;
        carry = __shfl_sync(0xffffffffu, g, 31);
      }
      __syncwarp();
      if (first > start && gates[warp][keys - 1] - gates[warp][0] > kSteep) continue;  // over a chunk's end
    }

    const Strip strip{batch, first, token, head, head_kv, rows};
    if (pairs)
      walk<T, D, true>(a, strip, gates[warp], lane);
    else
      walk<T, D, false>(a, strip, gates[warp], lane);
  }
}

template <typename T>
cudaError_t delta_type(const DeltaArgs &a, unsigned blocks, cudaStream_t stream) {
  const auto kernel = a.shape.head_dim == 32   ? delta_kernel<T, 32>
                      : a.shape.head_dim == 64 ? delta_kernel<T, 64>
                                               : delta_kernel<T, 128>;
  return launch_kernel(kernel, blocks, kThreads, 0, stream, a);
}

}  // namespace

cudaError_t delta(const DeltaArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.shape.table.num_tiles * a.shape.heads_q;
  if (blocks == 0) return cudaSuccess;
  if (a.shape.table.tile > kMostRows) return cudaErrorInvalidValue;
  return a.shape.dtype == Dtype::kFloat16 ? delta_type<__half>(a, static_cast<unsigned>(blocks), stream)
                                          : delta_type<__nv_bfloat16>(a, static_cast<unsigned>(blocks), stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
