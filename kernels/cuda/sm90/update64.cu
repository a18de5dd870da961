// SPDX-License-Identifier: Apache-2.0
// Sums of one chunk for head_dim = value_dim = 64:
//   S[(i,j)] = W_ij sum_t w_t k_ti k_tj v_t   (36 tiles of tiles.h, W = 2 off the diagonal tiles)
//   Z        = sum_t w'_t k_t k_t^T           (normalised)
//
// A unit is a (chunk, head, slice); the accumulators of a slice, 6 tiles in each of two consumer warpgroups,
// stay in registers over the chunk's tokens. The A operand phi(k)^T is a K^T fragment times scalars w_t k_ti;
// the producer warpgroup makes these scalars once per stage, transposed and rounded once, so that a consumer
// fetches the four it needs for a pair of rows i with one 16-byte load.
#include "update.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kTile = 64 * 64 * 2;
constexpr int kTokens = 64;  // per stage
constexpr int kAhead = 2;    // stages whose copies are in flight while an earlier one is transposed
constexpr int kConsumerWarps = 8;
constexpr int kSlices = 3;  // 36 tiles / (2 warpgroups x 6)
// Exact weights: the scalars w_t k_ti in two parts, high and low, so that a product w k_i k_j is rounded once.
template <bool kExact>
struct Layout {
  static constexpr int kStage = (kExact ? 4 : 3) * kTile;  // k, v, scalars (and their low parts)
  static constexpr int kStages = kExact ? 5 : 6;
  // 1024 (alignment) + ring 6 x 24 KB (exact: 5 x 32) + staging 2 warpgroups x 2 x 8 KB + weights 6 x 256 +
  // barriers: 179 KB (exact: 195).
  static constexpr int kSmem = 1024 + kStages * kStage + 4 * kTile + kStages * 256 + 512;
};

template <bool kExact>
struct Smem {
  static constexpr int kStage = Layout<kExact>::kStage, kStages = Layout<kExact>::kStages;
  uint32_t ring, staging, weights, full, empty, unit_full, unit_empty, ticket, unit;
  __device__ explicit Smem(uint32_t base) {
    ring = (base + 1023) & ~1023u;
    staging = ring + kStages * kStage;
    weights = staging + 4 * kTile;
    full = weights + kStages * 256;
    empty = full + 8 * kStages;
    unit_full = empty + 8 * kStages;
    unit_empty = unit_full + 8;
    ticket = unit_empty + 8;
    unit = ticket + 8;
  }
};

// The six tiles of each of the six warpgroup parts: few distinct blocks, so few loads per 16 tokens. `pair` of
// a tile is its J / 2 (one ldmatrix brings two blocks).
struct Part {
  int i[6], j[6];
};
__host__ __device__ constexpr Part part_of(int n) {
  return n == 0   ? Part{{0, 0, 1, 1, 2, 2}, {6, 7, 6, 7, 6, 7}}
         : n == 1 ? Part{{3, 3, 4, 4, 5, 5}, {6, 7, 6, 7, 6, 7}}
         : n == 2 ? Part{{0, 0, 1, 1, 2, 2}, {4, 5, 4, 5, 4, 5}}
         : n == 3 ? Part{{0, 0, 1, 1, 3, 3}, {2, 3, 2, 3, 4, 5}}
         : n == 4 ? Part{{6, 6, 7, 4, 4, 5}, {6, 7, 7, 4, 5, 5}}
                  : Part{{2, 2, 3, 0, 0, 1}, {2, 3, 3, 0, 1, 1}};
}

// ---- Producer -----------------------------------------------------------------------------------------------

