// SPDX-License-Identifier: Apache-2.0
#include "generic_plan.h"

#include <algorithm>
#include <cmath>

#include "cost.h"
#include "generic_step.h"
#include "state_layout.h"
#include "text.h"

namespace powerattn::cuda::generic {
namespace {

// Sustained rates on one H200 (docs/performance-log.md), useful operations per second.
struct Rates {
  double attention, state, backward_attention, backward_state;
};
Rates rates_of(Math math) {
  switch (math) {
    case Math::kBfloat16:
      return {60e12, 150e12, 50e12, 40e12};
    case Math::kTf32:
      return {30e12, 60e12, 25e12, 25e12};
    case Math::kFloat32:
      break;
  }
  return {18e12, 32e12, 18e12, 21e12};
}

// Bytes of the states of all chunks: float32 sums and, where the operand type differs, their prefix sums.
double chunk_state_bytes(const Problem &p, int64_t chunk) {
  const double element = math_of(p) == Math::kBfloat16 ? 6.0 : 4.0;
  return double(chunk_bound(p, chunk)) * double(p.heads_kv) * double(p.state_rows) * double(p.value_dim + 1) *
         element;
}

double forward_seconds(const Problem &p, Form form, int64_t chunk, double bandwidth) {
  const Rates r = rates_of(math_of(p));
  if (form == Form::kAttention) {
    const Work w = attention_forward_work(p);
    return 10e-6 + std::max(w.flops / r.attention, w.io_bytes / bandwidth);
  }
  const Work w = chunked_forward_work(p, chunk, 4);
  return 30e-6 + w.state_flops / r.state + (w.flops - w.state_flops) / r.attention +
         (w.io_bytes + 2 * w.state_bytes) / bandwidth;
}

double backward_seconds(const Problem &p, Form form, int64_t chunk, double bandwidth) {
  const Rates r = rates_of(math_of(p));
  if (form == Form::kAttention) {
    const Work w = attention_backward_work(p);
    return 20e-6 + std::max(w.flops / r.backward_attention, w.io_bytes / bandwidth);
  }
  const Work w = chunked_backward_work(p, chunk, 4, true);
  return 60e-6 + w.state_flops / r.backward_state + (w.flops - w.state_flops) / r.backward_attention +
         (w.io_bytes + 2 * w.state_bytes) / bandwidth;
}

bool grid_fits(const Problem &p, int64_t chunk) {
  const double limit = double(0x7fffffff);
  const double tiles = double(tile_bound(p, chunk, kRows)) * double(p.heads_q);
  const double updates = double(chunk_bound(p, chunk)) * double(p.heads_kv) * (double(p.state_rows) / 128 + 1);
  return tiles < limit && (p.state_rows == kRowsOverflow || updates < limit);
}

}  // namespace

int64_t chunk_of(const Problem &p, const Tiling &t) {
  if (t.form == Form::kChunked) return t.chunk;
  return std::max<int64_t>(kRows, (p.seq_len + kRows - 1) / kRows * kRows);
}
int64_t summary_chunk(const Problem &p) {
  return std::min<int64_t>(1024, std::max<int64_t>(kRows, (p.seq_len + kRows - 1) / kRows * kRows));
}

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why) {
  if (p.dtype == Dtype::kFloat64) {
    *why = "float64 runs on the CPU only";
    return false;
  }
  const DeviceProperties *device = nullptr;
  if (device_properties(p.device_index, &device) != POWERATTN_OK) {
    *why = last_error();
    return false;
  }
  if (op == Op::kStep) return step_supported(p, *device, why);
  const double bandwidth = 0.85 * device->bandwidth;
  const bool rows_known = p.state_rows != kRowsOverflow;
  const size_t memory = device->memory_bytes;

  Tiling best;
  best.forward_s = INFINITY;
  std::string refusal;
  auto consider = [&](Form form, int64_t chunk) {
    Tiling t;
    t.form = form;
    t.chunk = chunk;
    const int64_t inner = chunk_of(p, t);
    const bool states = form == Form::kChunked || p.use_state;
    const Math math = math_of(p);
    const size_t shared = op == Op::kForward
                              ? forward_shared_bytes(math, p, states)
                              : std::max(backward_shared_bytes(math, p, states),
                                         backward_shared_bytes(backward_state_math(math), p, states));
    if (shared > device->shared_per_block) {
      refusal = "needs " + std::to_string(shared) + " bytes of shared memory per block, the device has " +
                std::to_string(device->shared_per_block);
      return;
    }
    if (!grid_fits(p, inner)) {
      refusal = "more than 2^31 thread blocks";
      return;
    }
    t.forward_s = forward_seconds(p, form, inner, bandwidth);
    t.backward_s = backward_seconds(p, form, inner, bandwidth);
    if (t.forward_s < best.forward_s) best = t;
  };

  if (op == Op::kSummary) {
    consider(Form::kChunked, summary_chunk(p));
  } else {
    if (pins.form != POWERATTN_FORM_CHUNKED) consider(Form::kAttention, p.seq_len);
    if (pins.form != POWERATTN_FORM_ATTENTION && rows_known) {
      if (pins.chunk > 0) {
        consider(Form::kChunked, pins.chunk);
      } else {
        for (int64_t c = 128; c <= 8192; c *= 2) {
          // A quarter of the memory for the states of the chunks; the last candidate is taken whatever it needs
          // when the form is pinned.
          const bool fits = chunk_state_bytes(p, c) <= 0.25 * double(memory);
          if (fits || (pins.form == POWERATTN_FORM_CHUNKED && c == 8192 && !std::isfinite(best.forward_s)))
            consider(Form::kChunked, c);
          if (c >= p.max_seq_len) break;
        }
        if (pins.form == POWERATTN_FORM_CHUNKED && !std::isfinite(best.forward_s) && refusal.empty())
          consider(Form::kChunked, std::max<int64_t>(kRows, (p.max_seq_len + kRows - 1) / kRows * kRows));
      }
    }
  }
  if (!std::isfinite(best.forward_s)) {
    *why = refusal.empty() ? "no form runs it" : refusal;
    return false;
  }
  *tiling = best;
  return true;
}

