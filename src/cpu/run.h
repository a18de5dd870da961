// SPDX-License-Identifier: Apache-2.0
// What the passes share: a call set up on its workspace, its streams, and units spread over threads.
#pragma once

#include <cstring>

#include "layout.h"
#include "pipeline.h"
#include "threads.h"

namespace powerattn {
namespace cpu {

const fast::Isa &chosen_isa();
template <class T>
const fast::Kernels<T> &chosen_kernels();
template <>
inline const fast::Kernels<float> &chosen_kernels<float>() {
  return chosen_isa().f32;
}
template <>
inline const fast::Kernels<double> &chosen_kernels<double>() {
  return chosen_isa().f64;
}

template <class T>
struct Run {
  const Problem &p;
  const fast::Kernels<T> &kernels;
  Geometry g;
  fast::Call<T> call;
  Buffers<T> buffers;
  ParallelFor parallel;

  Run(const Problem &problem, const Tiling &tiling, Pass pass, void *workspace, bool gated)
      : p(problem),
        kernels(chosen_kernels<T>()),
        g(geometry(problem, tiling, pass, kernels.low)),
        call(make_call<T>(problem, g, kernels, pass)),
        parallel(::powerattn::parallel(problem.threads)) {
    Carver carver(workspace);
    buffers = carve(p, g, call, kernels, pass, &carver);
    call.rope_frequency = buffers.frequency;
    call.gated = gated;
  }

  int64_t size() const { return size_of(p.dtype); }
  bool rotates() const { return p.rope.style != POWERATTN_ROPE_NONE; }
  void *scratch(int worker) const { return buffers.scratch + worker * buffers.scratch_bytes; }

  void start_stream(Slot<T> *s, int64_t stream, const int64_t *cu_seqlens, const int64_t *rope_offset) const {
    s->sequence = stream / p.heads_kv;
    s->head = stream % p.heads_kv;
    s->batch = p.packed ? 0 : s->sequence;
    s->begin = p.packed ? cu_seqlens[s->sequence] : 0;
    s->tokens = p.packed ? cu_seqlens[s->sequence + 1] - s->begin : p.seq_len;
    s->chunks = (s->tokens + g.chunk - 1) / g.chunk;
    s->saved_slot = p.packed ? s->begin / g.chunk + 2 * s->sequence : s->sequence * (g.chunks + 1);
    s->position = rope_offset != nullptr ? static_cast<double>(rope_offset[s->sequence]) : 0.0;
    s->gates.decay = 1;
    s->carried = false;
  }
  // The slot's next stream, which `next` counts; false after the last one.
  bool take_stream(std::atomic<int64_t> *next, Slot<T> *s, const int64_t *cu_seqlens,
                   const int64_t *rope_offset) const {
    const int64_t stream = next->fetch_add(1, std::memory_order_relaxed);
    if (stream >= g.streams) return false;
    start_stream(s, stream, cu_seqlens, rope_offset);
    return true;
  }
  // All streams through `stages` (pipeline.h), a lane for each slot.
  template <class Stages>
  void pass_streams(Stages *stages) const {
    const int64_t lanes = std::min(g.wave, g.streams);
    if (lanes <= 0) return;
    Pipeline<Stages> pipeline(buffers.lanes, lanes, stages);
    parallel.with_worker(parallel.workers, [&](int64_t, int worker) { pipeline.work(worker); });
  }
  // Fills the slots with streams first .. and returns how many.
  int64_t start_wave(int64_t first, const int64_t *cu_seqlens, const int64_t *rope_offset) const {
    const int64_t count = std::min(g.wave, g.streams - first);
    for (int64_t i = 0; i < count; ++i) {
      start_stream(&buffers.slots[i], first + i, cu_seqlens, rope_offset);
    }
    return count;
  }
  int64_t most_chunks(int64_t count) const {
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, buffers.slots[i].chunks);
    return most;
  }

  // Tokens of chunk n of a stream; 0 past its end.
  int64_t tokens(const Slot<T> &s, int64_t n) const {
    return std::clamp<int64_t>(s.tokens - n * g.chunk, 0, g.chunk);
  }
  fast::Span tile_span(const Slot<T> &s, int64_t n, int64_t tile) const {
    const int64_t first = tile * g.tile;
    return {n * g.chunk, first, std::min(g.tile, tokens(s, n) - first)};
  }

  // The rows of a tensor for one head of a stream. An empty sequence may begin past the last token, where a
  // stride that no element uses would take the pointer anywhere.
  fast::Rows rows(const powerattn_tensor &t, const Slot<T> &s, int64_t head, int64_t element) const {
    if (t.data == nullptr || s.tokens == 0) return {nullptr, 0};
    const int64_t at = s.batch * t.stride_b + s.begin * t.stride_t + head * t.stride_h;
    return {static_cast<char *>(t.data) + at * element, t.stride_t};
  }
  fast::Rows rows(const powerattn_tensor &t, const Slot<T> &s, int64_t head) const {
    return rows(t, s, head, size());
  }
  fast::Rows statistics(const powerattn_tensor &t, const Slot<T> &s, int64_t head) const {
    return rows(t, s, head, static_cast<int64_t>(sizeof(T)));
  }
  int64_t query_head(const Slot<T> &s, int64_t h) const { return s.head * g.groups + h; }

