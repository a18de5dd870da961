// SPDX-License-Identifier: Apache-2.0
// Work units: where a chunk lies, and the order in which row tiles are handed out.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "kernels/cuda/tiles.h"

namespace powerattn::cuda::sm90 {

// A tile of rows of one (chunk, head).
struct RowTile {
  Chunk chunk;
  int32_t chunk_index;
  int32_t batch;
  int32_t head;
  int32_t row;  // first row, relative to the chunk
};

// Unit `u` of tiles * heads. In the attention form (one chunk per sequence) `together` sequences and heads are
// in work at a time, whose columns stay in the L2 cache; of these the tiles that see the most come first.
// Otherwise chunk by chunk, so that the tiles that read one state run together. Tickets have 32 bits, and so
// has what is counted here.
__device__ __forceinline__ RowTile row_tile_at(const Shape &p, uint32_t u, uint32_t heads, uint32_t together) {
  RowTile t;
  const uint32_t tiles = static_cast<uint32_t>(p.table.num_tiles);
  uint32_t n;
  if (!p.packed && p.table.num_chunks == p.table.num_sequences) {
    const uint32_t chunks = static_cast<uint32_t>(p.table.num_chunks), pairs = chunks * heads,
                   per = tiles / chunks, span = together * per, first = u / span * together,
                   lanes = min(together, pairs - first), rest = u % span, pair = first + rest % lanes;
    n = pair / heads * per + per - 1 - rest / lanes;
    t.head = static_cast<int32_t>(pair % heads);
  } else {  // per: tiles of a chunk
    const uint32_t per = p.table.chunk > p.table.tile
                             ? static_cast<uint32_t>(p.table.chunk) / static_cast<uint32_t>(p.table.tile)
                             : 1;
    const uint32_t span = per * heads, base = u / span * per, here = min(tiles - base, per), r = u % span;
    t.head = static_cast<int32_t>(r / here);
    n = base + here - 1 - r % here;
  }
  const Tile x = p.table.tiles[n];
  t.chunk_index = x.chunk;
  t.chunk = p.table.chunks[x.chunk];
  t.batch = static_cast<int32_t>(batch_of(p.packed, x.sequence));
  t.row = x.offset;
  if (x.length == 0) t.chunk.length = 0;  // unused
  return t;
}

// How many sequences and heads of rows `row_tile_at` has in work at a time: kColumnsInCache bytes of two
// tensors, which the heads of a group share (rows of keys: which each has of every head of its group).
constexpr double kColumnsInCache = 16 << 20;
inline uint32_t rows_together(const Shape &p, bool keys) {
  const double sharing = keys ? 1. / p.group : p.group,
               bytes = 4. * static_cast<double>(p.tokens) * p.head_dim / sharing;
  return static_cast<uint32_t>(std::max(1., std::min(kColumnsInCache / std::max(bytes, 1.), 65536.)));
}

// Which of the sums kept apart in UpdateArgs::end chunk `c` is; < 0: none.
__device__ __forceinline__ int32_t end_of(const UpdateArgs &a, const Chunk &c, int head) {
  const bool end = a.end != nullptr && (a.reverse ? c.index == 0 : c.index + 1 == c.count);
  return end ? c.sequence * a.p.heads_kv + head : -1;
}

// Row of the per-token arrays [b, heads, t].
__device__ __forceinline__ int64_t token_row(const Shape &p, int batch, int heads, int head, int64_t token) {
  return (int64_t(batch) * heads + head) * p.tokens + token;
}

// Hands out unit numbers to the 128 threads of a producer warpgroup; `slot` is 8 bytes of shared memory.
struct Tickets {
  uint32_t slot;
  int turn = 0;
  __device__ __forceinline__ int next(int32_t *counter, int tid) {
    turn ^= 4;
    if (tid == 0) {
      const int u = atomicAdd(counter, 1);
      store_i1(slot + turn, u);
    }
    named_barrier<1, 128>();
    return load_i1(slot + turn);
  }
};

// The same to the lanes of a producer warp.
__device__ __forceinline__ int next_ticket(int32_t *counter, int lane) {
  return __shfl_sync(0xffffffffu, lane == 0 ? atomicAdd(counter, 1) : 0, 0);
}

template <typename T>
__device__ __forceinline__ const T *row_pointer(const Tensor &x, int batch, int head, int64_t token) {
  return static_cast<const T *>(x.data) + batch * x.stride_b + head * x.stride_h + token * x.stride_t;
}

}  // namespace powerattn::cuda::sm90
