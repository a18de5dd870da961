// SPDX-License-Identifier: Apache-2.0
// "cuda.linear": degree 1 in the chunked form, bfloat16 and float16, for devices from compute capability 8.0
// on. The kernels are bound by memory: this file chooses chunks that fill the device in one wave, and lays out
// memory; kernels/cuda/linear computes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "backend.h"
#include "call.h"
#include "kernels/cuda/chunks.h"
#include "kernels/cuda/linear/args.h"
#include "status.h"
#include "text.h"

namespace powerattn {
namespace {

namespace k1 = cuda::linear;

using cuda::device_of;
using cuda::kReferenceSms;
using cuda::with_rope;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- The plan. The rate is what the kernels reach together on an H200 (docs/performance-log.md).

constexpr double kBandwidth = 2.7e12;  // of a device with 132 multiprocessors
constexpr double kLaunch = 3e-6;
constexpr int64_t kShortest = 128, kLongest = 4096;

// A sequence longer than a chunk has states between its chunks.
bool in_pieces(const Problem &p, int64_t chunk) { return p.seq_len > chunk; }

int64_t wave(const Problem &p, int sms) { return std::max(sms, 1) * k1::resident_blocks(p.head_dim); }

// As many chunks as one wave of blocks, each a multiple of 64 tokens: every block then starts and ends together
// with all others. The blocks of dk and dv, one per kv head, are the fewest. Whole sequences (keys and values
// are read once, not twice) where their last wave is full enough.
int64_t automatic_chunk(const Problem &p, int sms) {
  const int64_t blocks = wave(p, sms), heads = std::max<int64_t>(p.heads_kv, 1);
  const int64_t pieces = std::max<int64_t>(blocks / heads, 1);  // of all sequences together
  const auto rounded = [](int64_t tokens) {
    return std::clamp(ceil_div(tokens, k1::kBlock) * k1::kBlock, kShortest, kLongest);
  };
  if (p.packed) return rounded(ceil_div(p.seq_len, pieces));
  const int64_t whole = p.batch * heads, waves = std::max<int64_t>(ceil_div(whole, blocks), 1);
  const double full = static_cast<double>(whole) / static_cast<double>(waves * blocks);
  if (full > 2. / 3) return std::max<int64_t>(p.seq_len, 1);
  return rounded(ceil_div(p.seq_len, std::max<int64_t>(blocks / std::max<int64_t>(whole, 1), 1)));
}

struct Cost {
  double forward = 0, backward = 0;
};

Cost cost(const Problem &p, int64_t chunk, int sms) {
  const double tokens = static_cast<double>(p.batch) * static_cast<double>(p.seq_len);
  const double d = static_cast<double>(p.head_dim);
  const double q = tokens * static_cast<double>(p.heads_q), kv = tokens * static_cast<double>(p.heads_kv);
  // Rows that are read or written: y from q, k, v; dq from dy, v, k and q; dv from k, q, dy; dk from v, dy, q
  // and k.
  double forward = 2 * q + 2 * kv, backward = 3 * q + 2 * kv + 2 * (2 * q + 2 * kv) + kv;
  int launches = 1, backward_launches = 4;
  if (in_pieces(p, chunk)) {
    const double states = 2 * d * kv / static_cast<double>(chunk);  // a state, in rows of 2-byte elements
    forward += 2 * kv + 4 * states;
    backward += 2 * q + 2 * kv + 10 * states;  // without `saved`
    launches += 2;
    backward_launches += 4;
  }
  const double rate = kBandwidth * std::max(sms, 1) / kReferenceSms;
  return {2 * d * forward / rate + launches * kLaunch, 2 * d * backward / rate + backward_launches * kLaunch};
}

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  auto no = [&](const char *reason) {
    *why = reason;
    return false;
  };
  if (op == Op::kStep || op == Op::kSummary) return no("forward and backward only");
  if (p.degree != 1) return no("degree 1 only");
  if (p.dtype != Dtype::kBfloat16 && p.dtype != Dtype::kFloat16) return no("bfloat16 and float16 only");
  // It multiplies queries and d_y before they are rounded, which have no units
  // (kernels/cuda/linear/output.cuh).
  if (p.dtype == Dtype::kFloat16 && !(std::fabs(p.scale) <= 1 && std::fabs(p.scale) >= 1. / 64))
    return no("float16: a scale between 1/64 and 1 only");
  if (p.head_dim != p.value_dim || (p.head_dim != 64 && p.head_dim != 128))
    return no("head_dim = value_dim of 64 or 128 only");
  if (p.normalize) return no("unnormalised only");
  if (p.use_state && p.state_dtype != Dtype::kFloat32) return no("float32 states only");
  if (pins.form == POWERATTN_FORM_ATTENTION) return no("no attention form");
  const cuda::DeviceProperties *const device = device_of(p);
  if (device == nullptr || device->major < 8) return no("needs compute capability 8.0 or newer");
  const size_t shared = k1::shared_bytes(p.head_dim);
  if (!cuda::fits_shared(p, *device, shared, why)) return false;
  tiling->form = Form::kChunked;
  tiling->chunk = pins.chunk > 0 ? pins.chunk : automatic_chunk(p, device->sm_count);
  const Cost c = cost(p, tiling->chunk, device->sm_count);
  tiling->forward_s = c.forward;
  tiling->backward_s = c.backward;
  return true;
}

// ---- Memory: the same walk gives the sizes (base = null) and the pointers of a call.

using cuda::Carver;

// States before every chunk and, with states at the ends, after every sequence: what `saved` holds.
struct States {
  float *s = nullptr, *z = nullptr;
  float *end = nullptr, *z_end = nullptr;
};
bool with_states(const Problem &p, const Tiling &t) { return in_pieces(p, t.chunk) || p.use_state; }
States carve_states(const Problem &p, const Tiling &t, Carver *c) {
  States s;
  if (!with_states(p, t)) return s;
  const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv, ends = p.sequences * p.heads_kv;
  s.s = c->take<float>(slots * p.head_dim * p.head_dim);
  s.z = c->take<float>(slots * p.head_dim);
  if (p.use_state) {
    s.end = c->take<float>(ends * p.head_dim * p.head_dim);
    s.z_end = c->take<float>(ends * p.head_dim);
  }
  return s;
}

struct Common {
  void *tables = nullptr;
  float *decay = nullptr;
  cuda::Rotated rotated;
};
Common carve_common(const Problem &p, const Tiling &t, Carver *c) {
  Common m;
  if (p.packed) m.tables = c->take<char>(cuda::chunk_table_bytes(p, t.chunk, 0));
  m.decay = c->take<float>(cuda::chunk_bound(p, t.chunk) * p.heads_kv);
  m.rotated = cuda::carve_rotated(p, c);
  return m;
}

struct Gradients {
  float *s = nullptr, *z = nullptr;          // of the state after every chunk
  float *q_dot = nullptr, *k_dot = nullptr;  // [head_dim / 64][b, heads, t]
  float *d_q = nullptr, *d_k = nullptr;      // of the rotated q, k
};
Gradients carve_gradients(const Problem &p, const Tiling &t, Carver *c) {
  Gradients g;
  const int64_t rows_q = p.batch * p.heads_q * p.seq_len, rows_kv = p.batch * p.heads_kv * p.seq_len;
  g.q_dot = c->take<float>(p.head_dim / 64 * rows_q);
  g.k_dot = c->take<float>(p.head_dim / 64 * rows_kv);
  if (with_rope(p)) {
    g.d_q = c->take<float>(rows_q * p.head_dim);
    g.d_k = c->take<float>(rows_kv * p.head_dim);
  }
  if (with_states(p, t)) {
    const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv;
    g.s = c->take<float>(slots * p.head_dim * p.head_dim);
    if (p.use_state) g.z = c->take<float>(slots * p.head_dim);
  }
  return g;
}

Sizes sizes(const Problem &p, const Tiling &t) {
  return cuda::sizes_of([&](Carver *c) { carve_states(p, t, c); }, [&](Carver *c) { carve_common(p, t, c); },
                        [&](Carver *c) {
                          carve_common(p, t, c);
                          carve_gradients(p, t, c);
                        });
}

void describe(const Problem &p, const Tiling &t, std::string *text) {
  append(text,
         "  a block of %d warps walks one chunk and head 64 tokens at a time, its state in float32 registers;\n"
         "    mma.sync.m16n8k16, copies of the next 64 tokens in flight; %d blocks a multiprocessor\n",
         static_cast<int>(p.head_dim) / 16, k1::resident_blocks(p.head_dim));
  append(text, "  %" PRId64 " chunks of %" PRId64 " tokens and %" PRId64 " heads: %" PRId64 " blocks; %s\n",
         cuda::chunk_bound(p, t.chunk), t.chunk, p.heads_q, cuda::chunk_bound(p, t.chunk) * p.heads_q,
         in_pieces(p, t.chunk)
             ? "keys and values are read twice: for the float32 sums of the chunks, and for the outputs"
             : "whole sequences: keys and values are read once");
  if (with_rope(p))
    text->append(
        "  prepare pass: q and k are rotated into contiguous copies, their gradients back from float32\n");
  text->append("  rows that are not 16-byte aligned are loaded element by element (slower, no copy)\n");
}

// ---- Execution.

struct Call : cuda::CallBase {
  Common common;
  k1::Shape shape;

