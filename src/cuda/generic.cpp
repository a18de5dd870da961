// SPDX-License-Identifier: Apache-2.0
// cuda.generic: the sequence of generic kernels for each operation, their workspace, and when it is chosen.
#include "kernels/cuda/generic/generic.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "common.h"
#include "cost.h"
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

// ---- Tiling ----------------------------------------------------------------------------------------------

// Sustained rates on one H200 (docs/performance-log.md), useful operations per second.
struct Rates {
  double attention, state, backward_attention, backward_state;
};
Rates rates_of(Math math) {
  switch (math) {
    case Math::kBfloat16:
      return {60e12, 150e12, 50e12, 40e12};
    case Math::kTf32:
      return {30e12, 60e12, 25e12, 25e12};
    case Math::kFloat32:
      break;
  }
  return {18e12, 32e12, 18e12, 21e12};
}

enum class Pass { kForward, kBackward, kSummary };

// The gate gradient takes the difference of large sums over states, which bfloat16 operands would blur: TF32
// there.
Math backward_state_math(Math math) { return math == Math::kBfloat16 ? Math::kTf32 : math; }

// Chunks as the kernels see them: the attention form is one chunk per sequence, rounded up to whole row tiles
// so that the tile table has no gaps.
int64_t chunk_of(const Problem &p, const Tiling &t) {
  if (t.form == Form::kChunked) return t.chunk;
  return std::max<int64_t>(kRows, (p.seq_len + kRows - 1) / kRows * kRows);
}
int64_t summary_chunk(const Problem &p) {
  return std::min<int64_t>(1024, std::max<int64_t>(kRows, (p.seq_len + kRows - 1) / kRows * kRows));
}

// Bytes of the states of all chunks: float32 sums and, where the operand type differs, their prefix sums.
double chunk_state_bytes(const Problem &p, int64_t chunk) {
  const double element = math_of(p) == Math::kBfloat16 ? 6.0 : 4.0;
  return double(chunk_bound(p, chunk)) * double(p.heads_kv) * double(p.state_rows) * double(p.value_dim + 1) *
         element;
}

double forward_seconds(const Problem &p, Form form, int64_t chunk, double bandwidth) {
  const Rates r = rates_of(math_of(p));
  if (form == Form::kAttention) {
    const Work w = attention_forward_work(p);
    return 10e-6 + std::max(w.flops / r.attention, w.io_bytes / bandwidth);
  }
  const Work w = chunked_forward_work(p, chunk, 4);
  return 30e-6 + w.state_flops / r.state + (w.flops - w.state_flops) / r.attention +
         (w.io_bytes + 2 * w.state_bytes) / bandwidth;
}

double backward_seconds(const Problem &p, Form form, int64_t chunk, double bandwidth) {
  const Rates r = rates_of(math_of(p));
  if (form == Form::kAttention) {
    const Work w = attention_backward_work(p);
    return 20e-6 + std::max(w.flops / r.backward_attention, w.io_bytes / bandwidth);
  }
  const Work w = chunked_backward_work(p, chunk, 4, true);
  return 60e-6 + w.state_flops / r.backward_state + (w.flops - w.state_flops) / r.backward_attention +
         (w.io_bytes + 2 * w.state_bytes) / bandwidth;
}

void say(std::string *text, const char *format, ...) POWERATTN_PRINTF(2, 3);
void say(std::string *text, const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  text->append(line);
}

