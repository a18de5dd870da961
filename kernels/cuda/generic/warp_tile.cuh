// SPDX-License-Identifier: Apache-2.0
// C[16][8 N] += A[16][K] B[K][8 N] by one warp, operands in shared memory, sums in float32 registers. Three
// ways to multiply behind one interface, so that every generic kernel is written once:
//   MulF32   float32 FFMA                        true float32
//   MulTf32  mma.m16n8k8 tf32                    float16 inputs (10 bits, and the range of float32), TF32 on
//   request MulBf16  mma.m16n8k16 bfloat16, ldmatrix     bfloat16 inputs
// A is [m][k] (kTransA: [k][m]); B is [k][n] (kTransB: [n][k]). K is a multiple of 16.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/ptx/sm80.cuh"

namespace powerattn::cuda {

// Strides (elements) that keep the fragment loads free of bank conflicts: rows that are read along K (`extent`
// a multiple of 16), and rows that are read along M or N (`extent` a multiple of 8).
template <class Mul>
constexpr __host__ __device__ int pad_k(int extent) {
  return extent + (sizeof(typename Mul::T) == 2 ? 8 : 4);
}
template <class Mul>
constexpr __host__ __device__ int pad_n(int extent) {
  return extent % 16 == 8 ? extent : extent + 8;
}

struct MulF32 {
  using T = float;
  // Lane (rg, cg) = (lane / 8, lane % 8) owns rows 4 rg + j and columns 8 n + cg.
  static __device__ int row(int j) { return (threadIdx.x & 31) / 8 * 4 + j; }
  static __device__ int col(int n, int) { return 8 * n + (threadIdx.x & 7); }
  static __device__ float pack(float x) { return x; }
  static __device__ float value(float x) { return x; }

  template <bool kTransA, bool kTransB, int N>
  static __device__ void multiply(float (&acc)[N][4], const float *a, int lda, const float *b, int ldb,
                                  int depth) {
    const int rg = (threadIdx.x & 31) / 8 * 4, cg = threadIdx.x & 7;
    for (int k = 0; k < depth; k += 4) {
      float x[4][4];  // [k][row]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 v = kTransA ? *reinterpret_cast<const float4 *>(a + (k + i) * lda + rg)
                                 : *reinterpret_cast<const float4 *>(a + (rg + i) * lda + k);
        if (kTransA) {
          x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
        } else {
          x[0][i] = v.x, x[1][i] = v.y, x[2][i] = v.z, x[3][i] = v.w;
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float y[4];
        if (kTransB) {
          const float4 v = *reinterpret_cast<const float4 *>(b + (8 * n + cg) * ldb + k);
          y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w;
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) y[i] = b[(k + i) * ldb + 8 * n + cg];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[n][j] = fmaf(x[i][j], y[i], acc[n][j]);
      }
    }
  }

  // Sums x[j] over the lanes that share row(j).
  static __device__ void reduce_rows(float (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int m = 1; m < 8; m <<= 1) x[j] += __shfl_xor_sync(0xffffffffu, x[j], m);
  }
};

// Accumulators of mma.m16n8: lane (g, c) = (lane / 4, lane % 4) owns rows g and g + 8, columns 2 c and 2 c + 1.
struct MmaRows {
  static __device__ int row(int j) { return (threadIdx.x & 31) / 4 + (j >= 2 ? 8 : 0); }
  static __device__ int col(int n, int j) { return 8 * n + 2 * (threadIdx.x & 3) + (j & 1); }
  static __device__ void reduce_rows(float (&x)[4]) {
    x[0] = x[1] = x[0] + x[1];
    x[2] = x[3] = x[2] + x[3];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int m = 1; m < 4; m <<= 1) x[j] += __shfl_xor_sync(0xffffffffu, x[j], m);
  }
};

struct MulTf32 : MmaRows {
  using T = float;
  static __device__ float pack(float x) { return __uint_as_float(ptx::round_tf32(x)); }
  static __device__ float value(float x) { return x; }

  template <bool kTransA, bool kTransB, int N>
  static __device__ void multiply(float (&acc)[N][4], const float *a, int lda, const float *b, int ldb,
                                  int depth) {
    const int g = (threadIdx.x & 31) / 4, c = threadIdx.x & 3;
    auto at = [&](int m, int k) { return __float_as_uint(kTransA ? a[k * lda + m] : a[m * lda + k]); };
    auto bt = [&](int k, int n) { return __float_as_uint(kTransB ? b[n * ldb + k] : b[k * ldb + n]); };
    for (int k = 0; k < depth; k += 8) {
      const uint32_t fa[4] = {at(g, k + c), at(g + 8, k + c), at(g, k + c + 4), at(g + 8, k + c + 4)};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        ptx::mma_tf32(acc[n], fa, bt(k + c, 8 * n + g), bt(k + c + 4, 8 * n + g));
      }
    }
  }
};

struct MulBf16 : MmaRows {
  using T = bf16;
  static __device__ bf16 pack(float x) { return __float2bfloat16_rn(x); }
  static __device__ float value(bf16 x) { return __bfloat162float(x); }

  template <bool kTrans>
  static __device__ void load4(uint32_t (&r)[4], const bf16 *p) {
    if (kTrans) {
      ptx::ldmatrix4_trans(r, ptx::shared_address(p));
    } else {
      ptx::ldmatrix4(r, ptx::shared_address(p));
    }
  }
  // ldmatrix: lane l gives the address of row l % 8 of the 8x8 matrix l / 8. The four matrices of A are (rows
  // 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15); of B two column tiles, each (k 0-7), (k 8-15).
  template <bool kTransA, bool kTransB, int N>
  static __device__ void multiply(float (&acc)[N][4], const bf16 *a, int lda, const bf16 *b, int ldb,
                                  int depth) {
    const int lane = threadIdx.x & 31;
    const int r = lane & 7, bit3 = lane >> 3 & 1, bit4 = lane >> 4;
    const bf16 *pa = kTransA ? a + (r + 8 * bit4) * lda + 8 * bit3 : a + (r + 8 * bit3) * lda + 8 * bit4;
    const bf16 *pb = kTransB ? b + (r + 8 * bit4) * ldb + 8 * bit3 : b + (r + 8 * bit3) * ldb + 8 * bit4;
    for (int k = 0; k < depth; k += 16) {
      uint32_t fa[4];
      load4<kTransA>(fa, pa + (kTransA ? k * lda : k));
#pragma unroll
      for (int n = 0; n + 1 < N; n += 2) {
        uint32_t fb[4];
        load4<!kTransB>(fb, pb + (kTransB ? 8 * n * ldb + k : k * ldb + 8 * n));
        ptx::mma<bf16>(acc[n], fa, fb[0], fb[1]);
        ptx::mma<bf16>(acc[n + 1], fa, fb[2], fb[3]);
      }
      if (N % 2) {  // the last column tile alone: lanes 16-31 repeat the addresses of lanes 0-15
        constexpr int n = N - 1;
        const bf16 *p = kTransB ? b + (8 * n + r) * ldb + 8 * bit3 + k : b + (k + r + 8 * bit3) * ldb + 8 * n;
        uint32_t b0, b1;
        if (kTransB) {
          ptx::ldmatrix2(b0, b1, ptx::shared_address(p));
        } else {
          ptx::ldmatrix2_trans(b0, b1, ptx::shared_address(p));
        }
        ptx::mma<bf16>(acc[n], fa, b0, b1);
      }
    }
  }
};

template <int N>
__device__ void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[n][j] = 0.0f;
}

}  // namespace powerattn::cuda