  using CallBase::CallBase;
  float scale() const { return static_cast<float>(p.scale); }

  void begin(const Common &memory, const int64_t *cu_seqlens, const powerattn_tensor &log_g) {
    common = memory;
    table.num_sequences = p.sequences;
    table.num_chunks = cuda::chunk_bound(p, t.chunk);
    table.chunk = t.chunk;
    if (p.packed)
      run([&] { return cuda::build_chunks(p, t.chunk, 0, cu_seqlens, common.tables, &table, stream); });
    shape.table = table;
    shape.packed = p.packed;
    shape.half = p.dtype == Dtype::kFloat16;
    shape.heads_q = static_cast<int32_t>(p.heads_q);
    shape.heads_kv = static_cast<int32_t>(p.heads_kv);
    shape.head_dim = static_cast<int32_t>(p.head_dim);
    shape.per_sequence = static_cast<int32_t>(ceil_div(p.seq_len, t.chunk));
    shape.seq_len = p.seq_len;
    shape.log_g = log_g;
  }

  // S and z before every chunk, from keys and values.
  void states(const powerattn_tensor &k, const powerattn_tensor &v, const powerattn_state &initial,
              const powerattn_state &final, const States &s) {
    k1::UpdateArgs u;
    u.shape = shape;
    u.x = k;
    u.u = v;
    u.exact = p.use_state;
    u.local = s.s;
    u.z_local = s.z;
    u.decay = common.decay;
    run([&] { return k1::update(u, stream); });
    k1::ScanArgs a;
    a.shape = shape;
    a.decay = shape.log_g.data != nullptr ? common.decay : nullptr;
    a.state = s.s;
    a.z = s.z;
    a.initial = initial;
    a.final = final;
    a.end = s.end;
    a.z_end = s.z_end;
    run([&] { return k1::scan(a, stream); });
  }

