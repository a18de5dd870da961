// SPDX-License-Identifier: Apache-2.0
// Gradients for head_dim = value_dim = 64. A block owns 128 rows of a chunk, 64 in each consumer warpgroup;
// queries (dq) or keys (dk and dv, everything transposed). With rows x, u and columns z, y:
//   dq: x = q, u = dy, z = k, y = v        dk, dv: x = k, u = v, z = q, y = dy
//   s = x z^T,  m = u y^T,  e = p c gamma s^{p-1} (m - delta) r,  dx += e z        dv += c gamma s^p r y
// r and delta belong to the query, gamma = exp(G_i - G_j), c = scale^p. Phases on the same accumulators:
//   1. state:  T = u S^T per tile (rows (i, j));  dx_j += T_ij x_i, dx_i += T_ij x_j;  keys: dv += phi(x) S
//   2. columns that every row of the tile sees, gates relative to the tile
//   3. the tile's own two blocks, exact gates on the diagonal
// Accumulators hold dx / (p c r) for queries, dx / p for keys: the state's part enters times 1 / p. float16
// rounds weights that are complete, so that they have its range: all factors of a row are in them, accumulators
// hold dx / p and dv, lifted.
#include "gradient_producer.cuh"

namespace powerattn::cuda::sm90 {
namespace {

using Layout = GradientLayout<64>;
using Smem = GradientSmem<64>;
constexpr int kTile = Layout::kTile, kStage = Layout::kStage, kStages = Layout::kStages;

// ---- Consumers ----------------------------------------------------------------------------------------------

template <typename T, int kDegree, bool kKeys, bool kCorrect>
struct Consumer {
  const Smem &s;
  const int warp, group;
  __device__ __forceinline__ int lane() const { return thread_here() & 31; }
  Ring<kStages> ring;
  float dx[32], dv[kKeys ? 32 : 1];
  // float16 with states: x . dx from weights that are not rounded, of which what the two rows of a pair have in
  // common cancels in the gradient of the gates. This lane's part.
  static constexpr bool kDots = kCorrect && kCounted<T>;
  float dots[2] = {0.f, 0.f};
  uint32_t x[4][4], u[4][4];

  __device__ __forceinline__ void acquire() { barrier_wait(s.full + 8 * ring.stage, ring.phase); }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(s.empty + 8 * stage);
  }
  __device__ __forceinline__ uint32_t stage() const { return s.ring + ring.stage * kStage; }
  __device__ __forceinline__ uint32_t meta() const { return s.meta + ring.stage * kMeta; }
  // This warp's own 2 KB.
  __device__ __forceinline__ uint32_t staging() const { return s.staging + (thread_here() >> 5) * 2048; }
  // Row of the unit that this lane's fragments begin with (and the one 8 on).
  __device__ __forceinline__ int local() const { return group * 64 + warp * 16 + lane() / 4; }

