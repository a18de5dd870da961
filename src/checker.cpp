// SPDX-License-Identifier: Apache-2.0
#include "checker.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "check.h"
#include "state_layout.h"

namespace powerattn {
namespace {

const char *dtype_name(Dtype t) {
  switch (t) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat16:
      return "float16";
    case Dtype::kBfloat16:
      return "bfloat16";
    case Dtype::kFloat64:
      return "float64";
  }
  return "?";
}

}  // namespace

// ---- Scalars ---------------------------------------------------------------------------------------------

void Checker::refuse(powerattn_status status, const char *format, ...) {
  if (failed()) return;
  va_list arguments;
  va_start(arguments, format);
  status_ = fail_list(status, format, arguments);
  va_end(arguments);
}

void Checker::require(bool holds, const char *format, ...) {
  if (failed() || holds) return;
  va_list arguments;
  va_start(arguments, format);
  status_ = fail_list(POWERATTN_ERROR_INVALID_ARGUMENT, format, arguments);
  va_end(arguments);
}

void Checker::range(const char *name, int64_t value, int64_t low, int64_t high) {
  require(value >= low && value <= high, "%s is %" PRId64 "; allowed are %" PRId64 " .. %" PRId64, name, value,
          low, high);
}

void Checker::at_least(const char *name, int64_t value, int64_t low) {
  require(value >= low, "%s is %" PRId64 "; it must be >= %" PRId64, name, value, low);
}

void Checker::finite(const char *name, double value) {
  require(std::isfinite(value), "%s is %g; it must be finite", name, value);
}

void Checker::zero(const char *name, int64_t value) {
  require(value == 0, "%s is %" PRId64 "; it must be 0", name, value);
}

// ---- Spans -----------------------------------------------------------------------------------------------

void ArgsChecker::runs(const char *operation, const Implementation *implementation,
                       const std::string &refusal) {
  if (implementation == nullptr) {
    refuse(POWERATTN_ERROR_UNSUPPORTED, "this plan cannot run %s: %s", operation, refusal.c_str());
  }
}

// Records what the argument touches after the checks of the pointer itself.
Span *ArgsChecker::add(const char *name, Role role, const void *data, int64_t alignment, int64_t run) {
  if (failed()) return nullptr;
  if (size_ == kMaxSpans) {
    refuse(POWERATTN_ERROR_INTERNAL, "more arguments than the validation holds");
    return nullptr;
  }
  const auto address = reinterpret_cast<uint64_t>(data);
  require(address % static_cast<uint64_t>(alignment) == 0, "%s is %p; it must be aligned to %" PRId64 " bytes",
          name, data, alignment);
  if (failed()) return nullptr;
  Span *span = &spans_[size_];
  *span = Span{};
  span->name = name;
  span->output = role == Role::kOutput;
  span->data = data;
  span->base = address;
  span->run = run;
  return span;
}

// The stride of a dimension with at most one index is never used and may be anything.
void ArgsChecker::dimension(Span *span, int axis, const char *stride_name, int64_t extent, int64_t stride,
                            int64_t element) {
  if (span == nullptr || failed()) return;
  span->extent[axis] = extent;
  span->stride[axis] = 0;
  if (extent > 1 && __builtin_mul_overflow(stride, element, &span->stride[axis])) {
    require(false, "%s.%s is %" PRId64 "; in bytes it does not fit in int64_t", span->name, stride_name,
            stride);
  }
}

void ArgsChecker::finish(Span *span, bool on_device) {
  if (span == nullptr || failed() || span->empty()) return;
  require(addressable(*span), "%s reaches farther than int64_t bytes with its strides", span->name);
  if (failed()) return;
  if (span->output) {
    const Overlap self = overlaps_itself(*span);
    require(self != Overlap::kYes, "%s overlaps itself: its strides put two elements at one address",
            span->name);
    require(self == Overlap::kNo, "%s may overlap itself: its strides are too entangled to be told apart",
            span->name);
  }
  if (failed()) return;
  if (on_device) {
    status_ = plan_.backend->check_pointer(p_, span->data, span->name);
  }
  if (failed()) return;
  reach(*span, &first_[size_], &last_[size_]);
  ++size_;
}

