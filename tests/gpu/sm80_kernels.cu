// SPDX-License-Identifier: Apache-2.0
// The mma.sync kernels on their own, below the C interface: every case against a float64 reference with fresh
// random inputs and poisoned outputs, then times. Tolerance: twice the error of a plain implementation in the
// same precision (weights and their gradients rounded to the element type, everything else float64).
//
//   sm80_kernels [check] [time] [only=<part of a case's name>] [seed]
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/sm80/args.h"
#include "kernels/cuda/tiles.h"
#include "must.h"

namespace pa = powerattn;
namespace k80 = powerattn::cuda::sm80;
using pa::Dtype;

namespace {

struct Case {
  const char *name;
  Dtype dtype = Dtype::kBfloat16;
  int b = 1, t = 0, hq = 1, hk = 1, d = 64, p = 2;
  int chunk = 0;  // 0: attention form
  bool gated = true, normalize = true, state = false, bthd = true;
  std::vector<int64_t> cu;  // packed
  double eps = 0;
  bool backward = true;
  int pad = 0;          // elements between the tokens of [b, t, h, d]: rows that no vector load can read
  bool resets = false;  // some gates close completely
  double size = 1;      // of q
  double size_k = 1, size_v = 1, gate = 0.02;
};

template <typename V>
struct Device {
  V *p = nullptr;
  size_t n = 0;
  explicit Device(size_t count = 0) { reset(count); }
  Device(const Device &) = delete;
  Device &operator=(const Device &) = delete;
  ~Device() { cudaFree(p); }
  void reset(size_t count) {
    cudaFree(p);
    p = nullptr;
    n = count;
    if (n) {
      CK(cudaMalloc(&p, n * sizeof(V)));
      CK(cudaMemset(p, 0xff, n * sizeof(V)));  // NaN
    }
  }
  void put(const std::vector<V> &h) {
    reset(h.size());
    if (n) CK(cudaMemcpy(p, h.data(), n * sizeof(V), cudaMemcpyHostToDevice));
  }
  std::vector<V> get() const {
    std::vector<V> h(n);
    if (n) CK(cudaMemcpy(h.data(), p, n * sizeof(V), cudaMemcpyDeviceToHost));
    return h;
  }
};

double round_to(Dtype t, double v) {
  return t == Dtype::kFloat16 ? double(__half2float(__float2half_rn(float(v))))
                              : double(__bfloat162float(__float2bfloat16_rn(float(v))));
}
// The element type's precision without its range: what a plain implementation with ideal scaling would round
// to.
double round_bits(Dtype t, double v) {
  int exponent = 0;
  const double unit = t == Dtype::kFloat16 ? 2048 : 256;
  const double fraction = std::frexp(v, &exponent);
  return std::ldexp(std::nearbyint(fraction * unit) / unit, exponent);
}
uint16_t bits(Dtype t, double v) {
  uint16_t u;
  if (t == Dtype::kFloat16) {
    const __half h = __float2half_rn(float(v));
    std::memcpy(&u, &h, 2);
  } else {
    const __nv_bfloat16 h = __float2bfloat16_rn(float(v));
    std::memcpy(&u, &h, 2);
  }
  return u;
}
double value(Dtype t, uint16_t u) {
  if (t == Dtype::kFloat16) {
    __half h;
    std::memcpy(&h, &u, 2);
    return __half2float(h);
  }
  __nv_bfloat16 h;
  std::memcpy(&h, &u, 2);
  return __bfloat162float(h);
}

using Vec = std::vector<double>;

// Host tensors, [b, t, h, d] float64 whatever the device layout is.
struct Data {
  Vec q, k, v, dy, lg;
  Vec s0, z0, dsT, dzT;  // [seq, hk, D, d], [seq, hk, D]
};
struct Result {
  Vec y, norm, dq, dk, dv, dlg, sT, zT, ds0, dz0;
};

std::vector<std::pair<int64_t, int64_t>> sequences(const Case &c) {  // (row of [b*t], length)
  std::vector<std::pair<int64_t, int64_t>> r;
  if (c.cu.empty())
    for (int i = 0; i < c.b; ++i) r.push_back({int64_t(i) * c.t, c.t});
  else
    for (size_t i = 0; i + 1 < c.cu.size(); ++i) r.push_back({c.cu[i], c.cu[i + 1] - c.cu[i]});
  return r;
}

int rows_of(const Case &c) { return c.p == 1 ? c.d : c.d * (c.d + 1) / 2; }

Vec phi(const Case &c, const double *x) {
  if (c.p == 1) return Vec(x, x + c.d);
  Vec r;
  for (int i = 0; i < c.d; ++i)
    for (int j = i; j < c.d; ++j) r.push_back((i == j ? 1.0 : std::sqrt(2.0)) * x[i] * x[j]);
  return r;
}
// d/dx of phi(x) . w
void phi_gradient(const Case &c, const double *x, const Vec &w, double factor, double *dx) {
  if (c.p == 1) {
    for (int i = 0; i < c.d; ++i) dx[i] += factor * w[i];
    return;
  }
  int r = 0;
  for (int i = 0; i < c.d; ++i)
    for (int j = i; j < c.d; ++j, ++r) {
      const double m = (i == j ? 1.0 : std::sqrt(2.0)) * w[r] * factor;
      dx[i] += m * x[j];
      dx[j] += m * x[i];
    }
}

// One (sequence, kv head) in float64; `plain` rounds weights and their gradients to the element type.
void reference_pair(const Case &c, const Data &in, Result &o, bool plain, int seq, int64_t row0, int64_t len,
                    int hk) {
  const int d = c.d, group = c.hq / c.hk, D = c.state ? rows_of(c) : 0;
  const double scale = 1 / std::sqrt(double(d)), cp = std::pow(scale, c.p);
  auto rt = [&](double v) { return plain ? round_bits(c.dtype, v) : v; };
  auto qi = [&](int64_t i, int h) { return ((row0 + i) * c.hq + h) * d; };
  auto ki = [&](int64_t i) { return ((row0 + i) * c.hk + hk) * d; };
  Vec G(len), dG(len, 0.0);
  double sum = 0;
  for (int64_t i = 0; i < len; ++i) G[i] = sum += c.gated ? in.lg[(row0 + i) * c.hk + hk] : 0;
  const double GT = sum;
  const int64_t st = int64_t(seq) * c.hk + hk;
  const double *S0 = c.state ? &in.s0[st * D * d] : nullptr, *Z0 = c.state ? &in.z0[st * D] : nullptr;
  const double *dST = c.state ? &in.dsT[st * D * d] : nullptr, *dZT = c.state ? &in.dzT[st * D] : nullptr;
  Vec dk(len * d, 0.0), dv(len * d, 0.0), dS0(size_t(D) * d, 0.0), dZ0(D, 0.0);
  for (int h = hk * group; h < (hk + 1) * group; ++h)
    for (int64_t i = 0; i < len; ++i) {
      const double *q = &in.q[qi(i, h)], *dy = &in.dy[qi(i, h)];
      Vec w(i + 1), s(i + 1), n(d, 0.0), f, u;
      double l = 0;
      for (int64_t j = 0; j <= i; ++j) {
        double x = 0;
        for (int e = 0; e < d; ++e) x += q[e] * in.k[ki(j) + e];
        s[j] = x * scale;
        w[j] = std::exp(G[i] - G[j]) * std::pow(s[j], c.p);
        l += w[j];
        const double r = rt(w[j]);
        for (int e = 0; e < d; ++e) n[e] += r * in.v[ki(j) + e];
      }
      const double decay = cp * std::exp(G[i]);
      if (c.state) {
        f = phi(c, q);
        for (int r = 0; r < D; ++r) {
          l += decay * f[r] * Z0[r];
          for (int e = 0; e < d; ++e) n[e] += decay * f[r] * S0[size_t(r) * d + e];
        }
      }
      l += c.eps;
      const double inv = c.normalize ? (l > 0 ? 1 / l : 0) : 1;
      double delta = 0;
      for (int e = 0; e < d; ++e) {
        o.y[qi(i, h) + e] = rt(n[e] * inv);
        if (c.normalize) delta += dy[e] * rt(n[e] * inv);
      }
      o.norm[(row0 + i) * c.hq + h] = l;
      if (!c.backward) continue;
      double *dq = &o.dq[qi(i, h)];
      double own = 0;
      for (int64_t j = 0; j <= i; ++j) {
        double m = 0;
        for (int e = 0; e < d; ++e) m += dy[e] * in.v[ki(j) + e];
        m = (m - delta) * inv;
        const double es = rt(m * c.p * std::exp(G[i] - G[j]) * std::pow(s[j], c.p - 1)) * scale,
                     wr = rt(w[j] * inv);
        const double gate = es / scale * s[j] / c.p;  // m w, through the rounded gradient of s
        for (int e = 0; e < d; ++e) {
          dq[e] += es * in.k[ki(j) + e];
          dk[j * d + e] += es * q[e];
          dv[j * d + e] += wr * dy[e];
        }
        own += gate;
        dG[j] -= gate;
      }
      if (c.state) {
        Vec t(D);
        for (int r = 0; r < D; ++r) {
          double x = c.normalize ? -delta * inv * Z0[r] : 0;
          for (int e = 0; e < d; ++e) x += S0[size_t(r) * d + e] * dy[e] * inv;
          t[r] = x;
          own += decay * f[r] * x;
          for (int e = 0; e < d; ++e) dS0[size_t(r) * d + e] += decay * f[r] * dy[e] * inv;
          if (c.normalize) dZ0[r] -= decay * f[r] * delta * inv;
        }
        phi_gradient(c, q, t, decay, dq);
      }
      dG[i] += own;
    }
  Vec sT(size_t(D) * d, 0.0), zT(D, 0.0);
  double at_end = 0;
  if (c.state) {
    for (int64_t j = 0; j < len; ++j) {
      const double w = std::exp(GT - G[j]);
      const Vec f = phi(c, &in.k[ki(j)]);
      Vec t(D);
      double own = 0;
      for (int r = 0; r < D; ++r) {
        zT[r] += w * f[r];
        double x = dZT[r];
        for (int e = 0; e < d; ++e) {
          sT[size_t(r) * d + e] += w * f[r] * in.v[ki(j) + e];
          x += dST[size_t(r) * d + e] * in.v[ki(j) + e];
          dv[j * d + e] += w * f[r] * dST[size_t(r) * d + e];
        }
        t[r] = x;
        own += w * f[r] * x;
      }
      if (c.backward) phi_gradient(c, &in.k[ki(j)], t, w, &dk[j * d]);
      dG[j] -= own;
      at_end += own;
    }
    const double w = std::exp(GT);
    for (int r = 0; r < D; ++r) {
      zT[r] += w * Z0[r];
      at_end += w * Z0[r] * dZT[r];
      o.zT[st * D + r] = zT[r];
      o.dz0[st * D + r] = dZ0[r] + w * dZT[r];
      for (int e = 0; e < d; ++e) {
        const size_t x = size_t(r) * d + e;
        sT[x] += w * S0[x];
        at_end += w * S0[x] * dST[x];
        o.sT[st * D * d + x] = sT[x];
        o.ds0[st * D * d + x] = dS0[x] + w * dST[x];
      }
    }
  }
  if (!c.backward) return;
  double g = at_end;
  for (int64_t i = len - 1; i >= 0; --i) o.dlg[(row0 + i) * c.hk + hk] = g += dG[i];
  for (int64_t i = 0; i < len * d; ++i) {
    const int64_t at = ki(i / d) + i % d;
    o.dk[at] = rt(dk[i]);
    o.dv[at] = rt(dv[i]);
  }
  if (plain)
    for (int h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t i = 0; i < len; ++i)
        for (int e = 0; e < d; ++e) o.dq[qi(i, h) + e] = rt(o.dq[qi(i, h) + e]);
}

void reference(const Case &c, const Data &in, Result &o, bool plain) {
  const auto seqs = sequences(c);
  const size_t rows = size_t(c.b) * c.t, st = seqs.size() * c.hk * (c.state ? rows_of(c) : 0);
  o.y.assign(rows * c.hq * c.d, 0);
  o.norm.assign(rows * c.hq, 0);
  o.dq.assign(rows * c.hq * c.d, 0);
  o.dk.assign(rows * c.hk * c.d, 0);
  o.dv.assign(rows * c.hk * c.d, 0);
  o.dlg.assign(rows * c.hk, 0);
  o.sT.assign(st * c.d, 0);
  o.ds0.assign(st * c.d, 0);
  o.zT.assign(st, 0);
  o.dz0.assign(st, 0);
  std::vector<std::thread> pool;
  for (size_t s = 0; s < seqs.size(); ++s)
    for (int h = 0; h < c.hk; ++h)
      pool.emplace_back(
          [&, s, h] { reference_pair(c, in, o, plain, int(s), seqs[s].first, seqs[s].second, h); });
  for (auto &t : pool) t.join();
}

// The device side of one case: everything a plan would own.
struct Run {
  Case c;
  pa::Problem p;
  pa::cuda::ChunkTable table;
  k80::Shape shape;
  Device<uint16_t> q, k, v, dy, y, dq, dk, dv;
  Device<float> lg, dlg, norm, g, r, delta, qdot, kdot, ksdot, product;
  Device<float> s0, z0, sT, zT, dsT, dzT, ds0, dz0;
  Device<uint16_t> S, dS, Zt, dZt;
  Device<float> Zl, end;
  Device<pa::cuda::Range> ranges;  // float16: of the direction that ran last
  Device<pa::cuda::Units> units, dunits;
  Device<pa::cuda::Bounds> peaks;
  Device<char> tables;
  Device<int64_t> cu;
  int64_t slots = 0;
  cudaStream_t stream = nullptr;

