// SPDX-License-Identifier: Apache-2.0
// Kernels for sm_90a: what they take and how they are launched. Plain data and host functions only.
//
// Forward:  chunk table and gate sums -> update (sums of phi(k) v^T per chunk) -> scan (sm80: the state before
//           each chunk) -> output.   Attention form: one chunk per sequence, output only.
// Backward: preprocess (delta, 1/l, weights) -> update and scan with q, dy in reverse -> dq -> dkv -> gate
//           gradient (sm80).   Attention form: preprocess -> joint (dq, dk, dv) -> gate gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/chunks.h"
#include "kernels/cuda/ranges.h"

namespace powerattn::cuda::sm90 {

struct Tensor {  // element (b, t, h, i) at data[b*stride_b + t*stride_t + h*stride_h + i]
  void *data = nullptr;
  int64_t stride_b = 0, stride_t = 0, stride_h = 0;
  int32_t vector = 0;  // every row starts at a multiple of 16 bytes
  int32_t floats = 0;  // dx only: float32, not rounded; the strides count 2 bytes
};

// What all kernels of a call share.
struct Shape {
  ChunkTable table;    // with row tiles of kRowsPerTile where a kernel owns rows
  int64_t tokens = 0;  // per batch entry: extent of t in per-token arrays [b, heads, t]
  int32_t packed = 0;
  int32_t heads_q = 1, heads_kv = 1, group = 1;
  int32_t degree = 2;
  int32_t normalize = 1;
  int32_t half = 0;       // fp16 instead of bf16
  int32_t head_dim = 64;  // = value_dim: 64 or 128
  float scale_p = 1.f;    // scale^degree
  float eps = 0.f;
};
constexpr int kOutputRows = 256;  // rows per tile of `output`

// State sums of every chunk: state[chunk][h][tile] = sum_t weight_t phi(a_t) b_t^T (bf16, swizzled tiles) and,
// normalised, norm[chunk][h] = sum_t norm_weight_t a_t a_t^T (fp32). Forward a = k, b = v; backward a = q, b =
// dy, summed over the query heads of the group.
struct UpdateArgs {
  Shape p;
  Tensor a, b;
  const float *weight = nullptr;       // [heads of a][rows]; null: 1
  const float *norm_weight = nullptr;  // null: 1
  int32_t heads_a = 1;                 // heads of a and b: heads_kv, or heads_q in the backward
  // Optional, exact only: the sum that enters nothing but the state at the end of a sequence, of its
  // last chunk (reverse: first), goes here instead, not rounded: [sequences * heads_kv][rows of all tiles][d],
  // in order.
  float *end = nullptr;
  int32_t reverse = 0;
  int32_t exact = 0;              // bfloat16: weight_t a_t in two parts, for states that leave the call
  const Range *ranges = nullptr;  // float16, of the same a, b and weights: the state is in units of bound_s
  void *state = nullptr;
  float *norm = nullptr;
  int32_t *ticket = nullptr;  // 4, zero on entry
};
// Degree 2.
cudaError_t update64(const UpdateArgs &args, int sms, cudaStream_t stream);
cudaError_t update128(const UpdateArgs &args, int sms, cudaStream_t stream);  // Z is always exact

// Weight of a key in its chunk's sum, exp(G_end - G_t) as [b, heads_kv, t].
struct GateArgs {
  Shape p;
  const double *gate = nullptr;
  float *weight = nullptr;
};
cudaError_t key_weights(const GateArgs &args, cudaStream_t stream);

// y, and row_norm when asked for, from the chunk's keys and the state before it.
struct OutputArgs {
  Shape p;
  Tensor q, k, v, y, row_norm;
  const double *gate = nullptr;  // [b, heads_kv, t]: inclusive sums inside the chunk; null: no gates
  const void *state = nullptr;   // degree 2; null: attention form
  const void *norm = nullptr;    // Z before each chunk; null: row sums without the state's part
  const Units *units = nullptr;  // of state and norm, float16
  int32_t first_has_state = 0;   // the first chunk of a sequence starts from a state
  int32_t *ticket = nullptr;     // zero on entry
  uint32_t together = 1;         // set at launch: as in row_tile_at
};
cudaError_t output64(const OutputArgs &args, int sms, cudaStream_t stream);
cudaError_t output128(const OutputArgs &args, int sms, cudaStream_t stream);

struct RowsArgs {
  Shape p;
  Tensor y, dy, row_norm;  // row_norm.data null: unnormalised, r = 1, delta = 0
  const double *gate = nullptr;
  float *r = nullptr, *delta = nullptr;             // [b, heads_q, t], optional
  float *weight = nullptr, *norm_weight = nullptr;  // chunked form
};
cudaError_t rows(const RowsArgs &args, cudaStream_t stream);

// What a call with sequences of one length begins with, in one launch: tables, gate sums, zeros; and `rows`,
// where it needs no gates.
struct BeginArgs {
  Shape p;                      // its table is filled
  powerattn_tensor log_g = {};  // data null: no gates
  double *gate = nullptr;       // [b, heads_kv, t]
  float *g = nullptr;           // the same rounded; may be null
  void *zeros[3] = {nullptr, nullptr, nullptr};
  int64_t zero_count[3] = {0, 0, 0};  // of 4 bytes
  const RowsArgs *rows = nullptr;     // weight and gate null
};
cudaError_t begin(const BeginArgs &args, cudaStream_t stream);

// float16: what bounds the weights of the backward and their gradients, four numbers for each slot (limits.cu).
struct LimitsArgs {
  Shape p;
  Tensor q, k, v, dy;
  const float *r = nullptr, *delta = nullptr;
  int32_t *out = nullptr;  // [chunk * heads_kv + head][4], zero on entry
};
cudaError_t limits(const LimitsArgs &args, cudaStream_t stream);

// dq (keys = 0: rows x = q, u = dy; columns z = k, y = v), or dk and dv (keys = 1: x = k, u = v, z = q, y =
// dy).
struct GradientArgs {
  Shape p;
  int32_t keys = 0;
  Tensor x, u, z, y, dx, dv;        // dv: keys only
  const double *gate = nullptr;     // as in OutputArgs
  const float *r = nullptr;         // [b, heads_q, t]: 1 / row norm; null: 1
  const float *delta = nullptr;     // [b, heads_q, t]: dy . y; null: 0
  const void *state = nullptr;      // S before, or dS after, each chunk; null: attention form
  const void *norm = nullptr;       // Z or dZ; null: none
  const Units *units = nullptr;     // of state and norm, float16
  const int32_t *limits = nullptr;  // float16: as `limits` left them
  int32_t end_has_state = 0;        // the first (dq) or last (keys) chunk of a sequence has a state too
  float scale_p = 1.f;
  float *dot = nullptr;  // out: x . dx [b, heads of x, t]; null: not wanted
  // Queries, degree 2, optional: delta without the rounding error of y, which is what x . dx leaves of a sum
  // that must vanish: delta_i = x . dx / p + delta_i (1 - eps r_i) (may be `delta` itself), and the weight of
  // the query in dZ, norm_weight_i = -delta_i weight_i.
  float *state_dot = nullptr;  // keys, degree 2, optional: the part of `dot` that the state gave
  float *delta_out = nullptr, *norm_weight = nullptr;
  const float *weight = nullptr;
  int32_t *ticket = nullptr;  // zero on entry
  uint32_t together = 1;      // set at launch: as in row_tile_at
};
cudaError_t gradient64(const GradientArgs &args, int sms, cudaStream_t stream);
cudaError_t gradient128(const GradientArgs &args, int sms, cudaStream_t stream);  // states of degree 2 only

// dq, dk and dv of the attention form in one pass, degrees 2 and 4: five products for each pair of tokens,
// where `gradient` needs seven. Blocks own keys; dq is added up in memory, block of keys after block of keys,
// in an order that is always the same.
struct JointArgs {
  Shape p;
  Tensor q, k, v, dy, dq, dk, dv;
  const double *gate = nullptr;  // as in OutputArgs
  const float *r = nullptr;      // as in GradientArgs
  const float *delta = nullptr;
  float *dot = nullptr;      // out: k . dk [b, heads_kv, t]; null: not wanted
  float *q_dot = nullptr;    // out: q . dq [b, heads_q, t]; null: not wanted. head_dim 128: zero on entry
  float *sums = nullptr;     // joint_sums(..), of dq
  int32_t *turns = nullptr;  // joint_turns(..), zero on entry
  const int32_t *limits = nullptr;  // float16: as `limits` left them
  int32_t *ticket = nullptr;        // zero on entry
  // Set at launch: sequences and kv heads in work at a time, and blocks of keys of each.
  uint32_t together = 1, blocks = 1;
};
constexpr int kJointRows = 128;  // queries of a sum, keys of a block; the tiles of `table` have two of them
constexpr int64_t joint_turns(int64_t tiles, int64_t heads_q) {
  return tiles * (kOutputRows / kJointRows) * heads_q;
}
constexpr int64_t joint_sums(int64_t tiles, int64_t heads_q, int64_t head_dim) {
  return joint_turns(tiles, heads_q) * kJointRows * head_dim;
}
cudaError_t joint64(const JointArgs &args, int sms, cudaStream_t stream);
cudaError_t joint128(const JointArgs &args, int sms, cudaStream_t stream);

}  // namespace powerattn::cuda::sm90
