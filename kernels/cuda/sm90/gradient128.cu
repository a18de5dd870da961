// SPDX-License-Identifier: Apache-2.0
// Gradients for head_dim = value_dim = 128; equations, phases and units of gradient64.cu. A row tile of 64 x
// 128 sums is 64 registers (dq) or twice that (dk and dv), so x and u stay in shared memory: the scores take
// them from there as the A operand, and the state phase reads the few fragments a tile of the state needs.
#include "gradient_producer.cuh"

namespace powerattn::cuda::sm90 {
namespace {

using Layout = GradientLayout<128>;
using Smem = GradientSmem<128>;
constexpr int kTile = Layout::kTile, kStage = Layout::kStage, kStages = Layout::kStages;
constexpr int kHalf = kTile / 2;  // 64 rows x 64 columns
constexpr int kBlocks = 16;       // of 8 features

template <typename T, int kDegree, bool kKeys, bool kCorrect>
struct Consumer {
  const Smem &s;
  // Turns of the ring (4 stages), and the parity of the unit in the top bit: one register.
  uint32_t turn = 0;
  float dx[64], dv[kKeys ? 64 : 1];

  // Derived anew at every use: addresses kept over the loops would cost registers that the sums do not leave.
  __device__ __forceinline__ int lane() const { return thread_here() & 31; }
  __device__ __forceinline__ int warp() const { return thread_here() >> 5 & 3; }
  __device__ __forceinline__ int group() const { return thread_here() >> 7; }
  // Row that this lane's fragments begin with (and row + 8), of the warpgroup's and of the unit's.
  __device__ __forceinline__ int row() const { return warp() * 16 + lane() / 4; }
  __device__ __forceinline__ int local() const { return group() * 64 + row(); }
  __device__ __forceinline__ uint32_t x() const { return s.x(group()); }
  __device__ __forceinline__ uint32_t u() const { return s.u(group()); }

  __device__ __forceinline__ int index() const { return turn & (kStages - 1); }
  __device__ __forceinline__ void acquire() { barrier_wait(s.full + 8 * index(), turn / kStages & 1); }
  __device__ __forceinline__ void release() {  // and on to the next stage
    __syncwarp();
    if (lane() == 0) barrier_arrive(s.empty + 8 * index());
    ++turn;
  }
  __device__ __forceinline__ uint32_t stage() const { return s.ring + index() * kStage; }
  __device__ __forceinline__ uint32_t meta() const { return s.meta + index() * kMeta; }

  // Row g (g + 8) of dx times x0 (x1), of dv times v0 (v1).
  __device__ __forceinline__ void scale(float x0, float x1, float v0, float v1) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      dx[i] *= i & 2 ? x1 : x0;
      if constexpr (kKeys) dv[i] *= i & 2 ? v1 : v0;
    }
  }
  __device__ __forceinline__ void scale(float f0, float f1) { scale(f0, f1, f0, f1); }

  // t (+)= A B^T of two tiles of 64 x 128 in shared memory, without fence and commit.
  __device__ __forceinline__ void inner(float (&t)[32], uint32_t a, uint32_t b) {
    const uint64_t x = tile_desc(a), y = tile_desc(b);
#pragma unroll
    for (int ks = 0; ks < 8; ++ks) {
      const uint32_t at = ks / 4 * kHalf + ks % 4 * 32;
      if (ks == 0)
        wgmma<T, false, false>(t, desc_at(x, at), desc_at(y, at));
      else
        wgmma<T, true, false>(t, desc_at(x, at), desc_at(y, at));
    }
  }
  // sum += A B, A in registers: 64 rows of B.
  __device__ __forceinline__ void outer(float (&sum)[64], const uint32_t (&a)[4][4], uint32_t b) {
    const uint64_t y = tile_desc(b, kHalf);
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(sum, a[ks], desc_at(y, ks * 2048));
  }

  // float16, keys: x, in place, times a power of two for each row, which lies in `r`, so that products of two
  // elements have its range; and back. Sixteen lanes have a row of 128.
  template <bool kBack>
  __device__ __forceinline__ void scale_x(volatile GradientUnit &unit) {
    const int piece = lane() & 15;
#pragma unroll 1
    for (int i = lane() >> 4; i < 16; i += 2) {
      const int row = warp() * 16 + i;
      const uint32_t at = x() + (piece >> 3) * kHalf + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
      const uint4 v = load_u4(at);
      uint32_t power;
      if constexpr (kBack) {
        const float f = 1.f / unit.r[group() * 64 + row];
        power = pack2<T>(f, f);
      } else {
        power = row_power(v);
        if (piece == 0) unit.r[group() * 64 + row] = value_of(power);
      }
      store_u4(at, times(v, power));
    }
    // For the products of the whole warpgroup.
    fence_async_proxy();
    if (group() == 0)
      named_barrier<2, 128>();
    else
      named_barrier<3, 128>();
  }

