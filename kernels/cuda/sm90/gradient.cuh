// SPDX-License-Identifier: Apache-2.0
// Parts that the gradient kernels of both head sizes share.
#pragma once

#include "output.cuh"

namespace powerattn::cuda::sm90 {

constexpr int kUnitRows = 128;
// Per stage: factor, log2 gate, r, delta of 64 columns, and the advance (floats); which columns they are.
constexpr uint32_t kGate = 256, kR = 512, kDelta = 768, kAdvance = 1024, kHead = 1028, kBlock = 1032,
                   kMeta = 1040;

struct GradientUnit {
  int32_t head, row, length, main, first, second;  // blocks: seen by all rows; of the own two blocks
  int32_t states, batch;
  int64_t token;
  float state_factor;
  // For the producers themselves, as in UnitMeta; `advance`: of the columns' factors.
  int32_t mapped, blocks, head_kv;
  float advance;
  const double *gate;
  int64_t state;
  float r[kUnitRows], delta[kUnitRows];  // of the rows (queries)
  // float16, whose weights are complete before they are rounded: the units of the state, the lifts of weights
  // and of their gradients, and what weights of a row have beside the columns' factors, in blocks before (keys:
  // after) the tile, in the tile's other block, and (queries) in the row's own: exp(gates), of queries times c
  // r_i and lifted.
  Units units;
  Lifts lifts;
  float far[kUnitRows], near[kUnitRows], own[kUnitRows];
};

// A block of columns: before (keys: after) the tile, the tile's other one, which the rows see whole, or the
// row's own.
enum class Block { kFar, kNear, kDiagonal };

// float16: what the state gave to dx (dv) of rows `row` and row + 8, times this, is complete and lifted.
template <bool kKeys>
__device__ __forceinline__ void state_factors(float (&x)[2], float (&v)[2], const volatile GradientUnit &u,
                                              int row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float f = u.far[row + 8 * h], lowered = 1.f;
    if constexpr (kKeys) {
      lowered = 1.f / u.r[row + 8 * h];  // the power of two of x
      f *= u.lifts.weight * lowered;
    }
    x[h] = f * u.lifts.ratio;
    v[h] = f * lowered;
  }
}

// What the state gave to a consumer's sums, to what they hold.
template <typename T, int kDegree, bool kKeys, typename Consumer>
__device__ __forceinline__ void leave_state(Consumer &c, const volatile GradientUnit &unit) {
  const float inverse = 1.f / kDegree;
  if constexpr (!kCounted<T>) {
    const float f = unit.state_factor;
    c.scale(f * inverse, f * inverse, f, f);
  } else {
    float x[2], v[2];
    state_factors<kKeys>(x, v, unit, c.local());
    const float f = unit.state_factor * unit.units.s;
    c.scale(f, f);  // one after the other: the product could leave the range of float32
    c.scale(x[0] * inverse, x[1] * inverse, v[0], v[1]);
  }
}