  __device__ __forceinline__ void load_rows(uint32_t (&f)[4][4], uint32_t tile) {
    const int row = warp * 16 + (lane() & 15), half = lane() >> 4;
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) ldmatrix4(f[ks], tile + row * 128 + (((2 * ks + half) ^ (row & 7)) << 4));
  }
  // Row g (g + 8) of dx times x0 (x1), of dv times v0 (v1).
  __device__ __forceinline__ void scale(float x0, float x1, float v0, float v1) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      dx[i] *= i & 2 ? x1 : x0;
      if constexpr (kKeys) dv[i] *= i & 2 ? v1 : v0;
    }
  }
  __device__ __forceinline__ void scale(float f0, float f1) { scale(f0, f1, f0, f1); }

  // float16, keys: x times a power of two for each row, which lies in `r`, so that products of two elements
  // have its range.
  __device__ __forceinline__ void scale_x(volatile GradientUnit &unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float power = value_of(scale_row(x, h));
      if ((lane() & 3) == 0) unit.r[local() + 8 * h] = power;
    }
  }
  __device__ __forceinline__ void unscale_x(const volatile GradientUnit &unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float f = 1.f / unit.r[local() + 8 * h];
#pragma unroll
      for (int ks = 0; ks < 4; ++ks) {
        x[ks][h] = mul2<T>(x[ks][h], pack2<T>(f, f));
        x[ks][h + 2] = mul2<T>(x[ks][h + 2], pack2<T>(f, f));
      }
    }
  }

  // dx = 2 Z x (times -delta for queries), in the units of S.
  __device__ __forceinline__ void norm_phase(float d0, float d1, float unit) {
    acquire();
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) {
      if (ks == 0)
        wgmma<T, false, true>(dx, x[ks], tile_desc(stage()));
      else
        wgmma<T, true, true>(dx, x[ks], desc_at(tile_desc(stage()), ks * 2048));
      wgmma<T, true, true>(dx, x[ks], desc_at(tile_desc(stage()), kTile + ks * 2048));
    }
    wgmma_commit();
    wgmma_wait<0>();
    release(ring.stage);
    ring.next();
    const float f0 = kKeys ? 2.f : -2.f * d0, f1 = kKeys ? 2.f : -2.f * d1;
