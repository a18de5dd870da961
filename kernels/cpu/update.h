// SPDX-License-Identifier: Apache-2.0
// State rows from the tokens of a chunk. Included by isa.h only.

constexpr int64_t kBlock =
    84;  // state rows per pass: their phi for kTokens tokens is 86 kB in float32, half of L2

template <class T>
int64_t update_scratch() {
  return kBlock * kTokens * static_cast<int64_t>(sizeof(T));
}

// out_r = decay in_r + sum_t a_rt [b_t, u_t],  a_rt = factor base_t m_r mono_r(x_t)
template <class T>
void update_block(const Call<T> &call, const T *x_cols, const T *b_strips, const T *base, double factor,
                  const T *u, double decay, const State<T> &in, const State<T> &out, int64_t tokens,
                  int64_t row, int64_t rows, void *scratch) {
  constexpr int kN = kNr<T>;
  T *a = static_cast<T *>(scratch);  // [rows][kTokens]
  const int64_t padded = round_up(rows, kMr);
  for (int64_t i = rows * kTokens; i < padded * kTokens; ++i) a[i] = 0;
  const Cursor cursor = cursor_at(call.d, call.p, row);
  const bool carried = in.s != nullptr && decay != 0;  // a reset forgets even Inf and NaN
  const T beta = static_cast<T>(decay);

  if (tokens == 0) {
    for (int64_t n = 0; n < call.ep; n += kN) {
      const int64_t at = n * call.Dp + row * kN;
      for (int64_t i = 0; i < padded * kN; ++i) out.s[at + i] = carried ? beta * in.s[at + i] : T(0);
    }
    for (int64_t r = row; out.z != nullptr && r < row + rows; ++r) out.z[r] = carried ? beta * in.z[r] : T(0);
  }
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    const int64_t n = lesser(kTokens, tokens - t0);
    for (int64_t t = 0; t < n; t += kN) {
      phi_rows<T>(call.d, call.p, cursor, rows, x_cols + (t0 + t) * call.dp,
                  base != nullptr ? base + t0 + t : nullptr, static_cast<T>(factor), a + t, kTokens);
    }
    for (int64_t s = 0; s < call.ep; s += kN) {
      const T *b = b_strips + s * call.cp + t0 * kN;
      for (int64_t r = 0; r < padded; r += kMr) {
        const int64_t at = s * call.Dp + (row + r) * kN;
        if (t0 > 0) {
          multiply<T, Start::kAdd>(n, a + r * kTokens, kTokens, b, out.s + at, kN);
        } else if (carried) {
          TileStart<T> start;
          start.in = in.s + at;
          start.beta = beta;
          multiply<T, Start::kScale>(n, a + r * kTokens, kTokens, b, out.s + at, kN, start);
        } else {
          multiply<T, Start::kZero>(n, a + r * kTokens, kTokens, b, out.s + at, kN);
        }
      }
    }
    if (out.z == nullptr) continue;
    // Tokens past the last are zero in x_cols, and so in a.
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> total{};
      for (int64_t t = 0; t < n; t += kLanes<T>) {
        const Vec<T> at = load(a + r * kTokens + t);
        total += u != nullptr ? at * load(u + t0 + t) : at;
      }
      const T before = t0 > 0 ? out.z[row + r] : carried ? beta * in.z[row + r] : T(0);
      out.z[row + r] = before + sum<T>(total);
    }
  }
}

template <class T>
void update(const Call<T> &call, const Packed<T> &x, const Packed<T> &b, const T *base, double factor,
            const T *u, double decay, const State<T> &in, const State<T> &out, int64_t tokens, int64_t row,
            int64_t rows, void *scratch) {
#if defined(POWERATTN_AMX)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (call.low) {
      amx_update(call, x, b, base, factor, decay, in, out, tokens, row, rows, scratch);
      return;
    }
  }
#endif
  for (int64_t r = 0; r < rows; r += kBlock) {
    update_block(call, x.cols, b.strips, base, factor, u, decay, in, out, tokens, row + r,
                 lesser(kBlock, rows - r), scratch);
  }
}

template <class T>
int64_t image_size(const Call<T> &call) {
  return call.low ? (call.ep + 2) * round_up(call.D, 32) : 0;
}

