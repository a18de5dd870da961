// SPDX-License-Identifier: Apache-2.0
// Gradients of queries and, with rows and columns exchanged, of keys. Per block: 128 rows of one chunk and
// head, phases on the same accumulators:
//   1. state:     T = u State^T per tile; dx_j += T_ij x_i, dx_i += T_ij x_j; + x Z
//   2. full:      e = (s^{p-1} f) (m - delta), s = x z^T, m = u y^T; dx += e z, columns away from the diagonal
//   3. diagonal:  the same with a mask and exact gate differences
// float16: the state has units, and every row a power of two, `top`, that its e are divided by before they are
// rounded, as in output.cuh: e spans what 1 / l does.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "load.h"
#include "shapes.h"
#include "weights.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

template <typename T, int D, int P>
__global__ void __launch_bounds__(GradientShape<D>::kThreads, GradientShape<D>::kBlocksPerSM)
    gradient_kernel(const __grid_constant__ GradientArgs a) {
  using S = GradientShape<D>;
  constexpr int kN = D / 8, kK = D / 16, kM = S::kM, kStep = S::kStep;
  constexpr bool kState = P != 0;
  constexpr bool kScaled = kCounted<T>;  // with r_i before rounding, so that e has its final size
  unsigned char *shared = dynamic_shared<unsigned char>();
  const uint32_t base = shared_address(shared);
  float *const factors = reinterpret_cast<float *>(shared + 2 * S::kRowBytes + 4 * S::kTileBytes);
  float *const gates = factors + 2 * S::kColumns;
  float *const deltas = gates + 2 * S::kColumns;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, quad = lane & 3;

  const Shape &shape = a.shape;
  const int group = shape.heads_q / shape.heads_kv;
  const int heads_x = a.reverse ? shape.heads_kv : shape.heads_q;
  const int64_t num_tiles = shape.table.num_tiles;
  const int head_x = static_cast<int>(blockIdx.x / num_tiles);
  int64_t tile_id = blockIdx.x % num_tiles;
  if (!a.reverse) tile_id = num_tiles - 1 - tile_id;  // heaviest first
  const Place &place = find_place(shape, tile_id, deltas + 2 * S::kColumns, thread);
  const Tile &tile = place.tile;
  const Chunk &chunk = place.chunk;
  if (tile.length == 0) return;
  const int head_kv = a.reverse ? head_x : head_x / group;
  const int64_t batch = shape.packed ? 0 : tile.sequence;

  const SharedTile<D> xs{base, kRowTile}, us{base + S::kRowBytes, kRowTile};
  const uint32_t buffers = base + 2 * S::kRowBytes;
  load_rows<kRowTile, D, S::kThreads>(xs.base, row_pointer<T>(a.x, batch, tile.start, head_x), a.x.stride_t,
                                      tile.length, thread);
  load_rows<kRowTile, D, S::kThreads>(us.base, row_pointer<T>(a.u, batch, tile.start, head_x), a.u.stride_t,
                                      tile.length, thread);
  copy_commit();

  const int row0 = warp * 16 * kM;
  // Per-row numbers are read where they are needed: the state phase has no registers to spare.
  const int64_t query = (batch * shape.heads_q + head_x) * shape.seq_len + tile.start;  // when rows are queries
  auto row_of = [&](int m, int h) { return row0 + 16 * m + 8 * h + lane / 4; };
  auto read = [&](const float *p, int64_t at, int row, float otherwise) {
    return p != nullptr && row < tile.length ? p[at + row] : otherwise;
  };

  copy_wait<0>();
  __syncthreads();
  uint32_t uf[kM][kK][4];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int k = 0; k < kK; ++k) us.a(uf[m][k], row0 + 16 * m, k, lane);

  float dx[kM][kN][4] = {};
  [[maybe_unused]] float top[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) top[m][0] = top[m][1] = kLeastTop;

  // ---- 1. State.
  if constexpr (kState)
    if (a.state != nullptr) {
      constexpr int kTiles = tile_count(P == 1 ? 1 : 2, D);
      constexpr int kZTiles = 2 * D / kTileRows;
      const int64_t slot = static_cast<int64_t>(tile.chunk) * shape.heads_kv + head_kv;
      const char *const state = static_cast<const char *>(a.state) + slot * kTiles * S::kTileBytes;
      const bool with_z = P == 2 && a.z_state != nullptr;
      const char *const zs = static_cast<const char *>(a.z_state) + slot * kZTiles * S::kTileBytes;
      const int first = with_z ? -kZTiles : 0;  // the tiles of Z come first
      float ratio = 1.f;                        // of the units of Z and S
      if constexpr (kScaled) ratio = a.units[slot].z * inverse_power(a.units[slot].s);
      auto fetch = [&](int n) {
        if (n < kTiles)
          load_tile<S::kTileBytes, S::kThreads>(buffers + (n & 3) * S::kTileBytes,
                                                n < 0 ? zs + static_cast<int64_t>(n + kZTiles) * S::kTileBytes
                                                      : state + static_cast<int64_t>(n) * S::kTileBytes,
                                                thread);
        copy_commit();
      };
      auto next = [&](int n) {  // tile n is ready; n + 3 >= 0 is a tile of the state
        copy_wait<2>();
        __syncthreads();
        if (n + 3 < kTiles)
          load_tile<S::kTileBytes, S::kThreads>(buffers + ((n + 3) & 3) * S::kTileBytes,
                                                state + static_cast<int64_t>(n + 3) * S::kTileBytes, thread);
        copy_commit();
        return SharedTile<D>{buffers + (n & 3) * S::kTileBytes, kTileRows};
      };
      fetch(first);
      fetch(first + 1);
      fetch(first + 2);
      // dx = 2 Z x, times -delta_i for queries (the gradient of the row sum is -r_i delta_i; r_i comes last)
      if constexpr (P == 2) {
        if (with_z) {
#pragma unroll 1
          for (int n = first; n < 0; ++n) {
            copy_wait<2>();
            __syncthreads();
            fetch(n + 3);
            const SharedTile<D> t{buffers + (n & 3) * S::kTileBytes, kTileRows};
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
              for (int m = 0; m < kM; ++m) {
                uint32_t f[4];
                xs.a(f, row0 + 16 * m, (4 * (n - first) + s) % kK, lane);
#pragma unroll
                for (int c = 0; c < kN / 2; ++c) {
                  uint32_t b[4];
                  t.b_trans(b, 16 * s, c, lane);
                  mma<T>(dx[m][2 * c], f, b[0], b[1]);
                  mma<T>(dx[m][2 * c + 1], f, b[2], b[3]);
                }
              }
          }
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float f = ratio * (a.reverse ? 2.f : -2.f * read(a.delta, query, row_of(m, h), 0.f));
#pragma unroll
              for (int i = 0; i < kN; ++i) {
                dx[m][i][2 * h] *= f;
                dx[m][i][2 * h + 1] *= f;
              }
            }
        }
        int n = 0;
#pragma unroll 1
        for (int ib = 0; ib < kN; ++ib) {
          float side[kM][2][8] = {};  // sum over j of T_ij x_j, the part of this lane's columns
#pragma unroll 1
          for (int jb = ib; jb < kN; ++jb, ++n) {
            const auto t = next(n);
            uint32_t scalar[kM][2][2];
            float mine[kM][4] = {};  // sum over i of T_ij x_i
            float xj[kM][2][2];
            if constexpr (kM == 2) {
              uint32_t f[4];
              xs.columns32(f, row0, jb, lane);
#pragma unroll
              for (int q = 0; q < 4; ++q) {
                xj[q >> 1][q & 1][0] = Pair<T>::lo(f[q]);
                xj[q >> 1][q & 1][1] = Pair<T>::hi(f[q]);
              }
            } else {
              uint32_t f[4];
              xs.columns32(f, row0 & ~31, jb, lane);
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const uint32_t v = (row0 & 16) ? f[2 + h] : f[h];
                xj[0][h][0] = Pair<T>::lo(v);
                xj[0][h][1] = Pair<T>::hi(v);
              }
            }
#pragma unroll
            for (int s = 0; s < 4; ++s) {  // rows i = 2s, 2s + 1 of the tile's eight
              if (s % 2 == 0) {            // x[row][8 ib + 2s .. + 3]; all eight would not fit in registers
#pragma unroll
                for (int m = 0; m < kM; ++m)
#pragma unroll
                  for (int h = 0; h < 2; ++h)
                    load8(scalar[m][h], xs.at(row0 + 16 * m + 8 * h + lane / 4, ib) + 4 * s);
              }
              float w[kM][2][4] = {};
#pragma unroll
              for (int k = 0; k < kK; ++k) {
                uint32_t b[4];
                t.b(b, 16 * s, k, lane);
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                  mma<T>(w[m][0], uf[m][k], b[0], b[1]);
                  mma<T>(w[m][1], uf[m][k], b[2], b[3]);
                }
              }
#pragma unroll
              for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                  const float x0 = Pair<T>::lo(scalar[m][h][s & 1]), x1 = Pair<T>::hi(scalar[m][h][s & 1]);
                  mine[m][2 * h] += w[m][0][2 * h] * x0 + w[m][1][2 * h] * x1;
                  mine[m][2 * h + 1] += w[m][0][2 * h + 1] * x0 + w[m][1][2 * h + 1] * x1;
                  side[m][h][2 * s] += w[m][0][2 * h] * xj[m][h][0] + w[m][0][2 * h + 1] * xj[m][h][1];
                  side[m][h][2 * s + 1] += w[m][1][2 * h] * xj[m][h][0] + w[m][1][2 * h + 1] * xj[m][h][1];
                }
            }
