// SPDX-License-Identifier: Apache-2.0
// The walk of one chunk and head with its output. Per step of 64 tokens, on the same accumulators:
//   1. state:  O = X State, times e^{g_r}
//   2. pairs:  O += (X Z^T, weighed and masked) U
//   3. update: State = e^{g_end} State + sum_t w_t z_t u_t^T, in float32 registers; rounded into shared memory,
//              where the next step's first product reads it
// A warp owns 16 rows and 64 columns of O, and 16 rows of the state. One barrier a step: copies of the next
// step are in flight meanwhile, and whatever is written for it lies in the other of two buffers.
#pragma once

#include "block.cuh"
#include "kernels/cuda/launch.cuh"

namespace powerattn::cuda::linear {

template <int D>
struct OutputForm : Form<D> {
  static constexpr int kHalves = D / 64;  // warps that share 16 rows of O
  static constexpr int kStageBytes = 3 * Form<D>::kTileBytes, kStateBytes = D * D * 2;
  // Stages of x, z and u | two states, or high and low parts of one | gates of two blocks | two z
  //   d = 64: 48 + 16 + 2 KB, three blocks a multiprocessor; d = 128: 96 + 64 + 2.5 KB, one (162.5 of 163 KB on
  //   sm_80)
  static constexpr int kStates = 2 * kStageBytes;
  static constexpr int kGates = kStates + 2 * kStateBytes;
  static constexpr int kZ = kGates + 2 * sizeof(Gates);
  static constexpr int kUnits = kZ + 2 * D * 4;  // float16: of two states, and the warps' largest elements
  static constexpr int kShared = kUnits + (2 + D / 16) * 4;
  static constexpr int kBlocksPerSM = D == 64 ? 3 : 1;
};

// A 4 x 4 exchange in every quad: lane i gives v[j] to lane j, and holds afterwards what lane j gave it in
// v[j].
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int quad) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = quad & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i | bit], bit);
      if (high)
        v[i] = got;
      else
        v[i | bit] = got;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 load_piece(const T *from, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint4 *>(from));
  const unsigned short *const p = reinterpret_cast<const unsigned short *>(from);
  uint32_t w[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) w[k] = p[2 * k] | static_cast<uint32_t>(p[2 * k + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

constexpr float kNever = -1e30f;  // 2^kNever = 0: no branch around the exponential

// What a walk has beside its output. The gate gradient is a small difference of sums over a chunk of q . dq and
// k . dk: what they hold of pairs inside a step is the same rounded number in both, and what comes through the
// state is not rounded (kGradient: states and the weights of what is added to them in two parts).
enum class Extra { kNone, kNorm, kGradient };

// float16 has the digits but not the range. What becomes an operand is counted in powers of two, undone on
// float32 sums: a state in one that its largest element gives (state = unit times operand), and the weights of
// a row of O in one of its own. Its sums are `unit` times what they stand for: about 8 after the state, and a
// step whose weights would pass 2^15 lowers them to about 8 again, so that weights that round to multiples of
// 2^-24 lose nothing of the sums.
struct RowUnit {
  static constexpr int kMostUnit = 30;  // of its logarithm: that of a row without a state
  float unit[2];
  __device__ __forceinline__ void start(float (&o)[8][4]) {
    float most[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) most[e >> 1] = fmaxf(most[e >> 1], fabsf(o[c][e]));
#pragma unroll
    for (int h = 0; h < 2; ++h) unit[h] = power_over(3, quad_max(most[h]), kMostUnit);
    scale(o, unit[0], unit[1]);
  }
  // w: of 16 columns; becomes unit times w.
  __device__ __forceinline__ void count(float (&w)[2][4], float (&o)[8][4]) {
    float most[2] = {0.f, 0.f};
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[t][e] *= unit[e >> 1];
        most[e >> 1] = fmaxf(most[e >> 1], fabsf(w[t][e]));
      }
    if (!__any_sync(0xffffffffu, most[0] > 0x1p15f || most[1] > 0x1p15f)) return;
    float f[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float x = quad_max(most[h]);
      f[h] = x > 0x1p15f ? power_over(3, x, kMostUnit) : 1.f;
      unit[h] *= f[h];
    }
    scale(o, f[0], f[1]);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) w[t][e] *= f[e >> 1];
  }
  __device__ __forceinline__ void finish(float (&o)[8][4]) const {
    scale(o, inverse_power(unit[0]), inverse_power(unit[1]));
  }

 private:
  static __device__ __forceinline__ void scale(float (&o)[8][4], float f0, float f1) {
#pragma unroll
    for (int c = 0; c < 8; ++c) o[c][0] *= f0, o[c][1] *= f0, o[c][2] *= f1, o[c][3] *= f1;
  }
};

