// SPDX-License-Identifier: Apache-2.0
// Runs a case through the C API: dense float64 numbers in, dense float64 numbers out, every layout, packing and
// poisoning in between.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "case.h"
#include "memory.h"
#include "oracle.h"
#include "recurrence.h"

namespace powerattn_test {

inline int32_t stat_dtype(const Case &c) {
  return c.dtype == POWERATTN_FLOAT64 ? c.dtype : static_cast<int32_t>(POWERATTN_FLOAT32);
}
inline int32_t state_dtype(const Case &c) {
  return c.bf16_state ? static_cast<int32_t>(POWERATTN_BFLOAT16) : stat_dtype(c);
}

// Numbers of a whole problem, dense: [b, t, h, width], states [n, heads_kv, D, e] and [n, heads_kv, D].
struct Inputs {
  Vector q, k, v, log_g, dy;
  Vector s0, z0, ds, dz;            // empty: not passed
  std::vector<int64_t> cu_seqlens;  // packed only
  std::vector<int64_t> offset;      // RoPE; empty: not passed
  std::vector<int64_t> slots, lengths;
  int64_t num_slots = 0;
  Vector y, norm;  // only for summary_reverse
};

struct Outputs {
  Vector y, norm, s, z, total;
  Vector dq, dk, dv, dlog_g, ds0, dz0;
};

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void must(powerattn_status status, const char *what) {
  if (status == POWERATTN_OK) return;
  throw Failure(std::string(what) + ": " + powerattn_status_string(status) + ": " + powerattn_last_error());
}

class Plan {
 public:
  explicit Plan(const powerattn_desc &desc) {
    must(powerattn_plan_create(&desc, &plan_), "plan_create");
    info_.struct_size = sizeof info_;
    must(powerattn_plan_query(plan_, &info_), "plan_query");
    // A chunk size asks for chunks, on every device; the reference, which bfloat16 states need, has none.
    const bool reference = desc.device_type == POWERATTN_CPU && desc.state_dtype == POWERATTN_BFLOAT16;
    if (desc.chunk_size > 0 && info_.form != POWERATTN_FORM_CHUNKED && !reference)
      throw Failure("chunk_size is given, but the form is not chunked");
  }
  Plan(const Plan &) = delete;
  Plan &operator=(const Plan &) = delete;
  ~Plan() { powerattn_plan_destroy(plan_); }
  operator const powerattn_plan *() const { return plan_; }
  const powerattn_plan_info &info() const { return info_; }
  std::string text() const {
    size_t needed = 0;
    must(powerattn_plan_describe(plan_, nullptr, 0, &needed), "plan_describe");
    std::string s(needed, ' ');
    must(powerattn_plan_describe(plan_, &s[0], needed, nullptr), "plan_describe");
    s.resize(needed - 1);
    return s;
  }

 private:
  powerattn_plan *plan_ = nullptr;
  powerattn_plan_info info_ = {};
};

// A strided view of four dimensions in its own memory. What lies between its elements stays poisoned.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Memory &memory, int32_t dtype, const int64_t (&extent)[4], const int64_t (&stride)[3])
      : dtype_(dtype), memory_(&memory) {
    int64_t last = 0;
    bool empty = false;
    for (int i = 0; i < 4; ++i) {
      extent_[i] = extent[i];
      stride_[i] = i < 3 ? stride[i] : 1;
      last += (extent[i] - 1) * stride_[i];
      empty = empty || extent[i] == 0;
    }
    host_.assign(empty ? 0 : static_cast<size_t>(last + 1) * bytes_of(dtype), static_cast<char>(0xff));
    device_ = Buffer(memory, host_.size());
    device_.write(host_.data());
  }

  void put(const Vector &dense) {
    size_t n = 0;
    visit([&](int64_t at) { encode(dtype_, dense[n++], &host_[static_cast<size_t>(at) * bytes_of(dtype_)]); });
    device_.write(host_.data());
  }

