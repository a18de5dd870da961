// SPDX-License-Identifier: Apache-2.0
// The C entry points: each one clears the thread's message, reads its structs by their struct_size, runs the
// checks and dispatches. Nothing escapes: whatever is thrown below becomes a status.
#include <cinttypes>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "backend.h"
#include "check.h"
#include "plan.h"
#include "power_attention.h"
#include "state_layout.h"
#include "status.h"

namespace powerattn {
namespace {

template <class Body>
powerattn_status guarded(Body &&body) noexcept {
  clear_error();
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return fail(POWERATTN_ERROR_OUT_OF_MEMORY, "out of host memory for the library's own objects");
  } catch (const std::exception &e) {
    return fail(POWERATTN_ERROR_INTERNAL, "unexpected exception: %s", e.what());
  } catch (...) {
    return fail(POWERATTN_ERROR_INTERNAL, "unexpected exception");
  }
}

// Larger than any struct will be; keeps a garbage struct_size from being read as memory.
constexpr uint32_t kMaxStructSize = 4096;

// Reads a caller's struct into the one this library knows. `name` is the argument, `T` has struct_size first.
// This is the first release, so the smallest size in the wild is sizeof(T); fields added later are zero for
// callers that are older, and a newer caller may pass more bytes as long as they are zero.
template <class T>
powerattn_status read_struct(const T *from, T *to, const char *name) {
  constexpr uint32_t smallest = sizeof(T);
  if (from == nullptr) return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "%s is NULL", name);
  const uint32_t size = from->struct_size;
  if (size < smallest || size > kMaxStructSize) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "%s->struct_size is %" PRIu32 "; it must be %" PRIu32 " (sizeof the struct)", name, size,
                smallest);
  }
  const auto *bytes = reinterpret_cast<const unsigned char *>(from);
  for (uint32_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                  "%s has a nonzero byte at offset %" PRIu32 "; this library knows %" PRIu32
                  " bytes of it and the rest must be zero",
                  name, i, smallest);
    }
  }
  std::memcpy(to, from, sizeof(T));
  return POWERATTN_OK;
}

powerattn_status need_plan(const powerattn_plan *plan) {
  return plan != nullptr ? POWERATTN_OK : fail(POWERATTN_ERROR_INVALID_ARGUMENT, "plan is NULL");
}

// One execute call: plan, struct, checks, implementation.
template <class Args, class Check, class Run>
powerattn_status execute(const powerattn_plan *plan, const Args *args, Check check, Run run) noexcept {
  return guarded([&] {
    Args a = {};
    powerattn_status status = need_plan(plan);
    if (status == POWERATTN_OK) status = read_struct(args, &a, "args");
    if (status == POWERATTN_OK) status = check(*plan, a);
    if (status == POWERATTN_OK) status = run(*plan, a);
    return status;
  });
}

powerattn_status check_shape(int64_t head_dim, int32_t degree) {
  if (head_dim < 1 || head_dim > kMaxDim) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "head_dim is %" PRId64 "; allowed are 1 .. %" PRId64,
                head_dim, kMaxDim);
  }
  if (degree < 1 || degree > kMaxDegree) {
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "degree is %" PRId32 "; allowed are 1 .. %" PRId32, degree,
                kMaxDegree);
  }
  return POWERATTN_OK;
}

powerattn_status need_output(const void *pointer, const char *name) {
  return pointer != nullptr ? POWERATTN_OK : fail(POWERATTN_ERROR_INVALID_ARGUMENT, "%s is NULL", name);
}

}  // namespace
}  // namespace powerattn

using namespace powerattn;

extern "C" {

powerattn_status powerattn_plan_create(const powerattn_desc *desc, powerattn_plan **plan) {
  return guarded([&] {
    powerattn_desc d = {};
    powerattn_status status = need_output(plan, "plan");
    if (status == POWERATTN_OK) status = read_struct(desc, &d, "desc");
    if (status == POWERATTN_OK) status = check_desc(d);
    std::unique_ptr<powerattn_plan> made;
    if (status == POWERATTN_OK) status = make_plan(d, &made);
    if (status == POWERATTN_OK) *plan = made.release();
    return status;
  });
}

void powerattn_plan_destroy(powerattn_plan *plan) { delete plan; }

powerattn_status powerattn_plan_query(const powerattn_plan *plan, powerattn_plan_info *info) {
  return guarded([&] {
    powerattn_plan_info known = {};
    powerattn_status status = need_plan(plan);
    if (status == POWERATTN_OK) status = need_output(info, "info");
    if (status != POWERATTN_OK) return status;
    const uint32_t size = info->struct_size;
    if (size < sizeof(known) || size > kMaxStructSize) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                  "info->struct_size is %" PRIu32
                  "; it must be %zu"
                  " (sizeof the struct)",
                  size, sizeof(known));
    }
    query_plan(*plan, &known);
    known.struct_size = size;
    std::memset(static_cast<void *>(info), 0, size);  // fields that a newer caller knows read as zero
    std::memcpy(info, &known, sizeof(known));
    return status;
  });
}

