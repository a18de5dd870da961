// SPDX-License-Identifier: Apache-2.0
// The backward pass on the CPU. A forward sweep rebuilds the states at the chunk starts unless `saved` has
// them; a reverse sweep carries the gradient of the state and gives every gradient chunk by chunk.
#include "passes.h"
#include "run.h"

namespace powerattn {
namespace cpu {
namespace {

template <class T>
class Backward {
 public:
  Backward(const powerattn_plan &plan, const powerattn_backward_args &args)
      : a_(args),
        p_(plan.problem),
        saved_(plan.sizes.saved > 0 ? static_cast<const T *>(args.saved) : nullptr),
        run_(p_, plan.tiling, saved_ != nullptr ? Pass::kBackwardSaved : Pass::kBackward, args.workspace,
             args.log_g.data != nullptr) {}

  void execute() {
    clear_padding();
    const Geometry &g = run_.g;
    for (int64_t first = 0; first < g.streams; first += g.wave) {
      const int64_t count = run_.start_wave(first, a_.cu_seqlens, a_.rope_offset);
      const int64_t chunks = run_.most_chunks(count);
      if (g.states && saved_ == nullptr) rebuild_states(count, chunks);
      if (g.states && a_.d_final_state.s != nullptr) {
        run_.import_states(count, a_.d_final_state, [](const Slot<T> &s) { return s.state; });
        for (int64_t i = 0; i < count; ++i) run_.buffers.slots[i].carried = true;
      }
      for (int64_t n = chunks - 1; n >= 0; --n) {
        pack(count, n);
        differentiate_tokens(count, n);
        if (g.states) differentiate_state(count, n);
        if (call_.gated && a_.d_log_g.data != nullptr) differentiate_gates(count, n);
      }
      if (a_.d_initial_state.s != nullptr) {
        run_.export_states(count, a_.d_initial_state, a_.d_final_state, [](const Slot<T> &s) {
          return s.chunks > 0 ? s.state : fast::State<T>{nullptr, nullptr};
        });
      }
    }
  }

 private:
  void clear_padding() const {
    const int64_t size = run_.size();
    run_.clear_padding(a_.d_q, p_.heads_q, p_.head_dim, size, a_.cu_seqlens);
    run_.clear_padding(a_.d_k, p_.heads_kv, p_.head_dim, size, a_.cu_seqlens);
    run_.clear_padding(a_.d_v, p_.heads_kv, p_.value_dim, size, a_.cu_seqlens);
    run_.clear_padding(a_.d_log_g, p_.heads_kv, 1, sizeof(T), a_.cu_seqlens);
  }

  // Whether there is a state at the start of chunk n (n = chunks: at the end of the sequence).
  bool has_state(const Slot<T> &s, int64_t n) const {
    if (n == 0) return a_.initial_state.s != nullptr;
    return n < s.chunks || wants_end_;
  }
  fast::State<T> state_of(const Slot<T> &s, int64_t n) const {
    const int64_t size = state_elements(call_);
    if (saved_ == nullptr) return state_at(call_, s.history + n * size);
    return state_at(call_, const_cast<T *>(saved_) + ((s.saved_slot + n) * p_.heads_kv + s.head) * size);
  }

  void gates(Slot<T> &s, int64_t n) const {
    if (!call_.gated) return;
    run_.kernels.gates(call_, run_.statistics(a_.log_g, s, s.head), {n * run_.g.chunk, 0, run_.tokens(s, n)},
                       &s.gates);
  }

  // S_(n+1) = exp(g_end) S_n + sum_j exp(g_end - g_j) phi(k_j) v_j^T
  void rebuild_states(int64_t count, int64_t chunks) const {
    const Geometry &g = run_.g;
    if (a_.initial_state.s != nullptr) {
      run_.import_states(count, a_.initial_state, [&](const Slot<T> &s) { return state_of(s, 0); });
    }
    for (int64_t n = 0; n < chunks; ++n) {
      const auto needed = [&](const Slot<T> &s) { return n < s.chunks && has_state(s, n + 1); };
      bool any = false;
      for (int64_t i = 0; i < count; ++i) any = any || needed(run_.buffers.slots[i]);
      if (!any) continue;
      run_.units(count, g.tiles + 1, [&](Slot<T> &s, int64_t tile, void *scratch) {
        if (!needed(s)) return;
        if (tile == g.tiles) {
          gates(s, n);
          return;
        }
        const fast::Span span = run_.tile_span(s, n, tile);
        if (span.count <= 0) return;
        const fast::Packed<T> k = {nullptr, s.k.cols, nullptr}, v = {nullptr, nullptr, s.v.strips};
        run_.kernels.pack(call_, run_.rows(a_.k, s, s.head), run_.rotates(), s.position, call_.d, span, k,
                          scratch);
        run_.kernels.pack(call_, run_.rows(a_.v, s, s.head), false, 0.0, call_.e, span, v, scratch);
      });
      run_.state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *scratch) {
        if (!needed(s)) return;
        const fast::State<T> in = has_state(s, n) ? state_of(s, n) : fast::State<T>{nullptr, nullptr};
        run_.kernels.update(call_, s.k, s.v, call_.gated ? s.gates.to_end : nullptr, 1.0, nullptr,
                            s.gates.decay, in, state_of(s, n + 1), run_.tokens(s, n), row, rows, scratch);
      });
    }
  }

