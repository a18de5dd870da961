// SPDX-License-Identifier: Apache-2.0
// The internal state layout of the tensor-core kernels (degrees 1 and 2, head_dim a multiple of 8; value_dim 32,
// 64 or a multiple of 64): tiles of 64 state rows, each row value_dim bfloat16, 16-byte pieces swizzled as the
// matrix units read them from shared memory, so that a plain copy of a contiguous tile is ready to use.
//
// Degree 2: tile (ib, jb), ib <= jb, of blocks of 8, in lexicographic order; row = 8*(i - 8 ib) + (j - 8 jb).
//   Off-diagonal tiles hold the sum weighted by 2 (the canonical row times sqrt 2); diagonal tiles hold all 64
//   products, weight 1 (the canonical row over sqrt 2 where i != j). Then sum over tile rows of q_i q_j X = (phi
//   (q) . X_canonical), for sums of keys and for gradients alike.
// Degree 1: tile n holds rows 64 n .. 64 n + 63 (head_dim 32: one tile of 32 rows).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define POWERATTN_HD __host__ __device__
#else
#define POWERATTN_HD
#endif

namespace powerattn::cuda {

POWERATTN_HD inline int64_t tile_count(int32_t degree, int64_t head_dim) {
  int64_t blocks = head_dim / 8;
  return degree == 1 ? (head_dim + 63) / 64 : blocks * (blocks + 1) / 2;
}

// Rows of the padded state, D'.
POWERATTN_HD inline int64_t tile_rows(int32_t degree, int64_t head_dim) {
  return degree == 1 ? head_dim : 64 * tile_count(degree, head_dim);
}

// Tile of block pair (ib, jb), ib <= jb.
POWERATTN_HD inline int64_t tile_of_blocks(int64_t head_dim, int64_t ib, int64_t jb) {
  int64_t blocks = head_dim / 8;
  return ib * blocks - ib * (ib - 1) / 2 + (jb - ib);
}

// Element offset inside a tile of `value_dim` columns. Columns come in panels of 64 (128-byte rows, piece index
// XOR row % 8); value_dim 32 is one panel of 64-byte rows (piece index XOR (row / 2) % 4).
POWERATTN_HD inline int64_t tile_position(int64_t value_dim, int64_t row, int64_t col) {
  if (value_dim == 32) return row * 32 + (((col / 8) ^ ((row / 2) & 3)) * 8) + col % 8;
  int64_t panel = col / 64, c = col % 64;
  return panel * 64 * 64 + row * 64 + (((c / 8) ^ (row & 7)) * 8) + c % 8;
}

}  // namespace powerattn::cuda