powerattn_status powerattn_plan_describe(const powerattn_plan *plan, char *text, size_t capacity,
                                         size_t *needed) {
  return guarded([&] {
    powerattn_status status = need_plan(plan);
    if (status == POWERATTN_OK && capacity > 0) status = need_output(text, "text");
    if (status != POWERATTN_OK) return status;
    const std::string &whole = plan->text;
    if (needed != nullptr) *needed = whole.size() + 1;
    if (capacity > 0) {
      const size_t length = whole.size() < capacity ? whole.size() : capacity - 1;
      std::memcpy(text, whole.data(), length);
      text[length] = '\0';
    }
    return status;
  });
}

powerattn_status powerattn_forward(const powerattn_plan *plan, const powerattn_forward_args *args) {
  return execute(plan, args, check_forward, [](const powerattn_plan &p, const powerattn_forward_args &a) {
    return p.forward->forward(p, a);
  });
}

powerattn_status powerattn_backward(const powerattn_plan *plan, const powerattn_backward_args *args) {
  return execute(plan, args, check_backward, [](const powerattn_plan &p, const powerattn_backward_args &a) {
    return p.backward->backward(p, a);
  });
}

powerattn_status powerattn_step(const powerattn_plan *plan, const powerattn_step_args *args) {
  return execute(plan, args, check_step,
                 [](const powerattn_plan &p, const powerattn_step_args &a) { return p.step->step(p, a); });
}

powerattn_status powerattn_summary(const powerattn_plan *plan, const powerattn_summary_args *args) {
  return execute(plan, args, check_summary, [](const powerattn_plan &p, const powerattn_summary_args &a) {
    return p.summary->summary(p, a);
  });
}

powerattn_status powerattn_summary_reverse(const powerattn_plan *plan,
                                           const powerattn_summary_reverse_args *args) {
  return execute(plan, args, check_summary_reverse,
                 [](const powerattn_plan &p, const powerattn_summary_reverse_args &a) {
                   return p.summary->summary_reverse(p, a);
                 });
}

powerattn_status powerattn_state_compose(const powerattn_plan *plan, const powerattn_compose_args *args) {
  return execute(plan, args, check_compose, [](const powerattn_plan &p, const powerattn_compose_args &a) {
    return p.backend->compose(p, a);
  });
}

powerattn_status powerattn_state_convert(const powerattn_plan *plan, const powerattn_convert_args *args) {
  return execute(plan, args, check_convert, [](const powerattn_plan &p, const powerattn_convert_args &given) {
    powerattn_convert_args a = given;
    if (a.src_dtype == 0) a.src_dtype = static_cast<int32_t>(p.problem.state_dtype);
    if (a.dst_dtype == 0) a.dst_dtype = static_cast<int32_t>(p.problem.state_dtype);
    return p.backend->convert(p, a);
  });
}

powerattn_status powerattn_state_rows(int64_t head_dim, int32_t degree, int64_t *rows) {
  return guarded([&] {
    powerattn_status status = need_output(rows, "rows");
    if (status == POWERATTN_OK) status = check_shape(head_dim, degree);
    if (status != POWERATTN_OK) return status;
    const int64_t d = state_rows(head_dim, degree);
    if (d == kRowsOverflow) {
      return fail(POWERATTN_ERROR_UNSUPPORTED,
                  "head_dim %" PRId64 " and degree %" PRId32 " give more state rows than int64_t holds",
                  head_dim, degree);
    }
    *rows = d;
    return status;
  });
}

