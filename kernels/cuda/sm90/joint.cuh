// SPDX-License-Identifier: Apache-2.0
// Parts that the joint gradient kernels of both head sizes share: units, shared memory, barriers, weights.
#pragma once

#include <cstddef>

#include "gradient.cuh"
#include "output_producer.cuh"

namespace powerattn::cuda::sm90 {

namespace joint {

constexpr int kWarps = 2;        // producers
constexpr int kAdders = 2;       // warps that add dq up: pairs in turn
constexpr int kQueryMeta = 768;  // per stage: factor, log2 gate, delta of 64 queries (floats)
constexpr uint32_t kQueryGate = 256, kQueryDelta = 512;
constexpr int kPart = 64 * 64 * 4;                                  // of dq, on its way to the sums
constexpr int64_t kSumsInCache = 8 << 20, kMostInCache = 12 << 20;  // bytes of dq in work at a time
constexpr int kUnits = 4;                                           // posted ahead, and not yet finished with

// A block of 128 keys of a sequence, and the queries that see them: `pairs` times 2 x 64 of each query head of
// the group.
struct Unit {
  int32_t head, row, length, pairs;  // head < 0: no more units
  int32_t batch, mapped;
  int64_t token;
  const double *gate;
  int64_t slot;       // of the first query head's sum at the block's own queries
  float lift, ratio;  // float16: of weights; of their gradients over that
  float key_factor[kJointRows], key_gate[kJointRows];  // exp(end - G_j), 0 behind the sequence; log2 gates
};

// 128 queries whose dq is handed over: what the consumers need to finish it, and the warp that adds it up, kept
// here so that it takes no registers.
struct Pair {
  int32_t mode;            // whether dq is a part to add up, or is finished: from the sum before, or alone
  int32_t rows;            // of the sequence, from the first query on
  float factor;            // what dq lacks: p, and the lifts of float16
  int32_t with_dot;        // q . dq is wanted
  int32_t vector, floats;  // of dq, as in Tensor
  int32_t batch, head;     // query head
  int32_t token, before;   // the first query's; how many blocks of keys the sum has
  void *dq;                // of the first query, as dot is
  float *dot;              // q . dq
  int64_t stride;          // of dq
  float *sum;
  int32_t *turn;
};
constexpr int kPairs = 4;  // described: by each adder what is handed over, and what is next
constexpr int32_t kPartOnly = 0, kFinish = 1, kFinishAlone = 2;

template <int kDim>
struct Layout {
  static constexpr int kTile = 64 * kDim * 2;         // 64 rows, in halves of 64 columns
  static constexpr int kStages = kDim == 64 ? 4 : 2;  // of dy of 64 queries
  static constexpr int kQueries = kStages + 1;  // of q: dq is finished when the next queries are under way
  static constexpr int kKeySlots = kDim == 64 ? 2 : 1;  // units whose keys and values are there
  static constexpr int kHalves = kDim == 64 ? 3 : 2;    // of dS: 64 queries x 128 keys
  static constexpr int kDs = 64 * kJointRows * 2;
  // d = 64 (128): 1024 (alignment) + keys and values 2 x 32 KB (64) + q 5 x 8 KB (3 x 16) + dy 4 x 8 KB (2 x
  // 16) + dS 3 x 16 KB (2 x 16) + dq 2 x 16 KB + meta 4 (2) x 768 + units, pairs and barriers: 225 KB (216) of
  // 227.
  static constexpr int kBytes = 1024 + kKeySlots * 4 * kTile + (kQueries + kStages) * kTile + kHalves * kDs +
                                2 * kPart + kStages * kQueryMeta + kUnits * static_cast<int>(sizeof(Unit)) +
                                kPairs * static_cast<int>(sizeof(Pair)) + 256;
};

template <int kDim>
struct Smem {
  using L = Layout<kDim>;
  uint32_t keys, q, dy, ds, sums, meta, unit, pair, full, empty, posted, keys_full, keys_empty, unit_empty,
      ds_full, ds_free, sums_ready, sums_full, sums_taken;
  __device__ explicit Smem(uint32_t base) {
    keys = (base + 1023) & ~1023u;  // of each slot: k, v, two tiles each
    q = keys + L::kKeySlots * 4 * L::kTile;
    dy = q + L::kQueries * L::kTile;
    ds = dy + L::kStages * L::kTile;  // rows: queries; a tile for each warpgroup's keys
    sums = ds + L::kHalves * L::kDs;
    meta = sums + 2 * kPart;
    unit = meta + L::kStages * kQueryMeta;
    pair = unit + kUnits * sizeof(Unit);
    full = pair + kPairs * sizeof(Pair);
    empty = full + 8 * L::kStages;
    posted = empty + 8 * L::kStages;
    keys_full = posted + 8 * kUnits;
    keys_empty = keys_full + 16;
    unit_empty = keys_empty + 16;
    ds_full = unit_empty + 8 * kUnits;
    ds_free = ds_full + 8;
    sums_ready = ds_free + 8;
    sums_full = sums_ready + 16;
    sums_taken = sums_full + 32;
  }
};

struct Maps {
  TileMap q, k, v, dy, dq, dk, dv;
};
inline cudaError_t maps_of(const JointArgs &a, Maps *maps) {
  cudaError_t error = tile_map(a.q, a.p, a.p.heads_q, &maps->q);
  if (error == cudaSuccess) error = tile_map(a.k, a.p, a.p.heads_kv, &maps->k);
  if (error == cudaSuccess) error = tile_map(a.v, a.p, a.p.heads_kv, &maps->v);
  if (error == cudaSuccess) error = tile_map(a.dy, a.p, a.p.heads_q, &maps->dy);
  if (error == cudaSuccess) error = result_map(a.dq, a.p, a.p.heads_q, &maps->dq);
  if (error == cudaSuccess) error = result_map(a.dk, a.p, a.p.heads_kv, &maps->dk);
  if (error == cudaSuccess) error = result_map(a.dv, a.p, a.p.heads_kv, &maps->dv);
  return error;
}

template <int kDim>
__device__ __forceinline__ void init_barriers(const Smem<kDim> &s) {
  for (int i = 0; i < Layout<kDim>::kStages; ++i) {
    barrier_init(s.full + 8 * i, 1);
    barrier_init(s.empty + 8 * i, kConsumerWarps);
  }
  for (int i = 0; i < kUnits; ++i) {
    barrier_init(s.posted + 8 * i, 1);
    barrier_init(s.unit_empty + 8 * i, kConsumerWarps + kWarps - 1 + kAdders);
  }
  for (int i = 0; i < 2; ++i) {
    barrier_init(s.keys_full + 8 * i, 1);
    barrier_init(s.keys_empty + 8 * i, kConsumerWarps);
    for (int k = 0; k < kAdders; ++k) barrier_init(s.sums_full + 16 * i + 8 * k, kConsumerWarps / 2);
    barrier_init(s.sums_ready + 8 * i, 1);
    barrier_init(s.sums_taken + 8 * i, 1);
  }
  barrier_init(s.ds_full, kConsumerWarps);
  barrier_init(s.ds_free, kDim == 64 ? kConsumerWarps / 2 : kConsumerWarps);
  fence_barrier_init();
}

// t := w, m := e from t = s and m. This lane holds keys `key` and key + 8 of the unit and queries `col`, col +
// 1 of every 8 from `query` on. Own queries (kDiagonal): exact gates, and only visible pairs.
// float16: both lifted, the weights by the queries' factors, their gradients by `ratio` over that.
template <typename T, int kDegree, bool kDiagonal>
__device__ __forceinline__ void weigh(float (&t)[32], float (&m)[32], uint32_t meta, int key, int query,
                                      int col, const float (&keys)[2], float ratio) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const uint32_t at = meta + (n * 8 + col) * 4;
    const float2 f = load_f2(at), delta = load_f2(at + kQueryDelta);
    float2 gate = make_float2(0.f, 0.f);
    if constexpr (kDiagonal) gate = load_f2(at + kQueryGate);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float &sv = t[4 * n + 2 * h + k], &mv = m[4 * n + 2 * h + k];
        float c = k ? f.y : f.x;
        if constexpr (kDiagonal) {
          c *= exp2_fast((k ? gate.y : gate.x) - keys[h]);
          c = query + n * 8 + col + k >= key + 8 * h ? c : 0.f;
        } else {
          c *= keys[h];
        }
        const float x = power<kDegree - 1>(sv) * c;
        mv = (kCounted<T> ? x * ratio : x) * (mv - (k ? delta.y : delta.x));
        sv = x * sv;
      }
  }
}