#pragma unroll
            for (int i = 0; i < kN; ++i)  // registers have no run-time index
              if (i == jb) {
#pragma unroll
                for (int m = 0; m < kM; ++m)
#pragma unroll
                  for (int e = 0; e < 4; ++e) dx[m][i][e] += mine[m][e];
              }
          }
          // Sum over the quad; lane c keeps i = 2c, 2c + 1, the accumulator's columns.
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const bool high = (quad & 2) != 0, odd = (quad & 1) != 0;
              float half[4], own[2];
#pragma unroll
              for (int q = 0; q < 4; ++q) {
                const float give = high ? side[m][h][q] : side[m][h][4 + q];
                const float keep = high ? side[m][h][4 + q] : side[m][h][q];
                half[q] = keep + __shfl_xor_sync(0xffffffffu, give, 2);
              }
#pragma unroll
              for (int q = 0; q < 2; ++q) {
                const float give = odd ? half[q] : half[2 + q];
                const float keep = odd ? half[2 + q] : half[q];
                own[q] = keep + __shfl_xor_sync(0xffffffffu, give, 1);
              }
#pragma unroll
              for (int i = 0; i < kN; ++i)
                if (i == ib) {
                  dx[m][i][2 * h] += own[0];
                  dx[m][i][2 * h + 1] += own[1];
                }
            }
        }
      } else if constexpr (P == 1) {  // dx = u State^T
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const auto t = next(n);
#pragma unroll
          for (int s = 0; s < (D < 64 ? D / 16 : 4); ++s)
#pragma unroll
            for (int k = 0; k < kK; ++k) {
              uint32_t b[4];
              t.b(b, 16 * s, k, lane);
#pragma unroll
              for (int m = 0; m < kM; ++m) {
                mma<T>(dx[m][8 * n + 2 * s], uf[m][k], b[0], b[1]);
                mma<T>(dx[m][8 * n + 2 * s + 1], uf[m][k], b[2], b[3]);
              }
            }
        }
      }
    }

  const float *const g = a.g ? a.g + (batch * shape.heads_kv + head_kv) * shape.seq_len + chunk.start : nullptr;
  // Gates: everything before this tile is referred to its first row, everything after to its last.
  const float g_ref = !g                ? 0.f
                      : a.reverse       ? g[tile.offset + tile.length - 1]
                      : tile.offset > 0 ? g[tile.offset - 1]
                                        : 0.f;
  const float g_end = g ? g[chunk.length - 1] : 0.f;
  // x . dx, from weights that are not rounded: the gate gradient is a sum of differences of these, and what two
  // rows of one pair have in common cancels only if both are exact.
  float dot[kM][2] = {};
  if (kState && a.state != nullptr) {
    float factor = a.reverse ? __expf(g_end - g_ref) : a.scale * __expf(g_ref);
    if constexpr (kScaled) factor *= a.units[static_cast<int64_t>(tile.chunk) * shape.heads_kv + head_kv].s;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float f = factor;
        if (kScaled && !a.reverse) f *= read(a.r, query, row_of(m, e >> 1), 1.f);
#pragma unroll
        for (int i = 0; i < kN; ++i) dx[m][i][e] *= f;
      }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const uint32_t x2 =
              *reinterpret_cast<const uint32_t *>(shared + (xs.at(row_of(m, h), i) - base) + 4 * quad);
          dot[m][h] += dx[m][i][2 * h] * Pair<T>::lo(x2) + dx[m][i][2 * h + 1] * Pair<T>::hi(x2);
        }
    if (a.state_dot != nullptr) {
      const int head = anew(static_cast<int>(head_x));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row_of(m, h);
          const float sum = quad_sum(dot[m][h]);
          if (quad == 0 && row < tile.length)
            a.state_dot[(batch * heads_x + head) * shape.seq_len + tile.start + row] =
                g != nullptr ? sum * __expf(g_ref - g[tile.offset + row]) : sum;
        }
    }
    if constexpr (kScaled) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float most = 0.f;