  // Units: keys, values and gates, then each query head.
  void pack(int64_t count, int64_t n) const {
    const Geometry &g = run_.g;
    run_.units(count, (g.groups + 1) * g.tiles + 1, [&](Slot<T> &s, int64_t unit, void *scratch) {
      if (run_.tokens(s, n) == 0) return;
      if (unit == (g.groups + 1) * g.tiles) {
        gates(s, n);
        return;
      }
      const fast::Span span = run_.tile_span(s, n, unit % g.tiles);
      if (span.count <= 0) return;
      const int64_t h = unit / g.tiles - 1;
      if (h < 0) {
        const fast::Packed<T> v = {s.v.rows, s.v.cols, nullptr};
        run_.kernels.pack(call_, run_.rows(a_.k, s, s.head), run_.rotates(), s.position, call_.d, span, s.k,
                          scratch);
        run_.kernels.pack(call_, run_.rows(a_.v, s, s.head), false, 0.0, call_.e, span, v, scratch);
        return;
      }
      const int64_t head = run_.query_head(s, h);
      run_.kernels.pack(call_, run_.rows(a_.q, s, head), run_.rotates(), s.position, call_.d, span, s.q[h],
                        scratch);
      run_.kernels.output_grad(call_, run_.rows(a_.d_y, s, head), run_.rows(a_.y, s, head),
                               run_.statistics(a_.row_norm, s, head), span, s.grad[h], scratch);
    });
  }

  void differentiate_tokens(int64_t count, int64_t n) const {
    const Geometry &g = run_.g;
    run_.units(count, (g.groups + 1) * g.tiles, [&](Slot<T> &s, int64_t unit, void *scratch) {
      const int64_t h = unit / g.tiles - 1;
      const fast::Span span = run_.tile_span(s, n, unit % g.tiles);
      if (span.count <= 0) return;
      if (h < 0) {
        const fast::State<T> d_state = s.carried ? s.state : fast::State<T>{nullptr, nullptr};
        run_.kernels.dkv(call_, static_cast<int>(g.groups), s.q, s.grad, s.k, s.v, s.gates, d_state, span,
                         run_.tokens(s, n), s.position, run_.rows(a_.d_k, s, s.head),
                         run_.rows(a_.d_v, s, s.head), s.b, scratch);
        return;
      }
      const fast::State<T> state = has_state(s, n) ? state_of(s, n) : fast::State<T>{nullptr, nullptr};
      run_.kernels.dq(call_, s.q[h], s.grad[h], s.k, s.v, s.gates, state, span, run_.tokens(s, n), s.position,
                      run_.rows(a_.d_q, s, run_.query_head(s, h)), scratch);
    });
  }

  // <S_B, dS_B> at the chunk's end B, then dS <- exp(g_end) dS + sum_i exp(g_i) scale^p phi(q_i) dN_i^T.
  void differentiate_state(int64_t count, int64_t n) const {
    const Geometry &g = run_.g;
    const bool initial_wanted = a_.d_initial_state.s != nullptr;
    run_.state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *scratch) {
      const int64_t tokens = run_.tokens(s, n);
      if (tokens == 0) return;
      const bool joined = call_.gated && s.carried && has_state(s, n + 1);
      s.inner[row / unit_rows(call_)] =
          joined ? run_.kernels.inner(call_, state_of(s, n + 1), s.state, row, rows) : 0.0;
      if (n == 0 && !initial_wanted) return;
      fast::State<T> in = s.carried ? s.state : fast::State<T>{nullptr, nullptr};
      for (int64_t h = 0; h < g.groups; ++h) {
        run_.kernels.update(call_, s.q[h], s.grad[h].dy, call_.gated ? s.gates.from_start : nullptr,
                            call_.scale_p, s.grad[h].dl, h == 0 ? s.gates.decay : 1.0, in, s.state, tokens, row,
                            rows, scratch);
        in = s.state;
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      Slot<T> &s = run_.buffers.slots[i];
      if (n < s.chunks) s.carried = true;
    }
  }

  // dlog_g_t = X_B + sum_{i = t..B} (a_i - b_i): suffix sums inside the chunk only. The gradient of a reset
  // (-inf) is 0: its weight is 0 and stays 0.
  void differentiate_gates(int64_t count, int64_t n) const {
    const Geometry &g = run_.g;
    run_.units(count, 1, [&](Slot<T> &s, int64_t, void *) {
      const int64_t tokens = run_.tokens(s, n);
      if (tokens == 0) return;
      double sum = 0;
      if (g.states) {
        for (int64_t block = 0; block < state_blocks(call_); ++block) sum += s.inner[block];
      }
      const fast::Rows log_g = run_.statistics(a_.log_g, s, s.head),
                       d_log_g = run_.statistics(a_.d_log_g, s, s.head);
      for (int64_t t = tokens - 1; t >= 0; --t) {
        for (int64_t h = 0; h < g.groups; ++h) sum += s.grad[h].a[t];
        sum -= s.b[t];
        const int64_t at = n * g.chunk + t;
        const T gate = static_cast<const T *>(log_g.data)[at * log_g.stride];
        static_cast<T *>(d_log_g.data)[at * d_log_g.stride] =
            gate <= call_.least_log_g ? T(0) : static_cast<T>(sum);
      }
    });
  }

  const powerattn_backward_args &a_;
  const Problem &p_;
  const T *saved_;
  Run<T> run_;
  const fast::Call<T> &call_ = run_.call;
  // The state at the end of a sequence matters to the gate gradient only.
  const bool wants_end_ =
      a_.d_final_state.s != nullptr && a_.log_g.data != nullptr && a_.d_log_g.data != nullptr;
};

}  // namespace

powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args) {
  if (plan.problem.dtype == Dtype::kFloat64) {
    Backward<double>(plan, args).execute();
  } else {
    Backward<float>(plan, args).execute();
  }
  return POWERATTN_OK;
}

}  // namespace cpu
}  // namespace powerattn