  // Also checks that nothing was written between the elements.
  Vector take(const char *name) const {
    std::vector<char> now(host_.size());
    device_.read(now.data());
    std::vector<char> touched(host_.size(), 0);
    Vector dense;
    visit([&](int64_t at) {
      const size_t byte = static_cast<size_t>(at) * bytes_of(dtype_);
      for (size_t i = 0; i < bytes_of(dtype_); ++i) touched[byte + i] = 1;
      dense.push_back(decode(dtype_, &now[byte]));
    });
    for (size_t i = 0; i < now.size(); ++i) {
      if (!touched[i] && now[i] != host_[i])
        throw Failure(std::string(name) + ": written between its elements");
    }
    return dense;
  }

  bool present() const { return memory_ != nullptr; }
  powerattn_tensor arg() const {
    return present() ? powerattn_tensor{data(), stride_[0], stride_[1], stride_[2]} : powerattn_tensor{};
  }
  void *data() const { return device_.data(); }
  int64_t stride(int i) const { return stride_[i]; }

 private:
  template <typename F>
  void visit(const F &f) const {
    for (int64_t a = 0; a < extent_[0]; ++a)
      for (int64_t b = 0; b < extent_[1]; ++b)
        for (int64_t c = 0; c < extent_[2]; ++c)
          for (int64_t i = 0; i < extent_[3]; ++i) f(a * stride_[0] + b * stride_[1] + c * stride_[2] + i);
  }

  int32_t dtype_ = 0;
  Memory *memory_ = nullptr;
  int64_t extent_[4] = {}, stride_[4] = {};
  std::vector<char> host_;
  Buffer device_;
};

inline Tensor make_tensor(Memory &memory, int32_t dtype, int64_t b, int64_t t, int64_t h, int64_t width,
                          Layout layout, bool output = false) {
  const int64_t extent[4] = {b, t, h, width};
  if (layout == Layout::kBhtd) return Tensor(memory, dtype, extent, {h * t * width, width, t * width});
  if (layout == Layout::kWide) {
    const int64_t head = width + 3, token = h * head + 5;
    return Tensor(memory, dtype, extent, {t * token + 7, token, head});
  }
  if (layout == Layout::kBroadcast && !output) return Tensor(memory, dtype, extent, {0, h * width, width});
  return Tensor(memory, dtype, extent, {t * h * width, h * width, width});
}

// S and z of n sequences or slots.
class State {
 public:
  State() = default;
  State(Memory &memory, const Case &c, int64_t n, int64_t rows)
      : s_(memory, state_dtype(c), {n, c.heads_kv, rows, c.e},
           {c.heads_kv * (rows * c.e + gap(c)) + gap(c), rows * c.e + gap(c), c.e}),
        z_(memory, state_dtype(c), {n, c.heads_kv, 1, rows},
           {c.heads_kv * (rows + gap(c)) + gap(c), rows + gap(c), rows}) {}
  void put(const Vector &s, const Vector &z) {
    s_.put(s);
    z_.put(z);
  }
  void take(const char *name, Vector *s, Vector *z) const {
    *s = s_.take(name);
    *z = z_.take(name);
  }
  powerattn_state arg() const {
    if (!s_.present()) return powerattn_state{};
    return {s_.data(), z_.data(), s_.stride(0), s_.stride(1), z_.stride(0), z_.stride(1)};
  }

 private:
  static int64_t gap(const Case &c) { return c.layout == Layout::kWide ? 11 : 0; }
  Tensor s_, z_;
};

inline Buffer indices(Memory &memory, const std::vector<int64_t> &x) {
  if (x.empty()) return Buffer();
  Buffer b(memory, x.size() * 8);
  b.write(x.data());
  return b;
}

inline Buffer poisoned(Memory &memory, uint64_t bytes) {
  Buffer b(memory, static_cast<size_t>(bytes));
  b.poison();
  return b;
}

// ---- Numbers for a case ---------------------------------------------------------------------------------

// The (sequence, kv head) part of a problem: rows of `x` [b, t, heads, width] of heads first .. first+count-1.
inline Vector slice(const Case &c, const Vector &x, int64_t heads, int64_t width, int64_t b, int64_t start,
                    int64_t length, int64_t first, int64_t count) {
  Vector out;
  if (x.empty()) return out;
  for (int64_t h = first; h < first + count; ++h)
    for (int64_t i = start; i < start + length; ++i)
      for (int64_t w = 0; w < width; ++w) out.push_back(x[((b * c.t + i) * heads + h) * width + w]);
  return out;
}

