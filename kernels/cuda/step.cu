// SPDX-License-Identifier: Apache-2.0
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/ptx/sm90.cuh"
#include "kernels/cuda/step.h"

namespace powerattn::cuda {
namespace {

constexpr int kThreads = 256;
// Rows of a thread where a block has all of its rows in flight, with V columns each: degree 2, d = 64 has 130
// rows, 16 or 32 of them at a time.
template <int V>
constexpr int kRowsAtOnce = V == 4 ? 9 : 5;
constexpr int kRowBlock = 256;  // state rows whose features are held in shared memory at once

struct StepShape {
  int64_t seq_len, heads_q, heads_kv, d, e, rows, num_slots;
  int group, degree, splits, threads_per_row;
  int64_t rows_per_split;
  bool normalize, rope, interleaved;
  int64_t rope_dim;
  double rope_log2_base;
  float scale_p, eps;
  Dtype dtype;
  float *partial;  // [sequences, heads_kv, splits, queries, e + 1]; without clusters
};

// C(n, k), exact in double below 2^53.
__device__ double choose(int n, int k) {
  double c = 1;
#pragma unroll 1
  for (int i = 1; i <= k; ++i) c = c * double(n - k + i) / double(i);
  return rint(c);
}

// Indices (one byte each) and sqrt(multinomial) of a canonical row. Degrees 1 and 2 in closed form, since this
// runs in every step; see powerattn_state_monomial for the order.
struct Row {
  uint64_t indices;
  float weight;
};
__device__ __noinline__ Row locate_general(int64_t row, int d, int degree);
__device__ inline Row locate_row(int64_t row, int d, int degree) {
  if (degree == 1) return {uint64_t(row), 1.0f};
  if (degree == 2) {
    // Row of (i, i) is i d - i (i - 1) / 2: solve for i, then correct the rounding.
    const float b = float(2 * d + 1);
    int i = int((b - sqrtf(fmaxf(b * b - 8.0f * float(row), 0.0f))) * 0.5f);
    i = max(0, min(i, d - 1));
    while (i > 0 && int64_t(i) * d - int64_t(i) * (i - 1) / 2 > row) --i;
    while (i + 1 < d && int64_t(i + 1) * d - int64_t(i + 1) * i / 2 <= row) ++i;
    const int j = i + int(row - (int64_t(i) * d - int64_t(i) * (i - 1) / 2));
    return {uint64_t(i) | uint64_t(j) << 8, i == j ? 1.0f : 1.41421356237309505f};
  }
  return locate_general(row, d, degree);
}

// Higher degrees: walks the order. Out of line, so that it costs the kernel no registers.
__device__ __noinline__ Row locate_general(int64_t row, int d, int degree) {
  double left_rows = double(row), weight2 = 1;
  uint64_t indices = 0;
  int i = 0, run = 0;
#pragma unroll 1
  for (int position = 0; position < degree; ++position) {
    const int left = degree - position - 1, start = i;
#pragma unroll 1
    for (; i < d - 1; ++i) {
      const double block = choose(d - i + left - 1, left);
      if (left_rows < block) break;
      left_rows -= block;
    }
    run = position > 0 && i == start ? run + 1 : 1;
    weight2 *= double(position + 1) / double(run);
    indices |= uint64_t(i) << (8 * position);
  }
  return {indices, float(sqrt(weight2))};
}

__device__ float feature_of(const Row &r, int degree, const float *x) {
  if (degree == 2) return r.weight * (x[r.indices & 255] * x[r.indices >> 8]);
  float y = r.weight;
  uint64_t rest = r.indices;
#pragma unroll 1
  for (int i = 0; i < degree; ++i, rest >>= 8) y *= x[rest & 255];
  return y;
}

// Element `i` of a rotated row. Out of line: it would cost the kernel registers that only rotated inputs need.
__device__ __noinline__ float rotated_element(const void *from, Dtype dtype, int64_t offset, int64_t i,
                                              int64_t position, int64_t rope_dim, bool interleaved,
                                              double log2_base) {
  const int64_t pairs = rope_dim / 2, pair = interleaved ? i / 2 : i % pairs;
  const int64_t i1 = interleaved ? 2 * pair : pair, i2 = interleaved ? 2 * pair + 1 : pair + pairs;
  const float x1 = load_as_float(from, dtype, offset + i1), x2 = load_as_float(from, dtype, offset + i2);
  const double turns = double(position) * exp2(-2.0 * double(pair) / double(rope_dim) * log2_base) *
                       0.15915494309189533577;  // 1 / (2 pi), reduced in double
  float c, sn;
  sincospif(2.0f * float(turns - rint(turns)), &sn, &c);
  return i == i1 ? x1 * c - x2 * sn : x1 * sn + x2 * c;
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// Shared memory, floats: q [kQ][d], k, v [tokens of a pass][d, e], phi_k [kQ][256], phi_q [kQ][256], gates
// [kQ], sums [8][kQ][e], norms [8][kQ], partial: this block's share of what is added up,
// [splits][ceil(kQ e / splits)] sums and [splits][kQ] norms (one split without a cluster), and the barrier that
// says that they are there, at a multiple of 8 bytes.
constexpr int kMostSplits = 16;
__host__ __device__ inline int64_t step_shared_floats(int queries, int64_t d, int64_t e) {
  return queries * (2 * d + e + 2 * kRowBlock + 1) + 8 * queries * (e + 1) + queries * (e + kMostSplits) +
         kMostSplits + 3;
}

// Block: one split of the rows of one (sequence, kv head). Thread (row group, column): rows row group, + row
// groups, ...; V neighbouring columns. A pass handles up to kQ (token, query head) pairs: several tokens of a
// small group, or some heads of one token, so that their sums stay in registers; the state is read and written
// once per pass.
template <class State, int V, int kQ, bool kCluster, int kAhead>
__global__ void __launch_bounds__(kThreads, V *kQ >= 32 ? 1 : 2)
    step_kernel(const __grid_constant__ StepShape s, const __grid_constant__ powerattn_step_args a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kCluster) return;  // never launched
#endif
  float *memory = ptx::dynamic_shared<float>();
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  // Until the first rows of the state are asked for, each division of 64 bits shows.
  const unsigned heads_kv = unsigned(s.heads_kv), unit = blockIdx.x / unsigned(s.splits);
  const int split = int(blockIdx.x - unit * unsigned(s.splits));
  const int64_t b = unit / heads_kv, head = unit % heads_kv;
  float *q = memory, *k = q + kQ * s.d, *v = k + kQ * s.d, *phi_k = v + kQ * s.e,
        *phi_q = phi_k + kQ * kRowBlock;
  float *gates = phi_q + kQ * kRowBlock, *sums = gates + kQ, *norms = sums + 8 * kQ * s.e,
        *partial = norms + 8 * kQ;

#if __CUDA_ARCH__ >= 900
  [[maybe_unused]] const auto arrived = [&] {
    return (ptx::shared_address(partial + kQ * (int(s.e) + kMostSplits) + kMostSplits) + 7) & ~7u;
  };
  [[maybe_unused]] uint32_t phase = 0;
  if constexpr (kCluster) {
    if (tid == 0) {
      ptx::barrier_init(arrived(), 1);
      ptx::fence_barrier_init();
    }
    cooperative_groups::this_cluster().barrier_arrive();  // others may write to this block
    // Launched early: a step takes microseconds, of which its own launch would be one.
    ptx::let_kernel_after_begin();
    ptx::wait_for_kernel_before();
  }
#endif
  constexpr bool kWhole = kAhead > 4;                           // all rows of the split are in flight at once
  [[maybe_unused]] constexpr int kSumsAtOnce = V == 4 ? 8 : 4;  // as many as spill nothing
  const int64_t slot = a.slots ? a.slots[b] : b, position0 = a.rope_offset ? a.rope_offset[b] : 0;
  const bool skipped = slot < 0 || slot >= s.num_slots;
  int64_t length = a.lengths ? min(max(a.lengths[b], int64_t(0)), s.seq_len) : s.seq_len;
  if (skipped) length = 0;

  // Zeros for what is not computed.
  if (split == 0) {
    const int64_t count = (s.seq_len - length) * s.group * s.e;
#pragma unroll 1
    for (int64_t i = tid; i < count; i += kThreads) {
      const int64_t col = i % s.e, h = head * s.group + i / s.e % s.group, t = length + i / s.e / s.group;
      store_from_float(a.y.data, s.dtype, b * a.y.stride_b + t * a.y.stride_t + h * a.y.stride_h + col, 0.0f);
    }
  }
  if (length == 0) return;  // the whole cluster leaves: it depends on the sequence only

  State *state = static_cast<State *>(a.state.s) + slot * a.state.s_stride_n + head * a.state.s_stride_h;
  State *zstate = a.state.z
                      ? static_cast<State *>(a.state.z) + slot * a.state.z_stride_n + head * a.state.z_stride_h
                      : nullptr;
  // Rows count from the split's first: a state may have 2^31 of them, a split has fewer (step_supported).
  const int64_t row_begin = split * s.rows_per_split;
  const int rows = int(min(s.rows_per_split, s.rows - row_begin));
  state += row_begin * s.e;
  if (zstate) zstate += row_begin;
  const int tpr = s.threads_per_row, row_groups = kThreads / tpr;
  const int group_row = tid / tpr, col = tid % tpr * V, row_packs = int(s.e) / V;
  const bool active = col < s.e;

  const int heads_per_pass = min(s.group, kQ), tokens_per_pass = kQ / heads_per_pass;
#pragma unroll 1
  for (int64_t t0 = 0; t0 < length; t0 += tokens_per_pass) {
    const int tokens = int(min(int64_t(tokens_per_pass), length - t0));
#pragma unroll 1
    for (int h0 = 0; h0 < s.group; h0 += heads_per_pass) {
      const int heads = min(heads_per_pass, s.group - h0);
      const bool first = h0 == 0;  // the pass that moves the state on
      const int pairs = tokens * heads;
      unsigned starts = 0;  // bit i: pair i is the first of its token
      for (int t = 0; t < tokens; ++t) starts |= 1u << (t * heads);
      __syncthreads();
      // The first states and z are on their way while the inputs are loaded and the features are made.
      Pack<State, V> ahead[kAhead];
      auto issue = [&](int start, int limit) {
        const Pack<State, V> *from =
            reinterpret_cast<const Pack<State, V> *>(state + int64_t(start + group_row) * s.e + col);
        const int left = active ? limit - start - group_row : 0;
#pragma unroll
        for (int u = 0; u < kAhead; ++u, from += row_groups * row_packs) {
          if (u * row_groups < left) ahead[u] = *from;
        }
      };
      auto read_z = [&](int r) { return zstate && r < rows ? to_float(zstate[r]) : 0.0f; };
      issue(0, min(kRowBlock, rows));
      float znext = read_z(tid);

      const int e = int(s.e), d = int(s.d), kd = tokens * d, kve = kd + tokens * e, inputs = kve + pairs * d;
#pragma unroll 1
      for (int i = tid; i < inputs; i += kThreads) {
        const bool is_k = i < kd, is_v = !is_k && i < kve;
        const int within = is_k ? i : is_v ? i - kd : i - kve, width = is_v ? e : d;
        const int vector = pairs == 1 ? 0 : within / width, element = within - vector * width,
                  t = is_k || is_v ? vector : vector / heads;
        const powerattn_tensor &x = is_k ? a.k : is_v ? a.v : a.q;
        const int64_t h = is_k || is_v ? head : head * s.group + h0 + vector % heads;
        const int64_t offset = b * x.stride_b + (t0 + t) * x.stride_t + h * x.stride_h;
        const float value = !is_v && s.rope && element < s.rope_dim
                                ? rotated_element(x.data, s.dtype, offset, element, t0 + t + position0,
                                                  s.rope_dim, s.interleaved, s.rope_log2_base)
                                : load_as_float(x.data, s.dtype, offset + element);
        (is_k ? k : is_v ? v : q)[within] = value;
      }
      if (tid < tokens)
        gates[tid] = a.log_g.data ? expf(static_cast<const float *>(
                                        a.log_g.data)[b * a.log_g.stride_b + (t0 + tid) * a.log_g.stride_t +
                                                      head * a.log_g.stride_h])
                                  : 1.0f;

      // Meanwhile threads without an input find where the first rows lie: kept where their features will be.
      const bool located = s.degree <= 4 && kThreads - inputs >= 64;  // as many indices fit into 32 bits
      if (located && tid >= inputs) {
#pragma unroll 1
        for (int r = tid - inputs; r < min(rows, kRowBlock); r += kThreads - inputs) {
          const Row row = locate_row(row_begin + r, d, s.degree);
          phi_k[r] = __uint_as_float(unsigned(row.indices));
          phi_q[r] = row.weight;
        }
      }
#if __CUDA_ARCH__ >= 900
      // All are there long before.
      if (kCluster && h0 == 0 && t0 == 0) cooperative_groups::this_cluster().barrier_wait();
#endif
      float acc[kQ][V], norm[kQ];
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
        norm[i] = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) acc[i][j] = 0;
      }
#pragma unroll 1
      for (int block = 0; block < rows; block += kRowBlock) {
        const int count = min(kRowBlock, rows - block);
        __syncthreads();
        if (tid < count) {  // features of the block's rows, and z, which has one number per row
          const Row r = located && block == 0 ? Row{__float_as_uint(phi_k[tid]), phi_q[tid]}
                                              : locate_row(row_begin + block + tid, int(s.d), s.degree);
          float z = znext;
          int t = -1;
#pragma unroll
          for (int i = 0; i < kQ; ++i) {
            if (i >= pairs) break;
            if (starts >> i & 1) {
              ++t;
              const float pk = feature_of(r, s.degree, k + t * s.d);
              phi_k[t * kRowBlock + tid] = pk;
              if (first) z = gates[t] * z + pk;
            }
            const float pq = feature_of(r, s.degree, q + i * s.d);
            phi_q[i * kRowBlock + tid] = pq;
            norm[i] += pq * z;
          }
          if (zstate && first) zstate[block + tid] = from_float<State>(z);
        }
        __syncthreads();
        znext = read_z(block + kRowBlock + tid);
        const int block_end = block + count;
#pragma unroll 1
        for (int row = block; row < block_end; row += row_groups * kAhead) {
          Pack<State, V> now[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) now[u] = ahead[u];
          const int next = row + row_groups * kAhead;
          if constexpr (!kWhole) {
            if (next < block_end)
              issue(next, block_end);
            else
              issue(block + kRowBlock, min(block + 2 * kRowBlock, rows));
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const int at = row + group_row + u * row_groups, r = at - block;
            if (!active || at >= block_end) break;
            float x[V];
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] = to_float(now[u].v[j]);
            int t = -1;
#pragma unroll
            for (int i = 0; i < kQ; ++i) {
              if (i >= pairs) break;
              t += int(starts >> i & 1);
              if (first && (starts >> i & 1)) {
                const float gate = gates[t], pk = phi_k[t * kRowBlock + r];
#pragma unroll
                for (int j = 0; j < V; ++j) x[j] = gate * x[j] + pk * v[t * e + col + j];
              }
              const float pq = phi_q[i * kRowBlock + r];
#pragma unroll
              for (int j = 0; j < V; ++j) acc[i][j] += pq * x[j];
            }
            if (first) {
#pragma unroll
              for (int j = 0; j < V; ++j) now[u].v[j] = from_float<State>(x[j]);
              *reinterpret_cast<Pack<State, V> *>(state + int64_t(at) * s.e + col) = now[u];
            }
          }
        }
      }

