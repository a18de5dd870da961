// SPDX-License-Identifier: Apache-2.0
// The last row of the CPU's table: runs everything, slowly.
#include "kernels/cpu/reference.h"

#include "backend.h"
#include "status.h"

namespace powerattn {
namespace {

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  if (pins.form == POWERATTN_FORM_CHUNKED) {
    *why = "the reference has the attention form only";
    return false;
  }
  if (op == Op::kForward || op == Op::kBackward) {
    // Two products of t^2/2 weights forward and five backward, at about 1e9 multiply-adds a second.
    const double t = static_cast<double>(p.max_seq_len), heads = static_cast<double>(p.heads_q * p.sequences);
    const double seconds = heads * t * t / 2 * static_cast<double>(p.head_dim + p.value_dim) / 1e9;
    tiling->form = Form::kAttention;
    tiling->chunk = p.seq_len;
    tiling->forward_s = seconds;
    tiling->backward_s = 2.5 * seconds;
  }
  return true;
}

Sizes sizes(const Problem &p, const Tiling &) { return reference::sizes(p); }

void describe(const Problem &, const Tiling &, std::string *text) {
  text->append("  kernel: plain loops in float64, one thread; for checking, not for speed\n");
}

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  reference::forward(plan.problem, args);
  return POWERATTN_OK;
}

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  reference::backward(plan.problem, args);
  return POWERATTN_OK;
}

powerattn_status step(const powerattn_plan &plan, const powerattn_step_args &args) {
  reference::step(plan.problem, args);
  return POWERATTN_OK;
}

powerattn_status summary(const powerattn_plan &plan, const powerattn_summary_args &args) {
  reference::summary(plan.problem, args);
  return POWERATTN_OK;
}

powerattn_status summary_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &args) {
  reference::summary_reverse(plan.problem, args);
  return POWERATTN_OK;
}

}  // namespace

const Implementation &reference_implementation() {
  static constexpr Implementation implementation = {"cpu.reference", choose, sizes,   describe,       forward,
                                                    backward,        step,   summary, summary_reverse};
  return implementation;
}

}  // namespace powerattn
