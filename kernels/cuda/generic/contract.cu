// SPDX-License-Identifier: Apache-2.0
// The derivative of rows against the state of their chunk: out = f J^T (S u + c z), J = d phi / d x.
#include "kernels/cuda/generic/block.cuh"

namespace powerattn::cuda::generic {
namespace {

constexpr int kDepth = 128;  // value columns held at once

// Two copies of the row gradients where they fit, so that two threads share a row.
__host__ __device__ inline int copies_of(int64_t d) { return d <= 128 ? 2 : 1; }

// Shared memory: x [64][d | 1] float, out copies [64][d | 1] float, u [64][depth + pad], S [32][depth + pad],
// T [64][33] float, z [32], monomials 2 x [32].
template <class Mul>
size_t contract_shared(int64_t d, int64_t e) {
  using T = typename Mul::T;
  const int depth = e < kDepth ? round16(e) : kDepth;
  const size_t x = shared_size(kRows * odd((d + 7) / 8 * 8) * sizeof(float));
  return x + shared_size(size_t(copies_of(d)) * kRows * odd(d) * sizeof(float)) +
         shared_size(kRows * pad_k<Mul>(depth) * sizeof(T)) +
         shared_size(kSlab * pad_k<Mul>(depth) * sizeof(T)) + shared_size(kRows * (kSlab + 1) * sizeof(float)) +
         shared_size(kSlab * sizeof(float)) + shared_size(2 * kSlab * sizeof(Monomial));
}

// T[m][r] = sum_c u[m][c] S[r][c] + c_m z[r];  out[m][i] += T[m][r] d phi(x_m)[r] / d x_i, slab by slab of 32
// rows r. A product of features differs by every index in turn: d/dx_i of x_a x_b ... = sum over the places
// that hold i of the product of the others, which counts repeated indices as often as they occur.
template <class Mul, int kDegree>
__global__ void __launch_bounds__(kThreads) contract_kernel(ContractArgs a, int64_t heads) {
  using T = typename Mul::T;
  char *memory = ptx::dynamic_shared<char>();
  SharedCarver carve{memory};
  const Shape &s = a.shape;
  const int depth = s.e < kDepth ? round16(s.e) : kDepth;
  const int ldx = odd((s.d + 7) / 8 * 8), ldo = odd(s.d), ldk = pad_k<Mul>(depth), ldt = kSlab + 1;
  const int copies = copies_of(s.d);
  float *x = carve.take<float>(kRows * ldx);
  float *out = carve.take<float>(copies * kRows * ldo);
  T *u = carve.take<T>(kRows * ldk);
  T *slab = carve.take<T>(kSlab * ldk);
  float *t = carve.take<float>(kRows * ldt);
  float *z = carve.take<float>(kSlab);
  Monomial *both = carve.take<Monomial>(2 * kSlab);  // slow threads still read the last slab's

  const int64_t head = blockIdx.x % heads;
  const Tile tile = s.table.tiles[blockIdx.x / heads];
  if (tile.length == 0) return;
  const Chunk c = s.table.chunks[tile.chunk];
  const int64_t kv = a.queries ? head / s.group : head;
  const int64_t out_row = row_index(s, heads, head, tile.sequence, tile.start);
  const int tid = threadIdx.x, warp = tid >> 5;

  const bool at_edge = a.queries ? c.index == 0 : c.index == c.count - 1;
  if (at_edge && !a.edge) {
    for (int64_t i = tid; i < tile.length * s.d; i += kThreads) a.out[out_row * s.d + i] = 0.0f;
    if (a.dots && tid < tile.length) a.dots[out_row + tid] = 0.0f;
    return;
  }

  load_rows(x, ldx, a.x, s.dtype, view_row(s, a.x, head, tile.sequence, tile.start), tile.length, kRows,
            int(s.d), int((s.d + 7) / 8 * 8), true, [](float v) { return v; });
  for (int i = tid; i < copies * kRows * ldo; i += kThreads) out[i] = 0.0f;
  const int64_t slot = int64_t(tile.chunk) * s.heads_kv + kv;
  const T *state = static_cast<const T *>(a.s) + slot * s.rows * s.e;
  const float *zstate = a.z ? a.z + slot * s.rows : nullptr;
  const int64_t u_row = view_row(s, a.u, head, tile.sequence, tile.start);

  float zfactor[4];  // c of this lane's rows
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int r = warp * 16 + Mul::row(j);
    zfactor[j] = 1.0f;
    if (a.queries) zfactor[j] = r < tile.length && a.z ? -a.delta[out_row + r] : 0.0f;
  }

