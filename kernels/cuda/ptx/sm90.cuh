// SPDX-License-Identifier: Apache-2.0
// The instructions of sm_90 that C++ has no name for, but for the products (wgmma.cuh): barriers in shared
// memory, bulk copies, packed arithmetic. One function per instruction; tests/emulation has a model of each.
#pragma once

#include <type_traits>

#include "kernels/cuda/ptx/sm80.cuh"

namespace powerattn::cuda::ptx {

// ---- Kernels one after the other --------------------------------------------------------------------------

// Until the kernel before in the stream has ended and its writes are seen. Nothing to wait for unless the
// launch allowed it to begin early.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The kernel after in the stream, if its launch allows it, may take its place as soon as every block has said
// so.
__device__ __forceinline__ void let_kernel_after_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- Barriers ---------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred P;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n@P bra DONE;\nbra "
      "WAIT;\nDONE:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive_n(uint32_t bar, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Arrives once, and makes the phase wait for this many bytes of bulk copies as well.
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Only makes the phase that is under way wait for the bytes; the arrival that it needs comes later.
__device__ __forceinline__ void barrier_expect_only(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Arrives when all earlier cp.async of this thread have landed.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// x to the same place in block `rank` of the cluster, where it completes on the barrier as four bytes.
__device__ __forceinline__ void store_remote(uint32_t to, int rank, float x, uint32_t bar) {
  asm volatile(
      "{\n.reg .b32 T, B;\nmapa.shared::cluster.u32 T, %0, %1;\nmapa.shared::cluster.u32 B, %3, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [T], %2, [B];\n}" ::"r"(to),
      "r"(rank), "r"(__float_as_uint(x)), "r"(bar)
      : "memory");
}
template <int kId, int kThreads>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
// Orders shared memory written by ordinary stores or cp.async before its reads by wgmma and bulk copies.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
template <int kRegisters>
__device__ __forceinline__ void registers_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Bulk copies ------------------------------------------------------------------------------------------

__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
// A box of a tensor of four dimensions, from (x0, x1, x2, x3) on; outside of the tensor it is zero. `map`: a
// CUtensorMap, a parameter of the kernel.
__device__ __forceinline__ void tensor_load(uint32_t dst, const void *map, int x0, int x1, int x2, int x3,
                                            uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4, "
      "%5}], [%6];" ::"r"(dst),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(bar)
      : "memory");
}
// A group of its own.
__device__ __forceinline__ void bulk_store(void *dst, uint32_t src, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(dst),
      "r"(src), "r"(bytes)
      : "memory");
}
// A box of shared memory to where tensor_load would take it from; what lies outside of the tensor is left out.
__device__ __forceinline__ void tensor_store(const void *map, uint32_t src, int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];\ncp.async.bulk.commit_group;" ::"l"(map),
      "r"(src), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
// Adds floats of shared memory to those at dst, each sum rounded once. A group of its own.
__device__ __forceinline__ void bulk_add(float *dst, uint32_t src, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], "
      "%2;\ncp.async.bulk.commit_group;" ::"l"(dst),
      "r"(src), "r"(bytes)
      : "memory");
}
// Until at most kPending groups of this thread have not been read out of shared memory.
template <int kPending = 0>
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending groups of this thread have not arrived in global memory.
template <int kPending = 0>
__device__ __forceinline__ void bulk_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Between blocks: turns at what several of them add to, in an order that is always the same
// ---------------

// Until the counter has this value, and what was added before it got there can be added to by bulk copies.
__device__ __forceinline__ void await_turn(const int32_t *counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != value);
  asm volatile("fence.proxy.async;" ::: "memory");
}
// After this thread's bulk copies have arrived.
__device__ __forceinline__ void pass_turn(int32_t *counter, int value) {
  asm volatile("fence.proxy.async;\nst.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// ---- Shared memory by address: these loads stay behind the barrier in front of them, and no more ----------

// The transpose of ldmatrix4: lane l addresses row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix4(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void stmatrix4_trans(uint32_t a, uint32_t r0, uint32_t r1, uint32_t r2,
                                                uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
__device__ __forceinline__ float2 load_f2(uint32_t a) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(a));
  return v;
}
__device__ __forceinline__ float load_f1(uint32_t a) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a));
  return v;
}
__device__ __forceinline__ uint4 load_u4(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
__device__ __forceinline__ int load_i1(uint32_t a) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ void store_u4(uint32_t a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_u2(uint32_t a, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(a), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store_f1(uint32_t a, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory");
}
__device__ __forceinline__ void store_i1(uint32_t a, int v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}
__device__ __forceinline__ void store_h1(uint32_t a, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(v) : "memory");
}

// ---- Packed arithmetic ------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <typename T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <typename T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
// Both halves set to the low (high) one, computed anew at every use: hoisted results would hold registers that
// a loop does not have.
__device__ __forceinline__ uint32_t low2_here(uint32_t v) {
  uint32_t r;
  asm volatile("prmt.b32 %0, %1, %1, 0x1010;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ uint32_t high2_here(uint32_t v) {
  uint32_t r;
  asm volatile("prmt.b32 %0, %1, %1, 0x3232;" : "=r"(r) : "r"(v));
  return r;
}
// v, but what is made of it is computed anew at every use.
__device__ __forceinline__ uint32_t here(uint32_t v) {
  uint32_t r;
  asm volatile("mov.b32 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
// threadIdx.x, read anew at every use.
__device__ __forceinline__ int thread_here() {
  int r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  return r;
}

}  // namespace powerattn::cuda::ptx
