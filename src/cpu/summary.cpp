// SPDX-License-Identifier: Apache-2.0
// Summaries of segments: the state of the keys and values alone, and the reverse for gradients.
#include <cmath>

#include "passes.h"
#include "run.h"

namespace powerattn {
namespace cpu {
namespace {

// L of each stream: the plain sum, so that a reset shows as -inf.
template <class T>
void total_log_gates(const Run<T> &run, int64_t count, const powerattn_tensor &log_g, void *total) {
  if (total == nullptr) return;
  run.units(count, 1, [&](Slot<T> &s, int64_t, void *) {
    double sum = 0;
    const fast::Rows rows = run.statistics(log_g, s, s.head);
    for (int64_t t = 0; log_g.data != nullptr && t < s.tokens; ++t) {
      sum += static_cast<const T *>(rows.data)[t * rows.stride];
    }
    static_cast<T *>(total)[s.sequence * run.p.heads_kv + s.head] = static_cast<T>(sum);
  });
}

template <class T>
void run_summary(const powerattn_plan &plan, const powerattn_summary_args &a) {
  Run<T> run(plan.problem, plan.tiling, Pass::kSummary, a.workspace, a.log_g.data != nullptr);
  const auto &call = run.call;
  const Geometry &g = run.g;
  for (int64_t first = 0; first < g.streams; first += g.wave) {
    const int64_t count = run.start_wave(first, a.cu_seqlens, a.rope_offset);
    const int64_t chunks = run.most_chunks(count);
    for (int64_t n = 0; n < chunks; ++n) {
      run.units(count, g.tiles + 1, [&](Slot<T> &s, int64_t unit, void *scratch) {
        run.pack(a.k, a.v, a.log_g, s, n, unit, scratch);
      });
      run.state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *scratch) {
        if (run.tokens(s, n) == 0) return;
        const fast::State<T> in = n > 0 ? s.state : fast::State<T>{nullptr, nullptr};
        run.kernels.update(call, s.k, s.v, call.gated ? s.gates.to_end : nullptr, 1.0, nullptr, s.gates.decay,
                           in, s.state, run.tokens(s, n), row, rows, scratch);
      });
    }
    run.export_states(count, a.state, {}, [](const Slot<T> &s) {
      return s.chunks > 0 ? s.state : fast::State<T>{nullptr, nullptr};
    });
    total_log_gates(run, count, a.log_g, a.total_log_g);
  }
}

// dS = sum_i exp(G_i) scale^p phi(q_i) dN_i^T, dz with dl_i, from the last chunk to the first:
// dS <- exp(g_end) dS + the chunk's sum with exp(g_i).
template <class T>
void run_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &a) {
  Run<T> run(plan.problem, plan.tiling, Pass::kSummary, a.workspace, a.log_g.data != nullptr);
  const auto &call = run.call;
  const Geometry &g = run.g;
  for (int64_t first = 0; first < g.streams; first += g.wave) {
    const int64_t count = run.start_wave(first, a.cu_seqlens, a.rope_offset);
    for (int64_t n = run.most_chunks(count) - 1; n >= 0; --n) {
      run.units(count, g.groups * g.tiles + 1, [&](Slot<T> &s, int64_t unit, void *scratch) {
        const int64_t tokens = run.tokens(s, n);
        if (tokens == 0) return;
        if (unit == g.groups * g.tiles) {
          if (call.gated) {
            run.kernels.gates(call, run.statistics(a.log_g, s, s.head), {n * g.chunk, 0, tokens}, &s.gates);
          }
          return;
        }
        const int64_t h = unit % g.groups, head = run.query_head(s, h);
        const fast::Span span = run.tile_span(s, n, unit / g.groups);
        if (span.count <= 0) return;
        run.kernels.pack(call, run.rows(a.q, s, head), run.rotates(), s.position, call.d, span, s.q[h],
                         scratch);
        run.kernels.output_grad(call, run.rows(a.d_y, s, head), run.rows(a.y, s, head),
                                run.statistics(a.row_norm, s, head), span, s.grad[h], scratch);
      });
      run.state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *scratch) {
        if (run.tokens(s, n) == 0) return;
        fast::State<T> in = n + 1 < s.chunks ? s.state : fast::State<T>{nullptr, nullptr};
        for (int64_t h = 0; h < g.groups; ++h) {
          run.kernels.update(call, s.q[h], s.grad[h].dy, call.gated ? s.gates.from_start : nullptr,
                             call.scale_p, s.grad[h].dl, h == 0 ? s.gates.decay : 1.0, in, s.state,
                             run.tokens(s, n), row, rows, scratch);
          in = s.state;
        }
      });
    }
    run.export_states(count, a.d_state, {}, [](const Slot<T> &s) {
      return s.chunks > 0 ? s.state : fast::State<T>{nullptr, nullptr};
    });
    total_log_gates(run, count, a.log_g, a.total_log_g);
  }
}

}  // namespace

powerattn_status summary(const powerattn_plan &plan, const powerattn_summary_args &args) {
  if (plan.problem.dtype == Dtype::kFloat64) {
    run_summary<double>(plan, args);
  } else {
    run_summary<float>(plan, args);
  }
  return POWERATTN_OK;
}

powerattn_status summary_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &args) {
  if (plan.problem.dtype == Dtype::kFloat64) {
    run_reverse<double>(plan, args);
  } else {
    run_reverse<float>(plan, args);
  }
  return POWERATTN_OK;
}

}  // namespace cpu
}  // namespace powerattn
