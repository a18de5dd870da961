// SPDX-License-Identifier: Apache-2.0
// A block of rows of one state, updated and read by every token and query head of a step: the state crosses the
// memory bus once each way, and everything else is small enough to hide behind that.
// Included by isa.h only.

// Vectors of y in registers; as many are left for v, the factors and the state.
#if POWERATTN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kStepSums = 16;
#else
constexpr int kStepSums = 8;
#endif

// State elements as T. A format moves kGroup vectors of columns at once.
template <class T>
struct Same {
  using Bits = T;
  static constexpr int kGroup = 1;
  static POWERATTN_INLINE void get(const Bits *p, Vec<T> (&x)[kGroup]) { x[0] = load(p); }
  static POWERATTN_INLINE void put(Bits *p, const Vec<T> (&x)[kGroup]) { store(p, x[0]); }
  static POWERATTN_INLINE T get_one(Bits x) { return x; }
  static POWERATTN_INLINE Bits put_one(T x) { return x; }
};

POWERATTN_INLINE float bfloat16_get(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
// Round to nearest even. A NaN stays one: those that reach a state carry no low bits that could overflow
// (canonical NaNs from the tokens, bfloat16 NaNs from the state).
POWERATTN_INLINE uint16_t bfloat16_put(float x) {
  uint32_t w;
  __builtin_memcpy(&w, &x, sizeof w);
  return static_cast<uint16_t>((w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
}

// Two vectors share their words: x[0] has the even columns, x[1] the odd ones, so that no element ever moves to
// another lane. v and y are permuted alike (whole groups of 2 kLanes columns only).
struct Bfloat16Pairs {
  using Bits = uint16_t;
  static constexpr int kGroup = 2;
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t WordU __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

  static POWERATTN_INLINE void get(const Bits *p, Vec<float> (&x)[kGroup]) {
    const Word w = *reinterpret_cast<const WordU *>(p);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    x[0] = (Vec<float>)(w << 16);
    x[1] = (Vec<float>)(w & 0xffff0000u);
#else
    x[1] = (Vec<float>)(w << 16);
    x[0] = (Vec<float>)(w & 0xffff0000u);
#endif
  }
  static POWERATTN_INLINE void put(Bits *p, const Vec<float> (&x)[kGroup]) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    const Word low = (Word)x[0], high = (Word)x[1];
#else
    const Word low = (Word)x[1], high = (Word)x[0];
#endif
    const Word l = (low + 0x7fffu + ((low >> 16) & 1u)) >> 16;
    const Word h = (high + 0x7fffu + ((high >> 16) & 1u)) & 0xffff0000u;
    *reinterpret_cast<WordU *>(p) = l | h;
  }
  static POWERATTN_INLINE float get_one(Bits x) { return bfloat16_get(x); }
  static POWERATTN_INLINE Bits put_one(float x) { return bfloat16_put(x); }
};

// phi(x_m)[row .. row + n) for `count` vectors x [count][d], public weights. Rows with one prefix (i1 .. ip-1)
// are a prefix product times a run of x: phi_p = concat_i x_i * suffix_i(phi_{p-1}), unrolled.
template <class T>
POWERATTN_NOINLINE void phi_vectors(int d, int p, int64_t row, int64_t n, int64_t count, const T *x, T *out,
                                    int64_t ld) {
  Cursor cursor = cursor_at(d, p, row);
  int64_t r = 0;
  for (;;) {
    const int j0 = cursor.index[p - 1];
    const int64_t length = lesser<int64_t>(n - r, d - j0);
    int run = 0;
    const double weight = p > 1 ? prefix_weight(cursor, p, &run) : 1.0;
    const bool repeats = p > 1 && j0 == cursor.index[p - 2];
    const T plain = static_cast<T>(::sqrt(weight));
    const T first = repeats ? static_cast<T>(::sqrt(weight / (run + 1))) : plain;
    for (int64_t m = 0; m < count; ++m) {
      const T *xm = x + m * d;
      T product = 1;
      for (int l = 0; l + 1 < p; ++l) product *= xm[cursor.index[l]];
      const T *__restrict__ from = xm + j0;
      T *__restrict__ to = out + m * ld + r;
      const T scaled = product * plain;
      to[0] = product * first * from[0];
      for (int64_t i = 1; i < length; ++i) to[i] = scaled * from[i];
    }
    r += length;
    if (r >= n || next_prefix(&cursor, d, p) < 0) return;
  }
}

// One token on `rows` rows of S (row stride e): its decay, v and y at the tile's first column, phi(k) and
// phi(q) at the first row. Heads are q_stride and y_stride apart.
template <class T>
struct StepToken {
  int64_t rows, e;
  T decay;
  const T *v, *phi_k, *phi_q;
  int64_t q_stride, y_stride;
  T *y;
};

// S_r <- g S_r + phi(k)_r v (the first group of heads), y_h += phi(q_h)_r S_r for kC vectors of columns.
template <class T, class E, int kH, bool kUpdate, int kC>
POWERATTN_INLINE void step_tile(const StepToken<T> &a, typename E::Bits *s, int64_t c) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>, kG = E::kGroup;
  static_assert(kC % kG == 0, "whole groups");
  const int64_t rows = a.rows, e = a.e, q_stride = a.q_stride;
  const T *v = a.v + c, *pk = a.phi_k, *pq = a.phi_q;
  const V decay = splat(a.decay);
  V sums[kH][kC];
#pragma GCC unroll 4
  for (int h = 0; h < kH; ++h) {
#pragma GCC unroll 16
    for (int n = 0; n < kC; ++n) sums[h][n] = load(a.y + h * a.y_stride + c + n * kL);
  }
  s += c;
  for (int64_t r = 0; r < rows; ++r, s += e) {
    const V k = splat(pk[r]);
    V q[kH];
#pragma GCC unroll 4
    for (int h = 0; h < kH; ++h) q[h] = splat(pq[h * q_stride + r]);
#pragma GCC unroll 16
    for (int n = 0; n < kC; n += kG) {
      V x[kG];
      E::get(s + n * kL, x);
      if (kUpdate) {
#pragma GCC unroll 2
        for (int i = 0; i < kG; ++i) x[i] = decay * x[i] + k * load(v + (n + i) * kL);
        E::put(s + n * kL, x);
      }
#pragma GCC unroll 4
      for (int h = 0; h < kH; ++h) {
#pragma GCC unroll 2
        for (int i = 0; i < kG; ++i) sums[h][n + i] += q[h] * x[i];
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kH; ++h) {
#pragma GCC unroll 16
    for (int n = 0; n < kC; ++n) store(a.y + h * a.y_stride + c + n * kL, sums[h][n]);
  }
}

// The last columns, fewer than a group: one at a time.
template <class T, class E, int kH, bool kUpdate>
POWERATTN_INLINE void step_column(const StepToken<T> &a, typename E::Bits *s, int64_t c) {
  T sums[kH] = {};
  for (int64_t r = 0; r < a.rows; ++r) {
    T x = E::get_one(s[r * a.e + c]);
    if (kUpdate) {
      x = a.decay * x + a.phi_k[r] * a.v[c];
      s[r * a.e + c] = E::put_one(x);
    }
    for (int h = 0; h < kH; ++h) sums[h] += a.phi_q[h * a.q_stride + r] * x;
  }
  for (int h = 0; h < kH; ++h) a.y[h * a.y_stride + c] += sums[h];
}

template <class T, class E, int kH, bool kUpdate>
POWERATTN_NOINLINE void step_columns(const StepToken<T> &a, typename E::Bits *s) {
  constexpr int64_t kL = kLanes<T>;
  constexpr int kMost = kStepSums / kH < 8 ? kStepSums / kH : 8;
  constexpr int kHalf = kMost / 2 > E::kGroup ? kMost / 2 : E::kGroup;
  int64_t c = 0;
  for (; c + kMost * kL <= a.e; c += kMost * kL) step_tile<T, E, kH, kUpdate, kMost>(a, s, c);
  for (; c + kHalf * kL <= a.e; c += kHalf * kL) step_tile<T, E, kH, kUpdate, kHalf>(a, s, c);
  for (; c + E::kGroup * kL <= a.e; c += E::kGroup * kL) step_tile<T, E, kH, kUpdate, E::kGroup>(a, s, c);
  for (; c < a.e; ++c) step_column<T, E, kH, kUpdate>(a, s, c);
}

// The first head updates the state on the way, a whole row at a time as memory likes it; the others find the
// rows in L1, four heads at a time.
template <class T, class E>
POWERATTN_INLINE void step_heads(StepToken<T> a, int64_t heads, typename E::Bits *s) {
  // Rows wider than the sums in registers take several passes: over few rows at a time, so that memory is read
  // nearly in order.
  const int64_t narrow = a.e <= 8 * kLanes<T> ? a.rows : 16;
  StepToken<T> first = a;
  for (int64_t r = 0; r < a.rows; r += narrow) {
    first.rows = lesser(narrow, a.rows - r);
    first.phi_k = a.phi_k + r;
    first.phi_q = a.phi_q + r;
    step_columns<T, E, 1, true>(first, s + r * a.e);
  }
  for (int64_t h = 1, n = 1; h < heads; h += n) {
    a.phi_q += n * a.q_stride;
    a.y += n * a.y_stride;
    n = heads - h >= 4 ? 4 : heads - h >= 2 ? 2 : 1;
    if (n == 4)
      step_columns<T, E, 4, false>(a, s);
    else if (n == 2)
      step_columns<T, E, 2, false>(a, s);
    else
      step_columns<T, E, 1, false>(a, s);
  }
}

// z likewise: z_r <- g z_r + phi(k)_r, l_h += phi(q_h)_r z_r.
template <class T, class E>
POWERATTN_NOINLINE void step_norm(const StepUnit<T> &u, int64_t first, int64_t tokens, const T *phi_k,
                                  const T *phi_q) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  typename E::Bits *bits = static_cast<typename E::Bits *>(u.z);
  const int64_t whole = u.rows / kL * kL;
  T *z = u.z_scratch;
  for (int64_t r = 0; r < u.rows; ++r) z[r] = E::get_one(bits[r]);
  for (int64_t t = 0; t < tokens; ++t) {
    const T *pk = phi_k + t * u.ld;
    const T decay = u.decay[first + t];
    for (int64_t r = 0; r < u.rows; ++r) z[r] = decay == 0 ? pk[r] : decay * z[r] + pk[r];
    for (int64_t h = 0; h < u.heads; ++h) {
      const T *pq = phi_q + (h * u.batch + t) * u.ld;
      V sums = {};
      for (int64_t r = 0; r < whole; r += kL) sums += load(pq + r) * load(z + r);
      T total = sum<T>(sums);
      for (int64_t r = whole; r < u.rows; ++r) total += pq[r] * z[r];
      u.l[h * u.token_stride + first + t] += total;
    }
  }
  for (int64_t r = 0; r < u.rows; ++r) bits[r] = E::put_one(z[r]);
}

// Rows row .. row+n-1 of the unit, all tokens of a batch.
template <class T, class E>
POWERATTN_INLINE void step_tokens(const StepUnit<T> &u, int64_t first, int64_t tokens, int64_t row, int64_t n,
                                  const T *phi_k, const T *phi_q, typename E::Bits *s) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T decay = u.decay[first + t];
    if (decay == 0) {  // a reset forgets even an Inf
      for (int64_t i = 0; i < n * u.e; ++i) s[i] = 0;
    }
    const StepToken<T> a = {n,
                            u.e,
                            decay,
                            u.v + (first + t) * u.ep,
                            phi_k + t * u.ld + row,
                            phi_q + t * u.ld + row,
                            u.batch * u.ld,
                            u.token_stride * u.ep,
                            u.y + (first + t) * u.ep};
    step_heads<T, E>(a, u.heads, s);
  }
}

