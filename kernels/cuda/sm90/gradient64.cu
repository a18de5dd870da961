// SPDX-License-Identifier: Apache-2.0
// Gradients for head_dim = value_dim = 64. A block owns 128 rows of a chunk, 64 in each consumer warpgroup;
// queries (dq) or keys (dk and dv, everything transposed). With rows x, u and columns z, y:
//   dq: x = q, u = dy, z = k, y = v        dk, dv: x = k, u = v, z = q, y = dy
//   s = x z^T,  m = u y^T,  e = p c gamma s^{p-1} (m - delta) r,  dx += e z        dv += c gamma s^p r y
// r and delta belong to the query, gamma = exp(G_i - G_j), c = scale^p. Phases on the same accumulators:
//   1. state:  T = u S^T per tile (rows (i, j));  dx_j += T_ij x_i, dx_i += T_ij x_j;  keys: dv += phi(x) S
//   2. columns that every row of the tile sees, gates relative to the tile
//   3. the tile's own two blocks, exact gates on the diagonal
// Accumulators hold dx / (p c r) for queries, dx / p for keys: the state's part enters times 1 / p.
#include "output.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kTile = 64 * 64 * 2;
constexpr int kStage = 2 * kTile;  // two state tiles, or 64 columns of z and y
constexpr int kStages = 8;
constexpr int kAhead = 3;  // stages in flight behind the one being handed over
constexpr int kConsumerWarps = 8;
constexpr int kUnitRows = 128;
// Per stage: factor, log2 gate, r, delta of 64 columns, and the advance (floats).
constexpr uint32_t kGate = 256, kR = 512, kDelta = 768, kAdvance = 1024, kMeta = 1040;

struct GradientUnit {
  int32_t head, row, length, main, first, second;  // blocks: seen by all rows; of the own two blocks
  int32_t states, batch;
  int64_t token;
  float state_factor;
  float r[kUnitRows], delta[kUnitRows];  // of the rows (queries)
};
// 1024 (alignment) + rows 32 KB + ring 8 x 16 KB + staging 8 x 2 KB + meta 8 x 1040 + units + barriers: 188 KB.
constexpr int kSmem = 1024 + 4 * kTile + kStages * kStage + kConsumerWarps * 2048 + kStages * kMeta +
                      2 * static_cast<int>(sizeof(GradientUnit)) + 256;

struct Smem {
  uint32_t rows, ring, staging, meta, unit, full, empty, rows_full, rows_empty, ticket;
  __device__ explicit Smem(uint32_t base) {
    rows = (base + 1023) & ~1023u;  // x: two tiles, u: two tiles
    ring = rows + 4 * kTile;
    staging = ring + kStages * kStage;
    meta = staging + kConsumerWarps * 2048;
    unit = meta + kStages * kMeta;
    full = unit + 2 * sizeof(GradientUnit);
    empty = full + 8 * kStages;
    rows_full = empty + 8 * kStages;
    rows_empty = rows_full + 8;
    ticket = rows_empty + 8;
  }
};

// ---- Producer -----------------------------------------------------------------------------------------------

