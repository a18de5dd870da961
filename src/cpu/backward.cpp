// SPDX-License-Identifier: Apache-2.0
// The backward pass on the CPU. Each lane takes streams one after the other. A forward sweep rebuilds the
// states at the chunk starts unless `saved` has them; a reverse sweep carries the gradient of the state and
// gives every gradient chunk by chunk.
#include "passes.h"
#include "run.h"

namespace powerattn {
namespace cpu {
namespace {

enum Phase : int {
  kNone,
  kImport,
  kRebuildPack,
  kRebuild,
  kImportGradient,
  kPack,
  kTokens,
  kUpdate,
  kGates,
  kExport
};

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
    run_.pass_streams(this);
  }

  int64_t advance(int64_t lane) {
    Slot<T> &s = run_.buffers.slots[lane];
    for (;;) {
      switch (static_cast<Phase>(s.phase)) {
        case kNone:
          if (!run_.take_stream(&next_stream_, &s, a_.cu_seqlens, a_.rope_offset)) return 0;
          s.phase = kImport;
          break;
        case kImport:
          s.chunk = 0;
          s.phase = rebuilds_ && s.chunks > 0 ? kRebuildPack : kImportGradient;
          break;
        case kRebuildPack:
          s.phase = kRebuild;
          break;
        case kRebuild:
          s.phase = ++s.chunk < s.chunks ? kRebuildPack : kImportGradient;
          break;
        case kImportGradient:
          s.carried = ends_;
          s.chunk = s.chunks - 1;
          s.phase = s.chunks > 0 ? kPack : kExport;
          break;
        case kPack:
          s.phase = kTokens;
          break;
        case kTokens:
          s.phase = kUpdate;
          break;
        case kUpdate:
          s.carried = run_.g.states;
          s.phase = kGates;
          break;
        case kGates:
          s.phase = --s.chunk >= 0 ? kPack : kExport;
          break;
        case kExport:
          s.phase = kNone;
          break;
      }
      const int64_t units = units_of(s);
      if (units > 0) return units;
    }
  }

  void run(int64_t lane, int64_t unit, int worker) {
    Slot<T> &s = run_.buffers.slots[lane];
    void *scratch = run_.scratch(worker);
    const int64_t row = unit * unit_rows(call_), rows = std::min(unit_rows(call_), call_.D - row);
    switch (static_cast<Phase>(s.phase)) {
      case kImport:
        run_.import_rows(s, a_.initial_state, state_of(s, 0), row, rows);
        break;
      case kRebuildPack:
        pack_keys(s, unit, scratch);
        break;
      case kRebuild:
        rebuild(s, row, rows, scratch);
        break;
      case kImportGradient:
        run_.import_rows(s, a_.d_final_state, s.state, row, rows);
        break;
      case kPack:
        pack(s, unit, scratch);
        break;
      case kTokens:
        differentiate_tokens(s, unit, scratch);
        break;
      case kUpdate:
        differentiate_state(s, row, rows, scratch);
        break;
      case kGates:
        differentiate_gates(s);
        break;
      case kNone:
        break;
      case kExport:
        run_.export_rows(s, a_.d_initial_state, a_.d_final_state,
                         s.chunks > 0 ? s.state : fast::State<T>{nullptr, nullptr}, row, rows);
    }
  }

 private:
  int64_t units_of(const Slot<T> &s) const {
    const int64_t blocks = state_blocks(call_), tiles = run_.g.tiles, heads = run_.g.groups + 1;
    switch (static_cast<Phase>(s.phase)) {
      case kNone:
        return 0;
      case kImport:
        return rebuilds_ && a_.initial_state.s != nullptr ? blocks : 0;
      case kRebuildPack:
        return has_state(s, s.chunk + 1) ? tiles + 1 : 0;
      case kRebuild:
        return has_state(s, s.chunk + 1) ? blocks : 0;
      case kImportGradient:
        return ends_ ? blocks : 0;
      case kPack:
        return heads * tiles + 1;
      case kTokens:
        return heads * tiles;
      case kUpdate:
        return run_.g.states ? blocks : 0;
      case kGates:
        return call_.gated && a_.d_log_g.data != nullptr ? 1 : 0;
      case kExport:
        return a_.d_initial_state.s != nullptr ? blocks : 0;
    }
    return 0;
  }

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

  void gates(Slot<T> &s) const {
    if (!call_.gated) return;
    run_.kernels.gates(call_, run_.statistics(a_.log_g, s, s.head),
                       {s.chunk * run_.g.chunk, 0, run_.tokens(s, s.chunk)}, &s.gates);
  }