inline void scatter(const Case &c, const Vector &rows, int64_t heads, int64_t width, int64_t b, int64_t start,
                    int64_t length, int64_t first, int64_t count, Vector *x) {
  size_t n = 0;
  for (int64_t h = first; h < first + count; ++h)
    for (int64_t i = start; i < start + length; ++i)
      for (int64_t w = 0; w < width; ++w) (*x)[((b * c.t + i) * heads + h) * width + w] = rows[n++];
}

inline int64_t start_of(const Case &, const Inputs &in, int64_t n) {
  return in.cu_seqlens.empty() ? 0 : in.cu_seqlens[n];
}
inline int64_t length_of(const Case &c, const Inputs &in, int64_t n) {
  if (!in.cu_seqlens.empty()) return in.cu_seqlens[n + 1] - in.cu_seqlens[n];
  return in.lengths.empty() ? c.t : in.lengths[n];
}

inline Vector part(const Vector &x, int64_t index, int64_t size) {
  return x.empty() ? Vector() : Vector(x.begin() + index * size, x.begin() + (index + 1) * size);
}

inline HeadInput head_input(const Case &c, const Inputs &in, int64_t n, int64_t g) {
  HeadInput h;
  h.t = length_of(c, in, n);
  h.d = c.d;
  h.e = c.e;
  h.group = c.group();
  h.p = c.p;
  h.normalize = c.normalize;
  h.scale = c.scale_in_force();
  h.eps = c.eps;
  h.rope = c.rope;
  h.rope_dim = c.rope_dim ? c.rope_dim : c.d;
  h.rope_base = c.rope_base != 0 ? c.rope_base : 10000;
  h.position = in.offset.empty() ? 0 : in.offset[n];
  const int64_t b = c.packed ? 0 : n, start = start_of(c, in, n), first = g * c.group();
  h.q = slice(c, in.q, c.heads_q, c.d, b, start, h.t, first, c.group());
  h.k = slice(c, in.k, c.heads_kv, c.d, b, start, h.t, g, 1);
  h.v = slice(c, in.v, c.heads_kv, c.e, b, start, h.t, g, 1);
  h.log_g = slice(c, in.log_g, c.heads_kv, 1, b, start, h.t, g, 1);
  h.dy = slice(c, in.dy, c.heads_q, c.e, b, start, h.t, first, c.group());
  const bool states = !in.s0.empty() || !in.ds.empty();
  const int64_t rows = states ? embedding(c.d, c.p).rows() : 0;
  const int64_t slot = in.slots.empty() ? n : in.slots[n];
  h.s0 = part(in.s0, slot * c.heads_kv + g, rows * c.e);
  h.z0 = part(in.z0, slot * c.heads_kv + g, rows);
  h.ds = part(in.ds, n * c.heads_kv + g, rows * c.e);
  h.dz = part(in.dz, n * c.heads_kv + g, rows);
  return h;
}

inline bool wants_final_state(const Case &c) { return c.op == CaseOp::kForward && c.state; }

inline Vector log_gates(const Case &c, Random *random, int64_t n) {
  Vector g;
  if (c.gate == Gate::kNone) return g;
  for (int64_t i = 0; i < n; ++i) {
    const double size = c.gate == Gate::kFading ? 2.0 : c.gate == Gate::kSteep ? 20.0 : 0.02;
    double x = -std::fabs(random->normal()) * size;
    if (c.gate == Gate::kReset && random->below(5) == 0) x = -std::numeric_limits<double>::infinity();
    g.push_back(round_to(stat_dtype(c), x));
  }
  return g;
}

