// SPDX-License-Identifier: Apache-2.0
// What the generic kernels share inside a block: where a row lies, loading row tiles into shared memory,
// products of features.
#pragma once

#include <type_traits>

#include "kernels/cuda/generic/generic.h"
#include "kernels/cuda/generic/warp_tile.cuh"
#include "kernels/cuda/launch.cuh"

namespace powerattn::cuda::generic {

// One piece of dynamic shared memory after the other, each 16-byte aligned.
struct SharedCarver {
  char *next;
  template <class T>
  __device__ T *take(int64_t count) {
    T *p = reinterpret_cast<T *>(next);
    next += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return p;
  }
};
constexpr size_t shared_size(size_t bytes) { return (bytes + 15) / 16 * 16; }

__host__ __device__ inline int round16(int64_t x) { return int((x + 15) / 16 * 16); }
// Odd row stride: threads that walk different rows at one column hit different banks.
__host__ __device__ inline int odd(int64_t x) { return int(x | 1); }

__device__ inline int64_t row_index(const Shape &s, int64_t heads, int64_t head, int32_t sequence, int64_t t) {
  return (batch_of(s.packed, sequence) * heads + head) * s.seq_len + t;
}

// Element offset of row (sequence's batch entry, t, head) of a view.
__device__ inline int64_t view_row(const Shape &s, const View &v, int64_t head, int32_t sequence, int64_t t) {
  return batch_of(s.packed, sequence) * v.b + t * v.t + head * v.h;
}

// dst[r][c] = convert(src[offset + r * stride + c]) for r < rows, c < cols; zero where r >= valid or c >= dim.
// ld % 4 == 0 is needed for the vector path of float destinations with `aligned`.
template <class D, class F>
__device__ void load_rows(D *dst, int ld, const View &v, Dtype dtype, int64_t offset, int valid, int rows,
                          int dim, int cols, bool aligned, F convert) {
  if (v.vector && aligned) {
    const int pieces = cols / 8;
    for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
      const int r = i / pieces, c = i % pieces * 8;
      D *to = dst + r * ld + c;
      float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (r < valid && c < dim) {
        const int64_t at = offset + r * v.t + c;
        if (dtype == Dtype::kFloat32) {
          const auto *p = reinterpret_cast<const float4 *>(static_cast<const float *>(v.data) + at);
          const float4 lo = p[0], hi = p[1];
          x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w, x[4] = hi.x, x[5] = hi.y, x[6] = hi.z,
          x[7] = hi.w;
        } else {
          const uint4 raw = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(v.data) + at);
          if (sizeof(D) == 2 && dtype == Dtype::kBfloat16) {
            *reinterpret_cast<uint4 *>(to) = raw;
            continue;
          }
          const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (dtype == Dtype::kBfloat16) {
              x[2 * k] = __uint_as_float(w[k] << 16);
              x[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
            } else {
              const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&w[k]));
              x[2 * k] = f.x, x[2 * k + 1] = f.y;
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) to[k] = convert(x[k]);
    }
  } else {
    for (int i = threadIdx.x; i < rows * cols; i += blockDim.x) {
      const int r = i / cols, c = i % cols;
      dst[r * ld + c] =
          convert(r < valid && c < dim ? load_as_float(v.data, dtype, offset + r * v.t + c) : 0.0f);
    }
  }
}

template <class Mul>
__device__ void load_operand(typename Mul::T *dst, int ld, const View &v, Dtype dtype, int64_t offset,
                             int valid, int rows, int dim, int cols) {
  load_rows(dst, ld, v, dtype, offset, valid, rows, dim, cols, true, [](float x) { return Mul::pack(x); });
}
__device__ inline void load_float(float *dst, int ld, const View &v, Dtype dtype, int64_t offset, int valid,
                                  int rows, int dim, int cols) {
  const int padded = v.vector ? (cols + 7) / 8 * 8 : cols;  // whole pieces; dim % 8 == 0 there
  load_rows(dst, ld, v, dtype, offset, valid, rows, dim, padded, ld >= padded, [](float x) { return x; });
}

// x^p for p >= 0.
__device__ inline float power(float x, int p) {
  if (p == 2) return x * x;
  if (p == 1) return x;
  float y = 1.0f;
  while (p > 0) {
    if (p & 1) y *= x;
    x *= x;
    p >>= 1;
  }
  return y;
}

// weight * product of x[indices]; kDegree 0: any degree, `p` of them.
template <int kDegree>
__device__ float feature(const Monomial &m, int p, const float *x) {
  if (kDegree == 2) return m.weight * (x[m.indices & 255] * x[m.indices >> 8 & 255]);
  float y = m.weight;
  uint64_t rest = m.indices;
  for (int i = 0; i < p; ++i, rest >>= 8) y *= x[rest & 255];
  return y;
}

__device__ inline Monomial monomial_or_zero(const Monomial *table, int64_t row, int64_t rows) {
  if (row < rows) return table[row];
  return Monomial{0, 0.0f, 0};
}

// Rows kSlab of a prefix state as an operand: dst[r][c] = s[(first + r) * e + c0 + c]; zero outside.
// Asynchronous for operands that are stored as they are (commit and wait are the caller's); TF32 rounds on the
// way.
constexpr int kSlab = 32;
template <class Mul>
__device__ void load_slab(typename Mul::T *dst, int ld, const typename Mul::T *s, int64_t first, int64_t rows,
                          int64_t e, int64_t c0, int cols) {
  using T = typename Mul::T;
  constexpr int kPiece = 16 / sizeof(T);
  if (e % kPiece == 0) {
    const int pieces = cols / kPiece;
    for (int i = threadIdx.x; i < kSlab * pieces; i += blockDim.x) {
      const int r = i / pieces, c = i % pieces * kPiece;
      T *to = dst + r * ld + c;
      if (first + r < rows && c0 + c < e) {
        const T *from = s + (first + r) * e + c0 + c;
        if constexpr (std::is_same<Mul, MulTf32>::value) {
          const float4 x = *reinterpret_cast<const float4 *>(from);
          to[0] = Mul::pack(x.x), to[1] = Mul::pack(x.y), to[2] = Mul::pack(x.z), to[3] = Mul::pack(x.w);
        } else {
          ptx::copy16(ptx::shared_address(to), from);
        }
      } else {
        *reinterpret_cast<uint4 *>(to) = make_uint4(0, 0, 0, 0);
      }
    }
  } else {
    for (int i = threadIdx.x; i < kSlab * cols; i += blockDim.x) {
      const int r = i / cols, c = i % cols;
      dst[r * ld + c] =
          first + r < rows && c0 + c < e ? Mul::pack(Mul::value(s[(first + r) * e + c0 + c])) : Mul::pack(0.0f);
    }
  }
}
// Runs launch with the Mul type of `math`.
template <class F>
cudaError_t with_math(Math math, F launch) {
  switch (math) {
    case Math::kFloat32:
      return launch(MulF32{});
    case Math::kTf32:
      return launch(MulTf32{});
    case Math::kBfloat16:
      return launch(MulBf16{});
  }
  return cudaErrorInvalidValue;
}

template <class K, class... A>
cudaError_t launch(K kernel, int64_t blocks, int y, int threads, size_t shared, cudaStream_t stream,
                   const A &...args) {
  if (blocks == 0 || y == 0) return cudaSuccess;
  return launch_kernel(kernel, dim3(unsigned(blocks), unsigned(y)), threads, shared, stream, args...);
}

}  // namespace powerattn::cuda::generic
