// SPDX-License-Identifier: Apache-2.0
// What a backend offers the planner: a list of implementations, fastest first, and the operations on states
// that a device performs. src/ decides through this interface and never computes.
#pragma once

#include <cstdint>
#include <string>

#include "problem.h"

struct powerattn_plan;

namespace powerattn {

enum class Op { kForward, kBackward, kStep, kSummary };

// What the planner pinned; 0 = free. A chunk comes with the chunked form only.
struct Pins {
  int32_t form = POWERATTN_FORM_AUTO;
  int64_t chunk = 0;
};

// One way to run some of the operations on one device type. The table that holds them is ordered, fastest
// first and reference last. "Is it supported?" and "which one runs?" are both `choose`.
struct Implementation {
  const char *name;  // as describe prints it, e.g. "cpu.avx2", "cuda.sm90", "cuda.generic"

  // True when it can run `op` on `p`, with *tiling filled for forward and backward; else *why says why not.
  bool (*choose)(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why);
  // Workspace and saved bytes for the operations it was chosen for.
  Sizes (*sizes)(const Problem &p, const Tiling &tiling);
  // Appends kernels, tile sizes with the reason beside each number, and the costs of the alternatives.
  void (*describe)(const Problem &p, const Tiling &tiling, std::string *text);

  // Arguments are validated. On failure they report through fail() (status.h).
  powerattn_status (*forward)(const powerattn_plan &, const powerattn_forward_args &);
  powerattn_status (*backward)(const powerattn_plan &, const powerattn_backward_args &);
  powerattn_status (*step)(const powerattn_plan &, const powerattn_step_args &);
  powerattn_status (*summary)(const powerattn_plan &, const powerattn_summary_args &);
  powerattn_status (*summary_reverse)(const powerattn_plan &, const powerattn_summary_reverse_args &);
};

// A device type: what it is, and what it does with states besides computing them.
struct Backend {
  const char *name;                              // "cpu", "cuda"
  const Implementation *const *implementations;  // ordered, null-terminated
  // 0 and OK where there is none.
  powerattn_status (*device_count)(int32_t *count);
  // Checks that the device can be used and tells the memory that states may take.
  powerattn_status (*open)(int32_t device_index, uint64_t *memory_bytes);
  // OK if `pointer` is memory of this device (CUDA: a device pointer of this plan's device).
  powerattn_status (*check_pointer)(const Problem &, const void *pointer, const char *argument);
  powerattn_status (*compose)(const powerattn_plan &, const powerattn_compose_args &);
  powerattn_status (*convert)(const powerattn_plan &, const powerattn_convert_args &);
  // Payload of pack/unpack between device states and host memory behind the header; `dtype` is the packed one.
  powerattn_status (*pack)(const powerattn_plan &, const powerattn_pack_args &, Dtype dtype, void *payload);
  powerattn_status (*unpack)(const powerattn_plan &, const powerattn_pack_args &, Dtype dtype,
                             const void *payload);
};

const Backend &cpu_backend();
const Backend *cuda_backend();  // nullptr in a build without CUDA

}  // namespace powerattn

// The plan: immutable after powerattn_plan_create.
struct powerattn_plan {
  powerattn::Problem problem;
  powerattn::Tiling tiling;  // shared by forward and backward
  powerattn::Sizes sizes;
  const powerattn::Backend *backend = nullptr;
  // Null: this plan cannot run the operation; the refusal says why.
  const powerattn::Implementation *forward = nullptr;
  const powerattn::Implementation *backward = nullptr;
  const powerattn::Implementation *step = nullptr;
  const powerattn::Implementation *summary = nullptr;
  std::string forward_refusal;
  std::string backward_refusal;
  std::string step_refusal;
  std::string summary_refusal;
  std::string text;  // powerattn_plan_describe
};
