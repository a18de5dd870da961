// SPDX-License-Identifier: Apache-2.0
// Arguments of the mma.sync kernels. Plain data and host-callable launches; no device code.
//
// Notation: s_ij = q_i . k_j (no scale), g = cumulative log gate inside the chunk, c = scale^p, l_i = row norm,
// r_i = 1 / l_i (0 where l_i = 0; 1 when unnormalised), delta_i = d_y_i . y_i (0 when unnormalised).
// Shapes: g [b, heads_kv, t], r and delta [b, heads_q, t], contiguous float. Slots are chunk * heads_kv + head.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../chunks.h"
#include "../ranges.h"
#include "../tiles.h"
#include "problem.h"

namespace powerattn::cuda::sm80 {

constexpr int kRowTile = 128;  // rows of a thread block that owns rows

// Shared memory that a block needs, the most of all kernels of a head dimension: 66 KB (d = 64), 131 KB (128).
size_t shared_bytes(int64_t head_dim);

struct Shape {
  ChunkTable table;  // with tiles of kRowTile rows
  bool packed = false;
  int32_t degree = 2;
  int32_t heads_q = 1;
  int32_t heads_kv = 1;
  int32_t head_dim = 64;  // = value_dim
  int64_t seq_len = 0;
  Dtype dtype = Dtype::kBfloat16;
};

// Ranges of all slots, in the direction of UpdateArgs. x and u are read once.
struct RangeArgs {
  Shape shape;
  bool reverse = false;
  powerattn_tensor x{}, u{};
  const float *g = nullptr;
  const float *r = nullptr;
  const float *delta = nullptr;  // of Z alone; reverse without it: no sums into Z
  float scale = 1.f;
  Range *out = nullptr;
};
cudaError_t ranges(const RangeArgs &a, cudaStream_t stream);

// out_r = sum over visible columns c of f(x_r . z_c) u_c + the state's part, divided by its own sum if asked.
//   forward (reverse = false): rows are queries, x = q, z = k, u = v, columns j <= i of the chunk
//     y_i = (c e^{g_i} phi(q_i) S + sum_j c e^{g_i - g_j} s_ij^p v_j) / l_i
//   reverse: rows are keys, x = k, z = q, u = d_y, columns i >= j, summed over the query heads of the group
//     dv_j = e^{g_end - g_j} phi(k_j) dS + sum_i c e^{g_i - g_j} r_i s_ij^p d_y_i
struct OutputArgs {
  Shape shape;
  bool reverse = false;
  bool normalize = false;  // forward only
  powerattn_tensor x{}, z{}, u{}, out{};
  const float *g = nullptr;       // or null: no gates
  const float *r = nullptr;       // reverse; null = 1
  const void *state = nullptr;    // tiles of S (dS) per slot, or null: no state
  const void *z_state = nullptr;  // forward, for the row sums: Z in two parts per slot
  const Units *units = nullptr;   // of state and z_state, float16
  float scale = 1.f;              // c
  float eps = 0.f;
  powerattn_tensor row_norm{};  // forward: optional out, [b, t, heads_q] float
};
cudaError_t output(const OutputArgs &a, cudaStream_t stream);

// Degree 1 has no Z. Adds to the row sums that output() wrote what earlier chunks give:
//   row_norm_i += c e^{g_i} q_i . z,  z = sum over the tokens before the chunk of e^{..} k_t
struct NormArgs {
  Shape shape;
  powerattn_tensor q{}, k{};
  const float *g = nullptr;
  float scale = 1.f;
  float *z = nullptr;  // scratch [slots][d]
  powerattn_tensor row_norm{};
};
cudaError_t add_norms(const NormArgs &a, cudaStream_t stream);

// The gradient of x, with e_rc the gradient of s_rc (m = u_r . y_c):
//   dq: x = q, u = d_y, z = k, y = v      e_ij = p c e^{g_i - g_j} s_ij^{p-1} (m - delta_i) r_i
//   dk: x = k, u = v, z = q, y = d_y      the same e_ij; reverse = true, summed over the group
//   dx_r = sum_c e_rc z_c + state part: d/dx_r of phi(x_r) State u_r + x_r Z x_r
struct GradientArgs {
  Shape shape;
  bool reverse = false;
  powerattn_tensor x{}, u{}, z{}, y{}, out{};
  const float *g = nullptr;
  const float *r = nullptr;       // null = 1
  const float *delta = nullptr;   // null = 0
  const void *state = nullptr;    // S for dq, dS for dk
  const void *z_state = nullptr;  // Z for dq, dZ for dk
  const Units *units = nullptr;   // of state and z_state, float16
  float scale = 1.f;
  float *out_float = nullptr;  // if given, instead of out: contiguous [b, heads of x, t, d]
  // Queries, optional out (may be `delta` itself): delta without the rounding error of y. What x . dx leaves of
  // sum_j w_ij (m_ij - delta_i) r_i is that error: delta_i = x . dx / p + delta_i (1 - eps r_i).
  float *delta_out = nullptr;
  float eps = 0.f;
  float *dot = nullptr;        // optional out: x_r . dx_r in float, [b, heads of x, t]
  float *state_dot = nullptr;  // optional out: the part of it that the state gave
};
cudaError_t gradient(const GradientArgs &a, cudaStream_t stream);

// Sums of one chunk into state tiles, or, as_z, into Z: float [slot][d][d] (degree 1 of x with u = x).
//   forward: local = W sum_t e^{g_end - g_t} phi(k_t) v_t^T
//   reverse: local = W sum_t c e^{g_t} r_t phi(q_t) d_y_t^T over the group; as_z: with -delta_t, u = q
struct UpdateArgs {
  Shape shape;
  bool reverse = false;
  bool as_z = false;
  powerattn_tensor x{}, u{};
  const float *g = nullptr;
  const float *r = nullptr;
  const float *delta = nullptr;
  float scale = 1.f;
  const Range *ranges = nullptr;  // float16, of the same x, u and weights
  void *local = nullptr;          // tiles (float16: in units of bound_s), or float when as_z
  // Optional: the sum that enters nothing but the final state, of each sequence's last chunk (reverse: first),
  // goes here instead, not rounded: float [sequences * heads_kv][rows of all tiles][d], rows and columns in
  // order.
  float *end_local = nullptr;
};
cudaError_t update(const UpdateArgs &a, cudaStream_t stream);

// The products that the gradient of the gates takes from states: of each slot, <S before the chunk, dS after
// it> and <Z, dZ> over canonical rows, in parts, a warp's sum each. Read off the scan of dS, whose carries are
// float32; S is what the scan before left. float16: in the units of both.
POWERATTN_HD constexpr int64_t state_parts(int degree, int d) {
  return static_cast<int64_t>(degree == 1 ? d : tile_rows(2, d)) * d / 8 / 32;
}
POWERATTN_HD constexpr int64_t product_parts(int degree, int d) {  // those of Z stand last
  return state_parts(degree, d) + (degree == 1 ? 0 : static_cast<int64_t>(d) * d / 32);
}
struct ProductArgs {
  bool after = false;             // S after the chunk, of all chunks but a sequence's last (whose dS is 0)
  const void *tiles = nullptr;    // prefix of S per slot
  const void *z_tiles = nullptr;  // or null: no <Z, dZ>
  const Units *units = nullptr;   // float16
  powerattn_state initial{};      // what stands in the first slot, canonical float32, or s, z = null: zero
  float *out = nullptr;           // [slots][product_parts]; null: no products
};

// local -> prefix in place: slot n becomes the carry before chunk n (reverse: after), carry = e^{g_end} carry +
// local, float. States at the ends are canonical. Z: float locals in, [slot][2 d][d] high and low parts out.
// float16: the bounds of the ranges are carried along and give the units.
constexpr int kPeaks = 16;  // parts of a state whose largest elements are found at once
struct ScanArgs {
  Shape shape;
  bool reverse = false;
  const float *g = nullptr;
  void *tiles = nullptr;           // in place
  const float *z_local = nullptr;  // or null: no normaliser
  void *z_tiles = nullptr;
  powerattn_state initial{};         // canonical float32, or s = null
  powerattn_state final{};           // canonical float32 out, or s = null
  const float *end_local = nullptr;  // as update wrote it, or null
  const Range *ranges = nullptr;     // float16: as update read them
  Units *units = nullptr;            // float16, out: of the prefixes
  Bounds *peaks = nullptr;           // float16 with an initial state: scratch [sequences * heads_kv][kPeaks]
  ProductArgs products;              // reverse
};
cudaError_t scan(const ScanArgs &a, cudaStream_t stream);

// r_i and delta_i from the row norms and outputs; row_norm null: r = 1, delta = 0 is implied and nothing runs.
struct RowsArgs {
  Shape shape;
  powerattn_tensor y{}, d_y{}, row_norm{};
  float *r = nullptr;
  float *delta = nullptr;
};
cudaError_t rows(const RowsArgs &a, cudaStream_t stream);

// delta of rows that see few keys, over what rows() left there, from float32 weights (delta.cu).
struct DeltaArgs {
  Shape shape;
  powerattn_tensor q{}, k{}, v{}, d_y{}, row_norm{}, log_g{};
  const float *g = nullptr;  // with gates: their sums in the chunk, in either precision
  const double *g64 = nullptr;
  float scale = 1.f;  // c
  float eps = 0.f;
  float *delta = nullptr;
  // Optional: -delta_i weight_i, its weight in dZ, is kept up.
  const float *weight = nullptr;
  float *norm_weight = nullptr;
};
cudaError_t delta(const DeltaArgs &a, cudaStream_t stream);

// dlog_g_t = X + sum over tokens i >= t of the chunk (q_i . dq_i - k_i . dk_i) / p, where X = <state after the
// chunk, its gradient>. Normalised, q_i . dq_i / p = eps r_i delta_i, with the delta that gradient() gave back.
// The chunk's own part of X is the sum of what the state gave to k_i . dk_i / p: taken from there it cancels
// without an error. What is left is a product of states: X = e^{g_end} <state before, gradient after> + that
// sum.
struct GateArgs {
  Shape shape;
  const float *q_dot = nullptr;  // [b, heads_q, t], unnormalised; null: r, delta, eps
  const float *k_dot = nullptr;  // [b, heads_kv, t]
  const float *r = nullptr;
  const float *delta = nullptr;
  float eps = 0.f;
  ProductArgs products;            // as the scan of dS got them; without `out`: no state, X = 0
  const Units *d_units = nullptr;  // float16: of dS
  const float *g = nullptr;
  const float *k_state_dot =
      nullptr;  // [b, heads_kv, t]; null with products of states `after` a chunk: X whole
  powerattn_tensor d_log_g{};
};
cudaError_t gate_gradient(const GateArgs &a, cudaStream_t stream);

}  // namespace powerattn::cuda::sm80
