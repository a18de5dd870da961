// SPDX-License-Identifier: Apache-2.0
// The symmetric power embedding by plain monomials, several tokens at a time, in canonical order.
// Included by isa.h only.

constexpr int kMaxDegree = 8;

// A row of the canonical order: i1 <= ... <= ip.
struct Cursor {
  int index[kMaxDegree];
};

// C(n, k) for k <= 8, n <= 264: fits in 64 bits.
inline int64_t binomial(int64_t n, int64_t k) {
  int64_t c = 1;
  for (int64_t i = 1; i <= k; ++i) c = c * (n - k + i) / i;
  return c;
}

// Monomials of degree p whose first index is i or more: C(d - i + p - 1, p).
inline Cursor cursor_at(int d, int p, int64_t row) {
  Cursor cursor = {};
  int i = 0;
  for (int l = 0; l < p; ++l) {
    const int rest = p - l - 1;
    for (;; ++i) {
      const int64_t block = binomial(d - i + rest - 1, rest);
      if (row < block || i == d - 1) break;
      row -= block;
    }
    cursor.index[l] = i;
  }
  return cursor;
}

// Moves the leading p - 1 indices to the next prefix, the last to its first value; returns the level that
// changed, negative after the last prefix.
POWERATTN_INLINE int next_prefix(Cursor *cursor, int d, int p) {
  int l = p - 2;
  while (l >= 0 && cursor->index[l] == d - 1) --l;
  if (l < 0) return l;
  const int value = cursor->index[l] + 1;
  for (int m = l; m < p; ++m) cursor->index[m] = value;
  return l;
}

// p! / prod(multiplicity!) of the prefix followed by a new index, and the multiplicity of its last index.
POWERATTN_INLINE double prefix_weight(const Cursor &cursor, int p, int *last_run) {
  double w = p;
  int run = 0;
  for (int i = 0; i < p - 1; ++i) {
    run = i > 0 && cursor.index[i] == cursor.index[i - 1] ? run + 1 : 1;
    w = w * (i + 1) / run;
  }
  *last_run = run;
  return w;
}

// emit(r, value[kV]) for n rows from the cursor on, value = base * mono_r(x), times m_r when kWeighted.
// x [d][stride] holds kV vectors of tokens. The run over the last index multiplies one prefix product.
template <class T, int kV, bool kWeighted, class Emit>
POWERATTN_INLINE void walk(int d, int p, Cursor cursor, int64_t n, const T *x, int64_t stride,
                           const Vec<T> (&base)[kV], const Emit &emit) {
  using V = Vec<T>;
  V product[kMaxDegree][kV];  // product[l] = base * x_i1 ... x_il
  for (int v = 0; v < kV; ++v) product[0][v] = base[v];
  for (int l = 0; l + 1 < p; ++l) {
    for (int v = 0; v < kV; ++v) {
      product[l + 1][v] = product[l][v] * load(x + cursor.index[l] * stride + v * kLanes<T>);
    }
  }
  int64_t r = 0;
  int j = cursor.index[p - 1];
  for (;;) {
    V prefix[kV];
    for (int v = 0; v < kV; ++v) prefix[v] = product[p - 1][v];
    if (kWeighted && p > 1) {
      int run;
      const T weight = static_cast<T>(prefix_weight(cursor, p, &run));
      for (int v = 0; v < kV; ++v) prefix[v] = prefix[v] * weight;
      if (j == cursor.index[p - 2] && r < n) {
        V value[kV];
        const T repeated = T(1) / static_cast<T>(run + 1);
        for (int v = 0; v < kV; ++v) value[v] = prefix[v] * repeated * load(x + j * stride + v * kLanes<T>);
        emit(r++, value);
        ++j;
      }
    }
    const int64_t end = lesser<int64_t>(n, r + d - j);
    const T *xj = x + j * stride;
    for (; r < end; ++r, xj += stride) {
      V value[kV];
      for (int v = 0; v < kV; ++v) value[v] = prefix[v] * load(xj + v * kLanes<T>);
      emit(r, value);
    }
    if (r >= n) return;
    const int level = next_prefix(&cursor, d, p);
    if (level < 0) return;
    for (int l = level; l + 1 < p; ++l) {
      for (int v = 0; v < kV; ++v) {
        product[l + 1][v] = product[l][v] * load(x + cursor.index[l] * stride + v * kLanes<T>);
      }
    }
    j = cursor.index[p - 1];
  }
}