  explicit Run(const Case &cc) : c(cc) {
    p.dtype = c.dtype;
    p.degree = c.p;
    p.normalize = c.normalize;
    p.use_state = c.state;
    p.packed = !c.cu.empty();
    p.batch = c.b;
    p.sequences = p.packed ? int64_t(c.cu.size()) - 1 : c.b;
    p.seq_len = p.max_seq_len = c.t;
    p.heads_q = c.hq;
    p.heads_kv = c.hk;
    p.head_dim = p.value_dim = c.d;
    p.scale = 1 / std::sqrt(double(c.d));
    p.eps = c.eps;
    const int64_t chunk = c.chunk ? c.chunk : std::max(c.t, 1);
    tables.reset(pa::cuda::chunk_table_bytes(p, chunk, k80::kRowTile));
    if (p.packed) cu.put(c.cu);
    CK(pa::cuda::build_chunks(p, chunk, k80::kRowTile, cu.p, tables.p, &table, stream));
    shape.table = table;
    shape.packed = p.packed;
    shape.degree = c.p;
    shape.heads_q = c.hq;
    shape.heads_kv = c.hk;
    shape.head_dim = c.d;
    shape.seq_len = c.t;
    shape.dtype = c.dtype;
    const size_t rows = size_t(c.b) * c.t;
    for (auto *x : {&q, &dy, &y, &dq}) x->reset(rows * (c.hq * c.d + c.pad));
    for (auto *x : {&k, &v, &dk, &dv}) x->reset(rows * (c.hk * c.d + c.pad));
    lg.reset(rows * c.hk), dlg.reset(rows * c.hk), g.reset(rows * c.hk), kdot.reset(rows * c.hk),
        ksdot.reset(rows * c.hk);
    norm.reset(rows * c.hq), r.reset(rows * c.hq), delta.reset(rows * c.hq), qdot.reset(rows * c.hq);
    slots = table.num_chunks * c.hk;
    if (c.chunk) {
      const size_t tile = pa::cuda::slot_elements(c.p, c.d, c.d), zz = 2 * c.d * c.d;
      S.reset(slots * tile), dS.reset(slots * tile), end.reset(p.sequences * c.hk * tile);
      Zt.reset(slots * zz), dZt.reset(slots * zz), Zl.reset(slots * c.d * c.d);
      ranges.reset(slots), units.reset(slots), dunits.reset(slots),
          peaks.reset(p.sequences * c.hk * k80::kPeaks);
    }
    product.reset(slots * k80::product_parts(c.p, c.d));
    if (c.state) {
      const size_t n = p.sequences * c.hk * rows_of(c);
      for (auto *x : {&s0, &sT, &dsT, &ds0}) x->reset(n * c.d);
      for (auto *x : {&z0, &zT, &dzT, &dz0}) x->reset(n);
    }
  }
  powerattn_tensor tensor(void *data, int heads, int64_t dim) const {  // [b, t, h, dim] or [b, h, t, dim]
    const int64_t row = heads * dim + c.pad, n = c.t * row;
    return c.bthd ? powerattn_tensor{data, n, row, dim} : powerattn_tensor{data, n, dim, c.t * dim};
  }
  powerattn_tensor stat(float *data, int heads) const { return {data, int64_t(c.t) * heads, heads, 1}; }
  powerattn_state state(float *s, float *z) const {
    const int64_t D = rows_of(c);
    return {s, z, c.hk * D * c.d, D * c.d, c.hk * D, D};
  }
  const float *gates() const { return c.gated ? g.p : nullptr; }
  float cp() const { return float(std::pow(p.scale, c.p)); }

