// SPDX-License-Identifier: Apache-2.0
// The CPU backend against this machine's own matrix multiply and copy bandwidth, through the C API only.
//
//   bench_cpu [--threads N] [--only rate,amx,amx-phases,types,forms,scaling,length,step] [--seconds S]
//             [--csv FILE] [--clock wall|cpu]
//
// Every ratio is taken in one run, the two sides alternating, so that other load hits both. Operations are the
// useful ones: exact D, causal halves, no padding, no recomputation:
//   forward   4 D (e+1) + (c+1)(d+e)      per token and head, chunked; attention form (t+1)(d+e)
//   backward  8 D (e+1) + (c+1)(3d+2e)      the state terms less the one chunk in t / c that has none
// c is the plan's chunk. A line with a target says whether it was met; what a machine cannot run has a line
// too.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "phases.h"
#include "power_attention.h"
#include "yardsticks.h"

using bench::now;

namespace {

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<long>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

[[noreturn]] void die(const char *what) {
  std::fprintf(stderr, "bench_cpu: %s: %s\n", what, powerattn_last_error());
  std::exit(1);
}
void ok(powerattn_status status, const char *what) {
  if (status != POWERATTN_OK) die(what);
}

// ---- One problem ---------------------------------------------------------------------------------------

struct Shape {
  int32_t dtype = POWERATTN_FLOAT32;
  int64_t b = 1, t = 0, h = 8, d = 64;
  int32_t p = 2;
  int32_t form = POWERATTN_FORM_AUTO;
  bool gated = true;
};

size_t size_of(int32_t dtype) { return dtype == POWERATTN_FLOAT64 ? 8 : dtype == POWERATTN_FLOAT32 ? 4 : 2; }

class Problem {
 public:
  Problem(const Shape &shape, int threads, bool backward) : s_(shape) {
    powerattn_desc desc = {};
    desc.struct_size = sizeof desc;
    desc.dtype = s_.dtype;
    desc.degree = s_.p;
    desc.form = s_.form;
    desc.batch = s_.b;
    desc.seq_len = s_.t;
    desc.heads_q = desc.heads_kv = s_.h;
    desc.head_dim = s_.d;
    desc.num_threads = threads;
    if (s_.p % 2 == 1) desc.flags = POWERATTN_UNNORMALIZED;
    ok(powerattn_plan_create(&desc, &plan_), "powerattn_plan_create");
    info_.struct_size = sizeof info_;
    ok(powerattn_plan_query(plan_, &info_), "powerattn_plan_query");
    std::mt19937 random(1);
    const size_t n = elements();
    for (auto *x : {&q_, &k_, &v_, &dy_}) fill(n, &random, x);
    for (auto *x : {&y_, &dq_, &dk_, &dv_}) {
      if (x == &y_ || backward) x->assign(n * size_of(s_.dtype), 0);
    }
    const size_t statistics = static_cast<size_t>(s_.b * s_.t * s_.h) * (s_.dtype == POWERATTN_FLOAT64 ? 2 : 1);
    gate_.assign(statistics, -0.01f);  // as float64 pairs of them are small negative numbers too
    norm_ = d_gate_ = gate_;
    if (backward && info_.saved_bytes > 0) saved_ = aligned(info_.saved_bytes);
    const uint64_t bytes =
        backward ? std::max(info_.workspace_backward, info_.workspace_forward) : info_.workspace_forward;
    workspace_ = aligned(bytes);
  }
  ~Problem() { powerattn_plan_destroy(plan_); }
  Problem(const Problem &) = delete;

  double forward(bool save) {
    const powerattn_forward_args a = forward_args(save);
    const double start = now();
    ok(powerattn_forward(plan_, &a), "powerattn_forward");
    return now() - start;
  }

