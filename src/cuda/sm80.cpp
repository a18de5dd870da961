// SPDX-License-Identifier: Apache-2.0
// "cuda.sm80": float16 and bfloat16 on the tensor cores through mma.sync, for devices from compute capability
// 8.0 on. This file decides what runs, how it is tiled and where its memory lies; kernels/cuda/sm80 computes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "backend.h"
#include "kernels/cuda/chunks.h"
#include "kernels/cuda/sm80/args.h"
#include "kernels/cuda/tiles.h"
#include "status.h"
#include "tensor_core.h"
#include "text.h"

namespace powerattn {
namespace {

namespace k80 = cuda::sm80;

using cuda::carve_states;
using cuda::carve_sums;
using cuda::Carver;
using cuda::chunk_of;
using cuda::chunked;
using cuda::Cost;
using cuda::device_of;
using cuda::kReferenceSms;
using cuda::States;
using cuda::Sums;
using cuda::with_rope;
using cuda::with_units;

// Executed rates as measured on an H200 (docs/performance-log.md), multiply-adds counted twice; other devices
// by their number of multiprocessors.
constexpr double kRateState = 250e12, kRateIntra = 200e12, kRateBackward = 210e12, kBandwidth = 2.5e12;
constexpr double kLaunch = 4e-6;

// chunk = 0: attention form. Padded state rows, whole tiles of weights, phases one after another.
Cost cost(const Problem &p, int64_t chunk, int sms) {
  const double speed = static_cast<double>(std::max(sms, 1)) / kReferenceSms;
  const double d = static_cast<double>(p.head_dim), t = static_cast<double>(p.max_seq_len);
  const double total = static_cast<double>(p.batch) * static_cast<double>(p.seq_len);  // tokens
  const double q = total * static_cast<double>(p.heads_q), kv = total * static_cast<double>(p.heads_kv);
  const double span = (chunk > 0 ? std::min<double>(static_cast<double>(chunk), t) : t) + k80::kRowTile;
  const double io = 4 * d * (q + kv) / (kBandwidth * speed);  // q, k, v, y once
  Cost c;
  // Two products over half of the span forward; seven backward: dv 2, dq 3, dk 3, less the shared one.
  c.forward = q * span * 2 * d / (kRateIntra * speed) + io + 2 * kLaunch;
  c.backward = q * span * 8 * d / (kRateBackward * speed) + 2 * io + 6 * kLaunch;
  if (chunk > 0) {
    const double rows = cuda::tile_rows(p.degree, static_cast<int>(p.head_dim));
    const double bytes = kv / static_cast<double>(chunk) * rows * d * 2;
    c.forward +=
        2 * rows * d * (kv + q) / (kRateState * speed) + 3 * bytes / (kBandwidth * speed) + 4 * kLaunch;
    c.backward += 2 * rows * d * (2 * q + 2 * kv) / (kRateBackward * speed) + 4 * bytes / (kBandwidth * speed) +
                  6 * kLaunch;
    if (p.dtype == Dtype::kFloat16) {  // one more pass over keys and values, and over queries and d_y
      c.forward += 4 * d * kv / (kBandwidth * speed) + kLaunch;
      c.backward += 4 * d * q / (kBandwidth * speed) + kLaunch;
    }
  }
  return c;
}

// 512 tokens balance the state's traffic against the work inside a chunk for d = 64 (5.7 ms forward + backward
// where 1024 took 6.0), 2048 for d = 128; degree 1 has a small state. Shorter when that would leave
// multiprocessors idle.
int64_t automatic_chunk(const Problem &p, int sms) {
  int64_t chunk = p.degree == 1 ? 256 : p.head_dim == 128 ? 2048 : 512;
  const int64_t units = p.degree == 1 ? 1 : p.head_dim == 32 ? 2 : p.head_dim == 64 ? 9 : 34;
  while (chunk > 256 && p.batch * (p.seq_len / chunk) * p.heads_kv * units < 2 * sms) chunk /= 2;
  return chunk;
}

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  auto no = [&](const char *reason) {
    *why = reason;
    return false;
  };
  if (op == Op::kStep || op == Op::kSummary) return no("forward and backward only");
  if (p.dtype != Dtype::kFloat16 && p.dtype != Dtype::kBfloat16) return no("float16 and bfloat16 only");
  if (p.head_dim != p.value_dim || (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 128))
    return no("head_dim = value_dim of 32, 64 or 128 only");
  if (p.use_state && p.state_dtype != Dtype::kFloat32) return no("float32 states only");
  const cuda::DeviceProperties *const device = device_of(p);
  if (device == nullptr || device->major < 8) return no("needs compute capability 8.0 or newer");
  const size_t shared = k80::shared_bytes(p.head_dim);
  if (!cuda::fits_shared(p, *device, shared, why)) return false;