// scalars[i][ks][c] = w_t k_ti for tokens t = 16 ks + 2c, +1, +8, +9 (8 bytes), rows i in pairs: the 16 bytes
// of (i / 2, ks, c) are at ((i / 8 * 4 + ks) * 4 + i % 8 / 2) * 64 + c * 16.
template <typename T, bool kExact>
__device__ __forceinline__ void make_scalars(uint32_t keys, uint32_t scalars, uint32_t weights) {
  // Derived anew: numbers kept over the loop would cost registers that the producers do not have.
  const int thread = thread_here(), ks = thread >> 5 & 3, lane = thread & 31, g = lane / 4, c = lane & 3;
  const float2 w0 = load_f2(weights + (16 * ks + 2 * c) * 4), w1 = load_f2(weights + (16 * ks + 2 * c + 8) * 4);
  const int token = ks * 16 + (lane & 15);
  const uint32_t from = keys + token * 128 + (((lane >> 4) ^ (token & 7)) << 4);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t x[4];
    ldmatrix4_trans(x, from ^ (pair << 5));  // blocks 2 pair and 2 pair + 1
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 a = unpack2<T>(x[2 * h]), b = unpack2<T>(x[2 * h + 1]);
      const uint32_t at = scalars + (((2 * pair + h) * 4 + ks) * 4 + g / 2) * 64 + c * 16 + (g & 1) * 8;
      const float a0 = a.x * w0.x, a1 = a.y * w0.y, b0 = b.x * w1.x, b1 = b.y * w1.y;
      const uint32_t high_a = pack2<T>(a0, a1), high_b = pack2<T>(b0, b1);
      store_u2(at, high_a, high_b);
      if constexpr (kExact) {
        const float2 ha = unpack2<T>(high_a), hb = unpack2<T>(high_b);
        store_u2(at + kTile, pack2<T>(a0 - ha.x, a1 - ha.y), pack2<T>(b0 - hb.x, b1 - hb.y));
      }
    }
  }
}

template <typename T, bool kExact>
__device__ __forceinline__ void produce(const UpdateArgs &a, const Smem<kExact> &s, UnitMeta *slots, int tid) {
  constexpr int kStage = Layout<kExact>::kStage, kStages = Layout<kExact>::kStages;
  const Shape &p = a.p;
  const int64_t units = p.table.num_chunks * p.heads_kv;
  const int heads = a.heads_a / p.heads_kv;  // of a and b per state
  Ring<kStages> ring, ready;                 // being loaded; to be transposed
  uint32_t unit_phase = 1;
  Tickets tickets{s.ticket};
  // Every warp arrives, so that no thread can still be waiting for a unit that the consumers have long taken.
  const auto hand_unit = [&]() {
    __syncwarp();
    if (tid % 32 == 0) barrier_arrive(s.unit_full);
  };
  // A block keeps its slice, and takes Z units (cheap, one in every 37 products) when its slice is done.
  int slice = static_cast<int>(blockIdx.x) % kSlices;
  const auto finish = [&]() {  // transposes the oldest loaded stage and hands it over
    fence_async_proxy();
    named_barrier<2, 128>();
    const uint32_t stage = s.ring + ready.stage * kStage;
    if (!(kCounted<T> && slice == kSlices))  // whose Z makes its own
      make_scalars<T, kExact>(stage, stage + 2 * kTile, s.weights + ready.stage * 256);
    __syncwarp();
    if (tid % 32 == 0) barrier_arrive(s.full + 8 * ready.stage);
    ready.next();
  };
  for (;;) {
    const int64_t slot = tickets.next(a.ticket + slice, tid);
    if (slot >= units) {
      if (slice == kSlices || a.norm == nullptr) break;
      slice = kSlices;
      continue;
    }
    const int head_kv = static_cast<int>(slot % p.heads_kv);
    const Chunk c = p.table.chunks[slot / p.heads_kv];
    if (c.length == 0) continue;
    const int batch = static_cast<int>(batch_of(p.packed, c.sequence));
    const int blocks = (c.length + kTokens - 1) / kTokens;
    const bool norm = slice == kSlices;
    barrier_wait(s.unit_empty, unit_phase);
    unit_phase ^= 1;
    if (tid == 0) {
      slots[unit_phase].slice = slice;
      slots[unit_phase].stages = blocks * heads;
      slots[unit_phase].slot = static_cast<int32_t>(slot);
      if constexpr (kExact) slots[unit_phase].end = end_of(a, c, head_kv);
      if constexpr (kCounted<T>)
        slots[unit_phase].factor = sum_factor(a.ranges[slot], norm, kExact && slots[unit_phase].end >= 0);
    }
    hand_unit();
    const float *weights = norm ? a.norm_weight : a.weight;
    int pending = 0;
#pragma unroll 1
    for (int h = 0; h < heads; ++h) {
      const int head = head_kv * heads + h;
      const T *k = row_pointer<T>(a.a, batch, head, c.start), *v = row_pointer<T>(a.b, batch, head, c.start);
      const float *w = weights ? weights + token_row(p, batch, a.heads_a, head, c.start) : nullptr;
#pragma unroll 1
      for (int j = 0; j < blocks; ++j) {
        const int left = c.length - j * kTokens;
        float x = kCounted<T> ? lift_of(a.ranges[slot], norm) : 1.f;
        if (w && tid < kTokens && tid < left) x *= w[j * kTokens + tid];
        barrier_wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
        const uint32_t stage = s.ring + ring.stage * kStage;
        load_tile<T>(stage, a.a, k + int64_t(j) * kTokens * a.a.stride_t, left, tid);
        load_tile<T>(stage + kTile, a.b, v + int64_t(j) * kTokens * a.b.stride_t, left, tid);
        copy_commit();
        if (tid < kTokens) store_f1(s.weights + ring.stage * 256 + tid * 4, x);
        ring.next();
        if (++pending > kAhead) {
          copy_wait<kAhead>();
          finish();
          --pending;
        }
      }
    }
    copy_wait<0>();
    for (; pending > 0; --pending) finish();
  }
  barrier_wait(s.unit_empty, unit_phase);
  if (tid == 0) {
    slots[unit_phase ^ 1].slice = -1;
  }
  hand_unit();
}

