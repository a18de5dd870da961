// SPDX-License-Identifier: Apache-2.0
// Forward output for head_dim = value_dim = 64: rows of one chunk against the state before the chunk and the
// chunk's own keys. Without a state this is the attention form.
//
// Four producer warps feed a ring of 16 KB stages (two state tiles, or 64 keys and values); two consumer
// warpgroups hold 2 x 64 rows each: row tiles {0, 3} and {1, 2}, so both do the same number of causal blocks.
#include "output_producer.cuh"

namespace powerattn::cuda::sm90 {
namespace {

using Layout = OutputLayout<64>;
using Smem = OutputSmem<64>;
constexpr int kTile = Layout::kTile, kStage = Layout::kStage, kStages = Layout::kStages;

// ---- Consumers ----------------------------------------------------------------------------------------------

// A operand of phi(q) S for tile (ib, jb), k16 step s: rows i = 2s (k < 8) and 2s + 1, columns j.
// q[ks][0..3] is the fragment of columns 16 ks ..; x[h][s] holds (q_i, q_{i+1}), i = 8 ib + 2 s, of row g + 8
// h.
template <typename T>
__device__ __forceinline__ void phi_fragments(uint32_t (&a)[4][4], const uint32_t (&q)[4][4],
                                              const uint32_t (&x)[2][4], int jb) {
  const uint32_t f0 = q[jb / 2][(jb & 1) * 2], f1 = q[jb / 2][(jb & 1) * 2 + 1];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    a[s][0] = mul2<T>(f0, low2(x[0][s]));
    a[s][1] = mul2<T>(f1, low2(x[1][s]));
    a[s][2] = mul2<T>(f0, high2(x[0][s]));
    a[s][3] = mul2<T>(f1, high2(x[1][s]));
  }
}
__device__ __forceinline__ void row_scalars(uint32_t (&x)[2][4], const uint32_t (&q)[4][4], int ib, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int s = 0; s < 4; ++s)
      x[h][s] = __shfl_sync(0xffffffffu, q[ib / 2][(ib & 1) * 2 + h], (lane & ~3) | s);
}

template <typename T, int kDegree>
struct Consumer {
  const Smem &s;
  const int lane;
  // Turns of the ring (8 stages), and the parity of the unit in the top bit: one register.
  uint32_t turn = 0;
  float o[2][32];
  float l[2][2];
  static constexpr bool kStates = kDegree == 2;
  RowUnits<T> units[2];
  uint32_t q[2][4][4];

