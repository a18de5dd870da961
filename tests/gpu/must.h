// SPDX-License-Identifier: Apache-2.0
// Ends a program of kernels at the first call that fails.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

#define CK(x)                                                                             \
  do {                                                                                    \
    const cudaError_t error_ = (x);                                                       \
    if (error_ != cudaSuccess) {                                                          \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(error_)); \
      std::exit(2);                                                                       \
    }                                                                                     \
  } while (0)
