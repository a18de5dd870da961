// SPDX-License-Identifier: Apache-2.0
// Long sequences, ungated, so that every token counts: outputs and every gradient against the CPU's float64,
// where no oracle of t^2 pairs can follow. The error of some rows is held to twice that of the plain
// implementation of the same precision (oracle.h), which for a few rows is cheap.
//
//   test_gpu_long [tokens]...      default: 65536 and 1048576
//
// Runs the implementation that POWERATTN_CUDA_IMPLEMENTATION names, or several in turn, each in a process of
// its own, since the library reads the variable once. What they are compared with takes a minute and is made
// once.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_memory.h"
#include "run_case.h"
#include "skip.h"

using namespace powerattn_test;

namespace {

constexpr int64_t kDim = 64;
constexpr int kDegree = 2, kSamples = 24;

// The plain implementation for one query, and for one key; the equations and roundings of oracle.h.
struct Plain {
  const Rounded round;  // sums of a million weights leave the range of float16
  const int64_t t;
  std::vector<float> q, k, v, dy;
  std::vector<float> dn, dl;  // of all rows, for keys: from the exact y and norm, rounded
  Plain(const Case &c, const Inputs &in, const Outputs &exact)
      : round{c.dtype, true},
        t(c.t),
        q(as<float>(in.q)),
        k(as<float>(in.k)),
        v(as<float>(in.v)),
        dy(as<float>(in.dy)),
        dn(dy.size()),
        dl(static_cast<size_t>(t)) {
    float y[kDim];
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t e = 0; e < kDim; ++e) y[e] = round(static_cast<float>(exact.y[i * kDim + e]));
      gradient_of_row(i, y, round(static_cast<float>(exact.norm[i])), &dn[i * kDim], &dl[i]);
    }
  }
  float score(int64_t i, int64_t j) const {
    return round(round(dot(&q[i * kDim], &k[j * kDim], kDim)) * 0.125f);
  }
  float weight(float s) const { return round(int_power(s, kDegree)); }
  // d score of a pair, from dy_i / l_i and -delta_i / l_i.
  float slope(float s, const float *dn_i, float dl_i, int64_t j) const {
    const float dw = round(round(dot(dn_i, &v[j * kDim], kDim)) + dl_i);
    return round(dw * kDegree * s * 0.125f);
  }
  void gradient_of_row(int64_t i, const float *y_i, float l, float *dn_i, float *dl_i) const {
    float delta = 0;
    for (int64_t c = 0; c < kDim; ++c) {
      delta += dy[i * kDim + c] * y_i[c];
      dn_i[c] = l == 0 ? 0.0f : round(dy[i * kDim + c] / l);
    }
    *dl_i = l == 0 ? 0.0f : -delta / l;
  }
  void query(int64_t i, float *y_i, float *dq) const {
    float sum[kDim] = {}, l = 0, dn_i[kDim], dl_i = 0;
    for (int64_t j = 0; j <= i; ++j) {
      const float w = weight(score(i, j));
      for (int64_t c = 0; c < kDim; ++c) sum[c] += w * v[j * kDim + c];
      l += w;
    }
    l = round(l);
    for (int64_t c = 0; c < kDim; ++c) y_i[c] = l == 0 ? 0.0f : round(round(sum[c]) / l), dq[c] = 0;
    gradient_of_row(i, y_i, l, dn_i, &dl_i);
    for (int64_t j = 0; j <= i; ++j) {
      const float ds = slope(score(i, j), dn_i, dl_i, j);
      for (int64_t c = 0; c < kDim; ++c) dq[c] += ds * k[j * kDim + c];
    }
    for (int64_t c = 0; c < kDim; ++c) dq[c] = round(dq[c]);
  }
  void key(int64_t j, float *dk, float *dv) const {
    for (int64_t c = 0; c < kDim; ++c) dk[c] = dv[c] = 0;
    for (int64_t i = j; i < t; ++i) {
      const float s = score(i, j), w = weight(s);
      const float ds = slope(s, &dn[i * kDim], dl[i], j);
      for (int64_t c = 0; c < kDim; ++c) {
        dk[c] += ds * q[i * kDim + c];
        dv[c] += w * dn[i * kDim + c];
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

// One case, and what every implementation of it is compared with.
struct Reference {
  std::string line;
  Case c;
  Inputs in;
  Outputs exact;  // in float64 on the CPU, which the other tests hold to the oracle
  struct Row {
    int64_t at;
    float y[kDim], dq[kDim], dk[kDim], dv[kDim];
  };
  std::vector<Row> rows;  // of the plain implementation

  Reference(const std::string &type, int64_t t)
      : line("bwd " + type + " b1 t" + std::to_string(t) + " h1 d64 p2 chunked"),
        c(parse_case(line)),
        in(make_inputs(c, 11)) {
    Case wide = c;
    wide.dtype = POWERATTN_FLOAT64;
    Memory host;
    exact = run(host, wide, in, Plan(wide.desc(POWERATTN_CPU)));
    const Plain plain(c, in, exact);
    for (int n = 0; n < kSamples; ++n) {
      // Not the first ones, which are differences of a few large numbers.
      const int64_t row = (n + 1) * t / (kSamples + 1);
      Row r;
      r.at = row * kDim;
      plain.query(row, r.y, r.dq);
      plain.key(row, r.dk, r.dv);
      rows.push_back(r);
    }
  }
};

bool check(const Reference &r, const char *implementation) {
  CudaMemory device;
  const Outputs x = run(device, r.c, r.in, Plan(r.c.desc(POWERATTN_CUDA)), true);
  Errors errors[4];
  for (const Reference::Row &row : r.rows) {
    errors[0].add(&r.exact.y[row.at], &x.y[row.at], row.y);
    errors[1].add(&r.exact.dq[row.at], &x.dq[row.at], row.dq);
    errors[2].add(&r.exact.dk[row.at], &x.dk[row.at], row.dk);
    errors[3].add(&r.exact.dv[row.at], &x.dv[row.at], row.dv);
  }
  bool ok = true;
  std::printf("%s: %s (ours / plain, relative to the values):", implementation, r.line.c_str());
  const char *const names[] = {"y", "d_q", "d_k", "d_v"};
  for (int n = 0; n < 4; ++n) {
    const double ours = std::sqrt(errors[n].ours / errors[n].size),
                 base = std::sqrt(errors[n].plain / errors[n].size);
    std::printf(" %s %.2e / %.2e = %.2f", names[n], ours, base, ours / base);
    ok = ok && ours <= 2 * base;  // false for NaN
  }
  std::printf(" %s\n", ok ? "pass" : "FAIL: more than twice");
  return ok;
}

// Status of a function in a process of its own. This one never starts the driver, which does not survive a
// fork.
template <class Function>
int apart(const Function &function) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const int status = function();
    std::fflush(stdout);
    _exit(status);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) {
    std::printf("FAIL: a process did not end by itself\n");
    return 1;
  }
  return WEXITSTATUS(status);
}

int checked(const Reference &r, const char *implementation) {
  try {
    return check(r, implementation) ? 0 : 1;
  } catch (const std::exception &error) {
    std::printf("%s: FAIL: %s\n", implementation, error.what());
    return 1;
  }
}

}  // namespace

int main(int argc, char **argv) {
  std::vector<int64_t> tokens;
  for (int i = 1; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  if (tokens.empty()) tokens = {65536, 1 << 20};
  if (apart([] { return no_device() ? 1 : 0; }) != 0) return kSkipped;
  const char *const named = std::getenv("POWERATTN_CUDA_IMPLEMENTATION");
  int failed = 0;
  for (int64_t t : tokens) {
    for (const char *type : {"bf16", "f16"}) {
      const Reference reference(type, t);
      if (named != nullptr) {
        failed += checked(reference, named);
        continue;
      }
      failed += apart([&] { return checked(reference, "chosen"); });
      for (const char *implementation : {"cuda.sm80", "cuda.generic"}) {
        failed += apart([&] {
          setenv("POWERATTN_CUDA_IMPLEMENTATION", implementation, 1);
          return checked(reference, implementation);
        });
      }
    }
  }
  return failed == 0 ? 0 : 1;
}