size_t carve(const Problem &p, int64_t chunk, bool states, Pass pass, void *base, Buffers *b) {
  Carver carver(base);
  const size_t q = rows_q(p), kv = rows_kv(p), element = size_t(size_of(p.dtype));
  b->tables = carver.bytes(chunk_table_bytes(p, chunk, kRows));
  b->g = carver.take<float>(kv);
  b->g64 = carver.take<double>(kv);
  if (p.rope.style != POWERATTN_ROPE_NONE) {
    b->q = carver.bytes(q * p.head_dim * element);
    b->k = carver.bytes(kv * p.head_dim * element);
  }
  const size_t one = states ? size_t(p.state_rows) : 0, per_state = one * size_t(p.value_dim);
  const size_t slots = size_t(chunk_bound(p, chunk)) * p.heads_kv, ends = size_t(p.sequences) * p.heads_kv;
  if (states) {
    const bool apart = pass == Pass::kForward && operand_dtype(math_of(p)) != Dtype::kFloat32;
    b->monomials = carver.take<Monomial>(one);
    b->state.s = carver.take<float>(slots * per_state);
    b->state.z = carver.take<float>(slots * one);
    if (pass != Pass::kSummary)
      b->state.prefix = apart ? carver.bytes(slots * per_state * size_of(p.dtype)) : b->state.s;
    const bool convert_states = p.state_dtype != Dtype::kFloat32;
    if (convert_states && pass != Pass::kBackward) {
      b->final_s = carver.take<float>(ends * per_state);
      b->final_z = carver.take<float>(ends * one);
    }
    if (convert_states) {
      b->initial_s = carver.take<float>(2 * ends * per_state);  // backward: and d_final_state
      b->initial_z = carver.take<float>(2 * ends * one);
    }
    if (pass == Pass::kForward) {
      b->state_out = carver.take<float>(q * p.value_dim);
      b->state_norm = carver.take<float>(q);
    }
    if (pass == Pass::kBackward) {
      b->grad.s = carver.take<float>(slots * per_state);
      b->grad.prefix = b->grad.s;
      b->grad.z = carver.take<float>(slots * one);
      b->boundary = carver.take<float>(slots);
    }
  }
  if (pass == Pass::kSummary) {
    b->inverse = carver.take<float>(q);
    b->delta = carver.take<float>(q);
  }
  if (pass == Pass::kBackward) {
    b->inverse = carver.take<float>(q);
    b->delta = carver.take<float>(q);
    b->dq = carver.take<float>(q * p.head_dim);
    b->dk = carver.take<float>(kv * p.head_dim);
    b->dv = carver.take<float>(kv * p.value_dim);
    b->scratch = carver.take<float>(kv);
    b->q_dots = carver.take<float>(q);
    b->k_dots = carver.take<float>(kv);
  }
  return carver.used();
}

Sizes sizes(const Problem &p, const Tiling &t) {
  Sizes s;
  Buffers b;
  if (p.use_state && !p.packed) s.step = step_workspace(p);
  if (t.chunk > 0 || t.form == Form::kAttention) {
    s.forward = carve(p, chunk_of(p, t), with_states(p, t), Pass::kForward, nullptr, &b);
    s.backward = s.backward_saved = carve(p, chunk_of(p, t), with_states(p, t), Pass::kBackward, nullptr, &b);
  }
  if (p.state_rows != kRowsOverflow && p.state_bytes <= p.state_limit)
    s.summary = carve(p, summary_chunk(p), true, Pass::kSummary, nullptr, &b);
  return s;
}

void describe(const Problem &p, const Tiling &t, std::string *text) {
  const Math math = math_of(p);
  append(text, "  products: %s\n",
         math == Math::kBfloat16 ? "mma bfloat16, float32 sums"
         : math == Math::kTf32
             ? (p.dtype == Dtype::kFloat16 ? "mma TF32 (holds every float16, with the range of float32), "
                                             "float32 sums"
                                           : "mma TF32 (ALLOW_TF32), float32 sums")
             : "float32 FFMA");
  append(text,
         "  tiles: %d query rows (4 warps of 16) x 32 keys; state products in slabs of 32 rows, features built "
         "in\n"
         "         shared memory\n",
         kRows);
  if (p.rope.style != POWERATTN_ROPE_NONE)
    text->append("  prepare pass: q and k are rotated into contiguous copies in the workspace\n");
  if (math == Math::kBfloat16)
    text->append("  backward: products against states in TF32, for the gradient of the gates\n");
  text->append("  gradients are summed in float32 copies in the workspace, then rotated back and rounded\n");
  if (with_states(p, t) && p.state_rows != kRowsOverflow) {
    const int64_t chunk = chunk_of(p, t);
    append(text, "  chunk states: %.4g MB in the workspace (float32 sums%s)\n",
           chunk_state_bytes(p, chunk) * 1e-6, math == Math::kBfloat16 ? ", bfloat16 operands" : "");
  }
  if (p.use_state && !p.packed) describe_step(p, text);
}

}  // namespace powerattn::cuda::generic
