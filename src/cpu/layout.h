// SPDX-License-Identifier: Apache-2.0
// How a call is cut into streams, waves and chunks, and where its buffers lie in the workspace. The function
// that carves the workspace is the one that sizes it.
//
// A stream is one (sequence, kv head). Streams are independent. In the forward and the backward each slot of a
// wave takes streams one after the other (pipeline.h); in summaries a wave of them advances chunk by chunk
// together, every phase of a chunk being a set of independent units. The number of streams in a wave depends on
// the threads, the arithmetic of a stream does not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/fast.h"
#include "pipeline.h"
#include "problem.h"

namespace powerattn {
namespace cpu {

// Hands out 256-byte aligned pieces; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void *base) : base_(static_cast<char *>(base)) {}

  template <class T>
  T *take(int64_t count) {
    const uint64_t at = used_;
    used_ += (static_cast<uint64_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T *>(base_ + at);
  }
  uint64_t used() const { return used_; }

 private:
  char *base_;
  uint64_t used_ = 0;
};

enum class Pass { kForward, kBackward, kBackwardSaved, kSummary };

// The shape of a call, from the problem and the tiling alone.
struct Geometry {
  int64_t chunk = 0;   // tokens per chunk
  int64_t chunks = 0;  // most chunks of one sequence
  int64_t streams = 0;
  int64_t wave = 0;         // streams in work at once
  bool low = false;         // bfloat16 products with states (Call::low)
  int64_t tile = 0;         // tokens per row tile
  int64_t tiles = 0;        // row tiles per chunk
  int64_t groups = 0;       // query heads per kv head
  bool states = false;      // chunks are joined by states, or the user passes some
  int64_t saved_slots = 0;  // states in the saved buffer, per kv head
};

// Rows per tile: 96 = 16 row groups of 6 (AVX2), 8 of 12, 7 of 14 with 2 spare: 96 rows use every strip of the
// state that they load into L1 96 times, and a chunk of 512 still has 6 tiles to share out.
constexpr int64_t kTile = 96;
// With bfloat16 products every tile reads all of the state, and its rows pass 16 by 16: the least that pairs of
// a chunk take at once.
constexpr int64_t kLowTile = 32;
constexpr int64_t kSummaryChunk = 512;

inline Geometry geometry(const Problem &p, const Tiling &tiling, Pass pass, bool has_low) {
  Geometry g;
  const int64_t longest = std::max<int64_t>(p.max_seq_len, 1);
  const int64_t chunk = pass == Pass::kSummary            ? kSummaryChunk
                        : tiling.form == Form::kAttention ? longest
                                                          : tiling.chunk;
  g.chunk = std::min(chunk, longest);
  g.chunks = (p.max_seq_len + g.chunk - 1) / g.chunk;
  g.streams = p.sequences * p.heads_kv;
  g.groups = p.group();
  g.states = p.use_state || g.chunks > 1 || pass == Pass::kSummary;
  // A state smaller than a block of the query, or one that no second chunk queries, does not repay its image,
  // and products take 32 tokens. Shorter chunks would also query states of a few tokens, whose rounding shows:
  // where q . k is small, (q . k)^p is a difference of large monomials.
  constexpr int64_t kLeastLowChunk = 32, kLeastLowRows = 256;
  g.low = has_low && pass == Pass::kForward && p.dtype == Dtype::kBfloat16 && g.chunks > 1 &&
          g.chunk >= kLeastLowChunk && p.state_rows >= kLeastLowRows;
  g.tile = g.low ? kLowTile : kTile;
  g.tiles = (g.chunk + g.tile - 1) / g.tile;
  // Four units per thread even out the ends of a phase.
  const int64_t units = g.tiles * g.groups;
  g.wave = std::clamp<int64_t>((4 * p.threads + units - 1) / units, 1, std::max<int64_t>(g.streams, 1));
  // Every thread has a stream of its own, while there are enough.
  if (pass != Pass::kSummary && g.chunks > 1) {
    g.wave = std::clamp<int64_t>(p.threads, g.wave, std::max<int64_t>(g.streams, 1));
  }
  // Slots of a sequence: one per chunk and one for its end. Packed, sequence n begins at slot
  // start / chunk + 2 n: enough, because ceil(x) + 1 <= floor(a + x) - floor(a) + 2.
  g.saved_slots = p.packed ? p.seq_len / g.chunk + 2 * p.sequences : p.sequences * (g.chunks + 1);
  return g;
}

template <class T>
fast::Call<T> make_call(const Problem &p, const Geometry &g, const fast::Kernels<T> &kernels, Pass pass) {
  fast::Call<T> c = {};
  const auto pad = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  c.d = static_cast<int>(p.head_dim);
  c.e = static_cast<int>(p.value_dim);
  c.p = p.degree;
  c.dp = static_cast<int>(pad(p.head_dim, kernels.nr));
  c.ep = static_cast<int>(pad(p.value_dim, kernels.nr));
  c.D = g.states ? p.state_rows : 0;
  c.Dp = pad(c.D, kernels.mr);
  c.cp = pad(g.chunk, kernels.nr);
  c.low = g.low;
  c.tile = g.tile;
  c.dtype = static_cast<int>(p.dtype);
  c.normalize = p.normalize;
  c.scale = p.scale;
  c.scale_p = std::pow(p.scale, p.degree);
  c.eps = p.eps;
  c.rope_style = p.rope.style;
  c.rope_dim = static_cast<int>(p.rope.dim);
  // exp(-200) is 0 in float32 even times the largest float32, exp(-2000) in float64.
  c.least_log_g = static_cast<T>(sizeof(T) == 4 ? -200 : -2000);
  return c;
}

// The buffers of one stream of the wave.
template <class T>
struct Slot {
  fast::Packed<T> k, v;
  fast::Gates<T> gates;
  fast::State<T> state;          // forward: the running state; backward: the running gradient of the state
  uint16_t *image = nullptr;     // with call.low: of the state at the chunk's start, written by its update
  T *history = nullptr;          // backward without `saved`: states at the chunk starts and at the end
  fast::Packed<T> *q = nullptr;  // [groups]
  fast::OutputGrad<T> *grad = nullptr;  // [groups]
  double *b = nullptr;                  // [tokens] the gate gradient's k . dk / p
  double *inner = nullptr;              // [state blocks] partial <S, dS>
  // The stream itself.
  int64_t sequence = 0, head = 0, batch = 0, begin = 0, tokens = 0, chunks = 0, saved_slot = 0;
  double position = 0;
  bool carried = false;  // `state` holds something
  // Forward and backward: the phase that is open, 0 without a stream, and its chunk.
  int phase = 0;
  int64_t chunk = 0;
};

template <class T>
struct Buffers {
  double *frequency;
  Slot<T> *slots;
  Lane *lanes;    // forward and backward
  char *scratch;  // [threads][scratch_bytes]
  int64_t scratch_bytes;
};

template <class T>
int64_t state_elements(const fast::Call<T> &c) {
  return c.Dp * (c.ep + 1);
}
template <class T>
int64_t unit_rows(const fast::Call<T> &c) {
  return c.low ? fast::kLowUpdateRows : fast::kUpdateRows;
}
template <class T>
int64_t state_blocks(const fast::Call<T> &c) {
  return (c.D + unit_rows(c) - 1) / unit_rows(c);
}

template <class T>
fast::State<T> state_at(const fast::Call<T> &c, T *base) {
  return {base, base == nullptr ? nullptr : base + c.Dp * c.ep, nullptr};
}

// Carves everything that a pass needs.
template <class T>
Buffers<T> carve(const Problem &p, const Geometry &g, const fast::Call<T> &c, const fast::Kernels<T> &kernels,
                 Pass pass, Carver *carver) {
  Buffers<T> out = {};
  out.frequency = carver->take<double>(c.rope_dim / 2);
  out.slots = carver->take<Slot<T>>(g.wave);
  if (pass != Pass::kSummary) out.lanes = carver->take<Lane>(g.wave);
  const int64_t rows = c.cp + kernels.mr;  // the last row group may read past the chunk
  const bool backward = pass == Pass::kBackward || pass == Pass::kBackwardSaved;
  const bool reverse = backward || pass == Pass::kSummary;
  const auto pack = [&](int64_t width, bool in_rows, bool in_cols, bool in_strips) {
    return fast::Packed<T>{in_rows ? carver->take<T>(rows * width) : nullptr,
                           in_cols ? carver->take<T>(c.cp * width) : nullptr,
                           in_strips ? carver->take<T>(c.cp * width) : nullptr};
  };
  for (int64_t i = 0; i < g.wave; ++i) {
    Slot<T> s;
    s.k = pack(c.dp, backward, !c.low, backward);
    s.v = pack(c.ep, backward, backward, !c.low);
    s.gates = {carver->take<double>(c.cp), carver->take<double>(c.cp), carver->take<T>(c.cp),
               carver->take<T>(c.cp), 1.0};
    if (c.low) {
      s.k.keys = carver->take<uint16_t>(c.cp * c.dp);
      s.k.columns = carver->take<uint16_t>(c.cp * c.dp);
      s.v.values = carver->take<uint16_t>(c.cp * c.ep);
      s.image = carver->take<uint16_t>(kernels.image_size(c));
    }
    if (g.states) s.state = state_at(c, carver->take<T>(state_elements(c)));
    if (reverse) {
      s.q = carver->take<fast::Packed<T>>(g.groups);
      s.grad = carver->take<fast::OutputGrad<T>>(g.groups);
      for (int64_t h = 0; h < g.groups; ++h) {
        const fast::Packed<T> q = pack(c.dp, backward, true, backward);
        const fast::OutputGrad<T> grad = {pack(c.ep, true, backward, true), carver->take<T>(c.cp),
                                          carver->take<T>(c.cp), carver->take<T>(c.cp),
                                          carver->take<double>(c.cp)};
        if (s.q != nullptr) s.q[h] = q;
        if (s.grad != nullptr) s.grad[h] = grad;
      }
    }
    if (backward) {
      s.b = carver->take<double>(c.cp);
      s.inner = carver->take<double>(state_blocks(c));
      if (g.states && pass == Pass::kBackward) s.history = carver->take<T>((g.chunks + 1) * state_elements(c));
    }
    if (out.slots != nullptr) out.slots[i] = s;
  }
  out.scratch_bytes = kernels.scratch(c);
  out.scratch = carver->take<char>(out.scratch_bytes * p.threads);
  if (out.frequency != nullptr) {
    for (int i = 0; i < c.rope_dim / 2; ++i) out.frequency[i] = std::pow(p.rope.base, -2.0 * i / c.rope_dim);
  }
  return out;
}

}  // namespace cpu
}  // namespace powerattn