bool grid_fits(const Problem &p, int64_t chunk) {
  const double limit = double(0x7fffffff);
  const double tiles = double(tile_bound(p, chunk, kRows)) * double(p.heads_q);
  const double updates = double(chunk_bound(p, chunk)) * double(p.heads_kv) * (double(p.state_rows) / 128 + 1);
  return tiles < limit && (p.state_rows == kRowsOverflow || updates < limit);
}

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  if (p.dtype == Dtype::kFloat64) {
    *why = "float64 runs on the CPU only";
    return false;
  }
  const DeviceProperties *device = nullptr;
  if (device_properties(p.device_index, &device) != POWERATTN_OK) {
    *why = last_error();
    return false;
  }
  if (op == Op::kStep) return step_supported(p, *device, why);
  const double bandwidth = 0.85 * device->bandwidth;
  const bool rows_known = p.state_rows != kRowsOverflow;
  const size_t memory = device->memory_bytes;

  Tiling best;
  best.forward_s = INFINITY;
  std::string refusal;
  auto consider = [&](Form form, int64_t chunk) {
    Tiling t;
    t.form = form;
    t.chunk = chunk;
    const int64_t inner = chunk_of(p, t);
    const bool states = form == Form::kChunked || p.use_state;
    const Math math = math_of(p);
    const size_t shared = op == Op::kForward
                              ? forward_shared_bytes(math, p, states)
                              : std::max(backward_shared_bytes(math, p, states),
                                         backward_shared_bytes(backward_state_math(math), p, states));
    if (shared > device->shared_per_block) {
      refusal = "needs " + std::to_string(shared) + " bytes of shared memory per block, the device has " +
                std::to_string(device->shared_per_block);
      return;
    }
    if (!grid_fits(p, inner)) {
      refusal = "more than 2^31 thread blocks";
      return;
    }
    t.forward_s = forward_seconds(p, form, inner, bandwidth);
    t.backward_s = backward_seconds(p, form, inner, bandwidth);
    if (t.forward_s < best.forward_s) best = t;
  };

  if (op == Op::kSummary) {
    consider(Form::kChunked, summary_chunk(p));
  } else {
    if (pins.form != POWERATTN_FORM_CHUNKED) consider(Form::kAttention, p.seq_len);
    if (pins.form != POWERATTN_FORM_ATTENTION && rows_known) {
      if (pins.chunk > 0) {
        consider(Form::kChunked, pins.chunk);
      } else {
        for (int64_t c = 128; c <= 8192; c *= 2) {
          // A quarter of the memory for the states of the chunks; the last candidate is taken whatever it needs
          // when the form is pinned.
          const bool fits = chunk_state_bytes(p, c) <= 0.25 * double(memory);
          if (fits || (pins.form == POWERATTN_FORM_CHUNKED && c == 8192 && !std::isfinite(best.forward_s)))
            consider(Form::kChunked, c);
          if (c >= p.max_seq_len) break;
        }
        if (pins.form == POWERATTN_FORM_CHUNKED && !std::isfinite(best.forward_s) && refusal.empty())
          consider(Form::kChunked, std::max<int64_t>(kRows, (p.max_seq_len + kRows - 1) / kRows * kRows));
      }
    }
  }
  if (!std::isfinite(best.forward_s)) {
    *why = refusal.empty() ? "no form runs it" : refusal;
    return false;
  }
  *tiling = best;
  return true;
}

// ---- Workspace -------------------------------------------------------------------------------------------

struct StateBuffers {
  float *s = nullptr;      // sums of the chunks
  void *prefix = nullptr;  // operand type; the same memory as s for float32 operands
  float *z = nullptr;      // sums, then prefix sums
};

struct Buffers {
  void *tables = nullptr;
  float *g = nullptr;
  double *g64 = nullptr;
  void *q = nullptr, *k = nullptr;  // rotated
  Monomial *monomials = nullptr;
  StateBuffers state, grad;
  float *state_out = nullptr, *state_norm = nullptr;
  float *initial_s = nullptr, *initial_z = nullptr;  // float32 copies of bfloat16 states
  float *final_s = nullptr, *final_z = nullptr;
  float *inverse = nullptr, *delta = nullptr;
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  float *boundary = nullptr, *scratch = nullptr, *q_dots = nullptr, *k_dots = nullptr;
};

size_t rows_q(const Problem &p) { return size_t(p.batch) * p.heads_q * p.seq_len; }
size_t rows_kv(const Problem &p) { return size_t(p.batch) * p.heads_kv * p.seq_len; }

