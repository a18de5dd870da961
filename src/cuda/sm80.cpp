// SPDX-License-Identifier: Apache-2.0
// "cuda.sm80": float16 and bfloat16 on the tensor cores through mma.sync, for devices from compute capability
// 8.0 on. This file decides what runs, how it is tiled and where its memory lies; kernels/cuda/sm80 computes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "backend.h"
#include "kernels/cuda/chunks.h"
#include "kernels/cuda/sm80/args.h"
#include "kernels/cuda/tiles.h"
#include "src/cuda/common.h"
#include "src/cuda/rope.h"
#include "status.h"

namespace powerattn {
namespace {

namespace k80 = cuda::sm80;

using cuda::device_of;
using cuda::kReferenceSms;
using cuda::with_rope;

// Executed rates as measured on an H200 (docs/performance-log.md), multiply-adds counted twice; other devices
// by their number of multiprocessors.
constexpr double kRateState = 250e12, kRateIntra = 200e12, kRateBackward = 210e12, kBandwidth = 2.5e12;
constexpr double kLaunch = 4e-6;

struct Cost {
  double forward = 0, backward = 0;
};

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
    c.backward += 2 * rows * d * (2 * q + 2 * kv) / (kRateBackward * speed) + 5 * bytes / (kBandwidth * speed) +
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
  if (device->shared_per_block < shared) {
    char text[128];
    std::snprintf(text, sizeof(text),
                  "head_dim %d needs %zu bytes of shared memory per block, the device has %zu",
                  static_cast<int>(p.head_dim), shared, device->shared_per_block);
    return no(text);
  }

  const char *no_chunks = p.degree > 2                   ? "chunked form for degrees 1 and 2 only"
                          : p.degree == 1 && p.use_state ? "no states of degree 1"
                                                         : nullptr;
  const bool pinned = pins.form == POWERATTN_FORM_CHUNKED;
  if (no_chunks && (p.use_state || pinned)) return no(no_chunks);
  if (p.use_state && pins.form == POWERATTN_FORM_ATTENTION) return no("states need the chunked form");