// e into a tile [query][key]: 8 x 8 matrices (keys 0-7 and 8-15 of the warp) of queries 8 n and 8 n + 8.
__device__ __forceinline__ void store_ds(uint32_t tile, const uint32_t (&e)[4][4], int warp, int lane) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int query = n * 16 + (lane & 7) + (lane >> 4) * 8, piece = warp * 2 + ((lane >> 3) & 1);
    stmatrix4_trans(tile + query * 128 + ((piece ^ (query & 7)) << 4), e[n][0], e[n][1], e[n][2], e[n][3]);
  }
}
// A part of dq, to where a warp has 4 KB of it.
__device__ __forceinline__ void store_part(uint32_t to, const float (&dq)[32], int lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    store_u4(to + lane * 16 + i * 512,
             make_uint4(__float_as_uint(dq[4 * i]), __float_as_uint(dq[4 * i + 1]),
                        __float_as_uint(dq[4 * i + 2]), __float_as_uint(dq[4 * i + 3])));
}

// Fields of Pair: four bytes, and eight.
__device__ __forceinline__ float pair_float(uint32_t pair, size_t offset) {
  return load_f1(pair + static_cast<uint32_t>(offset));
}
__device__ __forceinline__ int64_t pair_long(uint32_t pair, size_t offset) {
  const float2 v = load_f2(pair + static_cast<uint32_t>(offset));
  return static_cast<int64_t>(uint64_t(__float_as_uint(v.y)) << 32 | __float_as_uint(v.x));
}
// One that decides what all lanes do: what is in uniform registers would leave them if that were not known.
__device__ __forceinline__ int32_t pair_choice(uint32_t pair, size_t offset) {
  return __shfl_sync(0xffffffffu, load_i1(pair + static_cast<uint32_t>(offset)), 0);
}

