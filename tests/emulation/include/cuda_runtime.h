// SPDX-License-Identifier: Apache-2.0
// CUDA C++ in terms of plain C++: qualifiers, built-in variables, vector types, the intrinsics that the kernels
// use. Static __shared__ variables are static variables: one block at a time uses them.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct float2 {
  alignas(8) float x;
  float y;
};
struct float4 {
  alignas(16) float x;
  float y, z, w;
};
struct uint2 {
  alignas(8) unsigned x;
  unsigned y;
};
struct uint4 {
  alignas(16) unsigned x;
  unsigned y, z, w;
};
struct int4 {
  alignas(16) int x;
  int y, z, w;
};
struct double2 {
  alignas(16) double x;
  double y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_barrier(mask); }

namespace emulation {
template <class T>
T shuffle_value(unsigned mask, T x, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = shuffle(mask, bits, source);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
inline int lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31); }
}  // namespace emulation
// `width` lanes, a power of two, form a group of their own; a source outside of it is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const int lane = emulation::lane();
  return emulation::shuffle_value(mask, x, (lane & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  const int lane = emulation::lane(), from = lane ^ bits;
  return emulation::shuffle_value(mask, x, (from & -width) > (lane & -width) ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), from = lane - int(delta);
  return emulation::shuffle_value(mask, x, from < (lane & -width) ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), from = lane + int(delta);
  return emulation::shuffle_value(mask, x, from > (lane | (width - 1)) ? lane : from);
}
inline int __any_sync(unsigned mask, int predicate) {  // of whole warps
  int any = predicate != 0;
  for (int bits = 16; bits > 0; bits /= 2) any |= __shfl_xor_sync(mask, any, bits);
  return any;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {  // of whole warps
  unsigned set = predicate != 0 ? 1u << (threadIdx.x & 31) : 0u;
  for (int bits = 16; bits > 0; bits /= 2) set |= __shfl_xor_sync(mask, set, bits);
  return set;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

// Threads take turns only where they wait, so that plain accesses are atomic.
template <class T>
T atomicAdd(T *p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}
template <class T>
T atomicMax(T *p, T x) {
  const T before = *p;
  if (x > before) *p = x;
  return before;
}
template <class T>
T __ldg(const T *p) {
  return *p;
}
template <class T>
T __ldcs(const T *p) {
  return *p;
}
template <class T>
T __ldcg(const T *p) {
  return *p;
}
template <class T>
void __stcs(T *p, T x) {
  *p = x;
}

inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
// Byte i of the result is byte (selector's hex digit i) of the eight bytes y x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
inline float __expf(float x) { return std::exp2(x * 1.4426950408889634f); }
inline void sincospif(float x, float *s, float *c) {
  *s = float(std::sin(double(x) * 3.14159265358979323846));
  *c = float(std::cos(double(x) * 3.14159265358979323846));
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
