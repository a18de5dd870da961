// SPDX-License-Identifier: Apache-2.0
// Long sequences, ungated, so that every token counts: outputs and every gradient against the CPU's float64,
// where no oracle of t^2 pairs can follow. The error of some rows is held to twice that of the plain
// implementation of the same precision (oracle.h), which for a few rows is cheap.
//
//   test_gpu_long [tokens]...      default: 65536 and 1048576
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device_problem.h"
#include "oracle.h"

using namespace powerattn_test;

namespace {

constexpr int64_t kDim = 64;
constexpr int kDegree = 2, kSamples = 24;

Vector doubles(const Block &block, int32_t dtype) {
  const std::vector<char> bytes = block.host();
  Vector out(bytes.size() / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t x = 0;
    std::memcpy(&x, &bytes[2 * i], 2);
    out[i] = decode16(dtype, x);
  }
  return out;
}

struct Exactly {
  Vector q, k, v, dy, y, norm, dq, dk, dv;
};

// Forward and backward in float64 on the CPU, which the other tests hold to the oracle.
void solve(int64_t t, Exactly *x) {
  powerattn_desc d = DeviceProblem::description(POWERATTN_FLOAT64, 1, t, 1, 1, kDim, kDim, kDegree);
  d.device_type = POWERATTN_CPU;
  powerattn_plan *plan = nullptr;
  api_must(powerattn_plan_create(&d, &plan), "plan_create on the CPU");
  powerattn_plan_info info = {};
  info.struct_size = sizeof info;
  api_must(powerattn_plan_query(plan, &info), "plan_query");
  const size_t n = static_cast<size_t>(t * kDim);
  for (Vector *out : {&x->y, &x->dq, &x->dk, &x->dv}) out->resize(n);
  x->norm.resize(static_cast<size_t>(t));
  const uint64_t bytes = std::max(info.workspace_forward, info.workspace_backward);
  std::vector<char> memory(bytes + 256);
  char *const work = memory.data() + (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
  const auto tensor = [&](Vector &v, int64_t width) {
    return powerattn_tensor{v.data(), t * width, width, width};
  };
  powerattn_forward_args f = {};
  f.struct_size = sizeof f;
  f.q = tensor(x->q, kDim), f.k = tensor(x->k, kDim), f.v = tensor(x->v, kDim);
  f.y = tensor(x->y, kDim), f.row_norm = tensor(x->norm, 1);
  f.workspace = work, f.workspace_bytes = bytes;
  api_must(powerattn_forward(plan, &f), "forward on the CPU");
  powerattn_backward_args b = {};
  b.struct_size = sizeof b;
  b.q = f.q, b.k = f.k, b.v = f.v, b.y = f.y, b.row_norm = f.row_norm;
  b.d_y = tensor(x->dy, kDim);
  b.d_q = tensor(x->dq, kDim), b.d_k = tensor(x->dk, kDim), b.d_v = tensor(x->dv, kDim);
  b.workspace = work, b.workspace_bytes = bytes;
  api_must(powerattn_backward(plan, &b), "backward on the CPU");
  powerattn_plan_destroy(plan);
}

// The plain implementation for one query, and for one key; the equations and roundings of oracle.h.
struct Plain {
  const Rounded round;  // sums of a million weights leave the range of float16
  const int64_t t;
  std::vector<float> q, k, v, dy, y, norm;  // y and norm: rounded, of all rows, for keys
  Plain(int32_t dtype, int64_t tokens, const Exactly &x)
      : round{dtype, true},
        t(tokens),
        q(as<float>(x.q)),
        k(as<float>(x.k)),
        v(as<float>(x.v)),
        dy(as<float>(x.dy)) {
    for (double e : x.y) y.push_back(round(static_cast<float>(e)));
    for (double e : x.norm) norm.push_back(round(static_cast<float>(e)));
  }
  float score(int64_t i, int64_t j) const {
    return round(round(dot(&q[i * kDim], &k[j * kDim], kDim)) * 0.125f);
  }
  float weight(float s) const { return round(int_power(s, kDegree)); }
  // d score of a pair, from dy_i / l_i and -delta_i / l_i.
  float slope(float s, const float *dn, float dl, int64_t j) const {
    const float dw = round(round(dot(dn, &v[j * kDim], kDim)) + dl);
    return round(dw * kDegree * s * 0.125f);
  }
  void gradient_of_row(int64_t i, const float *y_i, float l, float *dn, float *dl) const {
    float delta = 0;
    for (int64_t c = 0; c < kDim; ++c) {
      delta += dy[i * kDim + c] * y_i[c];
      dn[c] = l == 0 ? 0.0f : round(dy[i * kDim + c] / l);
    }
    *dl = l == 0 ? 0.0f : -delta / l;
  }
  void query(int64_t i, float *y_i, float *dq) const {
    float sum[kDim] = {}, l = 0, dn[kDim], dl = 0;
    for (int64_t j = 0; j <= i; ++j) {
      const float w = weight(score(i, j));
      for (int64_t c = 0; c < kDim; ++c) sum[c] += w * v[j * kDim + c];
      l += w;
    }
    l = round(l);
    for (int64_t c = 0; c < kDim; ++c) y_i[c] = l == 0 ? 0.0f : round(round(sum[c]) / l), dq[c] = 0;
    gradient_of_row(i, y_i, l, dn, &dl);
    for (int64_t j = 0; j <= i; ++j) {
      const float ds = slope(score(i, j), dn, dl, j);
      for (int64_t c = 0; c < kDim; ++c) dq[c] += ds * k[j * kDim + c];
    }
    for (int64_t c = 0; c < kDim; ++c) dq[c] = round(dq[c]);
  }
  void key(int64_t j, float *dk, float *dv) const {
    float dn[kDim], dl = 0;
    for (int64_t c = 0; c < kDim; ++c) dk[c] = dv[c] = 0;
    for (int64_t i = j; i < t; ++i) {
      const float s = score(i, j), w = weight(s);
      gradient_of_row(i, &y[i * kDim], norm[i], dn, &dl);
      const float ds = slope(s, dn, dl, j);
      for (int64_t c = 0; c < kDim; ++c) {
        dk[c] += ds * q[i * kDim + c];
        dv[c] += w * dn[c];
      }
    }
    for (int64_t c = 0; c < kDim; ++c) dk[c] = round(dk[c]), dv[c] = round(dv[c]);
  }
};

// Root mean squares of the errors of sampled rows, relative to the values.
struct Errors {
  double ours = 0, plain = 0, size = 0;
  void add(const double *exact, const double *x, const float *p) {
    for (int64_t c = 0; c < kDim; ++c) {
      ours += (x[c] - exact[c]) * (x[c] - exact[c]);
      plain += (p[c] - exact[c]) * (p[c] - exact[c]);
      size += exact[c] * exact[c];
    }
  }
};

bool check(int32_t dtype, int64_t t) {
  const char *const type = dtype == POWERATTN_BFLOAT16 ? "bf16" : "f16";
  powerattn_desc d = DeviceProblem::description(dtype, 1, t, 1, 1, kDim, kDim, kDegree);
  d.form = POWERATTN_FORM_CHUNKED;
  DeviceProblem p;
  p.make(d, false, DeviceProblem::kForward | DeviceProblem::kBackward, 11);
  const auto f = p.forward_args(nullptr, true);
  const auto b = p.backward_args(nullptr, true);
  api_must(powerattn_forward(p.plan, &f), "forward");
  api_must(powerattn_backward(p.plan, &b), "backward");
  device_must(cudaDeviceSynchronize(), "kernels");
  Exactly x;
  x.q = doubles(p.q, dtype), x.k = doubles(p.k, dtype), x.v = doubles(p.v, dtype), x.dy = doubles(p.dy, dtype);
  solve(t, &x);
  const Vector y = doubles(p.y, dtype), dq = doubles(p.dq, dtype), dk = doubles(p.dk, dtype),
               dv = doubles(p.dv, dtype);
  const Plain plain(dtype, t, x);
  Errors errors[4];
  for (int n = 0; n < kSamples; ++n) {
    // Not the first ones, which are differences of a few large numbers.
    const int64_t row = (n + 1) * t / (kSamples + 1), at = row * kDim;
    float one[kDim], two[kDim];
    plain.query(row, one, two);
    errors[0].add(&x.y[at], &y[at], one);
    errors[1].add(&x.dq[at], &dq[at], two);
    plain.key(row, one, two);
    errors[2].add(&x.dk[at], &dk[at], one);
    errors[3].add(&x.dv[at], &dv[at], two);
  }
  bool ok = true;
  std::printf("long %s t%lld d64 p2 (ours / plain, relative to the values):", type, static_cast<long long>(t));
  const char *const names[] = {"y", "d_q", "d_k", "d_v"};
  for (int n = 0; n < 4; ++n) {
    const double ours = std::sqrt(errors[n].ours / errors[n].size),
                 base = std::sqrt(errors[n].plain / errors[n].size);
    std::printf(" %s %.2e / %.2e = %.2f", names[n], ours, base, ours / base);
    ok = ok && ours <= 2 * base;  // false for NaN
  }
  std::printf(" %s\n", ok ? "pass" : "FAIL: more than twice");
  std::fflush(stdout);
  return ok;
}

}  // namespace

int main(int argc, char **argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("SKIPPED: no CUDA device\n");
    return 77;
  }
  std::vector<int64_t> tokens;
  for (int i = 1; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  if (tokens.empty()) tokens = {65536, 1 << 20};
  bool ok = true;
  try {
    for (int64_t t : tokens) {
      for (int32_t dtype : {POWERATTN_BFLOAT16, POWERATTN_FLOAT16}) ok = check(dtype, t) && ok;
    }
  } catch (const std::exception &error) {
    std::printf("FAIL: %s\n", error.what());
    return 1;
  }
  return ok ? 0 : 1;
}