// This lane's part of x . g for 64 columns of a warp's 16 rows: g in registers, x rows `row` on of a tile.
template <typename T>
__device__ __forceinline__ void add_dots(float (&dot)[2], const float *g, uint32_t tile, int row, int lane) {
  const int at = row + (lane & 15), high = lane >> 4;
#pragma unroll
  for (int ks = 0; ks < 4; ++ks) {
    uint32_t x[4];
    ldmatrix4(x, tile + at * 128 + (((2 * ks + high) ^ (at & 7)) << 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows lane / 4 + 8 (i & 1), columns 16 ks + 8 (i / 2) + 2 (lane % 4)
      const float2 v = unpack2<T>(x[i]);
      const int c = 4 * (2 * ks + i / 2) + 2 * (i & 1);
      dot[i & 1] += g[c] * v.x + g[c + 1] * v.y;
    }
  }
}

// Adds what other blocks of keys left of dq, which lies where store_part would put it.
__device__ __forceinline__ void add_sum(float (&dq)[32], uint32_t from, int lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 v = load_u4(from + lane * 16 + i * 512);
    dq[4 * i] += __uint_as_float(v.x);
    dq[4 * i + 1] += __uint_as_float(v.y);
    dq[4 * i + 2] += __uint_as_float(v.z);
    dq[4 * i + 3] += __uint_as_float(v.w);
  }
}
// Hands a warp's dq over to be added up, once its buffer is ready; `full` is told. But for the sequence's first
// block of keys, the last to add: that takes the sum of the others, and finishes dq (true).
__device__ __forceinline__ bool hand_part(float (&dq)[32], uint32_t part, uint32_t pair, uint32_t full) {
  const auto lane = [] { return thread_here() & 31; };
  const auto arrive = [&] {
    __syncwarp();
    if (lane() == 0) barrier_arrive(full);
  };
  const int mode = pair_choice(pair, offsetof(Pair, mode));
  if (mode == kPartOnly) {
    store_part(part, dq, lane());
    fence_async_proxy();
    arrive();
    return false;
  }
  if (mode == kFinish) add_sum(dq, part, lane());
  arrive();
  return true;
}
// dq whole, and q . dq, of the warp's 16 of the 64 rows from `row` of the pair on and 64 columns. q: the tile
// of these, which nobody else reads any more: its place is the staging of dq, until await_sent(). kParts: of 64
// columns, in one row's q . dq, which is zero on entry if there are two: float32 0 + a + b is the same in
// either order.
template <typename T, int kParts>
__device__ __forceinline__ void finish_rows(float (&dq)[32], uint32_t pair, uint32_t q, int row, int column,
                                            const TileMap &map, int lane) {
  // Of the warp, found anew: kept, it would take a register from where the weights are computed.
  row = __shfl_sync(0xffffffffu, row + (thread_here() >> 5 & 3) * 16, 0);
  const float factor = pair_float(pair, offsetof(Pair, factor));
  const int left = pair_choice(pair, offsetof(Pair, rows)) - row;
  if (pair_choice(pair, offsetof(Pair, with_dot))) {
    float dot[2] = {0.f, 0.f};
    add_dots<T>(dot, dq, q, row & 63, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = factor * quad_sum(dot[h]);
      float *const to =
          reinterpret_cast<float *>(pair_long(pair, offsetof(Pair, dot))) + row + lane / 4 + 8 * h;
      if ((lane & 3) == 0 && lane / 4 + 8 * h < left) {
        if constexpr (kParts == 1)
          *to = sum;
        else
          atomicAdd(to, sum);
      }
    }
    __syncwarp();
  }
  const uint32_t staging = q + (row & 63) * 128;
  if (map.tiled && left >= kResultRows) {
    send_rows<T>(dq, factor, factor, staging, map, column, pair_choice(pair, offsetof(Pair, token)) + row,
                 pair_choice(pair, offsetof(Pair, head)), pair_choice(pair, offsetof(Pair, batch)), lane);
  } else {
    Tensor o;
    o.stride_t = pair_long(pair, offsetof(Pair, stride));
    o.vector = pair_choice(pair, offsetof(Pair, vector));
    o.floats = pair_choice(pair, offsetof(Pair, floats));
    T *const to = reinterpret_cast<T *>(pair_long(pair, offsetof(Pair, dq))) + row * o.stride_t +
                  (o.floats ? 2 : 1) * column;
    store_rows<T, true>(dq, factor, factor, staging, o, to, left, lane);
  }
}

