// SPDX-License-Identifier: Apache-2.0
// What the library must compute, written down twice from the definition: the attention form (oracle.h) and the
// recurrence over explicit states (recurrence.h). Nothing here is shared with the kernels.
//
// Every function is a template over the type it accumulates in and over a rounding that is applied where an
// eager implementation would store a tensor. <double, Exact> (long double for float64 data) is the oracle;
// <float, Rounded> is the plain implementation of the same precision that sets the tolerance.
#pragma once

#include <cstddef>
#include <map>
#include <utility>
#include <vector>

#include "rounding.h"

namespace powerattn_test {

// One sequence and kv head with its group of query heads. Row-major, dense.
struct HeadInput {
  int64_t t = 0, d = 0, e = 0, group = 1;
  int p = 2;
  bool normalize = true;
  double scale = 1, eps = 0;
  int32_t rope = POWERATTN_ROPE_NONE;
  int64_t rope_dim = 0, position = 0;
  double rope_base = 10000;
  bool backwards = false;  // sums run from the other end: one more sample of the rounding errors of plain loops
  Vector q, k, v;          // [group, t, d], [t, d], [t, e]
  Vector log_g;            // [t] or empty
  Vector s0, z0;           // [D, e], [D] or empty
  Vector dy;               // [group, t, e] or empty
  Vector ds, dz;           // gradient of the final state, or empty
};

struct HeadOutput {
  Vector y, norm;    // [group, t, e], [group, t]
  Vector s, z;       // final state
  double total = 0;  // G_T
};

struct HeadGradient {
  Vector dq, dk, dv, dlog_g, ds0, dz0;
};

struct Exact {
  template <typename A>
  A operator()(A x) const {
    return x;
  }
};

struct Rounded {
  int32_t dtype;
  bool digits_only = false;  // the type's digits in the range of float32
  float operator()(float x) const {
    if (digits_only && dtype == POWERATTN_FLOAT16 && std::isfinite(x)) {
      int exponent = 0;
      const float fraction = std::frexp(x, &exponent);
      return std::ldexp(std::nearbyint(std::ldexp(fraction, 11)), exponent - 11);
    }
    if (dtype == POWERATTN_FLOAT32) return x;
    if (dtype == POWERATTN_BFLOAT16) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if ((bits & 0x7f800000u) == 0x7f800000u) return x;
      bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    return static_cast<float>(round_to(dtype, static_cast<double>(x)));
  }
  double operator()(double x) const { return x; }
};

// ---- The symmetric power embedding: all i1 <= .. <= ip, weight sqrt(p! / prod(multiplicity!)) --------------

struct Embedding {
  int64_t d;
  int p;
  std::vector<int> index;  // [D, p]
  Vector weight;           // [D]
  int64_t rows() const { return static_cast<int64_t>(weight.size()); }

  Embedding(int64_t dim, int degree) : d(dim), p(degree) {
    std::vector<int> chosen;
    extend(&chosen);
  }

  template <typename A, typename R>
  void apply(const A *x, const R &round, A *phi, bool backwards = false) const {
    for (int64_t r = 0; r < rows(); ++r) {
      A product = backwards ? A(1) : static_cast<A>(weight[static_cast<size_t>(r)]);
      for (int m = 0; m < p; ++m) product *= x[index[static_cast<size_t>(r * p + (backwards ? p - 1 - m : m))]];
      phi[r] = round(backwards ? product * static_cast<A>(weight[static_cast<size_t>(r)]) : product);
    }
  }

  // dx += sum_r g_r d phi_r / dx, by the product rule
  template <typename A>
  void pull_back(const A *x, const A *g, A *dx) const {
    for (int64_t r = 0; r < rows(); ++r) {
      const int *at = &index[static_cast<size_t>(r * p)];
      const A scaled = g[r] * static_cast<A>(weight[static_cast<size_t>(r)]);
      for (int m = 0; m < p; ++m) {
        A product = scaled;
        for (int o = 0; o < p; ++o) {
          if (o != m) product *= x[at[o]];
        }
        dx[at[m]] += product;
      }
    }
  }

