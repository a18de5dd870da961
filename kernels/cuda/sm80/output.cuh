// SPDX-License-Identifier: Apache-2.0
// Forward outputs and, with rows and columns exchanged, the gradient of the values. Per block: 128 rows of one
// chunk and head, one warp per 32 rows, phases on the same accumulators:
//   1. state:     O = phi(x) State, l = x^T Z x           (chunked form only)
//   2. full:      O += f(x z^T) u, l += row sums, for blocks of 64 columns away from the diagonal
//   3. diagonal:  the same with a mask and exact gate differences
// float16: weights span more than its range, so every row carries a power of two, `top`, that its weights are
// divided by before they are rounded; it grows with the largest weight seen, and O and l with it. Features are
// products of two elements: a row's are multiplied by a power of two, too, `lift`, and the state has units.
// Between phases rows are multiplied by their gate factors, all <= 1 for decaying gates.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "load.h"
#include "shapes.h"
#include "weights.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

template <typename T, int D, int P>
__global__ void __launch_bounds__(128, 2) output_kernel(const __grid_constant__ OutputArgs a) {
  using S = OutputShape<D>;
  constexpr int kN = D / 8, kK = D / 16, kStep = S::kStep;
  constexpr bool kState = P != 0;
  constexpr bool kScaled = kCounted<T>;
  unsigned char *shared = dynamic_shared<unsigned char>();
  const uint32_t base = shared_address(shared);
  float *const factors = reinterpret_cast<float *>(shared + S::kRowBytes + 4 * S::kTileBytes);
  float *const gates = factors + 2 * S::kColumns;
  [[maybe_unused]] float *const lifts = gates + 2 * S::kColumns + sizeof(Place) / 4;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, quad = lane & 3;

  const Shape &shape = a.shape;
  const int group = shape.heads_q / shape.heads_kv;
  const int64_t num_tiles = shape.table.num_tiles;
  const int head_x = static_cast<int>(blockIdx.x / num_tiles);
  int64_t tile_id = blockIdx.x % num_tiles;
  if (!a.reverse) tile_id = num_tiles - 1 - tile_id;  // heaviest first
  const Place &place = find_place(shape, tile_id, gates + 2 * S::kColumns, thread);
  const Tile &tile = place.tile;
  const Chunk &chunk = place.chunk;
  if (tile.length == 0) return;
  const int head_kv = a.reverse ? head_x : head_x / group;
  const int64_t batch = shape.packed ? 0 : tile.sequence;

  const T *const x = row_pointer<T>(a.x, batch, tile.start, head_x);
  const SharedTile<D> rows{base, kRowTile};
  load_rows<kRowTile, D, S::kThreads>(base, x, a.x.stride_t, tile.length, thread);
  const uint32_t buffers = base + S::kRowBytes;

  float o[S::kM][kN][4] = {};
  float l[S::kM][2] = {};
  float top[S::kM][2];
#pragma unroll
  for (int m = 0; m < S::kM; ++m) top[m][0] = top[m][1] = kScaled ? kLeastTop : 1.f;
  const int row0 = warp * 32;  // of this warp in the tile

  // ---- 1. O = phi(x) State: k runs over the 64 rows of each tile. l = sum_n x_n (x Z)_n, Z in two parts.
  if constexpr (kState)
    if (a.state != nullptr) {
      constexpr int kTiles = tile_count(P == 1 ? 1 : 2, D);
      constexpr int kZTiles = 2 * D / kTileRows;
      const int64_t slot = static_cast<int64_t>(tile.chunk) * shape.heads_kv + head_kv;
      const char *const state = static_cast<const char *>(a.state) + slot * kTiles * S::kTileBytes;
      const char *const zs =
          a.z_state ? static_cast<const char *>(a.z_state) + slot * kZTiles * S::kTileBytes : nullptr;
      const int total = kTiles + (zs ? kZTiles : 0);
      auto fetch = [&](int n) {
        if (n < total)
          load_tile<S::kTileBytes, S::kThreads>(buffers + (n & 3) * S::kTileBytes,
                                                n < kTiles
                                                    ? state + static_cast<int64_t>(n) * S::kTileBytes
                                                    : zs + static_cast<int64_t>(n - kTiles) * S::kTileBytes,
                                                thread);
        copy_commit();
      };
      auto next = [&](int n) {  // tile n is ready, its predecessor's buffer is refilled
        copy_wait<2>();
        __syncthreads();
        fetch(n + 3);
        return SharedTile<D>{buffers + (n & 3) * S::kTileBytes, kTileRows};
      };
      fetch(0);
      fetch(1);
      fetch(2);
      int n = 0;
      if constexpr (P == 2) {
        // x_i x_j lift < 2^15, and x_i lift, an operand itself: elements below 1 are lifted less, those of 1e-3
        // to products of 2^5. A thread per row of its warp.
        if constexpr (kScaled) {
          copy_wait<2>();
          __syncthreads();
          uint32_t most = 0;
#pragma unroll 1
          for (int piece = 0; piece < kN; ++piece) most = most_bits(most, load16(rows.at(thread, piece)));
          const float largest = Pair<T>::lo(most);
          lifts[thread] = inverse_power(unit_of(largest * fmaxf(largest, 1.f)));
          __syncwarp();
        }
#pragma unroll 1
        for (int ib = 0; ib < kN; ++ib) {
          uint32_t scalar[S::kM][2][4];
#pragma unroll 1
          for (int jb = ib; jb < kN; ++jb, ++n) {
            const auto t = next(n);
            if (jb == ib) {
#pragma unroll
              for (int m = 0; m < S::kM; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                  const uint4 v = load16(rows.at(row0 + 16 * m + 8 * h + lane / 4, ib));
                  scalar[m][h][0] = v.x, scalar[m][h][1] = v.y, scalar[m][h][2] = v.z, scalar[m][h][3] = v.w;
                  if constexpr (kScaled) {
                    const float lift = lifts[row0 + 16 * m + 8 * h + lane / 4];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                      scalar[m][h][i] = Pair<T>::pack(Pair<T>::lo(scalar[m][h][i]) * lift,
                                                      Pair<T>::hi(scalar[m][h][i]) * lift);
                  }
                }
            }
            uint32_t f[4];
            rows.columns32(f, row0, jb, lane);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
              uint32_t phi[S::kM][4];
#pragma unroll
              for (int m = 0; m < S::kM; ++m)
                query_fragment<T>(phi[m], f[2 * m], f[2 * m + 1], scalar[m][0][s], scalar[m][1][s]);
#pragma unroll
              for (int c = 0; c < kN / 2; ++c) {
                uint32_t b[4];
                t.b_trans(b, 16 * s, c, lane);
#pragma unroll
                for (int m = 0; m < S::kM; ++m) {
                  mma<T>(o[m][2 * c], phi[m], b[0], b[1]);
                  mma<T>(o[m][2 * c + 1], phi[m], b[2], b[3]);
                }
              }
            }
          }
        }
      } else if constexpr (P == 1) {
#pragma unroll 1
        for (; n < kTiles; ++n) {
          const auto t = next(n);
#pragma unroll
          for (int s = 0; s < (D < 64 ? D / 16 : 4); ++s) {
            uint32_t phi[S::kM][4];
#pragma unroll
            for (int m = 0; m < S::kM; ++m) rows.a(phi[m], row0 + 16 * m, 4 * n + s, lane);
#pragma unroll
            for (int c = 0; c < kN / 2; ++c) {
              uint32_t b[4];
              t.b_trans(b, 16 * s, c, lane);
#pragma unroll
              for (int m = 0; m < S::kM; ++m) {
                mma<T>(o[m][2 * c], phi[m], b[0], b[1]);
                mma<T>(o[m][2 * c + 1], phi[m], b[2], b[3]);
              }
            }
          }
        }
      }
      if (P == 2 && zs != nullptr) {
#pragma unroll 1
        for (; n < total; ++n) {
          const auto t = next(n);
#pragma unroll 1
          for (int c = 0; c < kN / 2; ++c) {
            float xz[S::kM][2][4] = {};
#pragma unroll
            for (int s = 0; s < 4; ++s) {
              uint32_t b[4];
              t.b_trans(b, 16 * s, c, lane);
#pragma unroll
              for (int m = 0; m < S::kM; ++m) {
                uint32_t f[4];
                rows.a(f, row0 + 16 * m, (4 * (n - kTiles) + s) % kK, lane);
                mma<T>(xz[m][0], f, b[0], b[1]);
                mma<T>(xz[m][1], f, b[2], b[3]);
              }
            }
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              uint32_t f[4];
              rows.columns32(f, row0, 2 * c + q, lane);
#pragma unroll
              for (int m = 0; m < S::kM; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                  l[m][h] += xz[m][q][2 * h] * Pair<T>::lo(f[2 * m + h]) +
                             xz[m][q][2 * h + 1] * Pair<T>::hi(f[2 * m + h]);
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
  if (kState && a.state != nullptr) {
    // The state is at the chunk's start (forward: times c) or end.
    const float factor = a.reverse ? __expf(g_end - g_ref) : a.scale * __expf(g_ref);
    Units units;
    if constexpr (kScaled) units = a.units[static_cast<int64_t>(tile.chunk) * shape.heads_kv + head_kv];
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = 0.f;
        const float lowered = kScaled && P == 2 ? inverse_power(lifts[row0 + 16 * m + 8 * h + lane / 4]) : 1.f;
#pragma unroll
        for (int i = 0; i < kN; ++i)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            o[m][i][e] *= factor * units.s;
            if constexpr (kScaled) {
              o[m][i][e] *= lowered;
              most = fmaxf(most, fabsf(o[m][i][e]));
            }
          }
        l[m][h] *= factor * units.z;
        if constexpr (kScaled) {
          top[m][h] = first_top(fmaxf(most, fabsf(l[m][h])));
          const float inverse = inverse_power(top[m][h]);
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            o[m][i][2 * h] *= inverse;
            o[m][i][2 * h + 1] *= inverse;
          }
          l[m][h] *= inverse;
        }
      }
  }

  // ---- 2., 3. Blocks of columns, double-buffered.
  const Walk walk = make_walk<S::kColumns>(tile, chunk.length, a.reverse, a.reverse ? group : 1);
  const int total = walk.total();
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
                                             row_pointer<T>(a.u, batch, chunk.start + col0, head), a.u.stride_t,
                                             valid, thread);
      if (thread < S::kColumns) {
        const float *r = a.r ? a.r + (batch * shape.heads_q + head) * shape.seq_len + chunk.start : nullptr;
        const Columns columns{g, r, a.scale, g_ref, a.reverse};
        fill_column(columns, diagonal, col0 + thread, chunk.length, &factors[(n & 1) * S::kColumns + thread],
                    &gates[(n & 1) * S::kColumns + thread]);
      }
    }
    copy_commit();
  };
  __syncthreads();  // state tiles are done with their buffers
  fetch(0);
  copy_wait<0>();
  __syncthreads();

  float g_row[S::kM][2];
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 16 * m + 8 * h + lane / 4;
      g_row[m][h] = g && row < tile.length ? g[tile.offset + row] : g_ref;
    }
  uint32_t xf[D == 128 ? 1 : S::kM][D == 128 ? 1 : kK][4];
  if constexpr (D != 128) {
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int k = 0; k < kK; ++k) rows.a(xf[m][k], row0 + 16 * m, k, lane);
  }
  // What blocks away from the diagonal lack of the gates: e^{g_i - g_ref} (reverse: e^{g_ref - g_j}).
  auto row_gate = [&](int m, int h) {
    return g == nullptr ? 1.f : __expf(a.reverse ? g_ref - g_row[m][h] : g_row[m][h] - g_ref);
  };
  // It multiplies the sums of the state and of these blocks. float16: only of the state, since these weights
  // are complete before they are rounded; and what is left of the sums decides how small weights may be.
  auto to_rows = [&] {
    if (g == nullptr) return;
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float f = row_gate(m, h);
        if constexpr (kScaled) f = lower_top(&top[m][h], f, o[m], h, fabsf(l[m][h]));
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          o[m][i][2 * h] *= f;
          o[m][i][2 * h + 1] *= f;
        }
        l[m][h] *= f;
      }
  };
  if (kScaled || walk.full_total() == 0) to_rows();
  [[maybe_unused]] float row_factor[S::kM][2];
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) row_factor[m][h] = row_gate(m, h);

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
    const SharedTile<D> zt{src, S::kColumns}, ut{src + S::kTileBytes, S::kColumns};
    const float *const factor = factors + (n & 1) * S::kColumns;
    const float *const gate = gates + (n & 1) * S::kColumns;
    const int delta = block * S::kColumns - tile.offset;  // column 0 of the block against row 0 of the tile
