// SPDX-License-Identifier: Apache-2.0
// Parts that the forward `output` kernels of both head sizes share.
#pragma once

#include "half.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "units.cuh"

namespace powerattn::cuda::sm90 {

constexpr int kRows =
    kOutputRows;                 // per unit: 2 warpgroups x 2 m64 tiles; 1/256 byte of state per FLOP from L2
constexpr int kRowTiles = 4;     // m64 tiles
constexpr int kKeys = 64;        // keys per block
constexpr int kMetaBytes = 768;  // per stage: 64 factors, 64 log2 gates, 1 advance (floats)

struct UnitMeta {                     // what the producer tells the consumers about a unit
  int32_t head, row, length, blocks;  // blocks: 64-key blocks to read; head < 0: no more units
  int32_t states, batch;              // states: the chunk starts from a state
  int64_t token;
  float state_factor;  // exp(G_row0): decay of the state at the tile's first row
  Units units;         // float16: of S and Z
  // For the producers themselves, which read what they need at every stage instead of keeping it in registers:
  // blocks that tensor maps can load, the chunk's gate sums, and which state it starts from.
  int32_t mapped, head_kv;
  const double *gate;
  int64_t state;
};

// Key factors of block j for a tile that starts at block n, all <= 1. G is the chunk's inclusive gate sum, B_b
// its value at the first row of block b.
//   j < n:  factor = exp(B_n - G_j)                                                  (common to the tile)
//   j >= n: factor = exp(B_{j+1} - G_j), advance = exp(B_{j+1} - B_j), log2 gate = (G_j - B_j) log2(e)
// A lane of a producer warp has keys `lane` and `lane` + 32, and loads them a block ahead: the latency of a
// load is as long as the consumers need for a block.
struct KeyGates {
  double g[2], reference;
};
__device__ __forceinline__ KeyGates load_key_gates(const double *gate, int block, int first_block, int length,
                                                   int lane) {
  KeyGates k{{0.0, 0.0}, 0.0};
  if (gate) {
    const int b0 = block * kKeys, i = b0 + lane, last = length - 1;
    k.g[0] = __ldg(gate + min(i, last));
    k.g[1] = __ldg(gate + min(i + 32, last));
    k.reference = __ldg(gate + (block < first_block ? first_block * kKeys : min(b0 + kKeys, last)));
  }
  return k;
}
__device__ __forceinline__ void write_key_meta(uint32_t meta, const KeyGates &k, int block, int length,
                                               int lane, uint32_t advance_at = 512) {
  const double start = __shfl_sync(0xffffffffu, k.g[0], 0);  // B_b
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = lane + 32 * i;
    const float factor =
        block * kKeys + key < length ? exp2_fast(static_cast<float>(k.reference - k.g[i]) * kLog2e) : 0.f;
    store_f1(meta + key * 4, factor);
    store_f1(meta + 256 + key * 4, static_cast<float>(k.g[i] - start) * kLog2e);
  }
  if (lane == 0) store_f1(meta + advance_at, exp2_fast(static_cast<float>(k.reference - start) * kLog2e));
}

