// SPDX-License-Identifier: Apache-2.0
// dq, dk and dv of the attention form in one pass, head_dim = value_dim = 64. A block owns 128 keys, 64 in each
// consumer warpgroup, and sees 128 queries at a time, in two halves. For keys j, queries i >= j:
//   s = k q^T,  m = v dy^T                                            (rows: keys)
//   w = c exp(G_i - G_j) r_i s^p,  e = c exp(G_i - G_j) r_i s^{p-1} (m - delta_i)
//   dv += w dy,  dk += e q,  dq_i = sum_j e_ji k_j                    (dq and dk: times p, later)
// e goes through shared memory, transposed, for dq: each warpgroup takes 64 of the 128 queries and all keys,
// once both have written theirs, while the scores of the next queries are under way.
#include <cstddef>

#include "joint_producer.cuh"

namespace powerattn::cuda::sm90 {
namespace joint {
namespace {

using L = Layout<64>;
constexpr int kTile = L::kTile, kStages = L::kStages, kHalves = L::kHalves;
constexpr uint32_t kQueries = L::kQueries;

// Few registers are left beside the products: of the rings it keeps one count, and what it needs of the unit it
// reads where it is used.
template <typename T, int kDegree>
struct Consumer {
  const Smem<64> &s;
  const int group;
  uint32_t turn = 0;    // halves so far: the next stage of the ring; and twice the pairs
  uint32_t slot = 0;    // turn % kQueries: where q is
  uint32_t half = 0;    // turn % kHalves at the pair's begin
  uint32_t unit = 0;    // its number
  uint32_t before = 0;  // the unit of the last pair
  float dk[32], dv[32];
  uint32_t e[4][4], w[4][4];

  __device__ __forceinline__ int lane() const { return thread_here() & 31; }
  __device__ __forceinline__ int warp() const { return thread_here() >> 5 & 3; }
  // q and dy of half turn - ago.
  __device__ __forceinline__ uint32_t q(uint32_t ago) const {
    return s.q + (slot >= ago ? slot - ago : slot + kQueries - ago) * kTile;
  }
  __device__ __forceinline__ uint32_t q_before() const {  // of this warpgroup's half of the last pair
    const uint32_t n = here(slot) + kQueries - 2 + static_cast<uint32_t>(group);
    return s.q + (n < kQueries ? n : n - kQueries) * kTile;
  }
  __device__ __forceinline__ uint32_t dy(uint32_t ago) const { return s.dy + (turn - ago) % kStages * kTile; }
  __device__ __forceinline__ void next() {
    ++turn;
    slot = slot + 1 == kQueries ? 0 : slot + 1;
  }
  __device__ __forceinline__ uint32_t meta(uint32_t n) const { return s.meta + n % kStages * kQueryMeta; }
  __device__ __forceinline__ uint32_t keys(uint32_t n) const { return s.keys + n % L::kKeySlots * (4 * kTile); }
  __device__ __forceinline__ void acquire() { barrier_wait(s.full + turn % kStages * 8, turn / kStages & 1); }
  __device__ __forceinline__ void arrive(uint32_t bar) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(bar);
  }
  __device__ __forceinline__ void release(uint32_t n) { arrive(s.empty + n % kStages * 8); }
  // Parity of the barriers' phase of the pair before.
  __device__ __forceinline__ uint32_t pair_phase() const { return (turn / 2 & 1) ^ 1; }
  __device__ __forceinline__ uint32_t ds_at(uint32_t n) const {
    return s.ds + (n >= kHalves ? n - kHalves : n) * (2 * kTile);
  }
  __device__ __forceinline__ int row() const {
    return group * 64 + warp() * 16;
  }  // this warp's first, of the unit
  __device__ __forceinline__ uint32_t unit_at() const {
    return s.unit + unit % kUnits * static_cast<uint32_t>(sizeof(Unit));
  }
  __device__ __forceinline__ float of_key(uint32_t offset, int h) const {
    return joint::of_key(unit_at(), offset, row() + lane() / 4 + 8 * h);
  }

