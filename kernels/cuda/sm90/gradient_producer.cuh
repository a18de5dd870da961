// SPDX-License-Identifier: Apache-2.0
// The producers of the gradient kernels: x and u of a unit of 128 rows, then the state's tiles, then the
// columns z and y by 64 with their factors.
#pragma once

#include "gradient.cuh"
#include "output_producer.cuh"

namespace powerattn::cuda::sm90 {

template <int kDim>
struct GradientLayout {
  static constexpr int kTile = 64 * kDim * 2;  // 64 rows, in halves of 64 columns
  static constexpr int kStage = 2 * kTile;     // two state tiles, or 64 columns of z and y
  static constexpr int kStages = kDim == 64 ? 8 : 4;
  static constexpr int kNormStages = 4 * kDim * kDim / kStage;
  // d = 64 (128): 1024 (alignment) + rows 32 KB (64) + ring 8 x 16 KB (4 x 32) + staging 8 x 2 KB + meta 8 (4)
  // x 1040
  // + units + barriers: 196 KB (224).
  static constexpr int kSmem = 1024 + 4 * kTile + kStages * kStage + kConsumerWarps * 2048 + kStages * kMeta +
                               4 * static_cast<int>(sizeof(GradientUnit)) + 256;
};

template <int kDim>
struct GradientSmem {
  using L = GradientLayout<kDim>;
  uint32_t rows, ring, staging, meta, unit, full, empty, rows_full, rows_empty;
  __device__ explicit GradientSmem(uint32_t base) {
    rows = (base + 1023) & ~1023u;  // x: two tiles, u: two tiles
    ring = rows + 4 * L::kTile;
    staging = ring + L::kStages * L::kStage;
    meta = staging + kConsumerWarps * 2048;
    unit = meta + L::kStages * kMeta;
    full = unit + 4 * sizeof(GradientUnit);
    empty = full + 8 * L::kStages;
    rows_full = empty + 8 * L::kStages;
    rows_empty = rows_full + 8;
  }
  __device__ __forceinline__ uint32_t x(uint32_t m) const { return rows + m * L::kTile; }
  __device__ __forceinline__ uint32_t u(uint32_t m) const { return rows + (2 + m) * L::kTile; }
};

// Tensor maps of what the kernels read.
struct GradientMaps {
  TileMap x, u, z, y;
};
inline cudaError_t gradient_maps(const GradientArgs &a, GradientMaps *maps) {
  const int rows = a.keys ? a.p.heads_kv : a.p.heads_q, columns = a.keys ? a.p.heads_q : a.p.heads_kv;
  cudaError_t error = tile_map(a.x, a.p, rows, &maps->x);
  if (error == cudaSuccess) error = tile_map(a.u, a.p, rows, &maps->u);
  if (error == cudaSuccess) error = tile_map(a.z, a.p, columns, &maps->z);
  if (error == cudaSuccess) error = tile_map(a.y, a.p, columns, &maps->y);
  return error;
}

// Column factors of block `block`; G is the chunk's gate sum, `first` the tile's first block.
//   dq:     as the forward's keys (write_key_meta)
//   dk, dv: f_i = c r_i exp(G_i - G_ref), ref = the tile's last row for later blocks, the first block's last
//   row
//           for the second block; advance = exp(G_tile end - G_first block's end)
// The head and the block lie with the factors.
template <typename T>
__device__ __forceinline__ void write_query_meta(uint32_t meta, const GradientArgs &a,
                                                 const volatile GradientUnit &u, int lane) {
#pragma unroll 1
  for (int n = lane; n < 64; n += 32) {
    const int i = load_i1(meta + kBlock) * 64 + n;
    const bool valid = i < u.length;
    float factor = valid ? a.scale_p : 0.f, g = valid ? 0.f : -INFINITY;
    if (const double *gate = u.gate; valid && gate) {
      const double own = __ldg(gate + i);
      g = static_cast<float>(own - __ldg(gate + (i & ~63))) * kLog2e;
      const int later = (i - u.row) >> 6;  // blocks behind the tile's first
      if (later > 0) {
        const double reference = __ldg(gate + min(u.row + (later == 1 ? 63 : 127), u.length - 1));
        factor *= exp2_fast(static_cast<float>(own - reference) * kLog2e);
      }
    }
    store_f1(meta + n * 4, factor);
    store_f1(meta + kGate + n * 4, g);
    float r = valid ? 1.f : 0.f, delta = 0.f;
    if (valid) {
      const int64_t row = token_row(a.p, u.batch, a.p.heads_q, load_i1(meta + kHead), u.token) + i;
      if (a.r) r = a.r[row];
      if (a.delta) delta = a.delta[row];
    }
    if constexpr (kCounted<T>) {
      r *= u.lifts.weight;
      delta *= u.lifts.ratio;
    }
    store_f1(meta + n * 4, load_f1(meta + n * 4) * r);
    store_f1(meta + kR + n * 4, a.scale_p * r);
    store_f1(meta + kDelta + n * 4, delta);
  }
}

// float16: what weights of the unit's rows have beside the columns' factors (GradientUnit). The references are
// those of the columns' factors: queries, the first row of the tile and of its second block; keys, the last row
// of the tile and of its first block.
template <bool kKeys>
__device__ __forceinline__ void write_row_factors(volatile GradientUnit &u, float scale, int lane) {
  const double *const gate = u.gate;
  const int last = u.length - 1;
#pragma unroll 1
  for (int i = lane; i < kUnitRows; i += 32) {
    float f = kKeys ? 1.f : scale * u.lifts.weight * u.r[i], far = 1.f, near = 1.f;
    if (gate) {
      const double own = __ldg(gate + min(u.row + i, last)),
                   a = __ldg(gate + min(u.row + (kKeys ? 127 : 0), last)),
                   b = __ldg(gate + min(u.row + (kKeys ? 63 : 64), last));
      far = exp2_fast(static_cast<float>(kKeys ? a - own : own - a) * kLog2e);
      near = exp2_fast(static_cast<float>(kKeys ? b - own : own - b) * kLog2e);
    }
    u.own[i] = f;
    u.far[i] = f * far;
    u.near[i] = (kKeys ? i < 64 : i >= 64) ? f * near : 0.f;  // of the rows that see the other block whole
  }
}

template <typename T, int kDegree, bool kKeys, int kDim>
__device__ __forceinline__ void produce_gradient(const GradientArgs &a, const GradientMaps &maps,
                                                 const GradientSmem<kDim> &s, GradientUnit *slots) {
  using L = GradientLayout<kDim>;
  constexpr int kTile = L::kTile, kStage = L::kStage, kStages = L::kStages;
  constexpr int kStateTiles = tile_count(2, kDim);
  static_assert(kStages % kProducers == 0);
  const Shape &p = a.p;
  const int heads = kKeys ? p.heads_kv : p.heads_q;
  // Turns, lanes, warps, barriers and what is read anew at every stage: as in output_producer.cuh.
  Turns<kStages> at{1u << 31};
  const auto lane = [] { return thread_here() & 31; };
  const auto warp = [] { return thread_here() >> 5 & (kProducers - 1); };
  for (;;) {
    if (warp() == 0) {
      volatile GradientUnit &next = slots[2 + (at.unit() ^ 1)];
      for (;;) {
        const int ticket = next_ticket(a.ticket, lane());
        if (ticket >= p.table.num_tiles * heads * 2) {
          if (lane() == 0) next.head = -1;
          break;
        }
        RowTile t = row_tile_at(p, static_cast<uint32_t>(ticket) >> 1, heads, a.together);
        t.row += kKeys ? (ticket & 1) * kUnitRows : (~ticket & 1) * kUnitRows;
        if (t.row >= t.chunk.length) continue;
        if (lane() == 0) {
          const int heads_z = kKeys ? p.group : 1, first = t.row / 64, length = t.chunk.length,
                    blocks = (length + 63) / 64;
          next.head = t.head;
          next.row = t.row;
          next.length = length;
          next.main = kKeys ? max(0, blocks - first - 2) * heads_z : first;
          next.first = kKeys ? (first + 1 < blocks ? heads_z : 0) : 1;
          next.second = kKeys ? heads_z : first + 1 < blocks;
          next.states =
              a.state && (a.end_has_state || (kKeys ? t.chunk.index + 1 < t.chunk.count : t.chunk.index > 0));
          next.batch = t.batch;
          next.token = t.chunk.start;
          next.mapped = mapped_blocks(maps.z, maps.y, p, t.chunk, blocks);
          next.blocks = blocks;
          next.head_kv = kKeys ? t.head : t.head / p.group;
          next.state = int64_t(t.chunk_index) * p.heads_kv + next.head_kv;
          if constexpr (kCounted<T>) {
            const Lifts lifts = lifts_of<T>(p, a.limits, next.state);
            next.lifts.weight = lifts.weight;
            next.lifts.ratio = lifts.ratio;
            if (next.states) {
              next.units.s = a.units[next.state].s;
              next.units.z = a.units[next.state].z;
            }
          }
          const double *gate =
              a.gate ? a.gate + token_row(p, next.batch, p.heads_kv, next.head_kv, next.token) : nullptr;
          next.gate = gate;
          const double g = !gate   ? 0.0
                           : kKeys ? gate[next.length - 1] - gate[min(next.row + kUnitRows, next.length) - 1]
                                   : gate[next.row];
          next.state_factor = exp2f(static_cast<float>(g) * kLog2e);
          next.advance = 1.f;
          if (kKeys && gate && next.second && next.first)
            next.advance = exp2_fast(
                static_cast<float>(gate[min(next.row + 127, next.length - 1)] - gate[next.row + 63]) * kLog2e);
        }
        __syncwarp();
        if (!kKeys) {
          const int64_t row = token_row(p, next.batch, p.heads_q, next.head, next.token) + next.row;
#pragma unroll 1
          for (int i = lane(); i < kUnitRows; i += 32) {
            const bool in = next.row + i < next.length;
            next.r[i] = in && a.r ? a.r[row + i] : 1.f;
            next.delta[i] = in && a.delta ? a.delta[row + i] : 0.f;
          }
        }
        if constexpr (kCounted<T>) write_row_factors<kKeys>(next, a.scale_p, lane());
        break;
      }
    }
    named_barrier<1, 32 * kProducers>();
    at.next_unit();
    const volatile GradientUnit &u = slots[2 + at.unit()];
    if (warp() == 0) {
      barrier_wait(s.rows_empty, at.unit() ^ 1);
      copy_words(slots + at.unit(), &u, sizeof(GradientUnit) / 4, lane());
      if ((maps.x.tiled && maps.u.tiled) || u.head < 0) {  // rows behind the chunk's end are nobody's
        if (u.head >= 0 && lane() == 0) {
          barrier_expect_only(s.rows_full, 4 * kTile);
#pragma unroll 1
          for (int m = 0; m < 2; ++m) {
            const int token = static_cast<int>(u.token) + u.row + m * 64;
            fetch_tile<kDim>(s.x(m), maps.x, u.batch, u.head, token, s.rows_full);
            fetch_tile<kDim>(s.u(m), maps.u, u.batch, u.head, token, s.rows_full);
          }
        }
        hand_over(s.rows_full);
      } else {
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {  // x: two tiles, u: two tiles
          const Tensor &x = n < 2 ? a.x : a.u;
          const int row = u.row + (n & 1) * 64;
          load_tile<T, kDim, 32>(n < 2 ? s.x(n) : s.u(n & 1), x,
                                 row_pointer<T>(x, u.batch, u.head, u.token + row), u.length - row, lane());
        }
        hand_over_copies(s.rows_full);
      }
    }
    if (u.head < 0) break;

    int n = (warp() - at.turn) & (kProducers - 1);  // this warp's next stage of the unit
    if (kDegree == 2 && u.states) {
      const int norms = a.norm ? L::kNormStages : 0, total = norms + (kStateTiles + 1) / 2;
#pragma unroll 1
      for (; n < total; n += kProducers) {
        if (lane() != 0) continue;
        const char *src =
            n < norms
                ? static_cast<const char *>(a.norm) + (u.state * L::kNormStages + n) * kStage
                : static_cast<const char *>(a.state) + u.state * (kStateTiles * kTile) + (n - norms) * kStage;
        const uint32_t bar = s.full + 8 * at.stage(n);
        barrier_wait(s.empty + 8 * at.stage(n), at.phase(n) ^ 1);
        barrier_expect(bar, kStage);
        bulk_load(s.ring + at.stage(n) * kStage, src, kStage, bar);
      }
      __syncwarp();
      at.turn += total;
      n -= total;
    }
    const int columns = kKeys ? u.main + u.first + u.second : min(u.row / 64 + 2, u.blocks);
#pragma unroll 1
    for (; n < columns; n += kProducers) {
      barrier_wait(s.empty + 8 * at.stage(n), at.phase(n) ^ 1);
      const auto meta = [&] { return s.meta + at.stage(n) * kMeta; };
      const auto full = [&] { return s.full + 8 * at.stage(n); };
      if constexpr (kKeys) {
        // Later blocks, head by head of the group; then the tile's second block, then its first, for all heads.
        // Kept with the factors, for want of registers.
        if (lane() == 0) {
          const int main = u.main, m = n < main ? n : n - main;
          const int span =
              n < main ? u.blocks - u.row / 64 - 2 : p.group;  // blocks of a head, or heads of a block
          const int part = m / span, rest = m - part * span;
          store_i1(meta() + kHead, u.head * p.group + (n < main ? part : rest));
          store_i1(meta() + kBlock, u.row / 64 + (n < main ? 2 + rest : (u.first > 0 ? 1 : 0) - part));
          store_f1(meta() + kAdvance, u.advance);
        }
        __syncwarp();
      }
      const auto head = [&] { return kKeys ? load_i1(meta() + kHead) : u.head_kv; };
      const auto block = [&] { return kKeys ? load_i1(meta() + kBlock) : n; };
      if (block() < u.mapped && lane() == 0) {
        const uint32_t stage = s.ring + at.stage(n) * kStage, bar = full();
        const int token = static_cast<int>(u.token) + block() * 64, batch = u.batch;
        barrier_expect_only(bar, kStage);
        fetch_tile<kDim>(stage, maps.z, batch, head(), token, bar);
        fetch_tile<kDim>(stage + kTile, maps.y, batch, head(), token, bar);
      }
      if constexpr (kKeys)
        write_query_meta<T>(meta(), a, u, lane());
      else
        write_key_meta(meta(), load_key_gates(u.gate, n, u.row / 64, u.length, lane()), n, u.length, lane(),
                       kAdvance);
      if (block() < u.mapped) {
        hand_over(full());
      } else {
#pragma unroll 1
        for (int m = 0; m < 2; ++m) {
          const Tensor &x = m ? a.y : a.z;
          load_tile<T, kDim, 32>(s.ring + at.stage(n) * kStage + m * kTile, x,
                                 row_pointer<T>(x, u.batch, head(), u.token + block() * 64),
                                 u.length - block() * 64, lane());
        }
        hand_over_copies(full());
      }
    }
    at.turn += columns;
  }
}

// Launches the kernel of a head size for a degree. Kernels: `kernel<T, degree, keys, correct>()`, and its
// kShared bytes of shared memory.
template <class Kernels, typename T, int kDegree, bool kCorrect>
cudaError_t launch_gradient(GradientArgs a, int sms, cudaStream_t stream) {
  GradientMaps maps;
  const cudaError_t error = gradient_maps(a, &maps);
  if (error != cudaSuccess) return error;
  a.together = rows_together(a.p, a.keys != 0);
  const auto kernel = a.keys ? Kernels::template kernel<T, kDegree, true, kCorrect>()
                             : Kernels::template kernel<T, kDegree, false, kCorrect>();
  return launch_early(kernel, sms, 384, Kernels::kShared, stream, a, maps);
}
template <class Kernels, typename T>
cudaError_t launch_gradient(const GradientArgs &a, int sms, cudaStream_t stream) {
  const bool correct = a.delta_out != nullptr || a.state_dot != nullptr;
  if ((correct || a.state != nullptr) && a.p.degree != 2) return cudaErrorInvalidValue;
  switch (a.p.degree) {
    case 1:
      return launch_gradient<Kernels, T, 1, false>(a, sms, stream);
    case 2:
      return correct ? launch_gradient<Kernels, T, 2, true>(a, sms, stream)
                     : launch_gradient<Kernels, T, 2, false>(a, sms, stream);
    case 4:
      return launch_gradient<Kernels, T, 4, false>(a, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
template <class Kernels>
cudaError_t launch_gradient(const GradientArgs &a, int sms, cudaStream_t stream) {
  return a.p.half ? launch_gradient<Kernels, __half>(a, sms, stream)
                  : launch_gradient<Kernels, __nv_bfloat16>(a, sms, stream);
}

}  // namespace powerattn::cuda::sm90