// Weights of a 64 x 64 block from its scores, as the A operand of the product with v:
//   below the diagonal  P_ij = s_ij^p factor_j;   on it  P_ij = s_ij^p 2^(local_i - local_j) for j <= i, else
//   0.
// l_i += sum_j P_ij (this lane's columns). All in the units of the rows; those of float16 may change, and with
// them the sums o, which no product in flight may write.
template <typename T, int kDegree, bool kDiagonal, int kN>
__device__ __forceinline__ void weigh(float (&s)[32], uint32_t (&w)[4][4], float (&o)[kN], float (&l)[2],
                                      RowUnits<T> &units, uint32_t meta, int lane, int warp) {
  const int row = warp * 16 + lane / 4, col = (lane & 3) * 2;
  float g0 = 0.f, g1 = 0.f;
  if constexpr (kDiagonal) {
    g0 = load_f1(meta + 256 + row * 4);
    g1 = load_f1(meta + 256 + row * 4 + 32);
  }
  [[maybe_unused]] float most[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float p[4];
    if constexpr (kDiagonal) {
      const float2 g = load_f2(meta + 256 + (n * 8 + col) * 4);
      const int j = n * 8 + col;
      p[0] = j <= row ? power<kDegree>(s[4 * n]) * exp2_fast(g0 - g.x) : 0.f;
      p[1] = j + 1 <= row ? power<kDegree>(s[4 * n + 1]) * exp2_fast(g0 - g.y) : 0.f;
      p[2] = j <= row + 8 ? power<kDegree>(s[4 * n + 2]) * exp2_fast(g1 - g.x) : 0.f;
      p[3] = j + 1 <= row + 8 ? power<kDegree>(s[4 * n + 3]) * exp2_fast(g1 - g.y) : 0.f;
    } else {
      const float2 c = load_f2(meta + (n * 8 + col) * 4);
      p[0] = power<kDegree>(s[4 * n]) * c.x;
      p[1] = power<kDegree>(s[4 * n + 1]) * c.y;
      p[2] = power<kDegree>(s[4 * n + 2]) * c.x;
      p[3] = power<kDegree>(s[4 * n + 3]) * c.y;
    }
    if constexpr (kCounted<T>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[4 * n + i] = p[i] *= units[i / 2];
        most[i / 2] += kDegree % 2 ? fabsf(p[i]) : p[i];
      }
    }
    if (!kCounted<T> || kDegree % 2) {
      l[0] += p[0] + p[1];
      l[1] += p[2] + p[3];
    }
    if constexpr (!kCounted<T>) {
      w[n / 2][(n & 1) * 2] = pack2<T>(p[0], p[1]);
      w[n / 2][(n & 1) * 2 + 1] = pack2<T>(p[2], p[3]);
    }
  }
  if constexpr (kCounted<T>) {
    if constexpr (kDegree % 2 == 0) {
      l[0] += most[0];
      l[1] += most[1];
    }
    units.make_room(most, s, o, l);
#pragma unroll
    for (int n = 0; n < 16; ++n) w[n / 4][n % 4] = pack2<T>(s[2 * n], s[2 * n + 1]);
  }
}

// Sums that a state gave times its decay f. float16: from the units of the state to those of the rows, which
// begin with 1.
template <typename T, int kN>
__device__ __forceinline__ void begin_rows(float (&o)[kN], float (&l)[2], RowUnits<T> &units,
                                           const volatile UnitMeta &u) {
  float f[2] = {u.state_factor, u.state_factor};
  if constexpr (kCounted<T>) {
    const float s = u.units.s, z = u.units.z;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l[h] *= z;
      units.unit[h] = 1.f;
      f[h] = units.raise(h, l[h], f[h]);
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) o[i] *= s;
  }
  scale_rows(o, l, f[0], f[1]);
}

// Sums of a row tile times the gates f of its two rows.
template <typename T, int kN>
__device__ __forceinline__ void decay_rows(float (&o)[kN], float (&l)[2], RowUnits<T> &units, float f0,
                                           float f1) {
  const float g0 = units.raise(0, l[0], f0), g1 = units.raise(1, l[1], f1);
  scale_rows(o, l, g0, g1);
}

