// SPDX-License-Identifier: Apache-2.0
// Rings of stages in shared memory, tiles, and the packed arithmetic on fragments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx/sm90.cuh"
#include "tensor_map.h"

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

// The same in one register, for producers with few: the turns of all stages, a power of two, and in the top bit
// the parity of the unit.
template <int kStages>
struct Turns {
  uint32_t turn = 0;
  __device__ __forceinline__ uint32_t stage(int ahead) const { return here(turn + ahead) & (kStages - 1); }
  __device__ __forceinline__ uint32_t phase(int ahead) const { return here(turn + ahead) / kStages & 1; }
  __device__ __forceinline__ uint32_t unit() const { return turn >> 31; }
  __device__ __forceinline__ void next_unit() { turn ^= 1u << 31; }
};

// ---- Copies -----------------------------------------------------------------------------------------------

// Loads 64 rows x kDim columns of a strided matrix into a swizzled tile (halves of 64 columns, 8 KB each) with
// kThreads threads; rows from `valid` on are zero. 16-byte copies where the tensor allows them.
template <typename T, int kDim = 64, int kThreads = 128>
__device__ __forceinline__ void load_tile(uint32_t dst, const Tensor &x, const T *base, int valid, int tid) {
  static_assert(kThreads == 32 || kThreads == 128);
  constexpr int kStep = kThreads / 8;  // rows; 4 rows on, row & 7 and so the chunk's place differ in one bit
  const int chunk = tid & 7, first = tid >> 3;
  uint32_t to = dst + first * 128 + ((chunk ^ (first & 7)) << 4);
  const T *src = base + first * x.stride_t + chunk * 8;
  const auto next = [&] {
    to = (to + kStep * 128) ^ (kStep == 4 ? 64 : 0);
    src += kStep * x.stride_t;
  };
  if (x.vector) {  // rolled: the producers have few registers and time to spare
#pragma unroll 1
    for (int row = first; row < 64; row += kStep, next()) {
      copy16_l2(to, src, row < valid);
      if constexpr (kDim == 128) copy16_l2(to + 8192, src + 64, row < valid);
    }
  } else {  // a row that is not 16-byte aligned: element by element
#pragma unroll 1
    for (int row = first; row < 64; row += kStep, next()) {
#pragma unroll 1
      for (int n = 0; n < kDim / 8; n += 4) {  // four of the thread's columns, 8 in each half
        uint32_t low = 0, high = 0;
        if (row < valid) {
          const uint16_t *from = reinterpret_cast<const uint16_t *>(src) + (n >> 3) * 64 + (n & 4);
          low = from[0] | uint32_t(from[1]) << 16;
          high = from[2] | uint32_t(from[3]) << 16;
        }
        store_u2(to + (n >> 3) * 8192 + (n & 4) * 2, low, high);
      }
    }
  }
}

// The same by the copy engine: one thread asks for rows `token` on of a head, which complete on a barrier as
// kDim * 128 bytes. Rows behind the tensor's end are zero; those of another sequence are that sequence's.
template <int kDim>
__device__ __forceinline__ void fetch_tile(uint32_t dst, const TileMap &x, int batch, int head, int token,
                                           uint32_t bar) {
#pragma unroll
  for (int half = 0; half < kDim / 64; ++half)
    tensor_load(dst + half * 8192, &x.map, half * 64, token, head * x.step_head, batch * x.step_batch, bar);
}

// Descriptor of a tile of 128-byte rows, 16-byte chunk index XOR (row & 7), 1024-byte aligned groups of 8 rows.
// `column_bytes` is the distance between 64-column halves of an N-major tile wider than 64.
__device__ __forceinline__ uint64_t tile_desc(uint32_t address, uint32_t column_bytes = 1024) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(column_bytes >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// The descriptor of the same tile `bytes` further on. Shared memory ends below 256 KB, so nothing carries out
// of the address field; and the sum stays in uniform registers where tile_desc() of each address would not.
__device__ __forceinline__ uint64_t desc_at(uint64_t desc, uint32_t bytes) {
  return (desc & 0xffffffff00000000ull) | (static_cast<uint32_t>(desc) + (bytes >> 4));
}

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
