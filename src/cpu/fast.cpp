// SPDX-License-Identifier: Apache-2.0
// The fast implementation of the CPU's table: what it takes, what it needs, how it describes itself.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "passes.h"
#include "run.h"
#include "threads.h"
#include "tiling.h"

namespace powerattn {
namespace cpu {
namespace {

#if defined(POWERATTN_EMULATE_ISA)
constexpr bool kEmulated = true;
#elif defined(__x86_64__)
constexpr bool kEmulated = false;
#endif

#if defined(POWERATTN_HAVE_AMX)
// AMX needs the operating system twice: to save the tiles (XCR0) and to let this process use them.
bool amx_allowed() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = (d >> 24 & 1) != 0, bf16_tile = (d >> 22 & 1) != 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool bf16 = (a >> 5 & 1) != 0;
  if (!tile || !bf16_tile || !bf16 || !__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The widest set that the processor has. POWERATTN_CPU_ISA may name a narrower one, for tests; where the wide
// ones are emulated, every processor has them, but they run when asked for only.
const fast::Isa &detect() {
#if defined(__x86_64__)
  const char *asked = std::getenv("POWERATTN_CPU_ISA");
  static const char *const names[] = {"baseline", "avx2", "avx512", "amx"};
  int widest = kEmulated ? 1 : 3;
  for (int i = 0; i < 4; ++i) {
    if (asked != nullptr && std::strcmp(asked, names[i]) == 0) widest = i;
  }
  __builtin_cpu_init();
#if defined(POWERATTN_HAVE_AMX)
  if (widest >= 3 && (kEmulated || (has_avx512() && amx_allowed()))) return amx::isa();
#endif
  if (widest >= 2 && (kEmulated || has_avx512())) return avx512::isa();
  // Every processor with AVX2 has F16C.
  if (widest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::isa();
#endif
  return baseline::isa();
}

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  if (op == Op::kStep) {
    *why = "a step is bound by memory and has its own kernel";
    return false;
  }
  if ((p.use_state || op == Op::kSummary) && p.state_dtype == Dtype::kBfloat16) {
    *why = "bfloat16 states are for steps";
    return false;
  }
  if (op == Op::kSummary) {
    if (p.state_bytes > p.state_limit) {
      *why = "the states do not fit";
      return false;
    }
  } else if (!choose_tiling(p, pins, tiling, why)) {
    return false;
  }
  start_threads(p.threads);
  return true;
}

template <class T>
uint64_t workspace(const Problem &p, const Tiling &tiling, Pass pass) {
  const fast::Kernels<T> &kernels = chosen_kernels<T>();
  const Geometry g = geometry(p, tiling, pass, kernels.low);
  Carver carver(nullptr);
  carve(p, g, make_call<T>(p, g, kernels, pass), kernels, pass, &carver);
  return carver.used();
}

template <class T>
Sizes sizes_of(const Problem &p, const Tiling &tiling) {
  Sizes s;
  s.forward = workspace<T>(p, tiling, Pass::kForward);
  s.backward = workspace<T>(p, tiling, Pass::kBackward);
  s.backward_saved = workspace<T>(p, tiling, Pass::kBackwardSaved);
  const bool states = p.state_bytes <= p.state_limit;
  if (states) s.summary = workspace<T>(p, tiling, Pass::kSummary);
  const Geometry g = geometry(p, tiling, Pass::kForward, chosen_kernels<T>().low);
  if (tiling.form == Form::kChunked && g.chunks > 1) {
    s.saved = static_cast<uint64_t>(g.saved_slots * p.heads_kv *
                                    state_elements(make_call<T>(p, g, chosen_kernels<T>(), Pass::kForward))) *
              sizeof(T);
  }
  return s;
}

Sizes sizes(const Problem &p, const Tiling &tiling) {
  return p.dtype == Dtype::kFloat64 ? sizes_of<double>(p, tiling) : sizes_of<float>(p, tiling);
}

void describe(const Problem &p, const Tiling &tiling, std::string *text) {
  const bool wide = p.dtype == Dtype::kFloat64;
  const Geometry g = geometry(p, tiling, Pass::kForward, !wide && chosen_isa().f32.low);
  const int mr = wide ? chosen_isa().f64.mr : chosen_isa().f32.mr;
  const int nr = wide ? chosen_isa().f64.nr : chosen_isa().f32.nr;
  char line[512];
  char schedule[128];
  std::snprintf(schedule, sizeof(schedule),
                "%" PRId64 " of %" PRId64 " streams at once: %" PRId64 " tiles per chunk fill %d threads",
                g.wave, g.streams, g.tiles * g.groups * g.wave, p.threads);
  std::snprintf(
      line, sizeof(line),
      "  microkernel %d x %d %s: all but a few vector registers hold sums; phi is built while packing\n"
      "  row tile %" PRId64
      " tokens: each strip of the state in L1 serves all of them\n"
      "  %s\n"
      "  rate assumed %.0f GFLOP/s per thread\n",
      mr, nr, wide ? "float64" : "float32", g.tile, schedule, rate(p) * 1e-9);
  text->append(line);
}

}  // namespace

const fast::Isa &chosen_isa() {
  static const fast::Isa &isa = detect();
  return isa;
}

}  // namespace cpu

const Implementation &fast_implementation() {
  static const char *const name = [] {
    static char text[32];
    std::snprintf(text, sizeof(text), "cpu.%s", cpu::chosen_isa().f32.name);
    return text;
  }();
  static const Implementation implementation = {name,          cpu::choose,  cpu::sizes,
                                                cpu::describe, cpu::forward, cpu::backward,
                                                nullptr,       cpu::summary, cpu::summary_reverse};
  return implementation;
}

}  // namespace powerattn
