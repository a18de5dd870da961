// SPDX-License-Identifier: Apache-2.0
// Operands of mma.sync.m16n8k16 out of swizzled tiles in shared memory.
#pragma once

#include <cstdint>

#include "../fragment.h"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/ptx/sm80.cuh"

namespace powerattn {
namespace cuda {
namespace sm80 {

using namespace ptx;

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
    ldmatrix4(r, at(row + (lane & 15), 2 * step + (lane >> 4)));
  }
  // B operand of x . tile^T: columns of the product are tile rows row .. row + 15, k as above.
  // r[0..1] feed columns 0..7, r[2..3] columns 8..15.
  __device__ __forceinline__ void b(uint32_t (&r)[4], int row, int step, int lane) const {
    ldmatrix4(r, at(row + (lane & 7) + ((lane >> 4) << 3), 2 * step + ((lane >> 3) & 1)));
  }
  // B operand of x . tile: k is tile rows row .. row + 15, columns 16 pair .. + 15 of the tile.
  __device__ __forceinline__ void b_trans(uint32_t (&r)[4], int row, int pair, int lane) const {
    ldmatrix4_trans(r, at(row + (lane & 15), 2 * pair + (lane >> 4)));
  }
  // Columns 8 piece .. + 7 of 32 rows: r[i] = rows row + 8 i + g, columns 2c, 2c + 1 (accumulator layout).
  __device__ __forceinline__ void columns32(uint32_t (&r)[4], int row, int piece, int lane) const {
    ldmatrix4(r, at(row + lane, piece));
  }
  // Transposed columns 8 piece .. + 15 of 16 rows: r[0..1] = column g of the first piece at rows 2c, 2c + 1
  // and + 8; r[2..3] = the same of the second piece.
  __device__ __forceinline__ void columns_trans(uint32_t (&r)[4], int row, int piece, int lane) const {
    ldmatrix4_trans(r, at(row + (lane & 15), piece + (lane >> 4)));
  }
};

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