  void range(bool reverse) {
    if (c.dtype != Dtype::kFloat16) return;
    k80::RangeArgs a;
    a.shape = shape;
    a.reverse = reverse;
    a.x = reverse ? tensor(q.p, c.hq, c.d) : tensor(k.p, c.hk, c.d);
    a.u = reverse ? tensor(dy.p, c.hq, c.d) : tensor(v.p, c.hk, c.d);
    a.g = gates();
    if (reverse) {
      a.r = c.normalize ? r.p : nullptr;
      a.delta = c.normalize ? delta.p : nullptr;
      a.scale = cp();
    }
    a.out = ranges.p;
    CK(k80::ranges(a, stream));
  }
  void update(bool reverse, bool as_z) {
    k80::UpdateArgs a;
    a.ranges = ranges.p;
    a.shape = shape;
    a.reverse = reverse;
    a.as_z = as_z;
    a.x = reverse ? tensor(q.p, c.hq, c.d) : tensor(k.p, c.hk, c.d);
    a.u = as_z ? a.x : reverse ? tensor(dy.p, c.hq, c.d) : tensor(v.p, c.hk, c.d);
    a.g = gates();
    if (reverse) {
      a.r = c.normalize ? r.p : nullptr;
      a.delta = as_z ? delta.p : nullptr;
      a.scale = cp();
    }
    a.local = as_z ? static_cast<void *>(Zl.p) : reverse ? dS.p : S.p;
    a.end_local = c.state && !as_z ? end.p : nullptr;
    CK(k80::update(a, stream));
  }
  k80::ProductArgs products() const {
    k80::ProductArgs a;
    if (!c.chunk) return a;
    a.tiles = S.p;
    if (c.normalize) a.z_tiles = Zt.p;
    a.units = units.p;
    if (c.state) a.initial = state(s0.p, z0.p);
    a.out = product.p;
    return a;
  }
  void scan(bool reverse) {
    k80::ScanArgs a;
    a.shape = shape;
    a.reverse = reverse;
    a.g = gates();
    a.tiles = reverse ? dS.p : S.p;
    a.ranges = ranges.p;
    a.units = reverse ? dunits.p : units.p;
    a.peaks = peaks.p;
    if (c.normalize) {
      a.z_local = Zl.p;
      a.z_tiles = reverse ? dZt.p : Zt.p;
    }
    if (c.state) {
      a.initial = reverse ? state(dsT.p, dzT.p) : state(s0.p, z0.p);
      a.final = reverse ? state(ds0.p, dz0.p) : state(sT.p, zT.p);
      a.end_local = end.p;
    }
    if (reverse && c.gated) a.products = products();
    CK(k80::scan(a, stream));
  }
  void output(bool reverse) {
    k80::OutputArgs a;
    a.shape = shape;
    a.reverse = reverse;
    a.g = gates();
    a.scale = cp();
    if (!reverse) {
      a.normalize = c.normalize;
      a.x = tensor(q.p, c.hq, c.d), a.z = tensor(k.p, c.hk, c.d), a.u = tensor(v.p, c.hk, c.d);
      a.out = tensor(y.p, c.hq, c.d);
      a.eps = float(c.eps);
      a.row_norm = stat(norm.p, c.hq);
      a.state = c.chunk ? S.p : nullptr;
      a.z_state = c.chunk && c.normalize ? Zt.p : nullptr;
      a.units = units.p;
    } else {
      a.x = tensor(k.p, c.hk, c.d), a.z = tensor(q.p, c.hq, c.d), a.u = tensor(dy.p, c.hq, c.d);
      a.out = tensor(dv.p, c.hk, c.d);
      a.r = c.normalize ? r.p : nullptr;
      a.state = c.chunk ? dS.p : nullptr;
      a.units = dunits.p;
    }
    CK(k80::output(a, stream));
  }
  void gradient(bool reverse) {
    k80::GradientArgs a;
    a.shape = shape;
    a.reverse = reverse;
    a.g = gates();
    a.scale = cp();
    a.r = c.normalize ? r.p : nullptr;
    a.delta = c.normalize ? delta.p : nullptr;
    const auto tq = tensor(q.p, c.hq, c.d), tk = tensor(k.p, c.hk, c.d), tv = tensor(v.p, c.hk, c.d),
               ty = tensor(dy.p, c.hq, c.d);
    a.x = reverse ? tk : tq, a.u = reverse ? tv : ty, a.z = reverse ? tq : tk, a.y = reverse ? ty : tv;
    a.out = reverse ? tensor(dk.p, c.hk, c.d) : tensor(dq.p, c.hq, c.d);
    a.state = !c.chunk ? nullptr : reverse ? dS.p : S.p;
    a.z_state = !c.chunk || !c.normalize ? nullptr : reverse ? dZt.p : Zt.p;
    a.units = reverse ? dunits.p : units.p;
    a.dot = reverse ? kdot.p : c.normalize ? nullptr : qdot.p;
    a.state_dot = reverse && c.chunk ? ksdot.p : nullptr;
    if (!reverse && c.normalize) {
      a.delta_out = delta.p;
      a.eps = float(c.eps);
    }
    CK(k80::gradient(a, stream));
  }
  void prepare() {
    if (c.gated) CK(pa::cuda::chunk_gates(p, table, stat(lg.p, c.hk), g.p, nullptr, stream));
  }
  void forward() {
    prepare();
    if (c.chunk) {
      range(false);
      update(false, false);
      if (c.normalize) update(false, true);
      scan(false);
    }
    output(false);
    if (p.packed) {
      CK(pa::cuda::zero_padding(p, table, tensor(y.p, c.hq, c.d), c.dtype, c.hq, c.d, stream));
      CK(pa::cuda::zero_padding(p, table, stat(norm.p, c.hq), Dtype::kFloat32, c.hq, 1, stream));
    }
  }
  void rows() {
    k80::RowsArgs a;
    a.shape = shape;
    a.y = tensor(y.p, c.hq, c.d);
    a.d_y = tensor(dy.p, c.hq, c.d);
    a.row_norm = stat(norm.p, c.hq);
    a.r = r.p;
    a.delta = delta.p;
    if (c.normalize) CK(k80::rows(a, stream));
  }
  void gate_gradient() {
    k80::GateArgs a;
    a.shape = shape;
    a.q_dot = c.normalize ? nullptr : qdot.p;
    a.k_dot = kdot.p;
    a.r = r.p;
    a.delta = delta.p;
    a.eps = float(c.eps);
    a.products = products();
    a.d_units = c.dtype == Dtype::kFloat16 ? dunits.p : nullptr;
    a.g = gates();
    if (c.chunk) a.k_state_dot = ksdot.p;
    a.d_log_g = stat(dlg.p, c.hk);
    CK(k80::gate_gradient(a, stream));
  }
  void backward() {  // states of the forward are there
    rows();
    gradient(false);
    if (c.chunk) {
      range(true);
      update(true, false);
      if (c.normalize) update(true, true);
      scan(true);
    }
    output(true);
    gradient(true);
    if (c.gated) gate_gradient();
    if (p.packed) {
      CK(pa::cuda::zero_padding(p, table, tensor(dq.p, c.hq, c.d), c.dtype, c.hq, c.d, stream));
      CK(pa::cuda::zero_padding(p, table, tensor(dk.p, c.hk, c.d), c.dtype, c.hk, c.d, stream));
      CK(pa::cuda::zero_padding(p, table, tensor(dv.p, c.hk, c.d), c.dtype, c.hk, c.d, stream));
      if (c.gated) CK(pa::cuda::zero_padding(p, table, stat(dlg.p, c.hk), Dtype::kFloat32, c.hk, 1, stream));
    }
  }
};

size_t position(const Case &c, int heads, int b, int t, int h, int e) {
  if (!c.bthd) return ((size_t(b) * heads + h) * c.t + t) * c.d + e;
  return (size_t(b) * c.t + t) * (heads * c.d + c.pad) + size_t(h) * c.d + e;
}
std::vector<uint16_t> layout(const Case &c, const Vec &x, int heads) {
  std::vector<uint16_t> r(size_t(c.b) * c.t * (heads * c.d + c.pad), 0xffff);
  size_t n = 0;
  for (int b = 0; b < c.b; ++b)
    for (int t = 0; t < c.t; ++t)
      for (int h = 0; h < heads; ++h)
        for (int e = 0; e < c.d; ++e, ++n) r[position(c, heads, b, t, h, e)] = bits(c.dtype, x[n]);
  return r;
}
Vec from_layout(const Case &c, const std::vector<uint16_t> &x, int heads) {
  Vec r;
  for (int b = 0; b < c.b; ++b)
    for (int t = 0; t < c.t; ++t)
      for (int h = 0; h < heads; ++h)
        for (int e = 0; e < c.d; ++e) r.push_back(value(c.dtype, x[position(c, heads, b, t, h, e)]));
  return r;
}
Vec from_layout(const std::vector<float> &x) { return Vec(x.begin(), x.end()); }

// Relative to the reference, or to a hundredth of the inputs' size where the true answer is about zero.
double error(const Vec &x, const Vec &ref) {
  double num = 0, den = 1e-4 * double(ref.size());
  for (size_t i = 0; i < ref.size(); ++i) {
    num += (x[i] - ref[i]) * (x[i] - ref[i]);
    den += ref[i] * ref[i];
  }
  return std::sqrt(num / den);
}

int failures = 0;

void report(const char *what, const Vec &x, const Vec &ref, const Vec &plain, double floor) {
  const double e = error(x, ref), f = std::max(error(plain, ref), floor);
  const bool ok = e <= 2 * f;  // false for NaN
  if (!ok) ++failures;
  std::printf("  %-5s %.2e (plain %.2e)%s", what, e, f, ok ? "" : " FAIL");
}

void check(const Case &c, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  Data in;
  const size_t rows = size_t(c.b) * c.t;
  auto fill = [&](Vec &x, size_t n, double mean = 0) {
    x.resize(n);
    for (auto &e : x) e = round_to(c.dtype, normal(rng) + mean);
  };
  fill(in.q, rows * c.hq * c.d);
  for (auto &e : in.q) e = round_to(c.dtype, e * c.size);
  fill(in.k, rows * c.hk * c.d);
  for (auto &e : in.k) e = round_to(c.dtype, e * c.size_k);
  fill(in.v, rows * c.hk * c.d, 0.5);
  for (auto &e : in.v) e = round_to(c.dtype, e * c.size_v);
  fill(in.dy, rows * c.hq * c.d);
  in.lg.resize(rows * c.hk);
  for (auto &e : in.lg) e = double(float(-std::fabs(normal(rng)) * c.gate));
  if (c.resets)
    for (auto &e : in.lg)
      if (rng() % 50 == 0) e = -1e4;
  Run run(c);
  auto floats = [&](Device<float> &dst, Vec &src, size_t n, double mean, double size) {
    std::vector<float> h(n);
    src.resize(n);
    for (size_t i = 0; i < n; ++i) src[i] = h[i] = float(mean + size * normal(rng));
    dst.put(h);
  };
  if (c.state) {
    // An initial state of real keys keeps the denominators positive: phi(k) v^T summed over a few tokens.
    const int D = rows_of(c), pairs = int(run.p.sequences) * c.hk;
    in.s0.assign(size_t(pairs) * D * c.d, 0);
    in.z0.assign(size_t(pairs) * D, 0);
    for (int n = 0; n < pairs; ++n)
      for (int t = 0; t < 8; ++t) {
        Vec kk(c.d), vv(c.d);
        for (auto &e : kk) e = normal(rng);
        for (auto &e : vv) e = normal(rng) + 0.5;
        const Vec f = phi(c, kk.data());
        for (int r = 0; r < D; ++r) {
          in.z0[size_t(n) * D + r] += f[r];
          for (int e = 0; e < c.d; ++e) in.s0[(size_t(n) * D + r) * c.d + e] += f[r] * vv[e];
        }
      }
    std::vector<float> hs(in.s0.begin(), in.s0.end()), hz(in.z0.begin(), in.z0.end());
    in.s0.assign(hs.begin(), hs.end());
    in.z0.assign(hz.begin(), hz.end());
    run.s0.put(hs);
    run.z0.put(hz);
    floats(run.dsT, in.dsT, in.s0.size(), 0, 0.02);
    floats(run.dzT, in.dzT, in.z0.size(), 0, c.normalize ? 0.02 : 0.0);
  }
  run.q.put(layout(c, in.q, c.hq));
  run.k.put(layout(c, in.k, c.hk));
  run.v.put(layout(c, in.v, c.hk));
  run.dy.put(layout(c, in.dy, c.hq));
  run.lg.put(std::vector<float>(in.lg.begin(), in.lg.end()));

  run.forward();
  CK(cudaDeviceSynchronize());
  if (c.backward) run.backward();
  CK(cudaDeviceSynchronize());
  Result ref, plain;
  reference(c, in, ref, false);
  reference(c, in, plain, true);
  const double unit = c.dtype == Dtype::kFloat16 ? std::pow(2, -12) : std::pow(2, -9);
  std::printf("%s\n", c.name);
  report("y", from_layout(c, run.y.get(), c.hq), ref.y, plain.y, unit / 2);
  if (c.normalize) report("l", from_layout(run.norm.get()), ref.norm, plain.norm, unit / 8);
  if (c.backward) {
    report("dq", from_layout(c, run.dq.get(), c.hq), ref.dq, plain.dq, unit / 2);
    report("dk", from_layout(c, run.dk.get(), c.hk), ref.dk, plain.dk, unit / 2);
    report("dv", from_layout(c, run.dv.get(), c.hk), ref.dv, plain.dv, unit / 2);
    if (c.gated) report("dg", from_layout(run.dlg.get()), ref.dlg, plain.dlg, unit);
  }
  if (c.state) {
    report("S", from_layout(run.sT.get()), ref.sT, plain.sT, unit);
    if (c.normalize) report("z", from_layout(run.zT.get()), ref.zT, plain.zT, unit);
    if (c.backward) {
      report("dS0", from_layout(run.ds0.get()), ref.ds0, plain.ds0, unit);
      if (c.normalize) report("dz0", from_layout(run.dz0.get()), ref.dz0, plain.dz0, unit);
    }
  }
  std::printf("\n");
  // Bit-identical repeats.
  const auto y = run.y.get(), dq = run.dq.get(), dk = run.dk.get(), dv = run.dv.get();
  const auto dlg = run.dlg.get();
  run.forward();
  if (c.backward) run.backward();
  CK(cudaDeviceSynchronize());
  if (y != run.y.get() || dq != run.dq.get() || dk != run.dk.get() || dv != run.dv.get() ||
      std::memcmp(dlg.data(), run.dlg.get().data(), dlg.size() * 4) != 0) {
    ++failures;
    std::printf("  FAIL: a repeat differs\n");
  }
}

// Long sequences: sampled rows of y against float64, with the plain error beside it.
void check_long(const char *name, int t, bool gated, int chunk, unsigned seed, Dtype dtype = Dtype::kBfloat16) {
  Case c;
  c.name = name;
  c.dtype = dtype;
  c.t = t;
  c.gated = gated;
  c.chunk = chunk;
  c.backward = false;
  c.bthd = false;
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Run run(c);
  const size_t n = size_t(t) * c.d;
  std::vector<uint16_t> q(n), k(n), v(n);
  for (auto *x : {&q, &k, &v})
    for (auto &e : *x) e = bits(c.dtype, normal(rng));
  std::vector<float> lg(t);
  for (auto &e : lg) e = -0.001f * std::fabs(normal(rng));
  run.q.put(q);
  run.k.put(k);
  run.v.put(v);
  run.lg.put(lg);
  run.forward();
  CK(cudaDeviceSynchronize());
  const auto y = run.y.get();
  std::vector<double> G(t);
  double sum = 0;
  for (int i = 0; i < t; ++i) G[i] = sum += gated ? lg[i] : 0;
  Vec x, ref, plain;
  for (int m = 0; m < 16; ++m) {
    const int i = t - 1 - 61 * m;
    Vec num(c.d, 0.0), pn(c.d, 0.0);
    double l = 0;
    for (int j = 0; j <= i; ++j) {
      double s = 0;
      for (int e = 0; e < c.d; ++e)
        s += value(c.dtype, q[size_t(i) * c.d + e]) * value(c.dtype, k[size_t(j) * c.d + e]);
      s /= 8;
      const double w = std::exp(G[i] - G[j]) * s * s, r = round_bits(c.dtype, w);
      l += w;
      for (int e = 0; e < c.d; ++e) {
        const double vv = value(c.dtype, v[size_t(j) * c.d + e]);
        num[e] += w * vv;
        pn[e] += r * vv;
      }
    }
    for (int e = 0; e < c.d; ++e) {
      x.push_back(value(c.dtype, y[size_t(i) * c.d + e]));
      ref.push_back(num[e] / l);
      plain.push_back(round_to(c.dtype, pn[e] / l));
    }
  }
  std::printf("%s\n", name);
  report("y", x, ref, plain, 0);
  std::printf("\n");
}

double median_ms(const std::function<void()> &f, int repeats) {
  cudaEvent_t a, b;
  CK(cudaEventCreate(&a));
  CK(cudaEventCreate(&b));
  for (int i = 0; i < 2; ++i) f();
  CK(cudaDeviceSynchronize());
  std::vector<float> ms(repeats);
  for (auto &m : ms) {
    CK(cudaEventRecord(a));
    f();
    CK(cudaEventRecord(b));
    CK(cudaEventSynchronize(b));
    CK(cudaEventElapsedTime(&m, a, b));
  }
  std::sort(ms.begin(), ms.end());
  CK(cudaEventDestroy(a));
  CK(cudaEventDestroy(b));
  return ms[repeats / 2];
}

void time_case(const Case &c) {
  Run run(c);
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> pool(1 << 16);
  for (auto &e : pool) e = bits(c.dtype, normal(rng));
  auto random = [&](Device<uint16_t> &x) {
    std::vector<uint16_t> h(x.n);
    for (size_t i = 0; i < h.size(); ++i) h[i] = pool[(i * 2654435761u >> 7) & 0xffff];
    x.put(h);
  };
  random(run.q), random(run.k), random(run.v), random(run.dy);
  std::vector<float> lg(run.lg.n);
  for (auto &e : lg) e = -0.001f * std::fabs(normal(rng));
  run.lg.put(lg);
  run.forward();
  CK(cudaDeviceSynchronize());
  const int n = 11;
  const double fwd = median_ms([&] { run.forward(); }, n);
  std::printf("%-44s fwd %.3f ms", c.name, fwd);
  if (c.backward) {
    run.backward();
    const double bwd = median_ms([&] { run.backward(); }, n);
    std::printf(" bwd %.3f sum %.3f", bwd, fwd + bwd);
  }
  std::printf(" | gates %.3f", median_ms([&] { run.prepare(); }, n));
  if (c.chunk) {
    run.scan(false);
    if (c.dtype == Dtype::kFloat16) std::printf(" ranges %.3f", median_ms([&] { run.range(false); }, n));
    std::printf(" update %.3f", median_ms([&] { run.update(false, false); }, n));
    std::printf(" z %.3f", median_ms([&] { run.update(false, true); }, n));
    std::printf(" scan %.3f", median_ms([&] { run.scan(false); }, n));
  }
  std::printf(" output %.3f", median_ms([&] { run.output(false); }, n));
  if (c.backward) {
    std::printf(" rows %.3f", median_ms([&] { run.rows(); }, n));
    std::printf(" dq %.3f", median_ms([&] { run.gradient(false); }, n));
    std::printf(" dv %.3f", median_ms([&] { run.output(true); }, n));
    std::printf(" dk %.3f", median_ms([&] { run.gradient(true); }, n));
    if (c.gated) std::printf(" dg %.3f", median_ms([&] { run.gate_gradient(); }, n));
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char **argv) {
  bool do_check = argc < 2, do_time = argc < 2;
  unsigned seed = 1;
  const char *only = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "check"))
      do_check = true;
    else if (!std::strcmp(argv[i], "time"))
      do_time = true;
    else if (!std::strncmp(argv[i], "only=", 5))
      only = argv[i] + 5;
    else
      seed = unsigned(std::atoi(argv[i]));
  }
  auto make = [](const char *name, std::function<void(Case &)> f) {
    Case c;
    c.name = name;
    f(c);
    return c;
  };
  const Dtype half = Dtype::kFloat16;
  if (do_check) {
    const std::vector<Case> cases = {
        make("attention d64 t300 h4/2 gated", [](Case &c) { c.t = 300, c.hq = 4, c.hk = 2; }),
        make("attention d64 t1", [](Case &c) { c.t = 1; }),
        make("attention d64 b2 t129 bhtd eps",
             [](Case &c) { c.b = 2, c.t = 129, c.bthd = false, c.eps = 0.1; }),
        make("attention d32 t257 h2 ungated",
             [](Case &c) { c.d = 32, c.t = 257, c.hq = c.hk = 2, c.gated = false; }),
        make("attention d128 t200 h2/1", [](Case &c) { c.d = 128, c.t = 200, c.hq = 2; }),
        make("attention d64 t200 p4", [](Case &c) { c.t = 200, c.p = 4; }),
        make("attention d64 t200 p3 unnormalised", [](Case &c) { c.t = 200, c.p = 3, c.normalize = false; }),
        make("attention d128 t150 p1 unnormalised",
             [](Case &c) { c.d = 128, c.t = 150, c.p = 1, c.normalize = false; }),
        make("attention packed d64",
             [](Case &c) {
               c.t = 400, c.hq = c.hk = 2, c.cu = {0, 130, 130, 131, 390};
             }),
        make("attention f16 d64 t300 h4/2", [&](Case &c) { c.dtype = half, c.t = 300, c.hq = 4, c.hk = 2; }),
        make("attention f16 d32 t100 p4", [&](Case &c) { c.dtype = half, c.d = 32, c.t = 100, c.p = 4; }),
        make("attention f16 d128 t200", [&](Case &c) { c.dtype = half, c.d = 128, c.t = 200; }),
        make("attention f16 d64 t200 p8 large",
             [&](Case &c) { c.dtype = half, c.t = 200, c.p = 8, c.size = 3; }),
        make("attention f16 d64 t200 p4 small",
             [&](Case &c) { c.dtype = half, c.t = 200, c.p = 4, c.size = 0.01; }),
        make("attention f16 d64 t300 large", [&](Case &c) { c.dtype = half, c.t = 300, c.size = 100; }),
        make("chunked d64 t500 c128 h4/2 gated", [](Case &c) { c.t = 500, c.chunk = 128, c.hq = 4, c.hk = 2; }),
        make("chunked d64 t700 c256 ungated", [](Case &c) { c.t = 700, c.chunk = 256, c.gated = false; }),
        make("chunked d64 t300 c128 states", [](Case &c) { c.t = 300, c.chunk = 128, c.state = true; }),
        make("chunked d64 t130 c128 h2/1 states eps b2",
             [](Case &c) { c.b = 2, c.t = 130, c.hq = 2, c.chunk = 128, c.state = true, c.eps = 0.2; }),
        make("chunked d64 packed states",
             [](Case &c) {
               c.t = 500, c.chunk = 128, c.state = true, c.cu = {0, 200, 200, 201, 490};
             }),
        make("chunked d32 t500 c128 states",
             [](Case &c) { c.d = 32, c.t = 500, c.chunk = 128, c.state = true; }),
        make("chunked d128 t300 c128", [](Case &c) { c.d = 128, c.t = 300, c.chunk = 128; }),
        make("chunked d128 t260 c128 states",
             [](Case &c) { c.d = 128, c.t = 260, c.chunk = 128, c.state = true; }),
        make("chunked d64 t300 c128 unnormalised states",
             [](Case &c) { c.t = 300, c.chunk = 128, c.state = true, c.normalize = false; }),
        make("chunked d64 p1 t300 c128 h2",
             [](Case &c) { c.t = 300, c.p = 1, c.chunk = 128, c.hq = c.hk = 2, c.normalize = false; }),
        make("chunked d32 p1 t300 c128",
             [](Case &c) { c.d = 32, c.t = 300, c.p = 1, c.chunk = 128, c.normalize = false; }),
        make("chunked d128 p1 t300 c128",
             [](Case &c) { c.d = 128, c.t = 300, c.p = 1, c.chunk = 128, c.normalize = false; }),
        make("attention strided d64 t150 h2", [](Case &c) { c.t = 150, c.hq = c.hk = 2, c.pad = 3; }),
        make("chunked strided d32 t200 c128 states",
             [](Case &c) { c.d = 32, c.t = 200, c.chunk = 128, c.pad = 1, c.state = true; }),
        make("chunked resets d64 t500 c128", [](Case &c) { c.t = 500, c.chunk = 128, c.resets = true; }),
        make("attention resets d64 t300", [](Case &c) { c.t = 300, c.resets = true; }),
        make("chunked odd chunk d64 t333 c100 states",
             [](Case &c) { c.t = 333, c.chunk = 100, c.state = true; }),
        make("mini attention d64 t70 h2/1", [](Case &c) { c.t = 70, c.hq = 2; }),
        make("mini chunked d32 t140 c128 states packed",
             [](Case &c) {
               c.d = 32, c.t = 140, c.chunk = 128, c.state = true, c.cu = {0, 3, 135};
             }),
        make("mini chunked d64 t135 c128", [](Case &c) { c.t = 135, c.chunk = 128; }),
        make("chunked f16 d64 t500 c128 h4/2",
             [&](Case &c) { c.dtype = half, c.t = 500, c.chunk = 128, c.hq = 4, c.hk = 2; }),
        make("chunked f16 d64 t700 c256 ungated",
             [&](Case &c) { c.dtype = half, c.t = 700, c.chunk = 256, c.gated = false; }),
        make("chunked f16 d32 packed states",
             [&](Case &c) {
               c.dtype = half, c.d = 32, c.t = 500, c.chunk = 128, c.state = true,
               c.cu = {0, 200, 200, 201, 490};
             }),
        make("chunked f16 d128 t260 c128 states",
             [&](Case &c) { c.dtype = half, c.d = 128, c.t = 260, c.chunk = 128, c.state = true; }),
        make("chunked f16 d64 t300 c128 unnormalised states",
             [&](Case &c) { c.dtype = half, c.t = 300, c.chunk = 128, c.state = true, c.normalize = false; }),
        make("chunked f16 d64 t500 c128 large",
             [&](Case &c) {
               c.dtype = half, c.t = 500, c.chunk = 128, c.size = 300, c.size_k = 200, c.size_v = 1e3;
             }),
        make("chunked f16 d64 t500 c128 small",
             [&](Case &c) { c.dtype = half, c.t = 500, c.chunk = 128, c.size = 1e-3, c.size_k = 1e-3; }),
        make("chunked f16 d64 t300 c128 steep gates",
             [&](Case &c) { c.dtype = half, c.t = 300, c.chunk = 128, c.gate = 20; }),
        make("chunked f16 d64 t300 c128 resets",
             [&](Case &c) { c.dtype = half, c.t = 300, c.chunk = 128, c.resets = true; }),
        make("chunked f16 strided d64 t300 c128",
             [&](Case &c) { c.dtype = half, c.t = 300, c.chunk = 128, c.pad = 3; }),
        make(
            "chunked f16 d32 p1 t300 c128",
            [&](Case &c) { c.dtype = half, c.d = 32, c.t = 300, c.p = 1, c.chunk = 128, c.normalize = false; }),
        make("chunked f16 d128 p1 t300 c128",
             [&](Case &c) {
               c.dtype = half, c.d = 128, c.t = 300, c.p = 1, c.chunk = 128, c.normalize = false;
             }),
        make("mini chunked f16 d32 t140 c128 states packed",
             [&](Case &c) {
               c.dtype = half, c.d = 32, c.t = 140, c.chunk = 128, c.state = true, c.cu = {0, 3, 135};
             }),
        make("mini chunked f16 d64 p1 t135 c128 h2",
             [&](Case &c) {
               c.dtype = half, c.t = 135, c.p = 1, c.chunk = 128, c.hq = c.hk = 2, c.normalize = false;
             }),
    };
    for (const Case &c : cases)
      if (!only || std::strstr(c.name, only)) check(c, seed++);
    if (!only) check_long("long d64 t65536 gated c1024", 65536, true, 1024, seed++);
    if (!only) check_long("long d64 t65536 ungated c1024", 65536, false, 1024, seed++);
    if (!only) check_long("long d64 t1M ungated c1024", 1 << 20, false, 1024, seed++);
    if (!only) check_long("long f16 d64 t65536 ungated c512", 65536, false, 512, seed++, half);
    if (!only) check_long("long f16 d64 t1M ungated c512", 1 << 20, false, 512, seed++, half);
    std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  }
  if (do_time) {
    time_case(make("time d64 t65536 h8 c1024", [](Case &c) { c.t = 65536, c.hq = c.hk = 8, c.chunk = 1024; }));
    time_case(make("time d64 t65536 h8 c512", [](Case &c) { c.t = 65536, c.hq = c.hk = 8, c.chunk = 512; }));
    time_case(make("time d64 t4096 b16 h8 attention", [](Case &c) { c.t = 4096, c.b = 16, c.hq = c.hk = 8; }));
    time_case(make("time d64 t1024 b64 h8 attention", [](Case &c) { c.t = 1024, c.b = 64, c.hq = c.hk = 8; }));
    time_case(make("time f16 d64 t65536 h8 c512",
                   [&](Case &c) { c.dtype = half, c.t = 65536, c.hq = c.hk = 8, c.chunk = 512; }));
    time_case(make("time f16 d128 t65536 h8 c2048",
                   [&](Case &c) { c.dtype = half, c.d = 128, c.t = 65536, c.hq = c.hk = 8, c.chunk = 2048; }));
    time_case(make("time d128 t65536 h8 c2048",
                   [](Case &c) { c.d = 128, c.t = 65536, c.hq = c.hk = 8, c.chunk = 2048; }));
    time_case(make("time d128 t65536 h8 c1024",
                   [](Case &c) { c.d = 128, c.t = 65536, c.hq = c.hk = 8, c.chunk = 1024; }));
    time_case(make("time d64 p1 t65536 h8 c256",
                   [](Case &c) { c.t = 65536, c.hq = c.hk = 8, c.chunk = 256, c.p = 1, c.normalize = false; }));
    time_case(make("time f16 d64 t4096 b16 h8 attention",
                   [&](Case &c) { c.dtype = half, c.t = 4096, c.b = 16, c.hq = c.hk = 8; }));
  }
  return failures ? 1 : 0;
}