  // dx = 2 Z x (times -delta for queries), in the units of S; Z's high and low part are a stage each.
  __device__ __forceinline__ void norm_phase(float d0, float d1, float unit) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      acquire();
      const uint64_t a = tile_desc(x()), z = tile_desc(stage(), kHalf);
      wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 8; ++ks) {
        const uint64_t p = desc_at(a, ks / 4 * kHalf + ks % 4 * 32),
                       q = desc_at(z, ks / 4 * kTile + ks % 4 * 2048);
        if (part == 0 && ks == 0)
          wgmma<T, false, true>(dx, p, q);
        else
          wgmma<T, true, true>(dx, p, q);
      }
      wgmma_commit();
      wgmma_wait<0>();
      release();
    }
    const float f0 = kKeys ? 2.f : -2.f * d0, f1 = kKeys ? 2.f : -2.f * d1;
#pragma unroll
    for (int i = 0; i < 64; ++i) dx[i] *= (i & 2 ? f1 : f0) * unit;
  }

  // xs[h]: the eight values x_i, i = 8 ib .., of row g + 8 h.
  __device__ __forceinline__ void row_scalars(uint32_t (&xs)[2][4], int ib) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row() + 8 * h;
      const uint4 v = load_u4(x() + (ib >> 3) * kHalf + r * 128 + (((ib & 7) ^ (r & 7)) << 4));
      xs[h][0] = v.x, xs[h][1] = v.y, xs[h][2] = v.z, xs[h][3] = v.w;
    }
  }
  // (x_j, x_{j+1}) of this lane in block jb: rows g, g + 8.
  __device__ __forceinline__ void block_values(uint32_t (&f)[2], int jb) {
    const int r = warp() * 16 + (lane() & 15);
    ldmatrix2(f[0], f[1], x() + (jb >> 3) * kHalf + r * 128 + (((jb & 7) ^ (r & 7)) << 4));
  }
  // t[4 n ..] holds T for i = 8 ib + n and this lane's two j: dx_j += T_ij x_i, side_i += T_ij x_j.
  template <int jb>
  __device__ __forceinline__ void contract(const float (&t)[32], const uint32_t (&xs)[2][4],
                                           const uint32_t (&f)[2], float (&side)[2][8]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 xj = unpack2_here<T>(f[h]);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const float2 xi = unpack2_here<T>(xs[h][n / 2]);
        const float a0 = t[4 * n + 2 * h], a1 = t[4 * n + 2 * h + 1], b0 = t[4 * n + 4 + 2 * h],
                    b1 = t[4 * n + 5 + 2 * h];
        float &x0 = dx[4 * jb + 2 * h], &x1 = dx[4 * jb + 2 * h + 1];  // one fused operation for each product
        x0 += a0 * xi.x + b0 * xi.y;
        x1 += a1 * xi.x + b1 * xi.y;
        side[h][n] += a0 * xj.x, side[h][n] += a1 * xj.y;
        side[h][n + 1] += b0 * xj.x, side[h][n + 1] += b1 * xj.y;
      }
    }
  }
  // One tile (ib, jb): T = u S^T, contracted while (keys) dv += phi(x) S runs.
  template <int jb>
  __device__ __forceinline__ void state_tile(const uint32_t (&xs)[2][4], float (&side)[2][8], int &odd) {
    float t[32];
    uint32_t f[2], a[4][4];
    if (!odd) acquire();
    const uint32_t tile = stage() + (odd ? kTile : 0);
    wgmma_fence();
    inner(t, u(), tile);
    wgmma_commit();
    block_values(f, jb);
    if constexpr (kKeys) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        a[n][0] = mul2<T>(f[0], low2_here(xs[0][n]));
        a[n][1] = mul2<T>(f[1], low2_here(xs[1][n]));
        a[n][2] = mul2<T>(f[0], high2_here(xs[0][n]));
        a[n][3] = mul2<T>(f[1], high2_here(xs[1][n]));
      }
      wgmma_fence();
      outer(dv, a, tile);
      wgmma_commit();
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    contract<jb>(t, xs, f, side);
    if constexpr (kKeys) wgmma_wait<0>();
    if (odd) release();
    odd ^= 1;
  }
  template <int jb>
  __device__ __forceinline__ void state_row(int ib, const uint32_t (&xs)[2][4], float (&side)[2][8], int &odd) {
    if constexpr (jb < kBlocks) {
      if (jb >= ib) state_tile<jb>(xs, side, odd);
      state_row<jb + 1>(ib, xs, side, odd);
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
        const float sum = keep + __shfl_xor_sync(0xffffffffu, give, 1);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) dx[4 * b + 2 * h + n] += b == ib ? sum : 0.f;
      }
    }
  }
  // Rolled over ib: unrolled, the 136 tiles would be 30 thousand instructions.
  __device__ __forceinline__ void state_phase() {
    int odd = 0;
#pragma unroll 1
    for (int ib = 0; ib < kBlocks; ++ib) {
      float side[2][8] = {};
      uint32_t xs[2][4];
      row_scalars(xs, ib);
      state_row<0>(ib, xs, side, odd);
      reduce_side(side, ib);
    }
  }

  // e = s^{p-1} f (m - delta), w = s^p f; on the diagonal f = r 2^(gate difference), and only visible pairs.
  template <Block kBlock>
  __device__ __forceinline__ void weigh(float (&t)[32], float (&m)[32], uint32_t (&e)[4][4],
                                        uint32_t (&w)[kKeys ? 4 : 1][4], const volatile GradientUnit &unit,
                                        float d0, float d1) {
    float dots[2];  // float16 with states: no registers to keep them
    weigh_gradient<T, kDegree, kKeys, false, kBlock>(t, m, dots, meta(), row(), (lane() & 3) * 2, d0, d1, unit,
                                                     local());
    pack_gradient<T, kKeys>(t, m, e, w);
  }

  // Row factors before the diagonal: queries exp(G_i - block start), keys exp(block end - G_j).
  __device__ __forceinline__ void to_rows(int last) {
    const float g0 = load_f1(meta() + kGate + row() * 4), g1 = load_f1(meta() + kGate + row() * 4 + 32);
    if constexpr (kKeys) {
      const float end = load_f1(meta() + kGate + last * 4);
      scale(exp2_fast(end - g0), exp2_fast(end - g1));
    } else {
      scale(exp2_fast(g0), exp2_fast(g1));
    }
  }

  // One block of columns: s = x z^T, m = u y^T, then dx += e z and dv += w y. Its products take 2048 cycles of
  // the tensor cores with those of the other warpgroup, which fill the time of the weights.
  template <Block kBlock>
  __device__ __forceinline__ void block(const volatile GradientUnit &unit, float d0, float d1) {
    float t[32], m[32];
    uint32_t e[4][4], w[kKeys ? 4 : 1][4];
    wgmma_fence();
    inner(t, x(), stage());
    inner(m, u(), stage() + kTile);
    wgmma_commit();
    wgmma_wait<0>();
    weigh<kBlock>(t, m, e, w, unit, d0, d1);
    wgmma_fence();
    if constexpr (kKeys) outer(dv, w, stage() + kTile);
    outer(dx, e, stage());
    wgmma_commit();
    wgmma_wait<0>();
  }

  // `leads`: this warpgroup's diagonal is the first of the tile's own blocks; the other one sees that block
  // whole.
  __device__ __forceinline__ void column_phase(const volatile GradientUnit &unit, float d0, float d1) {
#pragma unroll 1
    for (int n = 0; n < unit.main; ++n) {
      acquire();
      block<Block::kFar>(unit, d0, d1);
      release();
    }
#pragma unroll 1
    for (int n = 0; n < unit.first + unit.second; ++n) {
      const bool leads = group() == (kKeys ? 1 : 0);
      const int first = unit.first;
      acquire();
      if (leads ? n < first : n >= first) {
        if (!kCounted<T> && n == (leads ? 0 : first))
          to_rows(min(63, unit.length - 1 - unit.row - (kKeys == leads ? 64 : 0)));
        block<Block::kDiagonal>(unit, d0, d1);
      } else if (n < first) {
        if (!kCounted<T> && n == 0) {
          const float f = load_f1(meta() + kAdvance);
          scale(f, f);
        }
        block<Block::kNear>(unit, d0, d1);
      }
      release();
    }
  }

  // x . dx of this lane's two rows before rounding, for the gate gradient.
  __device__ __forceinline__ void row_dots(float (&dot)[2]) {
    dot[0] = dot[1] = 0.f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      uint32_t f[2];
      block_values(f, n);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 v = unpack2<T>(f[h]);
        dot[h] += dx[4 * n + 2 * h] * v.x + dx[4 * n + 2 * h + 1] * v.y;
      }
    }
    dot[0] = quad_sum(dot[0]);
    dot[1] = quad_sum(dot[1]);
  }

  __device__ __forceinline__ void epilogue(const GradientArgs &a, const volatile GradientUnit &unit) {
    const int lane = this->lane(), local = group() * 64 + warp() * 16, row = unit.row + local;
    const uint32_t staging = s.staging + (thread_here() >> 5) * 2048;
    const float degree = static_cast<float>(kDegree);
    float f0 = degree, f1 = degree, f_v = 1.f;
    if constexpr (kCounted<T>) {
      f0 = f1 = degree / unit.lifts.gradient();
      f_v = 1.f / unit.lifts.weight;
    } else if (!kKeys) {
      f0 *= a.scale_p * unit.r[local + lane / 4];
      f1 *= a.scale_p * unit.r[local + lane / 4 + 8];
    }
    if (a.dot || (kCorrect && !kKeys)) {
      float dot[2];
      row_dots(dot);
      dot[0] *= f0;
      dot[1] *= f1;
      store_dots<kKeys, kCorrect>(a, unit, dot, degree, local, lane);
    }
    const auto at = [&](const Tensor &o) {
      return static_cast<T *>(o.data) + unit.batch * o.stride_b + unit.head * o.stride_h +
             (unit.token + row) * o.stride_t;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_rows<T, true>(dx + 32 * half, f0, f1, staging, a.dx, at(a.dx) + (a.dx.floats ? 128 : 64) * half,
                          unit.length - row, lane);
      if constexpr (kKeys)
        store_rows<T>(dv + 32 * half, f_v, f_v, staging, a.dv, at(a.dv) + 64 * half, unit.length - row, lane);
    }
  }
};