// Column factors of block `block`; G is the chunk's gate sum, `first` the tile's first block.
//   dq:     as the forward's keys (write_key_meta)
//   dk, dv: f_i = c r_i exp(G_i - G_ref), ref = the tile's last row for later blocks, the first block's last
//   row
//           for the second block; advance = exp(G_tile end - G_first block's end)
struct QueryMeta {  // loaded one block ahead
  double g, start, reference;
  float r, delta;
};
__device__ __forceinline__ QueryMeta load_query_meta(const GradientArgs &a, const double *gate, int64_t row,
                                                     int block, int first, int length, int tid) {
  QueryMeta q{0.0, 0.0, 0.0, 0.f, 0.f};
  const int i = block * 64 + tid;
  if (tid < 64 && i < length) {
    q.r = a.r ? a.r[row + i] : 1.f;
    q.delta = a.delta ? a.delta[row + i] : 0.f;
  }
  if (gate && tid < 64) {
    q.g = gate[min(i, length - 1)];
    q.start = gate[block * 64];
    q.reference = gate[min(first * 64 + (block == first + 1 ? 63 : 127), length - 1)];
  }
  return q;
}
__device__ __forceinline__ void write_query_meta(uint32_t meta, const QueryMeta &q, float scale_p, int block,
                                                 int first, int length, int tid) {
  if (tid >= 64) return;
  const bool valid = block * 64 + tid < length;
  const float r = scale_p * q.r;  // 0 past the end
  store_f1(meta + tid * 4,
           valid && block > first ? r * exp2_fast(static_cast<float>(q.g - q.reference) * kLog2e) : r);
  store_f1(meta + kGate + tid * 4, valid ? static_cast<float>(q.g - q.start) * kLog2e : -INFINITY);
  store_f1(meta + kR + tid * 4, r);
  store_f1(meta + kDelta + tid * 4, q.delta);
}

