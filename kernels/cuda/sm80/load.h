// SPDX-License-Identifier: Apache-2.0
// Rows of a strided tensor into a swizzled tile of shared memory.
#pragma once

#include "args.h"
#include "mma.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

// First element of row `start` of one head; strides count elements.
template <typename T>
__device__ __forceinline__ T *row_pointer(const powerattn_tensor &t, int64_t batch, int64_t start,
                                          int64_t head) {
  return static_cast<T *>(t.data) + batch * t.stride_b + start * t.stride_t + head * t.stride_h;
}

// Whether every row can be read and written kElements (a power of two) at a time, of two bytes each.
template <int kElements>
__device__ __forceinline__ bool aligned_rows(const powerattn_tensor &t) {
  const uint64_t strides =
      static_cast<uint64_t>(t.stride_b) | static_cast<uint64_t>(t.stride_t) | static_cast<uint64_t>(t.stride_h);
  return (((reinterpret_cast<uintptr_t>(t.data) >> 1) | strides) & (kElements - 1)) == 0;
}

// Copies rows 0 .. valid-1 of src (kCols columns, `stride` elements apart) and zeros up to kRows. Uses cp.async
// where rows are 16-byte aligned, else element loads (correct for any stride, slower).
template <int kRows, int kCols, int kThreads, typename T>
__device__ __forceinline__ void load_rows(uint32_t dst, const T *src, int64_t stride, int valid, int thread) {
  constexpr int kPieces = kCols / 8;
  if (((reinterpret_cast<uintptr_t>(src) & 15) | (static_cast<uint64_t>(stride) & 7)) == 0) {
    // A step of rows is a multiple of 8, so that the swizzle is the same in every iteration.
    constexpr int kStep = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kStep % 8 == 0, "whole rows, and whole periods of the swizzle");
    const int first = thread / kPieces, piece = thread % kPieces;
    const uint32_t to = dst + swizzle<kCols>(kRows, first, piece);
    const T *from = src + first * stride + piece * 8;
#pragma unroll
    for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
      const int row = first + i * kStep;
      if (kRows % kStep != 0 && row >= kRows) break;
      copy16(to + i * kStep * (kCols == 32 ? 64 : 128), row < valid ? from : src, row < valid);
      from += kStep * stride;
    }
  } else {
#pragma unroll 1
    for (int n = thread; n < kRows * kPieces; n += kThreads) {
      const int row = n / kPieces, piece = n % kPieces;
      uint32_t w[4] = {0, 0, 0, 0};
      if (row < valid) {
        const unsigned short *p = reinterpret_cast<const unsigned short *>(src + row * stride + piece * 8);
#pragma unroll
        for (int k = 0; k < 4; ++k) w[k] = p[2 * k] | static_cast<uint32_t>(p[2 * k + 1]) << 16;
      }
      store16(dst + swizzle<kCols>(kRows, row, piece), make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// kBytes contiguous bytes, already in the layout of shared memory.
template <int kBytes, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t dst, const void *src, int thread) {
#pragma unroll
  for (int i = 0; i < (kBytes / 16 + kThreads - 1) / kThreads; ++i) {
    const int n = i * kThreads + thread;
    if (kBytes / 16 % kThreads != 0 && n >= kBytes / 16) break;
    copy16(dst + n * 16, static_cast<const char *>(src) + n * 16, true);
  }
}

// Two neighbouring elements of a row of the output.
template <typename T>
__device__ __forceinline__ void store_pair(T *dst, float lo, float hi) {
  const uint32_t v = Pair<T>::pack(lo, hi);
  if ((reinterpret_cast<uintptr_t>(dst) & 3) == 0) {
    *reinterpret_cast<uint32_t *>(dst) = v;
  } else {
    reinterpret_cast<unsigned short *>(dst)[0] = static_cast<unsigned short>(v);
    reinterpret_cast<unsigned short *>(dst)[1] = static_cast<unsigned short>(v >> 16);
  }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
