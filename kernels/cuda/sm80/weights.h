// SPDX-License-Identifier: Apache-2.0
// Elementwise parts that the forward and the backward share.
#pragma once

#include "args.h"
#include "mma.h"
#include "shapes.h"
#include "units.h"

namespace powerattn {
namespace cuda {
namespace sm80 {

// s^p for a block of accumulators. P = 1, 2 at compile time; P = 0: any degree, by repeated squaring with the
// bits of `degree` as a uniform branch around whole blocks.
template <int P, int N>
__device__ __forceinline__ void power(float (&s)[N], int degree) {
  if constexpr (P == 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] *= s[i];
  } else if constexpr (P == 0) {
    float base[N];
#pragma unroll
    for (int i = 0; i < N; ++i) base[i] = s[i];
    bool first = true;
    for (int n = degree; n != 0; n >>= 1) {
      if (n & 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) s[i] = first ? base[i] : s[i] * base[i];
        first = false;
      }
      if (n > 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) base[i] *= base[i];
      }
    }
    if (first) {
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] = 1.f;
    }
  }
}

// s^(p-1).
template <int P, int N>
__device__ __forceinline__ void power_minus_one(float (&s)[N], int degree) {
  if constexpr (P == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = 1.f;
  } else if constexpr (P == 0) {
    power<0>(s, degree - 1);
  }
}

// 1 / l, and 0 for a row that sees nothing.
__device__ __forceinline__ float safe_inverse(float l) { return l > 1e-37f ? 1.f / l : 0.f; }

// Columns of one block of a kernel that owns rows: factor[] multiplies every element of the column. Away from
// the diagonal it carries the gate relative to `reference`, so that all exponents are <= 0 for decaying gates.
// On the diagonal the gate stays out of it and gate[] holds g, for exact differences per element.
struct Columns {
  const float *g;  // of the chunk, or null
  const float *r;  // of the chunk, or null
  float scale;
  float reference;
  bool reverse;
};
__device__ __forceinline__ void fill_column(const Columns &c, bool diagonal, int col, int length, float *factor,
                                            float *gate) {
  // Past the end: factor 0, and a gate for which every difference decays.
  float f = 0.f, g = c.reverse ? -1e30f : 0.f;
  if (col < length) {
    f = c.scale;
    g = c.g != nullptr ? c.g[col] : 0.f;
    if (c.r != nullptr) f *= c.r[col];
    if (!diagonal && c.g != nullptr) f *= __expf(c.reverse ? g - c.reference : c.reference - g);
  }
  *factor = f;
  *gate = g;
}

__device__ __forceinline__ const Place &find_place(const Shape &shape, int64_t tile_id, void *memory,
                                                   int thread) {
  Place *const place = static_cast<Place *>(memory);
  if (thread == 0) {
    place->tile = shape.table.tiles[tile_id];
    place->chunk = shape.table.chunks[place->tile.length > 0 ? place->tile.chunk : 0];
  }
  __syncthreads();
  return *place;
}

// The blocks of kColumns columns that a row tile sees, in the order of work: first those away from the diagonal
// for every head of the group, then the diagonal ones.
struct Walk {
  int full_begin;  // first full block
  int full;        // number of full blocks
  int diag_begin;
  int diag;
  int heads;

  __device__ __forceinline__ int full_total() const { return full * heads; }
  __device__ __forceinline__ int total() const { return (full + diag) * heads; }
  __device__ __forceinline__ void at(int n, int *head, int *block, bool *diagonal) const {
    *diagonal = n >= full * heads;
    if (*diagonal) {
      n -= full * heads;
      *head = n / diag;
      *block = diag_begin + n % diag;
    } else {
      *head = n / full;
      *block = full_begin + n % full;
    }
  }
};
template <int kColumns>
__device__ __forceinline__ Walk make_walk(const Tile &tile, int chunk_length, bool reverse, int heads) {
  Walk w;
  const int first = tile.offset / kColumns;
  const int blocks = (chunk_length + kColumns - 1) / kColumns;
  w.diag_begin = first;
  w.diag = min(kRowTile / kColumns, blocks - first);
  w.full_begin = reverse ? first + kRowTile / kColumns : 0;
  w.full = reverse ? max(0, blocks - w.full_begin) : first;
  w.heads = heads;
  return w;
}

}  // namespace sm80
}  // namespace cuda
}  // namespace powerattn