template <typename T, int kDegree, bool kKeys>
__device__ __forceinline__ void produce(const GradientArgs &a, const Smem &s, GradientUnit *slots, int tid) {
  constexpr int kStateTiles = kDegree == 1 ? 1 : 36;
  const Shape &p = a.p;
  const int heads = kKeys ? p.heads_kv : p.heads_q;
  const int64_t units = p.table.num_tiles * heads * 2;
  Ring<kStages> ring;
  uint32_t phase = 1;
  Tickets tickets{s.ticket};
  Ring<kStages> oldest;  // first stage not handed over, as in output64.cu
  const auto hand_over = [&](uint32_t bar) {
    fence_async_proxy();
    __syncwarp();
    if (tid % 32 == 0) barrier_arrive(bar);
  };
  const auto loaded = [&](int n) {  // column stage n of this unit is under way
    copy_commit();
    ring.next();
    if (n >= kAhead) {
      copy_wait<kAhead>();
      hand_over(s.full + 8 * oldest.stage);
      oldest.next();
    }
  };
  const auto flush = [&](int total) {
    copy_wait<0>();
#pragma unroll 1
    for (int n = min(kAhead, total); n > 0; --n) {
      hand_over(s.full + 8 * oldest.stage);
      oldest.next();
    }
  };
  const auto bulk_stage = [&](const void *src, uint32_t bytes) {  // one thread's work, as in output64.cu
    barrier_wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
    const uint32_t bar = s.full + 8 * ring.stage;
    barrier_expect(bar, bytes);
    bulk_load(s.ring + ring.stage * kStage, src, bytes, bar);
    barrier_arrive_n(bar, 4 - 1);
    ring.next();
  };
  for (;;) {
    const int64_t u = tickets.next(a.ticket, tid);
    if (u >= units) break;
    RowTile t = row_tile_at(p, u >> 1, heads);
    const Chunk &c = t.chunk;
    t.row += kKeys ? static_cast<int>(u & 1) * kUnitRows : static_cast<int>(~u & 1) * kUnitRows;
    if (t.row >= c.length) continue;
    const int head_kv = kKeys ? t.head : t.head / p.group;
    const int first = t.row / 64, blocks = (c.length + 63) / 64;
    const double *gate = a.gate ? a.gate + token_row(p, t.batch, p.heads_kv, head_kv, c.start) : nullptr;
    const bool has_state =
        a.state && (kKeys ? c.index + 1 < c.count || a.end_has_state : c.index > 0 || a.end_has_state);
    const int heads_z = kKeys ? p.group : 1;

    barrier_wait(s.rows_empty, phase);
    phase ^= 1;
    const T *x = row_pointer<T>(a.x, t.batch, t.head, c.start + t.row);
    const T *uu = row_pointer<T>(a.u, t.batch, t.head, c.start + t.row);
#pragma unroll 1
    for (int m = 0; m < 2; ++m) {
      load_tile<T>(s.rows + m * kTile, a.x, x + m * 64 * a.x.stride_t, c.length - t.row - m * 64, tid);
      load_tile<T>(s.rows + (2 + m) * kTile, a.u, uu + m * 64 * a.u.stride_t, c.length - t.row - m * 64, tid);
    }
    GradientUnit *um = slots + phase;
    if (!kKeys) {
      const int64_t at = token_row(p, t.batch, p.heads_q, t.head, c.start) + t.row + tid;
      const bool in = t.row + tid < c.length;
      um->r[tid] = in && a.r ? a.r[at] : 1.f;
      um->delta[tid] = in && a.delta ? a.delta[at] : 0.f;
    }
    if (tid == 0) {
      um->head = t.head;
      um->row = t.row;
      um->length = c.length;
      um->main = kKeys ? max(0, blocks - first - 2) * heads_z : first;
      um->first = kKeys ? (first + 1 < blocks ? heads_z : 0) : 1;
      um->second = kKeys ? heads_z : first + 1 < blocks;
      um->states = has_state;
      um->batch = t.batch;
      um->token = c.start;
      const double g = !gate   ? 0.0
                       : kKeys ? gate[c.length - 1] - gate[min(t.row + kUnitRows, c.length) - 1]
                               : gate[t.row];
      um->state_factor = exp2f(static_cast<float>(g) * kLog2e);
    }
    copy_commit();
    copy_wait<0>();
    hand_over(s.rows_full);

    if (has_state) {
      const int64_t slot = int64_t(t.chunk_index) * p.heads_kv + head_kv;
      const char *state = static_cast<const char *>(a.state) + slot * (kStateTiles * kTile);
      if (tid == 0) {
        if (kDegree == 2 && a.norm)
          bulk_stage(static_cast<const char *>(a.norm) + slot * (2 * kTile), 2 * kTile);
#pragma unroll 1
        for (int i = 0; i < (kStateTiles + 1) / 2; ++i)
          bulk_stage(state + i * kStage, kDegree == 1 ? kTile : kStage);
      } else {
        ring.skip((kStateTiles + 1) / 2 + (kDegree == 2 && a.norm ? 1 : 0));
      }
      __syncwarp();
      named_barrier<2, 128>();
    }
    oldest = ring;
    const auto load_columns = [&](int head, int block) {
      const uint32_t stage = s.ring + ring.stage * kStage;
      const int64_t token = c.start + int64_t(block) * 64;
      load_tile<T>(stage, a.z, row_pointer<T>(a.z, t.batch, head, token), c.length - block * 64, tid);
      load_tile<T>(stage + kTile, a.y, row_pointer<T>(a.y, t.batch, head, token), c.length - block * 64, tid);
    };
    if constexpr (kKeys) {
      // Later blocks, then the tile's second, then its first, each for all heads of the group.
      const int far = max(0, blocks - first - 2), near = first + 1 < blocks ? 2 : 1;
      const int total = (far + near) * heads_z;
      const auto place = [&](int n, int *head, int *block) {
        const bool later = n < far * heads_z;
        const int m = later ? n : n - far * heads_z, span = later ? far : 1;
        const int part = m / (later ? far : 1);
        *head = head_kv * heads_z + (later ? part : part % heads_z);
        *block = later ? first + 2 + m % span : first + near - 1 - part / heads_z;
      };
      const int64_t row0 = token_row(p, t.batch, p.heads_q, 0, c.start);
      float advance = 1.f;
      if (gate && near == 2 && tid == 0)
        advance = exp2_fast(
            static_cast<float>(gate[min(first * 64 + 127, c.length - 1)] - gate[first * 64 + 63]) * kLog2e);
      int head, block;
      place(0, &head, &block);
      QueryMeta q = load_query_meta(a, gate, row0 + head * p.tokens, block, first, c.length, tid);
#pragma unroll 1
      for (int n = 0; n < total; ++n) {
        barrier_wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
        load_columns(head, block);
        const QueryMeta here = q;
        const int block_here = block;
        if (n + 1 < total) {
          place(n + 1, &head, &block);
          q = load_query_meta(a, gate, row0 + head * p.tokens, block, first, c.length, tid);
        }
        const uint32_t meta = s.meta + ring.stage * kMeta;
        write_query_meta(meta, here, a.scale_p, block_here, first, c.length, tid);
        if (tid == 0) store_f1(meta + kAdvance, advance);
        loaded(n);
      }
      flush(total);
    } else {
      const int total = min(first + 2, blocks);
      KeyGates gates = load_key_gates(gate, 0, first, c.length, tid);
#pragma unroll 1
      for (int block = 0; block < total; ++block) {
        barrier_wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
        load_columns(head_kv, block);
        const KeyGates here = gates;
        if (block + 1 < total) gates = load_key_gates(gate, block + 1, first, c.length, tid);
        write_key_meta(s.meta + ring.stage * kMeta, here, block, c.length, tid, kAdvance);
        loaded(block);
      }
      flush(total);
    }
  }
  barrier_wait(s.rows_empty, phase);
  if (tid == 0) slots[phase ^ 1].head = -1;
  hand_over(s.rows_full);
}