      // Row groups of a warp, then warps, then splits: always in the same order.
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j)
#pragma unroll 1
          for (int m = 16; m >= tpr; m >>= 1) acc[i][j] += __shfl_xor_sync(0xffffffffu, acc[i][j], m);
        norm[i] = warp_sum(norm[i]);
      }
      const int column_warps = max(1, tpr / 32), warp_row = warp / column_warps, warp_rows = 8 / column_warps;
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
        if (active && (tpr >= 32 || lane < tpr)) {
#pragma unroll
          for (int j = 0; j < V; ++j) sums[(warp_row * kQ + i) * s.e + col + j] = acc[i][j];
        }
        if (lane == 0) norms[warp * kQ + i] = norm[i];
      }
      __syncthreads();
      // Each block writes its sums to where they are added up: elements split * share .. of [pair][e], and all
      // norms, are this one's; without clusters, in the workspace by step_reduce.
      const int width = e + 1, share = (pairs * e + s.splits - 1) / s.splits;
      float *const norm_share = partial + s.splits * share;
      const int64_t queries = s.seq_len * s.group,
                    first_query = t0 * s.group + h0;  // [t][h]: a pass is contiguous
      const int elements = pairs * e, own = max(0, min(share, elements - split * share));
      const auto norm_of = [&](int pair) {
        float sum = 0;
        for (int w = 0; w < 8; ++w) sum += norms[w * kQ + pair];
        return sum;
      };
      const auto sum_of = [&](int pair, int c) {
        float sum = 0;
#pragma unroll(kSumsAtOnce)
        for (int w = 0; w < (V == 4 ? 8 : warp_rows); ++w) {
          if (V != 4 || w < warp_rows) sum += sums[(w * kQ + pair) * s.e + c];
        }
        return sum;
      };
      if constexpr (kCluster) {
#if __CUDA_ARCH__ >= 900
        if (tid == 0) ptx::barrier_expect(arrived(), unsigned(s.splits * (own + pairs)) * 4);
        for (int i = tid; i < elements + pairs * s.splits; i += kThreads) {
          if (i < elements) {
            const int to = i / share;
            ptx::store_remote(ptx::shared_address(partial + split * share + (i - to * share)), to,
                              sum_of(i / e, i % e), arrived());
          } else {  // every block needs all norms
            const int pair = (i - elements) % pairs, to = (i - elements) / pairs;
            ptx::store_remote(ptx::shared_address(norm_share + split * pairs + pair), to, norm_of(pair),
                              arrived());
          }
        }
        ptx::barrier_wait(arrived(), phase);
        phase ^= 1;
#endif
      } else {
        for (int i = tid; i < pairs * width; i += kThreads) {
          const int pair = i / width, c = i % width;
          const float sum = c == e ? norm_of(pair) : sum_of(pair, c);
          if (s.splits > 1)
            s.partial[((int64_t(unit) * s.splits + split) * queries + first_query) * width + i] = sum;
          else
            (c == e ? norm_share[pair] : partial[pair * e + c]) = sum;
        }
        if (s.splits > 1) continue;
        __syncthreads();
      }
      const int first_element = split * share;
      for (int i = tid; i < own; i += kThreads) {
        const int pair = (first_element + i) / e, c = (first_element + i) % e;
        float y = 0, l = 0;
#pragma unroll(kSumsAtOnce)
        for (int w = 0; w < s.splits; ++w) {
          y += partial[w * share + i];
          l += norm_share[w * pairs + pair];
        }
        y *= s.scale_p;
        if (s.normalize) {
          l = l * s.scale_p + s.eps;
          y = l != 0.0f ? y / l : 0.0f;
        }
        const int64_t t = t0 + pair / heads, h = head * s.group + h0 + pair % heads;
        store_from_float(a.y.data, s.dtype, b * a.y.stride_b + t * a.y.stride_t + h * a.y.stride_h + c, y);
      }