  const char *no_chunks = p.degree > 2                   ? "chunked form for degrees 1 and 2 only"
                          : p.degree == 1 && p.use_state ? "no states of degree 1"
                                                         : nullptr;
  const bool pinned = pins.form == POWERATTN_FORM_CHUNKED;
  if (no_chunks && (p.use_state || pinned)) return no(no_chunks);
  if (p.use_state && pins.form == POWERATTN_FORM_ATTENTION) return no("states need the chunked form");

  const int sms = device->sm_count;
  const int64_t chunk = pins.chunk > 0 ? pins.chunk : automatic_chunk(p, sms);
  *tiling = cuda::choose_form(p, pins, chunk, no_chunks == nullptr, cost, sms);
  return true;
}

// ---- Memory: the same walk gives the sizes (base = null) and the pointers of a call.

// Z is needed for the row sums, and for z of the states even when outputs are not normalised.
bool with_z(const Problem &p) { return p.degree == 2 && (p.normalize || p.use_state); }

struct Common {
  void *tables = nullptr;
  float *g = nullptr;
  Sums sums;
  cuda::Rotated rotated;
};
Common carve_common(const Problem &p, const Tiling &t, Carver *c) {
  Common m;
  m.tables = c->take<char>(static_cast<int64_t>(cuda::chunk_table_bytes(p, chunk_of(p, t), k80::kRowTile)));
  m.g = c->take<float>(p.batch * p.heads_kv * p.seq_len);
  m.sums = carve_sums(p, t, with_z(p), c);
  m.rotated = cuda::carve_rotated(p, c);
  return m;
}

// Row sums of a forward call that is not normalised need more than its outputs do: Z, or the sums of the keys.
struct Norms {
  float *z_local = nullptr, *keys = nullptr;
  uint16_t *z = nullptr;
};
Norms carve_norms(const Problem &p, const Tiling &t, Carver *c) {
  Norms n;
  if (!chunked(t) || p.normalize || with_z(p)) return n;
  const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv, d = p.head_dim;
  if (p.degree == 1) {
    n.keys = c->take<float>(slots * d);
  } else {
    n.z_local = c->take<float>(slots * d * d);
    n.z = c->take<uint16_t>(slots * 2 * d * d);
  }
  return n;
}

struct Gradients {
  float *r = nullptr, *delta = nullptr, *q_dot = nullptr, *k_dot = nullptr;
  float *k_state_dot = nullptr, *products = nullptr;
  float *d_q = nullptr, *d_k = nullptr;  // of the rotated q, k
  States states;                         // dS and dZ
};
Gradients carve_gradients(const Problem &p, const Tiling &t, Carver *c) {
  Gradients g;
  const int64_t rows_q = p.batch * p.heads_q * p.seq_len, rows_kv = p.batch * p.heads_kv * p.seq_len;
  if (p.normalize) {
    g.r = c->take<float>(rows_q);
    g.delta = c->take<float>(rows_q);
  } else {
    g.q_dot = c->take<float>(rows_q);
  }
  g.k_dot = c->take<float>(rows_kv);
  if (with_rope(p)) {
    g.d_q = c->take<float>(rows_q * p.head_dim);
    g.d_k = c->take<float>(rows_kv * p.head_dim);
  }
  if (chunked(t)) g.k_state_dot = c->take<float>(rows_kv);
  g.products = cuda::carve_products(p, t, c);
  g.states = carve_states(p, t, with_z(p), c);
  return g;
}

Sizes sizes(const Problem &p, const Tiling &t) {
  return cuda::sizes_of([&](Carver *c) { carve_states(p, t, with_z(p), c); },
                        [&](Carver *c) {
                          carve_common(p, t, c);
                          carve_norms(p, t, c);
                        },
                        [&](Carver *c) {
                          carve_common(p, t, c);
                          carve_gradients(p, t, c);
                        });
}

void describe(const Problem &p, const Tiling &t, std::string *text) {
  const int d = static_cast<int>(p.head_dim);
  append(text,
         "  mma.sync.m16n8k16, float32 accumulators; output and dv: 128 rows a block (4 warps of 32: each\n"
         "    ldmatrix of a column feeds two row fragments); dq and dk: 128 rows (%s); columns by 64\n",
         d == 128 ? "8 warps of 16: registers" : "4 warps of 32");
  const char *const name = p.dtype == Dtype::kFloat16 ? "float16" : "bfloat16";
  if (chunked(t)) {
    append(text,
           "  states: %d tiles of 64 x %d %s per chunk and head (%d padded rows), %" PRId64
           " chunks; local sums in %s (float32 into a final state), scan in float32, row sums "
           "through Z in two %s parts\n",
           cuda::tile_count(p.degree, d), d, name, cuda::tile_rows(p.degree, d), cuda::chunk_bound(p, t.chunk),
           name, name);
    if (with_units(p))
      text->append(
          "  float16 states are counted in a power of two per chunk and head, from bounds of one more pass\n");
  }
  cuda::describe_costs(p, cost, text);
  if (with_rope(p))
    text->append(
        "  prepare pass: q and k are rotated into contiguous copies, their gradients back from float32\n");
  text->append("  rows that are not 16-byte aligned are loaded element by element (slower, no copy)\n");
}

// ---- Execution.

struct Call : cuda::TensorCoreCall {
  Common common;