// ---- Consumers ----------------------------------------------------------------------------------------------

template <typename T, int kDegree, bool kKeys>
struct Consumer {
  const Smem &s;
  const int lane, warp;
  Ring<kStages> ring;
  float dx[32], dv[kKeys ? 32 : 1];
  uint32_t x[4][4], u[4][4];

  __device__ __forceinline__ void acquire() { barrier_wait(s.full + 8 * ring.stage, ring.phase); }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(s.empty + 8 * stage);
  }
  __device__ __forceinline__ uint32_t stage() const { return s.ring + ring.stage * kStage; }
  __device__ __forceinline__ uint32_t meta() const { return s.meta + ring.stage * kMeta; }

  __device__ __forceinline__ void load_rows(uint32_t (&f)[4][4], uint32_t tile) {
    const int row = warp * 16 + (lane & 15), half = lane >> 4;
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) ldmatrix4(f[ks], tile + row * 128 + (((2 * ks + half) ^ (row & 7)) << 4));
  }
  __device__ __forceinline__ void scale(float f0, float f1) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      dx[i] *= i & 2 ? f1 : f0;
      if constexpr (kKeys) dv[i] *= i & 2 ? f1 : f0;
    }
  }

  // dx = 2 Z x (times -delta for queries).
  __device__ __forceinline__ void norm_phase(float d0, float d1) {
    acquire();
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) {
      if (ks == 0)
        wgmma<T, false, true>(dx, x[ks], tile_desc(stage()));
      else
        wgmma<T, true, true>(dx, x[ks], tile_desc(stage() + ks * 2048));
      wgmma<T, true, true>(dx, x[ks], tile_desc(stage() + kTile + ks * 2048));
    }
    wgmma_commit();
    wgmma_wait<0>();
    release(ring.stage);
    ring.next();
    const float f0 = kKeys ? 2.f : -2.f * d0, f1 = kKeys ? 2.f : -2.f * d1;
