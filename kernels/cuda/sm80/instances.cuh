// SPDX-License-Identifier: Apache-2.0
// The explicit instances of one element type and head dimension, one source file each.
#pragma once

#include "gradient.cuh"
#include "output.cuh"
#include "update.cuh"

#define POWERATTN_SM80_INSTANCES(T, D)                                               \
  template cudaError_t launch_output<T, D, 0>(const OutputArgs &, cudaStream_t);     \
  template cudaError_t launch_output<T, D, 1>(const OutputArgs &, cudaStream_t);     \
  template cudaError_t launch_output<T, D, 2>(const OutputArgs &, cudaStream_t);     \
  template cudaError_t launch_gradient<T, D, 0>(const GradientArgs &, cudaStream_t); \
  template cudaError_t launch_gradient<T, D, 1>(const GradientArgs &, cudaStream_t); \
  template cudaError_t launch_gradient<T, D, 2>(const GradientArgs &, cudaStream_t); \
  template cudaError_t launch_update<T, D, 1>(const UpdateArgs &, cudaStream_t);     \
  template cudaError_t launch_update<T, D, 2>(const UpdateArgs &, cudaStream_t);
