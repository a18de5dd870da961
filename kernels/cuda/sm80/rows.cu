// SPDX-License-Identifier: Apache-2.0
// What is read off rows of inputs: the range of a chunk's features for float16, what the backward needs per
// row, and the gradient of the gates from per-row dot products.
#include "args.h"
#include "kernels/cuda/launch.cuh"
#include "load.h"
#include "weights.h"

namespace powerattn {
namespace cuda {
namespace sm80 {
namespace {

constexpr int kThreads = 256;

// r_i = 1 / l_i, delta_i = sum_e d_y_ie y_ie. One warp per row of a tile and head.
template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ RowsArgs a) {
  const Shape &s = a.shape;
  const int lane = threadIdx.x & 31;
  const Tile tile = s.table.tiles[blockIdx.x / s.heads_q];
  const int head = blockIdx.x % s.heads_q;
  const int64_t batch = s.packed ? 0 : tile.sequence;
  for (int row = threadIdx.x / 32; row < tile.length; row += kThreads / 32) {
    const T *const y = row_pointer<T>(a.y, batch, tile.start + row, head);
    const T *const dy = row_pointer<T>(a.d_y, batch, tile.start + row, head);
    float sum = 0.f;
    for (int e = lane; e < s.head_dim; e += 32) sum += Pair<T>::to_float(y[e]) * Pair<T>::to_float(dy[e]);
    sum = warp_sum(sum);
    if (lane == 0) {
      const int64_t at = (batch * s.heads_q + head) * s.seq_len + tile.start + row;
      a.delta[at] = sum;
      a.r[at] = safe_inverse(*row_pointer<float>(a.row_norm, batch, tile.start + row, head));
    }
  }
}

// Sum of a float over the block, in a fixed order.
__device__ __forceinline__ float block_sum(float v, float *scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < kThreads / 32; ++w) sum += scratch[w];
  return sum;
}

// Eight neighbouring 16-bit elements of a row.
__device__ __forceinline__ uint4 load_piece(const __half *p, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4 *>(p);
  const unsigned short *const e = reinterpret_cast<const unsigned short *>(p);
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = e[2 * i] | static_cast<uint32_t>(e[2 * i + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// With X_t, U_t the largest elements of x_t and u_t, and w_t the weight of the token (args.h):
//   bound_s = W sum_t w_t X_t^p U_t     weigh_s max_t w_t max(X_t^p, X_t) < 2^15
//   bound_z = sum_t w_t |delta_t| X_t^2     weigh_z max_t w_t |delta_t| X_t < 2^15
// One block per slot; d / 8 lanes read a row.
__global__ void __launch_bounds__(kThreads) ranges_kernel(const __grid_constant__ RangeArgs a) {
  __shared__ float scratch[4][kThreads / 32];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int head_kv = static_cast<int>(slot % s.heads_kv), lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int64_t batch = s.packed ? 0 : chunk.sequence;
  const int group = a.reverse ? s.heads_q / s.heads_kv : 1, pieces = s.head_dim / 8, rows = 32 / pieces;
  const float *const g = a.g ? a.g + (batch * s.heads_kv + head_kv) * s.seq_len + chunk.start : nullptr;
  const float g_end = g ? g[chunk.length - 1] : 0.f;
  float most_s = 0.f, most_z = 0.f, sum_s = 0.f, sum_z = 0.f;
  for (int part = 0; part < group; ++part) {
    const int head = a.reverse ? head_kv * group + part : head_kv;
    const __half *const x = row_pointer<__half>(a.x, batch, chunk.start, head);
    const __half *const u = row_pointer<__half>(a.u, batch, chunk.start, head);
    const bool aligned = ((reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(u)) & 15) == 0 &&
                         ((a.x.stride_t | a.u.stride_t) & 7) == 0;
    const int64_t at = (batch * s.heads_q + head) * s.seq_len + chunk.start;
#pragma unroll 4
    for (int t0 = warp * rows; t0 < chunk.length; t0 += kThreads / 32 * rows) {  // the same for a warp
      const int t = t0 + lane / pieces;
      const bool in = t < chunk.length;
      uint32_t most_x = 0, most_u = 0;
      if (in) {
        const int column = lane % pieces * 8;
        most_x = most_bits(0, load_piece(x + t * a.x.stride_t + column, aligned));
        most_u = most_bits(0, load_piece(u + t * a.u.stride_t + column, aligned));
      }
      for (int m = pieces / 2; m > 0; m /= 2) {
        most_x = max(most_x, __shfl_xor_sync(0xffffffffu, most_x, m));
        most_u = max(most_u, __shfl_xor_sync(0xffffffffu, most_u, m));
      }
      if (in && lane % pieces == 0) {
        float w = fabsf(a.scale);
        if (g) w *= __expf(a.reverse ? g[t] : g_end - g[t]);
        if (a.r) w *= fabsf(a.r[at + t]);
        float wz = a.reverse ? 0.f : w;
        if (a.delta) wz = w * fabsf(a.delta[at + t]);
        const float largest = Pair<__half>::lo(most_x);
        const float feature = s.degree == 1 ? largest : largest * largest;
        most_s = fmaxf(most_s, w * fmaxf(feature, largest));
        most_z = fmaxf(most_z, wz * largest);
        sum_s += w * feature * Pair<__half>::lo(most_u);
        sum_z += wz * largest * largest;
      }
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    most_s = fmaxf(most_s, __shfl_xor_sync(0xffffffffu, most_s, d));
    most_z = fmaxf(most_z, __shfl_xor_sync(0xffffffffu, most_z, d));
    sum_s += __shfl_xor_sync(0xffffffffu, sum_s, d);
    sum_z += __shfl_xor_sync(0xffffffffu, sum_z, d);
  }
  if (lane == 0) {
    scratch[0][warp] = most_s;
    scratch[1][warp] = most_z;
    scratch[2][warp] = sum_s;
    scratch[3][warp] = sum_z;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) {
    most_s = fmaxf(most_s, scratch[0][w]);
    most_z = fmaxf(most_z, scratch[1][w]);
    sum_s += scratch[2][w];
    sum_z += scratch[3][w];
  }
  Range out;
  out.weigh_s = inverse_power(unit_of(most_s));
  out.weigh_z = inverse_power(unit_of(most_z));
  out.bound_s = (s.degree == 2 ? 2.f : 1.f) * sum_s;
  out.bound_z = sum_z;
  a.out[slot] = out;
}

// z[slot] = sum_t e^{g_end - g_t} k_t. A thread per column.
template <typename T>
__global__ void __launch_bounds__(128) key_sums_kernel(const __grid_constant__ NormArgs a) {
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int head = static_cast<int>(slot % s.heads_kv);
  const int64_t batch = s.packed ? 0 : chunk.sequence;
  const float *const g = a.g ? a.g + (batch * s.heads_kv + head) * s.seq_len + chunk.start : nullptr;
  const T *const k = row_pointer<T>(a.k, batch, chunk.start, head) + threadIdx.x;
  float sum = 0.f;
#pragma unroll 4
  for (int t = 0; t < chunk.length; ++t)
    sum += Pair<T>::to_float(k[t * a.k.stride_t]) * (g ? __expf(g[chunk.length - 1] - g[t]) : 1.f);
  a.z[slot * s.head_dim + threadIdx.x] = sum;
}

// z[slot] = the sum over all earlier chunks, in place.
__global__ void __launch_bounds__(128) key_prefix_kernel(const __grid_constant__ NormArgs a) {
  const Shape &s = a.shape;
  const int sequence = static_cast<int>(blockIdx.x / s.heads_kv),
            head = static_cast<int>(blockIdx.x % s.heads_kv);
  const Sequence seq = s.table.sequences[sequence];
  const int64_t batch = s.packed ? 0 : sequence;
  const float *const g = a.g ? a.g + (batch * s.heads_kv + head) * s.seq_len + seq.start : nullptr;
  float *z = a.z + (static_cast<int64_t>(seq.first_chunk) * s.heads_kv + head) * s.head_dim + threadIdx.x;
  float carry = 0.f;
  for (int64_t start = 0; start < seq.length; start += s.table.chunk) {
    const float local = *z;
    *z = carry;
    carry = carry * (g ? __expf(g[min(start + s.table.chunk, seq.length) - 1]) : 1.f) + local;
    z += s.heads_kv * s.head_dim;
  }
}

// One warp per row of a tile and head, as in rows_kernel.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_norms_kernel(const __grid_constant__ NormArgs a) {
  const Shape &s = a.shape;
  const int lane = threadIdx.x & 31;
  const Tile tile = s.table.tiles[blockIdx.x / s.heads_q];
  const int head = blockIdx.x % s.heads_q, head_kv = head / (s.heads_q / s.heads_kv);
  const int64_t batch = s.packed ? 0 : tile.sequence;
  const float *const z = a.z + (static_cast<int64_t>(tile.chunk) * s.heads_kv + head_kv) * s.head_dim;
  for (int row = threadIdx.x / 32; row < tile.length; row += kThreads / 32) {
    const T *const q = row_pointer<T>(a.q, batch, tile.start + row, head);
    float sum = 0.f;
    for (int e = lane; e < s.head_dim; e += 32) sum += Pair<T>::to_float(q[e]) * z[e];
    sum = warp_sum(sum);
    if (lane == 0) {
      if (a.g) sum *= __expf(a.g[(batch * s.heads_kv + head_kv) * s.seq_len + tile.start + row]);
      *row_pointer<float>(a.row_norm, batch, tile.start + row, head) += a.scale * sum;
    }
  }
}

template <typename T>
void add_norms_type(const NormArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  launch_kernel(key_sums_kernel<T>, static_cast<unsigned>(s.table.num_chunks * s.heads_kv), s.head_dim, 0,
                stream, a);
  launch_kernel(key_prefix_kernel, static_cast<unsigned>(s.table.num_sequences * s.heads_kv), s.head_dim, 0,
                stream, a);
  launch_kernel(add_norms_kernel<T>, static_cast<unsigned>(s.table.num_tiles * s.heads_q), kThreads, 0, stream,
                a);
}

// Suffix sums of one chunk and kv head, from the chunk's end, kThreads * kPerThread tokens at a time: sums of a
// thread's own, then of the warp's, then of the warps before.
constexpr int kPerThread = 4;

__global__ void __launch_bounds__(kThreads) gates_kernel(const __grid_constant__ GateArgs a) {
  __shared__ float warps[kThreads / 32];
  const Shape &s = a.shape;
  const int64_t slot = blockIdx.x;
  const int head = static_cast<int>(slot % s.heads_kv), thread = threadIdx.x, warp = thread / 32;
  const Chunk chunk = s.table.chunks[slot / s.heads_kv];
  if (chunk.length == 0) return;
  const int64_t batch = s.packed ? 0 : chunk.sequence;
  const int group = s.heads_q / s.heads_kv;
  const float inverse = 1.f / static_cast<float>(s.degree);
  const int64_t row0 = (batch * s.heads_kv + head) * s.seq_len + chunk.start;
  // A sequence's first gate decays its initial state and nothing else: without one, the sum is zero.
  const powerattn_state &initial = a.products.initial;
  const bool nothing_before = chunk.index == 0 && initial.s == nullptr && initial.z == nullptr;
  float carry = 0.f;
  if (a.products.out != nullptr) {
    const int64_t stride = product_parts(s.degree, s.head_dim);
    const int64_t states = state_parts(s.degree, s.head_dim), parts = a.products.z_tiles ? stride : states;
    const float *const products = a.products.out + slot * stride;
    float x = 0.f, z = 0.f;
    for (int64_t i = thread; i < states; i += kThreads) x += products[i];
    for (int64_t i = states + thread; i < parts; i += kThreads) z += products[i];
    if (a.d_units != nullptr && !(a.products.after && chunk.index + 1 == chunk.count)) {
      const Units u = a.products.units[a.products.after ? slot + s.heads_kv : slot], d_u = a.d_units[slot];
      x = x * u.s * d_u.s;
      z = z * u.z * d_u.z;
    }
    x += z;
    if (a.g && !a.products.after) x *= __expf(a.g[row0 + chunk.length - 1]);
    if (a.k_state_dot != nullptr)
      for (int t = thread; t < chunk.length; t += kThreads) x += inverse * a.k_state_dot[row0 + t];
    carry = block_sum(x, warps);
    __syncthreads();
  }
  for (int end = chunk.length; end > 0; end -= kThreads * kPerThread) {
    const int last = end - 1 - thread * kPerThread;  // thread 0 holds the last tokens
    float v[kPerThread], own = 0.f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int t = last - i;
      if (t >= 0) {
        for (int h = head * group; h < (head + 1) * group; ++h) {
          const int64_t at = (batch * s.heads_q + h) * s.seq_len + chunk.start + t;
          own += a.q_dot ? a.q_dot[at] * inverse : a.eps * a.r[at] * a.delta[at];
        }
        own -= a.k_dot[row0 + t] * inverse;
      }
      v[i] = own;
    }
    float inclusive = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, inclusive, d);
      if ((thread & 31) >= d) inclusive += other;
    }
    if ((thread & 31) == 31) warps[warp] = inclusive;
    __syncthreads();
    float before = carry + (inclusive - own);
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warps[w];
      carry += warps[w];
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (last - i >= 0) {
        const float sum = before + v[i];
        *row_pointer<float>(a.d_log_g, batch, chunk.start + last - i, head) =
            last - i == 0 && nothing_before && fabsf(sum) <= INFINITY ? 0.f : sum;
      }
    __syncthreads();
  }
}

}  // namespace

cudaError_t ranges(const RangeArgs &a, cudaStream_t stream) {
  const int64_t slots = a.shape.table.num_chunks * a.shape.heads_kv;
  if (slots == 0) return cudaSuccess;
  return launch_kernel(ranges_kernel, static_cast<unsigned>(slots), kThreads, 0, stream, a);
}

cudaError_t add_norms(const NormArgs &a, cudaStream_t stream) {
  if (a.shape.table.num_tiles == 0) return cudaSuccess;
  if (a.shape.dtype == Dtype::kFloat16)
    add_norms_type<__half>(a, stream);
  else
    add_norms_type<__nv_bfloat16>(a, stream);
  return cudaGetLastError();
}

cudaError_t rows(const RowsArgs &a, cudaStream_t stream) {
  const int64_t blocks = a.shape.table.num_tiles * a.shape.heads_q;
  if (blocks == 0) return cudaSuccess;
  if (a.shape.dtype == Dtype::kFloat16)
    launch_kernel(rows_kernel<__half>, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
  else
    launch_kernel(rows_kernel<__nv_bfloat16>, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
  return cudaGetLastError();
}

cudaError_t gate_gradient(const GateArgs &a, cudaStream_t stream) {
  const int64_t slots = a.shape.table.num_chunks * a.shape.heads_kv;
  if (slots == 0) return cudaSuccess;
  launch_kernel(gates_kernel, static_cast<unsigned>(slots), kThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
