// SPDX-License-Identifier: Apache-2.0
// The second oracle: the recurrence over explicit states, forward and backward. Also the plain implementation
// of operations that are defined through states (step, summaries) or that run in chunks.
#pragma once

#include "oracle.h"

namespace powerattn_test {

// S <- exp(log_g) S + phi(k) v^T, z likewise, y = scale^p phi(q) S / (scale^p phi(q) . z + eps)
template <typename A, typename R>
HeadOutput recurrent_forward(const HeadInput &in, const R &round) {
  const int64_t t = in.t, d = in.d, e = in.e;
  const Embedding &embed = embedding(d, in.p);
  const int64_t big = embed.rows();
  const Operands<A> x(in, round);
  std::vector<A> s = x.s0, z = x.z0, phi(static_cast<size_t>(big)), sum(static_cast<size_t>(e));
  s.resize(static_cast<size_t>(big * e));
  z.resize(static_cast<size_t>(big));
  const A factor = int_power(static_cast<A>(in.scale), in.p);
  HeadOutput out;
  out.y.resize(static_cast<size_t>(in.group * t * e));
  out.norm.resize(static_cast<size_t>(in.group * t));
  for (int64_t i = 0; i < t; ++i) {
    const double log_g = in.log_g.empty() ? 0.0 : in.log_g[i];
    out.total += log_g;
    const A decay = std::exp(static_cast<A>(log_g));
    embed.apply(&x.k[i * d], round, phi.data(), in.backwards);
    for (int64_t r = 0; r < big; ++r) {
      for (int64_t c = 0; c < e; ++c) s[r * e + c] = decay * s[r * e + c] + phi[r] * x.v[i * e + c];
      z[r] = decay * z[r] + phi[r];
    }
    for (int64_t h = 0; h < in.group; ++h) {
      const int64_t row = h * t + i;
      embed.apply(&x.q[row * d], round, phi.data(), in.backwards);
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t step = 0; step < big; ++step) {
        const int64_t r = in.backwards ? big - 1 - step : step;
        for (int64_t c = 0; c < e; ++c) sum[c] += phi[r] * s[r * e + c];
      }
      const A norm = round(factor * dot(phi.data(), z.data(), big, in.backwards) + static_cast<A>(in.eps));
      out.norm[row] = static_cast<double>(norm);
      for (int64_t c = 0; c < e; ++c) {
        const A numerator = round(factor * sum[c]);
        out.y[row * e + c] = static_cast<double>(!in.normalize ? numerator
                                                 : norm == 0   ? A(0)
                                                               : round(numerator / norm));
      }
    }
  }
  out.s = plain_doubles(s);
  out.z = plain_doubles(z);
  return out;
}

// The reverse recurrence. With dN, dl as in the attention form:
//   dS <- dS + scale^p phi(q_i) dN_i^T,  dphi(k_i) = dS v_i + dz,  dv_i = dS^T phi(k_i),  dS <- exp(log_g_i) dS
// and sum_{m >= i} d log_g .. from Euler's identity phi(x) . dphi(x) = the part of x in G's gradient.
template <typename A, typename R>
HeadGradient recurrent_backward(const HeadInput &in, const HeadOutput &fwd, const R &round) {
  const int64_t t = in.t, d = in.d, e = in.e, rows = in.group * t;
  const Embedding &embed = embedding(d, in.p);
  const int64_t big = embed.rows();
  const Operands<A> x(in, round);
  const A factor = int_power(static_cast<A>(in.scale), in.p);
  std::vector<A> dq(in.q.size()), dk(in.k.size()), dv(in.v.size()), dn(in.dy.size()),
      dl(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    const A norm = static_cast<A>(fwd.norm[row]);
    A delta = 0;
    for (int64_t c = 0; c < e; ++c) {
      delta += x.dy[row * e + c] * static_cast<A>(fwd.y[row * e + c]);
      dn[row * e + c] = !in.normalize ? x.dy[row * e + c] : norm == 0 ? A(0) : round(x.dy[row * e + c] / norm);
    }
    dl[row] = !in.normalize || norm == 0 ? A(0) : -delta / norm;
  }
  std::vector<A> s = x.s0, z = x.z0, phi(static_cast<size_t>(big)), dphi(static_cast<size_t>(big));
  std::vector<A> gate(static_cast<size_t>(t)), decay(static_cast<size_t>(t), A(1));
  s.resize(static_cast<size_t>(big * e));
  z.resize(static_cast<size_t>(big));
  for (int64_t i = 0; i < t; ++i) {
    if (!in.log_g.empty()) decay[i] = std::exp(static_cast<A>(in.log_g[i]));
    embed.apply(&x.k[i * d], round, phi.data(), in.backwards);
    for (int64_t r = 0; r < big; ++r) {
      for (int64_t c = 0; c < e; ++c) s[r * e + c] = decay[i] * s[r * e + c] + phi[r] * x.v[i * e + c];
      z[r] = decay[i] * z[r] + phi[r];
    }
    for (int64_t h = 0; h < in.group; ++h) {
      const int64_t row = h * t + i;
      for (int64_t r = 0; r < big; ++r) dphi[r] = factor * (dot(&s[r * e], &dn[row * e], e) + z[r] * dl[row]);
      embed.apply(&x.q[row * d], round, phi.data(), in.backwards);
      embed.pull_back(&x.q[row * d], dphi.data(), &dq[row * d]);
      gate[i] += dot(phi.data(), dphi.data(), big);
    }
  }
  std::vector<A> ds = x.ds, dz = x.dz;
  ds.resize(static_cast<size_t>(big * e));
  dz.resize(static_cast<size_t>(big));
  A suffix = dot(ds.data(), s.data(), big * e) + dot(dz.data(), z.data(), big);
  HeadGradient out;
  out.dlog_g.resize(static_cast<size_t>(t));
  for (int64_t i = t - 1; i >= 0; --i) {
    for (int64_t h = 0; h < in.group; ++h) {
      const int64_t row = h * t + i;
      embed.apply(&x.q[row * d], round, phi.data(), in.backwards);
      for (int64_t r = 0; r < big; ++r) {
        for (int64_t c = 0; c < e; ++c) ds[r * e + c] += factor * phi[r] * dn[row * e + c];
        dz[r] += factor * phi[r] * dl[row];
      }
    }
    embed.apply(&x.k[i * d], round, phi.data(), in.backwards);
    for (int64_t r = 0; r < big; ++r) {
      dphi[r] = dot(&ds[r * e], &x.v[i * e], e) + dz[r];
      for (int64_t c = 0; c < e; ++c) dv[i * e + c] += phi[r] * ds[r * e + c];
    }
    embed.pull_back(&x.k[i * d], dphi.data(), &dk[i * d]);
    suffix += gate[i] - dot(phi.data(), dphi.data(), big);
    out.dlog_g[i] = decay[i] == 0 ? 0 : static_cast<double>(suffix);
    for (A &one : ds) one *= decay[i];
    for (A &one : dz) one *= decay[i];
  }
  out.ds0 = plain_doubles(ds);
  out.dz0 = plain_doubles(dz);
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
