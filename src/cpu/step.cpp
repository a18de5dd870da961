// SPDX-License-Identifier: Apache-2.0
// The row of the CPU's table for the state step.
#include "kernels/cpu/step.h"

#include <cinttypes>
#include <cstdio>

#include "backend.h"
#include "run.h"

namespace powerattn {
namespace {

bool choose(Op op, const Problem &p, const Pins &, Tiling *, std::string *why) {
  if (op != Op::kStep) {
    *why = "only steps";
    return false;
  }
  start_threads(p.threads);
  return true;
}

Sizes sizes(const Problem &p, const Tiling &) {
  Sizes s;
  s.step = step_workspace(p);
  return s;
}

void describe(const Problem &p, const Tiling &, std::string *text) {
  const StepShape s = step_shape(p);
  char line[400];
  std::snprintf(line, sizeof line,
                "  %s; %" PRId64 " blocks of %" PRId64
                " rows: 64 KiB of state stay in L2 for all tokens and heads\n"
                "  phi of %" PRId64 " tokens at once: 128 KiB per thread; the state is read and written once\n",
                cpu::chosen_isa().f32.name, s.blocks, s.rows, s.batch);
  text->append(line);
}

powerattn_status step(const powerattn_plan &plan, const powerattn_step_args &args) {
  ::powerattn::step(plan.problem, args, cpu::chosen_isa(), parallel(plan.problem.threads));
  return POWERATTN_OK;
}

}  // namespace

const Implementation &step_implementation() {
  static constexpr Implementation implementation = {"cpu.step", choose, sizes,   describe, nullptr,
                                                    nullptr,    step,   nullptr, nullptr};
  return implementation;
}

}  // namespace powerattn
