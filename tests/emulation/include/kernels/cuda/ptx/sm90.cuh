// SPDX-License-Identifier: Apache-2.0
// The emulator's version of kernels/cuda/ptx/sm90.cuh, found before it.
#pragma once

#include <type_traits>

#include "kernels/cuda/ptx/sm80.cuh"

namespace powerattn::cuda::ptx {

inline void wait_for_kernel_before() { emulation::wait_for_kernel_before(); }
inline void let_kernel_after_begin() {}
inline void barrier_init(uint32_t bar, int arrivals) { emulation::barrier_init(bar, arrivals); }
inline void barrier_wait(uint32_t bar, uint32_t parity) { emulation::barrier_wait(bar, parity); }
inline void barrier_arrive(uint32_t bar) { emulation::barrier_arrive(bar, 1, 0); }
inline void barrier_arrive_n(uint32_t bar, int count) { emulation::barrier_arrive(bar, count, 0); }
inline void barrier_expect(uint32_t bar, uint32_t bytes) { emulation::barrier_arrive(bar, 1, bytes); }
inline void barrier_expect_only(uint32_t bar, uint32_t bytes) { emulation::barrier_expect(bar, bytes); }
inline void barrier_arrive_copies(uint32_t bar) { emulation::barrier_arrive_copies(bar); }
inline void store_remote(uint32_t to, int rank, float x, uint32_t bar) {
  emulation::store_remote(to, rank, x, bar);
}
template <int kId, int kThreads>
void named_barrier() {
  emulation::named_barrier(kId, kThreads);
}
inline void fence_async_proxy() { emulation::proxy_fence(); }
inline void fence_barrier_init() {}
template <int kRegisters>
void registers_inc() {
  emulation::set_registers(kRegisters, true);
}
template <int kRegisters>
void registers_dec() {
  emulation::set_registers(kRegisters, false);
}

inline void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar) {
  emulation::bulk_load(dst, src, bytes, bar);
}
inline void tensor_load(uint32_t dst, const void *map, int x0, int x1, int x2, int x3, uint32_t bar) {
  emulation::tensor_load(dst, map, {x0, x1, x2, x3}, bar);
}
inline void tensor_store(const void *map, uint32_t src, int x0, int x1, int x2, int x3) {
  emulation::tensor_store(map, src, {x0, x1, x2, x3});
}
inline void bulk_store(void *dst, uint32_t src, uint32_t bytes) { emulation::bulk_store(dst, src, bytes); }
inline void bulk_add(float *dst, uint32_t src, uint32_t bytes) { emulation::bulk_add(dst, src, bytes); }
template <int kPending = 0>
void bulk_store_wait_read() {
  emulation::bulk_store_wait(kPending);
}
template <int kPending = 0>
void bulk_store_wait() {
  emulation::bulk_store_wait(kPending);
}

inline void stmatrix4(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t r[4] = {r0, r1, r2, r3};
  emulation::store_matrices(a, r, 4, false);
}
inline void stmatrix4_trans(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t r[4] = {r0, r1, r2, r3};
  emulation::store_matrices(a, r, 4, true);
}
// Clusters run one after the other: a turn that has not come never will.
inline void await_turn(const int32_t *counter, int value) {
  if (*counter != value) emulation::fail("waits for turn %d, but it is turn %d", value, *counter);
}
inline void pass_turn(int32_t *counter, int value) { *counter = value; }
template <typename T>
T load_as(uint32_t a) {
  T v;
  emulation::shared_load(&v, a, sizeof(T));
  return v;
}
inline float2 load_f2(uint32_t a) { return load_as<float2>(a); }
inline float load_f1(uint32_t a) { return load_as<float>(a); }
inline uint4 load_u4(uint32_t a) { return load_as<uint4>(a); }
inline int load_i1(uint32_t a) { return load_as<int>(a); }
inline void store_u4(uint32_t a, uint4 v) { emulation::shared_store(a, &v, 16); }
inline void store_u2(uint32_t a, uint32_t x, uint32_t y) {
  const uint2 v{x, y};
  emulation::shared_store(a, &v, 8);
}
inline void store_f1(uint32_t a, float v) { emulation::shared_store(a, &v, 4); }
inline void store_i1(uint32_t a, int v) { emulation::shared_store(a, &v, 4); }
inline void store_h1(uint32_t a, uint16_t v) { emulation::shared_store(a, &v, 2); }

template <typename T>
uint32_t mul2(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
  Pair x, y;
  std::memcpy(&x, &a, 4);
  std::memcpy(&y, &b, 4);
  const Pair z = __hmul2(x, y);
  uint32_t r;
  std::memcpy(&r, &z, 4);
  return r;
}
template <typename T>
uint32_t pack2(float lo, float hi) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return uint32_t(__float2bfloat16_rn(lo).bits) | uint32_t(__float2bfloat16_rn(hi).bits) << 16;
  else
    return uint32_t(__float2half_rn(lo).bits) | uint32_t(__float2half_rn(hi).bits) << 16;
}
template <typename T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint16_t x[2], y[2], z[2];
  std::memcpy(x, &a, 4);
  std::memcpy(y, &b, 4);
  std::memcpy(z, &c, 4);
  const auto value = [](uint16_t bits) {
    T t;
    std::memcpy(&t, &bits, 2);
    return static_cast<double>(static_cast<float>(t));
  };
  // The sum of a product and a number of 16 bits is exact in double, up to far smaller parts than it is rounded
  // to.
  const double lo = value(x[0]) * value(y[0]) + value(z[0]), hi = value(x[1]) * value(y[1]) + value(z[1]);
  return pack2<T>(static_cast<float>(lo), static_cast<float>(hi));
}
inline uint32_t low2_here(uint32_t v) { return __byte_perm(v, v, 0x1010); }
inline uint32_t high2_here(uint32_t v) { return __byte_perm(v, v, 0x3232); }
inline uint32_t here(uint32_t v) { return v; }
inline int thread_here() { return static_cast<int>(threadIdx.x); }

}  // namespace powerattn::cuda::ptx