#pragma unroll
          for (int i = 0; i < kN; ++i)
            most = fmaxf(most, fmaxf(fabsf(dx[m][i][2 * h]), fabsf(dx[m][i][2 * h + 1])));
          top[m][h] = first_top(most);
          const float inverse = inverse_power(top[m][h]);
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            dx[m][i][2 * h] *= inverse;
            dx[m][i][2 * h + 1] *= inverse;
          }
        }
    }
  }

  // ---- 2., 3. Blocks of columns, double-buffered. The factor of a column is p c e^{...} (r_i for keys).
  const Walk walk = make_walk<S::kColumns>(tile, chunk.length, a.reverse, a.reverse ? group : 1);
  const int total = walk.total();
  const float pair_scale = a.scale * static_cast<float>(shape.degree);
  auto fetch = [&](int n) {
    if (n < total) {
      int part, block;
      bool diagonal;
      walk.at(n, &part, &block, &diagonal);
      const int head = a.reverse ? head_kv * group + part : head_kv;
      const int col0 = block * S::kColumns, valid = chunk.length - col0;
      const uint32_t dst = buffers + (n & 1) * 2 * S::kTileBytes;
      load_rows<S::kColumns, D, S::kThreads>(dst, row_pointer<T>(a.z, batch, chunk.start + col0, head),
                                             a.z.stride_t, valid, thread);
      load_rows<S::kColumns, D, S::kThreads>(dst + S::kTileBytes,
                                             row_pointer<T>(a.y, batch, chunk.start + col0, head), a.y.stride_t,
                                             valid, thread);
      if (thread < S::kColumns) {
        const int64_t at = (batch * shape.heads_q + head) * shape.seq_len + chunk.start;
        const float *r = a.reverse && a.r ? a.r + at : nullptr;
        const Columns columns{g, r, pair_scale, g_ref, a.reverse};
        const int to = (n & 1) * S::kColumns + thread, col = col0 + thread;
        fill_column(columns, diagonal, col, chunk.length, &factors[to], &gates[to]);
        deltas[to] = a.reverse && a.delta && col < chunk.length ? a.delta[at + col] : 0.f;
      }
    }
    copy_commit();
  };
  __syncthreads();
  fetch(0);
  copy_wait<0>();
  __syncthreads();

  float g_row[kM][2], delta_row[kM][2], r_early[kM][2];
  uint32_t xf[kM][kK][4];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      g_row[m][h] = read(g, tile.offset, row_of(m, h), g_ref);
      delta_row[m][h] = a.reverse ? 0.f : read(a.delta, query, row_of(m, h), 0.f);
      r_early[m][h] = a.reverse || !kScaled ? 1.f : read(a.r, query, row_of(m, h), 1.f);
    }
