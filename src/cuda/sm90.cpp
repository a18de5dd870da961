// SPDX-License-Identifier: Apache-2.0
// "cuda.sm90": bfloat16 and float16 on Hopper's warpgroup products (wgmma), for compute capability 9.0. This
// file decides what runs, how it is tiled and where its memory lies; kernels/cuda/sm90 computes, and the scan
// over chunks, the ranges of float16 and the gradient of the gates come from kernels/cuda/sm80, whose states
// lie the same way.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "backend.h"
#include "kernels/cuda/chunks.h"
#include "kernels/cuda/sm80/args.h"
#include "kernels/cuda/sm90/kernels.h"
#include "kernels/cuda/tiles.h"
#include "src/cuda/common.h"
#include "src/cuda/rope.h"
#include "status.h"

namespace powerattn {
namespace {

namespace k80 = cuda::sm80;
namespace k90 = cuda::sm90;

using cuda::device_of;
using cuda::kReferenceSms;
using cuda::with_rope;

// ---- What has run on a device.

// What the kernels can do beyond the row "cuda.sm90" as it was measured. A feature whose kernels have been
// compiled and checked in emulation (tests/emulation), but have not run on a device, is never chosen: only the
// row "cuda.sm90.next" takes it, and only POWERATTN_CUDA_IMPLEMENTATION reaches that row. Its line in kMeasured
// becomes true when its tests and times are in docs/performance-log.md.
struct Features {
  bool states;  // initial and final states and their gradients: exact update weights, corrected delta
  bool d128;    // head_dim = value_dim = 128
  bool rope;    // rotary embedding: through the prepare pass
  bool half;    // float16
};
constexpr Features kMeasured = {/*states=*/true, /*d128=*/true, /*rope=*/true, /*half=*/true};
constexpr Features kWritten = {/*states=*/true, /*d128=*/true, /*rope=*/true, /*half=*/true};

const char kNotMeasured[] = "not yet run on a device (POWERATTN_CUDA_IMPLEMENTATION=cuda.sm90.next tries it)";

// The features that a problem needs and a row does not offer, as words; empty: none.
std::string missing(const Problem &p, const Features &f) {
  std::string text;
  const auto need = [&](bool needed, bool offered, const char *what) {
    if (needed && !offered) text += (text.empty() ? "" : ", ") + std::string(what);
  };
  need(p.use_state, f.states, "initial and final states");
  need(p.head_dim == 128, f.d128, "head_dim 128");
  need(with_rope(p), f.rope, "rotary embedding");
  need(p.dtype == Dtype::kFloat16, f.half, "float16");
  return text;
}

// ---- The plan.

// Executed rates (multiply-adds counted twice) of the kernels of one head_dim, each alone.
struct Rates {
  double intra;           // output: two products per pair of tokens
  double state;           // output: phi(q) S
  double update;          // update: phi(k)^T v
  double joint;           // dq, dk and dv of the attention form in one pass: five products
  double gradient;        // dq, dk and dv inside a chunk: seven products
  double gradient_state;  // their parts of the state
};
// Measured on an H100 and an H200 with 132 multiprocessors, at the lengths where forms cross
// (docs/performance-log.md).
constexpr Rates kRates64 = {600e12, 620e12, 450e12, 470e12, 480e12, 430e12};
constexpr Rates kRates128 = {680e12, 640e12, 550e12, 580e12, 550e12, 500e12};
constexpr double kBandwidth = 3.2e12;
constexpr double kLaunch = 3e-6;

// Whether dq, dk and dv come from one pass. Its sums of dq, for one sequence and key head at a time, have to
// stay in the L2 cache: two passes were faster with 33 MB of them, one with 17 MB (docs/performance-log.md).
constexpr int64_t kMostSums = int64_t(24) << 20;
bool in_one_pass(const Problem &p, bool chunks) {
  return !chunks && p.degree > 1 && p.max_seq_len * p.head_dim * p.group() <= kMostSums / 4;
}

struct Cost {
  double forward = 0, backward = 0;
};

// chunk = 0: attention form. Padded state rows; a row tile sees half of the span and, on average, half of
// itself.
Cost cost(const Problem &p, int64_t chunk, int sms) {
  const Rates &rate = p.head_dim == 128 ? kRates128 : kRates64;
  const double speed = static_cast<double>(std::max(sms, 1)) / kReferenceSms;
  const double d = static_cast<double>(p.head_dim), t = static_cast<double>(p.max_seq_len);
  const double total = static_cast<double>(p.batch) * static_cast<double>(p.seq_len);
  const double q = total * static_cast<double>(p.heads_q), kv = total * static_cast<double>(p.heads_kv);
  const double span = (chunk > 0 ? std::min(static_cast<double>(chunk), t) : t) / 2;
  const double io = 4 * d * (q + kv) / (kBandwidth * speed);  // q, k, v, y once
  Cost c;
  c.forward = std::max(q * (span + 64) * 4 * d / (rate.intra * speed), io) + 4 * kLaunch;
  if (in_one_pass(p, chunk > 0))
    c.backward = q * (span + 64) * 10 * d / (rate.joint * speed) + io;
  else  // three products for dq, four for dk and dv
    c.backward = q * (span + 64) * 14 * d / (rate.gradient * speed) + io;
  c.backward += 8 * kLaunch;
  if (with_rope(p)) {  // q and k read and written; backward also their gradients, float32 into bfloat16
    c.forward += io + 2 * kLaunch;
    c.backward += 3 * io + 4 * kLaunch;
  }
  if (chunk > 0) {
    const double rows = cuda::tile_rows(p.degree, static_cast<int>(p.head_dim));
    const double chunks = kv / static_cast<double>(chunk), bytes = 3 * chunks * rows * d * 2;
    const double update = 2 * rows * d / (rate.update * speed), scan = bytes / (kBandwidth * speed);
    c.forward += kv * update + q * 2 * rows * d / (rate.state * speed) + scan + 3 * kLaunch;
    c.backward +=
        q * update + (q + 2 * kv) * 2 * rows * d / (rate.gradient_state * speed) + 2 * scan + 4 * kLaunch;
  }
  return c;
}

// The state's traffic against the work inside a chunk is flat around 1024 for d = 64, 2048 for d = 128. Shorter
// when that would leave multiprocessors without a slice of a state's tiles (3 of 12, 23 of 6).
int64_t automatic_chunk(const Problem &p, int sms) {
  int64_t chunk = p.head_dim == 128 ? 2048 : 1024;
  const int64_t slices = p.head_dim == 128 ? 23 : 3;
  while (chunk > 256 && p.batch * (p.seq_len / chunk) * p.heads_kv * slices < sms) chunk /= 2;
  return chunk;
}

bool choose(const Features &features, Op op, const Problem &p, const Pins &pins, Tiling *tiling,
            std::string *why) {
  auto no = [&](const char *reason) {
    *why = reason;
    return false;
  };
  if (op == Op::kStep || op == Op::kSummary) return no("forward and backward only");
  const bool half = p.dtype == Dtype::kFloat16;
  if (!half && p.dtype != Dtype::kBfloat16) return no("bfloat16 and float16 only");
  if (p.head_dim != p.value_dim || (p.head_dim != 64 && p.head_dim != 128))
    return no("head_dim = value_dim of 64 or 128 only");
  if (p.degree != 1 && p.degree != 2 && p.degree != 4) return no("degrees 1, 2 and 4 only");
  if (p.use_state && p.state_dtype != Dtype::kFloat32) return no("float32 states only");
  if (p.use_state && p.degree != 2) return no("states of degree 2 only");
  const cuda::DeviceProperties *const device = device_of(p);
  if (device == nullptr || device->major != 9 || device->minor != 0)
    return no("needs a device of compute capability 9.0 (its instructions exist nowhere else)");
  if (device->sm_count < 3) return no("needs three multiprocessors");
  const char *no_chunks = p.degree == 2 ? nullptr
                          : p.degree == 1
                              ? "no chunked form of degree 1: its row norms would miss the part of the state"
                              : "chunked form for degree 2 only";
  const bool pinned = pins.form == POWERATTN_FORM_CHUNKED;
  if (no_chunks && pinned) return no(no_chunks);
  if (p.use_state && no_chunks) return no(no_chunks);
  if (p.use_state && pins.form == POWERATTN_FORM_ATTENTION) return no("states need the chunked form");
  if (const std::string unmeasured = missing(p, features); !unmeasured.empty())
    return no((unmeasured + ": " + kNotMeasured).c_str());

  const int sms = device->sm_count;
  const int64_t chunk = pins.chunk > 0 ? pins.chunk : automatic_chunk(p, sms);
  const Cost attention = cost(p, 0, sms);
  bool chunked = p.use_state || pinned;
  if (!chunked && p.degree == 2 && pins.form != POWERATTN_FORM_ATTENTION && p.max_seq_len > chunk) {
    const Cost c = cost(p, chunk, sms);
    chunked = c.forward + c.backward < attention.forward + attention.backward;
  }
  // A degree whose chunked form runs elsewhere is only taken here where the attention form wins.
  if (p.degree == 1 && pins.form == POWERATTN_FORM_AUTO && p.max_seq_len > 1024) return no(no_chunks);
  const Cost chosen = chunked ? cost(p, chunk, sms) : attention;
  tiling->form = chunked ? Form::kChunked : Form::kAttention;
  tiling->chunk = chunked ? chunk : std::max<int64_t>(p.seq_len, 1);
  tiling->forward_s = chosen.forward;
  tiling->backward_s = chosen.backward;
  return true;
}

template <const Features &kFeatures>
bool choose_from(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  return choose(kFeatures, op, p, pins, tiling, why);
}

// ---- Memory: the same walk gives the sizes (base = null) and the pointers of a call.

using cuda::Carver;

constexpr int kTickets = 4;  // counters per launch
constexpr int kTicketLaunches = 6;

bool chunked(const Tiling &t) { return t.form == Form::kChunked; }
int64_t chunk_of(const Problem &p, const Tiling &t) {
  return chunked(t) ? t.chunk : std::max<int64_t>(p.seq_len, 1);
}
// Z is needed for the row sums, which row_norm reports even when outputs are not normalised.
bool with_z(const Problem &p) { return p.degree == 2; }
bool with_units(const Problem &p) { return p.dtype == Dtype::kFloat16; }

// The states that a backward needs again: what `saved` holds.
struct States {
  uint16_t *tiles = nullptr, *z = nullptr;
  cuda::Units *units = nullptr;  // float16
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

// float16, backward: four numbers for each chunk and key head, zero on entry as the tickets before them are.
int64_t limits_of(const Problem &p, const Tiling &t) {
  return with_units(p) ? 4 * cuda::chunk_bound(p, chunk_of(p, t)) * p.heads_kv : 0;
}
int64_t counters_of(const Problem &p, const Tiling &t) { return kTickets * kTicketLaunches + limits_of(p, t); }

struct Common {
  void *tables = nullptr;
  int32_t *tickets = nullptr;
  double *gate = nullptr;  // sums inside a chunk
  float *g = nullptr, *weight = nullptr, *decay = nullptr;
  float *z_local = nullptr;
  float *end_local = nullptr;           // the last sum of each sequence, with states
  cuda::Range *ranges = nullptr;        // float16
  cuda::Bounds *peaks = nullptr;        // the same, with states
  uint16_t *q = nullptr, *k = nullptr;  // rotated, [b, heads, t, head_dim]
};
Common carve_common(const Problem &p, const Tiling &t, Carver *c) {
  Common m;
  const int64_t rows = p.batch * p.heads_kv * p.seq_len;
  m.tables = c->take<char>(static_cast<int64_t>(cuda::chunk_table_bytes(p, chunk_of(p, t), k90::kOutputRows)));
  m.tickets = c->take<int32_t>(counters_of(p, t));
  m.gate = c->take<double>(rows);
  if (chunked(t)) {
    const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv;
    m.g = c->take<float>(rows);
    m.weight = c->take<float>(rows);
    m.decay = c->take<float>(slots);
    if (with_z(p)) m.z_local = c->take<float>(slots * p.head_dim * p.head_dim);
    if (with_units(p)) {
      m.ranges = c->take<cuda::Range>(slots);
      if (p.use_state) m.peaks = c->take<cuda::Bounds>(p.sequences * p.heads_kv * k80::kPeaks);
    }
    if (p.use_state) {
      const int d = static_cast<int>(p.head_dim);
      m.end_local = c->take<float>(p.sequences * p.heads_kv * cuda::slot_elements(p.degree, d, d));
    }
  }
  if (with_rope(p)) {
    m.q = c->take<uint16_t>(p.batch * p.heads_q * p.seq_len * p.head_dim);
    m.k = c->take<uint16_t>(rows * p.head_dim);
  }
  return m;
}

struct Gradients {
  float *r = nullptr, *delta = nullptr, *q_dot = nullptr, *k_dot = nullptr, *boundary = nullptr;
  float *k_state_dot = nullptr;  // with states
  float *weight = nullptr, *z_weight = nullptr;
  float *d_q = nullptr, *d_k = nullptr;  // of the rotated q and k
  float *sums = nullptr;                 // of dq, in one pass with dk and dv
  int32_t *turns = nullptr;
  uint16_t *tiles = nullptr, *z = nullptr;
  cuda::Units *units = nullptr;  // float16
};
int64_t tiles_of(const Problem &p, const Tiling &t) {
  return cuda::tile_bound(p, chunk_of(p, t), k90::kOutputRows);
}
int64_t turns_of(const Problem &p, const Tiling &t) { return k90::joint_turns(tiles_of(p, t), p.heads_q); }
Gradients carve_gradients(const Problem &p, const Tiling &t, Carver *c) {
  Gradients g;
  const int64_t rows_q = p.batch * p.heads_q * p.seq_len, rows_kv = p.batch * p.heads_kv * p.seq_len;
  g.r = c->take<float>(rows_q);
  g.delta = c->take<float>(rows_q);
  g.q_dot = c->take<float>(rows_q);
  g.k_dot = c->take<float>(rows_kv);
  if (with_rope(p)) {
    g.d_q = c->take<float>(rows_q * p.head_dim);
    g.d_k = c->take<float>(rows_kv * p.head_dim);
  }
  if (in_one_pass(p, chunked(t))) {
    g.turns = c->take<int32_t>(turns_of(p, t));
    g.sums = c->take<float>(k90::joint_sums(tiles_of(p, t), p.heads_q, p.head_dim));
  }
  if (chunked(t)) {
    const int d = static_cast<int>(p.head_dim);
    const int64_t slots = cuda::chunk_bound(p, t.chunk) * p.heads_kv;
    g.weight = c->take<float>(rows_q);
    g.z_weight = c->take<float>(rows_q);
    g.boundary = c->take<float>(slots);
    if (p.use_state) g.k_state_dot = c->take<float>(rows_kv);
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
  if (const std::string unmeasured = missing(p, kMeasured); !unmeasured.empty())
    text->append("  NOT YET RUN ON A DEVICE: " + unmeasured + "; checked in emulation only\n");
  const bool wide = p.head_dim == 128;
  text->append(
      "  wgmma m64n64k16 and m64n128k16, one producer and two consumer warpgroups, persistent blocks\n"
      "    output: 256 rows (4 x m64; a state tile from L2 serves 256 rows, so L2 gives 1/256 byte per "
      "FLOP);\n");
  text->append(
      wide
          ? "      q is the A operand in shared memory (sums of 2 x 64 x 128 fill 128 registers); 64 KB q + 4\n"
            "      stages x 32 KB + 16 KB y + meta = 213 KB\n"
          : "      A in registers; 32 KB q + 8 stages x 16 KB + 16 KB y + meta = 181 KB\n");
  if (in_one_pass(p, chunked(t)))
    text->append(wide ? "    dq, dk and dv in one pass: 128 keys (2 x m64), 64 queries a stage; 216 KB\n"
                      : "    dq, dk and dv in one pass: 128 keys (2 x m64), 64 queries a stage; 225 KB\n");
  else
    text->append(wide ? "    dq, dk and dv: 128 rows (2 x m64), x and u in shared memory; 224 KB\n"
                      : "    dq, dk and dv: 128 rows (2 x m64: two score tiles and the gradients fill 240 "
                        "registers); 196 KB\n");
  if (chunked(t)) {
    const int d = static_cast<int>(p.head_dim);
    const char *const name = with_units(p) ? "float16" : "bfloat16";
    if (p.degree == 2)
      text->append(wide ? "    update: 6 of the 136 state tiles per unit (3 accumulators of 64 registers per "
                          "warpgroup), 64 tokens a\n"
                          "      stage; 4 stages x 36 KB (k, v, weighted scalars of k; 40 KB with states) + 32 "
                          "KB = 178 KB\n"
                        : "    update: 12 of the 36 state tiles per block (6 accumulators of 32 registers per "
                          "warpgroup), chunk by\n"
                          "      chunk, 64 tokens a stage; 6 stages x 24 KB (k, v, weighted scalars of k; with "
                          "states 5 x 32 KB)\n"
                          "      + 32 KB = 179 KB\n");
    std::snprintf(line, sizeof(line),
                  "  states: %d tiles of 64 x %d %s per chunk and head, %" PRId64
                  " chunks; sums in float32, kept as %s, scan in float32; row sums through Z in two parts\n",
                  cuda::tile_count(p.degree, d), d, name, cuda::chunk_bound(p, t.chunk), name);
    text->append(line);
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
  text->append(
      "  rows come through tensor maps; the last ones of a packed sequence, or of a chunk whose size is no "
      "multiple\n"
      "  of 64, by threads; and so, element by element (slower, no copy), what is not 16-byte aligned\n");
}

// ---- Execution.

bool aligned16(const powerattn_tensor &t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_b % 8 == 0 && t.stride_t % 8 == 0 &&
         t.stride_h % 8 == 0;
}
k90::Tensor view(const powerattn_tensor &t) {
  k90::Tensor v;
  v.data = t.data;
  v.stride_b = t.stride_b;
  v.stride_t = t.stride_t;
  v.stride_h = t.stride_h;
  v.vector = aligned16(t);
  return v;
}

// The kernels of each head size.
cudaError_t update(const k90::UpdateArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::update128(a, sms, stream) : k90::update64(a, sms, stream);
}
cudaError_t output(const k90::OutputArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::output128(a, sms, stream) : k90::output64(a, sms, stream);
}
cudaError_t joint(const k90::JointArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::joint128(a, sms, stream) : k90::joint64(a, sms, stream);
}
cudaError_t gradient(const k90::GradientArgs &a, int sms, cudaStream_t stream) {
  return a.p.head_dim == 128 ? k90::gradient128(a, sms, stream) : k90::gradient64(a, sms, stream);
}

// The call's view of the problem: table, shape, gates. Launches stop at the first error.
struct Call {
  const Problem &p;
  const Tiling &t;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  int sms = kReferenceSms;
  Common common;
  k90::Shape shape;
  k80::Shape shape80;
  const double *gate = nullptr;
  int launches = 0;

  Call(const powerattn_plan &plan, void *s)
      : p(plan.problem), t(plan.tiling), stream(static_cast<cudaStream_t>(s)) {
    if (const cuda::DeviceProperties *const device = device_of(p)) sms = device->sm_count;
  }
  template <class F>
  void run(F launch) {
    if (error == cudaSuccess) error = launch();
  }
  int32_t *tickets() { return common.tickets + kTickets * launches++; }
  float weight_scale() const { return static_cast<float>(std::pow(p.scale, p.degree)); }
  const float *g() const { return gate != nullptr ? common.g : nullptr; }

  void place(const Common &memory, const powerattn_tensor &log_g) {
    common = memory;
    shape.table = cuda::place_chunks(p, chunk_of(p, t), k90::kOutputRows, common.tables);
    shape.tokens = p.seq_len;
    shape.packed = p.packed;
    shape.half = p.dtype == Dtype::kFloat16;
    shape.heads_q = static_cast<int32_t>(p.heads_q);
    shape.heads_kv = static_cast<int32_t>(p.heads_kv);
    shape.group = static_cast<int32_t>(p.group());
    shape.degree = p.degree;
    shape.normalize = p.normalize;
    shape.head_dim = static_cast<int32_t>(p.head_dim);
    shape.scale_p = weight_scale();
    shape.eps = static_cast<float>(p.eps);
    shape80.table = shape.table;
    shape80.packed = p.packed;
    shape80.degree = p.degree;
    shape80.heads_q = shape.heads_q;
    shape80.heads_kv = shape.heads_kv;
    shape80.head_dim = shape.head_dim;
    shape80.seq_len = p.seq_len;
    shape80.dtype = p.dtype;
    if (log_g.data != nullptr) gate = common.gate;
  }

  struct Zeros {  // 4 bytes each
    void *at = nullptr;
    int64_t count = 0;
  };
  // What every kernel after reads: tables, gate sums, zeros, and `rows`, if any.
  void begin(const int64_t *cu_seqlens, const powerattn_tensor &log_g, const k90::RowsArgs *rows,
             const Zeros &turns, const Zeros &dots) {
    const Zeros zeros[] = {{common.tickets, counters_of(p, t)}, turns, dots};
    const bool alone = rows != nullptr && (p.packed || rows->weight != nullptr);  // its weights need the gates
    if (!p.packed) {
      k90::BeginArgs a;
      a.p = shape;
      a.log_g = log_g;
      a.gate = common.gate;
      a.g = common.g;
      for (int i = 0; i < 3; ++i) {
        a.zeros[i] = zeros[i].at;
        a.zero_count[i] = zeros[i].count;
      }
      a.rows = alone ? nullptr : rows;
      run([&] { return k90::begin(a, stream); });
    } else {
      for (const Zeros &z : zeros)
        if (z.count > 0) zero(z);
      run([&] {
        return cuda::build_chunks(p, chunk_of(p, t), k90::kOutputRows, cu_seqlens, common.tables, &shape.table,
                                  stream);
      });
      if (gate != nullptr)
        run([&] { return cuda::chunk_gates(p, shape.table, log_g, common.g, common.gate, stream); });
    }
    if (alone) run([&] { return k90::rows(*rows, stream); });
  }
  void zero(const Zeros &z) {
    run([&] { return cudaMemsetAsync(z.at, 0, sizeof(int32_t) * static_cast<size_t>(z.count), stream); });
  }

  // The tensor that the kernels read: x itself, or its rotated copy.
  powerattn_tensor rotate(const powerattn_tensor &x, uint16_t *copy, int64_t heads, const int64_t *offset) {
    if (copy == nullptr) return x;
    run([&] { return cuda::rotate(p, shape.table, x, copy, heads, offset, stream); });
    return cuda::rotated(p, copy, heads);
  }
  // Where the gradient of q or k goes: out itself, or float32 that is rotated back.
  k90::Tensor gradient_of(const powerattn_tensor &out, float *copy, int64_t heads) const {
    k90::Tensor v = view(out);
    if (copy == nullptr) return v;
    v.data = copy;
    v.stride_b = 2 * heads * p.seq_len * p.head_dim;
    v.stride_h = 2 * p.seq_len * p.head_dim;
    v.stride_t = 2 * p.head_dim;
    v.vector = 0;
    v.floats = 1;
    return v;
  }
  void rotate_back(const float *x, const powerattn_tensor &out, int64_t heads, const int64_t *offset) {
    if (x != nullptr) run([&] { return cuda::rotate_back(p, shape.table, x, out, heads, offset, stream); });
  }

  // What the weighed sums of b need in float16.
  const cuda::Range *ranges(const powerattn_tensor &x, const powerattn_tensor &u, bool reverse, const float *r,
                            const float *delta) {
    if (!with_units(p)) return nullptr;
    k80::RangeArgs a;
    a.shape = shape80;
    a.reverse = reverse;
    a.x = x;
    a.u = u;
    a.g = g();
    a.r = r;
    a.delta = delta;
    if (reverse) a.scale = weight_scale();
    a.out = common.ranges;
    run([&] { return k80::ranges(a, stream); });
    return common.ranges;
  }

  // S and Z before every chunk, from keys and values.
  void states(const powerattn_tensor &k, const powerattn_tensor &v, const powerattn_state &initial,
              const powerattn_state &final, const States &s) {
    k90::UpdateArgs u;
    u.p = shape;
    u.a = view(k);
    u.b = view(v);
    u.heads_a = shape.heads_kv;
    u.exact = p.use_state;
    u.state = s.tiles;
    u.norm = with_z(p) ? common.z_local : nullptr;
    u.ticket = tickets();
    if (gate != nullptr) {
      u.weight = u.norm_weight = common.weight;
      run([&] { return k90::key_weights({shape, gate, common.weight, common.decay}, stream); });
    }
    u.end = p.use_state && final.s != nullptr ? common.end_local : nullptr;
    u.ranges = ranges(k, v, false, nullptr, nullptr);
    run([&] { return update(u, sms, stream); });
    scan(s.tiles, s.z, s.units, initial, final, false);
  }
  void scan(void *tiles, void *z, cuda::Units *units, const powerattn_state &first, const powerattn_state &last,
            bool reverse) {
    k80::ScanArgs a;
    a.shape = shape80;
    a.reverse = reverse;
    a.g = g();
    a.tiles = tiles;
    a.z_local = with_z(p) ? common.z_local : nullptr;
    a.z_tiles = z;
    a.initial = first;
    a.final = last;
    a.end_local = p.use_state && last.s != nullptr ? common.end_local : nullptr;
    a.ranges = common.ranges;
    a.units = units;
    a.peaks = common.peaks;
    run([&] { return k80::scan(a, stream); });
  }

  void zero_padding(const powerattn_tensor &out, Dtype dtype, int64_t heads, int64_t dim) {
    if (p.packed && out.data != nullptr)
      run([&] { return cuda::zero_padding(p, shape.table, out, dtype, heads, dim, stream); });
  }
};

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.sm90: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(args.saved);
  const Common common = carve_common(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, args.saved != nullptr ? &saved : &workspace);
  call.place(common, args.log_g);
  call.begin(args.cu_seqlens, args.log_g, nullptr, {}, {});
  const powerattn_tensor tq = call.rotate(args.q, common.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.k, p.heads_kv, args.rope_offset);
  if (chunked(plan.tiling)) call.states(tk, args.v, args.initial_state, args.final_state, states);

  k90::OutputArgs o;
  o.p = call.shape;
  o.q = view(tq);
  o.k = view(tk);
  o.v = view(args.v);
  o.y = view(args.y);
  o.row_norm = view(args.row_norm);
  o.gate = call.gate;
  o.state = states.tiles;
  o.norm = states.z;
  o.units = states.units;
  o.first_has_state = args.initial_state.s != nullptr;
  o.ticket = call.tickets();
  call.run([&] { return output(o, call.sms, call.stream); });
  call.zero_padding(args.y, p.dtype, p.heads_q, p.value_dim);
  call.zero_padding(args.row_norm, Dtype::kFloat32, p.heads_q, 1);
  return cuda::check_launch(call.error, "cuda.sm90 forward");
}

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  const Problem &p = plan.problem;
  const cuda::DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return cuda::check_launch(guard.error(), "cuda.sm90: select the device");
  Call call(plan, args.stream);
  Carver workspace(args.workspace), saved(const_cast<void *>(args.saved));
  const Common common = carve_common(p, plan.tiling, &workspace);
  const Gradients own = carve_gradients(p, plan.tiling, &workspace);
  const States states = carve_states(p, plan.tiling, args.saved != nullptr ? &saved : &workspace);
  call.place(common, args.log_g);
  const bool in_chunks = chunked(plan.tiling), z = in_chunks && with_z(p), one_pass = in_one_pass(p, in_chunks);
  k90::RowsArgs rows;
  rows.p = call.shape;
  rows.y = view(args.y);
  rows.dy = view(args.d_y);
  if (p.normalize) rows.row_norm = view(args.row_norm);
  rows.gate = call.gate;
  rows.r = own.r;
  rows.delta = own.delta;
  rows.weight = own.weight;
  rows.norm_weight = own.z_weight;
  // The two halves of head_dim 128 each add to q . dq.
  const bool adds_dots = one_pass && p.head_dim == 128 && args.d_log_g.data != nullptr;
  call.begin(args.cu_seqlens, args.log_g, &rows, {own.turns, one_pass ? turns_of(p, plan.tiling) : 0},
             {own.q_dot, adds_dots ? p.batch * p.heads_q * p.seq_len : 0});
  const powerattn_tensor tq = call.rotate(args.q, common.q, p.heads_q, args.rope_offset);
  const powerattn_tensor tk = call.rotate(args.k, common.k, p.heads_kv, args.rope_offset);
  if (p.normalize) {
    k80::DeltaArgs d;
    d.shape = call.shape80;
    d.q = tq;
    d.k = tk;
    d.v = args.v;
    d.d_y = args.d_y;
    d.row_norm = args.row_norm;
    d.log_g = args.log_g;
    d.g64 = call.gate;
    d.scale = call.weight_scale();
    d.eps = static_cast<float>(p.eps);
    d.delta = own.delta;
    d.weight = own.weight;
    d.norm_weight = own.z_weight;
    call.run([&] { return k80::delta(d, call.stream); });
  }
  const bool ends = args.d_final_state.s != nullptr || args.d_final_state.z != nullptr;

  if (in_chunks && args.saved == nullptr)
    call.states(tk, args.v, args.initial_state, powerattn_state{}, states);
  const auto end_states = [&] {  // dS and dZ after every chunk
    k90::UpdateArgs u;
    u.p = call.shape;
    u.a = view(tq);
    u.b = rows.dy;
    u.heads_a = call.shape.heads_q;
    u.weight = own.weight;
    u.norm_weight = own.z_weight;  // zeros when unnormalised: Z gets its gradient from the final state alone
    u.exact = p.use_state;
    u.state = own.tiles;
    u.norm = z ? common.z_local : nullptr;
    u.ticket = call.tickets();
    u.reverse = 1;
    u.end = p.use_state && args.d_initial_state.s != nullptr ? call.common.end_local : nullptr;
    u.ranges = call.ranges(tq, args.d_y, true, own.r, own.delta);
    call.run([&] { return update(u, call.sms, call.stream); });
    call.scan(own.tiles, own.z, own.units, args.d_final_state, args.d_initial_state, true);
  };

  // With states that leave the call dq comes first, since it corrects delta.
  const bool corrected = p.use_state && p.normalize;
  const auto limits = [&]() -> const int32_t * {  // what float16 counts weights and their gradients in
    if (!call.shape.half) return nullptr;
    int32_t *const out = call.common.tickets + kTickets * kTicketLaunches;
    call.run([&] {
      return k90::limits({call.shape, view(tq), view(tk), view(args.v), rows.dy, own.r, own.delta, out},
                         call.stream);
    });
    return out;
  };
  const auto together = [&] {  // dq, dk and dv of the attention form
    k90::JointArgs j;
    j.p = call.shape;
    j.q = view(tq);
    j.k = view(tk);
    j.v = view(args.v);
    j.dy = rows.dy;
    j.dk = call.gradient_of(args.d_k, own.d_k, p.heads_kv);
    j.dv = view(args.d_v);
    j.gate = call.gate;
    j.r = own.r;
    j.delta = own.delta;
    j.dot = args.d_log_g.data != nullptr ? own.k_dot : nullptr;
    j.dq = call.gradient_of(args.d_q, own.d_q, p.heads_q);
    j.q_dot = args.d_log_g.data != nullptr ? own.q_dot : nullptr;
    j.sums = own.sums;
    j.turns = own.turns;
    j.ticket = call.tickets();
    j.limits = limits();
    call.run([&] { return joint(j, call.sms, call.stream); });
  };
  const auto one_by_one = [&] {  // dq, then dk and dv, with the states' parts
    k90::GradientArgs q;
    q.p = call.shape;
    q.x = view(tq);
    q.u = rows.dy;
    q.z = view(tk);
    q.y = view(args.v);
    q.dx = call.gradient_of(args.d_q, own.d_q, p.heads_q);
    q.gate = call.gate;
    q.r = own.r;
    q.delta = own.delta;
    q.state = states.tiles;
    q.norm = p.normalize ? states.z : nullptr;
    q.units = states.units;
    q.end_has_state = args.initial_state.s != nullptr;
    q.scale_p = call.weight_scale();
    q.dot = args.d_log_g.data != nullptr ? own.q_dot : nullptr;
    q.ticket = call.tickets();
    if (corrected) {
      q.delta_out = own.delta;
      q.weight = own.weight;
      q.norm_weight = own.z_weight;
    }
    q.limits = limits();
    if (in_chunks && !corrected) end_states();
    call.run([&] { return gradient(q, call.sms, call.stream); });
    if (in_chunks && corrected) end_states();
    k90::GradientArgs k = q;
    k.delta_out = k.norm_weight = nullptr;
    k.weight = nullptr;
    k.keys = 1;
    k.x = view(tk);
    k.u = view(args.v);
    k.z = view(tq);
    k.y = rows.dy;
    k.dx = call.gradient_of(args.d_k, own.d_k, p.heads_kv);
    k.dv = view(args.d_v);
    k.state = own.tiles;
    k.norm = own.z;
    k.units = own.units;
    k.end_has_state = ends;
    k.dot = args.d_log_g.data != nullptr ? own.k_dot : nullptr;
    k.state_dot = args.d_log_g.data != nullptr ? own.k_state_dot : nullptr;
    k.ticket = call.tickets();
    call.run([&] { return gradient(k, call.sms, call.stream); });
  };
  if (one_pass)
    together();
  else
    one_by_one();
  call.rotate_back(own.d_q, args.d_q, p.heads_q, args.rope_offset);
  call.rotate_back(own.d_k, args.d_k, p.heads_kv, args.rope_offset);

  if (args.d_log_g.data != nullptr) {
    k80::GateArgs w;
    w.shape = call.shape80;
    if (corrected) {  // dk read the corrected delta: what q . dq then is, not what dq's own delta left
      w.r = own.r;
      w.delta = own.delta;
      w.eps = static_cast<float>(p.eps);
    } else {
      w.q_dot = own.q_dot;
    }
    w.k_dot = own.k_dot;
    if (in_chunks) {
      w.s_tiles = states.tiles;
      w.ds_tiles = own.tiles;
      w.z_tiles = states.z;
      w.dz_tiles = own.z;
      w.units = states.units;
      w.d_units = own.units;
      if (p.use_state) {
        w.g = call.g();
        w.k_state_dot = own.k_state_dot;
        w.initial = args.initial_state;
        w.d_final = args.d_final_state;
      }
      w.boundary = own.boundary;
    }
    w.d_log_g = args.d_log_g;
    call.run([&] { return k80::gate_gradient(w, call.stream); });
  }
  call.zero_padding(args.d_q, p.dtype, p.heads_q, p.head_dim);
  call.zero_padding(args.d_k, p.dtype, p.heads_kv, p.head_dim);
  call.zero_padding(args.d_v, p.dtype, p.heads_kv, p.value_dim);
  call.zero_padding(args.d_log_g, Dtype::kFloat32, p.heads_kv, 1);
  return cuda::check_launch(call.error, "cuda.sm90 backward");
}

}  // namespace

extern const Implementation kCudaSm90, kCudaSm90Next;
const Implementation kCudaSm90 = {
    "cuda.sm90", choose_from<kMeasured>, sizes, describe, forward, backward, nullptr, nullptr, nullptr};
const Implementation kCudaSm90Next = {
    "cuda.sm90.next", choose_from<kWritten>, sizes, describe, forward, backward, nullptr, nullptr, nullptr};

}  // namespace powerattn
