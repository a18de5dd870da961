// SPDX-License-Identifier: Apache-2.0
// The weights of one chunk, tile by tile: s = scale q . k, then s^p times the gate. Included by isa.h only.

constexpr int64_t kTokens =
    256;  // tokens per pass of an update: 6 rows are 6 kB, and a strip of B is 16 kB of L1
constexpr int64_t kRows = 256;  // state rows per pass of a query: a strip of them is 16 kB (AVX2), half of L1
constexpr int64_t kColumns =
    128;  // columns of one block of scores: 96 x 128 floats are 48 kB, half of a small L2

// Hands out 64-byte aligned pieces of a worker's scratch.
struct Bump {
  char *at;
  template <class T>
  POWERATTN_INLINE T *take(int64_t count) {
    T *piece = reinterpret_cast<T *>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// The gate of a block, exp(g_i - g_j): off the diagonal the product of a row and a column factor, both at most
// 1 because a reference point lies between; on the diagonal the exponential of the difference. g is split in
// two numbers of type T, so that the difference is exact where it matters.
template <class T>
struct BlockGate {
  bool gated = false, diagonal = false;
  T row_sign = 1;                               // +1: rows are queries; -1: rows are keys
  T *row = nullptr, *column = nullptr;          // factors, or the high parts of g
  T *row_low = nullptr, *column_low = nullptr;  // the low parts
};

// exp(sign (g_(first + i) - g_reference)), zero-padded to whole vectors.
template <class T>
POWERATTN_INLINE void factor_gates(const Gates<T> &gates, int64_t first, int64_t n, int64_t reference,
                                   double sign, T *out) {
  const double g = gates.g[reference], resets = gates.resets[reference];
  int64_t i = 0;
  for (; i < n; ++i) {
    out[i] = static_cast<T>(sign * ((gates.resets[first + i] - resets) + (gates.g[first + i] - g)));
  }
  for (; i % kLanes<T> != 0; ++i) out[i] = 0;
  for (i = 0; i < n; i += kLanes<T>) store(out + i, exponential(load(out + i)));
}

// g_(first + i) - g_first as a high and a low part.
template <class T>
POWERATTN_INLINE void split_gates(const Gates<T> &gates, int64_t first, int64_t n, T *high, T *low) {
  const double g0 = gates.g[first], resets0 = gates.resets[first];
  for (int64_t i = 0; i < n; ++i) {
    const double g = gates.g[first + i] - g0, resets = gates.resets[first + i] - resets0;
    high[i] = static_cast<T>(resets + g);
    low[i] = static_cast<T>((resets - static_cast<double>(high[i])) + g);
  }
  for (int64_t i = n; i % kNr<T> != 0; ++i) high[i] = low[i] = 0;
}

template <class T>
POWERATTN_INLINE Vec<T> gate_at(const BlockGate<T> &gate, int64_t row, int64_t c) {
  if (!gate.gated) return splat(T(1));
  if (!gate.diagonal) return gate.row[row] * load(gate.column + c);
  const Vec<T> difference =
      (gate.row[row] - load(gate.column + c)) + (gate.row_low[row] - load(gate.column_low + c));
  return exponential(gate.row_sign * difference);
}

// Lane numbers compared with a bound: all ones where column c + lane is in [low, high).
template <class T>
POWERATTN_INLINE typename Simd<T>::I column_mask(int64_t c, int64_t low, int64_t high) {
  typename Simd<T>::I lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<typename Simd<T>::Int>(c + i);
  return (lane >= static_cast<typename Simd<T>::Int>(low)) & (lane < static_cast<typename Simd<T>::Int>(high));
}

// S[m][c] = sum_i A[m][i] B[i][c] for the row groups and column strips of a block; S has kColumns columns.
// A group takes the strips from[g] .. to[g] only (multiples of kNr).
template <class T>
POWERATTN_INLINE void multiply_block(int64_t k, const T *a, int64_t lda, int groups, const T *b,
                                     int64_t b_strip, const int64_t *from, const int64_t *to, int64_t columns,
                                     T *s) {
  for (int64_t c = 0; c < columns; c += kNr<T>) {
    for (int g = 0; g < groups; ++g) {
      if (c < from[g] || c >= to[g]) continue;
      multiply<T, Start::kZero>(k, a + g * kMr * lda, lda, b + c / kNr<T> * b_strip, s + g * kMr * kColumns + c,
                                kColumns);
    }
  }
}

// out[m][n] += sum_c S[m][c] B[c][n] with B in strips [width/kNr][..][kNr], out [width/kNr][rows][kNr]. A group
// takes the columns from[g] .. to[g] only.
template <class T>
POWERATTN_INLINE void multiply_out(const T *s, int groups, const int64_t *from, const int64_t *to, const T *b,
                                   int64_t b_strip, int width, T *out, int64_t rows) {
  for (int64_t n = 0; n < width; n += kNr<T>) {
    for (int g = 0; g < groups; ++g) {
      if (from[g] >= to[g]) continue;
      multiply<T, Start::kAdd>(to[g] - from[g], s + g * kMr * kColumns + from[g], kColumns,
                               b + n / kNr<T> * b_strip + from[g] * kNr<T>,
                               out + n / kNr<T> * rows * kNr<T> + g * kMr * kNr<T>, kNr<T>);
    }
  }
}

// (scale s)^p gate in place for columns begin .. end of one row, zero outside [low, high); returns their sum.
template <class T>
POWERATTN_INLINE T weight_row(T *s, int64_t row, int64_t begin, int64_t end, int64_t low, int64_t high,
                              const Call<T> &call, const BlockGate<T> &gate) {
  const T scale = static_cast<T>(call.scale);
  Vec<T> total{};
  for (int64_t c = begin; c < end; c += kLanes<T>) {
    Vec<T> w = power<T>(scale * load(s + c), call.p) * gate_at(gate, row, c);
    if (c < low || c + kLanes < T >> high) w = column_mask<T>(c, low, high) ? w : Vec<T>{};
    store(s + c, w);
    total += w;
  }
  return sum<T>(total);
}

// With s scaled, P = s^p gate and dS = p s^(p-1) gate r (dP - delta): ds := dS, and s := P where kRowsAreKeys.
// r and delta belong to the query: to the row or to the column.
template <class T, bool kRowsAreKeys>
POWERATTN_INLINE void gradient_row(T *s, T *ds, int64_t row, int64_t begin, int64_t end, int64_t low,
                                   int64_t high, const Call<T> &call, const BlockGate<T> &gate, const T *r,
                                   const T *minus_delta) {
  const T degree = static_cast<T>(call.p), scale = static_cast<T>(call.scale),
          factor = kRowsAreKeys ? degree : degree * r[row];
  for (int64_t c = begin; c < end; c += kLanes<T>) {
    const Vec<T> x = scale * load(s + c);
    const Vec<T> slope = power<T>(x, call.p - 1) * gate_at(gate, row, c);
    Vec<T> w = slope * x, d = load(ds + c);
    if (kRowsAreKeys) {
      d = factor * slope * ((d + load(minus_delta + c)) * load(r + c));
    } else {
      d = factor * slope * (d + minus_delta[row]);
    }
    if (c < low || c + kLanes < T >> high) {
      const auto mask = column_mask<T>(c, low, high);
      w = mask ? w : Vec<T>{};
      d = mask ? d : Vec<T>{};
    }
    if (kRowsAreKeys) store(s + c, w);
    store(ds + c, d);
  }
}

// Columns that a group of rows takes in a block: all, or, on the diagonal, those at or before its last row
// (rows are queries), those at or after its first (rows are keys), in whole strips.
template <class T>
POWERATTN_INLINE void block_columns(bool diagonal, bool rows_are_keys, int groups, int64_t columns,
                                    int64_t *from, int64_t *to) {
  const int64_t padded = round_up(columns, kNr<T>);
  for (int g = 0; g < groups; ++g) {
    from[g] = diagonal && rows_are_keys ? g * kMr / kNr<T> * kNr<T> : 0;
    to[g] = diagonal && !rows_are_keys ? lesser<int64_t>(round_up((g + 1) * kMr, kNr<T>), padded) : padded;
  }
}
constexpr int kMaxGroups = static_cast<int>(kColumns) / kMr + 1;