  using TensorCoreCall::TensorCoreCall;

  void begin(const Common &memory, const int64_t *cu_seqlens, const powerattn_tensor &log_g) {
    common = memory;
    cuda::ChunkTable made;
    run([&] {
      return cuda::build_chunks(p, chunk_of(p, t), k80::kRowTile, cu_seqlens, common.tables, &made, stream);
    });
    set_table(made);
    if (log_g.data != nullptr) {
      g = common.g;
      run([&] { return cuda::chunk_gates(p, table, log_g, common.g, nullptr, stream); });
    }
  }

  // S and Z before every chunk, from keys and values.
  void states(const powerattn_tensor &k, const powerattn_tensor &v, const powerattn_state &initial,
              const powerattn_state &final, const States &s) {
    k80::UpdateArgs u;
    u.shape = shape80;
    u.x = k;
    u.u = v;
    u.g = g;
    u.ranges = ranges(common.sums, k, v, false, nullptr, nullptr);
    u.local = s.tiles;
    u.end_local = common.sums.end_of(final);
    run([&] { return k80::update(u, stream); });
    if (s.z != nullptr) {
      u.end_local = nullptr;
      u.as_z = true;
      u.u = k;
      u.local = common.sums.z_local;
      run([&] { return k80::update(u, stream); });
    }
    scan(common.sums, s, initial, final, false);
  }
};

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.sm80: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(args.saved);
  Common common = carve_common(p, plan.tiling, &workspace);
  const Norms norms = carve_norms(p, plan.tiling, &workspace);
  States states = carve_states(p, plan.tiling, with_z(p), args.saved != nullptr ? &saved : &workspace);
  const bool row_sums = args.row_norm.data != nullptr;
  if (row_sums && norms.z != nullptr) {
    common.sums.z_local = norms.z_local;
    states.z = norms.z;
  }
  call.begin(common, args.cu_seqlens, args.log_g);
  const powerattn_tensor tq = call.rotate(args.q, common.rotated.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.rotated.k, p.heads_kv, args.rope_offset);
  if (chunked(plan.tiling)) call.states(tk, args.v, args.initial_state, args.final_state, states);

