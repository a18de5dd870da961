// SPDX-License-Identifier: Apache-2.0
// Rings of stages in shared memory, tiles, and the packed arithmetic on fragments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx/sm90.cuh"

namespace powerattn::cuda::sm90 {

using namespace ptx;

// A ring of stages: stage and phase advance together.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int n) {
    const int to = stage + n;
    stage = to % kStages;
    phase ^= (to / kStages) & 1;
  }
};

// ---- Copies -----------------------------------------------------------------------------------------------

// Loads 64 rows x kDim columns of a strided matrix into a swizzled tile (halves of 64 columns, 8 KB each) with
// the 128 threads of a warpgroup; rows from `valid` on are zero. 16-byte copies where the tensor allows them.
template <typename T, int kDim = 64>
__device__ __forceinline__ void load_tile(uint32_t dst, const Tensor &x, const T *base, int valid, int tid) {
  const int row = tid >> 3, chunk = tid & 7;  // rows row + 16 i share row & 7
  const uint32_t at = dst + row * 128 + ((chunk ^ (row & 7)) << 4);
  const T *src = base + row * x.stride_t + chunk * 8;
  if (x.vector) {  // rolled: the producer has few registers and time to spare
    uint32_t to = at;
#pragma unroll 1
    for (int i = 0; i < 4; ++i, to += 2048, src += 16 * x.stride_t) {
      copy16_l2(to, src, row + 16 * i < valid);
      if constexpr (kDim == 128) copy16_l2(to + 8192, src + 64, row + 16 * i < valid);
    }
  } else {  // a row that is not 16-byte aligned: element by element
#pragma unroll 1
    for (int n = 0; n < kDim / 2; ++n) {
      const int half = n >> 5, i = kDim == 64 ? n >> 3 : (n >> 3) & 3;
      uint16_t value = 0;
      if (row + i * 16 < valid)
        value = *reinterpret_cast<const uint16_t *>(src + i * 16 * x.stride_t + half * (kDim - 64) + (n & 7));
      store_h1(at + half * (kDim == 64 ? 0 : 8192) + i * 2048 + (n & 7) * 2, value);
    }
  }
}

// Descriptor of a tile of 128-byte rows, 16-byte chunk index XOR (row & 7), 1024-byte aligned groups of 8 rows.
// `column_bytes` is the distance between 64-column halves of an N-major tile wider than 64.
__device__ __forceinline__ uint64_t tile_desc(uint32_t address, uint32_t column_bytes = 1024) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(column_bytes >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// The descriptor of the same tile `bytes` further on. Shared memory ends below 256 KB, so nothing carries out
// of the address field; and the sum stays in uniform registers where tile_desc() of each address would not.
__device__ __forceinline__ uint64_t desc_at(uint64_t desc, uint32_t bytes) { return desc + (bytes >> 4); }

// ---- Packed arithmetic --------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<__half2 *>(&v));
}
__device__ __forceinline__ uint32_t low2(uint32_t v) { return __byte_perm(v, v, 0x1010); }
__device__ __forceinline__ uint32_t high2(uint32_t v) { return __byte_perm(v, v, 0x3232); }
template <typename T>
__device__ __forceinline__ float2 unpack2_here(uint32_t v) {
  return unpack2<T>(here(v));
}
// x^p by repeated squaring.
template <int p>
__device__ __forceinline__ float power(float x) {
  if constexpr (p == 0)
    return 1.f;
  else if constexpr (p == 1)
    return x;
  else if constexpr (p % 2 == 0)
    return power<p / 2>(x * x);
  else
    return x * power<p - 1>(x);
}

constexpr float kLog2e = 1.4426950408889634f;

}  // namespace powerattn::cuda::sm90