  // Their gradients after every chunk, from queries and d_y. Nothing is normalised, so z has a gradient only
  // from the end of the sequence.
  void state_gradients(const powerattn_tensor &q, const powerattn_tensor &d_y, const powerattn_state &d_final,
                       const powerattn_state &d_initial, const Gradients &g) {
    k1::UpdateArgs u;
    u.shape = shape;
    u.reverse = true;
    u.x = q;
    u.u = d_y;
    u.exact = p.use_state;
    u.scale = scale();
    u.local = g.s;
    u.decay = common.decay;
    run([&] { return k1::update(u, stream); });
    if (g.z != nullptr) {
      const size_t bytes = static_cast<size_t>(table.num_chunks * p.heads_kv * p.head_dim) * sizeof(float);
      run([&] { return cudaMemsetAsync(g.z, 0, bytes, stream); });
    }
    k1::ScanArgs a;
    a.shape = shape;
    a.reverse = true;
    a.decay = shape.log_g.data != nullptr ? common.decay : nullptr;
    a.state = g.s;
    a.z = g.z;
    a.initial = d_final;
    a.final = d_initial;
    run([&] { return k1::scan(a, stream); });
  }
};

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.linear: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(args.saved);
  const Common common = carve_common(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, args.saved != nullptr ? &saved : &workspace);
  call.begin(common, args.cu_seqlens, args.log_g);
  const powerattn_tensor q = call.rotate(args.q, common.rotated.q, p.heads_q, args.rope_offset);
  const powerattn_tensor k = call.rotate(args.k, common.rotated.k, p.heads_kv, args.rope_offset);
  // One chunk per sequence starts from the initial state itself.
  const bool scanned = in_pieces(p, plan.tiling.chunk) || args.final_state.s != nullptr ||
                       (args.saved != nullptr && p.use_state);
  if (scanned) call.states(k, args.v, args.initial_state, args.final_state, states);