  __device__ __forceinline__ int index() const { return turn & (kStages - 1); }
  __device__ __forceinline__ int index_before() const { return (turn - 1) & (kStages - 1); }
  __device__ __forceinline__ void acquire() { barrier_wait(s.full + 8 * index(), turn / kStages & 1); }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(s.empty + 8 * stage);
  }
  __device__ __forceinline__ uint32_t stage() const { return s.ring + index() * kStage; }
  __device__ __forceinline__ uint32_t meta() const { return s.meta + index() * kMetaBytes; }

  // Row tile m of the warpgroup, this warp of it, and its shared memory: derived anew at every use, for want of
  // registers.
  __device__ __forceinline__ int warp() const { return thread_here() >> 5 & 3; }
  __device__ __forceinline__ int row_tile(int m) const { return (thread_here() >> 7) ^ (m ? 3 : 0); }
  __device__ __forceinline__ uint32_t staging() const { return s.staging + (thread_here() >> 5) * 2048; }
  __device__ __forceinline__ uint32_t powers() const { return s.powers + (thread_here() >> 5) * 128; }

  template <int m>
  __device__ __forceinline__ void load_queries() {
    const uint32_t tile = s.q + row_tile(m) * kTile;
    const int row = warp() * 16 + (lane & 15), half = lane >> 4;
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) ldmatrix4(q[m][ks], tile + row * 128 + (((2 * ks + half) ^ (row & 7)) << 4));
  }
  // float16: q times a power of two for each row, which shared memory keeps.
  template <int m>
  __device__ __forceinline__ void scale_queries() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t power = scale_row(q[m], h);
      if ((lane & 3) == 0) store_i1(powers() + (m * 16 + lane / 4 + 8 * h) * 4, static_cast<int>(power));
    }
  }

  // O += phi(Q) S over the 36 tiles, fragments of the next tile built while this one multiplies.
  __device__ __forceinline__ void state_phase() {
    uint32_t a[2][2][4][4], x[2][2][4];
    row_scalars(x[0], q[0], 0, lane);
    row_scalars(x[1], q[1], 0, lane);
    phi_fragments<T>(a[0][0], q[0], x[0], 0);
    phi_fragments<T>(a[0][1], q[1], x[1], 0);
    int previous = 0;
#pragma unroll
    for (int ib = 0; ib < 8; ++ib) {
#pragma unroll
      for (int jb = ib; jb < 8; ++jb) {
        const int tile = ib * 8 - ib * (ib - 1) / 2 + jb - ib;  // compile-time after unrolling
        if (tile % 2 == 0) acquire();
        const uint32_t b = stage() + (tile % 2) * kTile;
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int ks = 0; ks < 4; ++ks) {
            if (tile == 0 && ks == 0)
              wgmma<T, false, true>(o[m], a[tile % 2][m][ks], desc_at(tile_desc(b), ks * 2048));
            else
              wgmma<T, true, true>(o[m], a[tile % 2][m][ks], desc_at(tile_desc(b), ks * 2048));
          }
        wgmma_commit();
        wgmma_wait<1>();
        if (tile % 2 == 0 && tile > 0) release(previous);
        if (tile % 2 == 1) {
          previous = index();
          ++turn;
        }
        if (tile < 35) {
          const int ni = jb == 7 ? ib + 1 : ib, nj = jb == 7 ? ib + 1 : jb + 1;
          if (jb == 7) {
            row_scalars(x[0], q[0], ni, lane);
            row_scalars(x[1], q[1], ni, lane);
          }
          phi_fragments<T>(a[(tile + 1) % 2][0], q[0], x[0], nj);
          phi_fragments<T>(a[(tile + 1) % 2][1], q[1], x[1], nj);
        }
      }
    }
    wgmma_wait<0>();
    release(previous);
  }

  // l_i += q_i^T Z q_i with Z = Z_hi + Z_lo: rowsum(Q o (Q Z)).
  __device__ __forceinline__ void norm_phase(float (&t)[2][32]) {
    acquire();
    const uint32_t b = stage();
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int ks = 0; ks < 4; ++ks) {
        if (ks == 0)
          wgmma<T, false, true>(t[m], q[m][ks], tile_desc(b));
        else
          wgmma<T, true, true>(t[m], q[m][ks], desc_at(tile_desc(b), ks * 2048));
        wgmma<T, true, true>(t[m], q[m][ks], desc_at(tile_desc(b), kTile + ks * 2048));
      }
    wgmma_commit();
    wgmma_wait<0>();
    release(index());
    ++turn;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 f = unpack2<T>(q[m][n / 2][(n & 1) * 2 + h]);
          l[m][h] += t[m][4 * n + 2 * h] * f.x + t[m][4 * n + 2 * h + 1] * f.y;
        }
  }

  // S_m = Q_m K^T and O_m += P V, without fence and commit.
  template <int m>
  __device__ __forceinline__ void scores(float (&t)[32], uint32_t keys) {
    wgmma<T, false, false>(t, q[m][0], tile_desc(keys));
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(t, q[m][ks], desc_at(tile_desc(keys), ks * 32));
  }
  template <int m>
  __device__ __forceinline__ void values(const uint32_t (&w)[4][4], uint32_t v) {
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(o[m], w[ks], desc_at(tile_desc(v), ks * 2048));
  }
  // Weights of block r of the tile's own four: rows at r are the diagonal, later ones advance their reference
  // gate to the start of block r + 1 first.
  template <int m>
  __device__ __forceinline__ void weigh_own(float (&t)[32], uint32_t (&w)[4][4], uint32_t md, bool diagonal) {
    if (diagonal) {
      const int row = warp() * 16 + lane / 4;
      decay_rows(o[m], l[m], units[m], exp2_fast(load_f1(md + 256 + row * 4)),
                 exp2_fast(load_f1(md + 288 + row * 4)));
      weigh<T, kDegree, true>(t, w, o[m], l[m], units[m], md, lane, warp());
    } else {
      const float f = load_f1(md + 512);
      decay_rows(o[m], l[m], units[m], f, f);
      weigh<T, kDegree, false>(t, w, o[m], l[m], units[m], md, lane, warp());
    }
  }
  template <int m>
  __device__ __forceinline__ void own_scores(float (&t)[32]) {
    wgmma_fence();
    scores<m>(t, stage());
    wgmma_commit();
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void attention_phase(const volatile UnitMeta &u, float (&t0)[32],
                                                  float (&t1)[32]) {
    const int first = u.row / kKeys;
    // Keys before the tile: every row sees them all. While one row tile is weighed, the tensor cores do the
    // values and the next scores of the other. Nothing is in flight across the loop's edge (the compiler would
    // serialise).
    acquire();
    own_scores<0>(t0);
    uint32_t w0[4][4], w1[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) w1[i / 4][i % 4] = 0;  // nothing yet: the first product adds zeros
    uint32_t v = stage() + kTile;                       // values that w1 belongs to
#pragma unroll 1
    for (int j = 0; j < first; ++j) {
      const uint32_t keys = stage(), md = meta();
      wgmma_fence();
      values<1>(w1, v);
      scores<1>(t1, keys);
      wgmma_commit();
      weigh<T, kDegree, false>(t0, w0, o[0], l[0], units[0], md, lane, warp());
      wgmma_wait<0>();
      if (j > 0) release(index_before());
      ++turn;
      acquire();
      v = keys + kTile;
      wgmma_fence();
      values<0>(w0, v);
      scores<0>(t0, stage());
      wgmma_commit();
      weigh<T, kDegree, false>(t1, w1, o[1], l[1], units[1], md, lane, warp());
      wgmma_wait<0>();
    }
    if (first > 0) {
      wgmma_fence();
      values<1>(w1, v);
      wgmma_commit();
      wgmma_wait<0>();
      release(index_before());
    }
    // The tile's own blocks, as many as there are; t0 of the first is there. Row tile m ends at its own row.
    // While both are at work, as before.
    const int own = u.blocks - first;
    const int m0 = __shfl_sync(0xffffffffu, row_tile(0), 0);  // known to be the same for all: C7520 otherwise
    wgmma_fence();
    scores<1>(t1, stage());
    wgmma_commit();
    weigh_own<0>(t0, w0, meta(), m0 == 0);
    wgmma_wait<0>();
    int r = 0;
#pragma unroll 1
    for (; r < m0 && r + 1 < own; ++r) {
      const uint32_t md = meta();
      v = stage() + kTile;
      ++turn;
      acquire();
      wgmma_fence();
      values<0>(w0, v);
      scores<0>(t0, stage());
      wgmma_commit();
      weigh_own<1>(t1, w1, md, false);
      wgmma_wait<0>();
      wgmma_fence();
      values<1>(w1, v);
      scores<1>(t1, stage());
      wgmma_commit();
      weigh_own<0>(t0, w0, meta(), r + 1 == m0);
      wgmma_wait<0>();
      release(index_before());
    }
    v = stage() + kTile;
    wgmma_fence();
    values<0>(w0, v);
    wgmma_commit();
    weigh_own<1>(t1, w1, meta(), r == (3 - m0));
    wgmma_wait<0>();
#pragma unroll 1
    for (; r < (3 - m0) && r + 1 < own; ++r) {
      v = stage() + kTile;
      ++turn;
      acquire();
      wgmma_fence();
      values<1>(w1, v);
      scores<1>(t1, stage());
      wgmma_commit();
      wgmma_wait<0>();
      release(index_before());
      weigh_own<1>(t1, w1, meta(), r + 1 == (3 - m0));
    }
    wgmma_fence();
    values<1>(w1, stage() + kTile);
    wgmma_commit();
    wgmma_wait<0>();
    release(index());
    ++turn;
#pragma unroll 1
    for (++r; r < own; ++r) {  // the other warpgroup's
      acquire();
      release(index());
      ++turn;
    }
  }

  template <int m>
  __device__ __forceinline__ void epilogue(const OutputArgs &a, const TileMap &map,
                                           const volatile UnitMeta &u) {
    const int lane = thread_here() & 31;
    float norm[2], f[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float unit = units[m][h] * weight_power<T, kDegree>(powers() + (m * 16 + lane / 4 + 8 * h) * 4);
      f[h] = output_factor(a.p, quad_sum(l[m][h]), unit, &norm[h]);
    }
    const int row = u.row + row_tile(m) * 64 + warp() * 16;
    await_sent(lane);
    if (can_send(map, row, u.length))
      send_rows<T>(o[m], f[0], f[1], staging(), map, 0, static_cast<int>(u.token) + row, u.head, u.batch, lane);
    else
      store_rows<T>(o[m], f[0], f[1], staging(), a.y,
                    static_cast<T *>(a.y.data) + u.batch * a.y.stride_b + u.head * a.y.stride_h +
                        (u.token + row) * a.y.stride_t,
                    u.length - row, lane);
    if (a.row_norm.data && (lane & 3) == 0) {
      float *r = static_cast<float *>(a.row_norm.data) + u.batch * a.row_norm.stride_b +
                 u.head * a.row_norm.stride_h + (u.token + row + lane / 4) * a.row_norm.stride_t;
      if (row + lane / 4 < u.length) r[0] = norm[0];
      if (row + lane / 4 + 8 < u.length) r[8 * a.row_norm.stride_t] = norm[1];
    }
  }
};

