// SPDX-License-Identifier: Apache-2.0
// cuda.generic: the sequence of generic kernels for each operation. generic_plan.cpp decides when it is chosen,
// and where its memory lies.
#include "kernels/cuda/generic/generic.h"

#include <algorithm>
#include <cmath>

#include "common.h"
#include "generic_plan.h"
#include "generic_step.h"
#include "kernels/cuda/prepare.h"
#include "kernels/cuda/scan.h"
#include "kernels/cuda/states.h"
#include "state_layout.h"

namespace powerattn {
namespace {

using namespace cuda;           // NOLINT: this file is that namespace's host side
using namespace cuda::generic;  // NOLINT

constexpr cudaError_t kOk = cudaSuccess;

#define POWERATTN_TRY(call)                   \
  do {                                        \
    const cudaError_t error_ = (call);        \
    if (error_ != cudaSuccess) return error_; \
  } while (0)

struct Call {
  const Problem &p;
  cudaStream_t stream;
  Math math;        // of the attention inside chunks
  Math state_math;  // of everything against states
  Shape shape;
  Buffers b;
};

powerattn_tensor contiguous(const Problem &p, void *data, int64_t heads, int64_t dim) {
  return {data, heads * p.seq_len * dim, dim, p.seq_len * dim};
}

// Tables, gates and the shape that every kernel gets.
cudaError_t begin(Call *c, int64_t chunk, const int64_t *cu_seqlens, const powerattn_tensor &log_g) {
  const Problem &p = c->p;
  Shape &s = c->shape;
  POWERATTN_TRY(build_chunks(p, chunk, kRows, cu_seqlens, c->b.tables, &s.table, c->stream));
  s.packed = p.packed;
  s.gated = log_g.data != nullptr;
  s.normalize = p.normalize;
  s.degree = p.degree;
  s.heads_q = p.heads_q;
  s.heads_kv = p.heads_kv;
  s.group = p.group();
  s.d = p.head_dim;
  s.e = p.value_dim;
  s.seq_len = p.seq_len;
  s.rows = p.state_rows;
  s.scale = float(p.scale);
  s.scale_p = float(std::pow(p.scale, p.degree));
  s.eps = float(p.eps);
  s.dtype = p.dtype;
  s.g = c->b.g64;
  if (s.gated) POWERATTN_TRY(chunk_gates(p, s.table, log_g, c->b.g, c->b.g64, c->stream));
  return kOk;
}

// The tensor itself, or its rotated copy in the workspace.
cudaError_t rotated(Call *c, const powerattn_tensor &in, int64_t heads, const int64_t *rope_offset, void *copy,
                    View *view) {
  const Problem &p = c->p;
  if (p.rope.style == POWERATTN_ROPE_NONE) {
    *view = view_of(p, in, p.head_dim, p.dtype);
    return kOk;
  }
  PrepareArgs a;
  a.in = in;
  a.in_dtype = a.out_dtype = p.dtype;
  a.out = copy;
  a.heads = heads;
  a.dim = p.head_dim;
  a.rope = true;
  a.rope_offset = rope_offset;
  *view = view_of(p, contiguous(p, copy, heads, p.head_dim), p.head_dim, p.dtype);
  return prepare(p, c->shape.table, a, c->stream);
}

// A float32 state of the caller as it is, or a contiguous float32 copy of a bfloat16 one.
struct FloatState {
  float *s = nullptr, *z = nullptr;
  int64_t s_n = 0, s_h = 0, z_n = 0, z_h = 0;
};
FloatState contiguous_state(const Problem &p, float *s, float *z) {
  const int64_t per = p.state_rows * p.value_dim;
  return {s, z, p.heads_kv * per, per, p.heads_kv * p.state_rows, p.state_rows};
}
FloatState direct_state(const powerattn_state &x) {
  return {static_cast<float *>(x.s),
          static_cast<float *>(x.z),
          x.s_stride_n,
          x.s_stride_h,
          x.z_stride_n,
          x.z_stride_h};
}
cudaError_t convert_state(const Call &c, const powerattn_state &user, const FloatState &copy, bool to_user) {
  const Problem &p = c.p;
  auto part = [&](void *u, int64_t un, int64_t uh, float *f, int64_t fn, int64_t fh, int64_t elements) {
    ConvertArgs a;
    a.count = a.src_num_slots = a.dst_num_slots = p.sequences;
    a.heads = p.heads_kv;
    a.elements = elements;
    a.src = to_user ? static_cast<const void *>(f) : u;
    a.src_dtype = to_user ? Dtype::kFloat32 : p.state_dtype;
    a.src_stride_n = to_user ? fn : un;
    a.src_stride_h = to_user ? fh : uh;
    a.dst = to_user ? u : f;
    a.dst_dtype = to_user ? p.state_dtype : Dtype::kFloat32;
    a.dst_stride_n = to_user ? un : fn;
    a.dst_stride_h = to_user ? uh : fh;
    return convert(a, c.stream);
  };
  POWERATTN_TRY(
      part(user.s, user.s_stride_n, user.s_stride_h, copy.s, copy.s_n, copy.s_h, p.state_rows * p.value_dim));
  if (user.z)
    POWERATTN_TRY(part(user.z, user.z_stride_n, user.z_stride_h, copy.z, copy.z_n, copy.z_h, p.state_rows));
  return kOk;
}
// Which: 0 = the initial state, 1 = the gradient of the final one.
cudaError_t read_state(const Call &c, const powerattn_state &user, int which, FloatState *out) {
  const Problem &p = c.p;
  *out = FloatState{};
  if (!user.s) return kOk;
  if (p.state_dtype == Dtype::kFloat32) {
    *out = direct_state(user);
    return kOk;
  }
  const int64_t ends = p.sequences * p.heads_kv;
  *out = contiguous_state(p, c.b.initial_s + which * ends * p.state_rows * p.value_dim,
                          user.z ? c.b.initial_z + which * ends * p.state_rows : nullptr);
  return convert_state(c, user, *out, false);
}

// Both scans of a pass: prefix sums of (S, z) in place or into the operand type; carry from `from`, last carry
// to `to`.
cudaError_t scan_states(const Call &c, const StateBuffers &b, bool reverse, const FloatState &from,
                        const FloatState &to, bool keep_prefix) {
  const Problem &p = c.p;
  ScanArgs a;
  a.table = c.shape.table;
  a.packed = p.packed;
  a.reverse = reverse;
  a.heads = p.heads_kv;
  a.elements = p.state_rows * p.value_dim;
  a.local = b.s;
  a.prefix = keep_prefix ? b.prefix : b.s;
  a.prefix_dtype = keep_prefix ? operand_dtype(c.state_math) : Dtype::kFloat32;
  a.g = c.shape.gated ? c.b.g : nullptr;
  a.seq_len = p.seq_len;
  a.initial = from.s;
  a.initial_stride_n = from.s_n;
  a.initial_stride_h = from.s_h;
  a.final = to.s;
  a.final_stride_n = to.s_n;
  a.final_stride_h = to.s_h;
  POWERATTN_TRY(scan(a, c.stream));
  a.elements = p.state_rows;
  a.local = b.z;
  a.prefix = b.z;
  a.prefix_dtype = Dtype::kFloat32;
  a.initial = from.z;
  a.initial_stride_n = from.z_n;
  a.initial_stride_h = from.z_h;
  a.final = to.z;
  a.final_stride_n = to.z_n;
  a.final_stride_h = to.z_h;
  return scan(a, c.stream);
}

cudaError_t key_sums(const Call &c, const View &k, const View &v) {
  UpdateArgs a;
  a.shape = c.shape;
  a.x = k;
  a.u = v;
  a.table = c.b.monomials;
  a.s = c.b.state.s;
  a.z = c.b.state.z;
  return update(c.state_math, a, c.stream);
}

cudaError_t query_sums(const Call &c, const View &q, const View &dy, const StateBuffers &out) {
  UpdateArgs a;
  a.shape = c.shape;
  a.queries = true;
  a.x = q;
  a.u = dy;
  a.inverse = c.b.inverse;
  a.delta = c.b.delta;
  a.table = c.b.monomials;
  a.s = out.s;
  a.z = out.z;
  return update(c.state_math, a, c.stream);
}

cudaError_t run_forward(Call *c, const Tiling &t, const powerattn_forward_args &args) {
  const Problem &p = c->p;
  const cudaStream_t stream = c->stream;
  POWERATTN_TRY(begin(c, chunk_of(p, t), args.cu_seqlens, args.log_g));
  const ChunkTable &table = c->shape.table;

  AttentionArgs a;
  a.shape = c->shape;
  POWERATTN_TRY(rotated(c, args.q, p.heads_q, args.rope_offset, c->b.q, &a.q));
  POWERATTN_TRY(rotated(c, args.k, p.heads_kv, args.rope_offset, c->b.k, &a.k));
  a.v = view_of(p, args.v, p.value_dim, p.dtype);
  a.y = args.y;
  a.row_norm = args.row_norm;

  const bool initial = args.initial_state.s != nullptr, final = args.final_state.s != nullptr;
  if (t.form == Form::kChunked || initial || final) {
    FloatState from, to;
    POWERATTN_TRY(read_state(*c, args.initial_state, 0, &from));
    if (final)
      to = p.state_dtype == Dtype::kFloat32
               ? direct_state(args.final_state)
               : contiguous_state(p, c->b.final_s, args.final_state.z ? c->b.final_z : nullptr);
    POWERATTN_TRY(monomials(p, c->b.monomials, stream));
    POWERATTN_TRY(key_sums(*c, a.k, a.v));
    POWERATTN_TRY(scan_states(*c, c->b.state, false, from, to, true));
    if (final && p.state_dtype != Dtype::kFloat32) POWERATTN_TRY(convert_state(*c, args.final_state, to, true));
    if (t.form == Form::kChunked || initial) {
      QueryArgs q;
      q.shape = c->shape;
      q.edge = initial;
      q.x = a.q;
      q.table = c->b.monomials;
      q.s = c->b.state.prefix;
      q.z = c->b.state.z;
      q.out = c->b.state_out;
      q.norm = c->b.state_norm;
      POWERATTN_TRY(query(c->state_math, q, stream));
      a.state_out = c->b.state_out;
      a.state_norm = c->b.state_norm;
    }
  }
  POWERATTN_TRY(attention(c->math, a, stream));
  POWERATTN_TRY(zero_padding(p, table, args.y, p.dtype, p.heads_q, p.value_dim, stream));
  return zero_padding(p, table, args.row_norm, Dtype::kFloat32, p.heads_q, 1, stream);
}

// Gradients of rows: rotated back, rounded, padding zeroed.
cudaError_t store_gradient(const Call &c, const float *in, const powerattn_tensor &out, int64_t heads,
                           int64_t dim, bool rope, const int64_t *rope_offset) {
  FinishArgs f;
  f.in = in;
  f.out = out;
  f.out_dtype = c.p.dtype;
  f.heads = heads;
  f.dim = dim;
  f.rope = rope && c.p.rope.style != POWERATTN_ROPE_NONE;
  f.rope_offset = rope_offset;
  return finish(c.p, c.shape.table, f, c.stream);
}

cudaError_t run_backward(Call *c, const Tiling &t, const powerattn_backward_args &args) {
  const Problem &p = c->p;
  const cudaStream_t stream = c->stream;
  POWERATTN_TRY(begin(c, chunk_of(p, t), args.cu_seqlens, args.log_g));
  const ChunkTable &table = c->shape.table;
  Buffers &b = c->b;

  View q, k;
  POWERATTN_TRY(rotated(c, args.q, p.heads_q, args.rope_offset, b.q, &q));
  POWERATTN_TRY(rotated(c, args.k, p.heads_kv, args.rope_offset, b.k, &k));
  const View v = view_of(p, args.v, p.value_dim, p.dtype), dy = view_of(p, args.d_y, p.value_dim, p.dtype);

  RowStatsArgs stats;
  stats.shape = c->shape;
  stats.dy = dy;
  stats.row_norm = args.row_norm;
  stats.inverse = b.inverse;
  if (args.y.data) {
    stats.y = view_of(p, args.y, p.value_dim, p.dtype);
    stats.delta = b.delta;
  }
  POWERATTN_TRY(row_stats(stats, stream));

  const bool initial = args.initial_state.s != nullptr, d_final = args.d_final_state.s != nullptr,
             d_initial = args.d_initial_state.s != nullptr, gate = args.d_log_g.data != nullptr;
  const bool chunked = t.form == Form::kChunked;
  const bool query_state = chunked || initial;               // S is read
  const bool key_state = chunked || d_final;                 // dS is read
  const bool grad_states = chunked || d_final || d_initial;  // and returned
  FloatState from, d_from;
  POWERATTN_TRY(read_state(*c, args.initial_state, 0, &from));
  POWERATTN_TRY(read_state(*c, args.d_final_state, 1, &d_from));
  if (query_state || grad_states) POWERATTN_TRY(monomials(p, b.monomials, stream));
  if (query_state) {
    POWERATTN_TRY(key_sums(*c, k, v));
    POWERATTN_TRY(scan_states(*c, b.state, false, from, FloatState(), true));
  }

  // Padding rows have no products; their terms are read all the same.
  if (p.packed) {
    POWERATTN_TRY(cudaMemsetAsync(b.q_dots, 0, rows_q(p) * sizeof(float), stream));
    POWERATTN_TRY(cudaMemsetAsync(b.k_dots, 0, rows_kv(p) * sizeof(float), stream));
  }

  // Queries: the state's part of the row gradients, then the part of the chunk's own tokens on top.
  ContractArgs contraction;
  contraction.shape = c->shape;
  contraction.inverse = b.inverse;
  contraction.delta = b.delta;
  contraction.table = b.monomials;
  if (query_state) {
    contraction.queries = true;
    contraction.edge = initial;
    contraction.x = q;
    contraction.u = dy;
    contraction.s = b.state.prefix;
    contraction.z = p.normalize ? b.state.z : nullptr;
    contraction.out = b.dq;
    contraction.dots = b.q_dots;
    POWERATTN_TRY(contract(c->state_math, contraction, stream));
  }
  AttentionGradArgs a;
  a.shape = c->shape;
  a.q = q;
  a.k = k;
  a.v = v;
  a.dy = dy;
  a.inverse = b.inverse;
  a.delta = b.delta;
  a.out = b.dq;
  a.dots = b.q_dots;
  a.accumulate = query_state;
  POWERATTN_TRY(attention_grad_q(c->math, a, stream));
  // Everything below reads delta; of a float32 y it has no error to speak of.
  if (stats.delta && p.normalize && p.dtype != Dtype::kFloat32) {
    CorrectDeltaArgs correct;
    correct.shape = c->shape;
    correct.inverse = b.inverse;
    correct.delta = b.delta;
    correct.q_dots = b.q_dots;
    POWERATTN_TRY(correct_delta(correct, stream));
  }

  if (grad_states) {
    POWERATTN_TRY(query_sums(*c, q, dy, b.grad));
    FloatState to;
    if (d_initial) {
      if (p.state_dtype == Dtype::kFloat32) {
        to = direct_state(args.d_initial_state);
      } else {
        to = contiguous_state(p, b.initial_s, args.d_initial_state.z ? b.initial_z : nullptr);
      }
    }
    POWERATTN_TRY(scan_states(*c, b.grad, true, d_from, to, true));
    if (d_initial && p.state_dtype != Dtype::kFloat32)
      POWERATTN_TRY(convert_state(*c, args.d_initial_state, to, true));
  }

  // Keys and values.
  if (key_state) {
    contraction.queries = false;
    contraction.edge = d_final;
    contraction.x = k;
    contraction.u = v;
    contraction.s = b.grad.prefix;
    contraction.z = b.grad.z;
    contraction.out = b.dk;
    contraction.dots = b.k_dots;
    POWERATTN_TRY(contract(c->state_math, contraction, stream));
    QueryArgs values;
    values.shape = c->shape;
    values.queries = false;
    values.edge = d_final;
    values.x = k;
    values.table = b.monomials;
    values.s = b.grad.prefix;
    values.out = b.dv;
    POWERATTN_TRY(query(c->state_math, values, stream));
  }
  // The gradient of what leaves a chunk in its state, for the gates; k_dots holds the state's part alone here.
  const float *edge = nullptr;
  if (gate && key_state) {
    BoundaryArgs x;
    x.table = table;
    x.packed = p.packed;
    x.heads = p.heads_kv;
    x.seq_len = p.seq_len;
    x.elements = p.state_rows * p.value_dim;
    x.state = query_state ? b.state.s : nullptr;
    x.grad = b.grad.s;
    x.g = c->shape.gated ? c->shape.g : nullptr;
    x.own = b.k_dots;
    x.own_scale = 1.0f / float(p.degree);
    x.out = b.boundary;
    POWERATTN_TRY(boundary(x, stream));
    if (query_state) {
      x.elements = p.state_rows;
      x.state = b.state.z;
      x.grad = b.grad.z;
      x.own = nullptr;
      x.accumulate = true;
      POWERATTN_TRY(boundary(x, stream));
    }
    edge = b.boundary;
  }
  a.accumulate = key_state;
  a.out = b.dk;
  a.dots = b.k_dots;
  POWERATTN_TRY(attention_grad_k(c->math, a, stream));
  a.out = b.dv;
  POWERATTN_TRY(attention_grad_v(c->math, a, stream));

  POWERATTN_TRY(store_gradient(*c, b.dq, args.d_q, p.heads_q, p.head_dim, true, args.rope_offset));
  POWERATTN_TRY(store_gradient(*c, b.dk, args.d_k, p.heads_kv, p.head_dim, true, args.rope_offset));
  POWERATTN_TRY(store_gradient(*c, b.dv, args.d_v, p.heads_kv, p.value_dim, false, nullptr));
  if (gate) {
    GateGradArgs gates;
    gates.shape = c->shape;
    gates.q_dots = b.q_dots;
    gates.k_dots = b.k_dots;
    gates.boundary = edge;
    gates.log_g = args.log_g;
    gates.out = args.d_log_g;
    gates.scratch = b.scratch;
    POWERATTN_TRY(gate_grad(gates, stream));
    POWERATTN_TRY(zero_padding(p, table, args.d_log_g, Dtype::kFloat32, p.heads_kv, 1, stream));
  }
  return kOk;
}

Call make_call(const powerattn_plan &plan, void *stream, Pass pass) {
  const Math math = math_of(plan.problem);
  return Call{plan.problem, stream_of(stream), math, pass == Pass::kForward ? math : backward_state_math(math),
              Shape{},      Buffers{}};
}

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  const Problem &p = plan.problem;
  const DeviceGuard guard(p.device_index);
  if (guard.error() != kOk) return check_launch(guard.error(), "forward");
  Call c = make_call(plan, args.stream, Pass::kForward);
  carve(p, chunk_of(p, plan.tiling), with_states(p, plan.tiling), Pass::kForward, args.workspace, &c.b);
  return check_launch(run_forward(&c, plan.tiling, args), "forward");
}

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  const Problem &p = plan.problem;
  const DeviceGuard guard(p.device_index);
  if (guard.error() != kOk) return check_launch(guard.error(), "backward");
  Call c = make_call(plan, args.stream, Pass::kBackward);
  carve(p, chunk_of(p, plan.tiling), with_states(p, plan.tiling), Pass::kBackward, args.workspace, &c.b);
  return check_launch(run_backward(&c, plan.tiling, args), "backward");
}

