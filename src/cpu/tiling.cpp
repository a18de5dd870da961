// SPDX-License-Identifier: Apache-2.0
#include "tiling.h"

#include <algorithm>
#include <cmath>

#include "cost.h"
#include "run.h"

namespace powerattn {
namespace cpu {
namespace {

// Chunks shorter than two row tiles leave the microkernel's edges uncovered; longer than 4096 they spend more
// on pairs than any state costs.
constexpr int64_t kLeastChunk = 128;
constexpr int64_t kMostChunk = 4096;

// The chunk whose state takes as many bytes as the q, k, v and y of its tokens: c = D (e + 1) / (2 (d + e)),
// to a power of two. Its pairs then cost about an eighth of its state (d = e: 2 c d against 4 D e), a backward
// that keeps every chunk's state needs no more memory than its tensors, and the optimum is flat around it.
int64_t best_chunk(const Problem &p) {
  const double ideal = static_cast<double>(p.state_rows) * static_cast<double>(p.value_dim + 1) /
                       (2.0 * static_cast<double>(p.head_dim + p.value_dim));
  int64_t chunk = kLeastChunk;
  while (chunk < kMostChunk && static_cast<double>(chunk) * std::sqrt(2.0) < ideal) chunk *= 2;
  return chunk;
}

struct Seconds {
  double forward, backward;
};

// The backward runs seven products of pairs for five useful ones, because queries and keys each own their rows,
// and rebuilds the states. The rates of both are one core's, times the threads.
Seconds attention_seconds(const Problem &p) {
  const double speed = rate(p) * p.threads;
  return {attention_forward_work(p).flops / speed, attention_backward_work(p).flops * 7 / 5 / speed};
}

Seconds chunked_seconds(const Problem &p, int64_t chunk) {
  const double speed = rate(p) * p.threads;
  const Work forward = chunked_forward_work(p, chunk, size_of(p.stat_dtype));
  const Work backward = chunked_backward_work(p, chunk, size_of(p.stat_dtype), true);
  return {forward.flops / speed,
          (backward.state_flops + (backward.flops - backward.state_flops) * 7 / 5) / speed};
}

}  // namespace

double rate(const Problem &p) {
  // Measured on one core of an AMD Zen 3 at about 2.9 GHz: AVX2 forward 70 GFLOP/s of a peak of 94.
  // The other sets scale with their vector width; float64 halves the lanes.
  const int lanes = chosen_isa().f32.nr / 2;
  return 70e9 * lanes / 8 * (p.dtype == Dtype::kFloat64 ? 0.5 : 1.0);
}

bool choose_tiling(const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  const bool chunkable = p.state_bytes <= p.state_limit;
  if (!chunkable && pins.form != POWERATTN_FORM_ATTENTION) {
    *why = "the states do not fit";
    return false;
  }
  int64_t chunk = pins.chunk > 0 ? pins.chunk : chunkable ? best_chunk(p) : 0;
  int32_t form = pins.form;
  if (form == POWERATTN_FORM_AUTO) {
    const Seconds a = attention_seconds(p), c = chunked_seconds(p, chunk);
    const bool attention = chunk >= p.max_seq_len || a.forward + a.backward <= c.forward + c.backward;
    form = attention ? POWERATTN_FORM_ATTENTION : POWERATTN_FORM_CHUNKED;
  }
  tiling->form = static_cast<Form>(form);
  tiling->chunk = form == POWERATTN_FORM_ATTENTION ? p.seq_len : chunk;
  const Seconds s = form == POWERATTN_FORM_ATTENTION ? attention_seconds(p) : chunked_seconds(p, chunk);
  tiling->forward_s = s.forward;
  tiling->backward_s = s.backward;
  return true;
}

}  // namespace cpu
}  // namespace powerattn