template <typename T, int D, Extra kExtra>
__global__ void __launch_bounds__(OutputForm<D>::kThreads, OutputForm<D>::kBlocksPerSM)
    output_kernel(const __grid_constant__ OutputArgs a) {
  using F = OutputForm<D>;
  constexpr bool kNorm = kExtra == Extra::kNorm, kGradient = kExtra == Extra::kGradient;
  unsigned char *shared = dynamic_shared<unsigned char>();
  const uint32_t base = shared_address(shared);
  Gates *const gates = reinterpret_cast<Gates *>(shared + F::kGates);
  float *const z_shared = reinterpret_cast<float *>(shared + F::kZ);
  [[maybe_unused]] float *const units = reinterpret_cast<float *>(shared + F::kUnits);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, quad = lane & 3;

  const Shape &shape = a.shape;
  const int group = shape.heads_q / shape.heads_kv;
  const int heads_x = a.reverse ? shape.heads_kv : shape.heads_q;
  const int head_x = static_cast<int>(blockIdx.x % heads_x);
  const int64_t chunk_id = blockIdx.x / heads_x;
  const Chunk chunk = chunk_at(shape, chunk_id);
  if (chunk.length == 0) return;
  const int64_t batch = batch_of(shape.packed, chunk.sequence);
  const int head_kv = a.reverse ? head_x : head_x / group;
  const Walk walk(chunk, a.reverse, a.reverse ? group : 1);

  const T *const x = row_pointer<T>(a.x, batch, chunk.start, head_x);
  const int head_z = a.reverse ? head_kv * group : head_kv;
  const T *const z = row_pointer<T>(a.z, batch, chunk.start, head_z);
  const T *const u = row_pointer<T>(a.u, batch, chunk.start, head_z);
  Step next;                           // to be copied
  uint32_t write = base, read = base;  // stages
  const auto fetch = [&] {
    if (next.block < walk.blocks) {
      const int token = walk.token(next.block), valid = min(kBlock, walk.length - token);
      if (next.part == 0)
        load_rows<kBlock, D, F::kThreads>(write, x + token * a.x.stride_t, a.x.stride_t, valid, thread);
      load_rows<kBlock, D, F::kThreads>(write + F::kTileBytes,
                                        z + next.part * a.z.stride_h + token * a.z.stride_t, a.z.stride_t,
                                        valid, thread);
      load_rows<kBlock, D, F::kThreads>(write + 2 * F::kTileBytes,
                                        u + next.part * a.u.stride_h + token * a.u.stride_t, a.u.stride_t,
                                        valid, thread);
      next = walk.after(next);
      write = 2 * base + F::kStageBytes - write;
    }
    copy_commit();
  };
  fetch();

  // Rows of O: warps of one scheduler (warp modulo 4) get other rows in other blocks, since the last rows see
  // four times as many columns as the first.
  const int turn = static_cast<int>(blockIdx.x + (blockIdx.x >> 7));
  const int strip = (warp / F::kHalves + turn) & 3, half = warp % F::kHalves;
  const float *const log_g =
      shape.log_g.data != nullptr ? row_pointer<float>(shape.log_g, batch, chunk.start, head_kv) : nullptr;
  const bool weighted = log_g != nullptr || a.sum_scale != 1.f;
  float2 ahead = make_float2(0.f, 0.f);
  const bool gate_warp = half == 0 && strip == (a.reverse ? 3 : 0);  // the one with the fewest columns
  if (gate_warp) {
    const int64_t stride = shape.log_g.stride_t;
    put_gates(&gates[0], load_gates(log_g, stride, walk.token(0), walk.length, lane), a.reverse, a.state_scale,
              a.sum_scale, lane);
    if (log_g == nullptr) put_gates(&gates[1], ahead, a.reverse, a.state_scale, a.sum_scale, lane);
    if (walk.blocks > 1) ahead = load_gates(log_g, stride, walk.token(1), walk.length, lane);
  }

  // The state: rows 16 warp + g (+ 8), columns 8c + 2 quad, + 1.
  float sum[D / 8][4] = {}, z_sum[4] = {};
  const int row0 = 16 * warp + lane / 4;
  const float *from = nullptr, *z_from = nullptr;
  if (a.state != nullptr) {
    const int64_t slot = chunk_id * shape.heads_kv + head_kv;
    from = a.state + slot * D * D;
    if (kNorm) z_from = a.z_state + slot * D;
  } else if (a.initial.s != nullptr) {
    from = static_cast<const float *>(a.initial.s) + chunk.sequence * a.initial.s_stride_n +
           head_kv * a.initial.s_stride_h;
    if (kNorm && a.initial.z != nullptr)
      z_from = static_cast<const float *>(a.initial.z) + chunk.sequence * a.initial.z_stride_n +
               head_kv * a.initial.z_stride_h;
  }
  if (from != nullptr) {
    const int row_step = a.transposed ? 1 : D, column_step = a.transposed ? D : 1;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[c][e] = from[(row0 + 8 * (e >> 1)) * row_step + (8 * c + 2 * quad + (e & 1)) * column_step];
  }
  if (kNorm && z_from != nullptr) z_sum[0] = z_from[row0], z_sum[2] = z_from[row0 + 8];
  float bias = 0.f;
  if (kGradient && a.bias != nullptr && thread < D)
    bias = a.bias[(chunk_id * shape.heads_kv + head_kv) * D + thread];
  // float16: the largest element of a warp's rows, before a barrier and publish().
  const auto announce = [&] {
    if constexpr (!kCounted<T>) return;
    float most = kGradient ? fabsf(bias) : 0.f;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(sum[c][e]));
#pragma unroll
    for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, d));
    if (lane == 0) units[2 + warp] = most;
  };
  const auto publish = [&](int buffer) {
    const SharedTile<D> to{base + F::kStates + (kGradient ? 0 : buffer * F::kStateBytes), D};
    const int row0 = 16 * warp + (D == 128 ? anew(lane) : lane) / 4;
    [[maybe_unused]] float inverse = 1.f;
    if constexpr (kCounted<T>) {
      float most = 0.f;
#pragma unroll
      for (int w = 0; w < F::kWarps; ++w) most = fmaxf(most, units[2 + w]);
      const float unit = unit_of(most);
      if (thread == 0) units[buffer] = unit;
      inverse = inverse_power(unit);
    }
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float f = kCounted<T> ? inverse : 1.f, x = f * sum[c][2 * h], y = f * sum[c][2 * h + 1];
        const uint32_t at = to.at(row0 + 8 * h, c) + 4 * quad, high = Pair<T>::pack(x, y);
        store4(at, high);
        if (kGradient) store4(at + F::kStateBytes, Pair<T>::pack(x - Pair<T>::lo(high), y - Pair<T>::hi(high)));
      }
    if (kNorm && quad == 0) {
      z_shared[buffer * D + row0] = z_sum[0];
      z_shared[buffer * D + row0 + 8] = z_sum[2];
    }
    if (kGradient && thread < D) z_shared[buffer * D + thread] = kCounted<T> ? inverse * bias : bias;
  };
  announce();
  if (kCounted<T>) __syncthreads();
  publish(0);

  uint32_t xf[D / 16][4];
  float o[8][4], l[2];
  [[maybe_unused]] RowUnit row_unit;