  k1::OutputArgs o;
  o.shape = call.shape;
  o.x = q;
  o.z = k;
  o.u = args.v;
  o.out = args.y;
  o.state = scanned ? states.s : nullptr;
  o.z_state = scanned ? states.z : nullptr;
  o.initial = args.initial_state;
  o.state_scale = o.pair_scale = call.scale();
  o.row_norm = args.row_norm;
  o.eps = static_cast<float>(p.eps);
  call.run([&] { return k1::output(o, call.stream); });
  call.zero_padding(args);
  return cuda::check_launch(call.error, "cuda.linear forward");
}

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.linear: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(const_cast<void *>(args.saved));
  const Common common = carve_common(p, plan.tiling, &workspace);
  const Gradients own = carve_gradients(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, args.saved != nullptr ? &saved : &workspace);
  call.begin(common, args.cu_seqlens, args.log_g);
  const powerattn_tensor q = call.rotate(args.q, common.rotated.q, p.heads_q, args.rope_offset);
  const powerattn_tensor k = call.rotate(args.k, common.rotated.k, p.heads_kv, args.rope_offset);
  const bool gates = args.d_log_g.data != nullptr;
  if (with_states(p, plan.tiling)) {
    if (args.saved == nullptr) call.states(k, args.v, args.initial_state, powerattn_state{}, states);
    call.state_gradients(q, args.d_y, args.d_final_state, args.d_initial_state, own);
  }

  // Walks, see args.h. The gate gradient wants q . dq and k . dk, which are not rounded inside them.
  k1::OutputArgs dq;
  dq.shape = call.shape;
  dq.pair_scale = call.scale();
  k1::OutputArgs dv = dq;
  dq.transposed = true;
  dq.x = args.d_y;
  dq.z = args.v;
  dq.u = k;
  dq.out = args.d_q;
  dq.out_float = own.d_q;
  dq.state = states.s;
  dq.state_scale = call.scale();
  if (gates) {
    dq.partner = q;
    dq.dot = own.q_dot;
    dq.dot_plane = p.batch * p.heads_q * p.seq_len;
  }

  dv.reverse = true;
  dv.state = own.s;
  dv.sum_scale = call.scale();
  k1::OutputArgs dk = dv;
  dv.x = k;
  dv.z = q;
  dv.u = args.d_y;
  dv.out = args.d_v;
  // dv backwards, dq forwards, dk backwards: each begins where the one before it ended, among rows in the
  // cache.
  call.run([&] { return k1::output(dv, call.stream); });
  call.run([&] { return k1::output(dq, call.stream); });

  dk.transposed = true;
  dk.x = args.v;
  dk.z = args.d_y;
  dk.u = q;
  dk.out = args.d_k;
  dk.out_float = own.d_k;
  dk.bias = own.z;
  if (gates) {
    dk.partner = k;
    dk.dot = own.k_dot;
    dk.dot_plane = p.batch * p.heads_kv * p.seq_len;
  }
  call.run([&] { return k1::output(dk, call.stream); });
  call.rotate_back(own.d_q, args.d_q, p.heads_q, args.rope_offset);
  call.rotate_back(own.d_k, args.d_k, p.heads_kv, args.rope_offset);

  if (gates) {
    k1::GateArgs g;
    g.shape = call.shape;
    g.first_has_state = args.initial_state.s != nullptr;
    g.q_dot = own.q_dot;
    g.k_dot = own.k_dot;
    g.q_plane = dq.dot_plane;
    g.k_plane = dk.dot_plane;
    g.state = states.s;
    g.z = states.z;
    g.end = states.end;
    g.z_end = states.z_end;
    g.d_state = own.s;
    g.d_z = own.z;
    g.d_log_g = args.d_log_g;
    call.run([&] { return k1::gate_gradient(g, call.stream); });
  }
  call.zero_padding(args);
  return cuda::check_launch(call.error, "cuda.linear backward");
}

}  // namespace

extern const Implementation kCudaLinear;
const Implementation kCudaLinear = {"cuda.linear", choose,  sizes,   describe, forward,
                                    backward,      nullptr, nullptr, nullptr};

}  // namespace powerattn
