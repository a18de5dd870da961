// SPDX-License-Identifier: Apache-2.0
// Per-row work around the products: the monomial table, row statistics of the backward pass, the gate gradient.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/generic/block.cuh"
#include "kernels/cuda/launch.cuh"

namespace powerattn::cuda::generic {
namespace {

constexpr int kRowThreads = 256;

// C(n, k) for small k, exact in double below 2^53.
__device__ double choose(int64_t n, int k) {
  double c = 1;
  for (int i = 1; i <= k; ++i) c = c * double(n - k + i) / double(i);
  return rint(c);
}

// Row r of the canonical order, i1 <= i2 <= ... lexicographic: the next index is the smallest i whose block of
// C(d - i + left - 1, left) rows (all monomials of degree `left` on indices >= i, minus those >= i + 1) holds
// r.
__global__ void __launch_bounds__(kRowThreads)
    monomial_kernel(Monomial *table, int64_t rows, int d, int degree) {
  const int64_t row = blockIdx.x * int64_t(kRowThreads) + threadIdx.x;
  if (row >= rows) return;
  double left_rows = double(row), weight2 = 1;
  uint64_t packed = 0;
  int i = 0, run = 0;
  for (int position = 0; position < degree; ++position) {
    const int left = degree - position - 1;  // indices after this one
    int start = i;
    for (; i < d - 1; ++i) {
      const double block = choose(d - i + left - 1, left);  // monomials that have i here
      if (left_rows < block) break;
      left_rows -= block;
    }
    run = position > 0 && i == start ? run + 1 : 1;
    weight2 *= double(position + 1) / double(run);  // p! / prod(multiplicity!), one factor at a time
    packed |= uint64_t(i) << (8 * position);
  }
  table[row] = {packed, float(sqrt(weight2)), 0};
}

// r = 1 / row_norm, delta = d_y . y; one warp per row.
__global__ void __launch_bounds__(kRowThreads) row_stats_kernel(RowStatsArgs a, int64_t batch) {
  const Shape &s = a.shape;
  const int lane = threadIdx.x & 31;
  const int64_t total = batch * s.heads_q * s.seq_len;
  for (int64_t row = blockIdx.x * int64_t(kRowThreads / 32) + threadIdx.x / 32; row < total;
       row += int64_t(gridDim.x) * (kRowThreads / 32)) {
    const int64_t t = row % s.seq_len, h = row / s.seq_len % s.heads_q, b = row / s.seq_len / s.heads_q;
    if (a.inverse && lane == 0) {
      float r = 1.0f;
      if (s.normalize) {
        const float norm = static_cast<const float *>(
            a.row_norm.data)[b * a.row_norm.stride_b + t * a.row_norm.stride_t + h * a.row_norm.stride_h];
        r = norm != 0.0f ? 1.0f / norm : 0.0f;
      }
      a.inverse[row] = r;
    }
    if (a.delta) {
      const int64_t y = b * a.y.b + t * a.y.t + h * a.y.h, dy = b * a.dy.b + t * a.dy.t + h * a.dy.h;
      float sum = 0;
      for (int64_t i = lane; i < s.e; i += 32)
        sum += load_as_float(a.y.data, s.dtype, y + i) * load_as_float(a.dy.data, s.dtype, dy + i);
      sum = warp_sum(sum);
      if (lane == 0) a.delta[row] = sum;
    }
  }
}

__global__ void __launch_bounds__(kRowThreads) correct_delta_kernel(CorrectDeltaArgs a, int64_t rows) {
  const float degree = float(a.shape.degree), eps = a.shape.eps;
  for (int64_t row = blockIdx.x * int64_t(kRowThreads) + threadIdx.x; row < rows;
       row += int64_t(gridDim.x) * kRowThreads) {
    const float part = eps * a.inverse[row], delta = a.q_dots[row] / degree + a.delta[row] * (1.0f - part);
    a.delta[row] = delta;
    a.q_dots[row] = degree * part * delta;
  }
}

// scratch[b, h, t] = (sum over the group of q . dq - k . dk) / p.
__global__ void __launch_bounds__(kRowThreads) gate_terms_kernel(GateGradArgs a, int64_t batch) {
  const Shape &s = a.shape;
  const int64_t total = batch * s.heads_kv * s.seq_len;
  for (int64_t row = blockIdx.x * int64_t(kRowThreads) + threadIdx.x; row < total;
       row += int64_t(gridDim.x) * kRowThreads) {
    const int64_t t = row % s.seq_len, h = row / s.seq_len % s.heads_kv, b = row / s.seq_len / s.heads_kv;
    float sum = -a.k_dots[row];
    for (int64_t m = 0; m < s.group; ++m) sum += a.q_dots[(b * s.heads_q + h * s.group + m) * s.seq_len + t];
    a.scratch[row] = sum / float(s.degree);
  }
}

// d_log_g[t] = X + sum_{i >= t} scratch[i] inside the chunk: tiles of kRowThreads tokens from the end, summed
// in double, thread 0 holding the tile's last token.
__global__ void __launch_bounds__(kRowThreads) gate_suffix_kernel(GateGradArgs a) {
  __shared__ double warps[kRowThreads / 32];
  const Shape &s = a.shape;
  const int64_t chunk = blockIdx.x / s.heads_kv, h = blockIdx.x % s.heads_kv;
  const Chunk c = s.table.chunks[chunk];
  if (c.length == 0) return;
  const int64_t row = row_index(s, s.heads_kv, h, c.sequence, c.start), b = batch_of(s.packed, c.sequence);
  const auto *log_g = static_cast<const float *>(a.log_g.data);
  auto *out = static_cast<float *>(a.out.data);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double carry = a.boundary ? a.boundary[chunk * s.heads_kv + h] : 0.0;
  for (int64_t base = 0; base < c.length; base += kRowThreads) {
    const int64_t i = c.length - 1 - (base + threadIdx.x);
    const double inclusive = warp_scan(i >= 0 ? double(a.scratch[row + i]) : 0.0);
    if (lane == 31) warps[warp] = inclusive;
    __syncthreads();
    double sum = carry + inclusive;
    for (int w = 0; w < kRowThreads / 32; ++w) {
      if (w < warp) sum += warps[w];
      carry += warps[w];
    }
    if (i >= 0) {
      const int64_t t = c.start + i;
      const bool reset =
          log_g && log_g[b * a.log_g.stride_b + t * a.log_g.stride_t + h * a.log_g.stride_h] == -INFINITY;
      out[b * a.out.stride_b + t * a.out.stride_t + h * a.out.stride_h] = reset ? 0.0f : float(sum);
    }
    __syncthreads();
  }
}

unsigned warp_rows_grid(int64_t rows) {
  return unsigned(std::min<int64_t>(ceil_div(rows, kRowThreads / 32), 132 * 32));
}

}  // namespace

Math math_of(const Problem &p) {
  if (p.dtype == Dtype::kBfloat16) return Math::kBfloat16;
  return p.dtype == Dtype::kFloat16 || p.allow_tf32 ? Math::kTf32 : Math::kFloat32;
}

Dtype operand_dtype(Math math) { return math == Math::kBfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32; }

size_t forward_shared_bytes(Math math, const Problem &p, bool states) {
  size_t most = attention_shared_bytes(math, p);
  if (states) most = std::max({most, update_shared_bytes(math, p), query_shared_bytes(math, p)});
  return most;
}

size_t backward_shared_bytes(Math math, const Problem &p, bool states) {
  size_t most = attention_grad_shared_bytes(math, p);
  if (states)
    most = std::max(
        {most, update_shared_bytes(math, p), query_shared_bytes(math, p), contract_shared_bytes(math, p)});
  return most;
}

View view_of(const Problem &p, const powerattn_tensor &t, int64_t dim, Dtype dtype) {
  View v;
  v.data = t.data;
  v.b = p.packed ? 0 : t.stride_b;
  v.t = t.stride_t;
  v.h = t.stride_h;
  const int64_t piece = 16 / size_of(dtype);
  v.vector = dim % 8 == 0 && v.b % piece == 0 && v.t % piece == 0 && v.h % piece == 0 &&
             reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  return v;
}

cudaError_t monomials(const Problem &p, Monomial *table, cudaStream_t stream) {
  return launch_kernel(monomial_kernel, unsigned(ceil_div(p.state_rows, kRowThreads)), kRowThreads, 0, stream,
                       table, p.state_rows, int(p.head_dim), p.degree);
}

cudaError_t row_stats(const RowStatsArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t batch = s.packed ? 1 : s.table.num_sequences, rows = batch * s.heads_q * s.seq_len;
  if (rows == 0) return cudaSuccess;
  return launch_kernel(row_stats_kernel, warp_rows_grid(rows), kRowThreads, 0, stream, a, batch);
}

cudaError_t correct_delta(const CorrectDeltaArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t rows = (s.packed ? 1 : s.table.num_sequences) * s.heads_q * s.seq_len;
  if (rows == 0) return cudaSuccess;
  return launch_kernel(correct_delta_kernel, warp_rows_grid(rows), kRowThreads, 0, stream, a, rows);
}

cudaError_t gate_grad(const GateGradArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t batch = s.packed ? 1 : s.table.num_sequences, rows = batch * s.heads_kv * s.seq_len;
  if (rows == 0) return cudaSuccess;
  launch_kernel(gate_terms_kernel, warp_rows_grid(rows), kRowThreads, 0, stream, a, batch);
  if (s.table.num_chunks > 0)
    launch_kernel(gate_suffix_kernel, unsigned(s.table.num_chunks * s.heads_kv), kRowThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace powerattn::cuda::generic