// m := s^{p-1} f (m - delta), t := s^p f from t = s; on the diagonal f = r 2^(gate difference), and only
// visible pairs. This lane holds rows `row` and row + 8 and columns `col`, col + 1 of every 8. In place, so
// that the fragments of the block before may still be read by products in flight.
// float16: f times the factors of the rows, which are `local` and local + 8 of the unit, and m times the ratio
// of the lifts, as delta is.
// kDots: adds this lane's part of x . dx to `dots`, from weights that are not rounded.
template <typename T, int kDegree, bool kKeys, bool kDots, Block kBlock>
__device__ __forceinline__ void weigh_gradient(float (&t)[32], float (&m)[32], float (&dots)[2], uint32_t md,
                                               int row, int col, float d0, float d1,
                                               const volatile GradientUnit &u, int local) {
  constexpr bool kDiagonal = kBlock == Block::kDiagonal, kWithRows = kCounted<T> && !(kKeys && kDiagonal);
  float g[2] = {0.f, 0.f}, rows[2] = {1.f, 1.f}, ratio = 1.f;
  if constexpr (kWithRows) {
    const volatile float *from = kDiagonal ? u.own : kBlock == Block::kFar ? u.far : u.near;
    rows[0] = from[local];
    rows[1] = from[local + 8];
  }
  if constexpr (kCounted<T>) ratio = u.lifts.ratio;
  if constexpr (kDiagonal) {
    g[0] = load_f1(md + kGate + row * 4);
    g[1] = load_f1(md + kGate + row * 4 + 32);
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const uint32_t at = md + (n * 8 + col) * 4;
    float2 f = make_float2(1.f, 1.f), delta = make_float2(0.f, 0.f), gc;
    if constexpr (!kDiagonal)
      f = load_f2(at);
    else if constexpr (kKeys)
      f = load_f2(at + kR);
    if constexpr (kDiagonal) gc = load_f2(at + kGate);
    if constexpr (kKeys) delta = load_f2(at + kDelta);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float &sv = t[4 * n + 2 * h + k], &mv = m[4 * n + 2 * h + k];
        float fv = k ? f.y : f.x;
        if constexpr (kDiagonal) {
          const float gv = k ? gc.y : gc.x;
          const int r = row + 8 * h, c = n * 8 + col + k;
          fv *= exp2_fast(kKeys ? gv - g[h] : g[h] - gv);
          fv = (kKeys ? c >= r : c <= r) ? fv : 0.f;
        }
        if constexpr (kWithRows) fv *= rows[h];
        const float a = power<kDegree - 1>(sv) * fv,
                    e = (kCounted<T> ? mv * ratio : mv) - (kKeys ? (k ? delta.y : delta.x) : (h ? d1 : d0));
        mv = a * e;
        sv = a * sv;
        if constexpr (kDots) dots[h] += sv * e;
      }
  }
}
// The same numbers as operands: e from m and, for keys, w from t.
template <typename T, bool kKeys, int kW>
__device__ __forceinline__ void pack_gradient(const float (&t)[32], const float (&m)[32], uint32_t (&e)[4][4],
                                              uint32_t (&w)[kW][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * n + 2 * h;
      e[n / 2][(n & 1) * 2 + h] = pack2<T>(m[i], m[i + 1]);
      if constexpr (kKeys) w[n / 2][(n & 1) * 2 + h] = pack2<T>(t[i], t[i + 1]);
    }
}

// x . dx of a row tile's rows lane / 4 and lane / 4 + 8 from `local` on; with them delta and the weights in dZ.
template <bool kKeys, bool kCorrect>
__device__ __forceinline__ void store_dots(const GradientArgs &a, const volatile GradientUnit &unit,
                                           const float (&dot)[2], float degree, int local, int lane) {
  const int heads = kKeys ? a.p.heads_kv : a.p.heads_q;
  const int64_t to = token_row(a.p, unit.batch, heads, unit.head, unit.token) + unit.row + local + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = local + lane / 4 + 8 * h;
    if ((lane & 3) != 0 || unit.row + r >= unit.length) continue;
    if (a.dot) a.dot[to + 8 * h] = dot[h];
    if constexpr (kCorrect && !kKeys) {
      const float delta = dot[h] / degree + unit.delta[r] * (1.f - a.p.eps * unit.r[r]);
      a.delta_out[to + 8 * h] = delta;
      a.norm_weight[to + 8 * h] = -delta * a.weight[to + 8 * h];
    }
  }
}

// Keys: what the state gave to x . dx of rows lane / 4 and lane / 4 + 8 from `local` on, `factor` times. `sum`
// is relative to the tile's last row (float16: complete).
template <typename T>
__device__ __forceinline__ void store_state_dots(const GradientArgs &a, const volatile GradientUnit &unit,
                                                 const float (&sum)[2], float factor, int local, int lane) {
  const int64_t at = token_row(a.p, unit.batch, a.p.heads_kv, unit.head, unit.token);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = unit.row + local + lane / 4 + 8 * h;
    if ((lane & 3) != 0 || row >= unit.length) continue;
    float f = factor;
    if (!kCounted<T> && a.gate) {
      const double last = a.gate[at + min(unit.row + kUnitRows, unit.length) - 1];
      f *= exp2_fast(static_cast<float>(last - a.gate[at + row]) * kLog2e);
    }
    a.state_dot[at + row] = f * sum[h];
  }
}

}  // namespace powerattn::cuda::sm90
