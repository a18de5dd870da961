// SPDX-License-Identifier: Apache-2.0
// Operations on states: compose, convert, pack and unpack copies, and the change between the canonical order
// and the tile layout of the tensor-core kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace powerattn::cuda {

// See powerattn_state_compose.
cudaError_t compose(const Problem &p, const powerattn_compose_args &args, cudaStream_t stream);

// Copies `rows` x `heads` blocks of `elements` numbers between pools.
struct ConvertArgs {
  const void *src = nullptr;
  Dtype src_dtype = Dtype::kFloat32;
  int64_t src_stride_n = 0;
  int64_t src_stride_h = 0;
  const int64_t *src_slots = nullptr;  // device, [count], or null
  int64_t src_num_slots = 0;
  void *dst = nullptr;
  Dtype dst_dtype = Dtype::kFloat32;
  int64_t dst_stride_n = 0;
  int64_t dst_stride_h = 0;
  const int64_t *dst_slots = nullptr;
  int64_t dst_num_slots = 0;
  int64_t count = 0;
  int64_t heads = 0;
  int64_t elements = 0;
};
// A slot that is negative or past its pool is skipped.
cudaError_t convert(const ConvertArgs &args, cudaStream_t stream);

// Canonical float32 (S [n, h, D, e] and z [n, h, D], strided as in powerattn_state) <-> the element order of
// tiles.h in float32: S [n, h, tile_rows * e] and, degree 2, Z [n, h, d, d] symmetric with
// Z = sum w k k^T (degree 1: z [n, h, d]). Contiguous; z may be null.
cudaError_t to_tiles(const Problem &p, const powerattn_state &canonical, float *tiles, float *z,
                     int64_t sequences, cudaStream_t stream);
cudaError_t from_tiles(const Problem &p, const float *tiles, const float *z, const powerattn_state &canonical,
                       int64_t sequences, cudaStream_t stream);

}  // namespace powerattn::cuda