template <typename T, int kDegree>
__global__ void __launch_bounds__(384, 1)
    output64_kernel(const __grid_constant__ OutputArgs a, const __grid_constant__ OutputMaps maps) {
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem s(shared_address(raw));
  UnitMeta *slots = reinterpret_cast<UnitMeta *>(raw + (s.unit - shared_address(raw)));
  const int tid = threadIdx.x, group = tid / 128;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(s.full + 8 * i, 1);
      barrier_init(s.empty + 8 * i, kConsumerWarps);
    }
    barrier_init(s.q_full, 1);
    barrier_init(s.q_empty, kConsumerWarps);
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernel_before();
  if (group == 2) {
    registers_dec<kProducerRegisters>();
    produce_output<T, kDegree, 64>(a, maps, s, slots);
  } else {
    registers_inc<kConsumerRegisters>();
    Consumer<T, kDegree> c{s, tid % 32};
    for (;; c.turn ^= 1u << 31) {
      barrier_wait(s.q_full, c.turn >> 31);
      const volatile UnitMeta &u = slots[c.turn >> 31];  // stays until this unit's successor is taken
      if (u.head < 0) break;
      c.template load_queries<0>();
      c.template load_queries<1>();
      __syncwarp();
      if (c.lane == 0) barrier_arrive(s.q_empty);

      if constexpr (kCounted<T>) {
        c.template scale_queries<0>();
        c.template scale_queries<1>();
      }

      float t0[32], t1[32];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        c.units[m].start();
        c.l[m][0] = c.l[m][1] = 0.f;
#pragma unroll
        for (int i = 0; i < 32; ++i) c.o[m][i] = 0.f;
      }
      if constexpr (c.kStates) {
        if (u.states) {
          c.state_phase();
          if (a.norm) {
            float t[2][32];
            c.norm_phase(t);
          }
          begin_rows(c.o[0], c.l[0], c.units[0], u);
          begin_rows(c.o[1], c.l[1], c.units[1], u);
        }
      }
      c.attention_phase(u, t0, t1);
      c.template epilogue<0>(a, maps.y, u);
      c.template epilogue<1>(a, maps.y, u);
    }
    await_sent(c.lane);
  }
}

struct Kernels {
  static constexpr int kShared = Layout::kSmem;
  template <typename T, int kDegree>
  static constexpr auto kernel() {
    return output64_kernel<T, kDegree>;
  }
};

}  // namespace

cudaError_t output64(const OutputArgs &a, int sms, cudaStream_t stream) {
  return launch_output<Kernels>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
