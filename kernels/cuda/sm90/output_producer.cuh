// SPDX-License-Identifier: Apache-2.0
// The producers of the forward `output` kernels: q of a unit of 256 rows, then the state's tiles, then keys and
// values by 64 with the gate factors of the keys. Four warps take the stages in turn; of each, one lane starts
// the copies and all write the factors.
#pragma once

#include "output.cuh"

namespace powerattn::cuda::sm90 {

constexpr int kConsumerWarps = 8;
constexpr int kProducers = 4;  // warps of the third warpgroup: each has every fourth stage of the ring
// Registers a thread: 2 x 240 + 24 = 504 = 3 x 168, those that the block was launched with. More would wait
// forever.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

// Tensor maps of what the kernels read, and of y.
struct OutputMaps {
  TileMap q, k, v, y;
};
inline cudaError_t output_maps(const OutputArgs &a, OutputMaps *maps) {
  cudaError_t error = tile_map(a.q, a.p, a.p.heads_q, &maps->q);
  if (error == cudaSuccess) error = tile_map(a.k, a.p, a.p.heads_kv, &maps->k);
  if (error == cudaSuccess) error = tile_map(a.v, a.p, a.p.heads_kv, &maps->v);
  if (error == cudaSuccess) error = result_map(a.y, a.p, a.p.heads_q, &maps->y);
  return error;
}

template <int kDim>
struct OutputLayout {
  static constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
  static constexpr int kStage = 2 * kTile;     // two state tiles, or 64 keys and values
  static constexpr int kStages = kDim == 64 ? 8 : 4;
  static constexpr int kNormStages = 4 * kDim * kDim / kStage;  // Z in two parts
  static constexpr bool kNormFirst = kDim == 128;
  // d = 128 keeps q in shared memory, and each warpgroup gives its half back by itself: one begins with the
  // next unit while the other ends this one.
  static constexpr int kQueryParts = kDim == 64 ? 1 : 2;
  // Shared memory, d = 64 (128): 1024 (alignment) + q 4 x 8 KB (16) + ring 8 x 16 KB (4 x 32) + y staging 8
  // warps x 2 KB + powers of rows 8 x 128 + ring meta 8 (4) x 768 + barriers and unit: 182 KB (214) of 227 KB.
  static constexpr int kSmem =
      1024 + kRowTiles * kTile + kStages * kStage + kConsumerWarps * (2048 + 128) + kStages * kMetaBytes + 512;
};

template <int kDim>
struct OutputSmem {
  using L = OutputLayout<kDim>;
  uint32_t q, ring, staging, powers, meta, full, empty, q_full, q_empty, unit;
  __device__ explicit OutputSmem(uint32_t base) {
    q = (base + 1023) & ~1023u;
    ring = q + kRowTiles * L::kTile;
    staging = ring + L::kStages * L::kStage;
    powers = staging + kConsumerWarps * 2048;  // float16: of each warp's 16 rows of its two row tiles
    meta = powers + kConsumerWarps * 128;
    full = meta + L::kStages * kMetaBytes;
    empty = full + 8 * L::kStages;
    q_full = empty + 8 * L::kStages;
    q_empty = q_full + 8 * L::kQueryParts;
    unit = q_empty + 8 * L::kQueryParts;
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

// Within shared memory, by the lanes of a warp.
__device__ __forceinline__ void copy_words(volatile void *to, const volatile void *from, int words, int lane) {
#pragma unroll 1
  for (int i = lane; i < words; i += 32)
    static_cast<volatile uint32_t *>(to)[i] = static_cast<const volatile uint32_t *>(from)[i];
}

// Every barrier that consumers wait for counts one arrival of a producer warp: that of lane 0, when all its
// lanes have done their part. (A lane that waits for a barrier must not be able to miss a whole turn of it: the
// lanes of a warp meet between turns, and no other warp waits for this one's stages.)
__device__ __forceinline__ void hand_over(uint32_t bar) {
  __syncwarp();
  if ((thread_here() & 31) == 0) barrier_arrive(bar);
}
__device__ __forceinline__ void hand_over_copies(uint32_t bar) {  // of all lanes
  copy_commit();
  copy_wait<0>();
  fence_async_proxy();
  hand_over(bar);
}

template <typename T, int kDegree, int kDim>
__device__ __forceinline__ void produce_output(const OutputArgs &a, const OutputMaps &maps,
                                               const OutputSmem<kDim> &s, UnitMeta *slots) {
  using L = OutputLayout<kDim>;
  constexpr int kTile = L::kTile, kStage = L::kStage, kStages = L::kStages;
  constexpr int kStateTiles = tile_count(2, kDim), kStateStages = (kStateTiles + 1) / 2;
  static_assert(kStages % kProducers == 0);  // a stage of the ring belongs to one warp
  const Shape &p = a.p;
  Turns<kStages> at{1u << 31};  // unit(): the slot in use
  const auto lane = [] { return thread_here() & 31; };
  const auto warp = [] { return thread_here() >> 5 & (kProducers - 1); };
  for (;;) {
    // The first warp takes a unit while the consumers work on the one before, and the others begin with its
    // stages. Slots 2 and 3 are the producers' own copies of 0 and 1.
    if (warp() == 0) {
      volatile UnitMeta &next = slots[2 + (at.unit() ^ 1)];
      for (;;) {
        const int ticket = next_ticket(a.ticket, lane());
        if (ticket >= p.table.num_tiles * p.heads_q) {
          if (lane() == 0) next.head = -1;
          break;
        }
        const RowTile t = row_tile_at(p, ticket, p.heads_q, a.together);
        if (t.row >= t.chunk.length) continue;
        if (lane() == 0) {
          const int blocks = min(t.row / kKeys + kRowTiles, (t.chunk.length + kKeys - 1) / kKeys);
          next.head = t.head;
          next.row = t.row;
          next.length = t.chunk.length;
          next.blocks = blocks;
          next.states = a.state && (t.chunk.index > 0 || a.first_has_state);
          next.batch = t.batch;
          next.token = t.chunk.start;
          next.mapped = mapped_blocks(maps.k, maps.v, p, t.chunk, blocks);
          next.head_kv = t.head / p.group;
          next.state = int64_t(t.chunk_index) * p.heads_kv + next.head_kv;
          if constexpr (kCounted<T>) {
            if (next.states) {
              next.units.s = a.units[next.state].s;
              next.units.z = a.units[next.state].z;
            }
          }
          const double *gate =
              a.gate ? a.gate + token_row(p, next.batch, p.heads_kv, next.head_kv, next.token) : nullptr;
          next.gate = gate;
          next.state_factor = gate ? exp2f(static_cast<float>(gate[next.row]) * kLog2e) : 1.f;
        }
        break;
      }
    }
    // Nobody reads the slot that the first warp writes next: that is of the unit before this one.
    named_barrier<1, 32 * kProducers>();
    at.next_unit();
    const volatile UnitMeta &u = slots[2 + at.unit()];
    // It also tells the consumers, as soon as they have read the q before, and loads q.
    if (warp() == 0) {
#pragma unroll 1
      for (int part = L::kQueryParts - 1; part >= 0; --part) {
        const uint32_t full = s.q_full + 8 * part;
        barrier_wait(s.q_empty + 8 * part, at.unit() ^ 1);
        if (part == L::kQueryParts - 1) copy_words(slots + at.unit(), &u, sizeof(UnitMeta) / 4, lane());
        const auto each_tile = [&](auto load) {
#pragma unroll 1
          for (int m = 0; m < kRowTiles; ++m)
            if (L::kQueryParts == 1 || (m == 0 || m == 3) == (part == 0)) load(m, u.row + m * 64);
        };
        if (maps.q.tiled || u.head < 0) {
          // Rows behind the chunk's end are nobody's: each row of the products is its own.
          if (u.head >= 0 && lane() == 0) {
            barrier_expect_only(full, kRowTiles / L::kQueryParts * kTile);
            each_tile([&](int m, int row) {
              fetch_tile<kDim>(s.q + m * kTile, maps.q, u.batch, u.head, static_cast<int>(u.token) + row, full);
            });
          }
          hand_over(full);
        } else {
          each_tile([&](int m, int row) {
            load_tile<T, kDim, 32>(s.q + m * kTile, a.q, row_pointer<T>(a.q, u.batch, u.head, u.token + row),
                                   u.length - row, lane());
          });
          hand_over_copies(full);
        }
      }
    }
    if (u.head < 0) break;

    int n = (warp() - at.turn) & (kProducers - 1);  // this warp's next stage of the unit
    if (kDegree == 2 && u.states) {
      const int norms = a.norm ? L::kNormStages : 0, total = kStateStages + norms;
#pragma unroll 1
      for (; n < total; n += kProducers) {
        if (lane() != 0) continue;
        const int tile = L::kNormFirst ? n - norms : n;  // stage of the state; the others are Z's
        const bool z = tile < 0 || tile >= kStateStages;
        const char *src =
            z ? static_cast<const char *>(a.norm) +
                    (u.state * L::kNormStages + (L::kNormFirst ? n : n - kStateStages)) * kStage
              : static_cast<const char *>(a.state) + u.state * (kStateTiles * kTile) + tile * kStage;
        const uint32_t bar = s.full + 8 * at.stage(n);
        barrier_wait(s.empty + 8 * at.stage(n), at.phase(n) ^ 1);
        barrier_expect(bar, kStage);
        bulk_load(s.ring + at.stage(n) * kStage, src, kStage, bar);
      }
      __syncwarp();
      at.turn += total;
      n -= total;
    }
    // Keys and values: by tensor maps, with the gates loaded a block ahead (of d = 64, whose blocks are short);
    constexpr bool kEarly = kDim == 64;
    const auto gates_of = [&](int j) { return load_key_gates(u.gate, j, u.row / kKeys, u.length, lane()); };
    KeyGates gates;
    if constexpr (kEarly) gates = gates_of(n);
#pragma unroll 1
    for (; n < u.mapped; n += kProducers) {
      barrier_wait(s.empty + 8 * at.stage(n), at.phase(n) ^ 1);
      const uint32_t stage = s.ring + at.stage(n) * kStage, bar = s.full + 8 * at.stage(n);
      if (lane() == 0) {
        const int token = static_cast<int>(u.token) + n * kKeys, head = u.head_kv, batch = u.batch;
        barrier_expect_only(bar, kStage);
        fetch_tile<kDim>(stage, maps.k, batch, head, token, bar);
        fetch_tile<kDim>(stage + kTile, maps.v, batch, head, token, bar);
      }
      write_key_meta(s.meta + at.stage(n) * kMetaBytes, kEarly ? gates : gates_of(n), n, u.length, lane());
      hand_over(bar);
      if (kEarly && n + kProducers < u.mapped) gates = gates_of(n + kProducers);
    }
    // the others by threads.
#pragma unroll 1
    for (; n < u.blocks; n += kProducers) {
      barrier_wait(s.empty + 8 * at.stage(n), at.phase(n) ^ 1);
#pragma unroll 1
      for (int m = 0; m < 2; ++m) {
        const Tensor &x = m ? a.v : a.k;
        load_tile<T, kDim, 32>(s.ring + at.stage(n) * kStage + m * kTile, x,
                               row_pointer<T>(x, u.batch, u.head_kv, u.token + n * kKeys), u.length - n * kKeys,
                               lane());
      }
      write_key_meta(s.meta + at.stage(n) * kMetaBytes, gates_of(n), n, u.length, lane());
      hand_over_copies(s.full + 8 * at.stage(n));
    }
    at.turn += u.blocks;
  }
}

// Launches the kernel of a head size for a degree. Kernels: `kernel<T, degree>()`, and its kShared bytes of
// shared memory.
template <class Kernels, typename T, int kDegree>
cudaError_t launch_output(OutputArgs a, int sms, cudaStream_t stream) {
  OutputMaps maps;
  const cudaError_t error = output_maps(a, &maps);
  if (error != cudaSuccess) return error;
  a.together = rows_together(a.p, false);
  return launch_early(Kernels::template kernel<T, kDegree>(), sms, 384, Kernels::kShared, stream, a, maps);
}
template <class Kernels, typename T>
cudaError_t launch_output(const OutputArgs &a, int sms, cudaStream_t stream) {
  if (a.state != nullptr && a.p.degree != 2) return cudaErrorInvalidValue;
  switch (a.p.degree) {
    case 1:
      return launch_output<Kernels, T, 1>(a, sms, stream);
    case 2:
      return launch_output<Kernels, T, 2>(a, sms, stream);
    case 4:
      return launch_output<Kernels, T, 4>(a, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
template <class Kernels>
cudaError_t launch_output(const OutputArgs &a, int sms, cudaStream_t stream) {
  return a.p.half ? launch_output<Kernels, __half>(a, sms, stream)
                  : launch_output<Kernels, __nv_bfloat16>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
