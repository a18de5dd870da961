// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup of the gradient kernels: x and u of a unit of 128 rows, then the state's tiles, then
// the columns z and y by 64 with their factors.
#pragma once

#include "gradient.cuh"
#include "output_producer.cuh"

namespace powerattn::cuda::sm90 {

template <int kDim>
struct GradientLayout {
  static constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
  static constexpr int kStage = 2 * kTile;     // two state tiles, or 64 columns of z and y
  static constexpr int kStages = kDim == 64 ? 8 : 4;
  static constexpr int kAhead = kDim == 64 ? 3 : 1;  // stages in flight behind the one being handed over
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
  uint32_t rows, ring, staging, meta, unit, full, empty, rows_full, rows_empty, ticket;
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
    ticket = rows_empty + 8;
  }
};

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

template <typename T, int kDegree, bool kKeys, int kDim>
__device__ __forceinline__ void produce_gradient(const GradientArgs &a, const GradientSmem<kDim> &s,
                                                 GradientUnit *slots, int tid) {
  using L = GradientLayout<kDim>;
  constexpr int kTile = L::kTile, kStage = L::kStage, kStages = L::kStages, kAhead = L::kAhead;
  constexpr int kStateTiles = tile_count(kDegree == 1 ? 1 : 2, kDim);
  const Shape &p = a.p;
  const int heads = kKeys ? p.heads_kv : p.heads_q;
  const int64_t units = p.table.num_tiles * heads * 2;
  Ring<kStages> ring;
  uint32_t phase = 1;
  Tickets tickets{s.ticket};
  Ring<kStages> oldest;  // first stage not handed over, as in output_producer.cuh
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
  const auto bulk_stage = [&](const void *src,
                              uint32_t bytes) {  // one thread's work, as in output_producer.cuh
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
      load_tile<T, kDim>(s.rows + m * kTile, a.x, x + m * 64 * a.x.stride_t, c.length - t.row - m * 64, tid);
      load_tile<T, kDim>(s.rows + (2 + m) * kTile, a.u, uu + m * 64 * a.u.stride_t, c.length - t.row - m * 64,
                         tid);
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
        if (kDegree == 2 && a.norm) {
          const char *norm = static_cast<const char *>(a.norm) + slot * (L::kNormStages * kStage);
#pragma unroll
          for (int i = 0; i < L::kNormStages; ++i) bulk_stage(norm + i * kStage, kStage);
        }
#pragma unroll 1
        for (int i = 0; i < (kStateTiles + 1) / 2; ++i)
          bulk_stage(state + i * kStage, kStateTiles == 1 ? kTile : kStage);
      } else {
        ring.skip((kStateTiles + 1) / 2 + (kDegree == 2 && a.norm ? L::kNormStages : 0));
      }
      __syncwarp();
      named_barrier<2, 128>();
    }
    oldest = ring;
    const auto load_columns = [&](int head, int block) {
      const uint32_t stage = s.ring + ring.stage * kStage;
      const int64_t token = c.start + int64_t(block) * 64;
      load_tile<T, kDim>(stage, a.z, row_pointer<T>(a.z, t.batch, head, token), c.length - block * 64, tid);
      load_tile<T, kDim>(stage + kTile, a.y, row_pointer<T>(a.y, t.batch, head, token), c.length - block * 64,
                         tid);
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

}  // namespace powerattn::cuda::sm90
