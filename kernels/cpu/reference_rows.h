// SPDX-License-Identifier: Apache-2.0
// How the reference sees its arguments: the tokens of one sequence and head as rows of float64, rotated, with
// their gates; and its workspace.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"
#include "problem.h"

namespace powerattn::reference {

// The tokens of one sequence: rows start .. start + length - 1 of batch entry b.
struct Sequence {
  int64_t b = 0;
  int64_t start = 0;
  int64_t length = 0;
  double position = 0;  // RoPE position of its first token; any int64_t, so sums are not integers
};

inline Sequence sequence_at(const Problem &p, int64_t n, const int64_t *cu_seqlens, const int64_t *offset) {
  Sequence s;
  s.b = p.packed ? 0 : n;
  s.start = p.packed ? cu_seqlens[n] : 0;
  s.length = p.packed ? cu_seqlens[n + 1] - cu_seqlens[n] : p.seq_len;
  s.position = offset ? static_cast<double>(offset[n]) : 0;
  return s;
}

// Rows past the last packed sequence.
inline Sequence padding_of(const Problem &p, const int64_t *cu_seqlens) {
  Sequence s;
  if (p.packed) {
    s.start = cu_seqlens[p.sequences];
    s.length = p.seq_len - s.start;
  }
  return s;
}

inline int64_t offset_of(const Problem &p, const powerattn_tensor &x, const Sequence &s, int64_t row,
                         int64_t head) {
  return (p.packed ? 0 : s.b * x.stride_b) + (s.start + row) * x.stride_t + head * x.stride_h;
}

inline void load_rows(const Problem &p, Dtype type, const powerattn_tensor &x, const Sequence &s, int64_t head,
                      int64_t width, double *rows) {
  for (int64_t i = 0; i < s.length; ++i) {
    const int64_t at = offset_of(p, x, s, i, head);
    for (int64_t c = 0; c < width; ++c) rows[i * width + c] = load_element(type, x.data, at + c);
  }
}

inline void store_rows(const Problem &p, Dtype type, const powerattn_tensor &x, const Sequence &s, int64_t head,
                       int64_t width, const double *rows) {
  for (int64_t i = 0; i < s.length; ++i) {
    const int64_t at = offset_of(p, x, s, i, head);
    for (int64_t c = 0; c < width; ++c) store_element(type, x.data, at + c, rows[i * width + c]);
  }
}

inline void zero_rows(const Problem &p, Dtype type, const powerattn_tensor &x, const Sequence &s, int64_t heads,
                      int64_t width) {
  if (!x.data) return;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < s.length; ++i)
      for (int64_t c = 0; c < width; ++c) store_element(type, x.data, offset_of(p, x, s, i, h) + c, 0.0);
}

// (x_a, x_b) <- (x_a cos - x_b sin, x_a sin + x_b cos), angle = position * base^(-2 i / dim); `direction` -1
// rotates back, which is also how a gradient returns through the rotation.
inline void rotate_rows(const Problem &p, const Sequence &s, int direction, double *rows) {
  const Rope &rope = p.rope;
  if (rope.style == POWERATTN_ROPE_NONE) return;
  const int64_t half = rope.dim / 2;
  for (int64_t i = 0; i < s.length; ++i) {
    double *x = rows + i * p.head_dim;
    for (int64_t c = 0; c < half; ++c) {
      const double frequency =
          std::pow(rope.base, -2.0 * static_cast<double>(c) / static_cast<double>(rope.dim));
      const double angle = (s.position + static_cast<double>(i)) * frequency;
      const double cosine = std::cos(angle), sine = direction * std::sin(angle);
      const int64_t a = rope.style == POWERATTN_ROPE_HALF ? c : 2 * c;
      const int64_t b = rope.style == POWERATTN_ROPE_HALF ? c + half : 2 * c + 1;
      const double xa = x[a], xb = x[b];
      x[a] = xa * cosine - xb * sine;
      x[b] = xa * sine + xb * cosine;
    }
  }
}

inline void load_log_gates(const Problem &p, const powerattn_tensor &x, const Sequence &s, int64_t head,
                           double *gate) {
  for (int64_t i = 0; i < s.length; ++i)
    gate[i] = x.data ? load_element(p.stat_dtype, x.data, offset_of(p, x, s, i, head)) : 0.0;
}

// exp(0) where there is nothing to decay; a reset (-inf) gives an exact 0 because sums of log gates are never
// subtracted from each other here.
inline double sum_log_gates(const double *gate, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t m = begin; m < end; ++m) sum += gate[m];
  return sum;
}

inline double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline double power(double x, int n) {
  double product = 1;
  for (int i = 0; i < n; ++i) product *= x;
  return product;
}

// Rows of S [D, e] and z [D] of one sequence or slot and kv head.
struct StateView {
  Dtype type = Dtype::kFloat32;
  void *s = nullptr;
  void *z = nullptr;
  int64_t s_at = 0;
  int64_t z_at = 0;
  int64_t width = 0;

  StateView(const Problem &p, const powerattn_state &state, int64_t n, int64_t head)
      : type(p.state_dtype),
        s(state.s),
        z(state.s ? state.z : nullptr),
        s_at(n * state.s_stride_n + head * state.s_stride_h),
        z_at(n * state.z_stride_n + head * state.z_stride_h),
        width(p.value_dim) {}

  void load(int64_t row, double *s_row, double *z_row) const {
    for (int64_t c = 0; c < width; ++c) s_row[c] = load_element(type, s, s_at + row * width + c);
    *z_row = z ? load_element(type, z, z_at + row) : 0.0;
  }
  void store(int64_t row, const double *s_row, double z_row) const {
    for (int64_t c = 0; c < width; ++c) store_element(type, s, s_at + row * width + c, s_row[c]);
    if (z) store_element(type, z, z_at + row, z_row);
  }
};

// Hands out float64 arrays of the caller's workspace in turn.
class Workspace {
 public:
  explicit Workspace(void *memory) : next_(static_cast<double *>(memory)) {}
  double *take(int64_t count) {
    double *array = next_;
    next_ += count;
    return array;
  }

 private:
  double *next_;
};

}  // namespace powerattn::reference
