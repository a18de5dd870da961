// SPDX-License-Identifier: Apache-2.0
// dq, dk and dv of the attention form in one pass, head_dim = value_dim = 128: the equations of joint64.cu. dk
// and dv take 128 registers, so that the products of one warpgroup do not overlap its own weights; the other
// warpgroup's do. dq of 64 queries is a warpgroup's 64 columns, and a step late: then both have written e.
// Addresses of keys go through here(): their descriptors, kept over the steps, would fill the uniform
// registers.
#include <cstddef>

#include "joint_producer.cuh"

namespace powerattn::cuda::sm90 {
namespace joint {
namespace {

using L = Layout<128>;
constexpr int kTile = L::kTile, kStages = L::kStages, kColumns = 8192;  // of 64 columns

template <typename T, int kDegree>
struct Consumer {
  const Smem<128> &s;
  const int group;
  uint32_t turn = 0;  // steps of 64 queries so far
  uint32_t slot = 0;  // turn % kQueries: where q is
  uint32_t unit = 0;  // its number
  float dk[64], dv[64];
  uint32_t e[4][4], w[4][4];

  __device__ __forceinline__ int lane() const { return thread_here() & 31; }
  __device__ __forceinline__ int warp() const { return thread_here() >> 5 & 3; }
  __device__ __forceinline__ uint32_t q() const { return s.q + slot * kTile; }
  __device__ __forceinline__ uint32_t q_before() const {
    const uint32_t n = here(slot);
    return s.q + (n == 0 ? L::kQueries - 1 : n - 1) * kTile;
  }
  __device__ __forceinline__ uint32_t dy() const { return s.dy + turn % kStages * kTile; }
  __device__ __forceinline__ void arrive(uint32_t bar) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(bar);
  }
  __device__ __forceinline__ uint32_t ds_at(uint32_t n) const { return s.ds + n % L::kHalves * L::kDs; }
  __device__ __forceinline__ int row() const {
    return group * 64 + warp() * 16;
  }  // this warp's first, of the unit
  __device__ __forceinline__ uint32_t unit_at() const {
    return s.unit + unit % kUnits * static_cast<uint32_t>(sizeof(Unit));
  }
  __device__ __forceinline__ float of_key(uint32_t offset, int h) const {
    return joint::of_key(unit_at(), offset, row() + lane() / 4 + 8 * h);
  }

  // Where 16 of the 128 columns of a tile of rows begin.
  static __device__ __forceinline__ constexpr uint32_t columns(int ks) {
    return static_cast<uint32_t>(ks / 4 * kColumns + ks % 4 * 32);
  }

  // s = k q^T, m = v dy^T
  __device__ __forceinline__ void scores(float (&t)[32], float (&m)[32]) {
    const uint64_t k = tile_desc(here(s.keys + group * kTile)), q = tile_desc(this->q()),
                   dy = tile_desc(this->dy());
    wgmma_fence();
    wgmma<T, false, false>(t, k, q);
#pragma unroll
    for (int ks = 1; ks < 8; ++ks) wgmma<T, true, false>(t, desc_at(k, columns(ks)), desc_at(q, columns(ks)));
    wgmma<T, false, false>(m, desc_at(k, 2 * kTile), dy);
#pragma unroll
    for (int ks = 1; ks < 8; ++ks)
      wgmma<T, true, false>(m, desc_at(k, 2 * kTile + columns(ks)), desc_at(dy, columns(ks)));
    wgmma_commit();
  }
  // dv += w dy, dk += e q
  __device__ __forceinline__ void add() {
    const uint64_t q = tile_desc(this->q(), kColumns), dy = tile_desc(this->dy(), kColumns);
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dv, w[ks], desc_at(dy, ks * 2048));
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dk, e[ks], desc_at(q, ks * 2048));
    wgmma_commit();
  }
  // dq of step `n`: this warpgroup's columns of the sum over all 128 keys.
  __device__ __forceinline__ void queries(float (&dq)[32], uint32_t n) {
    const uint64_t a = tile_desc(ds_at(n)), k = tile_desc(here(s.keys + group * kColumns));
    wgmma_fence();
    wgmma<T, false, true>(dq, a, k);
#pragma unroll
    for (int ks = 1; ks < 8; ++ks)
      wgmma<T, true, true>(dq, desc_at(a, ks / 4 * 8192 + ks % 4 * 32),
                           desc_at(k, ks / 4 * kTile + ks % 4 * 2048));
    wgmma_commit();
  }
  // Hands dq of step `n` to the warps that add it up, or finishes it; its operands in dS are free.
  __device__ __forceinline__ void hand_over(float (&dq)[32], uint32_t n, const Maps &maps) {
    arrive(s.ds_free);
    const uint32_t part = here(s.sums) + group * kPart + warp() * 4096,
                   pair = here(s.pair) + n / 2 % kPairs * static_cast<uint32_t>(sizeof(Pair)),
                   full = s.sums_full + 16 * group + 8 * (n / 2 & 1);
    barrier_wait(s.sums_ready + 8 * group, n & 1);
    if (!hand_part(dq, part, pair, full)) return;
    barrier_wait(s.empty + n % kStages * 8, n / kStages & 1);  // the other's dk has been computed from its q
    finish_rows<T, 2>(dq, pair, q_before() + group * kColumns, static_cast<int>(n & 1) * 64, group * 64,
                      maps.dq, lane());
  }

