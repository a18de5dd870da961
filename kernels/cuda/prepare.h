// SPDX-License-Identifier: Apache-2.0
// The prepare pass: rotary embedding, odd strides and dtypes -> contiguous [b, heads, t, dim]; and back for
// gradients. Only run where a kernel cannot read its tensors in place; describe names it.
#pragma once

#include <cuda_runtime_api.h>

#include "chunks.h"
#include "problem.h"

namespace powerattn::cuda {

struct PrepareArgs {
  powerattn_tensor in{};  // [b, t, heads, dim], strided
  Dtype in_dtype = Dtype::kFloat32;
  void *out = nullptr;  // contiguous [b, heads, t, dim]
  Dtype out_dtype = Dtype::kFloat32;
  int64_t heads = 0;
  int64_t dim = 0;
  float scale = 1.0f;                    // applied after the rotation
  bool rope = false;                     // rotate by p.rope
  const int64_t *rope_offset = nullptr;  // [sequences] or null
};

// out[b,h,t,:] = scale * R(position(t)) in[b,t,h,:]. Rows outside the sequences become zero.
cudaError_t prepare(const Problem &p, const ChunkTable &table, const PrepareArgs &args, cudaStream_t stream);

struct FinishArgs {
  const float *in = nullptr;  // contiguous [b, heads, t, dim]
  powerattn_tensor out{};     // [b, t, heads, dim], strided
  Dtype out_dtype = Dtype::kFloat32;
  int64_t heads = 0;
  int64_t dim = 0;
  float scale = 1.0f;
  bool rope = false;  // rotate back: R(position)^T
  const int64_t *rope_offset = nullptr;
};

// out[b,t,h,:] = scale * R(position(t))^T in[b,h,t,:], rounded to out_dtype. Padding rows become zero.
cudaError_t finish(const Problem &p, const ChunkTable &table, const FinishArgs &args, cudaStream_t stream);

}  // namespace powerattn::cuda