#pragma unroll
    for (int k = 0; k < kK; ++k) xs.a(xf[m][k], row0 + 16 * m, k, lane);
  }
  auto row_gate = [&](int m, int h) {
    return g == nullptr ? 1.f : __expf(a.reverse ? g_ref - g_row[m][h] : g_row[m][h] - g_ref);
  };
  auto to_rows = [&] {
    if (g == nullptr) return;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float f = row_gate(m, h);
        dot[m][h] *= f;
        if constexpr (kScaled) f = lower_top(&top[m][h], f, dx[m], h, 0.f);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          dx[m][i][2 * h] *= f;
          dx[m][i][2 * h + 1] *= f;
        }
      }
  };
  // float16: e is complete before it is rounded, and so `to_rows` is for the state's part alone.
  if (kScaled || walk.full_total() == 0) to_rows();
  [[maybe_unused]] float row_factor[kM][2];  // e^{..} r_i: what e lacks away from the diagonal
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) row_factor[m][h] = row_gate(m, h) * r_early[m][h];

#pragma unroll 1
  for (int n = 0; n < total; ++n) {
    if (n > 0) {
      copy_wait<0>();
      __syncthreads();
    }
    fetch(n + 1);
    int part, block;
    bool diagonal;
    walk.at(n, &part, &block, &diagonal);
    const uint32_t src = buffers + (n & 1) * 2 * S::kTileBytes;
    const SharedTile<D> zt{src, S::kColumns}, yt{src + S::kTileBytes, S::kColumns};
    const float *const factor = factors + (n & 1) * S::kColumns;
    const float *const gate = gates + (n & 1) * S::kColumns;
    const float *const delta_col = deltas + (n & 1) * S::kColumns;
    const int offset = block * S::kColumns - tile.offset;
#pragma unroll 1
    for (int col = 0; col < S::kColumns; col += kStep) {
      if (diagonal) {
        if (!a.reverse && offset + col > row0 + 16 * kM - 1) continue;
        if (a.reverse && offset + col + kStep - 1 < row0) continue;
      }
      // s = x z^T, e = u y^T
      float s[kM][2][4] = {}, e[kM][2][4] = {};
#pragma unroll
      for (int k = 0; k < kK; ++k) {
        uint32_t b[4];
        zt.b(b, col, k, lane);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(s[m][0], xf[m][k], b[0], b[1]);
          mma<T>(s[m][1], xf[m][k], b[2], b[3]);
        }
        yt.b(b, col, k, lane);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(e[m][0], uf[m][k], b[0], b[1]);
          mma<T>(e[m][1], uf[m][k], b[2], b[3]);
        }
      }
      // e = factor s^{p-1} (e - delta), on the diagonal times e^{g_i - g_j} where visible, else 0
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = col + 8 * c + 2 * quad;
        const float2 f = *reinterpret_cast<const float2 *>(factor + at);
        const float2 dc = *reinterpret_cast<const float2 *>(delta_col + at);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          float p[4] = {s[m][c][0], s[m][c][1], s[m][c][2], s[m][c][3]};
          power_minus_one<P>(p, shape.degree);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float d = a.reverse ? ((q & 1) ? dc.y : dc.x) : delta_row[m][q >> 1];
            e[m][c][q] = (p[q] * ((q & 1) ? f.y : f.x)) * (e[m][c][q] - d);
            if constexpr (kScaled) e[m][c][q] *= diagonal ? r_early[m][q >> 1] : row_factor[m][q >> 1];
          }
        }
        if (diagonal) {
          const float2 gc = *reinterpret_cast<const float2 *>(gate + at);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              const int row = row0 + 16 * m + 8 * (q >> 1) + lane / 4, column = offset + at + (q & 1);
              const float d = g_row[m][q >> 1] - ((q & 1) ? gc.y : gc.x);
              const bool seen = a.reverse ? column >= row : column <= row;
              const float w = g != nullptr ? e[m][c][q] * __expf(a.reverse ? -d : d) : e[m][c][q];
              e[m][c][q] = seen ? w : 0.f;
            }
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int q = 0; q < 4; ++q) dot[m][q >> 1] += e[m][c][q] * s[m][c][q];
      if constexpr (kScaled) {
        float most[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            most[m][h] = fmaxf(fmaxf(fabsf(e[m][0][2 * h]), fabsf(e[m][0][2 * h + 1])),
                               fmaxf(fabsf(e[m][1][2 * h]), fabsf(e[m][1][2 * h + 1])));
        raise_tops(top, most, [&](int m, int h, float ratio) {
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            dx[m][i][2 * h] *= ratio;
            dx[m][i][2 * h + 1] *= ratio;
          }
        });
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int q = 0; q < 4; ++q) e[m][c][q] *= inverse_power(top[m][q >> 1]);
      }
      // dx += e z
      uint32_t w[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        w[m][0] = Pair<T>::pack(e[m][0][0], e[m][0][1]);
        w[m][1] = Pair<T>::pack(e[m][0][2], e[m][0][3]);
        w[m][2] = Pair<T>::pack(e[m][1][0], e[m][1][1]);
        w[m][3] = Pair<T>::pack(e[m][1][2], e[m][1][3]);
      }
