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

// Rows `token` .. of a head, but for the first `skip`, and the keys from `first` to the last of them.
struct Strip {
  int64_t batch, first, token;
  int head, head_kv, rows, skip;
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
    if (lane % 4 != 0 || row >= r.rows || row < r.skip) continue;
    const float norm = *row_pointer<float>(a.row_norm, r.batch, r.token + row, r.head), delta = part / total;
    // Not of sums that left float32, nor of none.
    if (!(fabsf(norm - total) <= kLeftOut<T> * norm) || !(fabsf(delta) < INFINITY)) continue;
    const int64_t at = (r.batch * a.shape.heads_q + r.head) * a.shape.seq_len + r.token + row;
    a.delta[at] = delta;
    if (a.norm_weight != nullptr) a.norm_weight[at] = -delta * a.weight[at];
  }
}

// A strip whose gates are steep enough, of a warp: their sums, then the walk.
template <typename T, int D>
__device__ __forceinline__ void take(const DeltaArgs &a, const Strip &r, int64_t start, double *gates,
                                     int lane) {
  if (a.log_g.data != nullptr) {
    const int keys = static_cast<int>(r.token - r.first) + r.rows;
    double carry = 0.;
    __syncwarp();  // the strip before has read its own
#pragma unroll
    for (int half = 0; half < kWindow; half += 32) {
      const int n = half + lane;
      double g = 0.;
      if (n < keys)
        g = fmaxf(*row_pointer<const float>(a.log_g, r.batch, r.first + n, r.head_kv), kResetLogGate);
      g = carry + warp_scan(g);
      gates[n] = g;
      carry = __shfl_sync(0xffffffffu, g, 31);
    }
    __syncwarp();
    if (r.first > start && gates[keys - 1] - gates[0] > kSteep) return;
  }
  if (aligned_rows<2>(a.q) && aligned_rows<2>(a.k) && aligned_rows<2>(a.v) && aligned_rows<2>(a.d_y))
    walk<T, D, true>(a, r, gates, lane);
  else
    walk<T, D, false>(a, r, gates, lane);
}

// Blocks for the first kWindow rows of every sequence and head, a strip for each warp; then, with gates, blocks
// that look at kThreads strips of the tiles each, most of which are left, and share out the others.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 4) delta_kernel(const __grid_constant__ DeltaArgs a) {
  __shared__ double gates[kWarps][kWindow];
  __shared__ uint32_t wanted[kWarps];
  const Shape &s = a.shape;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = s.heads_q / s.heads_kv;
  const int64_t starts = s.table.num_sequences * s.heads_q;
  Strip r;
  if (blockIdx.x < starts) {
    static_assert(kWarps * kRows == kWindow, "a warp for each strip");
    const int64_t sequence = blockIdx.x / s.heads_q;
    const Sequence of = s.table.sequences[sequence];
    r.head = static_cast<int>(blockIdx.x % s.heads_q);
    r.head_kv = r.head / group;
    r.batch = batch_of(s.packed, static_cast<int32_t>(sequence));
    r.first = of.start;
    r.token = of.start + warp * kRows;
    r.rows = static_cast<int>(min(int64_t(kRows), of.length - warp * kRows));
    r.skip = 0;
    if (r.rows > 0) take<T, D>(a, r, of.start, gates[warp], lane);
    return;
  }

  const int strips = static_cast<int>(s.table.tile) / kRows;  // of a tile
  Tile tile;
  int64_t start = 0;
  const auto find =
      [&](int n) {  // strip n of the block's; false: it has none, or only rows of the blocks above
        const int64_t id = (blockIdx.x - starts) * kThreads + n, item = id / strips;
        const int offset = static_cast<int>(id % strips) * kRows;
        if (item >= s.table.num_tiles * s.heads_q) return false;
        tile = s.table.tiles[item / s.heads_q];
        if (offset >= tile.length) return false;
        r.head = static_cast<int>(item % s.heads_q);
        r.head_kv = r.head / group;
        r.batch = batch_of(s.packed, tile.sequence);
        start = s.packed ? s.table.sequences[tile.sequence].start : 0;
        r.token = tile.start + offset;
        r.rows = min(kRows, tile.length - offset);
        r.first = max(start, r.token - (kWindow - kRows));
        r.skip = static_cast<int>(max(int64_t(0), start + kWindow - r.token));
        return r.skip < r.rows;
      };
  bool look = find(static_cast<int>(threadIdx.x));
  if (look) {
    const int64_t row = (r.batch * s.heads_kv + r.head_kv) * s.seq_len, chunk = tile.start - tile.offset;
    const auto sum = [&](int64_t token) {
      return a.g64 != nullptr ? a.g64[row + token] : static_cast<double>(a.g[row + token]);
    };
    double steep = sum(r.token + r.rows - 1) - sum(r.first);
    if (r.first < chunk) steep += sum(chunk - 1);  // sums begin anew
    look = steep <= kSteep || r.first + s.table.chunk < chunk;
  }
  const uint32_t mine = __ballot_sync(0xffffffffu, look);
  if (lane == 0) wanted[warp] = mine;
  __syncthreads();
  int number = 0;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
#pragma unroll 1
    for (uint32_t left = wanted[w]; left != 0; left &= left - 1) {
      if (number++ % kWarps != warp) continue;
      find(32 * w + __ffs(static_cast<int>(left)) - 1);
      take<T, D>(a, r, start, gates[warp], lane);
    }
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
  const ChunkTable &table = a.shape.table;
  int64_t blocks = table.num_sequences * a.shape.heads_q;
  if (a.log_g.data != nullptr)
    blocks += ceil_div(table.num_tiles * a.shape.heads_q * (table.tile / kRows), kThreads);
  if (blocks == 0) return cudaSuccess;
  return a.shape.dtype == Dtype::kFloat16 ? delta_type<__half>(a, static_cast<unsigned>(blocks), stream)
                                          : delta_type<__nv_bfloat16>(a, static_cast<unsigned>(blocks), stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