// The final state of sums that start from nothing.
cudaError_t finish_summary(const Call &c, const StateBuffers &b, bool reverse, const powerattn_state &out) {
  const Problem &p = c.p;
  const bool same = p.state_dtype == Dtype::kFloat32;
  const FloatState to =
      same ? direct_state(out) : contiguous_state(p, c.b.final_s, out.z ? c.b.final_z : nullptr);
  POWERATTN_TRY(scan_states(c, b, reverse, FloatState{}, to, false));
  return same ? kOk : convert_state(c, out, to, true);
}

cudaError_t run_summary(Call *c, const powerattn_summary_args &args) {
  const Problem &p = c->p;
  POWERATTN_TRY(begin(c, summary_chunk(p), args.cu_seqlens, args.log_g));
  View k;
  POWERATTN_TRY(rotated(c, args.k, p.heads_kv, args.rope_offset, c->b.k, &k));
  POWERATTN_TRY(monomials(p, c->b.monomials, c->stream));
  POWERATTN_TRY(key_sums(*c, k, view_of(p, args.v, p.value_dim, p.dtype)));
  POWERATTN_TRY(finish_summary(*c, c->b.state, false, args.state));
  if (!args.total_log_g) return kOk;
  return total_gates(p, c->shape.table, args.log_g, static_cast<float *>(args.total_log_g), c->stream);
}

