// SPDX-License-Identifier: Apache-2.0
// What a call of the tensor-core implementations does around its kernels: launches that stop at the first
// error, rotated copies, zeros behind packed sequences.
#pragma once

#include <cuda_runtime_api.h>

#include "common.h"
#include "kernels/cuda/chunks.h"
#include "rope.h"

namespace powerattn::cuda {

struct CallBase {
  const Problem &p;
  const Tiling &t;
  const cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  ChunkTable table;

  CallBase(const powerattn_plan &plan, void *s) : p(plan.problem), t(plan.tiling), stream(stream_of(s)) {}
  CallBase(const CallBase &) = delete;
  CallBase &operator=(const CallBase &) = delete;

  template <class Launch>
  void run(Launch launch) {
    if (error == cudaSuccess) error = launch();
  }

  // The tensor that the kernels read: x itself, or its rotated copy.
  powerattn_tensor rotate(const powerattn_tensor &x, uint16_t *copy, int64_t heads, const int64_t *offset) {
    if (copy == nullptr) return x;
    run([&] { return cuda::rotate(p, table, x, copy, heads, offset, stream); });
    return rotated(p, copy, heads);
  }
  void rotate_back(const float *x, const powerattn_tensor &out, int64_t heads, const int64_t *offset) {
    if (x != nullptr) run([&] { return cuda::rotate_back(p, table, x, out, heads, offset, stream); });
  }

  void zero_padding(const powerattn_forward_args &args) {
    zero_padding(args.y, p.dtype, p.heads_q, p.value_dim);
    zero_padding(args.row_norm, Dtype::kFloat32, p.heads_q, 1);
  }
  void zero_padding(const powerattn_backward_args &args) {
    zero_padding(args.d_q, p.dtype, p.heads_q, p.head_dim);
    zero_padding(args.d_k, p.dtype, p.heads_kv, p.head_dim);
    zero_padding(args.d_v, p.dtype, p.heads_kv, p.value_dim);
    zero_padding(args.d_log_g, Dtype::kFloat32, p.heads_kv, 1);
  }

 private:
  void zero_padding(const powerattn_tensor &out, Dtype dtype, int64_t heads, int64_t dim) {
    if (p.packed && out.data != nullptr)
      run([&] { return cuda::zero_padding(p, table, out, dtype, heads, dim, stream); });
  }
};

}  // namespace powerattn::cuda