#pragma unroll
    for (int i = 0; i < 32; ++i) dx[i] *= i & 2 ? f1 : f0;
  }

  // phi(x) fragments of tile (ib, jb), as in the forward's state phase.
  __device__ __forceinline__ void phi(uint32_t (&f)[4][4], const uint32_t (&xs)[2][4], int jb) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      f[n][0] = mul2<T>(x[jb / 2][(jb & 1) * 2], low2_here(xs[0][n]));
      f[n][1] = mul2<T>(x[jb / 2][(jb & 1) * 2 + 1], low2_here(xs[1][n]));
      f[n][2] = mul2<T>(x[jb / 2][(jb & 1) * 2], high2_here(xs[0][n]));
      f[n][3] = mul2<T>(x[jb / 2][(jb & 1) * 2 + 1], high2_here(xs[1][n]));
    }
  }
  // t[4 n ..] holds T for i = 8 ib + n and this lane's two j: dx_j += T_ij x_i, side_i += T_ij x_j.
  __device__ __forceinline__ void contract(const float (&t)[32], const uint32_t (&xs)[2][4],
                                           float (&side)[2][8], int jb) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 xj = unpack2<T>(x[jb / 2][(jb & 1) * 2 + h]);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const float2 xi = kKeys ? unpack2_here<T>(xs[h][n / 2]) : unpack2<T>(xs[h][n / 2]);
        const float a0 = t[4 * n + 2 * h], a1 = t[4 * n + 2 * h + 1], b0 = t[4 * n + 4 + 2 * h],
                    b1 = t[4 * n + 5 + 2 * h];
        dx[4 * jb + 2 * h] += a0 * xi.x + b0 * xi.y;
        dx[4 * jb + 2 * h + 1] += a1 * xi.x + b1 * xi.y;
        side[h][n] += a0 * xj.x + a1 * xj.y;
        side[h][n + 1] += b0 * xj.x + b1 * xj.y;
      }
    }
  }
  // Sums side over the quad; lane c keeps i = 8 ib + 2c, 2c + 1, the columns of its accumulators.
  __device__ __forceinline__ void reduce_side(float (&side)[2][8], int ib) {
    const bool high = (lane & 2) != 0, odd = (lane & 1) != 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float give = high ? side[h][n] : side[h][4 + n], keep = high ? side[h][4 + n] : side[h][n];
        half[n] = keep + __shfl_xor_sync(0xffffffffu, give, 2);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float give = odd ? half[n] : half[2 + n], keep = odd ? half[2 + n] : half[n];
        dx[4 * ib + 2 * h + n] += keep + __shfl_xor_sync(0xffffffffu, give, 1);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) side[h][n] = 0.f;
    }
  }
  __device__ __forceinline__ void row_scalars(uint32_t (&xs)[2][4], int ib) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < 4; ++n)
        xs[h][n] = __shfl_sync(0xffffffffu, x[ib / 2][(ib & 1) * 2 + h], (lane & ~3) | n);
  }
  // T = u S^T of one tile.
  __device__ __forceinline__ void start_t(float (&t)[32], uint32_t tile) {
    wgmma_fence();
    wgmma<T, false, false>(t, u[0], tile_desc(tile));
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(t, u[ks], tile_desc(tile + ks * 32));
    wgmma_commit();
  }

  // Queries: T of the next tile runs while this one is contracted. Keys: dv += phi(x) S of this tile does.
  __device__ __forceinline__ void state_phase_2() {
    float t[kKeys ? 1 : 2][32], side[2][8] = {};
    uint32_t xs[2][4], f[4][4];
    int previous = 0;
    if constexpr (!kKeys) {
      acquire();
      start_t(t[0], stage());
    }
#pragma unroll
    for (int ib = 0; ib < 8; ++ib) {
      row_scalars(xs, ib);
#pragma unroll
      for (int jb = ib; jb < 8; ++jb) {
        const int tile = ib * 8 - ib * (ib - 1) / 2 + jb - ib;
        if constexpr (kKeys) {
          if (tile % 2 == 0) acquire();
          const uint32_t b = stage() + (tile % 2) * kTile;
          start_t(t[0], b);
          wgmma_wait<1>();  // dv of the tile before: its fragments are free
          if (tile % 2 == 0 && tile > 0) release(previous);
          phi(f, xs, jb);
          wgmma_fence();
#pragma unroll
          for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dv, f[ks], tile_desc(b + ks * 2048));
          wgmma_commit();
          wgmma_wait<1>();  // T
          if (tile % 2 == 1) {
            previous = ring.stage;
            ring.next();
          }
          contract(t[0], xs, side, jb);
        } else {
          if (tile < 35) {
            if (tile % 2 == 1) {
              previous = ring.stage;
              ring.next();
              acquire();
            }
            start_t(t[(tile + 1) % 2], stage() + ((tile + 1) % 2) * kTile);
            wgmma_wait<1>();
            if (tile % 2 == 1) release(previous);
          } else {
            wgmma_wait<0>();
            release(ring.stage);
            ring.next();
          }
          contract(t[tile % 2], xs, side, jb);
        }
      }
      reduce_side(side, ib);
    }
    if constexpr (kKeys) {
      wgmma_wait<0>();
      release(previous);
    }
  }
  // Degree 1: dx = u S^T; keys: dv = x S.
  __device__ __forceinline__ void state_phase_1() {
    acquire();
    wgmma_fence();
    wgmma<T, false, false>(dx, u[0], tile_desc(stage()));
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(dx, u[ks], tile_desc(stage() + ks * 32));
    if constexpr (kKeys) {
      wgmma<T, false, true>(dv, x[0], tile_desc(stage()));
#pragma unroll
      for (int ks = 1; ks < 4; ++ks) wgmma<T, true, true>(dv, x[ks], tile_desc(stage() + ks * 2048));
    }
    wgmma_commit();
    wgmma_wait<0>();
    release(ring.stage);
    ring.next();
  }

  // s = x z^T, m = u y^T (without fence and commit)
  __device__ __forceinline__ void scores(float (&t)[32], float (&m)[32]) {
    wgmma<T, false, false>(t, x[0], tile_desc(stage()));
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(t, x[ks], tile_desc(stage() + ks * 32));
    wgmma<T, false, false>(m, u[0], tile_desc(stage() + kTile));
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(m, u[ks], tile_desc(stage() + kTile + ks * 32));
  }
  // dx += e z, dv += w y
  __device__ __forceinline__ void accumulate(const uint32_t (&e)[4][4], const uint32_t (&w)[4][4],
                                             uint32_t tile) {
    if constexpr (kKeys) {
#pragma unroll
      for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dv, w[ks], tile_desc(tile + kTile + ks * 2048));
    }
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dx, e[ks], tile_desc(tile + ks * 2048));
  }

  // e = s^{p-1} f (m - delta), w = s^p f; on the diagonal f = r 2^(gate difference), and only visible pairs.
  template <bool kDiagonal>
  __device__ __forceinline__ void weigh(const float (&t)[32], const float (&m)[32], uint32_t (&e)[4][4],
                                        uint32_t (&w)[4][4], uint32_t md, float d0, float d1) {
    const int row = warp * 16 + lane / 4, col = (lane & 3) * 2;
    float g[2] = {0.f, 0.f};
    if constexpr (kDiagonal) {
      g[0] = load_f1(md + kGate + row * 4);
      g[1] = load_f1(md + kGate + row * 4 + 32);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t at = md + (n * 8 + col) * 4;
      float2 f = make_float2(1.f, 1.f), delta = make_float2(0.f, 0.f), gc;
      if constexpr (!kDiagonal)
        f = load_f2(at);
      else if constexpr (kKeys)
        f = load_f2(at + kR);
      if constexpr (kDiagonal) gc = load_f2(at + kGate);
      if constexpr (kKeys) delta = load_f2(at + kDelta);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float ev[2], wv[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float sv = t[4 * n + 2 * h + k];
          float fv = k ? f.y : f.x;
          if constexpr (kDiagonal) {
            const float gv = k ? gc.y : gc.x;
            const int r = row + 8 * h, c = n * 8 + col + k;
            fv *= exp2_fast(kKeys ? gv - g[h] : g[h] - gv);
            fv = (kKeys ? c >= r : c <= r) ? fv : 0.f;
          }
          const float a = power<kDegree - 1>(sv) * fv;
          ev[k] = a * (m[4 * n + 2 * h + k] - (kKeys ? (k ? delta.y : delta.x) : (h ? d1 : d0)));
          wv[k] = a * sv;
        }
        e[n / 2][(n & 1) * 2 + h] = pack2<T>(ev[0], ev[1]);
        if constexpr (kKeys) w[n / 2][(n & 1) * 2 + h] = pack2<T>(wv[0], wv[1]);
      }
    }
  }

  // Row factors before the diagonal: queries exp(G_i - block start), keys exp(block end - G_j).
  __device__ __forceinline__ void to_rows(int last) {
    const int row = warp * 16 + lane / 4;
    const float g0 = load_f1(meta() + kGate + row * 4), g1 = load_f1(meta() + kGate + row * 4 + 32);
    if constexpr (kKeys) {
      const float end = load_f1(meta() + kGate + last * 4);
      scale(exp2_fast(end - g0), exp2_fast(end - g1));
    } else {
      scale(exp2_fast(g0), exp2_fast(g1));
    }
  }

  // `leads`: this warpgroup's diagonal is the first of the tile's own blocks; the other one sees that block
  // whole.
  __device__ __forceinline__ void column_phase(const volatile GradientUnit &unit, bool leads, float d0,
                                               float d1) {
    float t[32], m[32];
    uint32_t e[4][4], w[4][4];
    const int main = unit.main, first = unit.first, own = first + unit.second;
    acquire();
    wgmma_fence();
    scores(t, m);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll 1
    for (int n = 0; n < main; ++n) {
      const uint32_t here = stage();
      const int index = ring.stage;
      weigh<false>(t, m, e, w, meta(), d0, d1);
      ring.next();
      acquire();
      wgmma_fence();
      scores(t, m);
      accumulate(e, w, here);
      wgmma_commit();
      wgmma_wait<0>();
      release(index);
    }
#pragma unroll 1
    for (int n = 0; n < own; ++n) {
      if (n > 0) acquire();
      const bool diagonal = leads ? n < first : n >= first;
      if (diagonal || n < first) {
        if (n > 0) {
          wgmma_fence();
          scores(t, m);
          wgmma_commit();
          wgmma_wait<0>();
        }
        if (diagonal) {
          if (n == (leads ? 0 : first))
            to_rows(min(63, unit.length - 1 - unit.row - (kKeys == leads ? 64 : 0)));
          weigh<true>(t, m, e, w, meta(), d0, d1);
        } else {
          if (n == 0) {
            const float f = load_f1(meta() + kAdvance);
            scale(f, f);
          }
          weigh<false>(t, m, e, w, meta(), d0, d1);
        }
        wgmma_fence();
        accumulate(e, w, stage());
        wgmma_commit();
        wgmma_wait<0>();
      }
      release(ring.stage);
      ring.next();
    }
  }

  __device__ __forceinline__ void epilogue(const GradientArgs &a, const volatile GradientUnit &unit, int group,
                                           uint32_t staging) {
    const int local = group * 64 + warp * 16, row = unit.row + local;
    const float degree = static_cast<float>(kDegree);
    float f0 = degree, f1 = degree;
    if (!kKeys) {
      f0 *= a.scale_p * unit.r[local + lane / 4];
      f1 *= a.scale_p * unit.r[local + lane / 4 + 8];
    }
    if (a.dot) {  // x . dx before rounding, for the gate gradient
      float dot[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 v = unpack2<T>(x[n / 2][(n & 1) * 2 + h]);
          dot[h] += dx[4 * n + 2 * h] * v.x + dx[4 * n + 2 * h + 1] * v.y;
        }
      dot[0] = f0 * quad_sum(dot[0]);
      dot[1] = f1 * quad_sum(dot[1]);
      const int heads = kKeys ? a.p.heads_kv : a.p.heads_q;
      float *to = a.dot + token_row(a.p, unit.batch, heads, unit.head, unit.token) + row + lane / 4;
      if ((lane & 3) == 0) {
        if (row + lane / 4 < unit.length) to[0] = dot[0];
        if (row + lane / 4 + 8 < unit.length) to[8] = dot[1];
      }
    }
    const auto at = [&](const Tensor &o) {
      return static_cast<T *>(o.data) + unit.batch * o.stride_b + unit.head * o.stride_h +
             (unit.token + row) * o.stride_t;
    };
    store_rows<T>(dx, f0, f1, staging, a.dx, at(a.dx), unit.length - row, lane);
    if constexpr (kKeys) store_rows<T>(dv, 1.f, 1.f, staging, a.dv, at(a.dv), unit.length - row, lane);
  }
};