  double backward(bool use_saved) {
    powerattn_backward_args a = {};
    a.struct_size = sizeof a;
    a.q = tensor(&q_);
    a.k = tensor(&k_);
    a.v = tensor(&v_);
    a.y = tensor(&y_);
    a.d_y = tensor(&dy_);
    a.d_q = tensor(&dq_);
    a.d_k = tensor(&dk_);
    a.d_v = tensor(&dv_);
    a.row_norm = {norm_.data(), s_.t * s_.h, s_.h, 1};
    if (s_.gated) {
      a.log_g = {gate_.data(), s_.t * s_.h, s_.h, 1};
      a.d_log_g = {d_gate_.data(), s_.t * s_.h, s_.h, 1};
    }
    if (use_saved && saved_ != nullptr) {
      a.saved = saved_.get();
      a.saved_bytes = info_.saved_bytes;
    }
    a.workspace = workspace_.get();
    a.workspace_bytes = a.saved != nullptr ? info_.workspace_backward_saved : info_.workspace_backward;
    const double start = now();
    ok(powerattn_backward(plan_, &a), "powerattn_backward");
    return now() - start;
  }

  bool phases(bench::Phases *out) { return bench::forward_phases(plan_, forward_args(false), out); }

  double state_flops() const { return heads_tokens() * 2 * state(); }  // of the query, and of the update
  double chunk_flops() const { return heads_tokens() * pairs() * 2 * d(); }
  double forward_flops() const { return heads_tokens() * (4 * state() + pairs() * 2 * d()); }
  double backward_flops() const { return heads_tokens() * (8 * state() + pairs() * 5 * d()); }
  const powerattn_plan_info &info() const { return info_; }
  std::string kernels() const {
    size_t needed = 0;
    powerattn_plan_describe(plan_, nullptr, 0, &needed);
    std::string text(needed, '\0');
    powerattn_plan_describe(plan_, &text[0], text.size(), nullptr);
    const size_t at = text.find("forward cpu.");
    return at == std::string::npos ? "?" : text.substr(at + 8, text.find(',', at) - at - 8);
  }
  std::string name() const {
    char text[128];
    const char *dtype = s_.dtype == POWERATTN_FLOAT32    ? "f32"
                        : s_.dtype == POWERATTN_BFLOAT16 ? "bf16"
                        : s_.dtype == POWERATTN_FLOAT16  ? "f16"
                                                         : "f64";
    std::snprintf(text, sizeof text, "%s b%ld t%ld h%ld d%ld p%d%s %s", dtype, static_cast<long>(s_.b),
                  static_cast<long>(s_.t), static_cast<long>(s_.h), static_cast<long>(s_.d), s_.p,
                  s_.gated ? " gated" : "",
                  info_.form == POWERATTN_FORM_ATTENTION
                      ? "attn"
                      : ("c" + std::to_string(static_cast<long>(info_.chunk_size))).c_str());
    return text;
  }

 private:
  powerattn_forward_args forward_args(bool save) {
    powerattn_forward_args a = {};
    a.struct_size = sizeof a;
    a.q = tensor(&q_);
    a.k = tensor(&k_);
    a.v = tensor(&v_);
    a.y = tensor(&y_);
    a.row_norm = {norm_.data(), s_.t * s_.h, s_.h, 1};
    if (s_.gated) a.log_g = {gate_.data(), s_.t * s_.h, s_.h, 1};
    if (save && saved_ != nullptr) {
      a.saved = saved_.get();
      a.saved_bytes = info_.saved_bytes;
    }
    a.workspace = workspace_.get();
    a.workspace_bytes = info_.workspace_forward;
    return a;
  }
  size_t elements() const { return static_cast<size_t>(s_.b * s_.t * s_.h * s_.d); }
  double d() const { return static_cast<double>(s_.d); }
  double heads_tokens() const { return static_cast<double>(s_.b * s_.t * s_.h); }
  double pairs() const {
    return static_cast<double>(info_.form == POWERATTN_FORM_ATTENTION ? s_.t : info_.chunk_size) + 1;
  }
  double state() const {
    if (info_.form == POWERATTN_FORM_ATTENTION) return 0;
    // The first chunk has no state to query and the last none to make: one chunk in all does no state work.
    const double chunks = std::ceil(static_cast<double>(s_.t) / static_cast<double>(info_.chunk_size));
    return static_cast<double>(info_.state_rows) * (d() + (s_.p % 2 == 0 ? 1 : 0)) * (1 - 1 / chunks);
  }
  powerattn_tensor tensor(std::vector<char> *x) const {
    return {x->data(), s_.t * s_.h * s_.d, s_.h * s_.d, s_.d};
  }
  void fill(size_t n, std::mt19937 *random, std::vector<char> *to) const {
    to->resize(n * size_of(s_.dtype));
    for (size_t i = 0; i < n; ++i) {
      const float x = static_cast<float>(static_cast<int32_t>((*random)())) * 8e-10f;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint16_t half =
          static_cast<uint16_t>(0x3000 | (bits >> 16 & 0x8bff));  // a normal fp16 of that sign
      const uint16_t brain = static_cast<uint16_t>(bits >> 16);
      const double wide = x;
      switch (s_.dtype) {
        case POWERATTN_FLOAT32:
          std::memcpy(to->data() + 4 * i, &x, 4);
          break;
        case POWERATTN_FLOAT16:
          std::memcpy(to->data() + 2 * i, &half, 2);
          break;
        case POWERATTN_BFLOAT16:
          std::memcpy(to->data() + 2 * i, &brain, 2);
          break;
        default:
          std::memcpy(to->data() + 8 * i, &wide, 8);
      }
    }
  }