 private:
  void extend(std::vector<int> *chosen) {
    if (static_cast<int>(chosen->size()) == p) {
      double w = 1;
      int run = 0;
      for (int m = 0; m < p; ++m) {
        run = m > 0 && (*chosen)[static_cast<size_t>(m)] == (*chosen)[static_cast<size_t>(m - 1)] ? run + 1 : 1;
        w *= static_cast<double>(m + 1) / run;
      }
      index.insert(index.end(), chosen->begin(), chosen->end());
      weight.push_back(std::sqrt(w));
      return;
    }
    for (int i = chosen->empty() ? 0 : chosen->back(); i < d; ++i) {
      chosen->push_back(i);
      extend(chosen);
      chosen->pop_back();
    }
  }
};

inline const Embedding &embedding(int64_t d, int p) {
  static std::map<std::pair<int64_t, int>, Embedding> known;
  const auto key = std::make_pair(d, p);
  auto at = known.find(key);
  if (at == known.end()) at = known.emplace(key, Embedding(d, p)).first;
  return at->second;
}

// ---- Pieces ---------------------------------------------------------------------------------------------

template <typename A>
std::vector<A> as(const Vector &x) {
  return std::vector<A>(x.begin(), x.end());
}

template <typename A>
Vector plain_doubles(const std::vector<A> &x) {
  return Vector(x.begin(), x.end());
}

// Rotates `heads` blocks of t rows; direction -1 is the transpose.
template <typename A, typename R>
void rotate(const HeadInput &in, int direction, int64_t heads, const R &round, std::vector<A> *rows) {
  if (in.rope == POWERATTN_ROPE_NONE) return;
  const int64_t half = in.rope_dim / 2;
  for (int64_t row = 0; row < heads * in.t; ++row) {
    A *x = rows->data() + row * in.d;
    const A m = static_cast<A>(in.position + row % in.t);
    for (int64_t c = 0; c < half; ++c) {
      const A exponent = static_cast<A>(2 * c) / static_cast<A>(in.rope_dim),
              base = static_cast<A>(in.rope_base);
      const A angle = in.backwards ? m * std::pow(base, -exponent) : m / std::pow(base, exponent);
      const A cosine = std::cos(angle), sine = static_cast<A>(direction) * std::sin(angle);
      A &a = in.rope == POWERATTN_ROPE_HALF ? x[c] : x[2 * c];
      A &b = in.rope == POWERATTN_ROPE_HALF ? x[half + c] : x[2 * c + 1];
      const A new_a = a * cosine - b * sine, new_b = b * cosine + a * sine;
      a = round(new_a);
      b = round(new_b);
    }
  }
}

// exp(G_i - G_j), 0 across a reset; state(i) is what an initial state keeps at token i.
template <typename A>
struct Decay {
  std::vector<A> sum;           // of the finite log gates
  std::vector<int64_t> resets;  // how many so far

  explicit Decay(const HeadInput &in) {
    A total = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < in.t; ++i) {
      const double g = in.log_g.empty() ? 0.0 : in.log_g[static_cast<size_t>(i)];
      if (std::isinf(g) && g < 0)
        ++count;
      else
        total += static_cast<A>(g);
      sum.push_back(total);
      resets.push_back(count);
    }
  }
  A operator()(int64_t i, int64_t j) const { return resets[i] == resets[j] ? std::exp(sum[i] - sum[j]) : A(0); }
  A state(int64_t i) const { return i < 0 ? A(1) : resets[i] == 0 ? std::exp(sum[i]) : A(0); }
};

template <typename A>
A int_power(A x, int p) {
  A y = 1;
  for (int i = 0; i < p; ++i) y *= x;
  return y;
}

template <typename A>
A dot(const A *a, const A *b, int64_t n, bool backwards = false) {
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += backwards ? a[n - 1 - i] * b[n - 1 - i] : a[i] * b[i];
  return sum;
}

template <typename A>
struct Operands {
  std::vector<A> q, k, v, s0, z0, dy, ds, dz;
  template <typename R>
  Operands(const HeadInput &in, const R &round)
      : q(as<A>(in.q)),
        k(as<A>(in.k)),
        v(as<A>(in.v)),
        s0(as<A>(in.s0)),
        z0(as<A>(in.z0)),
        dy(as<A>(in.dy)),
        ds(as<A>(in.ds)),
        dz(as<A>(in.dz)) {
    rotate(in, +1, in.group, round, &q);
    rotate(in, +1, 1, round, &k);
  }
};

// ---- Attention form -------------------------------------------------------------------------------------
// w_ij = exp(G_i - G_j) (scale q_i . k_j)^p; an initial state adds exp(G_i) scale^p phi(q_i) (S0, z0).