// panel[r][kMr] = base * mono_r(x) for one group of tokens, the A operand of a query; dot += z_r panel[r].
// x [d][kGroup]. Writes up to kGroup - kMr elements past the panel.
template <class T>
POWERATTN_NOINLINE void phi_panel(int d, int p, const Cursor &cursor, int64_t n, const T *x, const T *base,
                                  T *panel, const T *z, T *dot) {
  constexpr int kV = kGroupVectors<T>;
  Vec<T> b[kV], sums[kV];
  for (int v = 0; v < kV; ++v) {
    b[v] = load(base + v * kLanes<T>);
    sums[v] = Vec<T>{};
  }
  if (z != nullptr) {
    walk<T, kV, false>(d, p, cursor, n, x, kGroup<T>, b, [&](int64_t r, const Vec<T>(&value)[kV]) {
      for (int v = 0; v < kV; ++v) {
        store(panel + r * kMr + v * kLanes<T>, value[v]);
        sums[v] += value[v] * z[r];
      }
    });
    for (int v = 0; v < kV; ++v) store(dot + v * kLanes<T>, load(dot + v * kLanes<T>) + sums[v]);
  } else {
    walk<T, kV, false>(d, p, cursor, n, x, kGroup<T>, b, [&](int64_t r, const Vec<T>(&value)[kV]) {
      for (int v = 0; v < kV; ++v) store(panel + r * kMr + v * kLanes<T>, value[v]);
    });
  }
}

// a[r][t] = factor base_t m_r mono_r(x_t) for the kNr tokens of one strip, the A operand of an update.
template <class T>
POWERATTN_NOINLINE void phi_rows(int d, int p, const Cursor &cursor, int64_t n, const T *x, const T *base,
                                 T factor, T *a, int64_t lda) {
  Vec<T> b[2];
  for (int v = 0; v < 2; ++v) b[v] = base != nullptr ? factor * load(base + v * kLanes<T>) : splat(factor);
  walk<T, 2, true>(d, p, cursor, n, x, kNr<T>, b, [&](int64_t r, const Vec<T>(&value)[2]) {
    store(a + r * lda, value[0]);
    store(a + r * lda + kLanes<T>, value[1]);
  });
}

// One level of the chain rule for n rows of degree p from the cursor on, for the kNr tokens of one strip:
//   dx_j += t_r mono(prefix),   up[prefix] += t_r x_j      with r = (prefix, j).
// `up`, the gradient of the monomials of degree p - 1, begins at the cursor's prefix.
template <class T>
POWERATTN_NOINLINE void contract_level(int d, int p, Cursor cursor, int64_t n, const T *t, const T *x, T *dx,
                                       T *up) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>, kN = kNr<T>;
  if (p == 1) {
    for (int64_t r = 0, j = cursor.index[0]; r < n; ++r, ++j) {
      store(dx + j * kN, load(dx + j * kN) + load(t + r * kN));
      store(dx + j * kN + kL, load(dx + j * kN + kL) + load(t + r * kN + kL));
    }
    return;
  }
  V product[kMaxDegree][2];
  product[0][0] = product[0][1] = splat(T(1));
  int level = 0;
  int64_t r = 0;
  for (;;) {
    for (int l = level; l + 1 < p; ++l) {
      const T *xl = x + cursor.index[l] * kN;
      product[l + 1][0] = product[l][0] * load(xl);
      product[l + 1][1] = product[l][1] * load(xl + kL);
    }
    const V prefix0 = product[p - 1][0], prefix1 = product[p - 1][1];
    V sum0 = load(up), sum1 = load(up + kL);
    int64_t j = cursor.index[p - 1];
    const int64_t end = lesser<int64_t>(n, r + d - j);
    for (; r < end; ++r, ++j) {
      const V t0 = load(t + r * kN), t1 = load(t + r * kN + kL);
      sum0 += t0 * load(x + j * kN);
      sum1 += t1 * load(x + j * kN + kL);
      store(dx + j * kN, load(dx + j * kN) + t0 * prefix0);
      store(dx + j * kN + kL, load(dx + j * kN + kL) + t1 * prefix1);
    }
    store(up, sum0);
    store(up + kL, sum1);
    up += kN;
    if (r >= n) return;
    level = next_prefix(&cursor, d, p);
    if (level < 0) return;
  }
}

// Rank of the cursor's prefix among the monomials of degree p - 1.
inline int64_t prefix_rank(int d, int p, const Cursor &cursor) {
  int64_t rank = 0;
  int from = 0;
  for (int l = 0; l + 1 < p; ++l) {
    const int rest = p - 1 - l;  // degree of the suffix that starts at level l
    rank += binomial(d - from + rest - 1, rest) - binomial(d - cursor.index[l] + rest - 1, rest);
    from = cursor.index[l];
  }
  return rank;
}

// Elements of `up` for all levels below p, for one strip.
template <class T>
inline int64_t contract_scratch(int d, int p) {
  int64_t rows = 0;
  for (int l = 1; l < p; ++l) rows += binomial(d + l - 1, l);
  return rows * kNr<T>;
}

// The levels below p, after every row of degree p has been contracted into up (level p - 1 first).
template <class T>
inline void contract_rest(int d, int p, const T *x, T *dx, T *up) {
  for (int l = p - 1; l >= 1; --l) {
    const int64_t rows = binomial(d + l - 1, l);
    contract_level<T>(d, l, Cursor{}, rows, up, x, dx, up + rows * kNr<T>);
    up += rows * kNr<T>;
  }
}
