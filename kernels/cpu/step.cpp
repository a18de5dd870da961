// SPDX-License-Identifier: Apache-2.0
#include "step.h"

#include <algorithm>
#include <limits>

#include "reference_rows.h"

namespace powerattn {
namespace {

constexpr int64_t kPad = 16;  // elements of the widest vector
constexpr int64_t kBlockBytes =
    64 * 1024;                             // of a state: in L2 beside phi, and 9 units of work at d = 64, p = 2
constexpr int64_t kPhiBytes = 128 * 1024;  // of one worker's phi

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t accumulator_bytes(const Problem &p) { return p.dtype == Dtype::kFloat64 ? 8 : 4; }

// a * b and a + b that stick at the top.
uint64_t times(uint64_t a, uint64_t b) { return a != 0 && b > UINT64_MAX / a ? UINT64_MAX : a * b; }
uint64_t plus(uint64_t a, uint64_t b) { return b > UINT64_MAX - a ? UINT64_MAX : a + b; }
uint64_t size(int64_t n) { return static_cast<uint64_t>(n); }

// Arrays of the caller's workspace, each from a 64-byte boundary on.
template <class T>
class Arrays {
 public:
  explicit Arrays(void *memory) : next_(static_cast<char *>(memory)) {}
  T *take(int64_t count) {
    T *array = reinterpret_cast<T *>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }

