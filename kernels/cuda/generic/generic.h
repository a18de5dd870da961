// SPDX-License-Identifier: Apache-2.0
// The generic kernels: any degree, head_dim, value_dim and dtype, every feature. Fallback of the tensor-core
// kernels and their reference on the device. Feature vectors phi are built in shared memory, a slab at a time,
// straight from q and k, and never reach device memory.
//
// Arrays indexed by rows are contiguous [b, heads, t, ...]: row(b, h, t) = (b * heads + h) * seq_len + t.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/chunks.h"

namespace powerattn::cuda::generic {

constexpr int kRows = 64;  // rows of a thread block that owns rows: 4 warps of 16
constexpr int kThreads = 128;

enum class Math { kFloat32, kTf32, kBfloat16 };
Math math_of(const Problem &p);
// Element type of the prefix states: what the products read.
Dtype operand_dtype(Math math);

struct View {
  const void *data = nullptr;
  int64_t b = 0, t = 0, h = 0;  // strides in elements; b = 0 when packed
  bool vector = false;          // every row starts on 16 bytes and has a multiple of 8 elements
};
View view_of(const Problem &p, const powerattn_tensor &tensor, int64_t dim, Dtype dtype);

// One row of the state: its indices (first in the low byte) and weight sqrt(multinomial).
struct Monomial {
  uint64_t indices;
  float weight;
  uint32_t unused;
};
// Fills table[D]; canonical order.
cudaError_t monomials(const Problem &p, Monomial *table, cudaStream_t stream);

// What all kernels share. Plain data, passed by value.
struct Shape {
  ChunkTable table;  // tiles of kRows
  bool packed = false;
  bool gated = false;
  bool normalize = false;
  int32_t degree = 0;
  int64_t heads_q = 0, heads_kv = 0, group = 0;
  int64_t d = 0, e = 0, seq_len = 0;
  int64_t rows = 0;  // D
  float scale = 0;
  float scale_p = 0;  // scale^p
  float eps = 0;
  Dtype dtype = Dtype::kFloat32;
  const double *g = nullptr;  // [b, heads_kv, t], cumulative in the chunk
};

// local S[chunk, h, r, :] = sum_t w_t phi(x_t)[r] u_t,  z[chunk, h, r] = sum_t w_t phi(x_t)[r] c_t  over a
// chunk's tokens
//   keys:    x = k, u = v, w = exp(g_end - g_t), c = 1
//   queries: x = q, u = d_y, w = exp(g_t) scale^p r_t, c = -delta_t, over all query heads of the group
struct UpdateArgs {
  Shape shape;
  bool queries = false;
  View x, u;
  const float *inverse = nullptr;  // r [b, heads_q, t]; queries
  const float *delta = nullptr;    // queries, normalised
  const Monomial *table = nullptr;
  float *s = nullptr;  // [num_chunks, heads_kv, D, e]
  float *z = nullptr;  // [num_chunks, heads_kv, D] or null
};
cudaError_t update(Math math, const UpdateArgs &a, cudaStream_t stream);

// out[row, :] = f_row sum_r phi(x_row)[r] S[chunk][r, :],  norm[row] = f_row sum_r phi(x_row)[r] z[chunk][r]
//   queries: f = exp(g_row) scale^p; keys: f = exp(g_end - g_row)
struct QueryArgs {
  Shape shape;
  bool queries = true;
  bool edge = false;  // the first chunk (queries; keys: the last) of a sequence has a state that is not 0
  View x;
  const Monomial *table = nullptr;
  const void *s = nullptr;   // [num_chunks, heads_kv, D, e] of operand_dtype
  const float *z = nullptr;  // [num_chunks, heads_kv, D] or null
  float *out = nullptr;      // [b, heads, t, e]
  float *norm = nullptr;     // [b, heads, t] or null
};
cudaError_t query(Math math, const QueryArgs &a, cudaStream_t stream);

// out[row, :] = f_row J^T (S u_row + c_row z), J = d phi / d x at x_row
//   queries: u = d_y, f = exp(g_row) scale^p r_row, c = -delta_row
//   keys:    u = v, f = exp(g_end - g_row), c = 1
struct ContractArgs {
  Shape shape;
  bool queries = true;
  bool edge = false;  // as in QueryArgs
  View x, u;
  const float *inverse = nullptr;
  const float *delta = nullptr;
  const Monomial *table = nullptr;
  const void *s = nullptr;
  const float *z = nullptr;
  float *out = nullptr;   // [b, heads, t, d]
  float *dots = nullptr;  // x . out [b, heads, t]; may be null
};
cudaError_t contract(Math math, const ContractArgs &a, cudaStream_t stream);

// The attention inside chunks; adds the state's part where given.
struct AttentionArgs {
  Shape shape;
  View q, k, v;
  const float *state_out = nullptr;   // [b, heads_q, t, e]: from query()
  const float *state_norm = nullptr;  // [b, heads_q, t]
  powerattn_tensor y{};
  powerattn_tensor row_norm{};  // float32, may be absent
};
cudaError_t attention(Math math, const AttentionArgs &a, cudaStream_t stream);

struct AttentionGradArgs {
  Shape shape;
  View q, k, v, dy;
  const float *inverse = nullptr;  // r [b, heads_q, t]
  const float *delta = nullptr;    // [b, heads_q, t]
  float *out = nullptr;            // [b, heads, t, d or e]
  float *dots = nullptr;    // x . dx of the own rows (q or k) [b, heads, t], before any rounding; may be null
  bool accumulate = false;  // add to what contract() or query() left there
};
cudaError_t attention_grad_q(Math math, const AttentionGradArgs &a, cudaStream_t stream);
cudaError_t attention_grad_k(Math math, const AttentionGradArgs &a, cudaStream_t stream);
cudaError_t attention_grad_v(Math math, const AttentionGradArgs &a, cudaStream_t stream);

// r = 1 / row_norm (0 where that is 0; 1 when unnormalised), delta = d_y . y, both [b, heads_q, t].
struct RowStatsArgs {
  Shape shape;
  View y, dy;
  powerattn_tensor row_norm{};
  float *inverse = nullptr;
  float *delta = nullptr;  // may be null
};
cudaError_t row_stats(const RowStatsArgs &a, cudaStream_t stream);

// delta without the rounding error of y: sum_j w_ij (dy_i . v_j - delta_i) r_i = q_i . dq_i / p is eps r_i
// delta_i, but for that error.  delta_i <- q_i . dq_i / p + delta_i (1 - eps r_i),  q_i . dq_i <- p eps r_i
// delta_i
struct CorrectDeltaArgs {
  Shape shape;
  const float *inverse = nullptr;
  float *delta = nullptr;   // [b, heads_q, t]
  float *q_dots = nullptr;  // [b, heads_q, t]
};
cudaError_t correct_delta(const CorrectDeltaArgs &a, cudaStream_t stream);

// d_log_g[t] = boundary[chunk] + sum_{i >= t in the chunk} (sum over the group of q_i . dq_i - k_i . dk_i) / p;
// a reset (-inf) gets 0.
struct GateGradArgs {
  Shape shape;
  const float *q_dots = nullptr;    // q . dq [b, heads_q, t]
  const float *k_dots = nullptr;    // k . dk [b, heads_kv, t]
  const float *boundary = nullptr;  // [num_chunks, heads_kv] or null
  powerattn_tensor log_g{};
  powerattn_tensor out{};
  float *scratch = nullptr;  // [b, heads_kv, t]
};
cudaError_t gate_grad(const GateGradArgs &a, cudaStream_t stream);

// Shared memory that a block of each kernel needs, for the check against the device's limit.
size_t update_shared_bytes(Math math, const Problem &p);
size_t query_shared_bytes(Math math, const Problem &p);
size_t contract_shared_bytes(Math math, const Problem &p);
size_t attention_shared_bytes(Math math, const Problem &p);
size_t attention_grad_shared_bytes(Math math, const Problem &p);
// The largest of the kernels of a pass.
size_t forward_shared_bytes(Math math, const Problem &p, bool states);
size_t backward_shared_bytes(Math math, const Problem &p, bool states);

}  // namespace powerattn::cuda::generic