  struct Free {
    void operator()(char *p) const { std::free(p); }
  };
  static std::unique_ptr<char, Free> aligned(uint64_t bytes) {
    std::unique_ptr<char, Free> p(static_cast<char *>(std::aligned_alloc(256, (bytes + 511) / 256 * 256)));
    if (p == nullptr) die("out of memory");
    return p;
  }
  Shape s_;
  powerattn_plan *plan_ = nullptr;
  powerattn_plan_info info_ = {};
  std::vector<char> q_, k_, v_, y_, dy_, dq_, dk_, dv_;
  std::vector<float> gate_, norm_, d_gate_;
  std::unique_ptr<char, Free> saved_, workspace_;
};

// ---- The report ----------------------------------------------------------------------------------------

struct Options {
  int threads = 0;
  double seconds = 3;  // per line
  std::string only, csv;
  bool wants(const std::string &part) const {
    return only.empty() || ("," + only + ",").find("," + part + ",") != std::string::npos;
  }
};

class Report {
 public:
  explicit Report(const std::string &csv) {
    if (csv.empty()) return;
    file_.open(csv);
    file_ << "machine,part,case,threads,seconds,value,unit,yardstick,ratio,target\n";
  }
  void machine(const std::string &text) {
    machine_ = text;
    std::replace(machine_.begin(), machine_.end(), ',', ';');
    std::printf("machine: %s\n", text.c_str());
  }
  // `target` is the least ratio that is wanted, negative the greatest; 0: none.
  void line(const char *part, const std::string &name, int threads, double seconds, double value,
            const char *unit, double yardstick, double ratio, double target = 0) {
    std::printf("%-8s %-52s %2d thr %10.3f ms %9.2f %-9s of %8.2f = %5.3f", part, name.c_str(), threads,
                seconds * 1e3, value, unit, yardstick, ratio);
    if (target != 0) {
      const bool met = target > 0 ? ratio >= target : ratio <= -target;
      std::printf("  target %s %.2f %s", target > 0 ? ">=" : "<=", std::fabs(target), met ? "met" : "MISSED");
    }
    std::printf("\n");
    std::fflush(stdout);
    if (file_.is_open()) {
      file_ << machine_ << ',' << part << ",\"" << name << "\"," << threads << ',' << seconds << ',' << value
            << ',' << unit << ',' << yardstick << ',' << ratio << ',' << target << std::endl;
    }
  }
  void not_available(const char *part, const std::string &name, int threads, const std::string &why) {
    std::printf("%-8s %-52s %2d thr not available: %s\n", part, name.c_str(), threads, why.c_str());
    std::fflush(stdout);
    if (file_.is_open()) {
      std::string reason = why;
      std::replace(reason.begin(), reason.end(), ',', ';');
      file_ << machine_ << ',' << part << ",\"" << name << "\"," << threads << ",,,not available: " << reason
            << ",,," << std::endl;
    }
  }