template <typename A, typename R>
HeadOutput attention_forward(const HeadInput &in, const R &round) {
  const int64_t t = in.t, d = in.d, e = in.e;
  const Operands<A> x(in, round);
  const Decay<A> decay(in);
  const A scale = static_cast<A>(in.scale);
  HeadOutput out;
  out.y.resize(static_cast<size_t>(in.group * t * e));
  out.norm.resize(static_cast<size_t>(in.group * t));
  std::vector<A> sum(static_cast<size_t>(e)), phi;
  for (int64_t row = 0; row < in.group * t; ++row) {
    const int64_t i = row % t;
    std::fill(sum.begin(), sum.end(), A(0));
    A norm = 0;
    for (int64_t step = 0; step <= i; ++step) {
      const int64_t j = in.backwards ? i - step : step;
      const A score = round(round(dot(&x.q[row * d], &x.k[j * d], d, in.backwards)) * scale);
      const A w = round(round(int_power(score, in.p)) * decay(i, j));
      for (int64_t c = 0; c < e; ++c) sum[c] += w * x.v[j * e + c];
      norm += w;
    }
    if (!in.s0.empty()) {
      const Embedding &embed = embedding(d, in.p);
      phi.resize(static_cast<size_t>(embed.rows()));
      embed.apply(&x.q[row * d], round, phi.data());
      const A factor = int_power(scale, in.p) * decay.state(i);
      std::vector<A> part(static_cast<size_t>(e), A(0));
      A part_norm = 0;
      for (int64_t r = 0; r < embed.rows(); ++r) {
        for (int64_t c = 0; c < e; ++c) part[c] += phi[r] * x.s0[r * e + c];
        if (!x.z0.empty()) part_norm += phi[r] * x.z0[r];
      }
      for (int64_t c = 0; c < e; ++c) sum[c] += factor * part[c];
      norm += factor * part_norm;
    }
    norm = round(norm + static_cast<A>(in.eps));
    out.norm[row] = static_cast<double>(norm);
    for (int64_t c = 0; c < e; ++c) {
      const A numerator = round(sum[c]);
      out.y[row * e + c] = static_cast<double>(!in.normalize ? numerator
                                               : norm == 0   ? A(0)
                                                             : round(numerator / norm));
    }
  }
  return out;
}

