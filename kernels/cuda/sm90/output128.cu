// SPDX-License-Identifier: Apache-2.0
// Forward output for head_dim = value_dim = 128, after output64.cu: rows of one chunk against the state before
// the chunk and the chunk's own keys. Two row tiles of 64 x 128 sums fill 128 registers, so q stays in shared
// memory: the scores take it from there as the A operand, and the state phase reads the few fragments a tile of
// the state needs.
#include "output_producer.cuh"

namespace powerattn::cuda::sm90 {
namespace {

using Layout = OutputLayout<128>;
using Smem = OutputSmem<128>;
constexpr int kTile = Layout::kTile, kStage = Layout::kStage, kStages = Layout::kStages;
constexpr int kHalf = kTile / 2;  // 64 rows x 64 columns

template <typename T, int kDegree>
struct Consumer {
  const Smem &s;
  // Turns of the ring (4 stages), and the parity of the unit in the top bit: one register.
  uint32_t turn = 0;
  static constexpr bool kStates = kDegree == 2;
  float o[2][64];
  float l[2][2];
  RowUnits<T> units[2];

  // Derived anew at every use: addresses kept over the loops would cost registers that 128 sums do not leave.
  __device__ __forceinline__ int lane() const { return thread_here() & 31; }
  __device__ __forceinline__ int warp() const { return thread_here() >> 5 & 3; }
  __device__ __forceinline__ int group() const { return thread_here() >> 7; }
  // Row tile m of the warpgroup: {0, 3} and {1, 2} of the unit, so that both have as many causal blocks.
  __device__ __forceinline__ int row_tile(int m) const { return group() ^ (m ? 3 : 0); }
  __device__ __forceinline__ uint32_t q(int m) const { return s.q + row_tile(m) * kTile; }
  // Row that this lane's fragments begin with (and row + 8), and row of the matrices that it gives addresses
  // for.
  __device__ __forceinline__ int row() const { return warp() * 16 + lane() / 4; }
  __device__ __forceinline__ int matrix_row() const { return warp() * 16 + (lane() & 15); }
  __device__ __forceinline__ int index() const { return turn & (kStages - 1); }
  __device__ __forceinline__ int index_before() const { return (turn - 1) & (kStages - 1); }
  __device__ __forceinline__ void acquire() { barrier_wait(s.full + 8 * index(), turn / kStages & 1); }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(s.empty + 8 * stage);
  }
  __device__ __forceinline__ uint32_t stage() const { return here(s.ring + index() * kStage); }
  __device__ __forceinline__ uint32_t meta() const { return here(s.meta + index() * kMetaBytes); }

  __device__ __forceinline__ uint32_t powers() const { return s.powers + (thread_here() >> 5) * 128; }

  // float16: q, in place, times a power of two for each row. Sixteen lanes have a row.
  template <int m>
  __device__ __forceinline__ void scale_queries() {
    const int piece = lane() & 15;
#pragma unroll 2
    for (int i = lane() >> 4; i < 16; i += 2) {
      const int row = warp() * 16 + i;
      const uint32_t at = q(m) + (piece >> 3) * kHalf + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
      const uint4 v = load_u4(at);
      const uint32_t power = row_power(v);
      store_u4(at, times(v, power));
      if (piece == 0) store_i1(powers() + (m * 16 + i) * 4, static_cast<int>(power));
    }
  }
  // For the products of the whole warpgroup.
  __device__ __forceinline__ void scale_queries() {
    scale_queries<0>();
    scale_queries<1>();
    fence_async_proxy();
    if (thread_here() < 128)
      named_barrier<3, 128>();
    else
      named_barrier<4, 128>();
  }