void ArgsChecker::tensor(const char *name, const powerattn_tensor &t, int64_t heads, int64_t inner, Dtype dtype,
                         Role role, Need need) {
  if (failed()) return;
  const bool empty = p_.batch == 0 || p_.seq_len == 0;
  if (t.data == nullptr) {
    require(need == Need::kOptional || empty,
            "%s.data is NULL; %s [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "] is required here", name,
            dtype_name(dtype), p_.batch, p_.seq_len, heads, inner);
    return;
  }
  Span *span = add(name, role, t.data, size_of(dtype), inner * size_of(dtype));
  dimension(span, 0, "stride_b", p_.batch, t.stride_b, size_of(dtype));
  dimension(span, 1, "stride_t", p_.seq_len, t.stride_t, size_of(dtype));
  dimension(span, 2, "stride_h", heads, t.stride_h, size_of(dtype));
  finish(span);
}

void ArgsChecker::state_part(const char *name, const char *part, const void *data, int64_t run, Dtype dtype,
                             Role role, const int64_t extent[3], const int64_t stride[3]) {
  if (failed() || data == nullptr) return;
  static const char *const strides[2][3] = {{"s_stride_segment", "s_stride_n", "s_stride_h"},
                                            {"z_stride_segment", "z_stride_n", "z_stride_h"}};
  const bool z = part[0] == 'z';
  // "initial_state.s", put together by hand: formatting would take longer than all the checks.
  char *full = names_[size_ < kMaxSpans ? size_ : 0];
  const size_t length = std::min<size_t>(std::strlen(name), kNameLength - 3);
  std::memcpy(full, name, length);
  full[length] = '.';
  full[length + 1] = part[0];
  full[length + 2] = '\0';
  Span *span = add(full, role, data, size_of(dtype), run * size_of(dtype));
  for (int k = 0; k < 3; ++k) dimension(span, k, strides[z][k], extent[k], stride[k], size_of(dtype));
  finish(span);
}

void ArgsChecker::countable() {
  const uint64_t bytes = state_bytes(p_.state_rows, p_.value_dim, Dtype::kFloat64, 1);
  if (bytes > static_cast<uint64_t>(INT64_MAX)) {
    refuse(POWERATTN_ERROR_UNSUPPORTED,
           "a state of head_dim %" PRId64 " and degree %" PRId32 " has more bytes than int64_t holds",
           p_.head_dim, p_.degree);
  }
}

void ArgsChecker::state(const char *name, const powerattn_state &s, int64_t count, Dtype dtype, Role role,
                        Need need) {
  if (failed()) return;
  const bool given = s.s != nullptr;
  require(given || need == Need::kOptional || count == 0,
          "%s.s is NULL; %s [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "] is required here", name,
          dtype_name(dtype), count, p_.heads_kv, p_.state_rows, p_.value_dim);
  require(given || s.z == nullptr, "%s.z is given, but %s.s is NULL", name, name);
  require(!given || s.z != nullptr || !p_.normalize, "%s.z is NULL; a normalised state has z", name);
  if (failed() || !given) return;
  countable();
  if (failed()) return;
  const int64_t extent[3] = {1, count, p_.heads_kv};
  const int64_t s_stride[3] = {0, s.s_stride_n, s.s_stride_h}, z_stride[3] = {0, s.z_stride_n, s.z_stride_h};
  state_part(name, "s", s.s, p_.state_rows * p_.value_dim, dtype, role, extent, s_stride);
  state_part(name, "z", s.z, p_.state_rows, dtype, role, extent, z_stride);
}

void ArgsChecker::segments(const char *name, const powerattn_state &s, int64_t count, int64_t s_stride,
                           int64_t z_stride) {
  if (failed()) return;
  const bool empty = count == 0 || p_.sequences == 0;
  require(s.s != nullptr || empty, "%s.s is NULL; it may be NULL only with count 0", name);
  require(s.s != nullptr || s.z == nullptr, "%s.z is given, but %s.s is NULL", name, name);
  require(s.z != nullptr || empty || !p_.normalize, "%s.z is NULL; a normalised state has z", name);
  countable();
  if (failed()) return;
  const int64_t extent[3] = {count, p_.sequences, p_.heads_kv};
  const int64_t s_strides[3] = {s_stride, s.s_stride_n, s.s_stride_h};
  const int64_t z_strides[3] = {z_stride, s.z_stride_n, s.z_stride_h};
  state_part(name, "s", s.s, p_.state_rows * p_.value_dim, p_.state_dtype, Role::kInput, extent, s_strides);
  state_part(name, "z", s.z, p_.state_rows, p_.state_dtype, Role::kInput, extent, z_strides);
}

