// SPDX-License-Identifier: Apache-2.0
// The forward pass on the CPU. Each lane takes streams one after the other; a stream's phases are, for each
// chunk in order: pack, output, update.
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

enum Phase : int { kNone, kImport, kPack, kOutput, kUpdate, kExport };

template <class T>
class Forward {
 public:
  Forward(const powerattn_plan &plan, const powerattn_forward_args &args)
      : a_(args),
        p_(plan.problem),
        run_(p_, plan.tiling, Pass::kForward, args.workspace, args.log_g.data != nullptr),
        saved_(plan.sizes.saved > 0 ? static_cast<T *>(args.saved) : nullptr) {}

  void execute() {
    run_.clear_padding(a_.y, p_.heads_q, p_.value_dim, run_.size(), a_.cu_seqlens);
    run_.clear_padding(a_.row_norm, p_.heads_q, 1, sizeof(T), a_.cu_seqlens);
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
          s.carried = initial_;
          s.chunk = 0;
          s.phase = s.chunks > 0 ? kPack : kExport;
          break;
        case kPack:
          s.phase = kOutput;
          break;
        case kOutput:
          s.phase = kUpdate;
          break;
        case kUpdate:
          s.carried = s.carried || updates(s);
          ++s.chunk;
          s.phase = s.chunk < s.chunks ? kPack : kExport;
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
    const int64_t row = unit * unit_rows(run_.call), rows = std::min(unit_rows(run_.call), run_.call.D - row);
    switch (static_cast<Phase>(s.phase)) {
      case kNone:
        break;
      case kImport:
        run_.import_rows(s, a_.initial_state, state_of(s, 0), row, rows);
        if (run_.call.low) run_.kernels.image(run_.call, state_of(s, 0), row, rows, s.image);
        break;
      case kPack:
        run_.pack(a_.k, a_.v, a_.log_g, s, s.chunk, unit, scratch);
        break;
      case kOutput:
        output(s, unit / run_.g.groups, unit % run_.g.groups, scratch);
        break;
      case kUpdate:
        run_.kernels.update(run_.call, s.k, s.v, run_.call.gated ? s.gates.to_end : nullptr, 1.0, nullptr,
                            s.gates.decay, carried_state(s), state_of(s, s.chunk + 1), run_.tokens(s, s.chunk),
                            row, rows, scratch);
        break;
      case kExport:
        run_.export_rows(s, a_.final_state, a_.initial_state,
                         s.chunks > 0 ? state_of(s, s.chunks) : fast::State<T>{nullptr, nullptr}, row, rows);
        break;
    }
  }

 private:
  int64_t units_of(const Slot<T> &s) const {
    switch (static_cast<Phase>(s.phase)) {
      case kNone:
        return 0;
      case kImport:
        return initial_ ? state_blocks(run_.call) : 0;
      case kPack:
        return run_.g.tiles + 1;
      case kOutput:
        return run_.g.groups * run_.g.tiles;
      case kUpdate:
        return updates(s) ? state_blocks(run_.call) : 0;
      case kExport:
        return a_.final_state.s != nullptr ? state_blocks(run_.call) : 0;
    }
    return 0;
  }

  // Whether somebody reads the state at the end of the chunk.
  bool updates(const Slot<T> &s) const {
    return run_.g.states &&
           (s.chunk + 1 < s.chunks || a_.final_state.s != nullptr || (saved_ != nullptr && p_.use_state));
  }

  // The state at the start of chunk n: in its own slot of `saved`, or carried in place.
  fast::State<T> state_of(const Slot<T> &s, int64_t n) const {
    fast::State<T> state = s.state;
    if (saved_ != nullptr) {
      const int64_t size = state_elements(run_.call);
      state = state_at(run_.call, saved_ + ((s.saved_slot + n) * p_.heads_kv + s.head) * size);
    }
    state.image = s.image;
    return state;
  }
  fast::State<T> carried_state(const Slot<T> &s) const {
    return s.carried ? state_of(s, s.chunk) : fast::State<T>{nullptr, nullptr};
  }

  void output(const Slot<T> &s, int64_t tile, int64_t group, void *scratch) const {
    const fast::Span span = run_.tile_span(s, s.chunk, tile);
    if (span.count <= 0) return;
    const int64_t head = run_.query_head(s, group), size = run_.size();
    if (s.chunk + 1 < s.chunks) {  // the next chunk's rows, while this one's are used
      const int64_t next = span.chunk + run_.g.chunk + span.first;
      const int64_t rows = std::clamp<int64_t>(s.tokens - next, 0, span.count);
      prefetch_rows(run_.rows(a_.q, s, head), next, rows, size, run_.call.d * size);
      if (group == 0) {
        prefetch_rows(run_.rows(a_.k, s, s.head), next, rows, size, run_.call.d * size);
        prefetch_rows(run_.rows(a_.v, s, s.head), next, rows, size, run_.call.e * size);
      }
    }
    run_.kernels.output(run_.call, run_.rows(a_.q, s, head), s.position, s.k, s.v, s.gates, carried_state(s),
                        span, run_.rows(a_.y, s, head), run_.statistics(a_.row_norm, s, head), scratch);
  }

  const powerattn_forward_args &a_;
  const Problem &p_;
  const Run<T> run_;
  T *saved_;
  const bool initial_ = a_.initial_state.s != nullptr;
  std::atomic<int64_t> next_stream_{0};
};

}  // namespace

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args) {
  if (plan.problem.dtype == Dtype::kFloat64) {
    Forward<double>(plan, args).execute();
  } else {
    Forward<float>(plan, args).execute();
  }
  return POWERATTN_OK;
}

}  // namespace cpu
}  // namespace powerattn
