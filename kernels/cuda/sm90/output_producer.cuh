// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup of the forward `output` kernels: q of a unit of 256 rows, then the state's tiles, then
// keys and values by 64 with the gate factors of the keys.
#pragma once

#include "output.cuh"

namespace powerattn::cuda::sm90 {

constexpr int kConsumerWarps = 8;

template <int kDim>
struct OutputLayout {
  static constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
  static constexpr int kStage = 2 * kTile;     // two state tiles, or 64 keys and values
  static constexpr int kStages = kDim == 64 ? 8 : 4;
  static constexpr int kAhead = kDim == 64 ? 3 : 1;  // stages in flight behind the one being handed over
  static constexpr int kNormStages = 4 * kDim * kDim / kStage;  // Z in two parts
  static constexpr bool kNormFirst = kDim == 128;
  // Shared memory, d = 64 (128): 1024 (alignment) + q 4 x 8 KB (16) + ring 8 x 16 KB (4 x 32) + y staging 8
  // warps x 2 KB + ring meta 8 (4) x 768 + barriers and unit: 181 KB (213) of 227 KB.
  static constexpr int kSmem =
      1024 + kRowTiles * kTile + kStages * kStage + kConsumerWarps * 2048 + kStages * kMetaBytes + 512;
};

template <int kDim>
struct OutputSmem {
  using L = OutputLayout<kDim>;
  uint32_t q, ring, staging, meta, full, empty, q_full, q_empty, unit, ticket;
  __device__ explicit OutputSmem(uint32_t base) {
    q = (base + 1023) & ~1023u;
    ring = q + kRowTiles * L::kTile;
    staging = ring + L::kStages * L::kStage;
    meta = staging + kConsumerWarps * 2048;
    full = meta + L::kStages * kMetaBytes;
    empty = full + 8 * L::kStages;
    q_full = empty + 8 * L::kStages;
    q_empty = q_full + 8;
    ticket = q_empty + 8;
    unit = ticket + 8;
  }
};

template <typename T, int kDegree, int kDim>
__device__ __forceinline__ void produce_output(const OutputArgs &a, const OutputSmem<kDim> &s, UnitMeta *slots,
                                               int tid) {
  using L = OutputLayout<kDim>;
  constexpr int kTile = L::kTile, kStage = L::kStage, kStages = L::kStages, kAhead = L::kAhead;
  constexpr int kStateTiles = tile_count(kDegree == 1 ? 1 : 2, kDim);
  const Shape &p = a.p;
  const int64_t units = p.table.num_tiles * p.heads_q;
  Ring<kStages> ring;
  uint32_t q_phase = 1;  // also the unit slot to write, inverted
  Tickets tickets{s.ticket};
  // Each thread waits for its own copies and orders them before the tensor cores' reads, so the consumers need
  // no fence; the copies of the next kAhead stages stay in flight meanwhile.
  Ring<kStages> oldest;  // first stage not handed over
  const auto hand_over = [&](uint32_t bar) {
    fence_async_proxy();
    __syncwarp();
    if (tid % 32 == 0) barrier_arrive(bar);
  };
  // Bulk copies are one thread's work; the others meet it at a barrier behind the last one. (If all waited for
  // every stage, a slow thread could miss a whole turn of the ring, since nothing in these stages waits for
  // it.)
  const auto bulk_stage = [&](const void *src, uint32_t bytes) {
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
    const RowTile t = row_tile_at(p, u, p.heads_q);
    const Chunk &c = t.chunk;
    if (t.row >= c.length) continue;
    const int head_kv = t.head / p.group;
    const double *gate = a.gate ? a.gate + token_row(p, t.batch, p.heads_kv, head_kv, c.start) : nullptr;
    const bool has_state = a.state && (c.index > 0 || a.first_has_state);
    const int first = t.row / kKeys;
    const int blocks = min(first + kRowTiles, (c.length + kKeys - 1) / kKeys);

    barrier_wait(s.q_empty, q_phase);
    q_phase ^= 1;
    const T *q = row_pointer<T>(a.q, t.batch, t.head, c.start + t.row);
#pragma unroll 1
    for (int m = 0; m < kRowTiles; ++m)
      load_tile<T, kDim>(s.q + m * kTile, a.q, q + m * 64 * a.q.stride_t, c.length - t.row - m * 64, tid);
    if (tid == 0) {
      UnitMeta *um = slots + q_phase;  // flipped above: 0 first
      um->head = t.head;
      um->row = t.row;
      um->length = c.length;
      um->blocks = blocks;
      um->states = has_state;
      um->batch = t.batch;
      um->token = c.start;
      um->state_factor = gate ? exp2f(static_cast<float>(gate[t.row]) * kLog2e) : 1.f;
    }
    copy_commit();
    copy_wait<0>();
    hand_over(s.q_full);

    if (has_state) {
      const int64_t slot = int64_t(t.chunk_index) * p.heads_kv + head_kv;
      const char *state = static_cast<const char *>(a.state) + slot * (kStateTiles * kTile);
      constexpr int kStateStages = (kStateTiles + 1) / 2;
      const int bulk = kStateStages + (kDegree == 2 && a.norm ? L::kNormStages : 0);
      const auto load_norm = [&] {
        const char *norm = static_cast<const char *>(a.norm) + slot * (L::kNormStages * kStage);
#pragma unroll
        for (int i = 0; i < L::kNormStages; ++i) bulk_stage(norm + i * kStage, kStage);
      };
      if (tid == 0) {
        if (L::kNormFirst && kDegree == 2 && a.norm) load_norm();
#pragma unroll 1
        for (int i = 0; i < kStateStages; ++i)
          bulk_stage(state + i * kStage, kStateTiles == 1 ? kTile : kStage);
        if (!L::kNormFirst && kDegree == 2 && a.norm) load_norm();
      } else {
        ring.skip(bulk);
      }
      __syncwarp();
      named_barrier<2, 128>();
    }
    const T *k = row_pointer<T>(a.k, t.batch, head_kv, c.start),
            *v = row_pointer<T>(a.v, t.batch, head_kv, c.start);
    // A block of d = 128 takes long enough to load its gates when it comes.
    constexpr bool kEarly = kDim == 64;
    KeyGates gates;
    if constexpr (kEarly) gates = load_key_gates(gate, 0, first, c.length, tid);
    oldest = ring;
#pragma unroll 1
    for (int j = 0; j < blocks; ++j) {
      barrier_wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
      const uint32_t stage = s.ring + ring.stage * kStage;
      load_tile<T, kDim>(stage, a.k, k + int64_t(j) * kKeys * a.k.stride_t, c.length - j * kKeys, tid);
      load_tile<T, kDim>(stage + kTile, a.v, v + int64_t(j) * kKeys * a.v.stride_t, c.length - j * kKeys, tid);
      const KeyGates here = kEarly ? gates : load_key_gates(gate, j, first, c.length, tid);
      if (kEarly && j + 1 < blocks) gates = load_key_gates(gate, j + 1, first, c.length, tid);
      write_key_meta(s.meta + ring.stage * kMetaBytes, here, j, c.length, tid);
      copy_commit();
      ring.next();
      if (j >= kAhead) {
        copy_wait<kAhead>();
        hand_over(s.full + 8 * oldest.stage);
        oldest.next();
      }
    }
    copy_wait<0>();
#pragma unroll 1
    for (int j = min(kAhead, blocks); j > 0; --j) {
      hand_over(s.full + 8 * oldest.stage);
      oldest.next();
    }
  }
  barrier_wait(s.q_empty, q_phase);
  if (tid == 0) slots[q_phase ^ 1].head = -1;
  hand_over(s.q_full);
}

}  // namespace powerattn::cuda::sm90