void ArgsChecker::use_state(const char *name, const powerattn_state &s) {
  require(p_.use_state || (s.s == nullptr && s.z == nullptr),
          "%s is given; the plan was made without POWERATTN_USE_STATE", name);
}

// ---- Arrays and buffers ----------------------------------------------------------------------------------

void ArgsChecker::array(const char *name, const void *data, int64_t count, int64_t element, Role role,
                        Need need) {
  if (failed()) return;
  if (data == nullptr) {
    require(need == Need::kOptional, "%s is NULL; %" PRId64 " elements are required here", name, count);
    return;
  }
  int64_t bytes = 0;
  require(!__builtin_mul_overflow(count, element, &bytes), "%s would have more bytes than int64_t holds", name);
  finish(add(name, role, data, element, bytes));
}

void ArgsChecker::strided_gates(const char *name, const void *data, int64_t count, int64_t stride_segment,
                                int64_t stride_n, int64_t stride_h) {
  if (failed() || data == nullptr) return;
  const int64_t element = size_of(p_.stat_dtype);
  Span *span = add(name, Role::kInput, data, element, element);
  dimension(span, 0, "stride_segment", count, stride_segment, element);
  dimension(span, 1, "stride_n", p_.sequences, stride_n, element);
  dimension(span, 2, "stride_h", p_.heads_kv, stride_h, element);
  finish(span);
}

void ArgsChecker::buffer(const char *name, const char *bytes_name, const void *data, uint64_t bytes,
                         uint64_t needed, Role role) {
  if (failed()) return;
  if (bytes < needed) {
    refuse(POWERATTN_ERROR_WORKSPACE_TOO_SMALL, "%s is %" PRIu64 "; this plan needs %" PRIu64, bytes_name,
           bytes, needed);
  }
  require(data != nullptr || needed == 0, "%s is NULL; %" PRIu64 " bytes are required here", name, needed);
  if (failed() || data == nullptr || needed == 0) return;
  finish(add(name, role, data, kBufferAlignment, static_cast<int64_t>(needed)));
}

void ArgsChecker::host_block(const char *name, const void *data, uint64_t bytes, Role role) {
  require(bytes <= static_cast<uint64_t>(INT64_MAX), "%s has more bytes than int64_t holds", name);
  finish(add(name, role, data, 1, static_cast<int64_t>(bytes)), false);
}

void ArgsChecker::stream(const void *stream) {
  require(stream == nullptr || p_.device_type != POWERATTN_CPU, "stream is %p; it must be NULL on the CPU",
          stream);
}

// ---- Contents --------------------------------------------------------------------------------------------

void ArgsChecker::sequences(const int64_t *cu_seqlens, const int64_t *rope_offset) {
  if (failed()) return;
  require(p_.packed || cu_seqlens == nullptr, "cu_seqlens is given; the plan has no packed sequences");
  array("rope_offset", rope_offset, p_.sequences, 8, Role::kInput, Need::kOptional);
  if (!p_.packed) return;
  array("cu_seqlens", cu_seqlens, p_.sequences + 1, 8, Role::kInput, Need::kRequired);
  if (failed() || cu_seqlens == nullptr || p_.device_type != POWERATTN_CPU) return;
  require(cu_seqlens[0] == 0, "cu_seqlens[0] is %" PRId64 "; it must be 0", cu_seqlens[0]);
  for (int64_t n = 0; n < p_.sequences && !failed(); ++n) {
    const int64_t first = cu_seqlens[n], last = cu_seqlens[n + 1];
    require(last >= first, "cu_seqlens[%" PRId64 "] is %" PRId64 " after %" PRId64 "; it must not decrease",
            n + 1, last, first);
    require(last <= p_.seq_len, "cu_seqlens[%" PRId64 "] is %" PRId64 "; it must be <= seq_len %" PRId64, n + 1,
            last, p_.seq_len);
    if (failed()) return;  // only ordered offsets have a difference that fits
    require(last - first <= p_.max_seq_len,
            "cu_seqlens[%" PRId64 "] makes a sequence of %" PRId64 " tokens; max_seq_len is %" PRId64, n + 1,
            last - first, p_.max_seq_len);
  }
}