// ---- Consumers ----------------------------------------------------------------------------------------------

template <bool kExact>
struct Pipe {
  static constexpr int kStage = Layout<kExact>::kStage, kStages = Layout<kExact>::kStages;
  const Smem<kExact> &s;
  const int lane, warp;
  Ring<kStages> ring;
  __device__ __forceinline__ void acquire() { barrier_wait(s.full + 8 * ring.stage, ring.phase); }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(s.empty + 8 * stage);
  }
  __device__ __forceinline__ uint32_t stage() const { return s.ring + ring.stage * kStage; }
};

__host__ __device__ constexpr bool new_block(int part, int n) {
  return n == 0 || part_of(part).i[n] != part_of(part).i[n - 1];
}
// Six tiles over `stages` x 64 tokens. Scalars and K^T fragments are refilled right after their last use, so
// that the latency hides under the two products in flight (192 accumulators leave no room for more).
template <typename T, int kPart, bool kExact>
__device__ __forceinline__ void sum_tiles(float (&acc)[6][32], Pipe<kExact> &pipe, int stages) {
  constexpr int kStages = Layout<kExact>::kStages;
  constexpr Part part = part_of(kPart);
  uint32_t kt[4], a[2][4];
  uint4 x, low;  // low: exact weights only
  const int token = pipe.lane & 15;
  const uint32_t k_at = token * 128 + (((token & 7) ^ (pipe.lane >> 4)) << 4);
  const uint32_t x_at = 2 * kTile + pipe.warp * 64 + (pipe.lane & 3) * 16;
  const auto load_scalars = [&](uint32_t at) {
    x = load_u4(at);
    if constexpr (kExact) low = load_u4(at + kTile);
  };
  const auto load_kt = [&](int pair, uint32_t stage, int ks) {
    ldmatrix4_trans(kt, (stage + ks * 2048 + k_at) ^ (pair << 5));
  };
  pipe.acquire();
  load_kt(part.j[0] / 2, pipe.stage(), 0);
  load_scalars(pipe.stage() + x_at + part.i[0] * 1024);
#pragma unroll 1
  for (int it = 0; it < stages; ++it) {
    const uint32_t here = pipe.stage();
    uint32_t next = here;
    pipe.ring.next();
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) {
      if (ks == 3 && it + 1 < stages) {
        pipe.acquire();
        next = pipe.stage();
      }
      const uint32_t ahead = ks == 3 ? next : here;
#pragma unroll
      for (int n = 0; n < 6; ++n) {
        wgmma_wait<1>();
        const int h = 2 * (part.j[n] & 1);
        uint32_t(&b)[4] = a[n & 1];
        const auto product = [&](uint32_t k, uint32_t high, uint32_t rest) {
          return kExact ? fma2<T>(k, high, mul2<T>(k, rest)) : mul2<T>(k, high);
        };
        b[0] = product(kt[h], x.x, low.x);
        b[1] = product(kt[h], x.z, low.z);
        b[2] = product(kt[h + 1], x.y, low.y);
        b[3] = product(kt[h + 1], x.w, low.w);
        const int m = (n + 1) % 6;
        if (m == 0 || new_block(kPart, m))
          load_scalars((m == 0 ? ahead : here) + x_at + (part.i[m] * 4 + (m == 0 ? (ks + 1) & 3 : ks)) * 256);
        if (m == 0 || part.j[m] / 2 != part.j[n] / 2)
          load_kt(part.j[m] / 2, m == 0 ? ahead : here, m == 0 ? (ks + 1) & 3 : ks);
        wgmma_fence();
        wgmma<T, true, true>(acc[n], b, desc_at(tile_desc(here), kTile + ks * 2048));
        wgmma_commit();
        if (ks == 0 && n == 2 && it > 0)
          pipe.release(pipe.ring.stage < 2 ? pipe.ring.stage + kStages - 2 : pipe.ring.stage - 2);
      }
    }
  }
  wgmma_wait<0>();
  pipe.release(pipe.ring.stage == 0 ? kStages - 1 : pipe.ring.stage - 1);
}