#pragma unroll
      for (int c = 0; c < kN / 2; ++c) {
        uint32_t b[4];
        zt.b_trans(b, col, c, lane);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(dx[m][2 * c], w[m], b[0], b[1]);
          mma<T>(dx[m][2 * c + 1], w[m], b[2], b[3]);
        }
      }
    }
    if (!kScaled && n + 1 == walk.full_total()) to_rows();
  }

  // ---- dx, times r_i for queries; x . dx before rounding.
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_of(m, h);
      const bool in = row < tile.length;
      // What the sums and the dot product lack: r_i, or the power of two and nothing.
      const float r_row = a.reverse || kScaled ? 1.f : read(a.r, query, row, 1.f);
      const float last = kScaled ? top[m][h] : r_row;
      T *const out = row_pointer<T>(a.out, batch, tile.start + (in ? row : 0), head_x) + 2 * quad;
      float *const wide =
          a.out_float + ((batch * heads_x + head_x) * shape.seq_len + tile.start + row) * D + 2 * quad;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float lo = dx[m][i][2 * h] * last, hi = dx[m][i][2 * h + 1] * last;
        if (in && a.out_float != nullptr)
          *reinterpret_cast<float2 *>(wide + 8 * i) = make_float2(lo, hi);
        else if (in)
          store_pair(out + 8 * i, lo, hi);
      }
      const float sum = quad_sum(dot[m][h]) * r_row;
      if (!a.reverse && a.delta_out != nullptr && in && quad == 0)
        a.delta_out[query + row] = sum / static_cast<float>(shape.degree) +
                                   delta_row[m][h] * (1.f - a.eps * read(a.r, query, row, 1.f));
      if (a.dot != nullptr && in && quad == 0)
        a.dot[(batch * heads_x + head_x) * shape.seq_len + tile.start + row] = sum;
    }
}

template <typename T, int D, int P>
cudaError_t launch_gradient(const GradientArgs &a, cudaStream_t stream) {
  using S = GradientShape<D>;
  const int64_t blocks = a.shape.table.num_tiles * (a.reverse ? a.shape.heads_kv : a.shape.heads_q);
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(gradient_kernel<T, D, P>, static_cast<unsigned>(blocks), S::kThreads, S::kShared, stream,
                       a);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