size_t carve(const Problem &p, int64_t chunk, bool states, Pass pass, void *base, Buffers *b) {
  Carver carver(base);
  const size_t q = rows_q(p), kv = rows_kv(p), element = size_t(size_of(p.dtype));
  b->tables = carver.bytes(chunk_table_bytes(p, chunk, kRows));
  b->g = carver.take<float>(kv);
  b->g64 = carver.take<double>(kv);
  if (p.rope.style != POWERATTN_ROPE_NONE) {
    b->q = carver.bytes(q * p.head_dim * element);
    b->k = carver.bytes(kv * p.head_dim * element);
  }
  const size_t one = states ? size_t(p.state_rows) : 0, per_state = one * size_t(p.value_dim);
  const size_t slots = size_t(chunk_bound(p, chunk)) * p.heads_kv, ends = size_t(p.sequences) * p.heads_kv;
  if (states) {
    const bool apart = pass == Pass::kForward && operand_dtype(math_of(p)) != Dtype::kFloat32;
    b->monomials = carver.take<Monomial>(one);
    b->state.s = carver.take<float>(slots * per_state);
    b->state.z = carver.take<float>(slots * one);
    if (pass != Pass::kSummary)
      b->state.prefix = apart ? carver.bytes(slots * per_state * size_of(p.dtype)) : b->state.s;
    const bool convert_states = p.state_dtype != Dtype::kFloat32;
    if (convert_states && pass != Pass::kBackward) {
      b->final_s = carver.take<float>(ends * per_state);
      b->final_z = carver.take<float>(ends * one);
    }
    if (convert_states) {
      b->initial_s = carver.take<float>(2 * ends * per_state);  // backward: and d_final_state
      b->initial_z = carver.take<float>(2 * ends * one);
    }
    if (pass == Pass::kForward) {
      b->state_out = carver.take<float>(q * p.value_dim);
      b->state_norm = carver.take<float>(q);
    }
    if (pass == Pass::kBackward) {
      b->grad.s = carver.take<float>(slots * per_state);
      b->grad.prefix = b->grad.s;
      b->grad.z = carver.take<float>(slots * one);
      b->boundary = carver.take<float>(slots);
    }
  }
  if (pass == Pass::kSummary) {
    b->inverse = carver.take<float>(q);
    b->delta = carver.take<float>(q);
  }
  if (pass == Pass::kBackward) {
    b->inverse = carver.take<float>(q);
    b->delta = carver.take<float>(q);
    b->dq = carver.take<float>(q * p.head_dim);
    b->dk = carver.take<float>(kv * p.head_dim);
    b->dv = carver.take<float>(kv * p.value_dim);
    b->scratch = carver.take<float>(kv);
    b->q_dots = carver.take<float>(q);
    b->k_dots = carver.take<float>(kv);
  }
  return carver.used();
}

bool with_states(const Problem &p, const Tiling &t) { return t.form == Form::kChunked || p.use_state; }

Sizes sizes(const Problem &p, const Tiling &t) {
  Sizes s;
  Buffers b;
  if (p.use_state && !p.packed) s.step = step_workspace(p);
  if (t.chunk > 0 || t.form == Form::kAttention) {
    s.forward = carve(p, chunk_of(p, t), with_states(p, t), Pass::kForward, nullptr, &b);
    s.backward = s.backward_saved = carve(p, chunk_of(p, t), with_states(p, t), Pass::kBackward, nullptr, &b);
  }
  if (p.state_rows != kRowsOverflow && p.state_bytes <= p.state_limit)
    s.summary = carve(p, summary_chunk(p), true, Pass::kSummary, nullptr, &b);
  return s;
}

void describe(const Problem &p, const Tiling &t, std::string *text) {
  const Math math = math_of(p);
  say(text, "  products: %s\n",
      math == Math::kBfloat16 ? "mma bfloat16, float32 sums"
      : math == Math::kTf32
          ? (p.dtype == Dtype::kFloat16 ? "mma TF32 (holds every float16, with the range of float32), "
                                          "float32 sums"
                                        : "mma TF32 (ALLOW_TF32), float32 sums")
          : "float32 FFMA");
  say(text,
      "  tiles: %d query rows (4 warps of 16) x 32 keys; state products in slabs of 32 rows, features built "
      "in\n"
      "         shared memory\n",
      kRows);
  if (p.rope.style != POWERATTN_ROPE_NONE)
    text->append("  prepare pass: q and k are rotated into contiguous copies in the workspace\n");
  if (math == Math::kBfloat16)
    text->append("  backward: products against states in TF32, for the gradient of the gates\n");
  text->append("  gradients are summed in float32 copies in the workspace, then rotated back and rounded\n");
  if (with_states(p, t) && p.state_rows != kRowsOverflow) {
    const int64_t chunk = chunk_of(p, t);
    say(text, "  chunk states: %.4g MB in the workspace (float32 sums%s)\n", chunk_state_bytes(p, chunk) * 1e-6,
        math == Math::kBfloat16 ? ", bfloat16 operands" : "");
  }
  if (p.use_state && !p.packed) describe_step(p, text);
}

// ---- Execution -------------------------------------------------------------------------------------------

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