// With W_ij = w_ij: dN = dy / l, dl = -(dy . y) / l, dW_ij = dN_i . v_j + dl_i, and for the gates, from
// log w_ij = G_i - G_j + ..:  dG_i = sum_j W_ij dW_ij - sum_k W_ki dW_ki,  d log_g_m = sum_{i >= m} dG_i.
template <typename A, typename R>
HeadGradient attention_backward(const HeadInput &in, const HeadOutput &fwd, const R &round) {
  const int64_t t = in.t, d = in.d, e = in.e, rows = in.group * t;
  const Operands<A> x(in, round);
  const Decay<A> decay(in);
  const A scale = static_cast<A>(in.scale);
  std::vector<A> dq(in.q.size()), dk(in.k.size()), dv(in.v.size()), dn(in.dy.size()),
      dl(static_cast<size_t>(rows));
  std::vector<A> row_sum(static_cast<size_t>(t)), column_sum(static_cast<size_t>(t));  // of W dW
  for (int64_t row = 0; row < rows; ++row) {
    const A norm = static_cast<A>(fwd.norm[row]);
    A delta = 0;
    for (int64_t c = 0; c < e; ++c) {
      delta += x.dy[row * e + c] * static_cast<A>(fwd.y[row * e + c]);
      dn[row * e + c] = !in.normalize ? x.dy[row * e + c] : norm == 0 ? A(0) : round(x.dy[row * e + c] / norm);
    }
    dl[row] = !in.normalize || norm == 0 ? A(0) : -delta / norm;
  }
  std::vector<A> dq_row(static_cast<size_t>(d));
  for (int64_t step = 0; step < rows; ++step) {
    const int64_t row = in.backwards ? rows - 1 - step : step, i = row % t;
    for (int64_t other = 0; other <= i; ++other) {
      const int64_t j = in.backwards ? i - other : other;
      const A score = round(round(dot(&x.q[row * d], &x.k[j * d], d, in.backwards)) * scale), g = decay(i, j);
      const A w = round(round(int_power(score, in.p)) * g);
      const A dw = round(round(dot(&dn[row * e], &x.v[j * e], e, in.backwards)) + dl[row]);
      const A ds = round(dw * g * static_cast<A>(in.p) * int_power(score, in.p - 1) * scale);
      for (int64_t c = 0; c < d; ++c) {
        dq[row * d + c] += ds * x.k[j * d + c];
        dk[j * d + c] += ds * x.q[row * d + c];
      }
      for (int64_t c = 0; c < e; ++c) dv[j * e + c] += w * dn[row * e + c];
      row_sum[i] += w * dw;
      column_sum[j] += w * dw;
    }
  }
  HeadGradient out;
  A final_gate = 0;  // of G_T
  {
    const Embedding *embed = nullptr;
    if (!in.s0.empty() || !in.ds.empty()) {
      embed = &embedding(d, in.p);
      const int64_t big = embed->rows();
      std::vector<A> phi(static_cast<size_t>(big)), dphi(static_cast<size_t>(big));
      std::vector<A> ds0(static_cast<size_t>(big * e)), dz0(static_cast<size_t>(big));
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t i = row % t;
        const A factor = int_power(scale, in.p) * decay.state(i);
        embed->apply(&x.q[row * d], round, phi.data());
        A total = 0;
        for (int64_t r = 0; r < big; ++r) {
          for (int64_t c = 0; c < e; ++c) ds0[r * e + c] += factor * phi[r] * dn[row * e + c];
          dz0[r] += factor * phi[r] * dl[row];
          if (in.s0.empty()) continue;
          A g = dot(&dn[row * e], &x.s0[r * e], e);
          if (!x.z0.empty()) g += dl[row] * x.z0[r];
          dphi[r] = factor * g;
          total += dphi[r] * phi[r];
        }
        if (in.s0.empty()) continue;
        embed->pull_back(&x.q[row * d], dphi.data(), &dq[row * d]);
        row_sum[i] += total;
      }
      if (!in.ds.empty()) {
        for (int64_t j = 0; j < t; ++j) {
          const A factor = decay(t - 1, j);
          embed->apply(&x.k[j * d], round, phi.data());
          for (int64_t r = 0; r < big; ++r) {
            dphi[r] = dot(&x.v[j * e], &x.ds[r * e], e) + (x.dz.empty() ? A(0) : x.dz[r]);
            dphi[r] *= factor;
            for (int64_t c = 0; c < e; ++c) dv[j * e + c] += factor * phi[r] * x.ds[r * e + c];
          }
          embed->pull_back(&x.k[j * d], dphi.data(), &dk[j * d]);
          const A moved = dot(phi.data(), dphi.data(), big);
          column_sum[j] += moved;
          final_gate += moved;
        }
        const A carry = decay.state(t - 1);
        for (int64_t r = 0; r < big; ++r) {
          for (int64_t c = 0; c < e; ++c) {
            ds0[r * e + c] += carry * x.ds[r * e + c];
            if (!in.s0.empty()) final_gate += carry * x.ds[r * e + c] * x.s0[r * e + c];
          }
          if (x.dz.empty()) continue;
          dz0[r] += carry * x.dz[r];
          if (!x.z0.empty()) final_gate += carry * x.dz[r] * x.z0[r];
        }
      }
      out.ds0 = plain_doubles(ds0);
      out.dz0 = plain_doubles(dz0);
    }
  }
  // The gate of a reset has no gradient: nothing that it decays is left.
  Vector dlog_g(static_cast<size_t>(t));
  A suffix = final_gate;
  for (int64_t m = t - 1; m >= 0; --m) {
    suffix += row_sum[m] - column_sum[m];
    const bool reset = !in.log_g.empty() && std::isinf(in.log_g[m]);
    dlog_g[m] = reset ? 0 : static_cast<double>(suffix);
  }
  out.dlog_g = dlog_g;
  rotate(in, -1, in.group, round, &dq);
  rotate(in, -1, 1, round, &dk);
  for (A &one : dq) one = round(one);
  for (A &one : dk) one = round(one);
  for (A &one : dv) one = round(one);
  out.dq = plain_doubles(dq);
  out.dk = plain_doubles(dk);
  out.dv = plain_doubles(dv);
  return out;
}

}  // namespace powerattn_test
