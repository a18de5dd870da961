// SPDX-License-Identifier: Apache-2.0
// The emulator's version of kernels/cuda/ptx/wgmma.cuh, found before it.
#pragma once

#include "kernels/cuda/ptx/sm90.cuh"

namespace powerattn::cuda::ptx {

inline void wgmma_fence() { emulation::warpgroup_fence(); }
inline void wgmma_commit() { emulation::warpgroup_commit(); }
template <int kPending>
void wgmma_wait() {
  emulation::warpgroup_wait(kPending);
}

// c[64 x 2 kRegisters] (+)= a b, A in registers or by descriptor.
template <typename T, bool kAcc, bool kTransB, int kRegisters>
void wgmma(float (&c)[kRegisters], const uint32_t (&a)[4], uint64_t b) {
  emulation::warpgroup_multiply({element_of<T>(), 2 * kRegisters, kAcc, false, kTransB}, c, a, 0, b);
}
template <typename T, bool kAcc, bool kTransB, int kRegisters>
void wgmma(float (&c)[kRegisters], uint64_t a, uint64_t b) {
  emulation::warpgroup_multiply({element_of<T>(), 2 * kRegisters, kAcc, false, kTransB}, c, nullptr, a, b);
}

}  // namespace powerattn::cuda::ptx
