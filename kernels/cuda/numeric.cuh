// SPDX-License-Identifier: Apache-2.0
// Device helpers: element types, typed access by run-time dtype, ordered block reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "problem.h"

namespace powerattn::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<half> {
  static constexpr Dtype value = Dtype::kFloat16;
};
template <>
struct DtypeOf<bf16> {
  static constexpr Dtype value = Dtype::kBfloat16;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Element `i` of an array whose type is known at run time: a uniform branch.
__device__ inline float load_as_float(const void *data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float *>(data)[i];
  if (dtype == Dtype::kFloat16) return __half2float(static_cast<const half *>(data)[i]);
  return __bfloat162float(static_cast<const bf16 *>(data)[i]);
}
__device__ inline void store_from_float(void *data, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float *>(data)[i] = x;
  } else if (dtype == Dtype::kFloat16) {
    static_cast<half *>(data)[i] = __float2half_rn(x);
  } else {
    static_cast<bf16 *>(data)[i] = __float2bfloat16_rn(x);
  }
}

// Calls f with a value of the element type that `dtype` names.
template <class F>
cudaError_t with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat16:
      return f(half{});
    case Dtype::kBfloat16:
      return f(bf16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Over the four lanes that share the rows of a fragment.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}

// Inclusive sum over the lanes of a warp.
template <class T>
__device__ inline T warp_scan(T x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 1; m < 32; m <<= 1) {
    T y = __shfl_up_sync(0xffffffffu, x, m);
    if (lane >= m) x += y;
  }
  return x;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr size_t align256(size_t bytes) { return (bytes + 255) & ~size_t(255); }

// Grid dimension y and z hold at most 65535 blocks; x holds 2^31 - 1. Long products go to x.
constexpr int64_t kMaxGridX = 0x7fffffff;

}  // namespace powerattn::cuda
