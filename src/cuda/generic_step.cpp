// SPDX-License-Identifier: Apache-2.0
#include "generic_step.h"

#include "kernels/cuda/step.h"
#include "text.h"

namespace powerattn::cuda {
namespace {

// Clusters need code for sm_90: newer devices, and sm_90 in a build without that, run PTX for sm_80.
StepTiling tiling_of(const Problem &p) {
  const DeviceProperties *device = nullptr;
  if (device_properties(p.device_index, &device) != POWERATTN_OK) return {};
  return step_tiling(p, device->sm_count, device->major == 9 && device->code >= 90);
}

}  // namespace

bool step_supported(const Problem &p, const DeviceProperties &device, std::string *why) {
  if (double(p.sequences) * double(p.heads_kv) * 16 >= double(0x7fffffff)) {
    *why = "more than 2^31 thread blocks";
    return false;
  }
  if (p.state_rows / tiling_of(p).splits >= 0x7fffffff - 1024) {
    *why = "a state of " + std::to_string(p.state_rows) + " rows is more than its blocks can count";
    return false;
  }
  const size_t shared = step_shared_bytes(p);
  if (shared > device.shared_per_block) {
    *why = "needs " + std::to_string(shared) + " bytes of shared memory per block, the device has " +
           std::to_string(device.shared_per_block);
    return false;
  }
  return true;
}

size_t step_workspace(const Problem &p) { return step_workspace_bytes(p, tiling_of(p)); }

void describe_step(const Problem &p, std::string *text) {
  const StepTiling t = tiling_of(p);
  append(text,
         "  step: %d blocks per state (no more than fill the device), summed %s; %d-byte accesses, %d query "
         "rows per pass\n",
         t.splits,
         t.splits == 1 ? "in the block"
         : t.cluster   ? "through the cluster's shared memory"
                       : "through the workspace by a second launch",
         int(t.vector * size_of(p.state_dtype)), t.queries);
}

powerattn_status generic_step(const powerattn_plan &plan, const powerattn_step_args &args) {
  const Problem &p = plan.problem;
  const DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return check_launch(guard.error(), "step");
  return check_launch(step(p, tiling_of(p), args, stream_of(args.stream)), "step");
}

}  // namespace powerattn::cuda
