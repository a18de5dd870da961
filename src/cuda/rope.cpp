// SPDX-License-Identifier: Apache-2.0
#include "rope.h"

#include "kernels/cuda/prepare.h"

namespace powerattn::cuda {

Rotated carve_rotated(const Problem &p, Carver *c) {
  Rotated r;
  if (!with_rope(p)) return r;
  r.q = c->take<uint16_t>(p.batch * p.heads_q * p.seq_len * p.head_dim);
  r.k = c->take<uint16_t>(p.batch * p.heads_kv * p.seq_len * p.head_dim);
  return r;
}

powerattn_tensor rotated(const Problem &p, uint16_t *copy, int64_t heads) {
  return {copy, heads * p.seq_len * p.head_dim, p.head_dim, p.seq_len * p.head_dim};
}

cudaError_t rotate(const Problem &p, const ChunkTable &table, const powerattn_tensor &x, uint16_t *copy,
                   int64_t heads, const int64_t *offset, cudaStream_t stream) {
  PrepareArgs a;
  a.in = x;
  a.in_dtype = a.out_dtype = p.dtype;
  a.out = copy;
  a.heads = heads;
  a.dim = p.head_dim;
  a.rope = true;
  a.rope_offset = offset;
  return prepare(p, table, a, stream);
}

cudaError_t rotate_back(const Problem &p, const ChunkTable &table, const float *copy,
                        const powerattn_tensor &out, int64_t heads, const int64_t *offset,
                        cudaStream_t stream) {
  FinishArgs a;
  a.in = copy;
  a.out = out;
  a.out_dtype = p.dtype;
  a.heads = heads;
  a.dim = p.head_dim;
  a.rope = true;
  a.rope_offset = offset;
  return finish(p, table, a, stream);
}

}  // namespace powerattn::cuda