#pragma unroll
    for (int i = 0; i < 32; ++i) dx[i] *= (i & 2 ? f1 : f0) * unit;
  }

  // Keys: x in this warp's shared memory for the state phase, for want of registers.
  __device__ __forceinline__ void put_x() {
    const int row = lane() & 15;
#pragma unroll
    for (int ks = 0; ks < 4; ++ks)
      stmatrix4(staging() + row * 128 + (((2 * ks + (lane() >> 4)) ^ (row & 7)) << 4), x[ks][0], x[ks][1],
                x[ks][2], x[ks][3]);
    __syncwarp();
  }
  __device__ __forceinline__ void take_x() { load_rows(x, staging() - warp * 2048); }
  // (x_j, x_{j+1}) of this lane in block jb: rows g, g + 8.
  __device__ __forceinline__ void block_values(uint32_t (&f)[2], int jb) {
    if constexpr (kKeys) {
      const int row = lane() & 15;
      ldmatrix2(f[0], f[1], staging() + row * 128 + ((jb ^ (row & 7)) << 4));
    } else {
      f[0] = x[jb / 2][(jb & 1) * 2];
      f[1] = x[jb / 2][(jb & 1) * 2 + 1];
    }
  }
  // xs[h]: the eight values x_i, i = 8 ib .., of row g + 8 h.
  __device__ __forceinline__ void row_scalars(uint32_t (&xs)[2][4], int ib) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kKeys) {
        const int row = lane() / 4 + 8 * h;
        const uint4 v = load_u4(staging() + row * 128 + ((ib ^ (row & 7)) << 4));
        xs[h][0] = v.x, xs[h][1] = v.y, xs[h][2] = v.z, xs[h][3] = v.w;
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n)
          xs[h][n] = __shfl_sync(0xffffffffu, x[ib / 2][(ib & 1) * 2 + h], (lane() & ~3) | n);
      }
    }
  }
  // phi(x) fragments of a tile, as in the forward's state phase.
  __device__ __forceinline__ void phi(uint32_t (&a)[4][4], const uint32_t (&xs)[2][4], const uint32_t (&f)[2]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      a[n][0] = mul2<T>(f[0], low2_here(xs[0][n]));
      a[n][1] = mul2<T>(f[1], low2_here(xs[1][n]));
      a[n][2] = mul2<T>(f[0], high2_here(xs[0][n]));
      a[n][3] = mul2<T>(f[1], high2_here(xs[1][n]));
    }
  }
  // t[4 n ..] holds T for i = 8 ib + n and this lane's two j: dx_j += T_ij x_i, side_i += T_ij x_j.
  __device__ __forceinline__ void contract(const float (&t)[32], const uint32_t (&xs)[2][4],
                                           const uint32_t (&f)[2], float (&side)[2][8], int jb) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 xj = kKeys ? unpack2_here<T>(f[h]) : unpack2<T>(f[h]);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const float2 xi = kKeys ? unpack2_here<T>(xs[h][n / 2]) : unpack2<T>(xs[h][n / 2]);
        const float a0 = t[4 * n + 2 * h], a1 = t[4 * n + 2 * h + 1], b0 = t[4 * n + 4 + 2 * h],
                    b1 = t[4 * n + 5 + 2 * h];
        float &x0 = dx[4 * jb + 2 * h], &x1 = dx[4 * jb + 2 * h + 1];  // one fused operation for each product
        x0 += a0 * xi.x, x0 += b0 * xi.y;
        x1 += a1 * xi.x, x1 += b1 * xi.y;
        side[h][n] += a0 * xj.x, side[h][n] += a1 * xj.y;
        side[h][n + 1] += b0 * xj.x, side[h][n + 1] += b1 * xj.y;
      }
    }
  }
  // Sums side over the quad; lane c keeps i = 8 ib + 2c, 2c + 1, the columns of its accumulators.
  __device__ __forceinline__ void reduce_side(float (&side)[2][8], int ib) {
    const bool high = (lane() & 2) != 0, odd = (lane() & 1) != 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float give = high ? side[h][n] : side[h][4 + n], keep = high ? side[h][4 + n] : side[h][n];
        half[n] = keep + __shfl_xor_sync(0xffffffffu, give, 2);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float give = odd ? half[n] : half[2 + n], keep = odd ? half[2 + n] : half[n];
        dx[4 * ib + 2 * h + n] += keep + __shfl_xor_sync(0xffffffffu, give, 1);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) side[h][n] = 0.f;
    }
  }
  // t = u B^T of a tile, without fence and commit.
  __device__ __forceinline__ void times_u(float (&t)[32], uint32_t tile) {
    const uint64_t b = tile_desc(tile);
    wgmma<T, false, false>(t, u[0], b);
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(t, u[ks], desc_at(b, ks * 32));
  }
  // T = u S^T of one tile.
  __device__ __forceinline__ void start_t(float (&t)[32], uint32_t tile) {
    wgmma_fence();
    times_u(t, tile);
    wgmma_commit();
  }

  // Queries: T of the next tile runs while this one is contracted. Keys: dv += phi(x) S of this tile does.
  __device__ __forceinline__ void state_phase() {
    float t[kKeys ? 1 : 2][32], side[2][8] = {};
    uint32_t xs[2][4], f[2], a[4][4];
    int previous = 0;
    if constexpr (!kKeys) {
      acquire();
      start_t(t[0], stage());
    }
#pragma unroll
    for (int ib = 0; ib < 8; ++ib) {
      if constexpr (!kKeys) row_scalars(xs, ib);
#pragma unroll
      for (int jb = ib; jb < 8; ++jb) {
        if constexpr (kKeys) row_scalars(xs, ib);
        const int tile = ib * 8 - ib * (ib - 1) / 2 + jb - ib;
        if constexpr (kKeys) {
          if (tile % 2 == 0) acquire();
          const uint32_t b = stage() + (tile % 2) * kTile;
          start_t(t[0], b);
          wgmma_wait<1>();  // dv of the tile before: its fragments are free
          if (tile % 2 == 0 && tile > 0) release(previous);
          block_values(f, jb);
          phi(a, xs, f);
          wgmma_fence();
#pragma unroll
          for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dv, a[ks], desc_at(tile_desc(b), ks * 2048));
          wgmma_commit();
          wgmma_wait<1>();  // T
          if (tile % 2 == 1) {
            previous = ring.stage;
            ring.next();
          }
          row_scalars(xs, ib);
          block_values(f, jb);
          contract(t[0], xs, f, side, jb);
        } else {
          if (tile < 35) {
            if (tile % 2 == 1) {
              previous = ring.stage;
              ring.next();
              acquire();
            }
            start_t(t[(tile + 1) % 2], stage() + ((tile + 1) % 2) * kTile);
            wgmma_wait<1>();
            if (tile % 2 == 1) release(previous);
          } else {
            wgmma_wait<0>();
            release(ring.stage);
            ring.next();
          }
          block_values(f, jb);
          contract(t[tile % 2], xs, f, side, jb);
        }
      }
      reduce_side(side, ib);
    }
    if constexpr (kKeys) {
      wgmma_wait<0>();
      release(previous);
    }
  }

  // s = x z^T, m = u y^T (without fence and commit)
  __device__ __forceinline__ void scores(float (&t)[32], float (&m)[32]) {
    wgmma<T, false, false>(t, x[0], tile_desc(stage()));
#pragma unroll
    for (int ks = 1; ks < 4; ++ks) wgmma<T, true, false>(t, x[ks], desc_at(tile_desc(stage()), ks * 32));
    times_u(m, stage() + kTile);
  }
  // dx += e z, dv += w y
  __device__ __forceinline__ void accumulate(const uint32_t (&e)[4][4], const uint32_t (&w)[4][4],
                                             uint32_t tile) {
    if constexpr (kKeys) {
#pragma unroll
      for (int ks = 0; ks < 4; ++ks)
        wgmma<T, true, true>(dv, w[ks], desc_at(tile_desc(tile), kTile + ks * 2048));
    }
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(dx, e[ks], desc_at(tile_desc(tile), ks * 2048));
  }

  template <Block kBlock>
  __device__ __forceinline__ void weigh(float (&t)[32], float (&m)[32], const volatile GradientUnit &unit,
                                        float d0, float d1) {
    weigh_gradient<T, kDegree, kKeys, kDots, kBlock>(t, m, dots, meta(), warp * 16 + lane() / 4,
                                                     (lane() & 3) * 2, d0, d1, unit, local());
  }

  // Row factors before the diagonal: queries exp(G_i - block start), keys exp(block end - G_j).
  __device__ __forceinline__ void to_rows(int last) {
    const int row = warp * 16 + lane() / 4;
    const float g0 = load_f1(meta() + kGate + row * 4), g1 = load_f1(meta() + kGate + row * 4 + 32);
    if constexpr (kKeys) {
      const float end = load_f1(meta() + kGate + last * 4);
      scale(exp2_fast(end - g0), exp2_fast(end - g1));
    } else {
      scale(exp2_fast(g0), exp2_fast(g1));
    }
  }

  // Scores of the stage, and what it adds once it is weighed; nothing else is in flight.
  __device__ __forceinline__ void score_block(float (&t)[32], float (&m)[32]) {
    wgmma_fence();
    scores(t, m);
    wgmma_commit();
    wgmma_wait<0>();
  }
  __device__ __forceinline__ void add_block(const float (&t)[32], const float (&m)[32], uint32_t (&e)[4][4],
                                            uint32_t (&w)[4][4]) {
    pack_gradient<T, kKeys>(t, m, e, w);
    wgmma_fence();
    accumulate(e, w, stage());
    wgmma_commit();
    wgmma_wait<0>();
  }

  // `leads`: this warpgroup's diagonal is the first of the tile's own blocks; the other one sees that block
  // whole.
  __device__ __forceinline__ void column_phase(const volatile GradientUnit &unit, bool leads, float d0,
                                               float d1) {
    float t[32], m[32];
    uint32_t e[4][4], w[4][4];
    const int main = unit.main, first = unit.first, own = first + unit.second;
    acquire();
    score_block(t, m);
    // While the block before is accumulated, this one is weighed: only the packing waits for those products,
    // which read e and w. Nothing is in flight across the loop's edge (the compiler would serialise).
    if constexpr (kDots && kKeys) {  // no registers for that
#pragma unroll 1
      for (int n = 0; n < main; ++n) {
        weigh<Block::kFar>(t, m, unit, d0, d1);
        add_block(t, m, e, w);
        release(ring.stage);
        ring.next();
        acquire();
        score_block(t, m);
      }
    } else if (main > 0) {
      weigh<Block::kFar>(t, m, unit, d0, d1);
      pack_gradient<T, kKeys>(t, m, e, w);
#pragma unroll 1
      for (int n = 1; n < main; ++n) {
        const uint32_t before = stage();
        const int index = ring.stage;
        ring.next();
        acquire();
        wgmma_fence();
        scores(t, m);
        wgmma_commit();
        wgmma_fence();
        accumulate(e, w, before);
        wgmma_commit();
        wgmma_wait<1>();
        weigh<Block::kFar>(t, m, unit, d0, d1);
        wgmma_wait<0>();
        release(index);
        pack_gradient<T, kKeys>(t, m, e, w);
      }
      const uint32_t before = stage();
      const int index = ring.stage;
      ring.next();
      acquire();
      wgmma_fence();
      scores(t, m);
      accumulate(e, w, before);
      wgmma_commit();
      wgmma_wait<0>();
      release(index);
    }
#pragma unroll 1
    for (int n = 0; n < own; ++n) {
      if (n > 0) acquire();
      const bool diagonal = leads ? n < first : n >= first;
      if (diagonal || n < first) {
        if (n > 0) {
          score_block(t, m);
        }
        if (diagonal) {
          if (!kCounted<T> && n == (leads ? 0 : first))
            to_rows(min(63, unit.length - 1 - unit.row - (kKeys == leads ? 64 : 0)));
          weigh<Block::kDiagonal>(t, m, unit, d0, d1);
        } else {
          if (!kCounted<T> && n == 0) {
            const float f = load_f1(meta() + kAdvance);
            scale(f, f);
          }
          weigh<Block::kNear>(t, m, unit, d0, d1);
        }
        add_block(t, m, e, w);
      }
      release(ring.stage);
      ring.next();
    }
  }

  // x . dx of this lane's two rows before rounding, for the gate gradient.
  __device__ __forceinline__ void row_dots(float (&dot)[2]) {
    dot[0] = dot[1] = 0.f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 v = unpack2<T>(x[n / 2][(n & 1) * 2 + h]);
        dot[h] += dx[4 * n + 2 * h] * v.x + dx[4 * n + 2 * h + 1] * v.y;
      }
    dot[0] = quad_sum(dot[0]);
    dot[1] = quad_sum(dot[1]);
  }

  __device__ __forceinline__ void epilogue(const GradientArgs &a, const volatile GradientUnit &unit) {
    const int local = group * 64 + warp * 16, row = unit.row + local;
    const float degree = static_cast<float>(kDegree);
    float f0 = degree, f1 = degree, f_v = 1.f;
    if constexpr (kCounted<T>) {
      f0 = f1 = degree / unit.lifts.gradient();
      f_v = 1.f / unit.lifts.weight;
    } else if (!kKeys) {
      f0 *= a.scale_p * unit.r[local + lane() / 4];
      f1 *= a.scale_p * unit.r[local + lane() / 4 + 8];
    }
    if (a.dot || (kCorrect && !kKeys)) {
      float dot[2];
      if constexpr (kDots) {
        dot[0] = quad_sum(dots[0]);
        dot[1] = quad_sum(dots[1]);
      } else {
        row_dots(dot);
      }
      dot[0] *= f0;
      dot[1] *= f1;
      store_dots<kKeys, kCorrect>(a, unit, dot, degree, local, lane());
    }
    const auto at = [&](const Tensor &o) {
      return static_cast<T *>(o.data) + unit.batch * o.stride_b + unit.head * o.stride_h +
             (unit.token + row) * o.stride_t;
    };
    store_rows<T, true>(dx, f0, f1, staging(), a.dx, at(a.dx), unit.length - row, lane());
    if constexpr (kKeys) store_rows<T>(dv, f_v, f_v, staging(), a.dv, at(a.dv), unit.length - row, lane());
  }
};

