// SPDX-License-Identifier: Apache-2.0
// The scan over chunks that turns the sums of each chunk into the state before it (or, in reverse, into the
// gradient of the state after it). Elementwise, float32 carry, so any element order of the state works as long
// as all operands share it.
#pragma once

#include <cuda_runtime_api.h>

#include "chunks.h"

namespace powerattn::cuda {

struct ScanArgs {
  ChunkTable table;
  bool packed = false;
  bool reverse = false;
  int64_t heads = 0;            // kv heads
  int64_t elements = 0;         // of one state
  const void *local = nullptr;  // [num_chunks, heads, elements]
  Dtype local_dtype = Dtype::kFloat32;
  void *prefix = nullptr;  // same shape: the carry at each chunk; may be `local` when the dtypes agree
  Dtype prefix_dtype = Dtype::kFloat32;
  const float *g =
      nullptr;          // [b, heads, t] of chunk_gates: a chunk's gate is at its last token; null: no gates
  int64_t seq_len = 0;  // extent of t in g
  const float *initial = nullptr;  // carry to start from, or null = 0: [sequences, heads, elements] by strides
  int64_t initial_stride_n = 0;
  int64_t initial_stride_h = 0;
  float *final = nullptr;  // last carry, or null; may be the same memory as initial
  int64_t final_stride_n = 0;
  int64_t final_stride_h = 0;
};

// For each sequence, head and element, over its chunks n in order (reverse: last first):
//   prefix[n] = carry;  carry = exp(g_end[n]) * carry + local[n]
// with carry = initial before and final = carry after. Empty sequences copy initial to final.
cudaError_t scan(const ScanArgs &args, cudaStream_t stream);

// The boundary term of the gate gradient, <state after the chunk, gradient of that state>, whose part from the
// chunk's own keys is already there: what the state gave to k . dk / p, summed over the chunk. Taken from there
// it cancels against the sums of k . dk without an error, and only what passes through the chunk is a product
// of states:
//   out[chunk, head] = e^{g_end} sum over elements of state[n] * grad[n]  +  own_scale * sum over tokens of own
// Ordered sums in float64. Pairs (S, z) add up when `accumulate`.
struct BoundaryArgs {
  ChunkTable table;
  bool packed = false;
  int64_t heads = 0;
  int64_t seq_len = 0;
  int64_t elements = 0;
  const float *state = nullptr;  // [num_chunks, heads, elements]: before each chunk; null: 0
  const float *grad = nullptr;   // [num_chunks, heads, elements]: after each chunk
  const double *g = nullptr;     // [b, heads, t], cumulative in the chunk; null: 0
  const float *own = nullptr;    // [b, heads, t]; null: 0
  float own_scale = 0;
  float *out = nullptr;  // [num_chunks, heads]
  bool accumulate = false;
};
cudaError_t boundary(const BoundaryArgs &args, cudaStream_t stream);

}  // namespace powerattn::cuda
