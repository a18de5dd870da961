// SPDX-License-Identifier: Apache-2.0
// What carries dq of the joint gradient kernel away: two warps add it to its sums, or bring the sums to the
// consumers, who finish them.
#pragma once

#include "joint.cuh"

namespace powerattn::cuda::sm90 {

namespace joint {

// The sum of queries i is, in this order, the dq of key blocks i, i - 1, .. 0: `turns` counts them. The parts
// of 128 queries follow one another in the two buffers: 64 queries each, or (head_dim 128) 64 columns of them.
// Every second pair of 128 queries is this warp's: while one pair's copies are under way, and the turn is
// passed on, the other warp has the next.
// Key block 0 is the last: there the buffers bring the sum before to the consumers, who finish it.
template <int kDim>
struct Adder {
  static constexpr uint32_t kParts = 2 * kDim / 64, kSteps = kParts / 2;  // of a pair; in each buffer
  const Smem<kDim> &s;
  Pair *const pairs;
  const uint32_t warp;
  uint32_t count = 0;  // pairs so far, of both warps

  __device__ __forceinline__ volatile Pair &pair() const { return pairs[count % kPairs]; }
  __device__ __forceinline__ uint32_t buffer(uint32_t part) const { return s.sums + (part & 1) * kPart; }
  __device__ __forceinline__ uint32_t ready(uint32_t part) const { return s.sums_ready + 8 * (part & 1); }
  __device__ __forceinline__ void await_part(uint32_t part) const {
    barrier_wait(s.sums_full + 16 * (part & 1) + 8 * warp, ((count >> 1) * kSteps + (part >> 1)) & 1);
  }
  // The other warp has read the pair before.
  __device__ __forceinline__ void await_buffers() const {
    if (count > 0) barrier_wait(s.sums_taken + 8 * (warp ^ 1), (count - 1) >> 1 & 1);
  }

  // A pair to add up. Within a unit its buffers were given to the consumers by the warp with the pair before,
  // as soon as it had read them: not by this one, which may be waiting for its last sum.
  __device__ __forceinline__ void add_up(bool first, bool last) const {
    if (first) {
      await_buffers();
      barrier_arrive(ready(0));
      barrier_arrive(ready(1));
    }
    const int before = pair().before;
    await_turn(pair().turn, before);
    if (!last) pairs[(count + 1) % kPairs].mode = kPartOnly;
#pragma unroll 1
    for (uint32_t i = 0; i < kParts; ++i) {
      await_part(i);
      if (before == 0)
        bulk_store(pair().sum + i * (kPart / 4), buffer(i), kPart);
      else
        bulk_add(pair().sum + i * (kPart / 4), buffer(i), kPart);
      bulk_store_wait_read<0>();
      if (i + 2 < kParts || !last) barrier_arrive(ready(i));
    }
    barrier_arrive(s.sums_taken + 8 * warp);
    bulk_store_wait<0>();
    pass_turn(pair().turn, before + 1);
  }

  // A pair that the consumers finish: its buffers bring them the sum before, if there is one.
  __device__ __forceinline__ void offer(uint32_t part) const {
    if (pair().mode == kFinish) {
      barrier_expect(ready(part), kPart);
      bulk_load(buffer(part), pair().sum + part * (kPart / 4), kPart, ready(part));
    } else {
      barrier_arrive(ready(part));
    }
  }
  __device__ __forceinline__ void bring() const {
    if (pair().mode == kFinish) await_turn(pair().turn, pair().before);
    await_buffers();
    offer(0);
    offer(1);
#pragma unroll 1
    for (uint32_t i = 0; i < kParts; ++i) {
      await_part(i);
      if (i + 2 < kParts) offer(i + 2);
    }
    barrier_arrive(s.sums_taken + 8 * warp);
  }
  // Pair `n` of the unit's queries and a query head of the group; the mode of one to add up, but for a unit's
  // first, is known from the pair before.
  __device__ __forceinline__ void describe(const JointArgs &a, const volatile Unit &u, int head, int n) const {
    volatile Pair &p = pair();
    const int64_t at = u.slot + int64_t(n) * a.p.heads_q + head;
    p.sum = a.sums + at * (kJointRows * kDim);
    p.turn = a.turns + at;
    p.before = n;
    if (u.row > 0) {
      if (head == 0 && n == 0) p.mode = kPartOnly;
      return;
    }
    p.mode = n > 0 ? kFinish : kFinishAlone;
    p.rows = u.length - n * kJointRows;
    p.factor = static_cast<float>(a.p.degree) / (u.lift * u.ratio);
    p.vector = a.dq.vector;
    p.floats = a.dq.floats;
    p.stride = a.dq.stride_t;
    p.batch = u.batch;
    p.head = u.head * a.p.group + head;
    const int64_t token = u.token + n * kJointRows;
    p.token = static_cast<int32_t>(token);
    p.dq = const_cast<uint16_t *>(row_pointer<uint16_t>(a.dq, p.batch, p.head, token));
    p.with_dot = a.q_dot != nullptr;
    p.dot = a.q_dot + token_row(a.p, p.batch, a.p.heads_q, p.head, token);
  }
};

template <int kDim>
__device__ __forceinline__ void add_queries(const JointArgs &a, const Smem<kDim> &s, Unit *units, uint32_t warp,
                                            int lane) {
  Adder<kDim> adder{s, reinterpret_cast<Pair *>(units + kUnits), warp};
  for (uint32_t index = 0;; ++index) {
    const uint32_t slot = index % kUnits;
    barrier_wait(s.posted + 8 * slot, index / kUnits & 1);
    const volatile Unit &u = units[slot];
    const bool last = u.head < 0;
    __syncwarp();  // all lanes have seen the unit before one of them gives it back
    if (last) break;
    if (lane == 0) {
#pragma unroll 1
      for (int head = 0; head < a.p.group; ++head) {
#pragma unroll 1
        for (int n = 0; n < u.pairs; ++n, ++adder.count) {
          if ((adder.count & 1) != warp) continue;
          adder.describe(a, u, head, n);
          if (u.row > 0)
            adder.add_up(head == 0 && n == 0, head + 1 == a.p.group && n + 1 == u.pairs);
          else
            adder.bring();
        }
      }
      barrier_arrive(s.unit_empty + 8 * slot);
    }
  }
}

}  // namespace joint

}  // namespace powerattn::cuda::sm90
