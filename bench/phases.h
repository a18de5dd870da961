// SPDX-License-Identifier: Apache-2.0
// The phases of the CPU's forward, one at a time, with a clock between them. Unlike the rest of the benchmarks
// this looks inside the library.
#pragma once

#include "power_attention.h"

namespace bench {

struct Phases {
  double pack;    // k, v and gates into the kernels' layouts
  double state;   // the output's query of the state
  double chunk;   // the output's pairs inside the chunk, q's packing and y's storing
  double update;  // the next state, with AMX its bfloat16 image too
};

// Seconds of one forward, by phase: gated, no user states, nothing saved, float32 or 16-bit data. False where
// the plan runs other kernels.
bool forward_phases(const powerattn_plan *plan, const powerattn_forward_args &args, Phases *out);

}  // namespace bench