 private:
  std::ofstream file_;
  std::string machine_;
};

struct Sample {
  double seconds, value, yardstick, ratio;
};

// Alternates yardstick and subject until the time is used; medians, the ratio being that of each pair.
Sample alternate(double limit, const std::function<double()> &yardstick, const std::function<double()> &subject,
                 double work) {
  std::vector<double> seconds, yards, ratios;
  subject();  // warm: pages, caches, threads
  const double start = now();
  do {
    const double before = yardstick(), s = subject(), after = yardstick();
    seconds.push_back(s);
    yards.push_back((before + after) / 2);
    ratios.push_back(work / s / yards.back());
  } while (now() - start < limit || seconds.size() < 3);
  return {median(seconds), work / median(seconds), median(yards), median(ratios)};
}

// forward_target, backward_target: of the ratio to sgemm, 0 where none is set.
void rate(const Options &o, Report *report, bench::Sgemm *sgemm, const char *part, const Shape &shape,
          double forward_target = 0, double backward_target = 0) {
  Problem problem(shape, o.threads, true);
  const auto yard = [&] { return std::max(sgemm->rate(o.threads), 1.0); };
  Sample s = alternate(
      o.seconds, yard, [&] { return problem.forward(false); }, problem.forward_flops());
  report->line(part, "fwd " + problem.name(), o.threads, s.seconds, s.value * 1e-9, "GFLOP/s",
               s.yardstick * 1e-9, s.ratio, forward_target);
  problem.forward(true);
  if (problem.info().saved_bytes > 0) {
    s = alternate(
        o.seconds, yard, [&] { return problem.backward(true); }, problem.backward_flops());
    report->line(part, "bwd " + problem.name() + " saved", o.threads, s.seconds, s.value * 1e-9, "GFLOP/s",
                 s.yardstick * 1e-9, s.ratio, backward_target);
  }
  s = alternate(
      o.seconds, yard, [&] { return problem.backward(false); }, problem.backward_flops());
  report->line(part, "bwd " + problem.name(), o.threads, s.seconds, s.value * 1e-9, "GFLOP/s",
               s.yardstick * 1e-9, s.ratio, backward_target);
}

// bfloat16 on AMX against float32 by the same library, and against oneDNN's bfloat16 multiply.
void amx(const Options &o, Report *report, const Shape &shape) {
  Shape low = shape;
  low.dtype = POWERATTN_BFLOAT16;
  Problem single(shape, o.threads, false), brain(low, o.threads, false);
  const std::string name = "fwd " + brain.name(), kernels = brain.kernels();
  if (kernels != "cpu.amx") {
    report->not_available("amx", name + " against f32", o.threads, "no AMX here (kernels " + kernels + ")");
  } else {
    const Sample s = alternate(
        o.seconds, [&] { return single.forward_flops() / single.forward(false); },
        [&] { return brain.forward(false); }, brain.forward_flops());
    report->line("amx", name + " against f32", o.threads, s.seconds, s.value * 1e-9, "GFLOP/s",
                 s.yardstick * 1e-9, s.ratio, 3.0);
  }
  bench::Bfloat16Multiply multiply(o.threads);
  if (!multiply.found()) {
    report->not_available("amx", name + " against bf16 multiply", o.threads, multiply.why());
    return;
  }
  const Sample s = alternate(
      o.seconds, [&] { return multiply.rate(); }, [&] { return brain.forward(false); }, brain.forward_flops());
  report->line("amx", name + " against bf16 multiply", o.threads, s.seconds, s.value * 1e-9, "GFLOP/s",
               s.yardstick * 1e-9, s.ratio);
}

// Where the forward's time goes, for float32 and for bfloat16: the value is the rate of the phase's useful
// work, the ratio its share of all phases. The last line is the whole call, which has fewer barriers.
void amx_phases(const Options &o, Report *report, const Shape &shape) {
  Shape low = shape;
  low.dtype = POWERATTN_BFLOAT16;
  for (const Shape &one : {shape, low}) {
    Problem problem(one, o.threads, false);
    const std::string name = problem.kernels() + " " + problem.name() + " ";
    bench::Phases first;
    if (!problem.phases(&first)) {
      report->not_available("phases", name, o.threads, "other kernels");
      continue;
    }
    struct Phase {
      const char *name;
      double bench::Phases::*seconds;
      double flops;
      std::vector<double> samples;
    };
    Phase phases[] = {{"pack k, v, gates", &bench::Phases::pack, 0, {}},
                      {"output: state", &bench::Phases::state, problem.state_flops(), {}},
                      {"output: chunk", &bench::Phases::chunk, problem.chunk_flops(), {}},
                      {"update", &bench::Phases::update, problem.state_flops(), {}}};
    std::vector<double> whole;
    const double start = now();
    do {
      bench::Phases sample;
      problem.phases(&sample);
      for (Phase &phase : phases) phase.samples.push_back(sample.*phase.seconds);
      whole.push_back(problem.forward(false));
    } while (now() - start < o.seconds || whole.size() < 3);
    double sum = 0;
    for (const Phase &phase : phases) sum += median(phase.samples);
    for (const Phase &phase : phases) {
      const double s = median(phase.samples);
      report->line("phases", name + phase.name, o.threads, s, s > 0 ? phase.flops / s * 1e-9 : 0, "GFLOP/s",
                   sum * 1e3, s / sum);
    }
    const double s = median(whole);
    report->line("phases", name + "whole", o.threads, s, problem.forward_flops() / s * 1e-9, "GFLOP/s",
                 sum * 1e3, s / sum);
  }
}

// One thread against more: the ratio is the speed-up.
void scaling(const Options &o, Report *report, const Shape &shape, int threads, double target) {
  Problem one(shape, 1, false), more(shape, threads, false);
  const std::string name = "fwd " + more.name() + " against 1 thread";
  if (static_cast<int>(std::thread::hardware_concurrency()) < threads) {
    report->not_available("scaling", name, threads, "fewer cores");
    return;
  }
  const Sample s = alternate(
      o.seconds * 2, [&] { return 1 / one.forward(false); }, [&] { return more.forward(false); }, 1.0);
  report->line("scaling", name, threads, s.seconds, s.value, "calls/s", s.yardstick, s.ratio, target);
}

// Nanoseconds per token and head against those at the shortest length.
void lengths(const Options &o, Report *report) {
  Shape shape;
  shape.h = 2;
  shape.t = 8192;
  shape.form = POWERATTN_FORM_CHUNKED;
  Problem base(shape, o.threads, false);
  const double base_tokens = static_cast<double>(shape.t * shape.h);
  for (shape.t = 8192; shape.t <= 262144; shape.t *= 2) {
    Problem problem(shape, o.threads, false);
    const double tokens = static_cast<double>(shape.t * shape.h);
    const Sample s = alternate(
        o.seconds / 2, [&] { return base_tokens / base.forward(false); },
        [&] { return problem.forward(false); }, tokens);
    report->line("length", "fwd " + problem.name(), o.threads, s.seconds, 1e9 / s.value, "ns/token",
                 1e9 / s.yardstick, 1 / s.ratio, -1.1);
  }
}

// A decoding step over states larger than the caches, against copying as many bytes.
void step(const Options &o, Report *report, int64_t batch, int64_t heads, int64_t dim) {
  powerattn_desc desc = {};
  desc.struct_size = sizeof desc;
  desc.dtype = POWERATTN_FLOAT32;
  desc.degree = 2;
  desc.flags = POWERATTN_USE_STATE;
  desc.batch = batch;
  desc.seq_len = 1;
  desc.heads_q = desc.heads_kv = heads;
  desc.head_dim = dim;
  desc.num_threads = o.threads;
  powerattn_plan *plan = nullptr;
  ok(powerattn_plan_create(&desc, &plan), "powerattn_plan_create");
  powerattn_plan_info info = {};
  info.struct_size = sizeof info;
  ok(powerattn_plan_query(plan, &info), "powerattn_plan_query");
  const int64_t rows = info.state_rows;
  std::vector<float> s(static_cast<size_t>(batch * heads * rows * dim), 0.01f);
  std::vector<float> z(static_cast<size_t>(batch * heads * rows), 0.01f);
  std::vector<float> q(static_cast<size_t>(batch * heads * dim), 0.1f), k = q, v = q, y = q;
  std::vector<float> gate(static_cast<size_t>(batch * heads), -0.01f);
  std::vector<char> workspace(info.workspace_step + 256);
  const powerattn_tensor layout = {nullptr, heads * dim, heads * dim, dim};
  powerattn_step_args a = {};
  a.struct_size = sizeof a;
  a.q = a.k = a.v = a.y = layout;
  a.q.data = q.data();
  a.k.data = k.data();
  a.v.data = v.data();
  a.y.data = y.data();
  a.log_g = {gate.data(), heads, heads, 1};
  a.state = {s.data(), z.data(), heads * rows * dim, rows * dim, heads * rows, rows};
  a.num_slots = batch;
  a.workspace = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
  a.workspace_bytes = info.workspace_step;
  const double bytes = 2.0 * static_cast<double>(info.state_bytes);
  std::vector<char> from(info.state_bytes, 1), to(info.state_bytes, 2);
  const Sample sample = alternate(
      o.seconds, [&] { return bench::copy_rate(o.threads, &from, &to); },
      [&] {
        const double start = now();
        ok(powerattn_step(plan, &a), "powerattn_step");
        return now() - start;
      },
      bytes);
  char name[64];
  std::snprintf(name, sizeof name, "step f32 b%ld h%ld d%ld p2 (states %.0f MB)", static_cast<long>(batch),
                static_cast<long>(heads), static_cast<long>(dim), static_cast<double>(info.state_bytes) * 1e-6);
  report->line("step", name, o.threads, sample.seconds, sample.value * 1e-9, "GB/s", sample.yardstick * 1e-9,
               sample.ratio, 0.8);
  powerattn_plan_destroy(plan);
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

}  // namespace

int main(int argc, char **argv) {
  Options o;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--threads") o.threads = std::atoi(argv[i + 1]);
    if (key == "--only") o.only = argv[i + 1];
    if (key == "--seconds") o.seconds = std::atof(argv[i + 1]);
    if (key == "--csv") o.csv = argv[i + 1];
    if (key == "--clock") bench::cpu_clock = std::strcmp(argv[i + 1], "cpu") == 0;
  }
  if (o.threads <= 0) o.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  bench::Sgemm sgemm;
  if (!sgemm.found()) std::printf("no OpenBLAS found: ratios against it are meaningless\n");
  Report report(o.csv);
  Shape shape;
  shape.t = 256;
  report.machine(cpu_model() + ", " + std::to_string(std::thread::hardware_concurrency()) + " cores, kernels " +
                 Problem(shape, o.threads, false).kernels());