// Writes the six tiles of a sum that is kept apart, not rounded.
template <typename T, int kPart>
__device__ __forceinline__ void store_end(const float (&acc)[6][32], const volatile UnitMeta &unit,
                                          float *end) {
  const int thread = thread_here(), warp = thread >> 5 & 3, lane = thread & 31;  // anew: none are left for it
  constexpr Part part = part_of(kPart);
#pragma unroll
  for (int n = 0; n < 6; ++n) {
    const float w = (part.i[n] == part.j[n] ? 1.f : 2.f) * (kCounted<T> ? unit.factor : 1.f);
    float *to = end + (tile_index(8, part.i[n], part.j[n]) * 64 + warp * 16 + lane / 4) * 64 + (lane & 3) * 2;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      *reinterpret_cast<float2 *>(to + 8 * c) = make_float2(w * acc[n][4 * c], w * acc[n][4 * c + 1]);
      *reinterpret_cast<float2 *>(to + 8 * c + 8 * 64) =
          make_float2(w * acc[n][4 * c + 2], w * acc[n][4 * c + 3]);
    }
  }
}

// Writes the six tiles to their places in the slot through two staging buffers per warpgroup.
template <typename T, int kPart, int kGroup, bool kExact>
__device__ __forceinline__ void store_tiles(float (&acc)[6][32], const volatile UnitMeta &unit,
                                            const Pipe<kExact> &pipe, char *slot) {
  constexpr Part part = part_of(kPart);
  const int row = pipe.warp * 16 + (pipe.lane & 15), half = pipe.lane >> 4;
#pragma unroll
  for (int n = 0; n < 6; ++n) {
    const uint32_t buffer = pipe.s.staging + (kGroup * 2 + n % 2) * kTile;
    const bool leader = pipe.warp == 0 && pipe.lane == 0;
    if (leader) bulk_store_wait_read<1>();
    named_barrier<3 + kGroup, 128>();
    const float w = (part.i[n] == part.j[n] ? 1.f : 2.f) * (kCounted<T> ? unit.factor : 1.f);
#pragma unroll
    for (int c = 0; c < 8; c += 2)
      stmatrix4(buffer + row * 128 + (((c + half) ^ (row & 7)) << 4),
                pack2<T>(w * acc[n][4 * c], w * acc[n][4 * c + 1]),
                pack2<T>(w * acc[n][4 * c + 2], w * acc[n][4 * c + 3]),
                pack2<T>(w * acc[n][4 * c + 4], w * acc[n][4 * c + 5]),
                pack2<T>(w * acc[n][4 * c + 6], w * acc[n][4 * c + 7]));
    fence_async_proxy();
    named_barrier<3 + kGroup, 128>();
    if (leader) bulk_store(slot + tile_index(8, part.i[n], part.j[n]) * kTile, buffer, kTile);
  }
}