#if __CUDA_ARCH__ >= 900
      // Nobody overwrites what another still reads.
      if (kCluster && (h0 + heads < s.group || t0 + tokens < length)) cooperative_groups::this_cluster().sync();
#endif
    }
  }
}

// Sums the splits in order; one block per (sequence, kv head). Only where blocks cannot form clusters.
__global__ void __launch_bounds__(kThreads) step_reduce(StepShape s, powerattn_step_args a) {
  const int64_t unit = blockIdx.x, b = unit / s.heads_kv, head = unit % s.heads_kv;
  const int64_t slot = a.slots ? a.slots[b] : b;
  if (slot < 0 || slot >= s.num_slots) return;
  const int64_t length = a.lengths ? min(max(a.lengths[b], int64_t(0)), s.seq_len) : s.seq_len;
  const int64_t queries = s.seq_len * s.group;
  for (int64_t i = threadIdx.x; i < length * s.group * s.e; i += kThreads) {
    const int64_t pair = i / s.e, c = i % s.e;
    float y = 0, l = 0;
    for (int w = 0; w < s.splits; ++w) {
      const float *from = s.partial + ((unit * s.splits + w) * queries + pair) * (s.e + 1);
      y += from[c];
      l += from[s.e];
    }
    y *= s.scale_p;
    if (s.normalize) {
      l = l * s.scale_p + s.eps;
      y = l != 0.0f ? y / l : 0.0f;
    }
    const int64_t t = pair / s.group, h = head * s.group + pair % s.group;
    store_from_float(a.y.data, s.dtype, b * a.y.stride_b + t * a.y.stride_t + h * a.y.stride_h + c, y);
  }
}