  if (o.wants("rate")) {
    shape.t = 16384;
    rate(o, &report, &sgemm, "rate", shape, 0.80, 0.65);
  }
  if (o.wants("amx")) {
    shape.t = 16384;
    amx(o, &report, shape);
  }
  if (o.wants("amx-phases")) {
    shape.t = 16384;
    amx_phases(o, &report, shape);
  }
  if (o.wants("types")) {
    shape.t = 8192;
    for (const int32_t dtype : {POWERATTN_BFLOAT16, POWERATTN_FLOAT16, POWERATTN_FLOAT64}) {
      shape.dtype = dtype;
      rate(o, &report, &sgemm, "types", shape);
    }
    shape.dtype = POWERATTN_FLOAT32;
  }
  if (o.wants("forms")) {
    const struct {
      int64_t t, d;
      int32_t p, form;
    } forms[] = {{2048, 64, 2, POWERATTN_FORM_ATTENTION}, {4096, 64, 4, POWERATTN_FORM_ATTENTION},
                 {8192, 32, 2, POWERATTN_FORM_CHUNKED},   {4096, 128, 2, POWERATTN_FORM_CHUNKED},
                 {8192, 16, 4, POWERATTN_FORM_CHUNKED},   {16384, 64, 1, POWERATTN_FORM_CHUNKED}};
    for (const auto &f : forms) {
      Shape x;
      x.t = f.t;
      x.d = f.d;
      x.p = f.p;
      x.form = f.form;
      rate(o, &report, &sgemm, "forms", x);
    }
  }
  if (o.wants("scaling")) {
    shape.t = 8192;
    scaling(o, &report, shape, 2, 1.8);
    if (o.threads > 2) scaling(o, &report, shape, o.threads, 0);
  }
  if (o.wants("length")) lengths(o, &report);
  if (o.wants("step")) {
    step(o, &report, 32, 8, 64);
    step(o, &report, 8, 8, 128);
  }
  return 0;
}