// A state as it arises: keys and values of a few earlier tokens, rounded to the state's dtype.
inline void random_states(const Case &c, Random *random, int64_t n, Vector *s, Vector *z) {
  HeadInput h;
  h.t = 3;
  h.d = c.d;
  h.e = c.e;
  h.p = c.p;
  h.group = 0;
  for (int64_t i = 0; i < n * c.heads_kv; ++i) {
    h.k = random->normals(h.t * c.d, 0, c.size_k, c.dtype);
    h.v = random->normals(h.t * c.e, 0.25 * c.size_v, c.size_v, c.dtype);
    const HeadOutput out = recurrent_forward<double>(h, Exact());
    for (double x : out.s) s->push_back(round_to(state_dtype(c), x));
    for (double x : out.z) z->push_back(round_to(state_dtype(c), x));
  }
}

inline Inputs make_inputs(const Case &c, uint64_t seed) {
  Random random(seed);
  Inputs in;
  const int64_t b = c.packed ? 1 : c.b, tokens = b * c.t;
  in.q = random.normals(tokens * c.heads_q * c.d, 0, c.size_q, c.dtype);
  in.k = random.normals(tokens * c.heads_kv * c.d, 0, c.size_k, c.dtype);
  in.v = random.normals(tokens * c.heads_kv * c.e, 0.25 * c.size_v, c.size_v, c.dtype);
  if (c.thin) {
    for (size_t i = 0, d = static_cast<size_t>(c.d); i < in.q.size(); ++i)
      if (i / d / static_cast<size_t>(c.heads_q) % 5 == 2) in.q[i] = round_to(c.dtype, 0x1p-10 * in.q[i]);
  }
  in.log_g = log_gates(c, &random, tokens * c.heads_kv);
  if (c.layout == Layout::kBroadcast) {
    for (Vector *x : {&in.k, &in.v, &in.log_g}) {
      for (size_t i = 0, n = x->size() / static_cast<size_t>(b ? b : 1); i < x->size(); ++i)
        (*x)[i] = (*x)[i % n];
    }
  }
  if (c.packed) {
    in.cu_seqlens.push_back(0);
    for (int64_t n : c.sequences) in.cu_seqlens.push_back(in.cu_seqlens.back() + n);
  }
  if (c.offset) {
    for (int64_t n = 0; n < c.count(); ++n) in.offset.push_back(random.below(1000));
  }
  const bool backward = c.op == CaseOp::kBackward || c.op == CaseOp::kSummaryReverse;
  if (backward) in.dy = random.normals(tokens * c.heads_q * c.e, 0, c.size_dy, c.dtype);
  if (c.op == CaseOp::kStep) {
    in.num_slots = c.slots ? 2 * b + 1 : b;
    if (c.slots) {
      for (int64_t n = 0; n < b; ++n) in.slots.push_back(n % 3 == 1 ? -1 : 2 * b - 2 * n);
    }
    if (c.lengths) {
      for (int64_t n = 0; n < b; ++n) in.lengths.push_back(random.below(c.t + 1));
    }
    random_states(c, &random, in.num_slots, &in.s0, &in.z0);
  } else if (c.state && (c.op == CaseOp::kForward || backward)) {
    random_states(c, &random, c.count(), &in.s0, &in.z0);
  }
  if (c.op == CaseOp::kBackward && c.state) {
    const int64_t rows = embedding(c.d, c.p).rows();
    const double size = 0.1 * c.size_dy / std::pow(c.size_k, c.p);  // of a gradient of S, which is k^p v
    in.ds = random.normals(c.count() * c.heads_kv * rows * c.e, 0, size, state_dtype(c));
    in.dz = random.normals(c.count() * c.heads_kv * rows, 0, size * c.size_v, state_dtype(c));
    if (!c.normalize) in.dz.assign(in.dz.size(), 0.0);
  }
  if (c.packed && c.t > in.cu_seqlens.back()) {  // padding rows are nobody's: what they hold must not matter
    for (Vector *x : {&in.q, &in.k, &in.v, &in.log_g, &in.dy}) {
      const size_t width = x->size() / static_cast<size_t>(c.t);
      std::fill(x->begin() + static_cast<long>(width * static_cast<size_t>(in.cu_seqlens.back())), x->end(),
                std::numeric_limits<double>::quiet_NaN());
    }
  }
  return in;
}

// ---- Running --------------------------------------------------------------------------------------------

struct Loaded {
  Tensor q, k, v, log_g, dy;
  State initial, d_final;
  Buffer cu_seqlens, offset, slots, lengths;
};

