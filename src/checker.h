// SPDX-License-Identifier: Apache-2.0
// The named checks that check.cpp lists. A Checker keeps the first failure; every later check is a no-op, so
// a list reads top to bottom without a branch. It writes nothing and allocates nothing.
#pragma once

#include <cstdint>
#include <string>

#include "backend.h"
#include "span.h"
#include "status.h"

namespace powerattn {

enum class Need { kRequired, kOptional };
enum class Role { kInput, kOutput };

class Checker {
 public:
  powerattn_status status() const { return status_; }

  // ---- Scalars
  void range(const char *name, int64_t value, int64_t low, int64_t high);
  void at_least(const char *name, int64_t value, int64_t low);
  void finite(const char *name, double value);
  void zero(const char *name, int64_t value);  // reserved fields
  // Refuses with INVALID_ARGUMENT and this message unless `holds`.
  void require(bool holds, const char *format, ...) POWERATTN_PRINTF(3, 4);  // `this` is argument 1
  void refuse(powerattn_status status, const char *format, ...) POWERATTN_PRINTF(3, 4);
  bool failed() const { return status_ != POWERATTN_OK; }

 protected:
  powerattn_status status_ = POWERATTN_OK;
};

// Arguments of one execute call of a plan.
class ArgsChecker : public Checker {
 public:
  explicit ArgsChecker(const powerattn_plan &plan) : plan_(plan), p_(plan.problem) {}

  // The plan has an implementation of the operation.
  void runs(const char *operation, const Implementation *implementation, const std::string &refusal);

  // ---- Tensors [batch, seq_len, heads, inner]: presence, alignment, reach, outputs that overlap themselves
  void tensor(const char *name, const powerattn_tensor &t, int64_t heads, int64_t inner, Dtype dtype, Role role,
              Need need);
  void query(const char *name, const powerattn_tensor &t, Role role, Need need = Need::kRequired) {
    tensor(name, t, p_.heads_q, p_.head_dim, p_.dtype, role, need);
  }
  void key(const char *name, const powerattn_tensor &t, Role role, Need need = Need::kRequired) {
    tensor(name, t, p_.heads_kv, p_.head_dim, p_.dtype, role, need);
  }
  void value(const char *name, const powerattn_tensor &t, Role role, Need need = Need::kRequired) {
    tensor(name, t, p_.heads_kv, p_.value_dim, p_.dtype, role, need);
  }
  void output(const char *name, const powerattn_tensor &t, Role role, Need need = Need::kRequired) {
    tensor(name, t, p_.heads_q, p_.value_dim, p_.dtype, role, need);
  }
  void gate(const char *name, const powerattn_tensor &t, Role role, Need need = Need::kOptional) {
    tensor(name, t, p_.heads_kv, 1, p_.stat_dtype, role, need);
  }
  void row_norm(const char *name, const powerattn_tensor &t, Role role, Need need) {
    tensor(name, t, p_.heads_q, 1, p_.stat_dtype, role, need);
  }

  // ---- States [count, heads_kv, D, value_dim] and [count, heads_kv, D]
  void state(const char *name, const powerattn_state &s, int64_t count, Dtype dtype, Role role, Need need);
  // [segments, sequences, heads_kv, ...] with a stride between segments.
  void segments(const char *name, const powerattn_state &s, int64_t count, int64_t s_stride, int64_t z_stride);
  // States in forward and backward calls need the flag.
  void use_state(const char *name, const powerattn_state &s);

  // ---- Flat arrays and buffers
  void array(const char *name, const void *data, int64_t count, int64_t element, Role role, Need need);
  void strided_gates(const char *name, const void *data, int64_t count, int64_t stride_segment,
                     int64_t stride_n, int64_t stride_h);
  // Workspace or saved: size, presence, alignment.
  void buffer(const char *name, const char *bytes_name, const void *data, uint64_t bytes, uint64_t needed,
              Role role);
  // A packed state: host memory at any alignment.
  void host_block(const char *name, const void *data, uint64_t bytes, Role role);
  void stream(const void *stream);

  // ---- Contents that the host can read (CPU plans; on CUDA they are device memory)
  void sequences(const int64_t *cu_seqlens, const int64_t *rope_offset);
  void slots(const char *name, const int64_t *slots, int64_t count, int64_t num_slots, bool distinct);
  void lengths(const int64_t *lengths);

  // No output touches another tensor of the call. `same_a` and `same_b` may be exactly the same memory.
  void no_overlap(const char *same_a = nullptr, const char *same_b = nullptr);

 private:
  Span *add(const char *name, Role role, const void *data, int64_t alignment, int64_t run);
  // Refuses states whose bytes do not fit in int64_t; a plan may exist without them.
  void countable();
  void dimension(Span *span, int axis, const char *stride_name, int64_t extent, int64_t stride,
                 int64_t element);
  void finish(Span *span, bool on_device = true);
  void state_part(const char *name, const char *part, const void *data, int64_t run, Dtype dtype, Role role,
                  const int64_t extent[3], const int64_t stride[3]);

  static constexpr int kMaxSpans = 32;
  static constexpr int kNameLength = 32;
  const powerattn_plan &plan_;
  const Problem &p_;
  Span spans_[kMaxSpans];
  char names_[kMaxSpans][kNameLength];           // "initial_state.s"
  uint64_t first_[kMaxSpans], last_[kMaxSpans];  // the addresses that a span reaches
  int size_ = 0;
};

}  // namespace powerattn