  const int sms = device->sm_count;
  const int64_t chunk = pins.chunk > 0 ? pins.chunk : automatic_chunk(p, sms);
  const Cost attention = cost(p, 0, sms);
  bool chunked = p.use_state || pinned;
  if (!chunked && !no_chunks && pins.form != POWERATTN_FORM_ATTENTION && p.max_seq_len > chunk) {
    const Cost c = cost(p, chunk, sms);
    chunked = c.forward + c.backward < attention.forward + attention.backward;
  }
  const Cost chosen = chunked ? cost(p, chunk, sms) : attention;
  tiling->form = chunked ? Form::kChunked : Form::kAttention;
  tiling->chunk = chunked ? chunk : std::max<int64_t>(p.seq_len, 1);
  tiling->forward_s = chosen.forward;
  tiling->backward_s = chosen.backward;
  return true;
}

// ---- Memory: the same walk gives the sizes (base = null) and the pointers of a call.

using cuda::Carver;

bool chunked(const Tiling &t) { return t.form == Form::kChunked; }
int64_t chunk_of(const Problem &p, const Tiling &t) {
  return chunked(t) ? t.chunk : std::max<int64_t>(p.seq_len, 1);
}
// Z is needed for the row sums, and for z of the states even when outputs are not normalised.
bool with_z(const Problem &p) { return p.degree == 2 && (p.normalize || p.use_state); }

// float16 states are counted in powers of two (kernels/cuda/sm80/units.h).
bool with_units(const Problem &p) { return p.dtype == Dtype::kFloat16; }

// The states that a backward needs again: what `saved` holds.
struct States {
  uint16_t *tiles = nullptr, *z = nullptr;
  cuda::Units *units = nullptr;
};
States carve_states(const Problem &p, const Tiling &t, Carver *c) {
  States s;
  if (!chunked(t)) return s;
  const int d = static_cast<int>(p.head_dim);
  const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv;
  s.tiles = c->take<uint16_t>(slots * cuda::slot_elements(p.degree, d, d));
  if (with_z(p)) s.z = c->take<uint16_t>(slots * 2 * d * d);
  if (with_units(p)) s.units = c->take<cuda::Units>(slots);
  return s;
}

struct Common {
  void *tables = nullptr;
  float *g = nullptr;
  float *z_local = nullptr;
  float *end_local = nullptr;  // the last sum of each sequence
  cuda::Range *ranges = nullptr;
  cuda::Bounds *peaks = nullptr;
  uint16_t *q = nullptr, *k = nullptr;  // rotated, [b, heads, t, head_dim]
};
Common carve_common(const Problem &p, const Tiling &t, Carver *c) {
  Common m;
  m.tables = c->take<char>(static_cast<int64_t>(cuda::chunk_table_bytes(p, chunk_of(p, t), k80::kRowTile)));
  m.g = c->take<float>(p.batch * p.heads_kv * p.seq_len);
  if (chunked(t) && with_z(p))
    m.z_local = c->take<float>(cuda::chunk_bound(p, t.chunk) * p.heads_kv * p.head_dim * p.head_dim);
  if (chunked(t) && p.use_state) {
    const int d = static_cast<int>(p.head_dim);
    m.end_local = c->take<float>(p.sequences * p.heads_kv * cuda::slot_elements(p.degree, d, d));
  }
  if (chunked(t) && with_units(p)) {
    m.ranges = c->take<cuda::Range>(cuda::chunk_bound(p, t.chunk) * p.heads_kv);
    if (p.use_state) m.peaks = c->take<cuda::Bounds>(p.sequences * p.heads_kv * k80::kPeaks);
  }
  if (with_rope(p)) {
    m.q = c->take<uint16_t>(p.batch * p.heads_q * p.seq_len * p.head_dim);
    m.k = c->take<uint16_t>(p.batch * p.heads_kv * p.seq_len * p.head_dim);
  }
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
  float *k_state_dot = nullptr, *boundary = nullptr;
  float *d_q = nullptr, *d_k = nullptr;  // of the rotated q, k
  uint16_t *tiles = nullptr, *z = nullptr;
  cuda::Units *units = nullptr;
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
  if (chunked(t)) {
    const int d = static_cast<int>(p.head_dim);
    const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv;
    g.boundary = c->take<float>(slots);
    g.k_state_dot = c->take<float>(rows_kv);
    g.tiles = c->take<uint16_t>(slots * cuda::slot_elements(p.degree, d, d));
    if (with_z(p)) g.z = c->take<uint16_t>(slots * 2 * d * d);
    if (with_units(p)) g.units = c->take<cuda::Units>(slots);
  }
  return g;
}

Sizes sizes(const Problem &p, const Tiling &t) {
  Sizes s;
  Carver saved(nullptr), forward(nullptr), backward(nullptr);
  carve_states(p, t, &saved);
  carve_common(p, t, &forward);
  carve_norms(p, t, &forward);
  carve_common(p, t, &backward);
  carve_gradients(p, t, &backward);
  s.saved = saved.used();
  s.forward = forward.used() + s.saved;
  s.backward_saved = backward.used();
  s.backward = backward.used() + s.saved;
  return s;
}

void describe(const Problem &p, const Tiling &t, std::string *text) {
  char line[512];
  const int d = static_cast<int>(p.head_dim);
  std::snprintf(
      line, sizeof(line),
      "  mma.sync.m16n8k16, float32 accumulators; output and dv: 128 rows a block (4 warps of 32: each\n"
      "    ldmatrix of a column feeds two row fragments); dq and dk: 128 rows (%s); columns by 64\n",
      d == 128 ? "8 warps of 16: registers" : "4 warps of 32");
  text->append(line);
  const char *const name = p.dtype == Dtype::kFloat16 ? "float16" : "bfloat16";
  if (chunked(t)) {
    std::snprintf(line, sizeof(line),
                  "  states: %d tiles of 64 x %d %s per chunk and head (%d padded rows), %" PRId64
                  " chunks; local sums in %s (float32 into a final state), scan in float32, row sums "
                  "through Z in two %s parts\n",
                  cuda::tile_count(p.degree, d), d, name, cuda::tile_rows(p.degree, d),
                  cuda::chunk_bound(p, t.chunk), name, name);
    text->append(line);
    if (with_units(p))
      text->append(
          "  float16 states are counted in a power of two per chunk and head, from bounds of one more pass\n");
  }
  if (p.max_seq_len > 0 && p.degree <= 2) {
    const cuda::DeviceProperties *const device = device_of(p);
    const int sms = device != nullptr ? device->sm_count : kReferenceSms;
    const Cost attention = cost(p, 0, sms);
    std::snprintf(line, sizeof(line), "  predicted forward + backward, ms: attention form %.3g",
                  (attention.forward + attention.backward) * 1e3);
    text->append(line);
    for (const int64_t chunk : {256, 512, 1024, 2048}) {
      const Cost c = cost(p, chunk, sms);
      std::snprintf(line, sizeof(line), ", chunk %" PRId64 " %.3g", chunk, (c.forward + c.backward) * 1e3);
      text->append(line);
    }
    text->append("\n");
  }
  if (with_rope(p))
    text->append(
        "  prepare pass: q and k are rotated into contiguous copies, their gradients back from float32\n");
  text->append("  rows that are not 16-byte aligned are loaded element by element (slower, no copy)\n");
}

// ---- Execution.

// The call's view of the problem: table, shape, gates. Launches stop at the first error.
struct Call {
  const Problem &p;
  const Tiling &t;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  Common common;
  k80::Shape shape;
  const float *g = nullptr;