template <class T, class E>
POWERATTN_NOINLINE void step_block(const StepUnit<T> &u) {
  using Bits = typename E::Bits;
  for (int64_t i = 0; i < u.heads * u.token_stride * u.ep; ++i) u.y[i] = 0;
  for (int64_t i = 0; i < u.heads * u.token_stride; ++i) u.l[i] = 0;
  const int64_t fits = kStepBytes / (u.e * static_cast<int64_t>(sizeof(T)));
  const int64_t step = fits < kStepLeastRows ? kStepLeastRows : fits;
  // Several tokens at once while their phi fits in the scratch; the rows stay in L2 between batches.
  for (int64_t first = 0; first < u.tokens; first += u.batch) {
    const int64_t tokens = lesser(u.batch, u.tokens - first);
    T *phi_k = u.scratch, *phi_q = u.scratch + u.batch * u.ld;
    phi_vectors(u.d, u.p, u.row, u.rows, tokens, u.k + first * u.d, phi_k, u.ld);
    for (int64_t h = 0; h < u.heads; ++h) {
      phi_vectors(u.d, u.p, u.row, u.rows, tokens, u.q + (h * u.token_stride + first) * u.d,
                  phi_q + h * u.batch * u.ld, u.ld);
    }
    for (int64_t row = 0; row < u.rows; row += step) {
      const int64_t n = lesser(step, u.rows - row);
      Bits *s = static_cast<Bits *>(u.s) + row * u.e;
      if (u.direct) {
        step_tokens<T, E>(u, first, tokens, row, n, phi_k, phi_q, s);
        continue;
      }
      // Every token and head must read the sums before they are rounded.
      for (int64_t i = 0; i < n * u.e; ++i) u.s_scratch[i] = E::get_one(s[i]);
      step_tokens<T, Same<T>>(u, first, tokens, row, n, phi_k, phi_q, u.s_scratch);
      for (int64_t i = 0; i < n * u.e; ++i) s[i] = E::put_one(u.s_scratch[i]);
    }
    if (u.z != nullptr) step_norm<T, E>(u, first, tokens, phi_k, phi_q);
  }
}

inline void step_unit(const StepUnit<float> &u) {
  if (u.state_dtype == POWERATTN_BFLOAT16)
    step_block<float, Bfloat16Pairs>(u);
  else
    step_block<float, Same<float>>(u);
}
inline void step_unit(const StepUnit<double> &u) { step_block<double, Same<double>>(u); }