template <typename T, int kDegree, bool kKeys, bool kCorrect>
__global__ void __launch_bounds__(384, 1)
    gradient128_kernel(const __grid_constant__ GradientArgs a, const __grid_constant__ GradientMaps maps) {
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
    produce_gradient<T, kDegree, kKeys, 128>(a, maps, s, slots);
  } else {
    registers_inc<kConsumerRegisters>();
    Consumer<T, kDegree, kKeys, kCorrect> c{s};
    for (;; c.turn ^= 1u << 31) {
      barrier_wait(s.rows_full, c.turn >> 31);
      volatile GradientUnit &unit = slots[c.turn >> 31];  // stays until the rows are given back
      if (__shfl_sync(0xffffffffu, unit.head, 0) < 0) break;
#pragma unroll
      for (int i = 0; i < 64; ++i) {
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
          if constexpr (kKeys && kCounted<T>) c.template scale_x<false>(unit);
          if (a.norm) c.norm_phase(d0, d1, kCounted<T> ? unit.units.z / unit.units.s : 1.f);
          c.state_phase();
          if constexpr (kKeys && kCounted<T>) c.template scale_x<true>(unit);
          leave_state<T, kDegree, kKeys>(c, unit);
        }
      }
      if constexpr (kCounted<T> && !kKeys) {
        d0 *= unit.lifts.ratio;
        d1 *= unit.lifts.ratio;
      }
      if constexpr (kKeys && kCorrect) {
        float dot[2];
        c.row_dots(dot);  // zeros without a state
        const float factor = static_cast<float>(kDegree) / (kCounted<T> ? unit.lifts.gradient() : 1.f);
        store_state_dots<T>(a, unit, dot, factor, c.group() * 64 + c.warp() * 16, c.lane());
      }
      c.column_phase(unit, d0, d1);
      c.epilogue(a, unit);
      __syncwarp();
      if (c.lane() == 0) barrier_arrive(s.rows_empty);  // the rows were read to the end, and `unit` too
    }
  }
}

struct Kernels {
  static constexpr int kShared = Layout::kSmem;
  template <typename T, int kDegree, bool kKeys, bool kCorrect>
  static constexpr auto kernel() {
    return gradient128_kernel<T, kDegree, kKeys, kCorrect>;
  }
};

}  // namespace

cudaError_t gradient128(const GradientArgs &a, int sms, cudaStream_t stream) {
  return launch_gradient<Kernels>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
