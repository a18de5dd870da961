// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/states.h"
#include "kernels/cuda/tiles.h"

namespace powerattn::cuda {
namespace {

constexpr int kThreads = 256;

// S <- exp(L_m) S + S_m over the segments m in order, one thread per element of (sequence, head).
__global__ void __launch_bounds__(kThreads)
    compose_kernel(int64_t count, const void *in, int64_t in_seg, int64_t in_n, int64_t in_h, void *out,
                   int64_t out_n, int64_t out_h, Dtype dtype, const float *log_g, int64_t g_seg, int64_t g_n,
                   int64_t g_h, int64_t heads, int64_t elements) {
  const int64_t n = blockIdx.y / heads, h = blockIdx.y % heads;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < elements;
       i += int64_t(gridDim.x) * kThreads) {
    float x = 0;
    for (int64_t m = 0; m < count; ++m) {
      const float gate = log_g ? expf(log_g[m * g_seg + n * g_n + h * g_h]) : 1.0f;
      x = gate * x + load_as_float(in, dtype, m * in_seg + n * in_n + h * in_h + i);
    }
    store_from_float(out, dtype, n * out_n + h * out_h + i, x);
  }
}

// L <- L + L_m.
__global__ void __launch_bounds__(kThreads)
    compose_gates(int64_t count, const float *log_g, int64_t g_seg, int64_t g_n, int64_t g_h, int64_t heads,
                  int64_t total, float *out) {
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= total) return;
  double sum = 0;
  if (log_g)
    for (int64_t m = 0; m < count; ++m) sum += log_g[m * g_seg + i / heads * g_n + i % heads * g_h];
  out[i] = float(sum);
}

__global__ void __launch_bounds__(kThreads) convert_kernel(ConvertArgs a) {
  const int64_t n = blockIdx.y / a.heads, h = blockIdx.y % a.heads;
  const int64_t from = a.src_slots ? a.src_slots[n] : n, to = a.dst_slots ? a.dst_slots[n] : n;
  if (from < 0 || to < 0 || from >= a.src_num_slots || to >= a.dst_num_slots) return;
  const int64_t src = from * a.src_stride_n + h * a.src_stride_h,
                dst = to * a.dst_stride_n + h * a.dst_stride_h;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < a.elements;
       i += int64_t(gridDim.x) * kThreads)
    store_from_float(a.dst, a.dst_dtype, dst + i, load_as_float(a.src, a.src_dtype, src + i));
}

dim3 element_grid(int64_t elements, int64_t rows) {
  return dim3(unsigned(std::min<int64_t>(ceil_div(elements, kThreads * 4), 1024)), unsigned(rows));
}

// ---- Canonical order <-> tiles ---------------------------------------------------------------------------

// Padded row `r` of the tile layout: its canonical row (-1: padding), stored = factor * canonical, and whether
// it is the mirror (j, i) of a row that the diagonal tile holds as (i, j) too.
struct TileRow {
  int64_t row;
  float factor;
  bool mirror;
};

__device__ TileRow locate(int32_t degree, int64_t d, int64_t r) {
  if (degree == 1) return {r < d ? r : -1, 1.0f, false};
  int ib, jb;
  tile_pair(tile_blocks(int(d)), int(r / kTileRows), &ib, &jb);
  const int64_t i = 8 * ib + r % kTileRows / 8, j = 8 * jb + r % 8;
  const int64_t low = min(i, j), high = max(i, j);
  return {low * d - low * (low - 1) / 2 + (high - low), tile_scale(ib == jb, i == j), i > j};
}

// Position of (padded row, column) inside the state of one (sequence, head).
__device__ int64_t padded_position(int64_t e, int64_t r, int64_t col) {
  return r / kTileRows * kTileRows * e + tile_element(int(e), int(r % kTileRows), int(col));
}

template <bool kToTiles>
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(int32_t degree, int64_t d, float *canonical, int64_t stride_n, int64_t stride_h, float *tiles,
                 int64_t heads, int64_t rows, int64_t e) {
  const int64_t n = blockIdx.y / heads, h = blockIdx.y % heads;
  float *can = canonical + n * stride_n + h * stride_h;
  float *til = tiles + blockIdx.y * rows * e;
  for (int64_t x = blockIdx.x * int64_t(kThreads) + threadIdx.x; x < rows * e;
       x += int64_t(gridDim.x) * kThreads) {
    const int64_t r = x / e, col = x % e, position = padded_position(e, r, col);
    const TileRow t = locate(degree, d, r);
    if (kToTiles) {
      til[position] = t.row < 0 ? 0.0f : t.factor * can[t.row * e + col];
    } else if (t.row >= 0 && !t.mirror) {
      can[t.row * e + col] = til[position] / t.factor;
    }
  }
}

// Z[i][j] = canonical / sqrt 2 where i != j.
template <bool kToTiles>
__global__ void __launch_bounds__(kThreads)
    z_kernel(int32_t degree, int64_t d, float *canonical, int64_t stride_n, int64_t stride_h, float *z,
             int64_t heads) {
  const int64_t n = blockIdx.y / heads, h = blockIdx.y % heads;
  float *can = canonical + n * stride_n + h * stride_h;
  const int64_t elements = degree == 1 ? d : d * d;
  for (int64_t x = blockIdx.x * int64_t(kThreads) + threadIdx.x; x < elements;
       x += int64_t(gridDim.x) * kThreads) {
    const int64_t i = degree == 1 ? x : x / d, j = degree == 1 ? x : x % d;
    const int64_t low = min(i, j), high = max(i, j);
    const int64_t row = degree == 1 ? x : low * d - low * (low - 1) / 2 + (high - low);
    const float factor = i == j ? 1.0f : 0.70710678118654757f;
    if (kToTiles) {
      z[blockIdx.y * elements + x] = factor * can[row];
    } else if (i <= j) {
      can[row] = z[blockIdx.y * elements + x] / factor;
    }
  }
}

