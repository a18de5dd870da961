// SPDX-License-Identifier: Apache-2.0
// Chunk sums of feature vectors: S_local = Phi^T W U and z_local = Phi^T W c.
#include "kernels/cuda/generic/block.cuh"

namespace powerattn::cuda::generic {
namespace {

constexpr int kUpdateThreads = 256;
constexpr int kFeatures = 128;  // state rows of a block: 8 warps of 16
constexpr int kTokens = 64;     // tokens per step

// Shared memory: x [64][d | 1] float, phi [64][136], u [64][8 N + 8], w, c [64], z parts [4][128].
template <class Mul, int N>
size_t update_shared(int64_t d) {
  using T = typename Mul::T;
  return shared_size(kTokens * odd((d + 7) / 8 * 8) * sizeof(float)) +
         shared_size(kTokens * pad_n<Mul>(kFeatures) * sizeof(T)) +
         shared_size(kTokens * pad_n<Mul>(8 * N) * sizeof(T)) + 2 * shared_size(kTokens * sizeof(float)) +
         shared_size(4 * kFeatures * sizeof(float));
}

// S[r][c] = sum_t phi[t][r] u[t][c],  phi[t][r] = w_t * weight_r * product of x_t;  z[r] = sum_t phi[t][r] c_t.
// Block: 128 state rows x 8 N value columns of one (chunk, kv head).
template <class Mul, int N, int kDegree>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(UpdateArgs a, int row_tiles) {
  using T = typename Mul::T;
  char *memory = ptx::dynamic_shared<char>();
  SharedCarver carve{memory};
  const Shape &s = a.shape;
  const int ldx = odd((s.d + 7) / 8 * 8), lda = pad_n<Mul>(kFeatures), ldb = pad_n<Mul>(8 * N);
  float *x = carve.take<float>(kTokens * ldx);
  T *phi = carve.take<T>(kTokens * lda);
  T *u = carve.take<T>(kTokens * ldb);
  float *w = carve.take<float>(kTokens);
  float *last = carve.take<float>(kTokens);
  float *zpart = carve.take<float>(4 * kFeatures);

  const int64_t unit = blockIdx.x / row_tiles, first_row = int64_t(blockIdx.x % row_tiles) * kFeatures;
  const int64_t chunk = unit / s.heads_kv, head = unit % s.heads_kv;
  const Chunk c = s.table.chunks[chunk];
  if (c.length == 0) return;
  const int64_t column = int64_t(blockIdx.y) * 8 * N;
  const int64_t g_row = row_index(s, s.heads_kv, head, c.sequence, c.start);
  const double g_end = s.gated ? s.g[g_row + c.length - 1] : 0.0;

  const int tid = threadIdx.x, warp = tid >> 5;
  const int pair = tid % 64 * 2, phase = tid / 64;  // this thread's two features; tokens phase, phase + 4, ...
  const Monomial m0 = monomial_or_zero(a.table, first_row + pair, s.rows);
  const Monomial m1 = monomial_or_zero(a.table, first_row + pair + 1, s.rows);
  float z0 = 0, z1 = 0;
  float acc[N][4];
  clear(acc);

  const int64_t heads = a.queries ? s.group : 1;
  for (int64_t sub = 0; sub < heads; ++sub) {
    const int64_t hx = a.queries ? head * s.group + sub : head;
    for (int64_t t0 = 0; t0 < c.length; t0 += kTokens) {
      const int valid = int(min(int64_t(kTokens), c.length - t0));
      const int64_t t = c.start + t0;
      load_rows(x, ldx, a.x, s.dtype, view_row(s, a.x, hx, c.sequence, t), valid, kTokens, int(s.d),
                int((s.d + 7) / 8 * 8), true, [](float v) { return v; });
      View uv = a.u;
      load_operand<Mul>(u, ldb, uv, s.dtype, view_row(s, a.u, hx, c.sequence, t) + column, valid, kTokens,
                        int(min(int64_t(8 * N), s.e - column)), 8 * N);
      if (tid < kTokens) {
        float weight = 0, end = 0;
        if (tid < valid) {
          const double g = s.gated ? s.g[g_row + t0 + tid] : 0.0;
          if (a.queries) {
            const int64_t row = row_index(s, s.heads_q, hx, c.sequence, t + tid);
            weight = s.scale_p * (s.gated ? expf(float(g)) : 1.0f) * (s.normalize ? a.inverse[row] : 1.0f);
            end = s.normalize ? -a.delta[row] : 0.0f;
          } else {
            weight = s.gated ? expf(float(g_end - g)) : 1.0f;
            end = 1.0f;
          }
        }
        w[tid] = weight;
        last[tid] = end;
      }
      __syncthreads();
#pragma unroll 4
      for (int i = 0; i < kTokens / 4; ++i) {
        const int token = phase + 4 * i;
        const T p0 = Mul::pack(w[token] * feature<kDegree>(m0, s.degree, x + token * ldx));
        const T p1 = Mul::pack(w[token] * feature<kDegree>(m1, s.degree, x + token * ldx));
        phi[token * lda + pair] = p0;
        phi[token * lda + pair + 1] = p1;
        z0 += Mul::value(p0) * last[token];
        z1 += Mul::value(p1) * last[token];
      }
      __syncthreads();
      Mul::template multiply<true, false>(acc, phi + warp * 16, lda, u, ldb, kTokens);
      __syncthreads();
    }
  }

  float *out = a.s + unit * s.rows * s.e;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t r = first_row + warp * 16 + Mul::row(j), col = column + Mul::col(n, j);
      if (r < s.rows && col < s.e) out[r * s.e + col] = acc[n][j];
    }
  if (a.z && blockIdx.y == 0) {  // the four token phases, in order
    zpart[phase * kFeatures + pair] = z0;
    zpart[phase * kFeatures + pair + 1] = z1;
    __syncthreads();
    if (tid < kFeatures && first_row + tid < s.rows) {
      float sum = 0;
      for (int i = 0; i < 4; ++i) sum += zpart[i * kFeatures + tid];
      a.z[unit * s.rows + first_row + tid] = sum;
    }
  }
}

template <class Mul, int N>
cudaError_t launch_update(const UpdateArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int row_tiles = int(ceil_div(s.rows, kFeatures)), columns = int(ceil_div(s.e, 8 * N));
  const int64_t blocks = s.table.num_chunks * s.heads_kv * row_tiles;
  const size_t shared = update_shared<Mul, N>(s.d);
  return s.degree == 2
             ? launch(update_kernel<Mul, N, 2>, blocks, columns, kUpdateThreads, shared, stream, a, row_tiles)
             : launch(update_kernel<Mul, N, 0>, blocks, columns, kUpdateThreads, shared, stream, a, row_tiles);
}

}  // namespace

size_t update_shared_bytes(Math math, const Problem &p) {
  size_t bytes = 0;
  with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    bytes = p.value_dim <= 64 ? update_shared<Mul, 8>(p.head_dim) : update_shared<Mul, 16>(p.head_dim);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t update(Math math, const UpdateArgs &a, cudaStream_t stream) {
  return with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    return a.shape.e <= 64 ? launch_update<Mul, 8>(a, stream) : launch_update<Mul, 16>(a, stream);
  });
}

}  // namespace powerattn::cuda::generic
