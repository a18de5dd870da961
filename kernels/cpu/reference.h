// SPDX-License-Identifier: Apache-2.0
// The reference: every operation, dtype, degree and layout in plain loops of float64, one thread, nothing
// clever. It is the last resort of the table and what the fast kernels are read against.
#pragma once

#include "problem.h"

namespace powerattn::reference {

// Bytes of workspace; saturates at UINT64_MAX.
Sizes sizes(const Problem &p);

void forward(const Problem &p, const powerattn_forward_args &a);
void backward(const Problem &p, const powerattn_backward_args &a);
void step(const Problem &p, const powerattn_step_args &a);
void summary(const Problem &p, const powerattn_summary_args &a);
void summary_reverse(const Problem &p, const powerattn_summary_reverse_args &a);

}  // namespace powerattn::reference