#pragma unroll 1
    for (int col = 0; col < S::kColumns; col += kStep) {
      if (diagonal) {  // a step that the mask hides from the whole warp
        if (!a.reverse && delta + col > row0 + 31) continue;
        if (a.reverse && delta + col + kStep - 1 < row0) continue;
      }
      // s = x z^T
      float s[S::kM][kStep / 8][4] = {};
#pragma unroll
      for (int k = 0; k < kK; ++k) {
        uint32_t xr[S::kM][4];
        if constexpr (D == 128) {
#pragma unroll
          for (int m = 0; m < S::kM; ++m) rows.a(xr[m], row0 + 16 * m, k, lane);
        }
#pragma unroll
        for (int c = 0; c < kStep / 16; ++c) {
          uint32_t b[4];
          zt.b(b, col + 16 * c, k, lane);
#pragma unroll
          for (int m = 0; m < S::kM; ++m) {
            if constexpr (D == 128) {
              mma<T>(s[m][2 * c], xr[m], b[0], b[1]);
              mma<T>(s[m][2 * c + 1], xr[m], b[2], b[3]);
            } else {
              mma<T>(s[m][2 * c], xf[m][k], b[0], b[1]);
              mma<T>(s[m][2 * c + 1], xf[m][k], b[2], b[3]);
            }
          }
        }
      }
      // w = factor s^p, on the diagonal times e^{g_i - g_j} where visible, else 0
#pragma unroll
      for (int c = 0; c < kStep / 8; ++c) {
        const int at = col + 8 * c + 2 * quad;
        const float2 f = *reinterpret_cast<const float2 *>(factor + at);
#pragma unroll
        for (int m = 0; m < S::kM; ++m) {
          power<P>(s[m][c], shape.degree);
          s[m][c][0] *= f.x, s[m][c][1] *= f.y, s[m][c][2] *= f.x, s[m][c][3] *= f.y;
        }
        if (diagonal) {
          const float2 gc = *reinterpret_cast<const float2 *>(gate + at);
#pragma unroll
          for (int m = 0; m < S::kM; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = row0 + 16 * m + 8 * (e >> 1) + lane / 4, column = delta + at + (e & 1);
              const float d = g_row[m][e >> 1] - ((e & 1) ? gc.y : gc.x);
              const bool seen = a.reverse ? column >= row : column <= row;
              const float w = g != nullptr ? s[m][c][e] * __expf(a.reverse ? -d : d) : s[m][c][e];
              s[m][c][e] = seen ? w : 0.f;
            }
        }
        if constexpr (!kScaled) {
#pragma unroll
          for (int m = 0; m < S::kM; ++m) {
            l[m][0] += s[m][c][0] + s[m][c][1];
            l[m][1] += s[m][c][2] + s[m][c][3];
          }
        }
      }
      if constexpr (kScaled) {
        float most[S::kM][2] = {};
#pragma unroll
        for (int m = 0; m < S::kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int c = 0; c < kStep / 8; ++c)
              most[m][h] = fmaxf(most[m][h], fmaxf(fabsf(s[m][c][2 * h]), fabsf(s[m][c][2 * h + 1])));
        if (!diagonal) {
#pragma unroll
          for (int m = 0; m < S::kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) most[m][h] *= row_factor[m][h];
        }
        raise_tops(top, most, [&](int m, int h, float ratio) {
          l[m][h] *= ratio;
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            o[m][i][2 * h] *= ratio;
            o[m][i][2 * h + 1] *= ratio;
          }
        });
#pragma unroll
        for (int m = 0; m < S::kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float inverse = inverse_power(top[m][h]) * (diagonal ? 1.f : row_factor[m][h]);
#pragma unroll
            for (int c = 0; c < kStep / 8; ++c) {
              s[m][c][2 * h] *= inverse;
              s[m][c][2 * h + 1] *= inverse;
              l[m][h] += s[m][c][2 * h] + s[m][c][2 * h + 1];
            }
          }
      }
      // O += w u
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        uint32_t w[S::kM][4];
#pragma unroll
        for (int m = 0; m < S::kM; ++m) {
          w[m][0] = Pair<T>::pack(s[m][2 * k][0], s[m][2 * k][1]);
          w[m][1] = Pair<T>::pack(s[m][2 * k][2], s[m][2 * k][3]);
          w[m][2] = Pair<T>::pack(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
          w[m][3] = Pair<T>::pack(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int c = 0; c < kN / 2; ++c) {
          uint32_t b[4];
          ut.b_trans(b, col + 16 * k, c, lane);
#pragma unroll
          for (int m = 0; m < S::kM; ++m) {
            mma<T>(o[m][2 * c], w[m], b[0], b[1]);
            mma<T>(o[m][2 * c + 1], w[m], b[2], b[3]);
          }
        }
      }
    }
    if (!kScaled && n + 1 == walk.full_total()) to_rows();
  }

  // ---- y = O / (l + eps); the value gradient is O itself.
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 16 * m + 8 * h + lane / 4;
      float inverse = top[m][h];
      if (a.normalize || a.row_norm.data != nullptr) {
        const float sum = quad_sum(l[m][h]) * top[m][h] + a.eps;
        if (a.normalize) inverse = safe_inverse(sum) * top[m][h];
        if (a.row_norm.data != nullptr && quad == 0 && row < tile.length)
          *(row_pointer<float>(a.row_norm, batch, tile.start + row, head_x)) = sum;
      }
      if (row < tile.length) {
        T *const out = row_pointer<T>(a.out, batch, tile.start + row, head_x) + 2 * quad;
#pragma unroll
        for (int i = 0; i < kN; ++i)
          store_pair(out + 8 * i, o[m][i][2 * h] * inverse, o[m][i][2 * h + 1] * inverse);
      }
    }
}

template <typename T, int D, int P>
cudaError_t launch_output(const OutputArgs &a, cudaStream_t stream) {
  constexpr int kShared = OutputShape<D>::kShared;
  const int64_t blocks = a.shape.table.num_tiles * (a.reverse ? a.shape.heads_kv : a.shape.heads_q);
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(output_kernel<T, D, P>, static_cast<unsigned>(blocks), 128, kShared, stream, a);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