// 16 rows x 64 columns held as 32 accumulators (already final), row by row and swizzled into 2 KB.
template <typename T>
__device__ __forceinline__ void stage_rows(const float *o, float f0, float f1, uint32_t staging, int lane) {
#pragma unroll
  for (int n = 0; n < 8; n += 2) {  // matrices: (row half 0, n), (half 1, n), (half 0, n + 1), (half 1, n + 1)
    const int row = (lane & 7) + ((lane >> 3) & 1) * 8, chunk = n + (lane >> 4);
    stmatrix4(staging + row * 128 + ((chunk ^ (row & 7)) << 4), pack2<T>(o[4 * n] * f0, o[4 * n + 1] * f0),
              pack2<T>(o[4 * n + 2] * f1, o[4 * n + 3] * f1), pack2<T>(o[4 * n + 4] * f0, o[4 * n + 5] * f0),
              pack2<T>(o[4 * n + 6] * f1, o[4 * n + 7] * f1));
  }
}
// Sends them, all of them rows of the result, by the copy engine: stores of the warp's own would hold up what
// it does next until memory has taken them. The staging is free after await_sent().
template <typename T>
__device__ __forceinline__ void send_rows(const float *o, float f0, float f1, uint32_t staging,
                                          const TileMap &y, int column, int token, int head, int batch,
                                          int lane) {
  stage_rows<T>(o, f0, f1, staging, lane);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) tensor_store(&y.map, staging, column, token, head * y.step_head, batch * y.step_batch);
}
// Whether the rows from `row` on all are; can_send: known to be the same for the warp, since what is in uniform
// registers would leave them otherwise.
__device__ __forceinline__ bool are_whole(const TileMap &y, int row, int length) {
  return y.tiled && row + kResultRows <= length;
}
__device__ __forceinline__ bool can_send(const TileMap &y, int row, int length) {
  return __shfl_sync(0xffffffffu, are_whole(y, row, length), 0);
}
template <int kPending = 0>
__device__ __forceinline__ void await_sent(int lane) {
  if (lane == 0) bulk_store_wait_read<kPending>();
  __syncwarp();
}

// Writes 16 rows x 64 columns held as 32 accumulators (already final) through 2 KB of this warp's shared
// memory. kFloats: y may be float32.
template <typename T, bool kFloats = false>
__device__ __forceinline__ void store_rows(const float *o, float f0, float f1, uint32_t staging,
                                           const Tensor &y, T *base, int valid, int lane) {
  if (y.vector) {
    stage_rows<T>(o, f0, f1, staging, lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8, chunk = lane & 7;
      const uint4 v = load_u4(staging + row * 128 + ((chunk ^ (row & 7)) << 4));
      if (row < valid) *reinterpret_cast<uint4 *>(base + row * y.stride_t + chunk * 8) = v;
    }
    __syncwarp();
  } else if (kFloats && y.floats) {
    const int row = lane / 4;
    float *p = reinterpret_cast<float *>(base + row * y.stride_t) + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (row < valid) *reinterpret_cast<float2 *>(p + n * 8) = make_float2(o[4 * n] * f0, o[4 * n + 1] * f0);
      if (row + 8 < valid)
        *reinterpret_cast<float2 *>(p + n * 8 + 4 * y.stride_t) =
            make_float2(o[4 * n + 2] * f1, o[4 * n + 3] * f1);
    }
  } else {
    const int row = lane / 4, col = (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t a = pack2<T>(o[4 * n] * f0, o[4 * n + 1] * f0),
                     b = pack2<T>(o[4 * n + 2] * f1, o[4 * n + 3] * f1);
      uint16_t *p = reinterpret_cast<uint16_t *>(base) + row * y.stride_t + n * 8 + col;
      if (row < valid) p[0] = a & 0xffff, p[1] = a >> 16;
      p += 8 * y.stride_t;
      if (row + 8 < valid) p[0] = b & 0xffff, p[1] = b >> 16;
    }
  }
}

// y_i = scale^p O_i / L_i with L_i = scale^p l_i + eps (normalised; 0 where L_i = 0), else scale^p O_i. O and l
// are `unit` times what they stand for.
__device__ __forceinline__ float output_factor(const Shape &p, float l, float unit, float *norm) {
  const float scale = p.scale_p / unit;
  *norm = scale * l + p.eps;
  if (!p.normalize) return scale;
  return *norm != 0.f ? scale / *norm : 0.f;
}

}  // namespace powerattn::cuda::sm90
