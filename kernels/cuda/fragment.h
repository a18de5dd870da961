// SPDX-License-Identifier: Apache-2.0
// Tensor-core fragments of phi(x), built in registers from fragments of x. The layout of a 16 x 16 A operand is
// the same for mma.sync and for wgmma with A in registers: with g = lane / 4, c = lane % 4,
//   a[0] = (row g, k 2c..2c+1)   a[1] = (row g+8, same k)   a[2] = (row g, k 2c+8..)   a[3] = (row g+8, same k)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tiles.h"

namespace powerattn {
namespace cuda {

// Two packed 16-bit elements of one register, by element type.
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t *>(&v);
  }
  static __device__ __forceinline__ float lo(uint32_t v) { return __uint_as_float(v << 16); }
  static __device__ __forceinline__ float hi(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    const __nv_bfloat162 v =
        __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&v);
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    const __nv_bfloat162 v =
        __hfma2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b),
                *reinterpret_cast<__nv_bfloat162 *>(&c));
    return *reinterpret_cast<const uint32_t *>(&v);
  }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
};

template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __half2 v = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t *>(&v);
  }
  static __device__ __forceinline__ float lo(uint32_t v) {
    return __low2float(*reinterpret_cast<const __half2 *>(&v));
  }
  static __device__ __forceinline__ float hi(uint32_t v) {
    return __high2float(*reinterpret_cast<const __half2 *>(&v));
  }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    const __half2 v = __hmul2(*reinterpret_cast<__half2 *>(&a), *reinterpret_cast<__half2 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&v);
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    const __half2 v = __hfma2(*reinterpret_cast<__half2 *>(&a), *reinterpret_cast<__half2 *>(&b),
                              *reinterpret_cast<__half2 *>(&c));
    return *reinterpret_cast<const uint32_t *>(&v);
  }
  static __device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
};

// Both halves of a register set to its low (high) element.
__device__ __forceinline__ uint32_t broadcast_lo(uint32_t v) { return __byte_perm(v, v, 0x1010); }
__device__ __forceinline__ uint32_t broadcast_hi(uint32_t v) { return __byte_perm(v, v, 0x3232); }

// Rows are tokens (a query of the state). k16 step s of tile (ib, jb) holds i = 8 ib + 2s (k 0..7) and
// i = 8 ib + 2s + 1 (k 8..15), columns j:   a[row, (i, j)] = x[row, i] x[row, j].
//   f0, f1: x[row g (g+8)][8 jb + 2c .. +1]        s0, s1: x[row g (g+8)][8 ib + 2s .. 2s+1]
template <typename T>
__device__ __forceinline__ void query_fragment(uint32_t (&a)[4], uint32_t f0, uint32_t f1, uint32_t s0,
                                               uint32_t s1) {
  a[0] = Pair<T>::mul(f0, broadcast_lo(s0));
  a[1] = Pair<T>::mul(f1, broadcast_lo(s1));
  a[2] = Pair<T>::mul(f0, broadcast_hi(s0));
  a[3] = Pair<T>::mul(f1, broadcast_hi(s1));
}

// v times the weights of its two tokens in two parts, high + low = v w to 2^-17, so that what is made of them
// is rounded once.
template <typename T>
__device__ __forceinline__ void weigh(uint32_t (&parts)[2], uint32_t v, float2 w) {
  const float x = Pair<T>::lo(v) * w.x, y = Pair<T>::hi(v) * w.y;
  parts[0] = Pair<T>::pack(x, y);
  parts[1] = Pair<T>::pack(x - Pair<T>::lo(parts[0]), y - Pair<T>::hi(parts[0]));
}

// Columns are tokens (an update of the state). 16 rows: i0 (rows 0..7) and i1 (rows 8..15) times j in block jb:
//   a[(i, j), t] = (w_t x[t, j]) x[t, i].
//   k0, k1: x[t = 2c .. 2c+1 (+8)][8 jb + g], weighed in two parts: high u + (low u) by a fused multiply-add
//       u*, v*: x[t = 2c .. 2c+1 (+8)][i0], [i1]
template <typename T>
__device__ __forceinline__ void update_fragment(uint32_t (&a)[4], const uint32_t (&k0)[2],
                                                const uint32_t (&k1)[2], uint32_t u0, uint32_t u1, uint32_t v0,
                                                uint32_t v1) {
  a[0] = Pair<T>::fma(k0[0], u0, Pair<T>::mul(k0[1], u0));
  a[1] = Pair<T>::fma(k0[0], v0, Pair<T>::mul(k0[1], v0));
  a[2] = Pair<T>::fma(k1[0], u1, Pair<T>::mul(k1[1], u1));
  a[3] = Pair<T>::fma(k1[0], v1, Pair<T>::mul(k1[1], v1));
}

}  // namespace cuda
}  // namespace powerattn