  k80::OutputArgs o;
  o.shape = call.shape80;
  o.normalize = p.normalize;
  o.x = tq;
  o.z = tk;
  o.u = args.v;
  o.out = args.y;
  o.g = call.g;
  o.state = states.tiles;
  o.z_state = p.normalize || row_sums ? states.z : nullptr;
  o.units = states.units;
  o.scale = call.weight_scale();
  o.eps = static_cast<float>(p.eps);
  o.row_norm = args.row_norm;
  call.run([&] { return k80::output(o, call.stream); });
  if (row_sums && norms.keys != nullptr) {
    k80::NormArgs n;
    n.shape = call.shape80;
    n.q = tq;
    n.k = tk;
    n.g = call.g;
    n.scale = o.scale;
    n.z = norms.keys;
    n.row_norm = args.row_norm;
    call.run([&] { return k80::add_norms(n, call.stream); });
  }
  call.zero_padding(args);
  return cuda::check_launch(call.error, "cuda.sm80 forward");
}

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.sm80: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(const_cast<void *>(args.saved));
  const Common common = carve_common(p, plan.tiling, &workspace);
  const Gradients own = carve_gradients(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, with_z(p), args.saved != nullptr ? &saved : &workspace);
  call.begin(common, args.cu_seqlens, args.log_g);
  const powerattn_tensor tq = call.rotate(args.q, common.rotated.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.rotated.k, p.heads_kv, args.rope_offset);
  if (p.normalize) {
    k80::RowsArgs r;
    r.shape = call.shape80;
    r.y = args.y;
    r.d_y = args.d_y;
    r.row_norm = args.row_norm;
    r.r = own.r;
    r.delta = own.delta;
    call.run([&] { return k80::rows(r, call.stream); });
    k80::DeltaArgs d = call.delta_args(args, tq, tk, own.delta);
    d.g = call.g;
    call.run([&] { return k80::delta(d, call.stream); });
  }
  const bool in_chunks = chunked(plan.tiling), z = in_chunks && with_z(p);
  if (in_chunks && args.saved == nullptr)
    call.states(tk, args.v, args.initial_state, powerattn_state{}, states);

  const k80::ProductArgs products = call.products(args, states, false, own.products);

  // dq first: it corrects delta, which everything else reads.
  k80::GradientArgs q;
  q.shape = call.shape80;
  q.g = call.g;
  q.r = own.r;
  q.delta = own.delta;
  q.scale = call.weight_scale();
  k80::GradientArgs k = q;
  q.x = tq;
  q.u = args.d_y;
  q.z = tk;
  q.y = args.v;
  q.out = args.d_q;
  q.state = states.tiles;
  q.z_state = p.normalize ? states.z : nullptr;
  q.units = states.units;
  q.dot = args.d_log_g.data != nullptr ? own.q_dot : nullptr;
  q.out_float = own.d_q;
  q.delta_out = own.delta;
  q.eps = static_cast<float>(p.eps);
  call.run([&] { return k80::gradient(q, call.stream); });
  if (in_chunks) {
    k80::UpdateArgs u;
    u.shape = call.shape80;
    u.reverse = true;
    u.x = tq;
    u.u = args.d_y;
    u.g = call.g;
    u.r = own.r;
    u.scale = call.weight_scale();
    u.ranges = call.ranges(common.sums, tq, args.d_y, true, own.r, own.delta);
    u.local = own.states.tiles;
    u.end_local = common.sums.end_of(args.d_initial_state);
    call.run([&] { return k80::update(u, call.stream); });
    if (z && p.normalize) {
      u.as_z = true;
      u.end_local = nullptr;
      u.u = tq;
      u.delta = own.delta;
      u.local = common.sums.z_local;
      call.run([&] { return k80::update(u, call.stream); });
    } else if (z) {  // no row sum: Z gets its gradient from the end of the sequence alone
      const size_t bytes =
          static_cast<size_t>(cuda::chunk_bound(p, plan.tiling.chunk) * p.heads_kv * p.head_dim * p.head_dim) *
          sizeof(float);
      call.run([&] { return cudaMemsetAsync(common.sums.z_local, 0, bytes, call.stream); });
    }
    call.scan(common.sums, own.states, args.d_final_state, args.d_initial_state, true, products);
  }

  k.reverse = true;
  k.x = tk;
  k.u = args.v;
  k.z = tq;
  k.y = args.d_y;
  k.out = args.d_k;
  k.state = own.states.tiles;
  k.z_state = own.states.z;
  k.units = own.states.units;
  k.dot = args.d_log_g.data != nullptr ? own.k_dot : nullptr;
  k.state_dot = args.d_log_g.data != nullptr && in_chunks ? own.k_state_dot : nullptr;
  k.out_float = own.d_k;
  call.run([&] { return k80::gradient(k, call.stream); });
  call.rotate_back(own.d_q, args.d_q, p.heads_q, args.rope_offset);
  call.rotate_back(own.d_k, args.d_k, p.heads_kv, args.rope_offset);

  k80::OutputArgs v;
  v.shape = call.shape80;
  v.reverse = true;
  v.x = tk;
  v.z = tq;
  v.u = args.d_y;
  v.out = args.d_v;
  v.g = call.g;
  v.r = own.r;
  v.state = own.states.tiles;
  v.units = own.states.units;
  v.scale = call.weight_scale();
  call.run([&] { return k80::output(v, call.stream); });

  if (args.d_log_g.data != nullptr) {
    k80::GateArgs w;
    w.shape = call.shape80;
    w.q_dot = own.q_dot;
    w.k_dot = own.k_dot;
    w.r = own.r;
    w.delta = own.delta;
    w.eps = static_cast<float>(p.eps);
    w.products = products;
    w.d_units = own.states.units;
    w.g = call.g;
    w.k_state_dot = own.k_state_dot;
    w.d_log_g = args.d_log_g;
    call.run([&] { return k80::gate_gradient(w, call.stream); });
  }
  call.zero_padding(args);
  return cuda::check_launch(call.error, "cuda.sm80 backward");
}

}  // namespace

extern const Implementation kCudaSm80;
const Implementation kCudaSm80 = {"cuda.sm80", choose,  sizes,   describe, forward,
                                  backward,    nullptr, nullptr, nullptr};

}  // namespace powerattn
