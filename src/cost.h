// SPDX-License-Identifier: Apache-2.0
// The part of the cost model that every backend shares: operations and bytes of each form, exact D, from the
// shapes alone. A backend divides them by the rates that it measured.
#pragma once

#include <cstdint>

#include "problem.h"

namespace powerattn {

struct Work {
  double flops = 0;        // 2 per multiply-add, useful ones only
  double state_flops = 0;  // the part of them against states (0 in the attention form)
  double io_bytes = 0;     // q, k, v, y (and gradients), once each
  double state_bytes = 0;  // chunk states written and read, in `chunk_state` elements
};

// Attention form: causal, so half of t * t per sequence.
Work attention_forward_work(const Problem &p);
Work attention_backward_work(const Problem &p);
// Chunked form with chunks of `chunk` tokens; chunk_state_size is the bytes of one element of a chunk state.
Work chunked_forward_work(const Problem &p, int64_t chunk, int64_t chunk_state_size);
Work chunked_backward_work(const Problem &p, int64_t chunk, int64_t chunk_state_size, bool recompute);
// One call of powerattn_step.
Work step_work(const Problem &p);

}  // namespace powerattn
