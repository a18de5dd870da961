// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of the tensor-core rows: q and k in rotated copies of their own dtype, gradients rotated
// back from float32. Copies are contiguous [b, heads, t, head_dim].
#pragma once

#include <cuda_runtime_api.h>

#include "common.h"
#include "kernels/cuda/chunks.h"

namespace powerattn::cuda {

struct Rotated {  // copies of q and k; null without rotary embedding
  uint16_t *q = nullptr, *k = nullptr;
};
Rotated carve_rotated(const Problem &p, Carver *c);

// A copy as a tensor.
powerattn_tensor rotated(const Problem &p, uint16_t *copy, int64_t heads);
cudaError_t rotate(const Problem &p, const ChunkTable &table, const powerattn_tensor &x, uint16_t *copy,
                   int64_t heads, const int64_t *offset, cudaStream_t stream);
cudaError_t rotate_back(const Problem &p, const ChunkTable &table, const float *copy,
                        const powerattn_tensor &out, int64_t heads, const int64_t *offset, cudaStream_t stream);

}  // namespace powerattn::cuda
