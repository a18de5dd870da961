// SPDX-License-Identifier: Apache-2.0
// Token rows in and out: conversion, rotary embedding, packing, gates. Included by isa.h only.

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Branch-free so that the loops below become vector code. Subnormals: the exponent is rebuilt by the
// multiplication with 2^112.
POWERATTN_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const float finite = float_of(magnitude) * float_of(0x77800000u);
  const uint32_t special = bits_of(finite) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
  return float_of(special | static_cast<uint32_t>(h & 0x8000u) << 16);
}
POWERATTN_INLINE uint16_t half_from_float(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 a half is a multiple of 2^-24: adding 0.5 makes the adder round there.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to Inf
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}
POWERATTN_INLINE uint16_t bfloat_from_float(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded);
}

// out = row t.
template <class T>
inline void load_row(int dtype, const Rows &rows, int64_t t, int width, T *out) {
  const int64_t at = t * rows.stride;
  switch (dtype) {
    case POWERATTN_FLOAT64: {
      const double *in = static_cast<const double *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = static_cast<T>(in[i]);
      break;
    }
    case POWERATTN_FLOAT32: {
      const float *in = static_cast<const float *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = static_cast<T>(in[i]);
      break;
    }
    case POWERATTN_FLOAT16: {
      const uint16_t *in = static_cast<const uint16_t *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = half_to_float(in[i]);
      break;
    }
    default: {
      const uint16_t *in = static_cast<const uint16_t *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = float_of(static_cast<uint32_t>(in[i]) << 16);
    }
  }
}

template <class T>
inline void store_row(int dtype, const Rows &rows, int64_t t, int width, const T *in) {
  const int64_t at = t * rows.stride;
  switch (dtype) {
    case POWERATTN_FLOAT64: {
      double *out = static_cast<double *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = in[i];
      break;
    }
    case POWERATTN_FLOAT32: {
      float *out = static_cast<float *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = static_cast<float>(in[i]);
      break;
    }
    case POWERATTN_FLOAT16: {
      uint16_t *out = static_cast<uint16_t *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = half_from_float(static_cast<float>(in[i]));
      break;
    }
    default: {
      uint16_t *out = static_cast<uint16_t *>(rows.data) + at;
      for (int i = 0; i < width; ++i) out[i] = bfloat_from_float(static_cast<float>(in[i]));
    }
  }
}

// Statistics (log_g, row_norm) have type T.
template <class T>
POWERATTN_INLINE T statistic(const Rows &rows, int64_t t) {
  return static_cast<const T *>(rows.data)[t * rows.stride];
}

// Asks for the row that a later strip will load: rows of one head lie a whole token apart, which the
// processor's own prefetchers do not follow. The address may be past the tensor's end, and wrap.
template <class T>
POWERATTN_INLINE void prefetch_row(int dtype, const Rows &rows, int64_t t, int width) {
  const uintptr_t element = dtype == POWERATTN_FLOAT64 ? 8 : dtype == POWERATTN_FLOAT32 ? 4 : 2;
  const uintptr_t at = reinterpret_cast<uintptr_t>(rows.data) +
                       static_cast<uintptr_t>(t) * static_cast<uintptr_t>(rows.stride) * element;
  for (uintptr_t i = 0; i < static_cast<uintptr_t>(width) * element; i += 64)
    __builtin_prefetch(reinterpret_cast<const void *>(at + i));  // NOLINT(performance-no-int-to-ptr)
}

// Rotations of consecutive positions, pair i by the angle position * frequency_i. Angles are double; between
// exact sines, every 16 tokens, the rotation is advanced by a complex product.
struct Rotation {
  double cosine[128], sine[128], step_cosine[128], step_sine[128];
  double position = 0;
  int age = 0;
};

template <class T>
inline void rotation_begin(const Call<T> &call, double position, Rotation *r) {
  for (int i = 0; i < call.rope_dim / 2; ++i) {
    r->step_cosine[i] = ::cos(call.rope_frequency[i]);
    r->step_sine[i] = ::sin(call.rope_frequency[i]);
  }
  r->position = position;
  r->age = 0;
}

