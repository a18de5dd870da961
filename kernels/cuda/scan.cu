// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/scan.h"

namespace powerattn::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// prefix[n] = carry;  carry = exp(g_end[n]) carry + local[n], n over the chunks of a sequence. One thread owns
// N neighbouring elements for a whole sequence; the loads of the next kAhead chunks are in flight while it
// adds.
template <class Local, class Prefix, int N>
__global__ void __launch_bounds__(kThreads) scan_kernel(ScanArgs a) {
  constexpr int kAhead = 4;
  const int64_t packs = a.elements / N;
  const int64_t pack = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  const int64_t head = blockIdx.y % a.heads,
                m = blockIdx.y / a.heads + int64_t(blockIdx.z) * (gridDim.y / a.heads);
  if (pack >= packs || m >= a.table.num_sequences) return;
  const Sequence s = a.table.sequences[m];
  const int64_t e = pack * N;
  const int64_t b = batch_of(a.packed, int32_t(m));

  float carry[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    carry[i] = a.initial ? a.initial[m * a.initial_stride_n + head * a.initial_stride_h + e + i] : 0.0f;

  auto slot = [&](int64_t i) {  // i-th chunk in the order of the scan
    const int64_t n = s.first_chunk + (a.reverse ? s.chunks - 1 - i : i);
    return (n * a.heads + head) * a.elements + e;
  };
  auto decay = [&](int64_t i) {
    const int64_t n = s.first_chunk + (a.reverse ? s.chunks - 1 - i : i);
    if (!a.g) return 1.0f;
    const Chunk c = a.table.chunks[n];
    return expf(a.g[(b * a.heads + head) * a.seq_len + c.start + c.length - 1]);
  };
  const auto *local = static_cast<const Local *>(a.local);
  auto *prefix = static_cast<Prefix *>(a.prefix);
  for (int64_t i = 0; i < s.chunks; i += kAhead) {
    Pack<Local, N> ahead[kAhead];
    float gate[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= s.chunks) break;
      ahead[k] = *reinterpret_cast<const Pack<Local, N> *>(local + slot(i + k));
      gate[k] = decay(i + k);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= s.chunks) break;
      Pack<Prefix, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        out.v[j] = from_float<Prefix>(carry[j]);
        carry[j] = gate[k] * carry[j] + to_float(ahead[k].v[j]);
      }
      *reinterpret_cast<Pack<Prefix, N> *>(prefix + slot(i + k)) = out;
    }
  }
  if (a.final) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.final[m * a.final_stride_n + head * a.final_stride_h + e + i] = carry[i];
  }
}

template <int N>
cudaError_t launch_scan(const ScanArgs &a, cudaStream_t stream) {
  const int64_t rows = a.table.num_sequences * a.heads;
  const int64_t per_slab = std::max<int64_t>(1, 65535 / a.heads) * a.heads;  // grid y limit, whole sequences
  const dim3 grid(unsigned(ceil_div(a.elements / N, kThreads)), unsigned(std::min(rows, per_slab)),
                  unsigned(ceil_div(rows, per_slab)));
  return with_dtype(a.local_dtype, [&](auto local) {
    return with_dtype(a.prefix_dtype, [&](auto prefix) {
      return launch_kernel(scan_kernel<decltype(local), decltype(prefix), N>, grid, kThreads, 0, stream, a);
    });
  });
}

// One (chunk, head) per block: thread-strided sums in double, then the threads in order.
__global__ void __launch_bounds__(kThreads) boundary_kernel(BoundaryArgs a) {
  __shared__ double partial[kThreads];
  const int64_t n = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const Chunk c = a.table.chunks[n];
  if (c.length == 0) return;
  const int64_t row = (batch_of(a.packed, c.sequence) * a.heads + head) * a.seq_len + c.start;
  double sum = 0;
  if (a.state) {
    const int64_t at = (n * a.heads + head) * a.elements;
    for (int64_t i = threadIdx.x; i < a.elements; i += kThreads)
      sum += double(a.state[at + i]) * double(a.grad[at + i]);
    if (a.g) sum *= exp(a.g[row + c.length - 1]);
  }
  if (a.own)
    for (int64_t t = threadIdx.x; t < c.length; t += kThreads)
      sum += double(a.own_scale) * double(a.own[row + t]);
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    double mine = 0;
    for (int i = 0; i < kThreads / 32; ++i) mine += partial[threadIdx.x + 32 * i];
    mine = warp_sum(mine);
    if (threadIdx.x == 0) {
      float *out = a.out + n * a.heads + head;
      *out = float(mine + (a.accumulate ? double(*out) : 0.0));
    }
  }
}

bool vector_aligned(const ScanArgs &a) {
  auto ok = [](const void *x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return a.elements % 4 == 0 && ok(a.local) && ok(a.prefix);
}

}  // namespace

cudaError_t scan(const ScanArgs &a, cudaStream_t stream) {
  if (a.table.num_sequences == 0 || a.elements == 0) return cudaSuccess;
  return vector_aligned(a) ? launch_scan<4>(a, stream) : launch_scan<1>(a, stream);
}

cudaError_t boundary(const BoundaryArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.table.num_chunks * a.heads;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(boundary_kernel, unsigned(blocks), kThreads, 0, stream, a);
}

}  // namespace powerattn::cuda
