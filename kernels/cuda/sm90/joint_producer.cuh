// SPDX-License-Identifier: Apache-2.0
// What feeds the joint gradient kernel: two producer warps load a unit's keys and values, then queries and dy
// by 64 with their factors.
#pragma once

#include <algorithm>

#include "joint_adder.cuh"

namespace powerattn::cuda::sm90 {

namespace joint {

// As many sequences and heads at a time as leave their sums in the L2 cache, which they share with the queries
// of the same: 8 MB of it. With long sequences one or two more, for there have to be units for all
// multiprocessors, but up to 12 MB (measured from 4 to 32 MB: docs/performance-log.md).
inline JointArgs in_groups(JointArgs a, int sms) {
  a.blocks = static_cast<uint32_t>(a.p.table.num_tiles * (kOutputRows / kJointRows) /
                                   (a.p.packed ? 1 : a.p.table.num_sequences));
  const int64_t blocks = std::max<int64_t>(a.blocks, 1),
                bytes = blocks * kJointRows * a.p.head_dim * 4 * a.p.group,
                enough = (sms + sms / 4 + blocks - 1) / blocks, wanted = std::max(enough, kSumsInCache / bytes),
                most = std::max<int64_t>(kMostInCache / bytes, 1);
  a.together = static_cast<uint32_t>(std::min({wanted, most, int64_t(1024)}));
  return a;
}

// Unit `u` of blocks * heads. A block adds its dq behind the blocks after it in the sequence, which so have to
// be handed out before; and well before, since whoever takes one may still be busy: the sequences and heads are
// dealt with `together` at a time, last blocks first.
template <typename T>
__device__ __forceinline__ bool take(Unit &x, const JointArgs &a, const Maps &maps, uint32_t u) {
  const Shape &p = a.p;
  const uint32_t heads = static_cast<uint32_t>(p.heads_kv), all = p.packed ? 1u : p.table.num_sequences,
                 span = a.together * a.blocks, group = u / span, first = group * a.together,
                 rest = u - group * span, lanes = min(a.together, all * heads - first), turn = rest / lanes,
                 lane = first + (rest - turn * lanes), sequence = lane / heads, block = a.blocks - 1 - turn;
  int row = static_cast<int>(block) * kJointRows, chunk = static_cast<int>(sequence);
  x.batch = static_cast<int32_t>(sequence);
  if (p.packed) {  // blocks of all sequences
    const Tile t = p.table.tiles[block / 2];
    row = t.offset + static_cast<int>(block & 1) * kJointRows;
    chunk = t.length == 0 ? -1 : t.chunk;
    x.batch = 0;
  }
  if (chunk < 0) return false;
  const Chunk c = p.table.chunks[chunk];
  if (row >= c.length) return false;
  x.head = static_cast<int32_t>(lane - sequence * heads);
  x.row = row;
  x.length = c.length;
  x.pairs = (c.length - row + kJointRows - 1) / kJointRows;
  x.token = c.start;
  x.mapped = min(mapped_blocks(maps.q, maps.dy, p, c, (c.length + 63) / 64),
                 mapped_blocks(maps.k, maps.v, p, c, (c.length + 63) / 64));
  x.slot = int64_t(sequence * a.blocks + block) * p.heads_q + x.head * p.group;
  x.gate = a.gate ? a.gate + token_row(p, x.batch, p.heads_kv, x.head, c.start) : nullptr;
  const Lifts lifts = lifts_of<T>(p, a.limits, int64_t(chunk) * p.heads_kv + x.head);
  x.lift = lifts.weight;
  x.ratio = lifts.ratio;
  return true;
}

// Factors of queries `lane` and `lane` + 32 of block `block`, loaded before the stage is free:
//   the unit's own:  f_i = c r_i,                        gate = (G_i - G_start) log2(e)
//   later ones:      f_i = c r_i exp(G_i - G_end) <= c r_i
// Behind the sequence they give every key the weight 0.
struct QueryFactors {
  float factor[2], gate[2], delta[2];
};
__device__ __forceinline__ QueryFactors load_factors(const JointArgs &a, const volatile Unit &u, int block,
                                                     int head, int lane) {
  QueryFactors x;
  const int64_t row = token_row(a.p, u.batch, a.p.heads_q, head, u.token);
  const double *const gate = u.gate;
  const int from = block * 64 < u.row + kJointRows ? u.row : u.row + kJointRows - 1;  // start, or end
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int i = block * 64 + lane + 32 * k;
    x.factor[k] = x.delta[k] = 0.f;
    x.gate[k] = -INFINITY;
    if (i < u.length) {
      x.factor[k] = a.r ? a.r[row + i] : 1.f;
      x.delta[k] = a.delta ? a.delta[row + i] : 0.f;
      x.gate[k] = gate ? static_cast<float>(__ldg(gate + i) - __ldg(gate + from)) : 0.f;
    }
  }
  return x;
}
__device__ __forceinline__ void write_factors(uint32_t meta, const QueryFactors &x, float scale, bool own,
                                              int lane) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint32_t at = meta + (lane + 32 * k) * 4;
    const float gate = x.gate[k] * kLog2e;
    store_f1(at, scale * x.factor[k] * (own ? 1.f : exp2_fast(gate)));
    store_f1(at + kQueryGate, gate);
    store_f1(at + kQueryDelta, x.delta[k]);
  }
}

