// SPDX-License-Identifier: Apache-2.0
// The state step: a few tokens against a pool of states, in place, in one launch (two where thread blocks
// cannot form clusters). Bandwidth-bound: every state is read and written once.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace powerattn::cuda {

// How the launch is cut; a pure function of the problem and the device.
struct StepTiling {
  int splits = 1;        // thread blocks that share one state
  bool cluster = false;  // they form a cluster and add up through shared memory; else through the workspace
  int queries = 1;       // (token, query head) pairs held in registers in one pass over a state
  int vector = 1;        // columns of one access
  int threads_per_row = 1;
};
StepTiling step_tiling(const Problem &p, int sm_count, bool clusters);
size_t step_shared_bytes(const Problem &p);
// The architecture that the current device's code was compiled for, 10 major + minor: that of the PTX where the
// driver translates, whatever the device could do. Fails where this build has no code for the device.
cudaError_t step_architecture(int *architecture);
size_t step_workspace_bytes(const Problem &p, const StepTiling &t);

//   S <- exp(log_g_t) S + phi(k_t) v_t^T,  z likewise,  y_t = phi(q_t) S / (phi(q_t) . z + eps),  t in order
cudaError_t step(const Problem &p, const StepTiling &t, const powerattn_step_args &args, cudaStream_t stream);

}  // namespace powerattn::cuda