// The rotation of the current position; call once per token, in order.
template <class T>
inline void rotation_next(const Call<T> &call, Rotation *r) {
  const int pairs = call.rope_dim / 2;
  if (r->age == 0) {
    for (int i = 0; i < pairs; ++i) {
      r->cosine[i] = ::cos(r->position * call.rope_frequency[i]);
      r->sine[i] = ::sin(r->position * call.rope_frequency[i]);
    }
  } else {
    for (int i = 0; i < pairs; ++i) {
      const double c = r->cosine[i] * r->step_cosine[i] - r->sine[i] * r->step_sine[i];
      r->sine[i] = r->sine[i] * r->step_cosine[i] + r->cosine[i] * r->step_sine[i];
      r->cosine[i] = c;
    }
  }
  r->age = (r->age + 1) % 16;
  r->position += 1;
}

// (a, b) -> (a cos - b sin, a sin + b cos), or its inverse.
template <class T, bool kInverse>
inline void rotate_row(const Call<T> &call, const Rotation &r, T *x) {
  const int pairs = call.rope_dim / 2;
  const bool half = call.rope_style == POWERATTN_ROPE_HALF;
  const int first = half ? 1 : 2, apart = half ? pairs : 1;
  for (int i = 0; i < pairs; ++i) {
    const T c = static_cast<T>(r.cosine[i]);
    const T s = kInverse ? -static_cast<T>(r.sine[i]) : static_cast<T>(r.sine[i]);
    const T a = x[i * first], b = x[i * first + apart];
    x[i * first] = a * c - b * s;
    x[i * first + apart] = a * s + b * c;
  }
}

// The other layouts of one strip of kNr tokens from its rows [kNr][width]; t0 is its first token in the chunk.
template <class T>
inline void spread_strip(const Call<T> &call, const T *rows, int width, int64_t t0, const Packed<T> &out) {
  constexpr int kN = kNr<T>;
  if (out.cols != nullptr) {
    T *to = out.cols + t0 * width;
#if defined(POWERATTN_AMX)
    if constexpr (sizeof(T) == sizeof(float)) {
      amx_columns(rows, width, to);
      to = nullptr;
    }
#endif
    for (int i = 0; to != nullptr && i < width; ++i) {
      for (int t = 0; t < kN; ++t) to[i * kN + t] = rows[t * width + i];
    }
  }
  if (out.strips != nullptr) {
    for (int s = 0; s < width; s += kN) {
      T *to = out.strips + s * call.cp + t0 * kN;
      for (int t = 0; t < kN; ++t) {
        store(to + t * kN, load(rows + t * width + s));
        store(to + t * kN + kLanes<T>, load(rows + t * width + s + kLanes<T>));
      }
    }
  }
}

// The packed layouts of tokens span.first .. of a chunk; span.first is a multiple of kNr. Tokens up to the next
// multiple of kNr and columns up to the padded width are zero.
template <class T>
void pack(const Call<T> &call, const Rows &in, bool rotate, double position, int width, Span span,
          const Packed<T> &out, void *scratch) {
  constexpr int kN = kNr<T>;
  const int padded = static_cast<int>(round_up(width, kN));
  T *strip = static_cast<T *>(scratch);  // [kNr][padded]
  Rotation rotation;
  if (rotate) rotation_begin(call, position + static_cast<double>(span.chunk + span.first), &rotation);
  const int64_t last = span.first + span.count;
  for (int64_t t0 = span.first; t0 < last; t0 += kN) {
    T *rows = out.rows != nullptr ? out.rows + t0 * padded : strip;
    for (int64_t t = t0; t < t0 + kN; ++t) {
      T *row = rows + (t - t0) * padded;
      if (t >= last) {
        for (int i = 0; i < padded; ++i) row[i] = 0;
        continue;
      }
      prefetch_row<T>(call.dtype, in, span.chunk + t + kN, width);
      load_row<T>(call.dtype, in, span.chunk + t, width, row);
      for (int i = width; i < padded; ++i) row[i] = 0;
      if (rotate) {
        rotation_next(call, &rotation);
        rotate_row<T, false>(call, rotation, row);
      }
    }
    spread_strip(call, rows, padded, t0, out);
#if defined(POWERATTN_AMX)
    if constexpr (sizeof(T) == sizeof(float)) {
      if (out.keys != nullptr) amx_keys(rows, padded, out.keys + t0 * padded);
      if (out.columns != nullptr) amx_token_pairs(rows, padded, out.columns + t0 * padded);
      if (out.values != nullptr) amx_values(rows, padded, out.values + t0 * padded);
    }
#endif
  }
}

// exp(high + low) with |low| below an ulp of high.
template <class V>
POWERATTN_INLINE V exponential_of(V high, V low) {
  const V e = exponential(high);
  return e + e * low;
}

