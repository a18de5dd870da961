// SPDX-License-Identifier: Apache-2.0
// Rows against the state of their chunk: out = f Phi(X) S, norm = f Phi(X) z.
#include "kernels/cuda/generic/block.cuh"

namespace powerattn::cuda::generic {
namespace {

// N column tiles of 8: N - 1 of values, and one whose first two columns are z, split in a high and a low part
// so that the operand type does not round it. Shared memory: x [64][d | 1] float, phi 2 x [64][32 + pad], S 3 x
// [32][8 N], z parts [64][2].
template <class Mul, int N>
size_t query_shared(int64_t d) {
  using T = typename Mul::T;
  return shared_size(kRows * odd((d + 7) / 8 * 8) * sizeof(float)) +
         2 * shared_size(kRows * pad_k<Mul>(kSlab) * sizeof(T)) +
         3 * shared_size(kSlab * pad_n<Mul>(8 * N) * sizeof(T)) + shared_size(kRows * 2 * sizeof(float));
}

// Slabs of 32 state rows: phi of slab n is built in registers and stored while the copy of slab n + 1 of S is
// in flight; one barrier per slab (two phi buffers, three of S).
template <class Mul, int N, int kDegree>
__global__ void __launch_bounds__(kThreads) query_kernel(QueryArgs a, int64_t heads) {
  using T = typename Mul::T;
  char *memory = ptx::dynamic_shared<char>();
  SharedCarver carve{memory};
  const Shape &s = a.shape;
  constexpr int kValues = 8 * (N - 1);
  const int ldx = odd((s.d + 7) / 8 * 8), lda = pad_k<Mul>(kSlab), ldb = pad_n<Mul>(8 * N);
  float *x = carve.take<float>(kRows * ldx);
  T *phi = carve.take<T>(2 * kRows * lda);
  T *slab = carve.take<T>(3 * kSlab * ldb);
  float *znorm = carve.take<float>(kRows * 2);

  const int64_t head = blockIdx.x % heads;
  const Tile tile = s.table.tiles[blockIdx.x / heads];
  if (tile.length == 0) return;
  const Chunk c = s.table.chunks[tile.chunk];
  const int64_t kv = a.queries ? head / s.group : head;
  const int64_t column = int64_t(blockIdx.y) * kValues;
  const int64_t out_row = row_index(s, heads, head, tile.sequence, tile.start);
  const int tid = threadIdx.x, warp = tid >> 5;

  const bool at_edge = a.queries ? c.index == 0 : c.index == c.count - 1;
  if (at_edge && !a.edge) {  // the state is 0
    for (int64_t i = tid; i < tile.length * s.e; i += kThreads) a.out[out_row * s.e + i] = 0.0f;
    if (a.norm)
      for (int i = tid; i < tile.length; i += kThreads) a.norm[out_row + i] = 0.0f;
    return;
  }

  load_rows(x, ldx, a.x, s.dtype, view_row(s, a.x, head, tile.sequence, tile.start), tile.length, kRows,
            int(s.d), int((s.d + 7) / 8 * 8), true, [](float v) { return v; });
  const int64_t slot = int64_t(tile.chunk) * s.heads_kv + kv;
  const T *state = static_cast<const T *>(a.s) + slot * s.rows * s.e;
  const float *z = a.z ? a.z + slot * s.rows : nullptr;
  const int64_t slabs = ceil_div(s.rows, kSlab);
  // The last column tile holds z in two parts; the columns behind them stay zero. Thread r < 32 moves the z of
  // row r, read one slab ahead.
  for (int i = tid; i < 3 * kSlab * 8; i += kThreads) slab[i / 8 * ldb + kValues + i % 8] = Mul::pack(0.0f);
  auto read_z = [&](int64_t n) {
    return z && tid < kSlab && n * kSlab + tid < s.rows ? z[n * kSlab + tid] : 0.0f;
  };
  auto fetch = [&](int64_t n, float zn) {
    T *to = slab + n % 3 * kSlab * ldb;
    load_slab<Mul>(to, ldb, state, n * kSlab, s.rows, s.e, column, kValues);
    ptx::copy_commit();
    if (tid < kSlab) {
      const T high = Mul::pack(zn);
      to[tid * ldb + kValues] = high;
      to[tid * ldb + kValues + 1] = Mul::pack(zn - Mul::value(high));
    }
  };

  float acc[N][4];
  clear(acc);
  const int pair = tid % 16 * 2, phase = tid / 16;  // two features; rows phase, phase + 8, ...
  Monomial m0 = monomial_or_zero(a.table, pair, s.rows), m1 = monomial_or_zero(a.table, pair + 1, s.rows);
  float zn = read_z(0);
  __syncthreads();  // the zero columns, x
  fetch(0, zn);
  zn = read_z(1);
  for (int64_t n = 0; n < slabs; ++n) {
    if (n + 1 < slabs) {
      fetch(n + 1, zn);
    } else {
      ptx::copy_commit();
    }
    zn = read_z(n + 2);
    T *to = phi + n % 2 * kRows * lda;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int r = phase + 8 * i;
      to[r * lda + pair] = Mul::pack(feature<kDegree>(m0, s.degree, x + r * ldx));
      to[r * lda + pair + 1] = Mul::pack(feature<kDegree>(m1, s.degree, x + r * ldx));
    }
    m0 = monomial_or_zero(a.table, (n + 1) * kSlab + pair, s.rows);
    m1 = monomial_or_zero(a.table, (n + 1) * kSlab + pair + 1, s.rows);
    ptx::copy_wait<1>();
    __syncthreads();
    Mul::template multiply<false, false>(acc, to + warp * 16 * lda, lda, slab + n % 3 * kSlab * ldb, ldb,
                                         kSlab);
  }