template <bool kToTiles>
cudaError_t change_order(const Problem &p, const powerattn_state &canonical, float *tiles, float *z,
                         int64_t sequences, cudaStream_t stream) {
  const int64_t heads = p.heads_kv;
  const int64_t rows = tile_rows(p.degree, int(p.head_dim));
  for (int64_t first = 0; first < sequences; first += std::max<int64_t>(1, 65535 / heads)) {
    const int64_t n = std::min(std::max<int64_t>(1, 65535 / heads), sequences - first);
    if (tiles) {
      launch_kernel(tiles_kernel<kToTiles>, element_grid(rows * p.value_dim, n * heads), kThreads, 0, stream,
                    p.degree, p.head_dim, static_cast<float *>(canonical.s) + first * canonical.s_stride_n,
                    canonical.s_stride_n, canonical.s_stride_h, tiles + first * heads * rows * p.value_dim,
                    heads, rows, p.value_dim);
    }
    if (z && canonical.z) {
      const int64_t elements = p.degree == 1 ? p.head_dim : p.head_dim * p.head_dim;
      launch_kernel(z_kernel<kToTiles>, element_grid(elements, n * heads), kThreads, 0, stream, p.degree,
                    p.head_dim, static_cast<float *>(canonical.z) + first * canonical.z_stride_n,
                    canonical.z_stride_n, canonical.z_stride_h, z + first * heads * elements, heads);
    }
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t compose(const Problem &p, const powerattn_compose_args &a, cudaStream_t stream) {
  const int64_t rows = p.sequences * p.heads_kv;
  if (rows == 0) return cudaSuccess;
  const auto *log_g = static_cast<const float *>(a.log_g);
  const int64_t size = size_of(p.state_dtype);
  const int64_t per_slab = std::max<int64_t>(1, 65535 / p.heads_kv);
  for (int64_t first = 0; first < p.sequences; first += per_slab) {  // grid y limit
    const int64_t n = std::min(per_slab, p.sequences - first);
    auto fold = [&](const void *in, int64_t in_seg, int64_t in_n, int64_t in_h, void *out, int64_t out_n,
                    int64_t out_h, int64_t elements) {
      launch_kernel(compose_kernel, element_grid(elements, n * p.heads_kv), kThreads, 0, stream, a.count,
                    static_cast<const char *>(in) + first * in_n * size, in_seg, in_n, in_h,
                    static_cast<char *>(out) + first * out_n * size, out_n, out_h, p.state_dtype,
                    log_g ? log_g + first * a.log_g_stride_n : nullptr, a.log_g_stride_segment,
                    a.log_g_stride_n, a.log_g_stride_h, p.heads_kv, elements);
    };
    fold(a.segments.s, a.s_stride_segment, a.segments.s_stride_n, a.segments.s_stride_h, a.out.s,
         a.out.s_stride_n, a.out.s_stride_h, p.state_rows * p.value_dim);
    if (a.out.z)
      fold(a.segments.z, a.z_stride_segment, a.segments.z_stride_n, a.segments.z_stride_h, a.out.z,
           a.out.z_stride_n, a.out.z_stride_h, p.state_rows);
  }
  if (a.out_log_g) {
    launch_kernel(compose_gates, unsigned(ceil_div(rows, kThreads)), kThreads, 0, stream, a.count, log_g,
                  a.log_g_stride_segment, a.log_g_stride_n, a.log_g_stride_h, p.heads_kv, rows,
                  static_cast<float *>(a.out_log_g));
  }
  return cudaGetLastError();
}

cudaError_t convert(const ConvertArgs &a, cudaStream_t stream) {
  if (a.count == 0 || a.heads == 0 || a.elements == 0) return cudaSuccess;
  const int64_t per_slab = std::max<int64_t>(1, 65535 / a.heads);
  for (int64_t first = 0; first < a.count; first += per_slab) {
    ConvertArgs part = a;
    part.count = std::min(per_slab, a.count - first);
    // Without slots state n sits at n * stride: move the pool's base.
    if (a.src_slots) {
      part.src_slots += first;
    } else {
      part.src = static_cast<const char *>(a.src) + first * a.src_stride_n * size_of(a.src_dtype);
      part.src_num_slots -= first;
    }
    if (a.dst_slots) {
      part.dst_slots += first;
    } else {
      part.dst = static_cast<char *>(a.dst) + first * a.dst_stride_n * size_of(a.dst_dtype);
      part.dst_num_slots -= first;
    }
    launch_kernel(convert_kernel, element_grid(a.elements, part.count * a.heads), kThreads, 0, stream, part);
  }
  return cudaGetLastError();
}

cudaError_t to_tiles(const Problem &p, const powerattn_state &canonical, float *tiles, float *z,
                     int64_t sequences, cudaStream_t stream) {
  return change_order<true>(p, canonical, tiles, z, sequences, stream);
}

cudaError_t from_tiles(const Problem &p, const float *tiles, const float *z, const powerattn_state &canonical,
                       int64_t sequences, cudaStream_t stream) {
  return change_order<false>(p, canonical, const_cast<float *>(tiles), const_cast<float *>(z), sequences,
                             stream);
}

}  // namespace powerattn::cuda