template <typename T, int kDegree, bool kKeys>
__global__ void __launch_bounds__(384, 1) gradient64_kernel(const __grid_constant__ GradientArgs a) {
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem s(shared_address(raw));
  GradientUnit *slots = reinterpret_cast<GradientUnit *>(raw + (s.unit - shared_address(raw)));
  const int tid = threadIdx.x, group = __shfl_sync(0xffffffffu, tid / 128, 0);
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(s.full + 8 * i, 4);
      barrier_init(s.empty + 8 * i, kConsumerWarps);
    }
    barrier_init(s.rows_full, 4);
    barrier_init(s.rows_empty, kConsumerWarps);
    fence_barrier_init();
  }
  __syncthreads();
  // 2 x 224 + 56 = 504 = 3 x 168, the registers that the block was launched with.
  if (group == 2) {
    registers_dec<56>();
    produce<T, kDegree, kKeys>(a, s, slots, tid - 256);
  } else {
    registers_inc<224>();
    Consumer<T, kDegree, kKeys> c{s, tid % 32, (tid % 128) / 32};
    uint32_t phase = 0;
    for (;;) {
      barrier_wait(s.rows_full, phase);
      const volatile GradientUnit &unit = slots[phase];
      phase ^= 1;
      if (__shfl_sync(0xffffffffu, unit.head, 0) < 0) break;
      c.load_rows(c.x, s.rows + group * kTile);
      c.load_rows(c.u, s.rows + (2 + group) * kTile);
      __syncwarp();
      if (c.lane == 0) barrier_arrive(s.rows_empty);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        c.dx[i] = 0.f;
        if constexpr (kKeys) c.dv[i] = 0.f;
      }
      float d0 = 0.f, d1 = 0.f;
      if (!kKeys) {
        d0 = unit.delta[group * 64 + c.warp * 16 + c.lane / 4];
        d1 = unit.delta[group * 64 + c.warp * 16 + c.lane / 4 + 8];
      }
      if (unit.states) {
        if constexpr (kDegree == 1) {
          c.state_phase_1();
        } else if constexpr (kDegree == 2) {
          if (a.norm) c.norm_phase(d0, d1);
          c.state_phase_2();
        }
        const float f = unit.state_factor, inverse = 1.f / kDegree;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          c.dx[i] *= f * inverse;
          if constexpr (kKeys) c.dv[i] *= f;
        }
      }
      c.column_phase(unit, kKeys ? group == 1 : group == 0, d0, d1);
      c.epilogue(a, unit, group, s.staging + (tid / 32) * 2048);
    }
  }
}

template <typename T, int kDegree, bool kKeys>
cudaError_t launch(const GradientArgs &a, int sms, cudaStream_t stream) {
  return launch_kernel(gradient64_kernel<T, kDegree, kKeys>, sms, 384, kSmem, stream, a);
}
template <typename T, int kDegree>
cudaError_t launch(const GradientArgs &a, int sms, cudaStream_t stream) {
  return a.keys ? launch<T, kDegree, true>(a, sms, stream) : launch<T, kDegree, false>(a, sms, stream);
}

}  // namespace

cudaError_t gradient64(const GradientArgs &a, int sms, cudaStream_t stream) {
  using B = __nv_bfloat16;
  switch (a.p.degree) {
    case 1:
      return launch<B, 1>(a, sms, stream);
    case 2:
      return launch<B, 2>(a, sms, stream);
    case 4:
      return launch<B, 4>(a, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace powerattn::cuda::sm90
