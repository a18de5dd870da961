// SPDX-License-Identifier: Apache-2.0
// Clusters of blocks.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync() const { emulation::cluster_barrier(); }
  // The emulator meets where a block waits.
  void barrier_arrive() const {}
  void barrier_wait() const { emulation::cluster_barrier(); }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