  Call(const powerattn_plan &plan, void *s)
      : p(plan.problem), t(plan.tiling), stream(static_cast<cudaStream_t>(s)) {}
  bool ok() const { return error == cudaSuccess; }
  void run(cudaError_t e) {
    if (ok()) error = e;
  }
  float weight_scale() const { return static_cast<float>(std::pow(p.scale, p.degree)); }

  void begin(const Common &memory, const int64_t *cu_seqlens, const powerattn_tensor &log_g) {
    common = memory;
    run(cuda::build_chunks(p, chunk_of(p, t), k80::kRowTile, cu_seqlens, common.tables, &shape.table, stream));
    shape.packed = p.packed;
    shape.degree = p.degree;
    shape.heads_q = static_cast<int32_t>(p.heads_q);
    shape.heads_kv = static_cast<int32_t>(p.heads_kv);
    shape.head_dim = static_cast<int32_t>(p.head_dim);
    shape.seq_len = p.seq_len;
    shape.dtype = p.dtype;
    if (log_g.data != nullptr) {
      g = common.g;
      if (ok()) run(cuda::chunk_gates(p, shape.table, log_g, common.g, nullptr, stream));
    }
  }

  // The tensor that the kernels read: x itself, or its rotated copy.
  powerattn_tensor rotate(const powerattn_tensor &x, uint16_t *copy, int64_t heads, const int64_t *offset) {
    if (copy == nullptr) return x;
    if (ok()) run(cuda::rotate(p, shape.table, x, copy, heads, offset, stream));
    return cuda::rotated(p, copy, heads);
  }
  void rotate_back(const float *x, const powerattn_tensor &out, int64_t heads, const int64_t *offset) {
    if (ok() && x != nullptr) run(cuda::rotate_back(p, shape.table, x, out, heads, offset, stream));
  }

  // What the weighed sums of u need in float16.
  const cuda::Range *ranges(const k80::UpdateArgs &u, const float *delta) {
    if (!with_units(p)) return nullptr;
    k80::RangeArgs a;
    a.shape = shape;
    a.reverse = u.reverse;
    a.x = u.x;
    a.u = u.u;
    a.g = u.g;
    a.r = u.r;
    a.delta = delta;
    a.scale = u.scale;
    a.out = common.ranges;
    if (ok()) run(k80::ranges(a, stream));
    return common.ranges;
  }