// A field of Unit that has one number for each key; `key`: of the unit.
__device__ __forceinline__ float of_key(uint32_t unit, uint32_t offset, int key) {
  return load_f1(unit + offset + static_cast<uint32_t>(key) * 4);
}

// float16: such a number that the unit has once; else 1.
template <typename T>
__device__ __forceinline__ float power_of(uint32_t unit, uint32_t offset) {
  if constexpr (!kCounted<T>) return 1.f;
  return load_f1(unit + offset);
}

// k . dk of this lane's two of the warp's 16 rows, from `local` of the unit on, for the gate gradient. `keys`:
// the warpgroup's 64 rows of k.
template <typename T, int kDim>
__device__ __forceinline__ void store_dots(const JointArgs &a, const volatile Unit &u,
                                           const float (&dk)[kDim / 2], float factor, uint32_t keys, int local,
                                           int warp, int lane) {
  const int row = u.row + local + lane / 4;
  float dot[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < kDim / 64; ++c) add_dots<T>(dot, dk + 32 * c, keys + 8192 * c, warp * 16, lane);
  float *to = a.dot + token_row(a.p, u.batch, a.p.heads_kv, u.head, u.token) + row;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = factor * quad_sum(dot[h]);
    if ((lane & 3) == 0 && row + 8 * h < u.length) to[8 * h] = sum;
  }
}

// The warp's 16 rows of dk or dv, from `local` of the unit on. Staging: 4 KB, halves of 64 columns in turn.
template <typename T, bool kFloats, int kDim>
__device__ __forceinline__ void store_gradient(const float (&x)[kDim / 2], float factor, uint32_t staging,
                                               const Tensor &o, const TileMap &map, const volatile Unit &u,
                                               int local, int lane) {
  const int row = u.row + local;
  if (can_send(map, row, u.length)) {
#pragma unroll
    for (int c = 0; c < kDim / 64; ++c) {
      await_sent<kDim / 64 - 1>(lane);
      send_rows<T>(x + 32 * c, factor, factor, staging + 2048 * c, map, 64 * c, static_cast<int>(u.token) + row,
                   u.head, u.batch, lane);
    }
    return;
  }
  await_sent(lane);
  T *const to =
      static_cast<T *>(o.data) + u.batch * o.stride_b + u.head * o.stride_h + (u.token + row) * o.stride_t;
#pragma unroll
  for (int c = 0; c < kDim / 64; ++c)
    store_rows<T, kFloats>(x + 32 * c, factor, factor, staging, o, to + (kFloats && o.floats ? 128 : 64) * c,
                           u.length - row, lane);
}

}  // namespace joint

}  // namespace powerattn::cuda::sm90