  const int64_t g_row = row_index(s, s.heads_kv, kv, tile.sequence, c.start);
  auto factor = [&](int r) {
    float f = a.queries ? s.scale_p : 1.0f;
    if (s.gated) {
      const double g = s.g[g_row + tile.offset + r];
      f *= expf(float(a.queries ? g : s.g[g_row + c.length - 1] - g));
    }
    return f;
  };
  float f[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int r = warp * 16 + Mul::row(j);
    f[j] = r < tile.length ? factor(r) : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = warp * 16 + Mul::row(j), col = Mul::col(n, j);
      if (col < kValues) {
        if (r < tile.length && column + col < s.e) a.out[(out_row + r) * s.e + column + col] = f[j] * acc[n][j];
      } else if (col < kValues + 2) {
        znorm[r * 2 + col - kValues] = f[j] * acc[n][j];
      }
    }
  if (a.norm && blockIdx.y == 0) {
    __syncthreads();
    for (int r = tid; r < tile.length; r += kThreads) a.norm[out_row + r] = znorm[2 * r] + znorm[2 * r + 1];
  }
}

template <class Mul, int N>
cudaError_t launch_query(const QueryArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t heads = a.queries ? s.heads_q : s.heads_kv;
  const int64_t blocks = s.table.num_tiles * heads;
  const int columns = int(ceil_div(s.e, 8 * (N - 1)));
  const size_t shared = query_shared<Mul, N>(s.d);
  return s.degree == 2 ? launch(query_kernel<Mul, N, 2>, blocks, columns, kThreads, shared, stream, a, heads)
                       : launch(query_kernel<Mul, N, 0>, blocks, columns, kThreads, shared, stream, a, heads);
}

}  // namespace

size_t query_shared_bytes(Math math, const Problem &p) {
  size_t bytes = 0;
  with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    bytes = p.value_dim <= 64 ? query_shared<Mul, 9>(p.head_dim) : query_shared<Mul, 17>(p.head_dim);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t query(Math math, const QueryArgs &a, cudaStream_t stream) {
  return with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    return a.shape.e <= 64 ? launch_query<Mul, 9>(a, stream) : launch_query<Mul, 17>(a, stream);
  });
}

}  // namespace powerattn::cuda::generic