// Duplicates without an allocation: a bitmap of one window of slots at a time, or every pair where that is
// less work.
void ArgsChecker::slots(const char *name, const int64_t *slots, int64_t count, int64_t num_slots,
                        bool distinct) {
  if (failed()) return;
  if (slots == nullptr) {
    require(count <= num_slots, "%s is NULL and there are %" PRId64 " slots; %" PRId64 " are needed", name,
            num_slots, count);
    return;
  }
  array(name, slots, count, 8, Role::kInput, Need::kRequired);
  if (failed() || p_.device_type != POWERATTN_CPU) return;
  for (int64_t i = 0; i < count && !failed(); ++i) {
    require(slots[i] < num_slots, "%s[%" PRId64 "] is %" PRId64 "; there are %" PRId64 " slots", name, i,
            slots[i], num_slots);
  }
  if (failed() || !distinct) return;
  constexpr int64_t kWindow = 65536;
  uint64_t seen[kWindow / 64];
  if (num_slots / kWindow >= count) {
    for (int64_t i = 0; i < count && !failed(); ++i) {
      for (int64_t j = 0; j < i && !failed(); ++j) {
        require(slots[i] < 0 || slots[i] != slots[j],
                "%s[%" PRId64 "] and [%" PRId64 "] are both %" PRId64 "; slots must be different", name, j, i,
                slots[i]);
      }
    }
    return;
  }
  for (int64_t window = 0; window < num_slots && !failed(); window += kWindow) {
    std::memset(seen, 0, sizeof(seen));
    for (int64_t i = 0; i < count && !failed(); ++i) {
      if (slots[i] < window || slots[i] - window >= kWindow) continue;  // negative ones too
      const int64_t bit = slots[i] - window;
      const uint64_t mask = uint64_t{1} << (bit % 64);
      require((seen[bit / 64] & mask) == 0,
              "%s[%" PRId64 "] is %" PRId64
              " for the second time; slots must be "
              "different",
              name, i, slots[i]);
      seen[bit / 64] |= mask;
    }
  }
}

void ArgsChecker::lengths(const int64_t *lengths) {
  array("lengths", lengths, p_.batch, 8, Role::kInput, Need::kOptional);
  if (failed() || lengths == nullptr || p_.device_type != POWERATTN_CPU) return;
  for (int64_t b = 0; b < p_.batch && !failed(); ++b) {
    require(lengths[b] >= 0 && lengths[b] <= p_.seq_len,
            "lengths[%" PRId64 "] is %" PRId64 "; allowed are 0 .. %" PRId64 " (seq_len)", b, lengths[b],
            p_.seq_len);
  }
}

void ArgsChecker::no_overlap(const char *same_a, const char *same_b) {
  const auto allowed = [&](const Span &a, const Span &b) {  // the same part of two states, exactly
    if (same_a == nullptr) return false;
    const char *part_a = std::strchr(a.name, '.'), *part_b = std::strchr(b.name, '.');
    if (part_a == nullptr || part_b == nullptr || std::strcmp(part_a, part_b) != 0) return false;
    const auto is = [](const Span &s, const char *name, const char *part) {
      return std::strlen(name) == static_cast<size_t>(part - s.name) &&
             std::strncmp(s.name, name, part - s.name) == 0;
    };
    const bool pair =
        (is(a, same_a, part_a) && is(b, same_b, part_b)) || (is(a, same_b, part_a) && is(b, same_a, part_b));
    return pair && a.base == b.base && a.run == b.run &&
           std::memcmp(a.extent, b.extent, sizeof(a.extent)) == 0 &&
           std::memcmp(a.stride, b.stride, sizeof(a.stride)) == 0;
  };
  for (int i = 0; i < size_ && !failed(); ++i) {
    for (int j = 0; j < i && !failed(); ++j) {
      const Span &a = spans_[j], &b = spans_[i];
      if ((!a.output && !b.output) || last_[j] < first_[i] || last_[i] < first_[j] || allowed(a, b)) continue;
      const Overlap found = overlap(a, b);
      const Span &out = b.output ? b : a, &other = b.output ? a : b;
      require(found != Overlap::kYes, "%s overlaps %s; an output may not share memory with another tensor",
              out.name, other.name);
      require(found == Overlap::kNo, "%s may overlap %s: their strides are too entangled to be told apart",
              out.name, other.name);
    }
  }
}

}  // namespace powerattn
