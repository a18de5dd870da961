// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/prepare.h"

namespace powerattn::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

struct RopeShape {
  bool on;
  bool interleaved;
  int64_t dim;
  double log2_base;  // theta_i = base^(-2i/dim)
};

RopeShape rope_shape(const Problem &p, bool on) {
  return {on, p.rope.style == POWERATTN_ROPE_INTERLEAVED, on ? p.rope.dim : 0, std::log2(p.rope.base)};
}

// cos and sin of position * base^(-2i/dim). The angle is reduced in double: at position 1e6 a float angle would
// be wrong by 0.06.
__device__ void rotation(const RopeShape &rope, int64_t position, int64_t pair, float *c, float *s) {
  const double turns = double(position) * exp2(-2.0 * double(pair) / double(rope.dim) * rope.log2_base) *
                       0.15915494309189533577;  // 1 / (2 pi)
  sincospif(2.0f * float(turns - rint(turns)), s, c);
}

// Rows of a sequence: block x = tile of kWarps rows, y = head, z = sequence would be 65535 at most, so all
// three are folded into x. One warp per row; a lane takes pairs, then what is not rotated.
//   (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos); back with the angle negated.
template <class In, class Out, bool kBack>
__global__ void __launch_bounds__(kThreads)
    rotate_rows(const Sequence *sequences, bool packed, int64_t num_sequences, int64_t batch, int64_t seq_len,
                int64_t heads, int64_t dim, const In *in, int64_t in_b, int64_t in_t, int64_t in_h, Out *out,
                int64_t out_b, int64_t out_t, int64_t out_h, float scale, RopeShape rope,
                const int64_t *offsets) {
  const int lane = threadIdx.x & 31;
  const int64_t rows = batch * seq_len;
  const int64_t pairs = rope.on ? rope.dim / 2 : 0;
  for (int64_t r = blockIdx.x * int64_t(kWarps) + (threadIdx.x >> 5); r < rows;
       r += int64_t(gridDim.x) * kWarps) {
    const int64_t b = r / seq_len, t = r % seq_len;
    int64_t owner = b, index = t;
    bool valid = true;
    if (packed) {  // the last sequence that starts at or before t; empty ones share the start of the next
      int64_t low = 0, high = num_sequences;
      while (low < high) {
        const int64_t mid = (low + high) / 2;
        if (sequences[mid].start <= t) {
          low = mid + 1;
        } else {
          high = mid;
        }
      }
      owner = low - 1;
      valid = owner >= 0 && t < sequences[owner].start + sequences[owner].length;
      index = valid ? t - sequences[owner].start : 0;
    }
    const int64_t position = index + (offsets && valid ? offsets[owner] : 0);
    const In *from = in + b * in_b + t * in_t;
    Out *to = out + b * out_b + t * out_t;
    if (!valid) {
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = lane; i < dim; i += 32) to[h * out_h + i] = from_float<Out>(0.0f);
      continue;
    }
    for (int64_t i = lane; i < pairs; i += 32) {
      float c, s;
      rotation(rope, position, i, &c, &s);
      if (kBack) s = -s;
      const int64_t i1 = rope.interleaved ? 2 * i : i, i2 = rope.interleaved ? 2 * i + 1 : i + pairs;
      for (int64_t h = 0; h < heads; ++h) {
        const float x1 = to_float(from[h * in_h + i1]), x2 = to_float(from[h * in_h + i2]);
        to[h * out_h + i1] = from_float<Out>(scale * (x1 * c - x2 * s));
        to[h * out_h + i2] = from_float<Out>(scale * (x1 * s + x2 * c));
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 2 * pairs + lane; i < dim; i += 32)
        to[h * out_h + i] = from_float<Out>(scale * to_float(from[h * in_h + i]));
  }
}

int grid_for(int64_t rows) { return int(std::min<int64_t>(ceil_div(rows, kWarps), 132 * 32)); }

}  // namespace

cudaError_t prepare(const Problem &p, const ChunkTable &table, const PrepareArgs &a, cudaStream_t stream) {
  const int64_t rows = p.batch * p.seq_len;
  if (rows == 0) return cudaSuccess;
  const RopeShape rope = rope_shape(p, a.rope);
  return with_dtype(a.in_dtype, [&](auto in) {
    return with_dtype(a.out_dtype, [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      return launch_kernel(rotate_rows<In, Out, false>, grid_for(rows), kThreads, 0, stream, table.sequences,
                           p.packed, p.sequences, p.batch, p.seq_len, a.heads, a.dim,
                           static_cast<const In *>(a.in.data), p.packed ? 0 : a.in.stride_b, a.in.stride_t,
                           a.in.stride_h, static_cast<Out *>(a.out), a.heads * p.seq_len * a.dim, a.dim,
                           p.seq_len * a.dim, a.scale, rope, a.rope_offset);
    });
  });
}

cudaError_t finish(const Problem &p, const ChunkTable &table, const FinishArgs &a, cudaStream_t stream) {
  const int64_t rows = p.batch * p.seq_len;
  if (rows == 0) return cudaSuccess;
  const RopeShape rope = rope_shape(p, a.rope);
  return with_dtype(a.out_dtype, [&](auto out) {
    using Out = decltype(out);
    return launch_kernel(rotate_rows<float, Out, true>, grid_for(rows), kThreads, 0, stream, table.sequences,
                         p.packed, p.sequences, p.batch, p.seq_len, a.heads, a.dim, a.in,
                         a.heads * p.seq_len * a.dim, a.dim, p.seq_len * a.dim, static_cast<Out *>(a.out.data),
                         p.packed ? 0 : a.out.stride_b, a.out.stride_t, a.out.stride_h, a.scale, rope,
                         a.rope_offset);
  });
}

}  // namespace powerattn::cuda
