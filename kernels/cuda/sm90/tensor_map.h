// SPDX-License-Identifier: Apache-2.0
// Tensors for the copy engine: one thread asks for a tile of 64 rows x 64 columns, which arrives swizzled, with
// zeros where it leaves the tensor, and reports to a barrier; or sends one of 16 rows.
#pragma once

#include <cuda.h>

#include "kernels.h"

namespace powerattn::cuda::sm90 {

// Passed by value to a kernel, whose parameters the copy engine reads.
struct TileMap {
  CUtensorMap map{};  // columns, tokens, heads, batch
  int32_t tiled = 0;  // 0: strides that a map cannot have; threads load the rows (load_tile)
  int32_t step_head = 0, step_batch = 0;  // of the coordinates; 0: the tensor is the same for all (stride 0)
};

// Encodes the map on the host. An error only where the driver has no maps or refuses one.
cudaError_t tile_map(const Tensor &x, const Shape &p, int heads, TileMap *map, uint32_t rows = 64);
// For results: of the rows that a warp holds. None for float32.
constexpr int kResultRows = 16;
cudaError_t result_map(const Tensor &x, const Shape &p, int heads, TileMap *map);

}  // namespace powerattn::cuda::sm90
