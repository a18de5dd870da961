// SPDX-License-Identifier: Apache-2.0
// The fast state step: prepare the tokens, sweep the states once in blocks of rows, add up the blocks.
#pragma once

#include "kernels/cpu/fast.h"
#include "parallel.h"
#include "problem.h"

namespace powerattn {

// How a step is cut, from the problem alone: results must not depend on the number of threads.
struct StepShape {
  int64_t rows;          // state rows of one block
  int64_t blocks;        // of one state
  int64_t batch;         // tokens whose phi is held at once
  int64_t ep, ld;        // value_dim and rows, padded to whole vectors
  int64_t rows_scratch;  // elements of the rows that are held unrounded
};
StepShape step_shape(const Problem &p);

// Bytes; saturates at UINT64_MAX.
uint64_t step_workspace(const Problem &p);

void step(const Problem &p, const powerattn_step_args &a, const fast::Isa &isa, const ParallelFor &parallel);

}  // namespace powerattn