  // x[m][h]: the eight values q_i, i = 8 ib .., of row g + 8 h of row tile m.
  __device__ __forceinline__ void row_scalars(uint32_t (&x)[2][2][4], int ib) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = this->row() + 8 * h;
        const uint4 v = load_u4(q(m) + (ib >> 3) * kHalf + row * 128 + (((ib & 7) ^ (row & 7)) << 4));
        x[m][h][0] = v.x, x[m][h][1] = v.y, x[m][h][2] = v.z, x[m][h][3] = v.w;
      }
  }
  // A operand of phi(q) S for tile (ib, jb), row tile m, k16 step n: rows i = 8 ib + 2n (k < 8) and 2n + 1,
  // columns j.
  template <int m>
  __device__ __forceinline__ void phi(uint32_t (&a)[4][4], const uint32_t (&x)[2][2][4], int jb) {
    uint32_t f[2];  // (q_j, q_{j+1}) of this lane: rows g, g + 8
    const int row = matrix_row();
    ldmatrix2(f[0], f[1], q(m) + (jb >> 3) * kHalf + row * 128 + (((jb & 7) ^ (row & 7)) << 4));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      a[n][0] = mul2<T>(f[0], low2_here(x[m][0][n]));
      a[n][1] = mul2<T>(f[1], low2_here(x[m][1][n]));
      a[n][2] = mul2<T>(f[0], high2_here(x[m][0][n]));
      a[n][3] = mul2<T>(f[1], high2_here(x[m][1][n]));
    }
  }
  template <int m>
  __device__ __forceinline__ void multiply(const uint32_t (&a)[4][4], uint32_t tile) {
    const uint64_t b = tile_desc(tile, kHalf);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < 4; ++n) wgmma<T, true, true>(o[m], a[n], desc_at(b, n * 2048));
    wgmma_commit();
  }
  // O += phi(Q) S over the 136 tiles, two (one stage) a turn. The fragments of one row tile are built while the
  // other one multiplies. Nothing is in flight across the loop's edge; the other warpgroup fills that gap.
  __device__ __forceinline__ void state_phase() {
    uint32_t a[2][4][4], x[2][2][4];
    int ib = 0, jb = 0;
    row_scalars(x, 0);
    phi<0>(a[0], x, 0);
#pragma unroll 1
    for (int pair = 0; pair < 68; ++pair) {
      acquire();
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        multiply<0>(a[0], stage() + t * kTile);
        if (t == 1) wgmma_wait<1>();
        phi<1>(a[1], x, jb);
        multiply<1>(a[1], stage() + t * kTile);
        if (++jb == 16) {
          ib = ib < 15 ? ib + 1 : 0;  // past the end: built and not used
          jb = ib;
          row_scalars(x, ib);
        }
        wgmma_wait<1>();
        phi<0>(a[0], x, jb);
      }
      wgmma_wait<0>();
      release(index());
      ++turn;
    }
  }

  // l_i = q_i^T Z q_i with Z = Z_hi + Z_lo, a stage each: rowsum(Q o (Q Z)). Before the sums of O begin, so
  // that their registers can hold Q Z.
  __device__ __forceinline__ void norm_phase() {
    const int high = index();
    acquire();
    ++turn;
    const int low = index();
    acquire();
    ++turn;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float t[64];
      const uint64_t a = tile_desc(q(m));
      const uint64_t z[2] = {tile_desc(s.ring + high * kStage, kHalf), tile_desc(s.ring + low * kStage, kHalf)};
      wgmma_fence();
#pragma unroll
      for (int ks = 0; ks < 16; ++ks) {
        const uint64_t x = desc_at(a, (ks / 4 & 1) * kHalf + ks % 4 * 32);
        const uint64_t y = desc_at(z[ks / 8], (ks / 4 & 1) * kTile + ks % 4 * 2048);
        if (ks == 0)
          wgmma<T, false, true>(t, x, y);
        else
          wgmma<T, true, true>(t, x, y);
      }
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int n = 0; n < 16; n += 2) {
        uint32_t f[4];  // rows g, g + 8 of columns 8n .., then of 8(n + 1) ..
        const int row = matrix_row(), piece = (n & 7) + (lane() >> 4);
        ldmatrix4(f, q(m) + (n >> 3) * kHalf + row * 128 + ((piece ^ (row & 7)) << 4));
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 v = unpack2<T>(f[2 * k + h]);
            l[m][h] += t[4 * (n + k) + 2 * h] * v.x + t[4 * (n + k) + 2 * h + 1] * v.y;
          }
      }
    }
    release(high);
    release(low);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 64; ++i) o[m][i] = 0.f;
  }
  // What the rows have from the state.
  __device__ __forceinline__ void begin(const OutputArgs &a, const volatile UnitMeta &u) {
    l[0][0] = l[0][1] = l[1][0] = l[1][1] = 0.f;
    if constexpr (kStates) {
      if (u.states) {
        if (a.norm) norm_phase();
        clear();
        state_phase();
        begin_rows(o[0], l[0], units[0], u);
        begin_rows(o[1], l[1], units[1], u);
        return;
      }
    }
    clear();
    units[0].start();
    units[1].start();
  }

  // S_m = Q_m K^T and O_m += P V, without fence and commit.
  __device__ __forceinline__ void scores(int m, float (&t)[32]) {
    const uint64_t x = tile_desc(q(m)), k = tile_desc(stage());
#pragma unroll
    for (int ks = 0; ks < 8; ++ks) {
      const uint32_t at = ks / 4 * kHalf + ks % 4 * 32;
      if (ks == 0)
        wgmma<T, false, false>(t, desc_at(x, at), desc_at(k, at));
      else
        wgmma<T, true, false>(t, desc_at(x, at), desc_at(k, at));
    }
  }
  template <int m>
  __device__ __forceinline__ void values(const uint32_t (&w)[4][4], uint32_t v) {
    const uint64_t b = tile_desc(v, kHalf);
#pragma unroll
    for (int ks = 0; ks < 4; ++ks) wgmma<T, true, true>(o[m], w[ks], desc_at(b, ks * 2048));
  }
  // Weights of block r of the tile's own four: at its own row it is the diagonal; later rows advance their
  // reference gate to the start of block r + 1 first.
  template <int m>
  __device__ __forceinline__ void weigh_own(float (&t)[32], uint32_t (&w)[4][4], bool diagonal) {
    if (diagonal) {
      const int row = this->row();
      decay_rows(o[m], l[m], units[m], exp2_fast(load_f1(meta() + 256 + row * 4)),
                 exp2_fast(load_f1(meta() + 288 + row * 4)));
      weigh<T, kDegree, true>(t, w, o[m], l[m], units[m], meta(), lane(), warp());
    } else {
      const float f = load_f1(meta() + 512);
      decay_rows(o[m], l[m], units[m], f, f);
      weigh<T, kDegree, false>(t, w, o[m], l[m], units[m], meta(), lane(), warp());
    }
  }
  // O_m += P V of the block at `v`, and the next scores, of row tile n with the keys of this stage.
  template <int m>
  __device__ __forceinline__ void values_and_scores(const uint32_t (&w)[4][4], uint32_t v, int n,
                                                    float (&t)[32]) {
    wgmma_fence();
    values<m>(w, v);
    scores(n, t);
    wgmma_commit();
    wgmma_wait<0>();
  }

  // A block is 2048 cycles of the tensor cores and its weights a few hundred of the warps: the two warpgroups
  // overlap each other, so neither keeps a second set of scores. Each product with v goes with the next scores;
  // that of row tile 0 also with the weights of row tile 1. Nothing is in flight across the loop's edge.
  __device__ __forceinline__ void attention_phase(const volatile UnitMeta &u) {
    float t[32];
    uint32_t w[4][4];
    acquire();
    wgmma_fence();
    scores(0, t);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll 1
    for (int left = u.row / kKeys; left > 0; --left) {  // keys before the tile: every row sees them all
      weigh<T, kDegree, false>(t, w, o[0], l[0], units[0], meta(), lane(), warp());
      uint32_t w1[4][4];
      wgmma_fence();
      scores(1, t);
      wgmma_commit();
      wgmma_fence();
      values<0>(w, stage() + kTile);
      wgmma_commit();
      wgmma_wait<1>();
      weigh<T, kDegree, false>(t, w1, o[1], l[1], units[1], meta(), lane(), warp());
      ++turn;
      acquire();
      wgmma_fence();
      scores(0, t);
      values<1>(w1, s.ring + index_before() * kStage + kTile);
      wgmma_commit();
      wgmma_wait<0>();
      release(index_before());
    }
    // The tile's own blocks, as many as there are; row tile m of the warpgroup ends at its own row.
    int r = 0;
#pragma unroll 1
    for (;; ++r) {
      if (r <= row_tile(0)) {
        weigh_own<0>(t, w, r == row_tile(0));
        values_and_scores<0>(w, stage() + kTile, 1, t);
      }
      weigh_own<1>(t, w, r == row_tile(1));
      if (r == row_tile(1) || u.row / kKeys + r + 1 >= u.blocks) break;
      const uint32_t v = stage() + kTile;
      ++turn;
      acquire();
      values_and_scores<1>(w, v, r < row_tile(0) ? 0 : 1, t);
      release(index_before());
    }
    wgmma_fence();
    values<1>(w, stage() + kTile);
    wgmma_commit();
    wgmma_wait<0>();
    release(index());
    ++turn;
#pragma unroll 1
    for (++r; u.row / kKeys + r < u.blocks; ++r) {  // the other warpgroup's
      acquire();
      release(index());
      ++turn;
    }
  }

  // Where the unit's rows are, for when the producers may write `u` anew.
  struct Rows {
    int32_t batch, head, row, length;
    int64_t token;
    __device__ __forceinline__ explicit Rows(const volatile UnitMeta &u)
        : batch(u.batch), head(u.head), row(u.row), length(u.length), token(u.token) {}
  };
  template <int m>
  __device__ __forceinline__ void epilogue(const OutputArgs &a, const TileMap &map, const Rows &u) {
    const uint32_t staging = s.staging + (thread_here() >> 5) * 2048;
    float norm[2], f[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float unit =
          units[m][h] * weight_power<T, kDegree>(powers() + (m * 16 + this->lane() / 4 + 8 * h) * 4);
      f[h] = output_factor(a.p, quad_sum(l[m][h]), unit, &norm[h]);
    }
    const int lane = this->lane(), row = u.row + row_tile(m) * 64 + warp() * 16;
    if (are_whole(map, row, u.length)) {  // can_send() spills here
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        await_sent(lane);
        send_rows<T>(o[m] + 32 * half, f[0], f[1], staging, map, 64 * half, static_cast<int>(u.token) + row,
                     u.head, u.batch, lane);
      }
    } else {
      T *y = static_cast<T *>(a.y.data) + u.batch * a.y.stride_b + u.head * a.y.stride_h +
             (u.token + row) * a.y.stride_t;
      await_sent(lane);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_rows<T>(o[m] + 32 * half, f[0], f[1], staging, a.y, y + 64 * half, u.length - row, lane);
    }
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
    output128_kernel(const __grid_constant__ OutputArgs a, const __grid_constant__ OutputMaps maps) {
  unsigned char *raw = dynamic_shared<unsigned char>();
  const Smem s(shared_address(raw));
  UnitMeta *slots = reinterpret_cast<UnitMeta *>(raw + (s.unit - shared_address(raw)));
  const int tid = threadIdx.x, group = tid / 128;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(s.full + 8 * i, 1);
      barrier_init(s.empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < Layout::kQueryParts; ++i) {
      barrier_init(s.q_full + 8 * i, 1);
      barrier_init(s.q_empty + 8 * i, kConsumerWarps / Layout::kQueryParts);
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernel_before();
  if (group == 2) {
    registers_dec<kProducerRegisters>();
    produce_output<T, kDegree, 128>(a, maps, s, slots);
  } else {
    registers_inc<kConsumerRegisters>();
    Consumer<T, kDegree> c{s};
    for (;; c.turn ^= 1u << 31) {
      barrier_wait(s.q_full + 8 * c.group(), c.turn >> 31);
      const volatile UnitMeta &u = slots[c.turn >> 31];  // stays until q is given back
      if (u.head < 0) break;
      if constexpr (kCounted<T>) c.scale_queries();
      c.begin(a, u);
      c.attention_phase(u);
      const typename Consumer<T, kDegree>::Rows rows(u);
      __syncwarp();
      if (c.lane() == 0) barrier_arrive(s.q_empty + 8 * c.group());
      c.template epilogue<0>(a, maps.y, rows);
      c.template epilogue<1>(a, maps.y, rows);
    }
    await_sent(c.lane());
  }
}

struct Kernels {
  static constexpr int kShared = Layout::kSmem;
  template <typename T, int kDegree>
  static constexpr auto kernel() {
    return output128_kernel<T, kDegree>;
  }
};

}  // namespace

cudaError_t output128(const OutputArgs &a, int sms, cudaStream_t stream) {
  return launch_output<Kernels>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