  const int row = tid % kRows, part = tid / kRows;
  const float *mine = x + row * ldx;
  float *sum = out + (part % copies * kRows + row) * ldo;
  for (int64_t first = 0; first < s.rows; first += kSlab) {
    Monomial *rows = both + first / kSlab % 2 * kSlab;
    float acc[kSlab / 8][4];
    clear(acc);
    for (int64_t c0 = 0; c0 < s.e; c0 += depth) {
      if (c0 > 0) __syncthreads();
      if (first == 0 || s.e > depth)
        load_operand<Mul>(u, ldk, a.u, s.dtype, u_row + c0, tile.length, kRows,
                          int(min(int64_t(depth), s.e - c0)), depth);
      load_slab<Mul>(slab, ldk, state, first, s.rows, s.e, c0, depth);
      ptx::copy_commit();
      if (c0 == 0 && tid < kSlab) {
        rows[tid] = monomial_or_zero(a.table, first + tid, s.rows);
        z[tid] = zstate && first + tid < s.rows ? zstate[first + tid] : 0.0f;
      }
      ptx::copy_wait<0>();
      __syncthreads();
      Mul::template multiply<false, true>(acc, u + warp * 16 * ldk, ldk, slab, ldk, depth);
    }
#pragma unroll
    for (int n = 0; n < kSlab / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = warp * 16 + Mul::row(j), col = Mul::col(n, j);
        t[r * ldt + col] = rows[col].weight * (acc[n][j] + zfactor[j] * z[col]);
      }
    __syncthreads();
    if (part < copies) {
      const int count = kSlab / copies;
      for (int r = part * count; r < (part + 1) * count; ++r) {
        const float tr = t[row * ldt + r];
        if (kDegree == 2) {
          const int i = int(rows[r].indices & 255), j = int(rows[r].indices >> 8 & 255);
          const float xi = mine[i], xj = mine[j];
          sum[i] += tr * xj;
          sum[j] += tr * xi;
        } else {
          const uint64_t indices = rows[r].indices;
#pragma unroll 1
          for (int place = 0; place < s.degree; ++place) {
            float others = tr;
#pragma unroll 1
            for (int other = 0; other < s.degree; ++other)
              if (other != place) others *= mine[indices >> (8 * other) & 255];
            sum[indices >> (8 * place) & 255] += others;
          }
        }
      }
    }
  }
  __syncthreads();

  const Chunk chunk = s.table.chunks[ptx::anew(tile.chunk)];  // again: the loop has no registers for it
  const int64_t g_row = row_index(s, s.heads_kv, kv, tile.sequence, chunk.start);
  for (int r = warp; r < tile.length; r += kThreads / 32) {
    float f = 1.0f;
    if (a.queries) f = s.scale_p * (s.normalize ? a.inverse[out_row + r] : 1.0f);
    if (s.gated) {
      const double g = s.g[g_row + tile.offset + r];
      f *= expf(float(a.queries ? g : s.g[g_row + chunk.length - 1] - g));
    }
    float dot = 0;
    for (int i = tid & 31; i < s.d; i += 32) {
      float v = out[r * ldo + i];
      if (copies == 2) v += out[(kRows + r) * ldo + i];
      a.out[(out_row + r) * s.d + i] = f * v;
      dot += f * v * x[r * ldx + i];
    }
    if (a.dots) {
      dot = warp_sum(dot);
      if ((tid & 31) == 0) a.dots[out_row + r] = dot;
    }
  }
}

}  // namespace

size_t contract_shared_bytes(Math math, const Problem &p) {
  size_t bytes = 0;
  with_math(math, [&](auto mul) {
    bytes = contract_shared<decltype(mul)>(p.head_dim, p.value_dim);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t contract(Math math, const ContractArgs &a, cudaStream_t stream) {
  const Shape &s = a.shape;
  const int64_t heads = a.queries ? s.heads_q : s.heads_kv;
  return with_math(math, [&](auto mul) {
    using Mul = decltype(mul);
    const size_t shared = contract_shared<Mul>(s.d, s.e);
    const int64_t blocks = s.table.num_tiles * heads;
    return s.degree == 2 ? launch(contract_kernel<Mul, 2>, blocks, 1, kThreads, shared, stream, a, heads)
                         : launch(contract_kernel<Mul, 0>, blocks, 1, kThreads, shared, stream, a, heads);
  });
}

}  // namespace powerattn::cuda::generic
