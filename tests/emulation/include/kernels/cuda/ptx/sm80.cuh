// SPDX-License-Identifier: Apache-2.0
// The emulator's version of kernels/cuda/ptx/sm80.cuh, found before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace powerattn::cuda::ptx {

template <class T>
T *dynamic_shared() {
  return reinterpret_cast<T *>(emulation::dynamic_shared());
}
inline uint32_t shared_address(const void *p) { return emulation::shared_address(p); }

inline void copy16(uint32_t dst, const void *src, bool valid) { emulation::copy16(dst, src, valid); }
inline void copy16(uint32_t dst, const void *src) { emulation::copy16(dst, src, true); }
inline void copy16_l2(uint32_t dst, const void *src, bool valid) { emulation::copy16(dst, src, valid); }
inline void copy_commit() { emulation::copy_commit(); }
template <int kPending>
void copy_wait() {
  emulation::copy_wait(kPending);
}

inline void store16(uint32_t dst, uint4 v) { emulation::shared_store(dst, &v, 16); }
inline void store4(uint32_t dst, uint32_t v) { emulation::shared_store(dst, &v, 4); }
inline uint4 load16(uint32_t src) {
  uint4 v;
  emulation::shared_load(&v, src, 16);
  return v;
}
inline void load8(uint32_t (&v)[2], uint32_t src) { emulation::shared_load(v, src, 8); }

inline void ldmatrix4(uint32_t (&r)[4], uint32_t address) { emulation::load_matrices(r, 4, false, address); }
inline void ldmatrix4_trans(uint32_t (&r)[4], uint32_t address) {
  emulation::load_matrices(r, 4, true, address);
}
inline void ldmatrix2(uint32_t &r0, uint32_t &r1, uint32_t address) {
  uint32_t r[2];
  emulation::load_matrices(r, 2, false, address);
  r0 = r[0], r1 = r[1];
}
inline void ldmatrix2_trans(uint32_t &r0, uint32_t &r1, uint32_t address) {
  uint32_t r[2];
  emulation::load_matrices(r, 2, true, address);
  r0 = r[0], r1 = r[1];
}

template <typename T>
constexpr emulation::Element element_of() {
  return std::is_same_v<T, __nv_bfloat16> ? emulation::Element::kBfloat16 : emulation::Element::kFloat16;
}
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply(element_of<T>(), c, a, b0, b1);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply(emulation::Element::kTf32, c, a, b0, b1);
}
inline uint32_t round_tf32(float x) {  // half of the last place of the fraction added to the magnitude
  const uint32_t u = __float_as_uint(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & ~0x1fffu;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(std::fabs(x) < 0x1p-126f ? 0.f : x);
  return y < 0x1p-126f ? 0.f : y;
}
inline int anew(int v) { return v; }

}  // namespace powerattn::cuda::ptx