cudaError_t run_summary_reverse(Call *c, const powerattn_summary_reverse_args &args) {
  const Problem &p = c->p;
  POWERATTN_TRY(begin(c, summary_chunk(p), args.cu_seqlens, args.log_g));
  View q;
  POWERATTN_TRY(rotated(c, args.q, p.heads_q, args.rope_offset, c->b.q, &q));
  POWERATTN_TRY(monomials(p, c->b.monomials, c->stream));
  RowStatsArgs stats;
  stats.shape = c->shape;
  stats.dy = view_of(p, args.d_y, p.value_dim, p.dtype);
  stats.row_norm = args.row_norm;
  stats.inverse = c->b.inverse;
  if (args.y.data) {
    stats.y = view_of(p, args.y, p.value_dim, p.dtype);
    stats.delta = c->b.delta;
  }
  POWERATTN_TRY(row_stats(stats, c->stream));
  POWERATTN_TRY(query_sums(*c, q, stats.dy, c->b.state));
  POWERATTN_TRY(finish_summary(*c, c->b.state, true, args.d_state));
  if (!args.total_log_g) return kOk;
  return total_gates(p, c->shape.table, args.log_g, static_cast<float *>(args.total_log_g), c->stream);
}

powerattn_status summary(const powerattn_plan &plan, const powerattn_summary_args &args) {
  const DeviceGuard guard(plan.problem.device_index);
  if (guard.error() != kOk) return check_launch(guard.error(), "summary");
  Call c = make_call(plan, args.stream, Pass::kSummary);
  carve(plan.problem, summary_chunk(plan.problem), true, Pass::kSummary, args.workspace, &c.b);
  return check_launch(run_summary(&c, args), "summary");
}

powerattn_status summary_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &args) {
  const DeviceGuard guard(plan.problem.device_index);
  if (guard.error() != kOk) return check_launch(guard.error(), "summary_reverse");
  Call c = make_call(plan, args.stream, Pass::kSummary);
  carve(plan.problem, summary_chunk(plan.problem), true, Pass::kSummary, args.workspace, &c.b);
  return check_launch(run_summary_reverse(&c, args), "summary_reverse");
}

}  // namespace

extern const Implementation kCudaGeneric;
const Implementation kCudaGeneric = {"cuda.generic", choose,       sizes,   describe,       forward,
                                     backward,       generic_step, summary, summary_reverse};

}  // namespace powerattn