  // s = k q^T, m = v dy^T (all without fence and commit)
  __device__ __forceinline__ void scores(float (&t)[32], float (&m)[32]) {
    const uint64_t k = tile_desc(keys(unit) + group * kTile), q = tile_desc(this->q(0)),
                   dy = tile_desc(this->dy(0));
    wgmma<T, false, false>(t, k, q);
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(t, desc_at(k, ks * 32), desc_at(q, ks * 32));
    wgmma<T, false, false>(m, desc_at(k, 2 * kTile), dy);
#pragma unroll
    for (int ks = 1; ks < 4; ++ks)
      wgmma<T, true, false>(m, desc_at(k, 2 * kTile + ks * 32), desc_at(dy, ks * 32));
  }
  // dv += w dy
  __device__ __forceinline__ void values(uint32_t tile) {
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dv, w[ks], desc_at(tile_desc(tile), ks * 2048));
  }
  // dk += e q
  __device__ __forceinline__ void keys_of(uint32_t tile) {
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dk, e[ks], desc_at(tile_desc(tile), ks * 2048));
  }
  // dq of this warpgroup's half of the last pair: the sum over all 128 keys.
  __device__ __forceinline__ void queries(float (&dq)[32]) {
    const uint32_t n =
        turn > 0 ? half + 1 + static_cast<uint32_t>(group) : 2;  // at first what nobody writes yet
    const uint64_t a = tile_desc(ds_at(n % kHalves)), k = tile_desc(keys(before));
    wgmma<T, false, true>(dq, a, k);
#pragma unroll
    for (int n = 1; n < 8; ++n)
      wgmma<T, true, true>(dq, desc_at(a, (n / 4) * kTile + (n % 4) * 32), desc_at(k, n * 2048));
  }
  // Hands dq of the last pair to the warp that adds it up, or finishes it; the operands in dS are free.
  __device__ __forceinline__ void hand_over(float (&dq)[32], const Maps &maps) {
    if (group == 0) arrive(s.ds_free);
    const uint32_t part = s.sums + group * kPart + warp() * 4096,
                   pair = s.pair + (turn / 2 - 1) % kPairs * static_cast<uint32_t>(sizeof(Pair)),
                   full = s.sums_full + 16 * group + 8 * pair_phase();
    barrier_wait(s.sums_ready + 8 * group, pair_phase());
    if (!hand_part(dq, part, pair, full)) return;
    // q makes room when no warp computes dk from it any more; of the first half, that was before e of the
    // second.
    if (group == 1) {
      named_barrier<2, 128>();
      barrier_wait(s.ds_free, pair_phase());
    }
    finish_rows<T, 1>(dq, pair, q_before(), group * 64, 0, maps.dq, lane());
  }

  template <bool kDiagonal>
  __device__ __forceinline__ void weigh(float (&t)[32], float (&m)[32], int query) {
    const uint32_t of = kDiagonal ? offsetof(Unit, key_gate) : offsetof(Unit, key_factor);
    const float keys[2] = {of_key(of, 0), of_key(of, 1)};
    joint::weigh<T, kDegree, kDiagonal>(t, m, meta(turn), row() + lane() / 4, query, (lane() & 3) * 2, keys,
                                        power_of<T>(unit_at(), offsetof(Unit, ratio)));
  }

  // 128 queries. Nothing is in flight across its ends (the compiler would serialise). What the last half left
  // to be added up is added here, but for the first pair of a head, and dq of the pair before, which may have
  // been another unit's.
  template <bool kFirst>
  __device__ __forceinline__ void two_halves(const Maps &maps) {
    float t[32], m[32], dq[32];
    acquire();
    wgmma_fence();
    scores(t, m);
    wgmma_commit();
    if constexpr (!kFirst) {
      add();
      wgmma_wait<1>();  // w is free: its registers are needed
    }
    start_queries(dq);  // before the first unit: of nothing, and for no one
    if constexpr (kFirst) wgmma_wait<1>();
    weigh<kFirst>(t, m, 0);
    if constexpr (!kFirst) wgmma_wait<1>();
    pack_gradient<T, true>(t, m, e, w);
    store_ds(ds_at(half) + group * kTile, e, warp(), lane());
    wgmma_wait<0>();
    if (!kFirst || turn > 0) hand_over(dq, maps);
    if constexpr (kFirst) {
      if (before != unit) arrive(s.keys_empty + before % L::kKeySlots * 8);
      before = unit;
    }

    next();
    acquire();
    wgmma_fence();
    scores(t, m);
    wgmma_commit();
    add();
    wgmma_wait<2>();
    weigh<kFirst>(t, m, 64);
    wgmma_wait<0>();
    await_sent(lane());  // out of the last pair's q
    if (!kFirst || turn > 1) release(turn - 2);
    release(turn - 1);
    pack_gradient<T, true>(t, m, e, w);
    barrier_wait(s.ds_free, pair_phase());  // dq of the pair before has read what lay here
    store_ds(ds_at(half + 1) + group * kTile, e, warp(), lane());
    fence_async_proxy();
    arrive(s.ds_full);
    next();
    half = half == 0 ? 2 : half - 1;
  }
  __device__ __forceinline__ void add() {  // of the half before
    wgmma_fence();
    values(dy(1));
    wgmma_commit();
    wgmma_fence();
    keys_of(q(1));
    wgmma_commit();
  }
  __device__ __forceinline__ void start_queries(float (&dq)[32]) {
    barrier_wait(s.ds_full, pair_phase());
    wgmma_fence();
    queries(dq);
    wgmma_commit();
  }
  // What the last half of a head leaves to be added up.
  __device__ __forceinline__ void finish() {
    add();
    wgmma_wait<0>();
  }
  // dq of the very last pair.
  __device__ __forceinline__ void finish_queries(const Maps &maps) {
    float dq[32];
    start_queries(dq);
    wgmma_wait<0>();
    hand_over(dq, maps);
  }

