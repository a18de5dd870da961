// SPDX-License-Identifier: Apache-2.0
// Gradients of the attention inside chunks. With s_ij = scale q_i . k_j, w_ij = exp(g_i - g_j) s_ij^p and the
// output's gradient dy_i, r_i = 1 / norm_i and delta_i = dy_i . y_i:
//   d s_ij = p w_ij / s_ij r_i (dy_i . v_j - delta_i)        (delta only when normalised)
//   dq_i = scale sum_j d s_ij k_j      dk_j = scale sum_i d s_ij q_i      dv_j = sum_i w_ij r_i dy_i
// Each kernel owns the rows that it sums, so nothing is added by two blocks.
#include "kernels/cuda/generic/block.cuh"

namespace powerattn::cuda::generic {
namespace {

constexpr int kStep = 32;   // rows of the other side per step
constexpr int kOver = 128;  // columns that the last row may be read past its end; what they give is not stored

enum class Of { kQuery, kKey, kValue };

// Shared memory: own rows x [64][d16], u [64][e16]; the others' x [32][d16] and u [32][e16]; weights [64][32];
// row numbers of both sides.
template <class Mul>
size_t grad_shared(int64_t d, int64_t e) {
  using T = typename Mul::T;
  const int ldd = pad_k<Mul>(round16(d)), lde = pad_k<Mul>(round16(e));
  return shared_size(kRows * ldd * sizeof(T)) + shared_size(kRows * lde * sizeof(T)) +
         shared_size((kStep * ldd + kOver) * sizeof(T)) + shared_size((kStep * lde + kOver) * sizeof(T)) +
         shared_size(kRows * pad_k<Mul>(kStep) * sizeof(T)) + shared_size((kRows + kStep) * sizeof(double)) +
         shared_size(3 * (kRows + kStep) * sizeof(float));
}

// Block: 64 own rows (queries for dq, keys for dk and dv) x 8 N columns of the gradient. "Own" rows stand in
// the rows of every product, the others in its columns.
template <class Mul, int N, Of kOf>
__global__ void __launch_bounds__(kThreads) grad_kernel(AttentionGradArgs a) {
  using T = typename Mul::T;
  char *memory = ptx::dynamic_shared<char>();
  SharedCarver carve{memory};
  const Shape &s = a.shape;
  constexpr bool kOwnQuery = kOf == Of::kQuery;
  const int d16 = round16(s.d), e16 = round16(s.e);
  const int ldd = pad_k<Mul>(d16), lde = pad_k<Mul>(e16), ldp = pad_k<Mul>(kStep);
  T *x = carve.take<T>(kRows * ldd);
  T *u = carve.take<T>(kRows * lde);
  T *ox = carve.take<T>(kStep * ldd + kOver);
  T *ou = carve.take<T>(kStep * lde + kOver);
  T *p = carve.take<T>(kRows * ldp);
  double *g_own = carve.take<double>(kRows + kStep), *g_other = g_own + kRows;
  float *r_own = carve.take<float>(3 * (kRows + kStep));
  float *delta_own = r_own + kRows, *f_own = delta_own + kRows, *r_other = f_own + kRows;
  float *delta_other = r_other + kStep, *f_other = delta_other + kStep;

  const int64_t heads = kOwnQuery ? s.heads_q : s.heads_kv;
  const int64_t head = blockIdx.x % heads, kv = kOwnQuery ? head / s.group : head;
  const Tile tile = s.table.tiles[blockIdx.x / heads];
  if (tile.length == 0) return;
  const Chunk c = s.table.chunks[tile.chunk];
  const int64_t column = int64_t(blockIdx.y) * 8 * N;
  const int tid = threadIdx.x, row0 = (tid >> 5) * 16;
  const int64_t g_row = row_index(s, s.heads_kv, kv, tile.sequence, c.start);

  const View &own_x = kOwnQuery ? a.q : a.k, &own_u = kOwnQuery ? a.dy : a.v;
  const View &other_x = kOwnQuery ? a.k : a.q, &other_u = kOwnQuery ? a.v : a.dy;
  load_operand<Mul>(x, ldd, own_x, s.dtype, view_row(s, own_x, head, tile.sequence, tile.start), tile.length,
                    kRows, int(s.d), d16);
  load_operand<Mul>(u, lde, own_u, s.dtype, view_row(s, own_u, head, tile.sequence, tile.start), tile.length,
                    kRows, int(s.e), e16);
  // Off the diagonal exp(g_i - g_j) is a factor per row times one per column, both at most 1: taken against the
  // own tile's first row (own queries) or last row (own keys). In the diagonal it is the difference itself, in
  // double.
  const double g0 = s.gated ? s.g[g_row + tile.offset + (kOwnQuery ? 0 : tile.length - 1)] : 0.0;
  auto factor = [&](double g, bool query) { return s.gated ? expf(float(query ? g - g0 : g0 - g)) : 1.0f; };
  if (tid < kRows) {
    const bool valid = tid < tile.length;
    g_own[tid] = s.gated && valid ? s.g[g_row + tile.offset + tid] : 0.0;
    f_own[tid] = factor(g_own[tid], kOwnQuery);
    if (kOwnQuery) {
      const int64_t row = row_index(s, s.heads_q, head, tile.sequence, tile.start + tid);
      r_own[tid] = valid ? a.inverse[row] : 0.0f;
      delta_own[tid] = valid && s.normalize ? a.delta[row] : 0.0f;
    }
  }

  float acc[N][4], dots[4] = {0, 0, 0, 0};  // dots: x . dx from what is not rounded, for the gates
  clear(acc);
  // Others: keys from the chunk's start to the diagonal, or queries from the diagonal to the chunk's end, for
  // each query head of the group.
  const int first = kOwnQuery ? 0 : tile.offset, last = kOwnQuery ? tile.offset + tile.length : c.length;
  const int64_t subs = kOwnQuery ? 1 : s.group;
  for (int64_t sub = 0; sub < subs; ++sub) {
    const int64_t other_head = kOwnQuery ? kv : head * s.group + sub;
    for (int o0 = first; o0 < last; o0 += kStep) {
      const int valid = min(kStep, last - o0);
      const int64_t t = c.start + o0;
      __syncthreads();
      load_operand<Mul>(ox, ldd, other_x, s.dtype, view_row(s, other_x, other_head, tile.sequence, t), valid,
                        kStep, int(s.d), d16);
      load_operand<Mul>(ou, lde, other_u, s.dtype, view_row(s, other_u, other_head, tile.sequence, t), valid,
                        kStep, int(s.e), e16);
      if (tid < kStep) {
        const bool in = tid < valid;
        g_other[tid] = s.gated && in ? s.g[g_row + o0 + tid] : 0.0;
        f_other[tid] = factor(g_other[tid], !kOwnQuery);
        if (!kOwnQuery) {
          const int64_t row = row_index(s, s.heads_q, other_head, tile.sequence, t + tid);
          r_other[tid] = in ? a.inverse[row] : 0.0f;
          delta_other[tid] = in && s.normalize ? a.delta[row] : 0.0f;
        }
      }
      __syncthreads();
      const bool diagonal = kOwnQuery ? o0 + kStep > tile.offset : o0 < tile.offset + kRows;
      float score[kStep / 8][4], dot[kStep / 8][4];
      clear(score);
      Mul::template multiply<false, true>(score, x + row0 * ldd, ldd, ox, ldd, d16);
      if (kOf != Of::kValue) {
        clear(dot);
        Mul::template multiply<false, true>(dot, u + row0 * lde, lde, ou, lde, e16);
      }
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = row0 + Mul::row(j), col = Mul::col(n, j);
          const int own = tile.offset + r, other = o0 + col;
          const int query = kOwnQuery ? own : other, key = kOwnQuery ? other : own;
          const float sij = s.scale * score[n][j];
          float w = kOwnQuery ? r_own[r] : r_other[col];
          if (!diagonal) {
            w *= f_own[r] * f_other[col];
          } else if (s.gated) {
            w *= expf(float(kOwnQuery ? g_own[r] - g_other[col] : g_other[col] - g_own[r]));
          }
          if (kOf == Of::kValue) {
            w *= power(sij, s.degree);
          } else {
            const float delta = kOwnQuery ? delta_own[r] : delta_other[col];
            w *= s.scale * float(s.degree) * power(sij, s.degree - 1) * (dot[n][j] - delta);
          }
          if (key > query || r >= tile.length || col >= valid) w = 0.0f;
          p[r * ldp + col] = Mul::pack(w);
          if (kOf != Of::kValue) dots[j] += w * score[n][j];
        }
      __syncwarp();  // a warp reads only the rows of p that it wrote
      Mul::template multiply<false, false>(acc, p + row0 * ldp, ldp, (kOf == Of::kValue ? ou : ox) + column,
                                           kOf == Of::kValue ? lde : ldd, kStep);
    }
  }