template <class T>
void image(const Call<T> &call, const State<T> &state, int64_t row, int64_t rows, uint16_t *out) {
#if defined(POWERATTN_AMX)
  if constexpr (sizeof(T) == sizeof(float)) amx_image(call, state, row, rows, out);
#endif
}

// f(row, m_r) for rows row .. row + rows - 1.
template <class F>
POWERATTN_INLINE void each_weight(int d, int p, int64_t row, int64_t rows, const F &f) {
  Cursor cursor = cursor_at(d, p, row);
  const int64_t last = row + rows;
  while (row < last) {
    int run = 0;
    const double weight = prefix_weight(cursor, p, &run);
    for (int j = cursor.index[p - 1]; j < d && row < last; ++j, ++row) {
      f(row, p > 1 && j == cursor.index[p - 2] ? weight / (run + 1) : weight);
    }
    if (next_prefix(&cursor, d, p) < 0) return;
  }
}

template <class T, class U>
void import_rows(const Call<T> &call, const U *s, const U *z, int64_t row, int64_t rows, const State<T> &to) {
  each_weight(call.d, call.p, row, rows, [&](int64_t r, double m) {
    const double factor = __builtin_sqrt(m);
    for (int n = 0; n < call.ep; ++n) {
      const double x = n < call.e ? static_cast<double>(s[r * call.e + n]) * factor : 0.0;
      to.s[n / kNr<T> * kNr<T> * call.Dp + r * kNr<T> + n % kNr<T>] = static_cast<T>(x);
    }
    if (to.z != nullptr) to.z[r] = z != nullptr ? static_cast<T>(static_cast<double>(z[r]) * factor) : T(0);
  });
  if (row + rows < call.D) return;
  for (int64_t r = call.D; r < call.Dp; ++r) {
    for (int n = 0; n < call.ep; ++n) to.s[n / kNr<T> * kNr<T> * call.Dp + r * kNr<T> + n % kNr<T>] = 0;
    if (to.z != nullptr) to.z[r] = 0;
  }
}

template <class T, class U>
void export_rows(const Call<T> &call, const State<T> &from, int64_t row, int64_t rows, U *s, U *z) {
  each_weight(call.d, call.p, row, rows, [&](int64_t r, double m) {
    const double factor = 1 / __builtin_sqrt(m);
    for (int n = 0; n < call.e; ++n) {
      const T x = from.s[n / kNr<T> * kNr<T> * call.Dp + r * kNr<T> + n % kNr<T>];
      s[r * call.e + n] = static_cast<U>(static_cast<double>(x) * factor);
    }
    if (z != nullptr) z[r] = static_cast<U>(static_cast<double>(from.z[r]) * factor);
  });
}

template <class T>
void import_state(const Call<T> &call, int state_dtype, const void *s, const void *z, int64_t row, int64_t rows,
                  const State<T> &to) {
  if (state_dtype == POWERATTN_FLOAT64) {
    import_rows(call, static_cast<const double *>(s), static_cast<const double *>(z), row, rows, to);
  } else {
    import_rows(call, static_cast<const float *>(s), static_cast<const float *>(z), row, rows, to);
  }
}

template <class T>
void export_state(const Call<T> &call, int state_dtype, const State<T> &from, int64_t row, int64_t rows,
                  void *s, void *z) {
  if (state_dtype == POWERATTN_FLOAT64) {
    export_rows(call, from, row, rows, static_cast<double *>(s), static_cast<double *>(z));
  } else {
    export_rows(call, from, row, rows, static_cast<float *>(s), static_cast<float *>(z));
  }
}

// sum_r S~_r . dS~_r / m_r
template <class T>
double inner(const Call<T> &call, const State<T> &a, const State<T> &b, int64_t row, int64_t rows) {
  double total = 0;
  each_weight(call.d, call.p, row, rows, [&](int64_t r, double m) {
    Vec<T> sums{};
    for (int64_t n = 0; n < call.ep; n += kNr<T>) {
      const int64_t at = n * call.Dp + r * kNr<T>;
      sums += load(a.s + at) * load(b.s + at);
      sums += load(a.s + at + kLanes<T>) * load(b.s + at + kLanes<T>);
    }
    double x = sum<T>(sums);
    if (a.z != nullptr && b.z != nullptr) x += static_cast<double>(a.z[r]) * b.z[r];
    total += x / m;
  });
  return total;
}