// The next unit, for everyone but the consumers.
template <typename T>
__device__ __forceinline__ void post(const JointArgs &a, const Maps &maps, uint32_t posted, Unit &unit,
                                     int lane) {
  const Shape &p = a.p;
  for (;;) {
    const uint32_t ticket = static_cast<uint32_t>(next_ticket(a.ticket, lane));
    bool taken = true;
    if (lane == 0) {
      if (ticket >= static_cast<uint32_t>(p.table.num_tiles) * 2 * static_cast<uint32_t>(p.heads_kv))
        unit.head = -1;
      else
        taken = take<T>(unit, a, maps, ticket);
    }
    if (__shfl_sync(0xffffffffu, taken, 0)) break;
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(posted);
}

// Factors of its keys, four for each lane.
__device__ __forceinline__ void write_keys(Unit &unit, int lane) {
  const volatile Unit &u = unit;
  const double *const gate = u.gate;
  const int row = u.row, last = min(kJointRows, u.length - row) - 1;
  double g[kJointRows / 32];
#pragma unroll
  for (int i = 0; i < kJointRows / 32; ++i) g[i] = gate ? __ldg(gate + row + min(lane + 32 * i, last)) : 0.0;
  const double start = __shfl_sync(0xffffffffu, g[0], 0),
               end = __shfl_sync(0xffffffffu, g[kJointRows / 32 - 1], 31);
#pragma unroll
  for (int i = 0; i < kJointRows / 32; ++i) {
    const int n = lane + 32 * i;
    unit.key_factor[n] = n <= last ? exp2_fast(static_cast<float>(end - g[i]) * kLog2e) : 0.f;
    unit.key_gate[n] = static_cast<float>(g[i] - start) * kLog2e;
  }
}

// The keys and values of unit `index`, and the factors of its keys.
template <typename T, int kDim, typename F>
__device__ __forceinline__ void load_keys(const JointArgs &a, const Maps &maps, const Smem<kDim> &s, Unit &unit,
                                          uint32_t index, const F &lane) {
  using L = Layout<kDim>;
  const volatile Unit &u = unit;
  const auto bar = [&] { return s.keys_full + 8 * (index % L::kKeySlots); };
  const auto to = [&] { return s.keys + index % L::kKeySlots * (4 * L::kTile); };
  barrier_wait(s.keys_empty + 8 * (index % L::kKeySlots), (index / L::kKeySlots & 1) ^ 1);
  if (u.head < 0) {
    hand_over(bar());
    return;
  }
  const bool mapped = u.row / 64 + 2 <= u.mapped;
  if (mapped && lane() == 0) {
    barrier_expect_only(bar(), 4 * L::kTile);
#pragma unroll 1
    for (int m = 0; m < 2; ++m) {
      const int token = static_cast<int>(u.token) + u.row + m * 64;
      fetch_tile<kDim>(to() + m * L::kTile, maps.k, u.batch, u.head, token, bar());
      fetch_tile<kDim>(to() + (2 + m) * L::kTile, maps.v, u.batch, u.head, token, bar());
    }
  }
  write_keys(unit, lane());
  if (mapped) {
    hand_over(bar());
    return;
  }
#pragma unroll 1
  for (int n = 0; n < 4; ++n) {
    const Tensor &x = n < 2 ? a.k : a.v;
    const int row = u.row + (n & 1) * 64;
    load_tile<T, kDim, 32>(to() + n * L::kTile, x, row_pointer<T>(x, u.batch, u.head, u.token + row),
                           u.length - row, lane());
  }
  hand_over_copies(bar());
}

// Warp 0 also fetches the units, their keys and values. Few registers: lanes are read anew, as in
// output_producer.cuh, and what belongs to the unit lies in shared memory.
template <typename T, int kDim>
__device__ __forceinline__ void produce(const JointArgs &a, const Maps &maps, const Smem<kDim> &s, Unit *units,
                                        uint32_t warp) {
  using L = Layout<kDim>;
  constexpr int kTile = L::kTile, kStages = L::kStages;
  const auto lane = [] { return thread_here() & 31; };
  uint32_t turn = 0;   // stages of the units before
  uint32_t index = 0;  // of the next unit
  int total = 0;       // stages of the unit
  for (;;) {
    int wanted = warp == 0 ? 2 : 0;  // of the next unit: itself and its keys, its keys, nothing
#pragma unroll 1
    for (int n = static_cast<int>((warp - turn) % kWarps);; n += kWarps) {
      if (wanted == 2 && n + 1 >= total) {  // not earlier: who has the unit after it waits for its first sums
        barrier_wait(s.unit_empty + index % kUnits * 8, (index / kUnits & 1) ^ 1);
        post<T>(a, maps, s.posted + index % kUnits * 8, units[index % kUnits], lane());
        wanted = 1;
      }
      // At stage kStages + kWarps the unit's stage 0 has been released, and with it the keys of the unit
      // before.
      if (wanted == 1 && (n >= total || (L::kKeySlots > 1 && n >= kStages + kWarps))) {
        load_keys<T>(a, maps, s, units[index % kUnits], index, lane);
        wanted = 0;
      }
      if (n >= total) break;
      const volatile Unit &u = units[(index - 1) % kUnits];
      const int span = 2 * u.pairs, part = n / span, rest = n - part * span;
      const auto stage = [&] { return (turn + static_cast<uint32_t>(n)) % kStages; };
      const auto to = [&](bool dy) {
        return dy ? s.dy + stage() * kTile : s.q + (turn + static_cast<uint32_t>(n)) % L::kQueries * kTile;
      };
      const auto block = [&] { return u.row / 64 + rest; };
      const auto head = [&] { return u.head * a.p.group + part; };
      const QueryFactors x = load_factors(a, u, block(), head(), lane());
      barrier_wait(s.empty + 8 * stage(), ((turn + static_cast<uint32_t>(n)) / kStages & 1) ^ 1);
      if (block() < u.mapped && lane() == 0) {
        const int token = static_cast<int>(u.token) + block() * 64, batch = u.batch;
        const uint32_t bar = s.full + 8 * stage();
        barrier_expect_only(bar, 2 * kTile);
        fetch_tile<kDim>(to(false), maps.q, batch, head(), token, bar);
        fetch_tile<kDim>(to(true), maps.dy, batch, head(), token, bar);
      }
      write_factors(s.meta + stage() * kQueryMeta, x, kCounted<T> ? a.p.scale_p * u.lift : a.p.scale_p,
                    rest < 2, lane());
      if (block() < u.mapped) {
        hand_over(s.full + 8 * stage());
      } else {
#pragma unroll 1
        for (int m = 0; m < 2; ++m) {
          const Tensor &z = m ? a.dy : a.q;
          load_tile<T, kDim, 32>(to(m), z, row_pointer<T>(z, u.batch, head(), u.token + block() * 64),
                                 u.length - block() * 64, lane());
        }
        hand_over_copies(s.full + 8 * stage());
      }
    }
    turn += static_cast<uint32_t>(total);
    const volatile Unit &u = units[index % kUnits];
    if (warp != 0) {
      if (index > 0) hand_over(s.unit_empty + (index - 1) % kUnits * 8);
      barrier_wait(s.posted + index % kUnits * 8, index / kUnits & 1);
    }
    if (u.head < 0) break;
    total = 2 * u.pairs * a.p.group;
    ++index;
  }
}

// What the four warps beside the consumers do.
template <typename T, int kDim>
__device__ __forceinline__ void serve(const JointArgs &a, const Maps &maps, const Smem<kDim> &s, Unit *units,
                                      int tid) {
  const int warp = __shfl_sync(0xffffffffu, tid / 32 - kConsumerWarps, 0);
  if (warp < kWarps)
    produce<T, kDim>(a, maps, s, units, static_cast<uint32_t>(warp));
  else
    add_queries(a, s, units, static_cast<uint32_t>(warp - kWarps), tid % 32);
}

template <int kDim>
cudaError_t launch(void (*kernel)(JointArgs, Maps), const JointArgs &a, int sms, cudaStream_t stream) {
  if (a.p.table.num_tiles == 0) return cudaSuccess;
  Maps maps;
  const cudaError_t error = maps_of(a, &maps);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, sms, 384, Layout<kDim>::kBytes, stream, in_groups(a, sms), maps);
}

}  // namespace joint

}  // namespace powerattn::cuda::sm90