// Z. One product per 16 tokens: A = w_t k_t (64 features), B = k. Both warpgroups take every other stage; each
// holds half of the sum, added through the staging buffer in a fixed order. float16: A in two parts, made here.
template <typename T, int kGroup, bool kExact>
__device__ __forceinline__ void sum_norm(const UpdateArgs &args, Pipe<kExact> &pipe, int stages,
                                         const volatile UnitMeta &unit) {
  constexpr bool kParts = kExact || kCounted<T>;
  float acc[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = 0.f;
  const int g = pipe.lane / 4, c = pipe.lane & 3;
  const auto skip = [&]() {
    pipe.acquire();
    pipe.release(pipe.ring.stage);
    pipe.ring.next();
  };
  if (kGroup == 1) skip();
#pragma unroll 1
  for (int it = kGroup; it < stages; it += 2) {
    pipe.acquire();
    const uint32_t stage = pipe.stage();
    uint32_t f[kParts ? 8 : 4][4];  // the low parts behind the high ones
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) {
      if constexpr (kCounted<T>) {
        weighed_keys<T>(f[ks], f[ks + 4], stage, ks * 16,
                        pipe.s.weights + pipe.ring.stage * 256 + ks * 64 + c * 8, pipe.warp, pipe.lane);
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t at =
              stage + 2 * kTile + (((2 * pipe.warp + h) * 4 + ks) * 4 + g / 2) * 64 + c * 16 + (g & 1) * 8;
          const float2 v = load_f2(at);
          f[ks][h] = __float_as_uint(v.x);
          f[ks][h + 2] = __float_as_uint(v.y);
          if constexpr (kExact) {
            const float2 low = load_f2(at + kTile);
            f[ks + 4][h] = __float_as_uint(low.x);
            f[ks + 4][h + 2] = __float_as_uint(low.y);
          }
        }
      }
    }
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < (kParts ? 8 : 4); ++ks)
      wgmma<T, true, true>(acc, f[ks], desc_at(tile_desc(stage), ks % 4 * 2048));
    wgmma_commit();
    wgmma_wait<0>();
    pipe.release(pipe.ring.stage);
    pipe.ring.next();
    if (it + 1 < stages) skip();
  }
  // Group 1 leaves its half in shared memory (16 KB, its own lanes' order), group 0 adds and stores.
  const uint32_t at = pipe.s.staging + (pipe.warp * 32 + pipe.lane) * 16;
  if (pipe.warp == 0 && pipe.lane == 0) bulk_store_wait_read<0>();
  named_barrier<5, 256>();
  if constexpr (kGroup == 1) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_u4(at + i * 2048, make_uint4(__float_as_uint(acc[4 * i]), __float_as_uint(acc[4 * i + 1]),
                                         __float_as_uint(acc[4 * i + 2]), __float_as_uint(acc[4 * i + 3])));
  }
  named_barrier<5, 256>();
  if constexpr (kGroup == 0) {
    const int row = pipe.warp * 16 + g;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 o = load_u4(at + i * 2048);
      const float y0 = acc[4 * i] + __uint_as_float(o.x), y1 = acc[4 * i + 1] + __uint_as_float(o.y),
                  y2 = acc[4 * i + 2] + __uint_as_float(o.z), y3 = acc[4 * i + 3] + __uint_as_float(o.w);
      const float f = kCounted<T> ? unit.factor : 1.f;
      float *z = args.norm + int64_t(unit.slot) * 4096 + row * 64 + 8 * i + 2 * c;
      *reinterpret_cast<float2 *>(z) = make_float2(f * y0, f * y1);
      *reinterpret_cast<float2 *>(z + 8 * 64) = make_float2(f * y2, f * y3);
    }
  }
}

