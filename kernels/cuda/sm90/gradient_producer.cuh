// SPDX-License-Identifier: Apache-2.0
// The producer warp of the gradient kernels: x and u of a unit of 128 rows, then the state's tiles, then the
// columns z and y by 64 with their factors.
#pragma once

#include "gradient.cuh"
#include "output_producer.cuh"

namespace powerattn::cuda::sm90 {

template <int kDim>
struct GradientLayout {
  static constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
  static constexpr int kStage = 2 * kTile;     // two state tiles, or 64 columns of z and y
  static constexpr int kStages = kDim == 64 ? 8 : 4;
  static constexpr int kNormStages = 4 * kDim * kDim / kStage;
  // d = 64 (128): 1024 (alignment) + rows 32 KB (64) + ring 8 x 16 KB (4 x 32) + staging 8 x 2 KB + meta 8 (4)
  // x 1040
  // + units + barriers: 188 KB (216).
  static constexpr int kSmem = 1024 + 4 * kTile + kStages * kStage + kConsumerWarps * 2048 + kStages * kMeta +
                               2 * static_cast<int>(sizeof(GradientUnit)) + 256;
};

template <int kDim>
struct GradientSmem {
  using L = GradientLayout<kDim>;
  uint32_t rows, ring, staging, meta, unit, full, empty, rows_full, rows_empty;
  __device__ explicit GradientSmem(uint32_t base) {
    rows = (base + 1023) & ~1023u;  // x: two tiles, u: two tiles
    ring = rows + 4 * L::kTile;
    staging = ring + L::kStages * L::kStage;
    meta = staging + kConsumerWarps * 2048;
    unit = meta + L::kStages * kMeta;
    full = unit + 2 * sizeof(GradientUnit);
    empty = full + 8 * L::kStages;
    rows_full = empty + 8 * L::kStages;
    rows_empty = rows_full + 8;
  }
};

// 2 x 232 + 40 = 504: the factors of queries take more registers than those of keys.
constexpr int kGradientConsumerRegisters = 232, kGradientProducerRegisters = 40;

// Tensor maps of what the kernels read.
struct GradientMaps {
  TileMap x, u, z, y;
};
inline cudaError_t gradient_maps(const GradientArgs &a, GradientMaps *maps) {
  const int rows = a.keys ? a.p.heads_kv : a.p.heads_q, columns = a.keys ? a.p.heads_q : a.p.heads_kv;
  cudaError_t error = tile_map(a.x, a.p, rows, &maps->x);
  if (error == cudaSuccess) error = tile_map(a.u, a.p, rows, &maps->u);
  if (error == cudaSuccess) error = tile_map(a.z, a.p, columns, &maps->z);
  if (error == cudaSuccess) error = tile_map(a.y, a.p, columns, &maps->y);
  return error;
}

// Column factors of block `block`; G is the chunk's gate sum, `first` the tile's first block.
//   dq:     as the forward's keys (write_key_meta)
//   dk, dv: f_i = c r_i exp(G_i - G_ref), ref = the tile's last row for later blocks, the first block's last
//   row
//           for the second block; advance = exp(G_tile end - G_first block's end)
struct QueryMeta {  // loaded one block ahead; a lane has queries `lane` and `lane` + 32
  double g[2], reference;
  float r[2], delta[2];
};
__device__ __forceinline__ QueryMeta load_query_meta(const GradientArgs &a, const double *gate, int64_t row,
                                                     int block, int first, int length, int lane) {
  QueryMeta q{{0.0, 0.0}, 0.0, {0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int i = block * 64 + lane + 32 * n;
    if (i < length) {
      q.r[n] = a.r ? a.r[row + i] : 1.f;
      q.delta[n] = a.delta ? a.delta[row + i] : 0.f;
    }
    if (gate) q.g[n] = __ldg(gate + min(i, length - 1));
  }
  if (gate) q.reference = __ldg(gate + min(first * 64 + (block == first + 1 ? 63 : 127), length - 1));
  return q;
}
__device__ __forceinline__ void write_query_meta(uint32_t meta, const QueryMeta &q, float scale_p, int block,
                                                 int first, int length, int lane) {
  const double start = __shfl_sync(0xffffffffu, q.g[0], 0);  // of the block
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int i = lane + 32 * n;
    const bool valid = block * 64 + i < length;
    const float r = scale_p * q.r[n];  // 0 past the end
    store_f1(meta + i * 4,
             valid && block > first ? r * exp2_fast(static_cast<float>(q.g[n] - q.reference) * kLog2e) : r);
    store_f1(meta + kGate + i * 4, valid ? static_cast<float>(q.g[n] - start) * kLog2e : -INFINITY);
    store_f1(meta + kR + i * 4, r);
    store_f1(meta + kDelta + i * 4, q.delta[n]);
  }
}

template <typename T, int kDegree, bool kKeys, int kDim>
__device__ __forceinline__ void produce_gradient(const GradientArgs &a, const GradientMaps &maps,
                                                 const GradientSmem<kDim> &s, GradientUnit *slots) {
  using L = GradientLayout<kDim>;
  constexpr int kTile = L::kTile, kStage = L::kStage, kStages = L::kStages;
  constexpr int kStateTiles = tile_count(kDegree == 1 ? 1 : 2, kDim);
  const Shape &p = a.p;
  const int heads = kKeys ? p.heads_kv : p.heads_q;
  // Turns, lanes, barriers and what is read anew at every stage: as in output_producer.cuh.
  Turns<kStages> at{1u << 31};
  const auto lane = [] { return thread_here() & 31; };
  const auto hand_over = [&](uint32_t bar) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(bar);
  };
  const auto hand_over_copies = [&](uint32_t bar) {  // of all lanes
    copy_commit();
    copy_wait<0>();
    fence_async_proxy();
    hand_over(bar);
  };
  const auto bulk_stage = [&](const char *src, uint32_t bytes) {
    barrier_wait(s.empty + 8 * at.stage(), at.phase() ^ 1);
    const uint32_t bar = s.full + 8 * at.stage();
    barrier_expect(bar, bytes);
    bulk_load(s.ring + at.stage() * kStage, src, bytes, bar);
    ++at.turn;
  };
  for (;;) {
    const int ticket = next_ticket(a.ticket, lane());
    if (ticket >= p.table.num_tiles * heads * 2) break;
    RowTile t = row_tile_at(p, static_cast<uint32_t>(ticket) >> 1, heads);
    t.row += kKeys ? (ticket & 1) * kUnitRows : (~ticket & 1) * kUnitRows;
    if (t.row >= t.chunk.length) continue;

    barrier_wait(s.rows_empty, at.unit());
    at.next_unit();
    volatile GradientUnit &u = slots[at.unit()];
    const int head_kv = kKeys ? t.head : t.head / p.group;
    const bool has_state =
        a.state && (a.end_has_state || (kKeys ? t.chunk.index + 1 < t.chunk.count : t.chunk.index > 0));
    if (lane() == 0) {
      const int heads_z = kKeys ? p.group : 1, first = t.row / 64, length = t.chunk.length,
                blocks = (length + 63) / 64;
      u.head = t.head;
      u.row = t.row;
      u.length = length;
      u.main = kKeys ? max(0, blocks - first - 2) * heads_z : first;
      u.first = kKeys ? (first + 1 < blocks ? heads_z : 0) : 1;
      u.second = kKeys ? heads_z : first + 1 < blocks;
      u.states = has_state;
      u.batch = t.batch;
      u.token = t.chunk.start;
      u.mapped = mapped_blocks(maps.z, maps.y, p, t.chunk, blocks);
      u.blocks = blocks;
      u.head_kv = head_kv;
      const double *gate = a.gate ? a.gate + token_row(p, u.batch, p.heads_kv, u.head_kv, u.token) : nullptr;
      u.gate = gate;
      const double g = !gate   ? 0.0
                       : kKeys ? gate[u.length - 1] - gate[min(u.row + kUnitRows, u.length) - 1]
                               : gate[u.row];
      u.state_factor = exp2f(static_cast<float>(g) * kLog2e);
    }
    __syncwarp();
    if (!kKeys) {
      const int64_t row = token_row(p, u.batch, p.heads_q, u.head, u.token) + u.row;
#pragma unroll 1
      for (int i = lane(); i < kUnitRows; i += 32) {
        const bool in = u.row + i < u.length;
        u.r[i] = in && a.r ? a.r[row + i] : 1.f;
        u.delta[i] = in && a.delta ? a.delta[row + i] : 0.f;
      }
    }
    if (maps.x.tiled && maps.u.tiled) {  // rows behind the chunk's end are nobody's
      if (lane() == 0) {
        barrier_expect_only(s.rows_full, 4 * kTile);
#pragma unroll 1
        for (int m = 0; m < 2; ++m) {
          const int token = static_cast<int>(u.token) + u.row + m * 64;
          fetch_tile<kDim>(s.rows + m * kTile, maps.x, u.batch, u.head, token, s.rows_full);
          fetch_tile<kDim>(s.rows + (2 + m) * kTile, maps.u, u.batch, u.head, token, s.rows_full);
        }
      }
      hand_over(s.rows_full);
    } else {
#pragma unroll 1
      for (int n = 0; n < 4; ++n) {  // x: two tiles, u: two tiles
        const Tensor &x = n < 2 ? a.x : a.u;
        const int row = u.row + (n & 1) * 64;
        load_tile<T, kDim, 32>(s.rows + n * kTile, x, row_pointer<T>(x, u.batch, u.head, u.token + row),
                               u.length - row, lane());
      }
      hand_over_copies(s.rows_full);
    }

    if (has_state) {
      if (lane() == 0) {
        const int64_t slot = int64_t(t.chunk_index) * p.heads_kv + head_kv;
        if (kDegree == 2 && a.norm) {
          const char *norm = static_cast<const char *>(a.norm) + slot * (L::kNormStages * kStage);
#pragma unroll
          for (int i = 0; i < L::kNormStages; ++i) bulk_stage(norm + i * kStage, kStage);
        }
        const char *state = static_cast<const char *>(a.state) + slot * (kStateTiles * kTile);
#pragma unroll 1
        for (int i = 0; i < (kStateTiles + 1) / 2; ++i, state += kStage)
          bulk_stage(state, kStateTiles == 1 ? kTile : kStage);
      } else {
        at.turn += (kStateTiles + 1) / 2 + (kDegree == 2 && a.norm ? L::kNormStages : 0);
      }
      __syncwarp();
    }
    const auto fetch_columns = [&](int head, int block) {  // one thread
      const uint32_t stage = s.ring + at.stage() * kStage, bar = s.full + 8 * at.stage();
      const int token = static_cast<int>(u.token) + block * 64, batch = u.batch;
      barrier_expect_only(bar, kStage);
      fetch_tile<kDim>(stage, maps.z, batch, head, token, bar);
      fetch_tile<kDim>(stage + kTile, maps.y, batch, head, token, bar);
    };
    const auto load_columns = [&](int head, int block) {  // all
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const Tensor &x = n ? a.y : a.z;
        load_tile<T, kDim, 32>(s.ring + at.stage() * kStage + n * kTile, x,
                               row_pointer<T>(x, u.batch, head, u.token + block * 64), u.length - block * 64,
                               lane());
      }
    };
    if constexpr (kKeys) {
      // Later blocks, head by head of the group; then the tile's second block, then its first, for all heads.
      const auto load = [&](int head, int block) {
        return load_query_meta(a, u.gate, token_row(p, u.batch, p.heads_q, head, u.token), block, u.row / 64,
                               u.length, lane());
      };
      int head = u.head * p.group, block = min(u.row / 64 + 2, u.blocks - 1);
      float advance = 1.f;
      if (const double *gate = u.gate; gate && u.row / 64 + 1 < u.blocks && lane() == 0)
        advance =
            exp2_fast(static_cast<float>(gate[min(u.row + 127, u.length - 1)] - gate[u.row + 63]) * kLog2e);
      QueryMeta q = load(head, block);
#pragma unroll 1
      for (;;) {
        barrier_wait(s.empty + 8 * at.stage(), at.phase() ^ 1);
        const bool mapped = block < u.mapped;
        if (mapped && lane() == 0) fetch_columns(head, block);
        write_query_meta(s.meta + at.stage() * kMeta, q, a.scale_p, block, u.row / 64, u.length, lane());
        if (lane() == 0) store_f1(s.meta + at.stage() * kMeta + kAdvance, advance);
        if (mapped) {
          hand_over(s.full + 8 * at.stage());
        } else {
          load_columns(head, block);
          hand_over_copies(s.full + 8 * at.stage());
        }
        ++at.turn;
        const int first = u.row / 64;
        const bool later = block > first + 1;
        if (!later || ++block == u.blocks) {
          const bool last = ++head == (u.head + 1) * p.group;
          if (last) head = u.head * p.group;
          if (later)
            block = last ? first + 1 : first + 2;
          else if (last && --block < first)
            break;
        }
        q = load(head, block);
      }
    } else {
      const auto gates_of = [&](int block) {
        return load_key_gates(u.gate, block, u.row / 64, u.length, lane());
      };
      const auto blocks = [&] { return min(u.row / 64 + 2, u.blocks); };
      KeyGates gates = gates_of(0);
      int block = 0;
#pragma unroll 1
      for (; block < min(blocks(), u.mapped); ++block, ++at.turn) {
        barrier_wait(s.empty + 8 * at.stage(), at.phase() ^ 1);
        if (lane() == 0) fetch_columns(u.head_kv, block);
        write_key_meta(s.meta + at.stage() * kMeta, gates, block, u.length, lane(), kAdvance);
        hand_over(s.full + 8 * at.stage());
        if (block + 1 < u.mapped) gates = gates_of(block + 1);
      }
#pragma unroll 1
      for (; block < blocks(); ++block, ++at.turn) {
        barrier_wait(s.empty + 8 * at.stage(), at.phase() ^ 1);
        load_columns(u.head_kv, block);
        write_key_meta(s.meta + at.stage() * kMeta, gates_of(block), block, u.length, lane(), kAdvance);
        hand_over_copies(s.full + 8 * at.stage());
      }
    }
  }
  barrier_wait(s.rows_empty, at.unit());
  if (lane() == 0) slots[at.unit() ^ 1].head = -1;
  hand_over(s.rows_full);
}

}  // namespace powerattn::cuda::sm90
