// SPDX-License-Identifier: Apache-2.0
// Threads, tiles and shared memory of each kernel, with the arithmetic beside it.
#pragma once

#include "../tiles.h"
#include "args.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

// Which rows a block owns. In shared memory: read again where needed, it would hold 12 registers all along.
struct Place {
  Tile tile;
  Chunk chunk;
};

template <int D>
struct OutputShape {
  static constexpr int kWarps = 4, kThreads = 128, kM = 2;  // 16-row fragments per warp
  static constexpr int kColumns = 64;
  static constexpr int kStep = D == 128 ? 16 : 32;  // columns whose scores are in registers at once
  static constexpr int kTileBytes = kTileRows * D * 2;
  static constexpr int kRowBytes = kRowTile * D * 2;
  // x rows | 4 buffers: 4 state tiles, or 2 x (64 columns of z and of u)   d=64: 16 + 32 KB, d=128: 32 + 64 KB
  // | factors and gates of 2 x 64 columns | which rows these are | float16: a power of two per row
  static constexpr int kShared = kRowBytes + 4 * kTileBytes + 4 * kColumns * 4 + sizeof(Place) + kRowTile * 4;
};

template <int D>
struct GradientShape {
  static constexpr int kM = D == 128 ? 1 : 2;  // 16-row fragments per warp: 64 + 64 registers of x, u at most
  static constexpr int kWarps = kRowTile / (16 * kM), kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSM = D == 128 ? 1 : 2;
  static constexpr int kColumns = 64;
  static constexpr int kStep = 16;
  static constexpr int kTileBytes = kTileRows * D * 2;
  static constexpr int kRowBytes = kRowTile * D * 2;
  // x rows | u rows | 4 buffers | factors, gates, deltas of 2 x 64 columns | place    d=64: 64 KB, d=128: 128
  // KB
  static constexpr int kShared = 2 * kRowBytes + 4 * kTileBytes + 6 * kColumns * 4 + sizeof(Place);
};

template <int D, int P>
struct UpdateShape {
  static constexpr int kM = P == 1 ? 1 : 4;  // 16-row fragments per unit
  static constexpr int kHalves = D == 128 ? 2 : 1;
  static constexpr int kCols = D / kHalves;
  static constexpr int kUnits = (P == 1 ? D / 16 : tile_count(2, D)) * kHalves;
  // d=32: 10 units = 2 blocks of 5 warps; d=64: 36 = 9 of 4; d=128: 272 = 34 of 8. Degree 1: 2, 4, 2 of 8.
  static constexpr int kWarps = P == 1 ? (kUnits < 8 ? kUnits : 8) : D == 32 ? 5 : D == 64 ? 4 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSlices = (kUnits + kWarps - 1) / kWarps;
  static constexpr int kBlocksPerSM = D == 128 ? 1 : 2;
  static constexpr int kTokens = 64, kStages = 3;
  static constexpr int kTileBytes = kTokens * D * 2;
  // 3 stages of x, u and weights    d=64: 48 KB, d=128: 96 KB
  static constexpr int kShared = kStages * (2 * kTileBytes + kTokens * 4);
};

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
