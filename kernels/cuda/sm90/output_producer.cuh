// SPDX-License-Identifier: Apache-2.0
// The producer warp of the forward `output` kernels: q of a unit of 256 rows, then the state's tiles, then keys
// and values by 64 with the gate factors of the keys. One lane starts the copies; all write the factors.
#pragma once

#include "output.cuh"

namespace powerattn::cuda::sm90 {

constexpr int kConsumerWarps = 8;
constexpr int kProducerWarp = 8;  // the first of the third warpgroup; its other warps have nothing to do
// Registers a thread: 2 x 240 + 24 = 504 = 3 x 168, those that the block was launched with. More would wait
// forever.
constexpr int kOutputConsumerRegisters = 240, kOutputProducerRegisters = 24;

// Tensor maps of what the kernels read.
struct OutputMaps {
  TileMap q, k, v;
};
inline cudaError_t output_maps(const OutputArgs &a, OutputMaps *maps) {
  cudaError_t error = tile_map(a.q, a.p, a.p.heads_q, &maps->q);
  if (error == cudaSuccess) error = tile_map(a.k, a.p, a.p.heads_kv, &maps->k);
  if (error == cudaSuccess) error = tile_map(a.v, a.p, a.p.heads_kv, &maps->v);
  return error;
}

template <int kDim>
struct OutputLayout {
  static constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
  static constexpr int kStage = 2 * kTile;     // two state tiles, or 64 keys and values
  static constexpr int kStages = kDim == 64 ? 8 : 4;
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
  uint32_t q, ring, staging, meta, full, empty, q_full, q_empty, unit;
  __device__ explicit OutputSmem(uint32_t base) {
    q = (base + 1023) & ~1023u;
    ring = q + kRowTiles * L::kTile;
    staging = ring + L::kStages * L::kStage;
    meta = staging + kConsumerWarps * 2048;
    full = meta + L::kStages * kMetaBytes;
    empty = full + 8 * L::kStages;
    q_full = empty + 8 * L::kStages;
    q_empty = q_full + 8;
    unit = q_empty + 8;
  }
};

// How many of `blocks` blocks of 64 rows of a chunk two tensors' maps can load: not those where the rows behind
// the chunk's end are another sequence's, or another chunk's, which could hold NaN. Behind the tensor's end
// there are zeros.
__device__ __forceinline__ int mapped_blocks(const TileMap &x, const TileMap &y, const Shape &p, const Chunk &c,
                                             int blocks) {
  if (!x.tiled || !y.tiled) return 0;
  return c.start + c.length < p.tokens ? min(blocks, c.length / 64) : blocks;
}

template <typename T, int kDegree, int kDim>
__device__ __forceinline__ void produce_output(const OutputArgs &a, const OutputMaps &maps,
                                               const OutputSmem<kDim> &s, UnitMeta *slots) {
  using L = OutputLayout<kDim>;
  constexpr int kTile = L::kTile, kStage = L::kStage, kStages = L::kStages;
  constexpr int kStateTiles = tile_count(kDegree == 1 ? 1 : 2, kDim);
  const Shape &p = a.p;
  Turns<kStages> at{1u << 31};  // unit(): the parity that `q_empty` has, and the slot in use, inverted
  const auto lane = [] { return thread_here() & 31; };
  // Every barrier that consumers wait for counts one arrival: lane 0's, when all lanes have done their part. (A
  // lane that waits for a barrier must not be able to miss a whole turn of it: these lanes meet between turns.)
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
    if (ticket >= p.table.num_tiles * p.heads_q) break;
    const RowTile t = row_tile_at(p, ticket, p.heads_q);
    if (t.row >= t.chunk.length) continue;

    barrier_wait(s.q_empty, at.unit());
    at.next_unit();
    volatile UnitMeta &u = slots[at.unit()];
    const int head_kv = t.head / p.group;
    const bool has_state = a.state && (t.chunk.index > 0 || a.first_has_state);
    if (lane() == 0) {
      const int blocks = min(t.row / kKeys + kRowTiles, (t.chunk.length + kKeys - 1) / kKeys);
      u.head = t.head;
      u.row = t.row;
      u.length = t.chunk.length;
      u.blocks = blocks;
      u.states = has_state;
      u.batch = t.batch;
      u.token = t.chunk.start;
      u.mapped = mapped_blocks(maps.k, maps.v, p, t.chunk, blocks);
      u.head_kv = head_kv;
      const double *gate = a.gate ? a.gate + token_row(p, u.batch, p.heads_kv, u.head_kv, u.token) : nullptr;
      u.gate = gate;
      u.state_factor = gate ? exp2f(static_cast<float>(gate[u.row]) * kLog2e) : 1.f;
    }
    __syncwarp();
    if (maps.q.tiled) {  // rows behind the chunk's end are nobody's: each row of the products stays its own
      if (lane() == 0) {
        barrier_expect_only(s.q_full, kRowTiles * kTile);
#pragma unroll 1
        for (int m = 0; m < kRowTiles; ++m)
          fetch_tile<kDim>(s.q + m * kTile, maps.q, u.batch, u.head, static_cast<int>(u.token) + u.row + m * 64,
                           s.q_full);
      }
      hand_over(s.q_full);
    } else {
#pragma unroll 1
      for (int m = 0; m < kRowTiles; ++m) {
        const int row = u.row + m * 64;
        load_tile<T, kDim, 32>(s.q + m * kTile, a.q, row_pointer<T>(a.q, u.batch, u.head, u.token + row),
                               u.length - row, lane());
      }
      hand_over_copies(s.q_full);
    }

    if (has_state) {
      if (lane() == 0) {
        const int64_t slot = int64_t(t.chunk_index) * p.heads_kv + head_kv;
        const auto load_norm = [&] {
          const char *norm = static_cast<const char *>(a.norm) + slot * (L::kNormStages * kStage);
#pragma unroll
          for (int i = 0; i < L::kNormStages; ++i) bulk_stage(norm + i * kStage, kStage);
        };
        if (L::kNormFirst && kDegree == 2 && a.norm) load_norm();
        const char *state = static_cast<const char *>(a.state) + slot * (kStateTiles * kTile);
#pragma unroll 1
        for (int i = 0; i < (kStateTiles + 1) / 2; ++i, state += kStage)
          bulk_stage(state, kStateTiles == 1 ? kTile : kStage);
        if (!L::kNormFirst && kDegree == 2 && a.norm) load_norm();
      } else {
        at.turn += (kStateTiles + 1) / 2 + (kDegree == 2 && a.norm ? L::kNormStages : 0);
      }
      __syncwarp();
    }
    // By tensor maps; the gates are loaded a block ahead.
    const auto gates_of = [&](int j) { return load_key_gates(u.gate, j, u.row / kKeys, u.length, lane()); };
    KeyGates gates = gates_of(0);
    int j = 0;
#pragma unroll 1
    for (; j < u.mapped; ++j, ++at.turn) {
      barrier_wait(s.empty + 8 * at.stage(), at.phase() ^ 1);
      const uint32_t stage = s.ring + at.stage() * kStage, bar = s.full + 8 * at.stage();
      if (lane() == 0) {
        const int token = static_cast<int>(u.token) + j * kKeys, head = u.head_kv, batch = u.batch;
        barrier_expect_only(bar, kStage);
        fetch_tile<kDim>(stage, maps.k, batch, head, token, bar);
        fetch_tile<kDim>(stage + kTile, maps.v, batch, head, token, bar);
      }
      write_key_meta(s.meta + at.stage() * kMetaBytes, gates, j, u.length, lane());
      hand_over(bar);
      if (j + 1 < u.mapped) gates = gates_of(j + 1);
    }
    // The others by threads.
#pragma unroll 1
    for (; j < u.blocks; ++j, ++at.turn) {
      barrier_wait(s.empty + 8 * at.stage(), at.phase() ^ 1);
      const uint32_t stage = s.ring + at.stage() * kStage;
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const Tensor &x = n ? a.v : a.k;
        load_tile<T, kDim, 32>(stage + n * kTile, x, row_pointer<T>(x, u.batch, u.head_kv, u.token + j * kKeys),
                               u.length - j * kKeys, lane());
      }
      write_key_meta(s.meta + at.stage() * kMetaBytes, gates_of(j), j, u.length, lane());
      hand_over_copies(s.full + 8 * at.stage());
    }
  }
  barrier_wait(s.q_empty, at.unit());
  if (lane() == 0) slots[at.unit() ^ 1].head = -1;
  hand_over(s.q_full);
}

}  // namespace powerattn::cuda::sm90
