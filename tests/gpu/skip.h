// SPDX-License-Identifier: Apache-2.0
// Programs that need a device end with 77, which is no failure, where there is none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>

namespace powerattn_test {

constexpr int kSkipped = 77;

// Says so where there is no device.
inline bool no_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return false;
  std::printf("SKIPPED: no CUDA device\n");
  return true;
}

}  // namespace powerattn_test