inline Loaded load(Memory &memory, const Case &c, const Inputs &in) {
  Loaded x;
  const int64_t b = c.packed ? 1 : c.b;
  const Layout plain = c.layout == Layout::kBroadcast ? Layout::kBthd : c.layout;
  const auto tensor = [&](const Vector &numbers, int32_t dtype, int64_t heads, int64_t width, Layout layout) {
    Tensor t = make_tensor(memory, dtype, b, c.t, heads, width, layout);
    t.put(numbers);
    return t;
  };
  if (!in.q.empty() || c.t == 0 || b == 0) x.q = tensor(in.q, c.dtype, c.heads_q, c.d, plain);
  x.k = tensor(in.k, c.dtype, c.heads_kv, c.d, c.layout);
  x.v = tensor(in.v, c.dtype, c.heads_kv, c.e, c.layout);
  if (c.gate != Gate::kNone) x.log_g = tensor(in.log_g, stat_dtype(c), c.heads_kv, 1, c.layout);
  if (c.op == CaseOp::kBackward || c.op == CaseOp::kSummaryReverse)
    x.dy = tensor(in.dy, c.dtype, c.heads_q, c.e, plain);
  const int64_t states = c.op == CaseOp::kStep ? in.num_slots : c.count();
  if (!in.s0.empty()) {
    x.initial = State(memory, c, states, embedding(c.d, c.p).rows());
    x.initial.put(in.s0, in.z0);
  }
  if (!in.ds.empty()) {
    x.d_final = State(memory, c, states, embedding(c.d, c.p).rows());
    x.d_final.put(in.ds, in.dz);
  }
  x.cu_seqlens = indices(memory, in.cu_seqlens);
  x.offset = indices(memory, in.offset);
  x.slots = indices(memory, in.slots);
  x.lengths = indices(memory, in.lengths);
  return x;
}

template <typename Args>
void attach(const Loaded &x, Memory &memory, const Buffer &workspace, Args *a) {
  a->struct_size = sizeof *a;
  a->log_g = x.log_g.arg();
  a->rope_offset = static_cast<const int64_t *>(x.offset.data());
  a->workspace = workspace.data();
  a->workspace_bytes = workspace.bytes();
  a->stream = memory.stream();
}