  // A user's state of the stream.
  struct UserState {
    char *s, *z;
  };
  UserState user(const powerattn_state &state, const Slot<T> &s) const {
    const int64_t element = size_of(p.state_dtype);
    UserState u = {nullptr, nullptr};
    if (state.s != nullptr) {
      u.s =
          static_cast<char *>(state.s) + (s.sequence * state.s_stride_n + s.head * state.s_stride_h) * element;
    }
    if (state.z != nullptr) {
      u.z =
          static_cast<char *>(state.z) + (s.sequence * state.z_stride_n + s.head * state.z_stride_h) * element;
    }
    return u;
  }

  // f(slot, index, scratch) for index < per_slot of each of the first `count` slots.
  template <class F>
  void units(int64_t count, int64_t per_slot, const F &f) const {
    parallel.with_worker(count * per_slot, [&](int64_t unit, int worker) {
      f(buffers.slots[unit / per_slot], unit % per_slot, scratch(worker));
    });
  }

  // Unit `unit` of g.tiles + 1 of chunk n: keys and values of a tile, or the chunk's gates.
  void pack(const powerattn_tensor &k, const powerattn_tensor &v, const powerattn_tensor &log_g, Slot<T> &s,
            int64_t n, int64_t unit, void *memory) const {
    if (tokens(s, n) == 0) return;
    if (unit == g.tiles) {
      if (call.gated) {
        kernels.gates(call, statistics(log_g, s, s.head), {n * g.chunk, 0, tokens(s, n)}, &s.gates);
      }
      return;
    }
    const fast::Span span = tile_span(s, n, unit);
    if (span.count <= 0) return;
    kernels.pack(call, rows(k, s, s.head), rotates(), s.position, call.d, span, s.k, memory);
    kernels.pack(call, rows(v, s, s.head), false, 0.0, call.e, span, s.v, memory);
  }

  // Rows of a state in blocks: f(slot, first row, rows, scratch).
  template <class F>
  void state_units(int64_t count, const F &f) const {
    units(count, state_blocks(call), [&](Slot<T> &s, int64_t block, void *memory) {
      const int64_t row = block * unit_rows(call);
      f(s, row, std::min(unit_rows(call), call.D - row), memory);
    });
  }

  // A user's state of the stream to the inner form, rows row .. row+rows-1.
  void import_rows(const Slot<T> &s, const powerattn_state &from, const fast::State<T> &to, int64_t row,
                   int64_t rows) const {
    const UserState u = user(from, s);
    kernels.import_state(call, static_cast<int>(p.state_dtype), u.s, u.z, row, rows, to);
  }
  // And back; with a null `from` a copy of `otherwise`, or zeros.
  void export_rows(const Slot<T> &s, const powerattn_state &to, const powerattn_state &otherwise,
                   const fast::State<T> &from, int64_t row, int64_t rows) const {
    const UserState u = user(to, s);
    if (from.s != nullptr) {
      kernels.export_state(call, static_cast<int>(p.state_dtype), from, row, rows, u.s, u.z);
      return;
    }
    const UserState o = user(otherwise, s);
    const uint64_t element = static_cast<uint64_t>(size_of(p.state_dtype));
    copy_or_zero(u.s, o.s, static_cast<uint64_t>(row * call.e) * element,
                 static_cast<uint64_t>(rows * call.e) * element);
    if (u.z != nullptr) {
      copy_or_zero(u.z, o.z, static_cast<uint64_t>(row) * element, static_cast<uint64_t>(rows) * element);
    }
  }
  // The same for all streams of a wave; from(slot) says where the inner form is.
  template <class F>
  void export_states(int64_t count, const powerattn_state &to, const powerattn_state &otherwise,
                     const F &from) const {
    state_units(count, [&](Slot<T> &s, int64_t row, int64_t rows, void *) {
      export_rows(s, to, otherwise, from(s), row, rows);
    });
  }

  // Zeros for the padding rows past the last packed sequence.
  void clear_padding(const powerattn_tensor &t, int64_t heads, int64_t width, int64_t element,
                     const int64_t *cu_seqlens) const {
    if (!p.packed || t.data == nullptr) return;
    for (int64_t i = cu_seqlens[p.sequences]; i < p.seq_len; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        std::memset(static_cast<char *>(t.data) + (i * t.stride_t + h * t.stride_h) * element, 0,
                    static_cast<size_t>(width * element));
      }
    }
  }

 private:
  static void copy_or_zero(char *to, const char *from, uint64_t at, uint64_t bytes) {
    if (from == nullptr) {
      std::memset(to + at, 0, bytes);
    } else if (to != from) {
      std::memcpy(to + at, from + at, bytes);
    }
  }
};

}  // namespace cpu
}  // namespace powerattn