powerattn_status powerattn_state_bytes(int64_t head_dim, int64_t value_dim, int32_t degree, int32_t state_dtype,
                                       int64_t count, uint64_t *bytes) {
  return guarded([&] {
    powerattn_status status = need_output(bytes, "bytes");
    if (status == POWERATTN_OK) status = check_shape(head_dim, degree);
    if (status != POWERATTN_OK) return status;
    if (value_dim < 1 || value_dim > kMaxDim) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "value_dim is %" PRId64 "; allowed are 1 .. %" PRId64,
                  value_dim, kMaxDim);
    }
    if (state_dtype < POWERATTN_FLOAT32 || state_dtype > POWERATTN_FLOAT64) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                  "state_dtype is %" PRId32 "; allowed are FLOAT32, FLOAT16, BFLOAT16 and FLOAT64",
                  state_dtype);
    }
    if (count < 0) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "count is %" PRId64 "; it must be >= 0", count);
    }
    const uint64_t total =
        state_bytes(state_rows(head_dim, degree), value_dim, static_cast<Dtype>(state_dtype), count);
    if (total == kBytesOverflow) {
      return fail(POWERATTN_ERROR_UNSUPPORTED,
                  "%" PRId64 " states of head_dim %" PRId64 ", value_dim %" PRId64 " and degree %" PRId32
                  " take more bytes than uint64_t holds",
                  count, head_dim, value_dim, degree);
    }
    *bytes = total;
    return status;
  });
}

powerattn_status powerattn_state_monomial(int64_t head_dim, int32_t degree, int64_t row, int32_t *indices,
                                          double *weight) {
  return guarded([&] {
    powerattn_status status = need_output(indices, "indices");
    if (status == POWERATTN_OK) status = need_output(weight, "weight");
    if (status == POWERATTN_OK) status = check_shape(head_dim, degree);
    if (status != POWERATTN_OK) return status;
    const int64_t rows = state_rows(head_dim, degree);
    if (rows == kRowsOverflow) {
      return fail(POWERATTN_ERROR_UNSUPPORTED,
                  "head_dim %" PRId64 " and degree %" PRId32 " give more state rows than int64_t holds",
                  head_dim, degree);
    }
    if (row < 0 || row >= rows) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT, "row is %" PRId64 "; allowed are 0 .. %" PRId64, row,
                  rows - 1);
    }
    state_monomial(head_dim, degree, row, indices, weight);
    return status;
  });
}

powerattn_status powerattn_state_pack_size(const powerattn_plan *plan, int32_t dtype, int64_t count,
                                           uint64_t *bytes) {
  return guarded([&] {
    powerattn_status status = need_plan(plan);
    if (status == POWERATTN_OK) status = need_output(bytes, "bytes");
    Dtype packed{};
    if (status == POWERATTN_OK) status = check_pack_dtype(plan->problem, dtype, &packed);
    uint64_t size = 0;
    if (status == POWERATTN_OK) status = check_pack_count(plan->problem, packed, count, &size);
    if (status == POWERATTN_OK) *bytes = size;
    return status;
  });
}

powerattn_status powerattn_state_pack(const powerattn_plan *plan, const powerattn_pack_args *args) {
  return execute(plan, args, check_pack, [](const powerattn_plan &p, const powerattn_pack_args &a) {
    const Dtype dtype = a.dtype == 0 ? p.problem.state_dtype : static_cast<Dtype>(a.dtype);
    auto *block = static_cast<unsigned char *>(a.packed);
    const powerattn_status status = p.backend->pack(p, a, dtype, block + kPackedHeaderBytes);
    // The header last: a block whose payload failed is not a packed state.
    if (status == POWERATTN_OK) write_packed_header(packed_header(p.problem, dtype, a.count), block);
    return status;
  });
}

powerattn_status powerattn_state_unpack(const powerattn_plan *plan, const powerattn_pack_args *args) {
  return execute(plan, args, check_unpack, [](const powerattn_plan &p, const powerattn_pack_args &a) {
    PackedHeader header;  // again, after check_unpack: for the dtype
    const powerattn_status status = read_packed_header(p.problem, a.count, a.packed, a.packed_bytes, &header);
    if (status != POWERATTN_OK) return status;
    return p.backend->unpack(p, a, header.dtype,
                             static_cast<const unsigned char *>(a.packed) + kPackedHeaderBytes);
  });
}

uint32_t powerattn_version(void) {
  return POWERATTN_VERSION_MAJOR * 10000 + POWERATTN_VERSION_MINOR * 100 + POWERATTN_VERSION_PATCH;
}

powerattn_status powerattn_device_count(int32_t device_type, int32_t *count) {
  return guarded([&] {
    powerattn_status status = need_output(count, "count");
    if (status != POWERATTN_OK) return status;
    if (device_type != POWERATTN_CPU && device_type != POWERATTN_CUDA) {
      return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                  "device_type is %" PRId32 "; allowed are CPU (0) and CUDA (1)", device_type);
    }
    const Backend *backend = device_type == POWERATTN_CPU ? &cpu_backend() : cuda_backend();
    int32_t found = 0;
    if (backend != nullptr) status = backend->device_count(&found);
    if (status == POWERATTN_OK) *count = found;
    return status;
  });
}

const char *powerattn_last_error(void) { return last_error(); }

}  // extern "C"
