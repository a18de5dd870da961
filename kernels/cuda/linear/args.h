// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels of degree 1, where phi(x) = x and everything is bound by memory. Plain data and
// host-callable launches; no device code.
//
// A chunk is one stretch of a sequence that one thread block walks from end to end, 64 tokens at a time, with
// its state in float32 registers. So chunks are long and few, and states barely touch memory:
//   1. update: the sum of every chunk       local = sum_t e^{G_C - G_t} k_t v_t^T          reads k, v
//   2. scan:   local -> state before every chunk                                           small
//   3. output: walks every chunk from its state                                            reads q, k, v,
//   writes y
// A problem with one chunk per sequence runs 3 alone.
//
// The gradients are walks too (`reverse`: from the last token to the first, columns i >= j):
//   dq = walk(x = dy, z = v, u = k, S^T)       dv = reverse walk(x = k, z = q, u = dy, dS)
//                                              dk = reverse walk(x = v, z = dy, u = q, dS^T)
// Degree 1 is never normalised, so there is no row sum in them.
// Slots are chunk * heads_kv + head. States are float32, [slot][head_dim][head_dim], z [slot][head_dim].
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../chunks.h"
#include "problem.h"

namespace powerattn::cuda::linear {

constexpr int kBlock = 64;  // tokens of one step of a walk

// Shared memory that a block needs, the most of all kernels of a head dimension.
size_t shared_bytes(int64_t head_dim);
// Blocks of `output` that one multiprocessor of 228 KB holds at once.
int resident_blocks(int64_t head_dim);

struct Shape {
  ChunkTable table;  // packed: filled on the device; else its bounds only
  bool packed = false;
  bool half = false;  // float16 instead of bfloat16
  int32_t heads_q = 1;
  int32_t heads_kv = 1;
  int32_t head_dim = 64;     // = value_dim
  int32_t per_sequence = 0;  // chunks of a sequence, when not packed
  int64_t seq_len = 0;
  powerattn_tensor log_g{};  // [b, t, heads_kv], or data = null
};

// Sums of one chunk, from its end (reverse: its start, over the query heads of the group).
struct UpdateArgs {
  Shape shape;
  bool reverse = false;
  bool exact = false;         // weights to float32's precision, for states that a caller gets
  powerattn_tensor x{}, u{};  // k, v; reverse: q, d_y
  float scale = 1.f;          // of every weight
  float *local = nullptr;
  float *z_local = nullptr;  // or null
  float *decay = nullptr;    // out [slots]: e^{G_C}; unused without gates
};
cudaError_t update(const UpdateArgs &a, cudaStream_t stream);

// local -> state before (reverse: after) every chunk, in place: carry = e^{G_C} carry + local.
struct ScanArgs {
  Shape shape;
  bool reverse = false;
  const float *decay = nullptr;
  float *state = nullptr;
  float *z = nullptr;         // or null
  powerattn_state initial{};  // canonical float32, or s = null: zero
  powerattn_state final{};    // canonical float32 out, or s = null
  float *end = nullptr;       // optional: the final states as slots [sequence * heads_kv], S then z as above
  float *z_end = nullptr;
};
cudaError_t scan(const ScanArgs &a, cudaStream_t stream);

// out_r = state_scale e^{G_r} x_r . State + sum over visible c of pair_scale e^{G_r - G_c} (x_r . z_c) u_c, and
// the state goes on with sum_scale z_c u_c^T.
struct OutputArgs {
  Shape shape;
  bool reverse = false;
  bool transposed = false;  // the state is read as [column][row]
  powerattn_tensor x{}, z{}, u{}, out{};
  const float *state = nullptr;
  const float *z_state = nullptr;  // with row_norm
  powerattn_state initial{};  // without `state`: where every sequence, one chunk each, starts; s = null: zero
  float state_scale = 1.f, pair_scale = 1.f, sum_scale = 1.f;
  powerattn_tensor row_norm{};  // optional out [b, t, heads of x] float: the same sum with u = 1, + eps
  float eps = 0.f;
  // Of gradients, which have no row_norm:
  const float *bias = nullptr;  // optional [slot][head_dim]: added to x_r . State, decays with it (of z: dz)
  float *out_float = nullptr;   // if given, instead of out: contiguous [b, heads of x, t, head_dim]
  powerattn_tensor partner{};   // optional, as out: the input whose gradient out is
  // With partner, out [head_dim / 64][b, heads of x, t]: partner_r . out_r over 64 columns each, not rounded.
  float *dot = nullptr;
  int64_t dot_plane = 0;  // b heads t
};
cudaError_t output(const OutputArgs &a, cudaStream_t stream);

// dlog_g_t = <S_C, R_C> + z_C . r_C + sum over tokens i >= t of the chunk (q_i . dq_i - k_i . dk_i), with the
// state S, z after the chunk and its gradient R, r.
struct GateArgs {
  Shape shape;
  const float *q_dot = nullptr;  // [head_dim / 64][b, heads_q, t]
  const float *k_dot = nullptr;  // [head_dim / 64][b, heads_kv, t]
  int64_t q_plane = 0, k_plane = 0;
  const float *state = nullptr;  // before every chunk; null: nothing crosses a chunk's end
  const float *z = nullptr;
  const float *end = nullptr;  // after the last chunk of every sequence, or null: its gradient is zero
  const float *z_end = nullptr;
  const float *d_state = nullptr;  // after every chunk
  const float *d_z = nullptr;      // or null: zero
  bool first_has_state = false;    // sequences start from an initial state
  powerattn_tensor d_log_g{};
};
cudaError_t gate_gradient(const GateArgs &a, cudaStream_t stream);

}  // namespace powerattn::cuda::linear
