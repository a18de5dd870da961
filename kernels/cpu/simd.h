// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that this file is compiled for, and the one microkernel.
// Included by isa.h only, once per instruction set, inside that set's namespace.

constexpr int kVectorBytes = POWERATTN_VECTOR_BYTES;
#if POWERATTN_VECTOR_BYTES == 64
constexpr int kMr = 14;  // 28 accumulators + 2 of B + 1 broadcast in 32 registers
#elif defined(__aarch64__)
constexpr int kMr = 12;  // 24 accumulators + 2 of B + broadcasts in 32 registers
#else
constexpr int kMr = 6;  // 12 accumulators + 2 of B + 1 broadcast in 16 registers
#endif

#define POWERATTN_INLINE inline __attribute__((always_inline))
#define POWERATTN_NOINLINE __attribute__((noinline))

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float U __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double U __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kNr = 2 * kLanes<T>;
// Tokens of one row group of the microkernel, rounded up to whole vectors.
template <class T>
constexpr int kGroupVectors = (kMr + kLanes<T> - 1) / kLanes<T>;
template <class T>
constexpr int kGroup = kGroupVectors<T> *kLanes<T>;

template <class T>
POWERATTN_INLINE Vec<T> load(const T *p) {
  return *reinterpret_cast<const typename Simd<T>::U *>(p);
}
template <class T>
POWERATTN_INLINE void store(T *p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::U *>(p) = v;
}
template <class T>
POWERATTN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not {} + x: that is 0, not -0, for x = -0, and so an addition in the code
}
template <class T>
POWERATTN_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class A>
POWERATTN_INLINE A lesser(A a, A b) {
  return a < b ? a : b;
}
POWERATTN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where the accumulators of a tile begin.
enum class Start {
  kZero,
  kAdd,    // C
  kScale,  // beta * in
  kOuter,  // z_m * u_n
};

template <class T>
struct TileStart {
  const T *in = nullptr;  // kScale: same layout as C
  T beta = 0;
  const T *z = nullptr;  // kOuter: [kMr]
  const T *u = nullptr;  //         [kNr]
};

// C[m][n] = start + sum_k A[m][k] B[k][n] for kMr x kNr, B [k][kNr].
// kKMajor: A[m][k] = a[k * kMr + m]. Else row-major with row stride lda; after every `block` columns a moves
// by `step`, so that A may itself be stored in strips.
template <class T, Start kStart, bool kKMajor>
POWERATTN_NOINLINE void tile(int64_t k, const T *a, int64_t lda, int64_t block, int64_t step, const T *b, T *c,
                             int64_t ldc, const TileStart<T> &start) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V acc[kMr][2];
#pragma GCC unroll 16
  for (int m = 0; m < kMr; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (kStart == Start::kZero) acc[m][v] = V{};
      if (kStart == Start::kAdd) acc[m][v] = load(c + m * ldc + v * kL);
      if (kStart == Start::kScale) acc[m][v] = start.beta * load(start.in + m * ldc + v * kL);
      if (kStart == Start::kOuter) acc[m][v] = start.z[m] * load(start.u + v * kL);
    }
  }
  for (int64_t k0 = 0; k0 < k; k0 += block) {
    const T *ak = a;
    const int64_t n = lesser(block, k - k0);
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const V b0 = load(b), b1 = load(b + kL);
#pragma GCC unroll 16
      for (int m = 0; m < kMr; ++m) {
        const V am = splat(kKMajor ? ak[m] : ak[m * lda]);
        acc[m][0] += am * b0;
        acc[m][1] += am * b1;
      }
      ak += kKMajor ? kMr : 1;
      b += kNr<T>;
    }
    a += step;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kMr; ++m) {
    store(c + m * ldc, acc[m][0]);
    store(c + m * ldc + kL, acc[m][1]);
  }
}

// Row-major A.
template <class T, Start kStart>
POWERATTN_INLINE void multiply(int64_t k, const T *a, int64_t lda, const T *b, T *c, int64_t ldc,
                               const TileStart<T> &start = {}) {
  tile<T, kStart, false>(k, a, lda, k, 0, b, c, ldc, start);
}

// exp(x), to about 1 ulp in float32: x = n ln 2 + r, |r| <= ln 2 / 2, exp = 2^n poly(r).
POWERATTN_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  using I = typename Simd<float>::I;
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V top = splat(88.72f), bottom = splat(-87.3f);
  const V clamped = x > top ? top : (x < bottom ? bottom : x);
  const V shifted = clamped * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  V poly = splat(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  // 2^n in two halves, so that n = 128 does not overflow the exponent field.
  const I ni = (I)shifted - (I)magic;
  const I half = ni >> 1;
  const V scaled = poly * (V)((half + 127) << 23) * (V)((ni - half + 127) << 23);
  const V huge = x > top ? splat(__builtin_inff()) : scaled;
  const V result = x < bottom ? V{} : huge;
  return x == x ? result : x;  // NaN stays; NOLINT(misc-redundant-expression)
}

POWERATTN_INLINE Vec<double> exponential(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = ::exp(x[i]);
  return y;
}

// x^p, p >= 0, by repeated squaring.
template <class T>
POWERATTN_INLINE Vec<T> power(Vec<T> x, int p) {
  if (p == 2) return x * x;
  if (p == 1) return x;
  Vec<T> result = splat(T(1));
  for (;; x = x * x) {
    if (p & 1) result = result * x;
    p >>= 1;
    if (p == 0) return result;
  }
}