 private:
  char *next_;
};

template <class T>
struct Plan {
  StepShape shape;
  T *q, *k, *v, *decay;  // [b, heads, tokens, ..]
  T *y, *l;              // [b, heads_kv, blocks, group, tokens, ep], likewise without ep
  T *scratch;            // [workers]: phi, z, s
  int64_t phi, scratch_stride;
  bool direct, pairs;
  int64_t columns;  // of a pair of vectors
};

// The canonical NaN for any: rounding to bfloat16 relies on it.
template <class T>
T as_number(double x) {
  return x == x ? static_cast<T>(x) : std::numeric_limits<T>::quiet_NaN();
}

// Where column c of v and y lies when a bfloat16 state is moved in pairs of vectors, `group` = 2 vectors wide:
// even columns in the first, odd ones in the second.
int64_t paired(int64_t c, int64_t e, int64_t group) {
  const int64_t base = c / group * group, within = c - base;
  return base + group > e ? c : base + within % 2 * (group / 2) + within / 2;
}

// Rows of one head as T: converted, rotated, multiplied.
template <class T>
void load_tokens(const Problem &p, const powerattn_tensor &x, const reference::Sequence &s, int64_t head,
                 int64_t width, int64_t stride, double factor, bool rotate, T *out) {
  const int64_t half = rotate ? p.rope.dim / 2 : 0;
  for (int64_t i = 0; i < s.length; ++i, out += stride) {
    const int64_t at = reference::offset_of(p, x, s, i, head);
    for (int64_t c = 0; c < width; ++c) out[c] = as_number<T>(factor * load_element(p.dtype, x.data, at + c));
    for (int64_t c = width; c < stride; ++c) out[c] = 0;
    for (int64_t c = 0; c < half; ++c) {
      const double exponent = -2.0 * static_cast<double>(c) / static_cast<double>(p.rope.dim);
      const double angle = (s.position + static_cast<double>(i)) * std::pow(p.rope.base, exponent);
      const double cosine = std::cos(angle), sine = std::sin(angle);
      const bool halves = p.rope.style == POWERATTN_ROPE_HALF;
      T &a = out[halves ? c : 2 * c], &b = out[halves ? c + half : 2 * c + 1];
      const double xa = static_cast<double>(a), xb = static_cast<double>(b);
      a = static_cast<T>(xa * cosine - xb * sine);
      b = static_cast<T>(xa * sine + xb * cosine);
    }
  }
}

reference::Sequence tokens_of(const Problem &p, const powerattn_step_args &a, int64_t b) {
  reference::Sequence s;
  s.b = b;
  s.position = a.rope_offset ? static_cast<double>(a.rope_offset[b]) : 0;
  s.length = a.slots && a.slots[b] < 0 ? 0 : a.lengths ? a.lengths[b] : p.seq_len;
  return s;
}

template <class T>
void prepare(const Problem &p, const powerattn_step_args &a, const Plan<T> &w, int64_t b, int64_t g) {
  const int64_t t = p.seq_len, group = p.group(), kv = b * p.heads_kv + g;
  const reference::Sequence s = tokens_of(p, a, b);
  const bool rotate = p.rope.style != POWERATTN_ROPE_NONE;
  load_tokens(p, a.k, s, g, p.head_dim, p.head_dim, 1.0, rotate, w.k + kv * t * p.head_dim);
  T *v = w.v + kv * t * w.shape.ep;
  load_tokens(p, a.v, s, g, p.value_dim, w.shape.ep, 1.0, false, v);
  if (w.pairs && s.length > 0) {
    const int64_t at = reference::offset_of(p, a.v, s, 0, g);
    for (int64_t c = 0; c < p.value_dim; ++c) {
      v[paired(c, p.value_dim, w.columns)] = as_number<T>(load_element(p.dtype, a.v.data, at + c));
    }
  }
  // scale^p phi(q) = phi(scale q)
  for (int64_t m = 0; m < group; ++m) {
    load_tokens(p, a.q, s, g * group + m, p.head_dim, p.head_dim, p.scale, rotate,
                w.q + (kv * group + m) * t * p.head_dim);
  }
  for (int64_t i = 0; i < s.length; ++i) {
    const double log_g =
        a.log_g.data ? load_element(p.stat_dtype, a.log_g.data, reference::offset_of(p, a.log_g, s, i, g)) : 0;
    w.decay[kv * t + i] = as_number<T>(std::exp(log_g));
  }
}

template <class T>
void sweep(const Problem &p, const powerattn_step_args &a, const fast::Kernels<T> &kernels, const Plan<T> &w,
           int64_t unit, int worker) {
  const int64_t block = unit % w.shape.blocks, kv = unit / w.shape.blocks, b = kv / p.heads_kv,
                g = kv % p.heads_kv;
  const reference::Sequence s = tokens_of(p, a, b);
  if (s.length == 0) return;
  const int64_t slot = a.slots ? a.slots[b] : b, t = p.seq_len, group = p.group(),
                element = size_of(p.state_dtype);
  fast::StepUnit<T> u;
  u.d = static_cast<int>(p.head_dim);
  u.p = p.degree;
  u.e = p.value_dim;
  u.ep = w.shape.ep;
  u.ld = w.shape.ld;
  u.heads = group;
  u.tokens = s.length;
  u.token_stride = t;
  u.batch = w.shape.batch;
  u.row = block * w.shape.rows;
  u.rows = std::min(w.shape.rows, p.state_rows - u.row);
  u.state_dtype = static_cast<int>(p.state_dtype);
  u.s = static_cast<char *>(a.state.s) +
        (slot * a.state.s_stride_n + g * a.state.s_stride_h + u.row * p.value_dim) * element;
  u.z = a.state.z ? static_cast<char *>(a.state.z) +
                        (slot * a.state.z_stride_n + g * a.state.z_stride_h + u.row) * element
                  : nullptr;
  u.k = w.k + kv * t * p.head_dim;
  u.q = w.q + kv * group * t * p.head_dim;
  u.v = w.v + kv * t * w.shape.ep;
  u.decay = w.decay + kv * t;
  u.y = w.y + unit * group * t * w.shape.ep;
  u.l = w.l + unit * group * t;
  u.direct = w.direct;
  u.scratch = w.scratch + worker * w.scratch_stride;
  u.z_scratch = u.scratch + w.phi;
  u.s_scratch = u.z_scratch + w.shape.ld;
  kernels.step(u);
}

// y = sum of the blocks' parts / (sum of l + eps), in the order of the blocks.
template <class T>
void finish(const Problem &p, const powerattn_step_args &a, const Plan<T> &w, int64_t b, int64_t g) {
  const int64_t t = p.seq_len, group = p.group(), kv = b * p.heads_kv + g, blocks = w.shape.blocks;
  reference::Sequence s = tokens_of(p, a, b);
  for (int64_t m = 0; m < group; ++m) {
    for (int64_t i = 0; i < t; ++i) {
      const int64_t at = reference::offset_of(p, a.y, s, i, g * group + m);
      double norm = p.eps;
      if (p.normalize && i < s.length) {
        for (int64_t n = 0; n < blocks; ++n)
          norm += static_cast<double>(w.l[((kv * blocks + n) * group + m) * t + i]);
      }
      for (int64_t c = 0; c < p.value_dim; ++c) {
        double y = 0;
        const int64_t column = w.pairs ? paired(c, p.value_dim, w.columns) : c;
        if (i < s.length) {
          for (int64_t n = 0; n < blocks; ++n) {
            y += static_cast<double>(w.y[(((kv * blocks + n) * group + m) * t + i) * w.shape.ep + column]);
          }
          if (p.normalize) y = norm == 0 ? 0 : y / norm;
        }
        store_element(p.dtype, a.y.data, at + c, y);
      }
    }
  }
}

template <class T>
void run(const Problem &p, const powerattn_step_args &a, const fast::Kernels<T> &kernels,
         const ParallelFor &parallel) {
  Plan<T> w;
  w.shape = step_shape(p);
  const int64_t tokens = p.batch * p.seq_len, states = p.batch * p.heads_kv, group = p.group();
  Arrays<T> arrays(a.workspace);
  w.q = arrays.take(tokens * p.heads_q * p.head_dim);
  w.k = arrays.take(tokens * p.heads_kv * p.head_dim);
  w.v = arrays.take(tokens * p.heads_kv * w.shape.ep);
  w.decay = arrays.take(tokens * p.heads_kv);
  w.y = arrays.take(states * w.shape.blocks * group * p.seq_len * w.shape.ep);
  w.l = arrays.take(states * w.shape.blocks * group * p.seq_len);
  w.phi = (1 + group) * w.shape.batch * w.shape.ld;
  w.scratch_stride = w.phi + w.shape.ld + w.shape.rows_scratch;
  w.scratch = arrays.take(w.scratch_stride * parallel.workers);
  // A bfloat16 state is rounded when it is stored: directly where one pass serves all, else at the end.
  const bool rounds = p.state_dtype == Dtype::kBfloat16;
  w.direct = !rounds || (p.seq_len == 1 && group == 1);
  w.pairs = rounds && w.direct;
  w.columns = kernels.nr;
  if (tokens == 0) return;
  parallel(states, [&](int64_t i) { prepare(p, a, w, i / p.heads_kv, i % p.heads_kv); });
  parallel.with_worker(states * w.shape.blocks,
                       [&](int64_t unit, int worker) { sweep(p, a, kernels, w, unit, worker); });
  parallel(states, [&](int64_t i) { finish(p, a, w, i / p.heads_kv, i % p.heads_kv); });
}

}  // namespace

StepShape step_shape(const Problem &p) {
  StepShape s;
  const int64_t fits = kBlockBytes / (p.value_dim * size_of(p.state_dtype));
  s.rows = std::clamp<int64_t>(fits / kPad * kPad, 32, 256);
  s.rows = std::min(s.rows, round_up(p.state_rows, kPad));
  s.blocks = (p.state_rows + s.rows - 1) / s.rows;
  s.ep = round_up(p.value_dim, kPad);
  s.ld = s.rows + kPad;
  s.rows_scratch = std::max(fast::kStepBytes / accumulator_bytes(p), fast::kStepLeastRows * p.value_dim);
  const int64_t phi = (1 + p.group()) * s.ld * accumulator_bytes(p);
  s.batch = std::clamp<int64_t>(kPhiBytes / phi, 1, std::max<int64_t>(p.seq_len, 1));
  return s;
}

uint64_t step_workspace(const Problem &p) {
  const StepShape s = step_shape(p);
  const uint64_t tokens = times(size(p.batch), size(p.seq_len)), element = size(accumulator_bytes(p));
  uint64_t n = times(tokens, size(p.heads_q * p.head_dim));
  n = plus(n, times(tokens, size(p.heads_kv * (p.head_dim + s.ep + 1))));
  n = plus(n, times(times(times(tokens, size(p.heads_q)), size(s.blocks)), size(s.ep + 1)));
  n = plus(n, times(size((1 + p.group()) * s.batch * s.ld + s.ld + s.rows_scratch), size(p.threads)));
  return plus(times(n, element), 7 * 64);
}

void step(const Problem &p, const powerattn_step_args &a, const fast::Isa &isa, const ParallelFor &parallel) {
  if (p.dtype == Dtype::kFloat64)
    run<double>(p, a, isa.f64, parallel);
  else
    run<float>(p, a, isa.f32, parallel);
}

}  // namespace powerattn