#pragma unroll 1
  for (Step s; s.block < walk.blocks; s = walk.after(s)) {
    const int buffer = s.block & 1;
    // d = 128: addresses made from it are not kept over the loop, there are no registers for them.
    const int lane_here = D == 128 ? anew(lane) : lane;
    copy_wait<0>();
    __syncthreads();
    fetch();
    const SharedTile<D> xs{read, kBlock}, zs{read + F::kTileBytes, kBlock},
        us{read + 2 * F::kTileBytes, kBlock};
    read = 2 * base + F::kStageBytes - read;
    const int token = walk.token(s.block), valid = min(kBlock, walk.length - token);
    const Gates &now = gates[buffer];

    // ---- 1. O = e^{g_r} X State
    if (s.part == 0) {
      if (gate_warp && log_g != nullptr && s.block + 1 < walk.blocks) {
        put_gates(&gates[buffer ^ 1], ahead, a.reverse, a.state_scale, a.sum_scale, lane);
        if (s.block + 2 < walk.blocks)
          ahead = load_gates(log_g, shape.log_g.stride_t, walk.token(s.block + 2), walk.length, lane);
      }
      const SharedTile<D> states{base + F::kStates + (kGradient ? 0 : buffer * F::kStateBytes), D};
      const SharedTile<D> low{base + F::kStates + F::kStateBytes, D};
#pragma unroll
      for (int c = 0; c < 8; ++c) o[c][0] = o[c][1] = o[c][2] = o[c][3] = 0.f;
      l[0] = l[1] = 0.f;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        xs.a(xf[k], 16 * strip, k, lane_here);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          uint32_t b[4];
          states.b_trans(b, 16 * k, 4 * half + c, lane_here);
          mma<T>(o[2 * c], xf[k], b[0], b[1]);
          mma<T>(o[2 * c + 1], xf[k], b[2], b[3]);
          if constexpr (kGradient) {
            low.b_trans(b, 16 * k, 4 * half + c, lane_here);
            mma<T>(o[2 * c], xf[k], b[0], b[1]);
            mma<T>(o[2 * c + 1], xf[k], b[2], b[3]);
          }
        }
        if constexpr (kNorm) {
          const float *const zk = z_shared + buffer * D + 16 * k + 2 * quad;
          const float2 z0 = *reinterpret_cast<const float2 *>(zk),
                       z1 = *reinterpret_cast<const float2 *>(zk + 8);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            l[h] += Pair<T>::lo(xf[k][h]) * z0.x + Pair<T>::hi(xf[k][h]) * z0.y +
                    Pair<T>::lo(xf[k][2 + h]) * z1.x + Pair<T>::hi(xf[k][2 + h]) * z1.y;
        }
      }
      if (kGradient && a.bias != nullptr) {
        const float *const from = z_shared + buffer * D + 64 * half + 2 * (lane_here & 3);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float2 r = *reinterpret_cast<const float2 *>(from + 8 * c);
          o[c][0] += r.x, o[c][1] += r.y, o[c][2] += r.x, o[c][3] += r.y;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float f = now.row[16 * strip + 8 * h + lane / 4];
        l[h] *= f;
        if constexpr (kCounted<T>) f *= units[buffer];
#pragma unroll
        for (int c = 0; c < 8; ++c) o[c][2 * h] *= f, o[c][2 * h + 1] *= f;
      }
      if constexpr (kCounted<T>) row_unit.start(o);
    }

    // ---- 2. O += w U, w = pair_scale e^{g_r - g_c} (X Z^T) where c is visible, 16 columns at a time
    const float g_row[2] = {now.g[16 * strip + lane / 4], now.g[16 * strip + 8 + lane / 4]};
    const int first = a.reverse ? strip : 0, last = a.reverse ? kBlock / 16 - 1 : strip;
