// SPDX-License-Identifier: Apache-2.0
#include "tensor_map.h"

namespace powerattn::cuda::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library links no driver.
Encode encoder() {
  static const Encode found = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                         : nullptr;
  }();
  return found;
}

}  // namespace

cudaError_t tile_map(const Tensor &x, const Shape &p, int heads, TileMap *map, uint32_t rows) {
  *map = TileMap{};
  const int64_t batch = p.packed ? 1 : p.table.num_sequences;
  const cuuint64_t row = static_cast<cuuint64_t>(p.head_dim) * 2;
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.tokens),
                                 static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const int64_t steps[3] = {x.stride_t, x.stride_h, x.stride_b};  // elements
  cuuint64_t strides[3], shown[4] = {extents[0], 1, 1, 1};
  bool good = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    // A stride that is never used, or 0 (one index serves all), is an extent of 1 with a stride that is legal.
    const bool one = extents[i + 1] == 1 || (steps[i] == 0 && i > 0);
    good = good && extents[i + 1] >= 1 && extents[i + 1] < (cuuint64_t(1) << 31) &&
           (one || (steps[i] > 0 && steps[i] % 8 == 0 && steps[i] < (int64_t(1) << 39)));
    strides[i] = one ? row : static_cast<cuuint64_t>(steps[i]) * 2;
    shown[i + 1] = one ? 1 : extents[i + 1];
  }
  if (!good) return cudaSuccess;
  const Encode encode = encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t box[4] = {64, rows, 1, 1}, every[4] = {1, 1, 1, 1};
  if (encode(&map->map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, x.data, shown, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return cudaErrorInvalidValue;
  map->step_head = shown[2] > 1;
  map->step_batch = shown[3] > 1;
  map->tiled = 1;
  return cudaSuccess;
}

cudaError_t result_map(const Tensor &x, const Shape &p, int heads, TileMap *map) {
  *map = TileMap{};
  return x.data == nullptr || x.floats ? cudaSuccess : tile_map(x, p, heads, map, kResultRows);
}

}  // namespace powerattn::cuda::sm90
