// SPDX-License-Identifier: Apache-2.0
// Sums of one chunk for head_dim = value_dim = 128, degree 2, after update64.cu:
//   S[(i,j)] = W_ij sum_t w_t k_ti k_tj v_t   (136 tiles of tiles.h, W = 2 off the diagonal tiles)
//   Z        = sum_t w'_t k_t k_t^T
//
// A unit is a (chunk, head, slice) of six tiles that follow each other in the order of tiles.h, three in each
// consumer warpgroup (3 x 64 accumulators); the last slice has four. The 23 slices of a chunk are handed out
// one after another, so that they read its keys and values from L2. A tile is named by addresses in registers,
// so one loop serves all.
#include "update.cuh"

namespace powerattn::cuda::sm90 {
namespace {

constexpr int kDim = 128;
constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
constexpr int kHalf = kTile / 2;
constexpr int kTokens = 64;  // per stage
constexpr int kTiles = tile_count(2, kDim), kBlocks = tile_blocks(kDim);
constexpr int kSlices = (kTiles + 5) / 6;
constexpr int kScalars = 4096;  // of up to four blocks i: six tiles in a row have three
constexpr int kStages = 4;
constexpr int kAhead = 1;  // stages whose copies are in flight while an earlier one is transposed
constexpr int kConsumerWarps = 8;

// Exact weights: the scalars w_t k_ti in two parts, high and low, so that a product w k_i k_j is rounded once.
template <bool kExact>
struct Layout {
  static constexpr int kStage = 2 * kTile + (kExact ? 2 : 1) * kScalars;  // k, v, scalars (and their low parts)
  // 1024 (alignment) + ring 4 x 36 KB (exact: 40) + staging 2 warpgroups x 16 KB + weights 4 x 256 + barriers:
  // 178 KB (exact: 194).
  static constexpr int kSmem = 1024 + kStages * kStage + 2 * kTile + kStages * 256 + 512;
};

template <bool kExact>
struct Smem {
  uint32_t ring, staging, weights, full, empty, unit_full, unit_empty, ticket, unit;
  __device__ explicit Smem(uint32_t base) {
    ring = (base + 1023) & ~1023u;
    staging = ring + kStages * Layout<kExact>::kStage;
    weights = staging + 2 * kTile;
    full = weights + kStages * 256;
    empty = full + 8 * kStages;
    unit_full = empty + 8 * kStages;
    unit_empty = unit_full + 8;
    ticket = unit_empty + 8;
    unit = ticket + 8;
  }
};

// ---- Producer -----------------------------------------------------------------------------------------------

// scalars[i][ks][c] = w_t k_ti of block `ib` for tokens t = 16 ks + 2c, +1, +8, +9 (8 bytes), rows i in pairs:
// the 16 bytes of (i / 2, ks, c) are at (ks * 4 + i % 8 / 2) * 64 + c * 16.
template <typename T, bool kExact>
__device__ __forceinline__ void make_scalars(uint32_t keys, uint32_t scalars, uint32_t weights, int ib,
                                             int tid) {
  const int ks = tid / 32, lane = tid % 32, g = lane / 4, c = lane & 3, token = ks * 16 + (lane & 15);
  const float2 w0 = load_f2(weights + (16 * ks + 2 * c) * 4), w1 = load_f2(weights + (16 * ks + 2 * c + 8) * 4);
  uint32_t x[2];
  ldmatrix2_trans(x[0], x[1], keys + (ib >> 3) * kHalf + token * 128 + (((ib & 7) ^ (token & 7)) << 4));
  const float2 a = unpack2<T>(x[0]), b = unpack2<T>(x[1]);
  const float a0 = a.x * w0.x, a1 = a.y * w0.y, b0 = b.x * w1.x, b1 = b.y * w1.y;
  const uint32_t at = scalars + (ks * 4 + g / 2) * 64 + c * 16 + (g & 1) * 8;
  const uint32_t high_a = pack2<T>(a0, a1), high_b = pack2<T>(b0, b1);
  store_u2(at, high_a, high_b);
  if constexpr (kExact) {
    const float2 ha = unpack2<T>(high_a), hb = unpack2<T>(high_b);
    store_u2(at + kScalars, pack2<T>(a0 - ha.x, a1 - ha.y), pack2<T>(b0 - hb.x, b1 - hb.y));
  }
}

template <typename T, bool kExact>
__device__ __forceinline__ void produce(const UpdateArgs &a, const Smem<kExact> &s, UnitMeta *slots, int tid) {
  constexpr int kStage = Layout<kExact>::kStage;
  const Shape &p = a.p;
  const int per = kSlices + (a.norm != nullptr ? 1 : 0);
  const int64_t units = p.table.num_chunks * p.heads_kv * per;
  const int heads = a.heads_a / p.heads_kv;  // of a and b per state
  Ring<kStages> ring, ready;                 // being loaded; to be transposed
  uint32_t unit_phase = 1;
  Tickets tickets{s.ticket};
  const auto hand_unit = [&]() {
    __syncwarp();
    if (tid % 32 == 0) barrier_arrive(s.unit_full);
  };
  for (;;) {
    const int64_t u = tickets.next(a.ticket, tid);
    if (u >= units) break;
    const int64_t slot = u / per;
    const int slice = static_cast<int>(u % per), head_kv = static_cast<int>(slot % p.heads_kv);
    const Chunk c = p.table.chunks[slot / p.heads_kv];
    if (c.length == 0) continue;
    const int batch = static_cast<int>(batch_of(p.packed, c.sequence));
    const int blocks = (c.length + kTokens - 1) / kTokens;
    barrier_wait(s.unit_empty, unit_phase);
    unit_phase ^= 1;
    if (tid == 0) {
      slots[unit_phase].slice = slice;
      slots[unit_phase].stages = blocks * heads;
      slots[unit_phase].slot = static_cast<int32_t>(slot);
      if constexpr (kExact) slots[unit_phase].end = end_of(a, c, head_kv);
      if constexpr (kCounted<T>)
        slots[unit_phase].factor =
            sum_factor(a.ranges[slot], slice == kSlices, kExact && slots[unit_phase].end >= 0);
    }
    hand_unit();
    // Blocks i of the slice's tiles; none for Z.
    int first = 0, last = -1, j;
    if (slice < kSlices) {
      tile_pair(kBlocks, slice * 6, &first, &j);
      tile_pair(kBlocks, min(slice * 6 + 5, kTiles - 1), &last, &j);
    }
    const auto finish = [&]() {  // transposes the oldest loaded stage and hands it over
      fence_async_proxy();
      named_barrier<2, 128>();
      const uint32_t stage = s.ring + ready.stage * kStage;
#pragma unroll 1
      for (int ib = first; ib <= last; ++ib)
        make_scalars<T, kExact>(stage, stage + 2 * kTile + (ib - first) * 1024, s.weights + ready.stage * 256,
                                ib, tid);
      __syncwarp();
      if (tid % 32 == 0) barrier_arrive(s.full + 8 * ready.stage);
      ready.next();
    };
    const float *weights = slice == kSlices ? a.norm_weight : a.weight;
    const float lift = kCounted<T> ? lift_of(a.ranges[slot], slice == kSlices) : 1.f;
    int pending = 0;
#pragma unroll 1
    for (int h = 0; h < heads; ++h) {
      const int head = head_kv * heads + h;
      const T *k = row_pointer<T>(a.a, batch, head, c.start), *v = row_pointer<T>(a.b, batch, head, c.start);
      const float *w = weights ? weights + token_row(p, batch, a.heads_a, head, c.start) : nullptr;
#pragma unroll 1
      for (int n = 0; n < blocks; ++n) {
        const int left = c.length - n * kTokens;
        float x = lift;
        if (w && tid < kTokens && tid < left) x *= w[n * kTokens + tid];
        barrier_wait(s.empty + 8 * ring.stage, ring.phase ^ 1);
        const uint32_t stage = s.ring + ring.stage * kStage;
        load_tile<T, kDim>(stage, a.a, k + int64_t(n) * kTokens * a.a.stride_t, left, tid);
        load_tile<T, kDim>(stage + kTile, a.b, v + int64_t(n) * kTokens * a.b.stride_t, left, tid);
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
  if (tid == 0) slots[unit_phase ^ 1].slice = -1;
  hand_unit();
}

// ---- Consumers ----------------------------------------------------------------------------------------------

template <bool kExact>
struct Pipe {
  static constexpr int kStage = Layout<kExact>::kStage;
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

// Three tiles over `stages` x 64 tokens: one product per tile and 16 tokens, K^T fragments and scalars of the
// next one fetched right after the use of this one's. j[n], i[n]: where this lane's are in a stage.
template <typename T, bool kExact>
__device__ __forceinline__ void sum_tiles(float (&acc)[3][64], Pipe<kExact> &pipe, int stages,
                                          const uint32_t (&j)[3], const uint32_t (&i)[3]) {
  uint32_t kt[2], a[2][4];
  uint4 x, low;  // low: exact weights only
  const auto fetch = [&](uint32_t stage, int n, int ks) {
    ldmatrix2_trans(kt[0], kt[1], stage + j[n] + ks * 2048);
    x = load_u4(stage + i[n] + ks * 256);
  };
  pipe.acquire();
  fetch(pipe.stage(), 0, 0);
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
#pragma unroll
      for (int n = 0; n < 3; ++n) {
        if constexpr (kExact)
          low = load_u4(here + i[n] + ks * 256 + kScalars);  // no registers to fetch it early
        wgmma_wait<1>();
        uint32_t(&b)[4] = a[(ks * 3 + n) & 1];
        const auto product = [&](uint32_t k, uint32_t high, uint32_t rest) {
          return kExact ? fma2<T>(k, high, mul2<T>(k, rest)) : mul2<T>(k, high);
        };
        b[0] = product(kt[0], x.x, low.x);
        b[1] = product(kt[0], x.z, low.z);
        b[2] = product(kt[1], x.y, low.y);
        b[3] = product(kt[1], x.w, low.w);
        if (n < 2)
          fetch(here, n + 1, ks);
        else
          fetch(ks == 3 ? next : here, 0, (ks + 1) & 3);
        wgmma_fence();
        wgmma<T, true, true>(acc[n], b, desc_at(tile_desc(here, kHalf), kTile + ks * 2048));
        wgmma_commit();
        if (ks == 0 && n == 2 && it > 0)
          pipe.release(pipe.ring.stage < 2 ? pipe.ring.stage + kStages - 2 : pipe.ring.stage - 2);
      }
    }
  }
  wgmma_wait<0>();
  pipe.release(pipe.ring.stage == 0 ? kStages - 1 : pipe.ring.stage - 1);
}

template <typename T, int kGroup, bool kExact>
__device__ __forceinline__ void sum_slice(const UpdateArgs &args, Pipe<kExact> &pipe, int slice, int stages,
                                          const volatile UnitMeta &unit) {
  float acc[3][64];
#pragma unroll
  for (int n = 0; n < 3; ++n)
#pragma unroll
    for (int k = 0; k < 64; ++k) acc[n][k] = 0.f;
  const int token = pipe.lane & 15;
  uint32_t j[3], i[3];
  int first, ib, jb;
  tile_pair(kBlocks, slice * 6, &first, &jb);
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    tile_pair(kBlocks, min(slice * 6 + kGroup * 3 + n, kTiles - 1), &ib, &jb);  // past the end: not stored
    j[n] = (jb >> 3) * kHalf + token * 128 + (((jb & 7) ^ (token & 7)) << 4);
    i[n] = 2 * kTile + (ib - first) * 1024 + pipe.warp * 64 + (pipe.lane & 3) * 16;
  }
  sum_tiles<T, kExact>(acc, pipe, stages, j, i);

  if constexpr (kExact) {
    const int32_t end = unit.end;
    if (end >= 0) {  // kept apart, not rounded
#pragma unroll
      for (int n = 0; n < 3; ++n) {
        const int tile = slice * 6 + kGroup * 3 + n;
        if (tile >= kTiles) break;
        tile_pair(kBlocks, tile, &ib, &jb);
        const float w = (ib == jb ? 1.f : 2.f) * (kCounted<T> ? unit.factor : 1.f);
        float *to = args.end + ((int64_t(end) * kTiles + tile) * 64 + pipe.warp * 16 + pipe.lane / 4) * kDim +
                    (pipe.lane & 3) * 2;
#pragma unroll
        for (int c = 0; c < 16; ++c) {
          *reinterpret_cast<float2 *>(to + 8 * c) = make_float2(w * acc[n][4 * c], w * acc[n][4 * c + 1]);
          *reinterpret_cast<float2 *>(to + 8 * c + 8 * kDim) =
              make_float2(w * acc[n][4 * c + 2], w * acc[n][4 * c + 3]);
        }
      }
      return;
    }
  }
  // To their places in the slot through 16 KB of shared memory.
  const uint32_t buffer = pipe.s.staging + kGroup * kTile;
  const bool leader = pipe.warp == 0 && pipe.lane == 0;
  const int row = pipe.warp * 16 + (pipe.lane & 15), half = pipe.lane >> 4;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    const int tile = slice * 6 + kGroup * 3 + n;
    tile_pair(kBlocks, min(tile, kTiles - 1), &ib, &jb);
    const float w = (ib == jb ? 1.f : 2.f) * (kCounted<T> ? unit.factor : 1.f);
    if (leader) bulk_store_wait_read<0>();
    named_barrier<3 + kGroup, 128>();
#pragma unroll
    for (int c = 0; c < 16; c += 2)
      stmatrix4(buffer + (c >> 3) * kHalf + row * 128 + ((((c & 7) + half) ^ (row & 7)) << 4),
                pack2<T>(w * acc[n][4 * c], w * acc[n][4 * c + 1]),
                pack2<T>(w * acc[n][4 * c + 2], w * acc[n][4 * c + 3]),
                pack2<T>(w * acc[n][4 * c + 4], w * acc[n][4 * c + 5]),
                pack2<T>(w * acc[n][4 * c + 6], w * acc[n][4 * c + 7]));
    fence_async_proxy();
    named_barrier<3 + kGroup, 128>();
    if (leader && tile < kTiles)
      bulk_store(static_cast<char *>(args.state) + (int64_t(unit.slot) * kTiles + tile) * kTile, buffer, kTile);
  }
}

// Z: A = w_t k_t in two parts (64 features a warpgroup), B = k.
template <typename T, int kGroup, bool kExact>
__device__ __forceinline__ void sum_norm(const UpdateArgs &args, Pipe<kExact> &pipe, int stages,
                                         const volatile UnitMeta &unit) {
  float acc[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) acc[k] = 0.f;
  const int c = pipe.lane & 3;
#pragma unroll 1
  for (int it = 0; it < stages; ++it) {
    pipe.acquire();
    const uint32_t keys = pipe.stage(), weights = pipe.s.weights + pipe.ring.stage * 256 + c * 8;
    uint32_t high[4][4], low[4][4];
#pragma unroll
    for (int ks = 0; ks < 4; ++ks)
      weighed_keys<T>(high[ks], low[ks], keys + kGroup * kHalf, ks * 16, weights + ks * 64, pipe.warp,
                      pipe.lane);
    const uint64_t b = tile_desc(keys, kHalf);
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) {
      wgmma<T, true, true>(acc, high[ks], desc_at(b, ks * 2048));
      wgmma<T, true, true>(acc, low[ks], desc_at(b, ks * 2048));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pipe.release(pipe.ring.stage);
    pipe.ring.next();
  }
  const int row = kGroup * 64 + pipe.warp * 16 + pipe.lane / 4;
  float *z = args.norm + int64_t(unit.slot) * (kDim * kDim) + row * kDim + 2 * c;
  const float f = kCounted<T> ? unit.factor : 1.f;
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    *reinterpret_cast<float2 *>(z + 8 * n) = make_float2(f * acc[4 * n], f * acc[4 * n + 1]);
    *reinterpret_cast<float2 *>(z + 8 * n + 8 * kDim) = make_float2(f * acc[4 * n + 2], f * acc[4 * n + 3]);
  }
}

template <typename T, int kGroup, bool kExact>
__device__ __forceinline__ void consume(const UpdateArgs &args, const Smem<kExact> &s,
                                        const volatile UnitMeta *slots, int tid) {
  Pipe<kExact> pipe{s, tid % 32, tid / 32};
  uint32_t phase = 0;
  for (;; phase ^= 1) {
    barrier_wait(s.unit_full, phase);
    const int slice = __shfl_sync(0xffffffffu, slots[phase].slice, 0);
    const int stages = __shfl_sync(0xffffffffu, slots[phase].stages, 0);
    if (pipe.lane == 0) barrier_arrive(s.unit_empty);
    if (slice < 0) break;
    if (slice < kSlices)
      sum_slice<T, kGroup, kExact>(args, pipe, slice, stages, slots[phase]);
    else
      sum_norm<T, kGroup, kExact>(args, pipe, stages, slots[phase]);
  }
  if (tid == 0) bulk_store_wait();
}

template <typename T, bool kExact>
__global__ void __launch_bounds__(384, 1) update128_kernel(const __grid_constant__ UpdateArgs a) {
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
      consume<T, 0, kExact>(a, s, slots, tid);
    else
      consume<T, 1, kExact>(a, s, slots, tid - 128);
  }
}

template <typename T, bool kExact>
cudaError_t launch(const UpdateArgs &a, int sms, cudaStream_t stream) {
  constexpr int kSmem = Layout<kExact>::kSmem;
  return launch_kernel(update128_kernel<T, kExact>, sms, 384, kSmem, stream, a);
}

}  // namespace

cudaError_t update128(const UpdateArgs &a, int sms, cudaStream_t stream) {
  using B = __nv_bfloat16;
  if (a.p.degree != 2) return cudaErrorInvalidValue;
  if (a.p.half) return a.exact ? launch<__half, true>(a, sms, stream) : launch<__half, false>(a, sms, stream);
  return a.exact ? launch<B, true>(a, sms, stream) : launch<B, false>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