  // S and Z before every chunk, from keys and values.
  void states(const powerattn_tensor &k, const powerattn_tensor &v, const powerattn_state &initial,
              const powerattn_state &final, const States &s) {
    k80::UpdateArgs u;
    u.shape = shape;
    u.x = k;
    u.u = v;
    u.g = g;
    u.ranges = ranges(u, nullptr);
    u.local = s.tiles;
    u.end_local = final.s != nullptr ? common.end_local : nullptr;
    if (ok()) run(k80::update(u, stream));
    if (s.z != nullptr) {
      u.end_local = nullptr;
      u.as_z = true;
      u.u = k;
      u.local = common.z_local;
      if (ok()) run(k80::update(u, stream));
    }
    k80::ScanArgs a;
    a.shape = shape;
    a.g = g;
    a.tiles = s.tiles;
    a.z_local = s.z != nullptr ? common.z_local : nullptr;
    a.z_tiles = s.z;
    a.ranges = u.ranges;
    a.units = s.units;
    a.peaks = common.peaks;
    a.initial = initial;
    a.final = final;
    a.end_local = final.s != nullptr ? common.end_local : nullptr;
    if (ok()) run(k80::scan(a, stream));
  }

  void zero_padding(const powerattn_tensor &out, Dtype dtype, int64_t heads, int64_t dim) {
    if (ok() && p.packed && out.data != nullptr)
      run(cuda::zero_padding(p, shape.table, out, dtype, heads, dim, stream));
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
  States states = carve_states(p, plan.tiling, args.saved != nullptr ? &saved : &workspace);
  const bool sums = args.row_norm.data != nullptr;
  if (sums && norms.z != nullptr) {
    common.z_local = norms.z_local;
    states.z = norms.z;
  }
  call.begin(common, args.cu_seqlens, args.log_g);
  const powerattn_tensor tq = call.rotate(args.q, common.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.k, p.heads_kv, args.rope_offset);
  if (chunked(plan.tiling)) call.states(tk, args.v, args.initial_state, args.final_state, states);

  k80::OutputArgs o;
  o.shape = call.shape;
  o.normalize = p.normalize;
  o.x = tq;
  o.z = tk;
  o.u = args.v;
  o.out = args.y;
  o.g = call.g;
  o.state = states.tiles;
  o.z_state = p.normalize || sums ? states.z : nullptr;
  o.units = states.units;
  o.scale = call.weight_scale();
  o.eps = static_cast<float>(p.eps);
  o.row_norm = args.row_norm;
  if (call.ok()) call.run(k80::output(o, call.stream));
  if (sums && norms.keys != nullptr) {
    k80::NormArgs n;
    n.shape = call.shape;
    n.q = tq;
    n.k = tk;
    n.g = call.g;
    n.scale = o.scale;
    n.z = norms.keys;
    n.row_norm = args.row_norm;
    if (call.ok()) call.run(k80::add_norms(n, call.stream));
  }
  call.zero_padding(args.y, p.dtype, p.heads_q, p.value_dim);
  call.zero_padding(args.row_norm, Dtype::kFloat32, p.heads_q, 1);
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
  const States states = carve_states(p, plan.tiling, args.saved != nullptr ? &saved : &workspace);
  call.begin(common, args.cu_seqlens, args.log_g);
  const powerattn_tensor tq = call.rotate(args.q, common.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.k, p.heads_kv, args.rope_offset);
  if (p.normalize) {
    k80::RowsArgs r;
    r.shape = call.shape;
    r.y = args.y;
    r.d_y = args.d_y;
    r.row_norm = args.row_norm;
    r.r = own.r;
    r.delta = own.delta;
    if (call.ok()) call.run(k80::rows(r, call.stream));
    k80::DeltaArgs d;
    d.shape = call.shape;
    d.q = tq;
    d.k = tk;
    d.v = args.v;
    d.d_y = args.d_y;
    d.row_norm = args.row_norm;
    d.log_g = args.log_g;
    d.g = call.g;
    d.scale = call.weight_scale();
    d.eps = static_cast<float>(p.eps);
    d.delta = own.delta;
    if (call.ok()) call.run(k80::delta(d, call.stream));
  }
  const bool in_chunks = chunked(plan.tiling), z = in_chunks && with_z(p);
  if (in_chunks && args.saved == nullptr)
    call.states(tk, args.v, args.initial_state, powerattn_state{}, states);

  // dq first: it corrects delta, which everything else reads.
  k80::GradientArgs q;
  q.shape = call.shape;
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
  if (call.ok()) call.run(k80::gradient(q, call.stream));
  if (in_chunks) {
    k80::UpdateArgs u;
    u.shape = call.shape;
    u.reverse = true;
    u.x = tq;
    u.u = args.d_y;
    u.g = call.g;
    u.r = own.r;
    u.scale = call.weight_scale();
    u.ranges = call.ranges(u, own.delta);
    u.local = own.tiles;
    u.end_local = args.d_initial_state.s != nullptr ? common.end_local : nullptr;
    if (call.ok()) call.run(k80::update(u, call.stream));
    if (z && p.normalize) {
      u.as_z = true;
      u.end_local = nullptr;
      u.u = tq;
      u.delta = own.delta;
      u.local = common.z_local;
      if (call.ok()) call.run(k80::update(u, call.stream));
    } else if (z && call.ok()) {  // no row sum: Z gets its gradient from the end of the sequence alone
      const size_t bytes =
          static_cast<size_t>(cuda::chunk_bound(p, plan.tiling.chunk) * p.heads_kv * p.head_dim * p.head_dim) *
          sizeof(float);
      call.run(cudaMemsetAsync(common.z_local, 0, bytes, call.stream));
    }
    k80::ScanArgs a;
    a.shape = call.shape;
    a.reverse = true;
    a.g = call.g;
    a.tiles = own.tiles;
    a.z_local = z ? common.z_local : nullptr;
    a.z_tiles = own.z;
    a.ranges = u.ranges;
    a.units = own.units;
    a.peaks = common.peaks;
    a.initial = args.d_final_state;
    a.final = args.d_initial_state;
    a.end_local = args.d_initial_state.s != nullptr ? common.end_local : nullptr;
    if (call.ok()) call.run(k80::scan(a, call.stream));
  }

  k.reverse = true;
  k.x = tk;
  k.u = args.v;
  k.z = tq;
  k.y = args.d_y;
  k.out = args.d_k;
  k.state = own.tiles;
  k.z_state = own.z;
  k.units = own.units;
  k.dot = args.d_log_g.data != nullptr ? own.k_dot : nullptr;
  k.state_dot = args.d_log_g.data != nullptr && in_chunks ? own.k_state_dot : nullptr;
  k.out_float = own.d_k;
  if (call.ok()) call.run(k80::gradient(k, call.stream));
  call.rotate_back(own.d_q, args.d_q, p.heads_q, args.rope_offset);
  call.rotate_back(own.d_k, args.d_k, p.heads_kv, args.rope_offset);

  k80::OutputArgs v;
  v.shape = call.shape;
  v.reverse = true;
  v.x = tk;
  v.z = tq;
  v.u = args.d_y;
  v.out = args.d_v;
  v.g = call.g;
  v.r = own.r;
  v.state = own.tiles;
  v.units = own.units;
  v.scale = call.weight_scale();
  if (call.ok()) call.run(k80::output(v, call.stream));

  if (args.d_log_g.data != nullptr) {
    k80::GateArgs w;
    w.shape = call.shape;
    w.q_dot = own.q_dot;
    w.k_dot = own.k_dot;
    w.r = own.r;
    w.delta = own.delta;
    w.eps = static_cast<float>(p.eps);
    if (in_chunks) {
      w.s_tiles = states.tiles;
      w.ds_tiles = own.tiles;
      w.z_tiles = states.z;
      w.dz_tiles = own.z;
      w.units = states.units;
      w.d_units = own.units;
      w.g = call.g;
      w.k_state_dot = own.k_state_dot;
      w.initial = args.initial_state;
      w.d_final = args.d_final_state;
      w.boundary = own.boundary;
    }
    w.d_log_g = args.d_log_g;
    if (call.ok()) call.run(k80::gate_gradient(w, call.stream));
  }
  call.zero_padding(args.d_q, p.dtype, p.heads_q, p.head_dim);
  call.zero_padding(args.d_k, p.dtype, p.heads_kv, p.head_dim);
  call.zero_padding(args.d_v, p.dtype, p.heads_kv, p.value_dim);
  call.zero_padding(args.d_log_g, Dtype::kFloat32, p.heads_kv, 1);
  return cuda::check_launch(call.error, "cuda.sm80 backward");
}

}  // namespace

extern const Implementation kCudaSm80;
const Implementation kCudaSm80 = {"cuda.sm80", choose,  sizes,   describe, forward,
                                  backward,    nullptr, nullptr, nullptr};

}  // namespace powerattn