#pragma unroll 1
    for (int j = first; j <= last; ++j) {
      float w[2][4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        uint32_t b[4];
        zs.b(b, 16 * j, k, lane_here);
        mma<T>(w[0], xf[k], b[0], b[1]);
        mma<T>(w[1], xf[k], b[2], b[3]);
      }
      float exponent[2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 g_column = *reinterpret_cast<const float2 *>(now.g + 16 * j + 8 * t + 2 * quad);
#pragma unroll
        for (int e = 0; e < 4; ++e) exponent[t][e] = g_row[e >> 1] - ((e & 1) ? g_column.y : g_column.x);
      }
      if (j == strip) {  // the diagonal
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int behind = 8 * (e >> 1) + lane / 4 - 8 * t - 2 * quad - (e & 1);  // row - column
            if (a.reverse ? behind > 0 : behind < 0) exponent[t][e] = kNever;
          }
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[t][e] *= a.pair_scale * exp2_fast(exponent[t][e]);
        if constexpr (kNorm) {
          l[0] += w[t][0] + w[t][1];
          l[1] += w[t][2] + w[t][3];
        }
      }
      if constexpr (kCounted<T>) row_unit.count(w, o);
      const uint32_t p[4] = {Pair<T>::pack(w[0][0], w[0][1]), Pair<T>::pack(w[0][2], w[0][3]),
                             Pair<T>::pack(w[1][0], w[1][1]), Pair<T>::pack(w[1][2], w[1][3])};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t b[4];
        us.b_trans(b, 16 * j, 4 * half + c, lane_here);
        mma<T>(o[2 * c], p, b[0], b[1]);
        mma<T>(o[2 * c + 1], p, b[2], b[3]);
      }
    }

    // Rows of the partner, 16 bytes a lane, in flight while the state is updated (d = 128 has no registers for
    // it).
    const bool finished = s.part == walk.parts - 1, with_dot = kGradient && a.dot != nullptr && finished;
    uint4 partner[2][2];
    const auto load_partner = [&] {
      const bool pieces = aligned_rows<8>(a.partner);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * strip + 8 * h + lane / 4;
        const T *const from = row_pointer<T>(a.partner, batch, chunk.start + token + row, head_x) + 64 * half;
#pragma unroll
        for (int m = 0; m < 2; ++m)
          partner[h][m] = row < valid ? load_piece(from + 8 * (4 * m + quad), pieces) : make_uint4(0, 0, 0, 0);
      }
    };
    if (D == 64 && with_dot) load_partner();

    // ---- 3. The state after these tokens, where there are more
    if (s.block + 1 < walk.blocks) {
      if (s.part == 0 && log_g != nullptr) {
        const float decay = now.decay;
#pragma unroll
        for (int c = 0; c < D / 8; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[c][e] *= decay;
        z_sum[0] *= decay, z_sum[2] *= decay;
        bias *= decay;
      }
      add_block<T, D, kGradient ? 2 : 1, kNorm>(sum, z_sum, zs, us, now.weight, weighted, warp, lane_here);
      if (finished) {
        announce();
        if (kGradient || kCounted<T>) __syncthreads();  // gradient: one buffer, which everyone has read
        publish(buffer ^ 1);
      }
    }

    if (!finished) continue;
    if constexpr (kCounted<T>) row_unit.finish(o);
    if constexpr (kNorm) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * strip + 8 * h + lane / 4;
        const float norm = quad_sum(l[h]) + a.eps;
        if (half == 0 && quad == 0 && row < valid)
          *row_pointer<float>(a.row_norm, batch, chunk.start + token + row, head_x) = norm;
      }
    }
    const int64_t rows0 = (batch * heads_x + head_x) * shape.seq_len + chunk.start + token;  // [b, heads, t]
    if (with_dot) {
      if (D != 64) load_partner();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * strip + 8 * h + lane / 4;
        float dot = 0.f;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t v[4] = {partner[h][m].x, partner[h][m].y, partner[h][m].z, partner[h][m].w};
          transpose_quad(v, quad);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            dot += o[4 * m + i][2 * h] * Pair<T>::lo(v[i]) + o[4 * m + i][2 * h + 1] * Pair<T>::hi(v[i]);
        }
        dot = quad_sum(dot);
        if (quad == 0 && row < valid) a.dot[half * a.dot_plane + rows0 + row] = dot;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * strip + 8 * h + lane / 4;
      if (kGradient && a.out_float != nullptr) {
        float *const out = a.out_float + (rows0 + row) * D + 64 * half + 2 * quad;
        if (row < valid) {
#pragma unroll
          for (int c = 0; c < 8; ++c)
            *reinterpret_cast<float2 *>(out + 8 * c) = make_float2(o[c][2 * h], o[c][2 * h + 1]);
        }
        continue;
      }
      T *const out = row_pointer<T>(a.out, batch, chunk.start + token + row, head_x) + 64 * half;
      if (aligned_rows<8>(a.out)) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = Pair<T>::pack(o[4 * m + i][2 * h], o[4 * m + i][2 * h + 1]);
          transpose_quad(v, quad);
          if (row < valid)
            __stcs(reinterpret_cast<uint4 *>(out + 8 * (4 * m + quad)), make_uint4(v[0], v[1], v[2], v[3]));
        }
      } else if (row < valid) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sm80::store_pair(out + 8 * c + 2 * quad, o[c][2 * h], o[c][2 * h + 1]);
      }
    }
  }
}

template <typename T, int D>
cudaError_t launch_output(const OutputArgs &a, cudaStream_t stream) {
  using F = OutputForm<D>;
  const int64_t blocks = a.shape.table.num_chunks * (a.reverse ? a.shape.heads_kv : a.shape.heads_q);
  if (blocks == 0) return cudaSuccess;
  const bool gradient = a.dot != nullptr || a.bias != nullptr || a.out_float != nullptr;
  return launch_kernel(gradient                     ? output_kernel<T, D, Extra::kGradient>
                       : a.row_norm.data != nullptr ? output_kernel<T, D, Extra::kNorm>
                                                    : output_kernel<T, D, Extra::kNone>,
                       static_cast<unsigned>(blocks), F::kThreads, F::kShared, stream, a);
}

}  // namespace powerattn::cuda::linear