  // 64 queries, from `query` of the unit's own on (kDiagonal). kFirst: no step of the unit came before.
  template <bool kDiagonal, bool kFirst>
  __device__ __forceinline__ void step(int query, const Maps &maps) {
    float t[32], m[32];
    barrier_wait(s.full + turn % kStages * 8, turn / kStages & 1);
    scores(t, m);
    wgmma_wait<0>();
    const uint32_t of = kDiagonal ? offsetof(Unit, key_gate) : offsetof(Unit, key_factor);
    const float keys[2] = {of_key(of, 0), of_key(of, 1)};
    weigh<T, kDegree, kDiagonal>(t, m, s.meta + turn % kStages * kQueryMeta, row() + lane() / 4, query,
                                 (lane() & 3) * 2, keys, power_of<T>(unit_at(), offsetof(Unit, ratio)));
    pack_gradient<T, true>(t, m, e, w);
    // dq of the step before comes first: it is handed over while dk and dv are added to. On the diagonal, whose
    // weights take more registers, it comes last.
    const auto start_queries = [&] {
      barrier_wait(s.ds_full, (turn & 1) ^ 1);
      queries(m, turn - 1);
    };
    const auto release = [&] { arrive(s.empty + turn % kStages * 8); };
    if constexpr (!kDiagonal) start_queries();
    add();
    // dq two steps ago (the first time: of the step before, finish()) has read what lay here.
    barrier_wait(s.ds_free, kFirst ? (turn & 1) ^ 1 : turn & 1);
    store_ds(ds_at(turn) + group * 8192, e, warp(), lane());
    fence_async_proxy();
    if constexpr (kDiagonal && !kFirst) start_queries();
    arrive(s.ds_full);
    if constexpr (!kFirst) {
      wgmma_wait<kDiagonal ? 0 : 1>();
      hand_over(m, turn - 1, maps);
    }
    wgmma_wait<0>();
    await_sent(lane());  // out of q of the step before, which is given back with this one
    release();
    ++turn;
    slot = slot + 1 == L::kQueries ? 0 : slot + 1;
  }
  // dq of a head's last step.
  __device__ __forceinline__ void finish(const Maps &maps) {
    float dq[32];
    barrier_wait(s.ds_full, (turn & 1) ^ 1);
    queries(dq, turn - 1);
    wgmma_wait<0>();
    hand_over(dq, turn - 1, maps);
  }

  __device__ __forceinline__ void epilogue(const JointArgs &a, const Maps &maps, const volatile Unit &u) {
    const float lift = power_of<T>(unit_at(), offsetof(Unit, lift)),
                factor = static_cast<float>(kDegree) / (lift * power_of<T>(unit_at(), offsetof(Unit, ratio)));
    if (a.dot) store_dots<T, 128>(a, u, dk, factor, s.keys + group * kTile, row(), warp(), lane());
    arrive(s.keys_empty);
    // This warp's part serves as staging, when the last pair has left it.
    barrier_wait(s.sums_taken + 8 * ((turn / 2 & 1) ^ 1), ((turn / 2 - 1) >> 1) & 1);
    store_gradient<T, true, 128>(dk, factor, s.sums + group * kPart + warp() * 4096, a.dk, maps.dk, u, row(),
                                 lane());
    store_gradient<T, false, 128>(dv, 1.f / lift, s.sums + group * kPart + warp() * 4096, a.dv, maps.dv, u,
                                  row(), lane());
    await_sent(lane());  // the staging is the sums' again
    arrive(s.unit_empty + unit % kUnits * 8);
  }
};

template <typename T, int kDegree>
__global__ void __launch_bounds__(384, 1)
    joint128_kernel(const __grid_constant__ JointArgs a, const __grid_constant__ Maps maps) {
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem<128> s(shared_address(raw));
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
      barrier_wait(s.keys_full, c.unit & 1);
      const volatile Unit &unit = units[c.unit % kUnits];
      if (__shfl_sync(0xffffffffu, unit.head, 0) < 0) break;
#pragma unroll
      for (int i = 0; i < 64; ++i) c.dk[i] = c.dv[i] = 0.f;
#pragma unroll 1
      for (int head = 0; head < a.p.group; ++head) {
        c.template step<true, true>(0, maps);
        c.template step<true, false>(64, maps);
#pragma unroll 1
        for (int left = __shfl_sync(0xffffffffu, 2 * unit.pairs - 2, 0); left > 0; --left)
          c.template step<false, false>(0, maps);
        c.finish(maps);
      }
      c.epilogue(a, maps, unit);
    }
    await_sent(c.lane());
  }
}

template <typename T>
cudaError_t launch_degree(const JointArgs &a, int sms, cudaStream_t stream) {
  switch (a.p.degree) {
    case 2:
      return launch<128>(joint128_kernel<T, 2>, a, sms, stream);
    case 4:
      return launch<128>(joint128_kernel<T, 4>, a, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace joint

cudaError_t joint128(const JointArgs &a, int sms, cudaStream_t stream) {
  return a.p.half ? joint::launch_degree<__half>(a, sms, stream)
                  : joint::launch_degree<__nv_bfloat16>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