  const int64_t dim = kOf == Of::kValue ? s.e : s.d;
  const int64_t out_row = row_index(s, heads, head, tile.sequence, tile.start);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = row0 + Mul::row(j);
      const int64_t col = column + Mul::col(n, j);
      if (r >= tile.length || col >= dim) continue;
      float *out = a.out + (out_row + r) * dim + col;
      *out = acc[n][j] + (a.accumulate ? *out : 0.0f);
    }
  if (kOf != Of::kValue && a.dots && blockIdx.y == 0) {
    Mul::reduce_rows(dots);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = row0 + Mul::row(j);
      if (r >= tile.length || Mul::col(0, j) != 0) continue;
      float *out = a.dots + out_row + r;
      *out = dots[j] + (a.accumulate ? *out : 0.0f);
    }
  }
}

template <class Mul, int N, Of kOf>
cudaError_t launch_grad(const AttentionGradArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t heads = kOf == Of::kQuery ? s.heads_q : s.heads_kv, dim = kOf == Of::kValue ? s.e : s.d;
  return launch(grad_kernel<Mul, N, kOf>, s.table.num_tiles * heads, int(ceil_div(dim, 8 * N)), kThreads,
                grad_shared<Mul>(s.d, s.e), stream, a);
}

template <Of kOf>
cudaError_t grad(Math math, const AttentionGradArgs &a, cudaStream_t stream) {
  const int64_t dim = kOf == Of::kValue ? a.shape.e : a.shape.d;
  return with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    if (dim <= 64) return launch_grad<Mul, 8, kOf>(a, stream);
    return launch_grad<Mul, 16, kOf>(a, stream);
  });
}

}  // namespace

size_t attention_grad_shared_bytes(Math math, const Problem &p) {
  size_t bytes = 0;
  with_math(math, [&](auto mul) {
    bytes = grad_shared<decltype(mul)>(p.head_dim, p.value_dim);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t attention_grad_q(Math math, const AttentionGradArgs &a, cudaStream_t stream) {
  return grad<Of::kQuery>(math, a, stream);
}
cudaError_t attention_grad_k(Math math, const AttentionGradArgs &a, cudaStream_t stream) {
  return grad<Of::kKey>(math, a, stream);
}
cudaError_t attention_grad_v(Math math, const AttentionGradArgs &a, cudaStream_t stream) {
  return grad<Of::kValue>(math, a, stream);
}

}  // namespace powerattn::cuda::generic