template <class State, int V, int kQ, bool kCluster, int kAhead>
cudaError_t launch_step(const StepShape &s, const powerattn_step_args &a, int64_t units, cudaStream_t stream) {
  const size_t shared = size_t(step_shared_floats(kQ, s.d, s.e)) * sizeof(float);
  auto kernel = step_kernel<State, V, kQ, kCluster, kAhead>;
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess && kCluster && s.splits > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(units * s.splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(s.splits);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = kCluster ? 2 : 0;
  error = cudaLaunchKernelEx(&config, kernel, s, a);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

template <class State, int V, int kQ>
cudaError_t launch_split(const StepTiling &t, const StepShape &s, const powerattn_step_args &a, int64_t units,
                         cudaStream_t stream) {
  constexpr int kAhead = V * sizeof(State) >= 16 ? 4 : 2;  // rows in flight per thread
  if (t.cluster && t.splits > 1) {
    // One query, and few rows for a block: all at once, since each round trip counts.
    if constexpr (kQ == 1 && V > 1) {
      if (s.rows_per_split * s.threads_per_row <= kRowsAtOnce<V> * kThreads)
        return launch_step<State, V, kQ, true, kRowsAtOnce<V>>(s, a, units, stream);
    }
    return launch_step<State, V, kQ, true, kAhead>(s, a, units, stream);
  }
  cudaError_t error = launch_step<State, V, kQ, false, kAhead>(s, a, units, stream);
  if (error != cudaSuccess || s.splits == 1) return error;
  return launch_kernel(step_reduce, unsigned(units), kThreads, 0, stream, s, a);
}

template <class State, int V>
cudaError_t launch_queries(const StepTiling &t, const StepShape &s, const powerattn_step_args &a, int64_t units,
                           cudaStream_t stream) {
  if (t.queries == 1 || V == 1) return launch_split<State, V, 1>(t, s, a, units, stream);
  if constexpr (V > 1) {
    if (t.queries <= 4) return launch_split<State, V, 4>(t, s, a, units, stream);
    return launch_split<State, V, 8>(t, s, a, units, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

StepTiling step_tiling(const Problem &p, int sm_count, bool clusters) {
  StepTiling t;
  const int widest = p.state_dtype == Dtype::kBfloat16 ? 8 : 4;
  t.vector = p.value_dim % widest == 0 ? widest : 1;  // 16 bytes where rows allow it
  while (t.threads_per_row * t.vector < p.value_dim) t.threads_per_row *= 2;
  const int64_t pairs = p.seq_len * p.group();
  t.queries = pairs <= 1 ? 1 : pairs <= 4 ? 4 : 8;
  t.cluster = clusters;
  // As few blocks as fill the device: a block has some microseconds of latency before its first state row
  // arrives, which 2000 rows hide and 500 do not (measured: 87 % against 70 % of the in-place bandwidth). At
  // least 64 rows each.
  const int64_t units = p.sequences * p.heads_kv;
  while (5 * units * t.splits < 7 * int64_t(sm_count) && t.splits < kMostSplits &&
         p.state_rows / (2 * t.splits) >= 64)
    t.splits *= 2;
  return t;
}

cudaError_t step_architecture(int *architecture) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, step_reduce);
  if (error == cudaSuccess) *architecture = attributes.ptxVersion;
  return error;
}

size_t step_shared_bytes(const Problem &p) {
  return size_t(step_shared_floats(8, p.head_dim, p.value_dim)) * sizeof(float);
}

size_t step_workspace_bytes(const Problem &p, const StepTiling &t) {
  if (t.cluster || t.splits == 1) return 0;
  return size_t(p.sequences) * p.heads_kv * t.splits * p.seq_len * p.group() * (p.value_dim + 1) *
         sizeof(float);
}

cudaError_t step(const Problem &p, const StepTiling &t, const powerattn_step_args &a, cudaStream_t stream) {
  const int64_t units = p.sequences * p.heads_kv;
  if (units == 0 || p.seq_len == 0) return cudaSuccess;
  StepShape s;
  s.seq_len = p.seq_len;
  s.heads_q = p.heads_q;
  s.heads_kv = p.heads_kv;
  s.d = p.head_dim;
  s.e = p.value_dim;
  s.rows = p.state_rows;
  s.num_slots = a.slots ? a.num_slots : std::max(a.num_slots, p.sequences);
  s.group = int(p.group());
  s.degree = p.degree;
  s.splits = t.splits;
  s.threads_per_row = t.threads_per_row;
  s.rows_per_split = ceil_div(p.state_rows, t.splits);
  s.normalize = p.normalize;
  s.rope = p.rope.style != POWERATTN_ROPE_NONE;
  s.interleaved = p.rope.style == POWERATTN_ROPE_INTERLEAVED;
  s.rope_dim = p.rope.dim;
  s.rope_log2_base = std::log2(p.rope.base);
  s.scale_p = float(std::pow(p.scale, p.degree));
  s.eps = float(p.eps);
  s.dtype = p.dtype;
  s.partial = static_cast<float *>(a.workspace);

  // 16-byte accesses need every state to start on 16 bytes.
  const int64_t bytes = t.vector * size_of(p.state_dtype);
  const bool aligned = t.vector > 1 && reinterpret_cast<uintptr_t>(a.state.s) % size_t(bytes) == 0 &&
                       a.state.s_stride_n % t.vector == 0 && a.state.s_stride_h % t.vector == 0;
  if (!aligned) {
    s.threads_per_row = 1;
    while (s.threads_per_row < p.value_dim) s.threads_per_row *= 2;
  }
  if (p.state_dtype == Dtype::kBfloat16)
    return aligned ? launch_queries<bf16, 8>(t, s, a, units, stream)
                   : launch_queries<bf16, 1>(t, s, a, units, stream);
  return aligned ? launch_queries<float, 4>(t, s, a, units, stream)
                 : launch_queries<float, 1>(t, s, a, units, stream);
}

}  // namespace powerattn::cuda