// g_t = sum_{u <= t} log_g_u inside the chunk, in double. A reset becomes a finite number whose exp is 0, so
// that differences of two resets are numbers, not NaN, and is counted apart, so that it takes no digits from
// the gates after it.
template <class T>
void gates(const Call<T> &call, const Rows &log_g, Span span, Gates<T> *out) {
  double sum = 0, resets = 0;
  for (int64_t t = 0; t < span.count; ++t) {
    const T x = statistic<T>(log_g, span.chunk + t);
    (x < call.least_log_g ? resets : sum) += x < call.least_log_g ? call.least_log_g : x;
    out->g[t] = sum;
    out->resets[t] = resets;
  }
  for (int64_t t = 0; t < span.count; t += kNr<T>) {
    const int64_t n = lesser<int64_t>(kNr<T>, span.count - t);
    T start[2][kNr<T>] = {}, end[2][kNr<T>] = {};  // high and low parts
    for (int64_t i = 0; i < n; ++i) {
      const double a = out->resets[t + i] + out->g[t + i];
      const double b = (resets - out->resets[t + i]) + (sum - out->g[t + i]);
      start[0][i] = static_cast<T>(a);
      start[1][i] = static_cast<T>(a - static_cast<double>(start[0][i]));
      end[0][i] = static_cast<T>(b);
      end[1][i] = static_cast<T>(b - static_cast<double>(end[0][i]));
    }
    for (int i = 0; i < kNr<T>; i += kLanes<T>) {
      store(start[0] + i, exponential_of(load(start[0] + i), load(start[1] + i)));
      store(end[0] + i, exponential_of(load(end[0] + i), load(end[1] + i)));
    }
    for (int64_t i = 0; i < n; ++i) {
      out->from_start[t + i] = start[0][i];
      out->to_end[t + i] = end[0][i];
    }
  }
  for (int64_t t = span.count; t < call.cp; ++t) out->from_start[t] = out->to_end[t] = 0;
  out->decay = ::exp(resets + sum);
}

// y_i = N_i / l_i with l_i the row norm:  dN_i = r_i dy_i,  dl_i = -r_i dy_i . y_i,  r_i = 1 / l_i, or 0 where
// l_i is 0; unnormalised r = 1 and dl = 0.
template <class T>
void output_grad(const Call<T> &call, const Rows &d_y, const Rows &y, const Rows &row_norm, Span span,
                 const OutputGrad<T> &out, void *scratch) {
  constexpr int kN = kNr<T>;
  T *row = static_cast<T *>(scratch);
  const int64_t last = span.first + span.count;
  for (int64_t t0 = span.first; t0 < last; t0 += kN) {
    for (int64_t t = t0; t < t0 + kN; ++t) {
      T *dy = out.dy.rows + t * call.ep;
      out.minus_delta[t] = out.dl[t] = 0;
      out.r[t] = 1;
      if (t >= last) {
        for (int i = 0; i < call.ep; ++i) dy[i] = 0;
        continue;
      }
      load_row<T>(call.dtype, d_y, span.chunk + t, call.e, dy);
      for (int i = call.e; i < call.ep; ++i) dy[i] = 0;
      if (!call.normalize) continue;
      load_row<T>(call.dtype, y, span.chunk + t, call.e, row);
      for (int i = call.e; i < call.ep; ++i) row[i] = 0;
      double deltas[4] = {};
      for (int i = 0; i < call.ep; i += 4) {
        for (int l = 0; l < 4; ++l) deltas[l] += static_cast<double>(dy[i + l]) * row[i + l];
      }
      const double delta = (deltas[0] + deltas[1]) + (deltas[2] + deltas[3]);
      const double norm = statistic<T>(row_norm, span.chunk + t);
      const double r = norm != 0 ? 1 / norm : 0;
      out.r[t] = static_cast<T>(r);
      out.minus_delta[t] = static_cast<T>(-delta);
      out.dl[t] = static_cast<T>(-delta * r);
    }
    T *rows = out.dy.rows + t0 * call.ep;
    spread_strip(call, rows, call.ep, t0, Packed<T>{nullptr, out.dy.cols, nullptr});
    if (call.normalize) {
      for (int t = 0; t < kN; ++t) {
        for (int i = 0; i < call.ep; ++i) row[t * call.ep + i] = rows[t * call.ep + i] * out.r[t0 + t];
      }
      rows = row;
    }
    spread_strip(call, rows, call.ep, t0, Packed<T>{nullptr, nullptr, out.dy.strips});
  }
}
