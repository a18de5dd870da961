// SPDX-License-Identifier: Apache-2.0
// Times the library on one CUDA device beside the device's own ceilings, measured in the same run:
//   bench_gpu [SECTION...] [--csv FILE] [--append] [--only TEXT] [--label TEXT] [--seconds N] [--tokens N]
//   [--quick] [--warm MS]
// Sections (default: all):
//   targets    the shapes that have a target
//   kernels    the same by kernel, each in its place in the sequence
//   sweep      both forms and the planner's choice, from tokens / 64 to 4 tokens a sequence
//   sweep-f16  the same in float16
//   other      other dtypes, grouped heads, degree 4
//   step       the state step
//
// Medians of graph replays, with the clock they ran at; random data (zeros run faster). --warm MS: after so
// much of the same work, at the clock of a long run. Every row of the CSV is one measurement; what was not
// measured, because it failed or `--seconds` were over, is printed and has no row. bench/gpu/report.py judges
// the table.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../tests/gpu/skip.h"
#include "ceilings.h"
#include "timing.h"

using namespace powerattn_test;
using namespace powerattn_bench;

namespace {

FILE *csv = nullptr;
std::string only, label;
double budget_ms = 60, deadline = 0;
int64_t all_tokens = 65536;
double matmul_rate = 0, in_place_rate = 0;  // TFLOP/s, GB/s

// One line of the table. Zero: does not apply.
struct Row {
  std::string what, config, implementation;
  double ms = 0, flops = 0, bytes = 0;  // useful operations; bytes that must move
  std::string form;
  int64_t chunk = 0;
  uint64_t memory = 0;      // bytes beside the inputs: outputs, saved, workspace
  double predicted_ms = 0;  // the planner's
  double mhz = 0;           // the device's clock meanwhile
  void timed(const Time &t) { ms = t.ms, mhz = t.mhz; }
};

void print(const Row &r) {
  const double rate = r.flops / r.ms * 1e-9, bandwidth = r.bytes / r.ms * 1e-6;
  const double share = r.flops > 0 && matmul_rate > 0     ? rate / matmul_rate
                       : r.bytes > 0 && in_place_rate > 0 ? bandwidth / in_place_rate
                                                          : 0;
  std::printf("%-9s %-46s %-18s %10.4f ms", r.what.c_str(), r.config.c_str(), r.implementation.c_str(), r.ms);
  if (r.flops > 0) std::printf(" %6.1f TFLOP/s", rate);
  if (r.bytes > 0) std::printf(" %6.0f GB/s", bandwidth);
  if (share > 0) std::printf(" = %3.0f %% of the %s rate", 100 * share, r.flops > 0 ? "matmul" : "in-place");
  if (!r.form.empty()) std::printf("  %s %lld", r.form.c_str(), (long long)r.chunk);
  if (r.predicted_ms > 0) std::printf(", predicted %.3g ms", r.predicted_ms);
  if (r.memory > 0) std::printf(", %.0f MB", double(r.memory) * 1e-6);
  if (r.mhz > 0) std::printf(", %.0f MHz", r.mhz);
  std::printf("\n");
  std::fflush(stdout);
  if (!csv) return;
  std::fprintf(csv, "%s,%s,%s,%.6f,%.3f,%.3f,%.4f,%s,%lld,%llu,%.6f,%.0f\n", r.what.c_str(), r.config.c_str(),
               r.implementation.c_str(), r.ms, rate, bandwidth, share, r.form.c_str(), (long long)r.chunk,
               (unsigned long long)r.memory, r.predicted_ms, r.mhz);
  std::fflush(csv);
}

bool wanted(const std::string &name) {
  if (!only.empty() && name.find(only) == std::string::npos) return false;
  if (deadline > 0 && seconds() > deadline) {
    std::printf("          %-46s not run: no time left\n", name.c_str());
    return false;
  }
  return true;
}

void failed(const std::string &name, const char *why) {
  std::printf("          %-46s failed: %s\n", name.c_str(), why);
  std::fflush(stdout);
  cudaGetLastError();  // the next case starts afresh
}

// The implementation that runs an operation, as the plan describes itself; "none".
std::string runs(const powerattn_plan *plan, const char *operation) {
  std::vector<char> text(1 << 16);
  if (powerattn_plan_describe(plan, text.data(), text.size(), nullptr) != POWERATTN_OK) return "none";
  const char *at = std::strstr(text.data(), "\nruns ");
  if (at != nullptr) at = std::strstr(at, operation);
  if (at == nullptr) return "none";
  at += std::strlen(operation) + 1;
  return std::string(at, std::strcspn(at, ",\n"));
}

double rows_of(int64_t d, int p) {
  double rows = 1;
  for (int i = 1; i <= p; ++i) rows = rows * double(d + p - i) / double(i);
  return rows;
}

struct Config {
  int32_t dtype;
  int64_t b, t, hq, hkv, d;
  int p;
  int32_t form;
  const char *suffix;
};

std::string name_of(const Config &c) {
  const char *dtype = c.dtype == POWERATTN_BFLOAT16 ? "bf16" : c.dtype == POWERATTN_FLOAT16 ? "f16" : "f32";
  std::string heads = std::to_string(c.hq);
  if (c.hkv != c.hq) heads += "/" + std::to_string(c.hkv);
  return std::string(dtype) + " p" + std::to_string(c.p) + " d" + std::to_string(c.d) + " b" +
         std::to_string(c.b) + " t" + std::to_string(c.t) + " h" + heads + " gated" + c.suffix + label;
}

// Operations of the form that runs (chunk = 0: attention), exact D, half of the pairs, 2 per multiply-add.
struct Useful {
  double q, kv, pairs, state, d;  // tokens times heads; pairs of all queries; a state's products with one token
  Useful(const Config &c, int64_t chunk) : d(double(c.d)) {
    q = double(c.b) * double(c.t) * double(c.hq);
    kv = double(c.b) * double(c.t) * double(c.hkv);
    const double span = chunk > 0 ? double(std::min(chunk, c.t)) : double(c.t);
    pairs = q * (span + 1) / 2;
    state = chunk > 0 ? 2 * rows_of(c.d, c.p) * (d + (c.p % 2 ? 0 : 1)) : 0;
  }
  double forward() const { return pairs * 2 * (d + d) + state * (q + kv); }
  double backward() const { return pairs * 2 * (3 * d + 2 * d) + state * 2 * (q + kv); }
};

// The operations of one kernel's own equations: `update` adds phi(k) v^T (then phi(q) dy^T), `output` is a
// query of the state and two products per pair, `gradient` is dq (three products), then dk with dv (four);
// where a second `output` computes dv alone (cuda.sm80), dk is three; `joint64`, `joint128` are all three
// gradients (five). 0: moves data.
double kernel_flops(const std::string &name, const Useful &u, int nth, bool separate_dv) {
  const auto is = [&](const char *part) { return name.find(part) != std::string::npos; };
  if (is("update")) return u.state * (nth == 0 ? u.kv : u.q);
  if (is("joint64") || is("joint128")) return u.pairs * 10 * u.d;
  if (is("output")) return u.pairs * 4 * u.d + u.state * (nth == 0 ? u.q : u.kv);
  if (is("gradient")) {
    if (nth == 0) return u.pairs * 6 * u.d + u.state * u.q;
    return u.pairs * (separate_dv ? 6 : 8) * u.d + u.state * (separate_dv ? 1 : 2) * u.kv;
  }
  return 0;
}

void print_kernels(const std::string &config, const Useful &u, const std::function<void(cudaStream_t)> &work) {
  const std::vector<NodeTime> nodes = node_times(work, budget_ms);
  const auto count = [&](const char *part) {
    return std::count_if(nodes.begin(), nodes.end(),
                         [&](const NodeTime &n) { return n.name.find(part) != std::string::npos; });
  };
  const bool separate_dv = count("output") > 1;
  double other = 0, sum = 0;
  int updates = 0, outputs = 0, gradients = 0, joints = 0;
  for (const NodeTime &n : nodes) {
    int *const seen = n.name.find("update") != std::string::npos     ? &updates
                      : n.name.find("output") != std::string::npos   ? &outputs
                      : n.name.find("gradient") != std::string::npos ? &gradients
                      : n.name.find("joint") != std::string::npos    ? &joints
                                                                     : nullptr;
    const double flops = seen != nullptr ? kernel_flops(n.name, u, (*seen)++, separate_dv) : 0;
    sum += n.ms;
    if (flops == 0 && n.ms < 0.02) {
      other += n.ms;
      continue;
    }
    Row r;
    r.what = "kernel", r.config = config, r.implementation = n.name, r.ms = n.ms, r.flops = flops;
    print(r);
  }
  Row rest;
  rest.what = "kernel", rest.config = config, rest.implementation = "others < 20 us",
  rest.ms = std::max(other, 1e-6);
  print(rest);
  std::printf("          %-46s %-18s %10.4f ms\n", config.c_str(), "sum of all", sum);
}

enum Parts { kTimes = 1, kKernels = 2 };

void run(const Config &c, int parts = kTimes) {
  const std::string name = name_of(c);
  if (!wanted(name)) return;
  try {
    powerattn_desc x = DeviceProblem::description(c.dtype, c.b, c.t, c.hq, c.hkv, c.d, c.d, c.p);
    x.form = c.form;
    DeviceProblem p;
    p.make(x, true, DeviceProblem::kForward | DeviceProblem::kBackward);
    const bool chunked = p.info.form == POWERATTN_FORM_CHUNKED, backward = runs(p.plan, "backward") != "none";
    // cuda.linear walks in steps (kBlock of kernels/cuda/linear/args.h) and computes no pairs beyond them,
    // whatever the length of its walks.
    constexpr int64_t kLinearStep = 64;
    const bool walks = runs(p.plan, "forward") == "cuda.linear";
    const Useful u(c, !chunked ? 0 : walks ? std::min(p.info.chunk_size, kLinearStep) : p.info.chunk_size);
    const auto forward_only = [&](cudaStream_t s) {
      const auto a = p.forward_args(s);
      api_must(powerattn_forward(p.plan, &a), "forward");
    };
    const auto both = [&](cudaStream_t s) {
      const auto a = p.forward_args(s, true);
      const auto g = p.backward_args(s, true);
      api_must(powerattn_forward(p.plan, &a), "forward");
      api_must(powerattn_backward(p.plan, &g), "backward");
    };
    if (parts & kTimes) {
      Row r;
      r.what = "forward";
      r.config = name;
      r.implementation = runs(p.plan, "forward");
      r.form = chunked ? "chunked" : "attention";
      r.chunk = chunked ? p.info.chunk_size : 0;
      r.timed(median_time(forward_only, budget_ms));
      r.flops = u.forward();
      r.predicted_ms = p.info.predicted_forward_s * 1e3;
      const uint64_t outputs = p.y.bytes() + p.norm.bytes();
      r.memory = outputs + p.info.workspace_forward;
      print(r);
      if (backward) {
        r.what = "fwd+bwd";
        if (const std::string other = runs(p.plan, "backward"); other != r.implementation)
          r.implementation += "+" + other;
        r.timed(median_time(both, budget_ms));
        r.flops += u.backward();
        r.predicted_ms += p.info.predicted_backward_s * 1e3;
        r.memory = outputs + p.dq.bytes() + p.dk.bytes() + p.dv.bytes() + p.dlog_g.bytes() + p.saved.bytes() +
                   std::max(p.info.workspace_forward, p.info.workspace_backward_saved);
        print(r);
      }
    }
    if (parts & kKernels) {
      if (backward)
        print_kernels(name + " fwd+bwd", u, both);
      else
        print_kernels(name + " forward", u, forward_only);
    }
  } catch (const std::exception &error) {
    failed(name, error.what());
  }
}

// Bytes that a step must move: every state once in, once out.
void run_step(int32_t state_dtype, int64_t units, int64_t d, int64_t tokens, int64_t group) {
  const std::string name = std::string(state_dtype == POWERATTN_BFLOAT16 ? "bf16" : "f32") + " state d" +
                           std::to_string(d) + " b*h" + std::to_string(units) + " tokens" +
                           std::to_string(tokens) + " group" + std::to_string(group);
  if (!wanted(name)) return;
  try {
    const int64_t heads = std::min<int64_t>(units, 8);
    powerattn_desc x =
        DeviceProblem::description(POWERATTN_BFLOAT16, units / heads, tokens, heads * group, heads, d, d, 2);
    x.flags |= POWERATTN_USE_STATE;
    x.state_dtype = state_dtype;
    // Pools that together pass the cache several times, so that no replay finds its states there.
    const double one =
        double(units) * rows_of(d, 2) * double(d + 1) * (state_dtype == POWERATTN_BFLOAT16 ? 2 : 4);
    const int sets = int(std::clamp(400e6 / one, 1.0, 64.0));
    std::vector<DeviceProblem> p(static_cast<size_t>(sets));
    for (auto &one_set : p) one_set.make(x, true, DeviceProblem::kStep);
    Row r;
    r.what = "step", r.config = name, r.implementation = runs(p[0].plan, "step");
    r.timed(median_time(
        [&](cudaStream_t s) {
          for (auto &one_set : p) {
            const auto a = one_set.step_args(s);
            api_must(powerattn_step(one_set.plan, &a), "step");
          }
        },
        budget_ms));
    r.ms /= sets;
    r.bytes = 2 * one;
    r.memory = p[0].y.bytes() + p[0].info.workspace_step;
    print(r);
  } catch (const std::exception &error) {
    failed(name, error.what());
  }
}

void ceilings() {
  for (const auto &measure : {measure_copies, measure_matmul}) {
    for (const Ceiling &c : measure(budget_ms)) {
      if (c.bytes > 0) in_place_rate = std::max(in_place_rate, c.bytes / c.time.ms * 1e-6);
      if (c.flops > 0) matmul_rate = c.flops / c.time.ms * 1e-9;
      Row r;
      r.what = c.what, r.config = c.config, r.implementation = c.implementation, r.timed(c.time);
      r.flops = c.flops, r.bytes = c.bytes;
      print(r);
    }
  }
  if (matmul_rate == 0)
    std::printf("          no cuBLAS on the library path: no matmul rate, no share of it\n");
}

int usage(const char *argument) {
  std::printf(
      "bench_gpu: cannot use '%s'\n"
      "usage: bench_gpu [targets] [kernels] [sweep] [sweep-f16] [other] [step] [--csv FILE] [--append] [--only "
      "TEXT]\n"
      "                 [--label TEXT] [--seconds N] [--tokens N] [--quick] [--warm MS]\n",
      argument);
  return 2;
}

}  // namespace