// Runs c.op. `use_saved`: backward through the saved buffer of its forward (where the plan offers one).
inline Outputs run(Memory &memory, const Case &c, const Inputs &in, const Plan &plan, bool use_saved = false) {
  const powerattn_plan_info &info = plan.info();
  const int64_t b = c.packed ? 1 : c.b, rows = in.s0.empty() && in.ds.empty() && !c.state &&
                                                       c.op != CaseOp::kSummary &&
                                                       c.op != CaseOp::kSummaryReverse
                                                   ? 0
                                                   : embedding(c.d, c.p).rows();
  Loaded x = load(memory, c, in);
  const auto *cu_seqlens = static_cast<const int64_t *>(x.cu_seqlens.data());
  const auto output = [&](int32_t dtype, int64_t heads, int64_t width) {
    return make_tensor(memory, dtype, b, c.t, heads, width, c.layout, true);
  };
  Outputs out;
  if (c.op == CaseOp::kForward || c.op == CaseOp::kBackward) {
    Tensor y = output(c.dtype, c.heads_q, c.e), norm = output(stat_dtype(c), c.heads_q, 1);
    const Buffer workspace = poisoned(memory, info.workspace_forward);
    const Buffer saved = poisoned(memory, use_saved ? info.saved_bytes : 0);
    State final_state;
    powerattn_forward_args a = {};
    attach(x, memory, workspace, &a);
    a.q = x.q.arg();
    a.k = x.k.arg();
    a.v = x.v.arg();
    a.y = y.arg();
    a.row_norm = norm.arg();
    a.initial_state = x.initial.arg();
    a.cu_seqlens = cu_seqlens;
    if (use_saved && info.saved_bytes) {
      a.saved = saved.data();
      a.saved_bytes = saved.bytes();
    }
    if (wants_final_state(c)) {
      final_state = State(memory, c, c.count(), rows);
      a.final_state = final_state.arg();
    }
    must(powerattn_forward(plan, &a), "forward");
    out.y = y.take("y");
    out.norm = norm.take("row_norm");
    if (wants_final_state(c)) final_state.take("final_state", &out.s, &out.z);
    if (c.op == CaseOp::kBackward) {
      Tensor dq = output(c.dtype, c.heads_q, c.d), dk = output(c.dtype, c.heads_kv, c.d),
             dv = output(c.dtype, c.heads_kv, c.e), dlog_g;
      if (x.log_g.present()) dlog_g = output(stat_dtype(c), c.heads_kv, 1);
      State d_initial;
      const bool from_saved = use_saved && info.saved_bytes;
      const Buffer more =
          poisoned(memory, from_saved ? info.workspace_backward_saved : info.workspace_backward);
      powerattn_backward_args g = {};
      attach(x, memory, more, &g);
      g.q = x.q.arg();
      g.k = x.k.arg();
      g.v = x.v.arg();
      g.y = y.arg();
      g.row_norm = norm.arg();
      g.d_y = x.dy.arg();
      g.d_q = dq.arg();
      g.d_k = dk.arg();
      g.d_v = dv.arg();
      g.d_log_g = dlog_g.arg();
      g.initial_state = x.initial.arg();
      g.d_final_state = x.d_final.arg();
      if (!in.s0.empty()) {
        d_initial = State(memory, c, c.count(), rows);
        g.d_initial_state = d_initial.arg();
      }
      g.cu_seqlens = cu_seqlens;
      g.saved = a.saved;
      g.saved_bytes = a.saved_bytes;
      must(powerattn_backward(plan, &g), "backward");
      out.dq = dq.take("d_q");
      out.dk = dk.take("d_k");
      out.dv = dv.take("d_v");
      if (dlog_g.present()) out.dlog_g = dlog_g.take("d_log_g");
      if (!in.s0.empty()) d_initial.take("d_initial_state", &out.ds0, &out.dz0);
    }
  } else if (c.op == CaseOp::kStep) {
    Tensor y = output(c.dtype, c.heads_q, c.e);
    const Buffer workspace = poisoned(memory, info.workspace_step);
    powerattn_step_args a = {};
    attach(x, memory, workspace, &a);
    a.q = x.q.arg();
    a.k = x.k.arg();
    a.v = x.v.arg();
    a.y = y.arg();
    a.state = x.initial.arg();
    a.num_slots = in.num_slots;
    a.slots = static_cast<const int64_t *>(x.slots.data());
    a.lengths = static_cast<const int64_t *>(x.lengths.data());
    must(powerattn_step(plan, &a), "step");
    out.y = y.take("y");
    x.initial.take("state", &out.s, &out.z);
  } else {
    const Buffer workspace = poisoned(memory, info.workspace_summary);
    State state(memory, c, c.count(), rows);
    Tensor total(memory, stat_dtype(c), {1, 1, c.count(), c.heads_kv}, {0, 0, c.heads_kv});
    if (c.op == CaseOp::kSummary) {
      powerattn_summary_args a = {};
      attach(x, memory, workspace, &a);
      a.k = x.k.arg();
      a.v = x.v.arg();
      a.state = state.arg();
      a.total_log_g = total.data();
      a.cu_seqlens = cu_seqlens;
      must(powerattn_summary(plan, &a), "summary");
      state.take("state", &out.s, &out.z);
    } else {
      Tensor y = output(c.dtype, c.heads_q, c.e), norm = output(stat_dtype(c), c.heads_q, 1);
      y.put(in.y);
      norm.put(in.norm);
      powerattn_summary_reverse_args a = {};
      attach(x, memory, workspace, &a);
      a.q = x.q.arg();
      a.y = y.arg();
      a.row_norm = norm.arg();
      a.d_y = x.dy.arg();
      a.d_state = state.arg();
      a.total_log_g = total.data();
      a.cu_seqlens = cu_seqlens;
      must(powerattn_summary_reverse(plan, &a), "summary_reverse");
      state.take("d_state", &out.ds0, &out.dz0);
    }
    out.total = total.take("total_log_g");
  }
  return out;
}

}  // namespace powerattn_test