  __device__ __forceinline__ void epilogue(const JointArgs &a, const Maps &maps, const volatile Unit &u) {
    const float lift = power_of<T>(unit_at(), offsetof(Unit, lift)),
                factor = static_cast<float>(kDegree) / (lift * power_of<T>(unit_at(), offsetof(Unit, ratio)));
    if (a.dot) store_dots<T, 64>(a, u, dk, factor, keys(unit) + group * kTile, row(), warp(), lane());
    // What the next half's e takes serves as staging: when the other warpgroup has written the last half's, it
    // has read this.
    barrier_wait(s.ds_full, pair_phase());
    const uint32_t staging = ds_at(half) + group * kTile + warp() * 2048;
    store_gradient<T, true, 64>(dk, factor, staging, a.dk, maps.dk, u, row(), lane());
    store_gradient<T, false, 64>(dv, 1.f / lift, staging, a.dv, maps.dv, u, row(), lane());
    await_sent(lane());
    if (group == 0)  // e of a warp goes to all rows
      named_barrier<1, 128>();
    else
      named_barrier<2, 128>();
    arrive(s.unit_empty + unit % kUnits * 8);
  }
};

template <typename T, int kDegree>
__global__ void __launch_bounds__(384, 1)
    joint64_kernel(const __grid_constant__ JointArgs a, const __grid_constant__ Maps maps) {
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem<64> s(shared_address(raw));
  Unit *units = reinterpret_cast<Unit *>(raw + (s.unit - shared_address(raw)));
  const int tid = threadIdx.x, group = __shfl_sync(0xffffffffu, tid / 128, 0);
  if (tid == 0) init_barriers(s);
  __syncthreads();
  wait_for_kernel_before();
  if (group == 2) {
    registers_dec<kProducerRegisters>();
    serve<T>(a, maps, s, units, tid);
  } else {
    registers_inc<kConsumerRegisters>();
    Consumer<T, kDegree> c{s, group};
    for (;; ++c.unit) {
      barrier_wait(s.keys_full + c.unit % L::kKeySlots * 8, c.unit / L::kKeySlots & 1);
      const volatile Unit &unit = units[c.unit % kUnits];
      if (__shfl_sync(0xffffffffu, unit.head, 0) < 0) break;
#pragma unroll
      for (int i = 0; i < 32; ++i) c.dk[i] = c.dv[i] = 0.f;
#pragma unroll 1
      for (int head = 0; head < a.p.group; ++head) {
        c.template two_halves<true>(maps);
        const int pairs = __shfl_sync(0xffffffffu, unit.pairs, 0);
#pragma unroll 1
        for (int n = 1; n < pairs; ++n) c.template two_halves<false>(maps);
        c.finish();
      }
      c.epilogue(a, maps, unit);
    }
    if (c.turn > 0) c.finish_queries(maps);
    await_sent(c.lane());
  }
}

template <typename T>
cudaError_t launch_degree(const JointArgs &a, int sms, cudaStream_t stream) {
  switch (a.p.degree) {
    case 2:
      return launch<64>(joint64_kernel<T, 2>, a, sms, stream);
    case 4:
      return launch<64>(joint64_kernel<T, 4>, a, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace joint

cudaError_t joint64(const JointArgs &a, int sms, cudaStream_t stream) {
  return a.p.half ? joint::launch_degree<__half>(a, sms, stream)
                  : joint::launch_degree<__nv_bfloat16>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
