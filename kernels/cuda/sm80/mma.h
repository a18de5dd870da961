// SPDX-License-Identifier: Apache-2.0
// The sm_80 instructions the tensor-core kernels are made of: cp.async, ldmatrix, mma.sync.m16n8k16.
#pragma once

#include <cstdint>

#include "../fragment.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros where !valid (nothing is read then).
__device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void store16(uint32_t dst, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load16(uint32_t src) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(src)
               : "memory");
  return v;
}

__device__ __forceinline__ void load8(uint32_t (&v)[2], uint32_t src) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(src) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l addresses row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8]. c: rows g, g + 8 (c[0..1], c[2..3]), columns 2 (lane % 4), + 1.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Addresses of the lane's row for the four uses of a swizzled tile [rows][kCols] in shared memory.
template <int kCols>
struct SharedTile {
  uint32_t base;
  int rows;

  // base is 1024-byte aligned, so that the swizzle is one exclusive or on the address of the row.
  __device__ __forceinline__ uint32_t at(int row, int piece) const {
    if constexpr (kCols == 32) return (base + row * 64 + (((row >> 1) & 3) << 4)) ^ (piece << 4);
    return ((base + row * 128 + ((row & 7) << 4)) ^ ((piece & 7) << 4)) + (piece >> 3) * rows * 128;
  }
  // A operand, rows row .. row + 15, k 16 step .. + 15: r[0..3] as the fragment wants them.
  __device__ __forceinline__ void a(uint32_t (&r)[4], int row, int step, int lane) const {
    ldmatrix(r, at(row + (lane & 15), 2 * step + (lane >> 4)));
  }
  // B operand of x . tile^T: columns of the product are tile rows row .. row + 15, k as above.
  // r[0..1] feed columns 0..7, r[2..3] columns 8..15.
  __device__ __forceinline__ void b(uint32_t (&r)[4], int row, int step, int lane) const {
    ldmatrix(r, at(row + (lane & 7) + ((lane >> 4) << 3), 2 * step + ((lane >> 3) & 1)));
  }
  // B operand of x . tile: k is tile rows row .. row + 15, columns 16 pair .. + 15 of the tile.
  __device__ __forceinline__ void b_trans(uint32_t (&r)[4], int row, int pair, int lane) const {
    ldmatrix_trans(r, at(row + (lane & 15), 2 * pair + (lane >> 4)));
  }
  // Columns 8 piece .. + 7 of 32 rows: r[i] = rows row + 8 i + g, columns 2c, 2c + 1 (accumulator layout).
  __device__ __forceinline__ void columns32(uint32_t (&r)[4], int row, int piece, int lane) const {
    ldmatrix(r, at(row + lane, piece));
  }
  // Transposed columns 8 piece .. + 15 of 16 rows: r[0..1] = column g of the first piece at rows 2c, 2c + 1
  // and + 8; r[2..3] = the same of the second piece.
  __device__ __forceinline__ void columns_trans(uint32_t (&r)[4], int row, int piece, int lane) const {
    ldmatrix_trans(r, at(row + (lane & 15), piece + (lane >> 4)));
  }
};

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  v += __shfl_xor_sync(0xffffffffu, v, 2);
  return v;
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