int main(int argc, char **argv) {
  std::set<std::string> sections;
  const char *file = nullptr;
  bool append = false, quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const bool more = i + 1 < argc;
    if (a == "targets" || a == "kernels" || a == "sweep" || a == "sweep-f16" || a == "other" || a == "step") {
      sections.insert(a);
    } else if (a == "--append") {
      append = true;
    } else if (a == "--quick") {
      quick = true;
    } else if (a == "--csv" && more) {
      file = argv[++i];
    } else if (a == "--only" && more) {
      only = argv[++i];
    } else if (a == "--label" && more) {
      label =
          std::string(" ") + argv[++i];  // behind the name of every case, for a run that is not the default one
    } else if (a == "--seconds" && more && std::atof(argv[i + 1]) > 0) {
      deadline = seconds() + std::atof(argv[++i]);
    } else if (a == "--warm" && more && std::atof(argv[i + 1]) > 0) {
      warm_ms = std::atof(argv[++i]);
    } else if (a == "--tokens" && more && std::atoll(argv[i + 1]) >= 64) {
      all_tokens = std::atoll(argv[++i]);
    } else {
      return usage(argv[i]);
    }
  }
  if (quick) budget_ms = 15;
  const auto section = [&](const char *name) { return sections.empty() || sections.count(name) > 0; };
  if (no_device()) return kSkipped;
  if (file != nullptr && (csv = std::fopen(file, append ? "a" : "w")) == nullptr) return usage(file);
  cudaDeviceProp device;
  device_must(cudaGetDeviceProperties(&device, 0), "device");
  const char *pinned = std::getenv("POWERATTN_CUDA_IMPLEMENTATION");
  std::printf("# %s, %d multiprocessors, libpowerattn %u%s%s\n", device.name, device.multiProcessorCount,
              powerattn_version(), pinned ? ", only " : "", pinned ? pinned : "");
  if (csv && !append)
    std::fprintf(csv,
                 "what,config,implementation,ms,tflops,gbps,share,form,chunk,memory_bytes,predicted_ms,mhz\n");
  try {
    ceilings();
  } catch (const std::exception &error) {
    failed("ceilings", error.what());
  }

  const int32_t bf16 = POWERATTN_BFLOAT16, f16 = POWERATTN_FLOAT16, f32 = POWERATTN_FLOAT32;
  const int32_t automatic = POWERATTN_FORM_AUTO, attention = POWERATTN_FORM_ATTENTION,
                chunked = POWERATTN_FORM_CHUNKED;
  const int64_t n = all_tokens;
  const Config targets[] = {
      {bf16, 1, n, 8, 8, 64, 2, automatic, ""},       {bf16, 1, n, 8, 8, 128, 2, automatic, ""},
      {bf16, 16, n / 16, 8, 8, 64, 2, automatic, ""}, {bf16, 64, n / 64, 8, 8, 64, 2, automatic, ""},
      {bf16, 1, n, 8, 8, 64, 1, automatic, ""},       {bf16, 16, n / 16, 8, 8, 128, 2, automatic, ""},
  };
  if (section("targets"))
    for (const Config &c : targets) run(c);
  if (section("step")) {
    for (int32_t state : {f32, bf16})
      for (int64_t units : {8, 64, 192, 256, 512}) run_step(state, units, 64, 1, 1);
    run_step(f32, 256, 128, 1, 1);
    run_step(f32, 256, 64, 4, 1);
    run_step(f32, 256, 64, 16, 1);
    run_step(f32, 64, 64, 1, 8);
  }
  if (section("kernels")) {
    for (const Config &c : targets) run(c, kKernels);
    for (int64_t b : {64, 32, 8}) run({bf16, b, n / b, 8, 8, 128, 2, automatic, ""}, kKernels);
    for (int64_t d : {64, 128}) run({f16, 1, n, 8, 8, d, 2, automatic, ""}, kKernels);
  }
  for (const auto &[name, type] : {std::pair{"sweep", bf16}, std::pair{"sweep-f16", f16}}) {
    if (!section(name)) continue;
    for (int64_t d : {64, 128})
      for (int64_t t = n / 64; t <= 4 * n; t *= 2) {
        const int64_t b = std::max<int64_t>(1, n / t);
        run({type, b, t, 8, 8, d, 2, attention, " attention"});
        run({type, b, t, 8, 8, d, 2, chunked, " chunked"});
        run({type, b, t, 8, 8, d, 2, automatic, " planner"});
      }
  }
  if (section("other")) {
    run({f16, 1, n, 8, 8, 64, 2, automatic, ""});
    run({f16, 1, n, 8, 8, 128, 2, automatic, ""});
    run({f16, 16, n / 16, 8, 8, 64, 2, attention, " attention"});
    run({f16, 64, n / 64, 8, 8, 64, 2, attention, " attention"});
    run({f16, 16, n / 16, 8, 8, 64, 4, attention, " attention"});
    run({f16, 16, n / 16, 8, 8, 128, 2, attention, " attention"});
    run({f16, 1, n, 8, 8, 64, 1, automatic, ""});
    run({f16, 64, n / 64, 8, 8, 64, 1, automatic, ""});
    run({f32, 1, n, 8, 8, 64, 2, automatic, ""});
    run({bf16, 1, n, 8, 2, 64, 2, automatic, ""});
    run({bf16, 16, n / 16, 8, 8, 64, 4, attention, " attention"});
  }
  return csv != nullptr && std::fclose(csv) != 0 ? 1 : 0;
}
