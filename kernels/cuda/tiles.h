// SPDX-License-Identifier: Apache-2.0
// The internal layout of a state on CUDA devices: which product of features stands in which row, and where its
// values lie in memory. Shared by every tensor-core kernel, so that a state one of them wrote feeds another.
//
// Degree 2. head_dim is cut into blocks of 8 features. A tile is a pair of blocks (ib, jb), ib <= jb, and has
// 64 rows: row 8 * (i - 8 ib) + (j - 8 jb) belongs to the product x_i x_j. Tiles are ordered by ib, then jb:
//
//   tiles = nb (nb + 1) / 2,  nb = head_dim / 8       d = 32: 10   d = 64: 36   d = 128: 136
//   tile(ib, jb) = ib nb - ib (ib - 1) / 2 + (jb - ib)
//
// A tile off the diagonal stands for x_i x_j and x_j x_i, so its *stored* state carries the weight 2 (exact in
// any binary format). A diagonal tile holds both orders, all with weight 1. With R[ij] = sum_t w_t k_i k_j v
// the raw sum, the stored tile is W R, W in {1, 2}, and sum over all tile rows of (q_i q_j) (W R) = phi(q) . S.
//
// Degree 1. Tiles of 64 consecutive features, at least one; rows from head_dim on are zero. W = 1.
//
// Memory of one tile: [64 rows][value_dim] 2-byte elements in 16-byte pieces of 8 columns, the pieces of a row
// permuted so that eight consecutive rows of one piece lie in different banks (the 128- and 64-byte swizzles of
// the copy engine and of wgmma):
//   value_dim 64:  row * 128 + ((piece ^ (row & 7)) << 4)
//   value_dim 128: two halves of 64 columns, one after the other, each 8 KB as above
//   value_dim 32:  row * 64 + ((piece ^ ((row >> 1) & 3)) << 4)
// Tiles of a slot are contiguous, slots are [chunk][head]: slot = chunk * heads + head.
#pragma once

#include <cstdint>

#if !defined(POWERATTN_HD)
#if defined(__CUDACC__)
#define POWERATTN_HD __host__ __device__
#else
#define POWERATTN_HD
#endif
#endif

namespace powerattn {
namespace cuda {

constexpr int kBlock = 8;      // features per block
constexpr int kTileRows = 64;  // state rows per tile

POWERATTN_HD constexpr int tile_blocks(int head_dim) { return head_dim / kBlock; }

POWERATTN_HD constexpr int tile_count(int degree, int head_dim) {
  return degree == 1 ? (head_dim + kTileRows - 1) / kTileRows
                     : tile_blocks(head_dim) * (tile_blocks(head_dim) + 1) / 2;
}

// Padded rows of a state.
POWERATTN_HD constexpr int tile_rows(int degree, int head_dim) {
  return tile_count(degree, head_dim) * kTileRows;
}

POWERATTN_HD constexpr int tile_index(int nb, int ib, int jb) {
  return ib * nb - ib * (ib - 1) / 2 + (jb - ib);
}

// The pair of blocks of a tile, by walking the rows of the triangle (nb <= 16 steps).
POWERATTN_HD constexpr void tile_pair(int nb, int tile, int *ib, int *jb) {
  int i = 0;
  while (tile >= nb - i) {
    tile -= nb - i;
    ++i;
  }
  *ib = i;
  *jb = i + tile;
}

// The canonical row of features i <= j, degree 2.
POWERATTN_HD constexpr int64_t canonical_row(int d, int i, int j) {
  return static_cast<int64_t>(i) * d - static_cast<int64_t>(i) * (i - 1) / 2 + (j - i);
}

// Byte offset of (row, 16-byte piece) in a shared- or global-memory tile of `rows` rows and `cols` 2-byte
// columns.
template <int kCols>
POWERATTN_HD constexpr uint32_t swizzle(int rows, int row, int piece) {
  if (kCols == 32) return static_cast<uint32_t>(row * 64 + ((piece ^ ((row >> 1) & 3)) << 4));
  return static_cast<uint32_t>((piece >> 3) * rows * 128 + row * 128 + (((piece & 7) ^ (row & 7)) << 4));
}

// Runtime twin of swizzle, in elements: (row, column) of one state tile.
POWERATTN_HD inline int64_t tile_element(int value_dim, int row, int col) {
  const int piece = col >> 3;
  const uint32_t byte =
      value_dim == 32 ? swizzle<32>(kTileRows, row, piece) : swizzle<64>(kTileRows, row, piece);
  return static_cast<int64_t>(byte / 2 + (col & 7));  // NOLINT(bugprone-misplaced-widening-cast): under 2^16
}

// Stored value = tile_scale * canonical value, and back with tile_unscale: canonical rows carry
// sqrt(multinomial), tiles carry W. sqrt(2) off the diagonal tiles; inside one, 1/sqrt(2) for i != j.
POWERATTN_HD inline float tile_scale(bool same_block, bool same_feature) {
  return same_feature ? 1.f : same_block ? 0.70710678118654752f : 1.41421356237309505f;
}
POWERATTN_HD inline float tile_unscale(bool same_block, bool same_feature) {
  return same_feature ? 1.f : same_block ? 1.41421356237309505f : 0.70710678118654752f;
}

// Bytes of one slot of 2-byte tiles.
POWERATTN_HD constexpr int64_t slot_elements(int degree, int head_dim, int value_dim) {
  return static_cast<int64_t>(tile_rows(degree, head_dim)) * value_dim;
}

}  // namespace cuda
}  // namespace powerattn
