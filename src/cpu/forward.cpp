// SPDX-License-Identifier: Apache-2.0
// The forward pass on the CPU: for each wave of streams and each chunk in order, pack, output, update.
#include "passes.h"
#include "run.h"

namespace powerattn {
namespace cpu {
namespace {

// Asks for `count` rows of `bytes` bytes. Rows of one head lie a whole token apart, a few to a page: where
// nobody asks early, packing waits for memory and page tables.
void prefetch_rows(const fast::Rows &rows, int64_t first, int64_t count, int64_t element, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    const char *row = static_cast<const char *>(rows.data) + (first + i) * rows.stride * element;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// Streams first .. of one wave.
template <class T>
void forward_wave(const Run<T> &run, const powerattn_plan &plan, const powerattn_forward_args &a,
                  int64_t first) {
  const Problem &p = plan.problem;
  const auto &call = run.call;
  const auto &kernels = run.kernels;
  const Geometry &g = run.g;
  const bool initial = a.initial_state.s != nullptr, final_state = a.final_state.s != nullptr;
  T *saved = plan.sizes.saved > 0 ? static_cast<T *>(a.saved) : nullptr;

  const int64_t count = run.start_wave(first, a.cu_seqlens, a.rope_offset);
  const int64_t chunks = run.most_chunks(count);
  // The state at the start of chunk n: in its own slot of `saved`, or carried in place.
  const auto state_of = [&](const Slot<T> &s, int64_t n) {
    fast::State<T> state = s.state;
    if (saved != nullptr) {
      state = state_at(call, saved + ((s.saved_slot + n) * p.heads_kv + s.head) * state_elements(call));
    }
    state.image = s.image;
    return state;
  };
  if (initial) {
    run.import_states(count, a.initial_state, [&](const Slot<T> &s) { return state_of(s, 0); });
    if (call.low) {
      run.state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *) {
        kernels.image(call, state_of(s, 0), row, rows, s.image);
      });
    }
    for (int64_t i = 0; i < count; ++i) run.buffers.slots[i].carried = true;
  }

  for (int64_t n = 0; n < chunks; ++n) {
    run.units(count, g.tiles + 1, [&](Slot<T> &s, int64_t unit, void *scratch) {
      run.pack(a.k, a.v, a.log_g, s, n, unit, scratch);
    });

    // The tiles at the end of a chunk see the most keys: they go first where others wait for the last one.
    run.units(count, g.groups * g.tiles, [&](Slot<T> &s, int64_t unit, void *scratch) {
      const int64_t turn = unit / g.groups;
      const fast::Span span = run.tile_span(s, n, g.whole_streams ? turn : g.tiles - 1 - turn);
      if (span.count <= 0) return;
      const int64_t head = run.query_head(s, unit % g.groups);
      if (g.whole_streams) {  // the next chunk's rows, while this one's are used
        const int64_t next = (n + 1) * g.chunk + span.first;
        const int64_t rows = std::clamp<int64_t>(s.tokens - next, 0, span.count);
        prefetch_rows(run.rows(a.q, s, head), next, rows, run.size(), call.d * run.size());
        if (unit % g.groups == 0) {
          prefetch_rows(run.rows(a.k, s, s.head), next, rows, run.size(), call.d * run.size());
          prefetch_rows(run.rows(a.v, s, s.head), next, rows, run.size(), call.e * run.size());
        }
      }
      const fast::State<T> state = s.carried ? state_of(s, n) : fast::State<T>{nullptr, nullptr};
      kernels.output(call, run.rows(a.q, s, head), s.position, s.k, s.v, s.gates, state, span,
                     run.rows(a.y, s, head), run.statistics(a.row_norm, s, head), scratch);
    });

    const auto updates = [&](const Slot<T> &s) {
      return n + 1 < s.chunks || (n + 1 == s.chunks && (final_state || (saved != nullptr && p.use_state)));
    };
    if (!g.states) continue;
    run.state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *scratch) {
      if (!updates(s)) return;
      const fast::State<T> in = s.carried ? state_of(s, n) : fast::State<T>{nullptr, nullptr};
      kernels.update(call, s.k.cols, s.v, call.gated ? s.gates.to_end : nullptr, 1.0, nullptr, s.gates.decay,
                     in, state_of(s, n + 1), run.tokens(s, n), row, rows, scratch);
    });
    for (int64_t i = 0; i < count; ++i) {
      if (updates(run.buffers.slots[i])) run.buffers.slots[i].carried = true;
    }
  }

  if (final_state) {
    run.export_states(count, a.final_state, a.initial_state, [&](const Slot<T> &s) {
      return s.chunks > 0 ? state_of(s, s.chunks) : fast::State<T>{nullptr, nullptr};
    });
  }
}

template <class T>
void run_forward(const powerattn_plan &plan, const powerattn_forward_args &a) {
  const Problem &p = plan.problem;
  const Run<T> run(p, plan.tiling, Pass::kForward, a.workspace, a.log_g.data != nullptr);
  run.clear_padding(a.y, p.heads_q, p.value_dim, run.size(), a.cu_seqlens);
  run.clear_padding(a.row_norm, p.heads_q, 1, sizeof(T), a.cu_seqlens);
  if (run.g.whole_streams) {
    run.parallel.with_worker(
        run.g.streams, [&](int64_t stream, int worker) { forward_wave(run.alone(worker), plan, a, stream); });
    return;
  }
  for (int64_t first = 0; first < run.g.streams; first += run.g.wave) forward_wave(run, plan, a, first);
}

}  // namespace

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  if (plan.problem.dtype == Dtype::kFloat64) {
    run_forward<double>(plan, args);
  } else {
    run_forward<float>(plan, args);
  }
  return POWERATTN_OK;
}

}  // namespace cpu
}  // namespace powerattn
