// SPDX-License-Identifier: Apache-2.0
// The attention form inside chunks, plus the state's part where there is one.
#include "kernels/cuda/generic/block.cuh"

namespace powerattn::cuda::generic {
namespace {

constexpr int kKeys = 32;  // keys per step

// Shared memory: q [64][d16 + pad], k [32][d16 + pad], v [32][8 N + pad], p [64][32 + pad], gates [64 + 32]
// double and float.
template <class Mul, int N>
size_t attention_shared(int64_t d) {
  using T = typename Mul::T;
  const int d16 = round16(d);
  return shared_size(kRows * pad_k<Mul>(d16) * sizeof(T)) + shared_size(kKeys * pad_k<Mul>(d16) * sizeof(T)) +
         shared_size(kKeys * pad_n<Mul>(8 * N) * sizeof(T)) +
         shared_size(kRows * pad_k<Mul>(kKeys) * sizeof(T)) + shared_size((kRows + kKeys) * sizeof(double)) +
         shared_size((kRows + kKeys) * sizeof(float));
}

// y_i = sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + eps),  w_ij = exp(g_i - g_j) (scale q_i . k_j)^p, both
// sums with the state's part. Block: 64 query rows of one head x 8 N value columns; keys from the chunk's start
// to the diagonal.
template <class Mul, int N>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArgs a) {
  using T = typename Mul::T;
  char *memory = ptx::dynamic_shared<char>();
  SharedCarver carve{memory};
  const Shape &s = a.shape;
  const int d16 = round16(s.d);
  const int ldq = pad_k<Mul>(d16), ldv = pad_n<Mul>(8 * N), ldp = pad_k<Mul>(kKeys);
  T *q = carve.take<T>(kRows * ldq);
  T *k = carve.take<T>(kKeys * ldq);
  T *v = carve.take<T>(kKeys * ldv);
  T *p = carve.take<T>(kRows * ldp);
  double *gi = carve.take<double>(kRows);
  double *gj = carve.take<double>(kKeys);
  float *fi = carve.take<float>(kRows), *fj = carve.take<float>(kKeys);

  const int64_t head = blockIdx.x % s.heads_q, kv = head / s.group;
  const Tile tile = s.table.tiles[blockIdx.x / s.heads_q];
  if (tile.length == 0) return;
  const int64_t column = int64_t(blockIdx.y) * 8 * N;
  const int tid = threadIdx.x, warp = tid >> 5, row0 = warp * 16;
  const int64_t chunk_start = tile.start - tile.offset;
  const int64_t g_row = row_index(s, s.heads_kv, kv, tile.sequence, chunk_start);

  load_operand<Mul>(q, ldq, a.q, s.dtype, view_row(s, a.q, head, tile.sequence, tile.start), tile.length, kRows,
                    int(s.d), d16);
  // exp(g_i - g_j) = exp(g_i - g_0) exp(g_0 - g_j) with g_0 of the tile's first row: both at most 1 for keys
  // before the tile, so that nothing overflows; in the diagonal the difference itself, in double.
  const double g0 = s.gated ? s.g[g_row + tile.offset] : 0.0;
  if (tid < kRows) {
    gi[tid] = s.gated && tid < tile.length ? s.g[g_row + tile.offset + tid] : 0.0;
    fi[tid] = s.gated ? expf(float(gi[tid] - g0)) : 1.0f;
  }

  float acc[N][4], norm[4] = {0, 0, 0, 0};
  clear(acc);
  const int end = tile.offset + tile.length;  // keys of the chunk that this tile sees
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    const int valid = min(kKeys, end - j0);
    __syncthreads();
    load_operand<Mul>(k, ldq, a.k, s.dtype, view_row(s, a.k, kv, tile.sequence, chunk_start + j0), valid, kKeys,
                      int(s.d), d16);
    load_operand<Mul>(v, ldv, a.v, s.dtype, view_row(s, a.v, kv, tile.sequence, chunk_start + j0) + column,
                      valid, kKeys, int(min(int64_t(8 * N), s.e - column)), 8 * N);
    if (tid < kKeys) {
      gj[tid] = s.gated && tid < valid ? s.g[g_row + j0 + tid] : 0.0;
      fj[tid] = s.gated ? expf(float(g0 - gj[tid])) : 1.0f;
    }
    __syncthreads();
    const bool diagonal = j0 + kKeys > tile.offset;
    float score[kKeys / 8][4];
    clear(score);
    Mul::template multiply<false, true>(score, q + row0 * ldq, ldq, k, ldq, d16);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = row0 + Mul::row(j), col = Mul::col(n, j);
        float w = power(s.scale * score[n][j], s.degree);
        if (!diagonal) {
          w *= fi[r] * fj[col];
        } else {
          if (s.gated) w *= expf(float(gi[r] - gj[col]));
          if (j0 + col > tile.offset + r) w = 0.0f;
        }
        const T rounded = Mul::pack(w);
        norm[j] += Mul::value(rounded);
        p[r * ldp + col] = rounded;
      }
    __syncwarp();  // a warp reads only the rows of p that it wrote
    Mul::template multiply<false, false>(acc, p + row0 * ldp, ldp, v, ldv, kKeys);
  }

  Mul::reduce_rows(norm);
  const int64_t out_row = row_index(s, s.heads_q, head, tile.sequence, tile.start);
  const int64_t b = batch_of(s.packed, tile.sequence);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int r = row0 + Mul::row(j);
    if (r >= tile.length) continue;
    if (a.state_norm) norm[j] += a.state_norm[out_row + r];
    norm[j] += s.eps;
    if (a.row_norm.data && blockIdx.y == 0 && Mul::col(0, j) == 0)
      static_cast<float *>(a.row_norm.data)[b * a.row_norm.stride_b + (tile.start + r) * a.row_norm.stride_t +
                                            head * a.row_norm.stride_h] = norm[j];
    const int64_t y_row = b * a.y.stride_b + (tile.start + r) * a.y.stride_t + head * a.y.stride_h;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t col = column + Mul::col(n, j);
      if (col >= s.e) continue;
      float y = acc[n][j];
      if (a.state_out) y += a.state_out[(out_row + r) * s.e + col];
      if (s.normalize) y = norm[j] != 0.0f ? y / norm[j] : 0.0f;
      store_from_float(a.y.data, s.dtype, y_row + col, y);
    }
  }
}

template <class Mul, int N>
cudaError_t launch_attention(const AttentionArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  return launch(attention_kernel<Mul, N>, s.table.num_tiles * s.heads_q, int(ceil_div(s.e, 8 * N)), kThreads,
                attention_shared<Mul, N>(s.d), stream, a);
}

}  // namespace

size_t attention_shared_bytes(Math math, const Problem &p) {
  size_t bytes = 0;
  with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    bytes = p.value_dim <= 64 ? attention_shared<Mul, 8>(p.head_dim) : attention_shared<Mul, 16>(p.head_dim);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t attention(Math math, const AttentionArgs &a, cudaStream_t stream) {
  return with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    return a.shape.e <= 64 ? launch_attention<Mul, 8>(a, stream) : launch_attention<Mul, 16>(a, stream);
  });
}

}  // namespace powerattn::cuda::generic