template <typename T, int kDegree, bool kKeys, bool kCorrect>
__global__ void __launch_bounds__(384, 1)
    gradient64_kernel(const __grid_constant__ GradientArgs a, const __grid_constant__ GradientMaps maps) {
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem s(shared_address(raw));
  GradientUnit *slots = reinterpret_cast<GradientUnit *>(raw + (s.unit - shared_address(raw)));
  const int tid = threadIdx.x, group = __shfl_sync(0xffffffffu, tid / 128, 0);
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(s.full + 8 * i, 1);
      barrier_init(s.empty + 8 * i, kConsumerWarps);
    }
    barrier_init(s.rows_full, 1);
    barrier_init(s.rows_empty, kConsumerWarps);
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernel_before();
  if (group == 2) {
    registers_dec<kProducerRegisters>();
    produce_gradient<T, kDegree, kKeys, 64>(a, maps, s, slots);
  } else {
    registers_inc<kConsumerRegisters>();
    Consumer<T, kDegree, kKeys, kCorrect> c{s, (tid % 128) / 32, group};
    uint32_t phase = 0;
    for (;;) {
      barrier_wait(s.rows_full, phase);
      volatile GradientUnit &unit = slots[phase];
      phase ^= 1;
      if (__shfl_sync(0xffffffffu, unit.head, 0) < 0) break;
      c.load_rows(c.x, s.x(group));
      c.load_rows(c.u, s.u(group));
      __syncwarp();
      if (c.lane() == 0) barrier_arrive(s.rows_empty);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        c.dx[i] = 0.f;
        if constexpr (kKeys) c.dv[i] = 0.f;
      }
      float d0 = 0.f, d1 = 0.f;
      if (!kKeys) {
        d0 = unit.delta[c.local()];
        d1 = unit.delta[c.local() + 8];
      }
      if constexpr (kDegree == 2) {
        if (unit.states) {
          if constexpr (kKeys && kCounted<T>) c.scale_x(unit);
          if (a.norm) c.norm_phase(d0, d1, kCounted<T> ? unit.units.z / unit.units.s : 1.f);
          if constexpr (kKeys) c.put_x();
          c.state_phase();
          leave_state<T, kDegree, kKeys>(c, unit);
          if constexpr (kKeys) c.take_x();
          if constexpr (kKeys && kCounted<T>) c.unscale_x(unit);
        }
      }
      if constexpr (kCounted<T> && !kKeys) {
        d0 *= unit.lifts.ratio;
        d1 *= unit.lifts.ratio;
      }
      if constexpr (kCorrect && (kKeys || c.kDots)) {
        float dot[2];
        c.row_dots(dot);  // zeros without a state
        if constexpr (kKeys) {
          const float factor = static_cast<float>(kDegree) / (kCounted<T> ? unit.lifts.gradient() : 1.f);
          store_state_dots<T>(a, unit, dot, factor, group * 64 + c.warp * 16, c.lane());
        }
        if constexpr (c.kDots) {
          c.dots[0] = (c.lane() & 3) == 0 ? dot[0] : 0.f;
          c.dots[1] = (c.lane() & 3) == 0 ? dot[1] : 0.f;
        }
      }
      c.column_phase(unit, kKeys ? group == 1 : group == 0, d0, d1);
      c.epilogue(a, unit);
    }
  }
}

struct Kernels {
  static constexpr int kShared = Layout::kSmem;
  template <typename T, int kDegree, bool kKeys, bool kCorrect>
  static constexpr auto kernel() {
    return gradient64_kernel<T, kDegree, kKeys, kCorrect>;
  }
};

}  // namespace

cudaError_t gradient64(const GradientArgs &a, int sms, cudaStream_t stream) {
  return launch_gradient<Kernels>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
