// SPDX-License-Identifier: Apache-2.0
// The scan over chunks, one thread per element of a state: chunks are long, so states are few and their walk is
// short.
#include "args.h"
#include "kernels/cuda/launch.cuh"

namespace powerattn::cuda::linear {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 16;  // loads in flight per thread; the carry depends on none of them

// Elements 0 .. d d - 1 are S, the next d are z.
__global__ void __launch_bounds__(kThreads) scan_kernel(const __grid_constant__ ScanArgs a, int blocks) {
  const Shape &s = a.shape;
  const int64_t pair = blockIdx.x / blocks;
  const int at = static_cast<int>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  const int sequence = static_cast<int>(pair / s.heads_kv), head = static_cast<int>(pair % s.heads_kv);
  const int d = s.head_dim, elements = d * d;
  const bool is_z = at >= elements;
  const int v = is_z ? at - elements : at;
  if (is_z && (a.z == nullptr || v >= d)) return;

  int64_t first = static_cast<int64_t>(sequence) * s.per_sequence;
  int chunks = s.per_sequence;
  if (s.packed) {
    first = s.table.sequences[sequence].first_chunk;
    chunks = s.table.sequences[sequence].chunks;
  }
  const int64_t stride = static_cast<int64_t>(s.heads_kv) * (is_z ? d : elements);
  float *const local = (is_z ? a.z : a.state) + (first * s.heads_kv + head) * (is_z ? d : elements) + v;
  const float *const decay = a.decay != nullptr ? a.decay + first * s.heads_kv + head : nullptr;

  float carry = 0.f;
  const float *const begin = static_cast<const float *>(is_z ? a.initial.z : a.initial.s);
  if (begin != nullptr)
    carry = begin[sequence * (is_z ? a.initial.z_stride_n : a.initial.s_stride_n) +
                  head * (is_z ? a.initial.z_stride_h : a.initial.s_stride_h) + v];
  for (int n0 = 0; n0 < chunks; n0 += kAhead) {
    float in[kAhead], f[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < chunks) {
        in[q] = local[n * stride];
        f[q] = decay != nullptr ? decay[static_cast<int64_t>(n) * s.heads_kv] : 1.f;
      }
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int n = a.reverse ? chunks - 1 - (n0 + q) : n0 + q;
      if (n0 + q < chunks) {
        local[n * stride] = carry;
        carry = carry * f[q] + in[q];
      }
    }
  }
  float *const slot = is_z ? a.z_end : a.end;
  if (slot != nullptr) slot[pair * (is_z ? d : elements) + v] = carry;
  float *const end = static_cast<float *>(is_z ? a.final.z : a.final.s);
  if (end != nullptr)
    end[sequence * (is_z ? a.final.z_stride_n : a.final.s_stride_n) +
        head * (is_z ? a.final.z_stride_h : a.final.s_stride_h) + v] = carry;
}

}  // namespace

cudaError_t scan(const ScanArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t pairs = s.table.num_sequences * s.heads_kv;
  if (pairs == 0) return cudaSuccess;
  const int elements = s.head_dim * s.head_dim + (a.z != nullptr ? s.head_dim : 0);
  const int blocks = (elements + kThreads - 1) / kThreads;
  return launch_kernel(scan_kernel, static_cast<unsigned>(pairs * blocks), kThreads, 0, stream, a, blocks);
}

}  // namespace powerattn::cuda::linear