  // S_(n+1) = exp(g_end) S_n + sum_j exp(g_end - g_j) phi(k_j) v_j^T. Units: tiles of keys and values, the
  // gates.
  void pack_keys(Slot<T> &s, int64_t unit, void *scratch) const {
    if (unit == run_.g.tiles) {
      gates(s);
      return;
    }
    const fast::Span span = run_.tile_span(s, s.chunk, unit);
    if (span.count <= 0) return;
    const fast::Packed<T> k = {nullptr, s.k.cols, nullptr}, v = {nullptr, nullptr, s.v.strips};
    run_.kernels.pack(call_, run_.rows(a_.k, s, s.head), run_.rotates(), s.position, call_.d, span, k, scratch);
    run_.kernels.pack(call_, run_.rows(a_.v, s, s.head), false, 0.0, call_.e, span, v, scratch);
  }
  void rebuild(const Slot<T> &s, int64_t row, int64_t rows, void *scratch) const {
    const fast::State<T> in = has_state(s, s.chunk) ? state_of(s, s.chunk) : fast::State<T>{nullptr, nullptr};
    run_.kernels.update(call_, s.k, s.v, call_.gated ? s.gates.to_end : nullptr, 1.0, nullptr, s.gates.decay,
                        in, state_of(s, s.chunk + 1), run_.tokens(s, s.chunk), row, rows, scratch);
  }

  // Units: tiles of keys and values, then of each query head, then the gates.
  void pack(Slot<T> &s, int64_t unit, void *scratch) const {
    const Geometry &g = run_.g;
    if (unit == (g.groups + 1) * g.tiles) {
      gates(s);
      return;
    }
    const fast::Span span = run_.tile_span(s, s.chunk, unit % g.tiles);
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
  }

  // Units: dk and dv of tiles of keys, then dq of tiles of each query head.
  void differentiate_tokens(Slot<T> &s, int64_t unit, void *scratch) const {
    const Geometry &g = run_.g;
    const int64_t h = unit / g.tiles - 1, tokens = run_.tokens(s, s.chunk);
    const fast::Span span = run_.tile_span(s, s.chunk, unit % g.tiles);
    if (span.count <= 0) return;
    if (h < 0) {
      const fast::State<T> d_state = s.carried ? s.state : fast::State<T>{nullptr, nullptr};
      run_.kernels.dkv(call_, static_cast<int>(g.groups), s.q, s.grad, s.k, s.v, s.gates, d_state, span, tokens,
                       s.position, run_.rows(a_.d_k, s, s.head), run_.rows(a_.d_v, s, s.head), s.b, scratch);
      return;
    }
    const fast::State<T> state =
        has_state(s, s.chunk) ? state_of(s, s.chunk) : fast::State<T>{nullptr, nullptr};
    run_.kernels.dq(call_, s.q[h], s.grad[h], s.k, s.v, s.gates, state, span, tokens, s.position,
                    run_.rows(a_.d_q, s, run_.query_head(s, h)), scratch);
  }

  // <S_B, dS_B> at the chunk's end B, then dS <- exp(g_end) dS + sum_i exp(g_i) scale^p phi(q_i) dN_i^T.
  void differentiate_state(Slot<T> &s, int64_t row, int64_t rows, void *scratch) const {
    const bool joined = call_.gated && s.carried && has_state(s, s.chunk + 1);
    s.inner[row / unit_rows(call_)] =
        joined ? run_.kernels.inner(call_, state_of(s, s.chunk + 1), s.state, row, rows) : 0.0;
    if (s.chunk == 0 && a_.d_initial_state.s == nullptr) return;
    fast::State<T> in = s.carried ? s.state : fast::State<T>{nullptr, nullptr};
    for (int64_t h = 0; h < run_.g.groups; ++h) {
      run_.kernels.update(call_, s.q[h], s.grad[h].dy, call_.gated ? s.gates.from_start : nullptr,
                          call_.scale_p, s.grad[h].dl, h == 0 ? s.gates.decay : 1.0, in, s.state,
                          run_.tokens(s, s.chunk), row, rows, scratch);
      in = s.state;
    }
  }

  // dlog_g_t = X_B + sum_{i = t..B} (a_i - b_i): suffix sums inside the chunk only. The gradient of a reset
  // (-inf) is 0: its weight is 0 and stays 0.
  void differentiate_gates(Slot<T> &s) const {
    const Geometry &g = run_.g;
    double sum = 0;
    if (g.states) {
      for (int64_t block = 0; block < state_blocks(call_); ++block) sum += s.inner[block];
    }
    const fast::Rows log_g = run_.statistics(a_.log_g, s, s.head),
                     d_log_g = run_.statistics(a_.d_log_g, s, s.head);
    for (int64_t t = run_.tokens(s, s.chunk) - 1; t >= 0; --t) {
      for (int64_t h = 0; h < g.groups; ++h) sum += s.grad[h].a[t];
      sum -= s.b[t];
      const int64_t at = s.chunk * g.chunk + t;
      const T gate = static_cast<const T *>(log_g.data)[at * log_g.stride];
      static_cast<T *>(d_log_g.data)[at * d_log_g.stride] =
          gate <= call_.least_log_g ? T(0) : static_cast<T>(sum);
    }
  }

  const powerattn_backward_args &a_;
  const Problem &p_;
  const T *saved_;
  Run<T> run_;
  const fast::Call<T> &call_ = run_.call;
  const bool rebuilds_ = run_.g.states && saved_ == nullptr;
  const bool ends_ = run_.g.states && a_.d_final_state.s != nullptr;
  // The state at the end of a sequence matters to the gate gradient only.
  const bool wants_end_ =
      a_.d_final_state.s != nullptr && a_.log_g.data != nullptr && a_.d_log_g.data != nullptr;
  std::atomic<int64_t> next_stream_{0};
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