template <typename T, int kGroup, int kSlice, bool kExact>
__device__ __forceinline__ void sum_slice(const UpdateArgs &args, Pipe<kExact> &pipe, int stages,
                                          const volatile UnitMeta &unit) {
  float acc[6][32];
#pragma unroll
  for (int n = 0; n < 6; ++n)
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[n][i] = 0.f;
  sum_tiles<T, kSlice * 2 + kGroup, kExact>(acc, pipe, stages);
  if constexpr (kExact) {
    const int32_t end = unit.end;
    if (end >= 0) {
      store_end<T, kSlice * 2 + kGroup>(acc, unit, args.end + int64_t(end) * (36 * 64 * 64));
      return;
    }
  }
  store_tiles<T, kSlice * 2 + kGroup, kGroup, kExact>(
      acc, unit, pipe, static_cast<char *>(args.state) + int64_t(unit.slot) * (36 * kTile));
}

template <typename T, int kGroup, int kSlice, bool kExact>
__device__ __forceinline__ void consume(const UpdateArgs &args, const Smem<kExact> &s,
                                        const volatile UnitMeta *slots, int tid) {
  Pipe<kExact> pipe{s, tid % 32, tid / 32};
  uint32_t phase = 0;
  const auto next = [&](int &stages) {  // the next unit's slice, uniform over the warp
    barrier_wait(s.unit_full, phase);
    const int slice = __shfl_sync(0xffffffffu, slots[phase].slice, 0);
    stages = __shfl_sync(0xffffffffu, slots[phase].stages, 0);
    phase ^= 1;
    if (pipe.lane == 0) barrier_arrive(s.unit_empty);
    return slice;
  };
  int stages, slice = next(stages);
  while (slice == kSlice) {
    sum_slice<T, kGroup, kSlice, kExact>(args, pipe, stages, slots[phase ^ 1]);
    slice = next(stages);
  }
  while (slice == kSlices) {
    sum_norm<T, kGroup, kExact>(args, pipe, stages, slots[phase ^ 1]);
    slice = next(stages);
  }
  if (tid == 0) bulk_store_wait();
}
template <typename T, int kGroup, bool kExact>
__device__ __forceinline__ void consume_slice(const UpdateArgs &args, const Smem<kExact> &s,
                                              const volatile UnitMeta *slots, int tid) {
  const int slice = blockIdx.x % kSlices;
  if (slice == 0)
    consume<T, kGroup, 0, kExact>(args, s, slots, tid);
  else if (slice == 1)
    consume<T, kGroup, 1, kExact>(args, s, slots, tid);
  else
    consume<T, kGroup, 2, kExact>(args, s, slots, tid);
}

template <typename T, bool kExact>
__global__ void __launch_bounds__(384, 1) update64_kernel(const __grid_constant__ UpdateArgs a) {
  constexpr int kStages = Layout<kExact>::kStages;
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem<kExact> s(shared_address(raw));
  UnitMeta *slots = reinterpret_cast<UnitMeta *>(raw + (s.unit - shared_address(raw)));
  const int tid = threadIdx.x, group = __shfl_sync(0xffffffffu, tid / 128, 0);
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(s.full + 8 * i, 4);
      barrier_init(s.empty + 8 * i, kConsumerWarps);
    }
    barrier_init(s.unit_full, 4);
    barrier_init(s.unit_empty, kConsumerWarps);
    fence_barrier_init();
  }
  __syncthreads();
  if (group == 2) {
    registers_dec<40>();
    produce<T, kExact>(a, s, slots, tid - 256);
  } else {
    registers_inc<232>();
    if (group == 0)
      consume_slice<T, 0, kExact>(a, s, slots, tid);
    else
      consume_slice<T, 1, kExact>(a, s, slots, tid - 128);
  }
}

template <typename T, bool kExact>
cudaError_t launch(const UpdateArgs &a, int sms, cudaStream_t stream) {
  constexpr int kSmem = Layout<kExact>::kSmem;
  return launch_kernel(update64_kernel<T, kExact>, sms, 384, kSmem, stream, a);
}

}  // namespace

cudaError_t update64(const UpdateArgs &a, int sms, cudaStream_t stream) {
  using B = __nv_bfloat16;
  if (a.p.degree != 2) return cudaErrorInvalidValue;
  if (a.p.half) return a.exact ? launch<__half, true>(a, sms, stream) : launch<__half, false>(a, sms, stream);
  return a.exact ? launch<B, true>(a, sms, stream) : launch<B, false>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
