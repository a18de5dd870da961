// SPDX-License-Identifier: Apache-2.0
// XLA FFI handlers over libpowerattn, compiled against the header-only FFI API that jaxlib ships. The library's
// functions come as addresses (powerattn_xla_init), so that this links to nothing and one library is loaded.
//
// Absent operands have no elements. Arrays are row-major, so strides follow from dimensions. The attribute `spec`
// holds the integers of powerattn_desc, `real` its floating-point numbers, in the order of plan_numbers() in
// power_attention/_plan.py.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "power_attention.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Library {
  decltype(&powerattn_plan_create) plan_create;
  decltype(&powerattn_plan_destroy) plan_destroy;
  decltype(&powerattn_plan_query) plan_query;
  decltype(&powerattn_forward) forward;
  decltype(&powerattn_backward) backward;
  decltype(&powerattn_last_error) last_error;
} library;

using Ints = ffi::Span<const int64_t>;
using Reals = ffi::Span<const double>;

ffi::Error error_of(powerattn_status status) {
  const bool argument = status == POWERATTN_ERROR_INVALID_ARGUMENT;
  return ffi::Error(argument ? ffi::ErrorCode::kInvalidArgument : ffi::ErrorCode::kInternal, library.last_error());
}

struct Device {
  int32_t type;
  int32_t index;
};

// Plans by description, the least recently used leaving first. A call holds its plan while it runs.
class Plans {
 public:
  ffi::Error get(Device device, Ints spec, Reals real, std::shared_ptr<powerattn_plan> *plan) {
    if (spec.size() != 20 || real.size() != 3)
      return ffi::Error(ffi::ErrorCode::kInternal, "power_attention: the description has another length");
    std::string key(reinterpret_cast<const char *>(spec.begin()), spec.size() * sizeof(int64_t));
    key.append(reinterpret_cast<const char *>(real.begin()), real.size() * sizeof(double));
    key.append(std::to_string(device.type) + ':' + std::to_string(device.index));
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = index_.find(key);
    if (found != index_.end()) {
      plans_.splice(plans_.begin(), plans_, found->second);
      *plan = plans_.front().second;
      return ffi::Error::Success();
    }
    powerattn_desc desc;
    std::memset(&desc, 0, sizeof desc);
    desc.struct_size = sizeof desc;
    const int64_t *next = spec.begin() + 2;  // the device is the handler's, not the description's
    desc.device_type = device.type;
    desc.device_index = device.index;
    desc.dtype = static_cast<int32_t>(*next++);
    desc.state_dtype = static_cast<int32_t>(*next++);
    desc.degree = static_cast<int32_t>(*next++);
    desc.flags = static_cast<int32_t>(*next++);
    desc.form = static_cast<int32_t>(*next++);
    desc.batch = *next++;
    desc.seq_len = *next++;
    desc.heads_q = *next++;
    desc.heads_kv = *next++;
    desc.head_dim = *next++;
    desc.value_dim = *next++;
    desc.sequences = *next++;
    desc.max_seq_len = *next++;
    desc.chunk_size = *next++;
    desc.rope_dim = *next++;
    desc.rope_style = static_cast<int32_t>(*next++);
    desc.num_threads = static_cast<int32_t>(*next++);
    desc.state_limit = static_cast<uint64_t>(*next++);
    desc.scale = real.begin()[0];
    desc.eps = real.begin()[1];
    desc.rope_base = real.begin()[2];
    powerattn_plan *made = nullptr;
    if (powerattn_status status = library.plan_create(&desc, &made)) return error_of(status);
    plans_.emplace_front(key, std::shared_ptr<powerattn_plan>(made, library.plan_destroy));
    index_[key] = plans_.begin();
    if (plans_.size() > 256) {
      index_.erase(plans_.back().first);
      plans_.pop_back();
    }
    *plan = plans_.front().second;
    return ffi::Error::Success();
  }

 private:
  std::mutex mutex_;
  std::list<std::pair<std::string, std::shared_ptr<powerattn_plan>>> plans_;
  std::map<std::string, decltype(plans_)::iterator> index_;
} plans;

template <typename Buffer>
powerattn_tensor tensor(const Buffer &x) {
  powerattn_tensor out = {nullptr, 0, 0, 0};
  auto dims = x.dimensions();
  if (dims.size() < 3) return out;  // absent
  int64_t inner = dims.size() == 4 ? dims[3] : 1;
  out.data = x.untyped_data();
  out.stride_h = inner;
  out.stride_t = inner * dims[2];
  out.stride_b = out.stride_t * dims[1];
  return out;
}

template <typename A, typename B>
powerattn_state state(const A &s, const B &z) {
  powerattn_state out = {nullptr, nullptr, 0, 0, 0, 0};
  auto dims = s.dimensions();
  if (dims.size() != 4) return out;
  out.s = s.untyped_data();
  out.z = z.untyped_data();
  out.s_stride_h = dims[2] * dims[3];
  out.s_stride_n = out.s_stride_h * dims[1];
  out.z_stride_h = dims[2];
  out.z_stride_n = dims[2] * dims[1];
  return out;
}

// Offsets are int64, or pairs of int32 that read as int64: JAX has 32-bit integers unless told otherwise.
const int64_t *offsets(const ffi::AnyBuffer &x) {
  return x.element_count() ? static_cast<const int64_t *>(x.untyped_data()) : nullptr;
}

// Scratch memory of a call: the host's own, or XLA's on a device, where it is stream-ordered.
class Workspace {
 public:
  ffi::Error take(uint64_t bytes, ffi::ScratchAllocator *scratch) {
    if (bytes == 0) return ffi::Error::Success();
    if (scratch) {
      auto memory = scratch->Allocate(bytes + 256);  // XLA refuses to align beyond 16 bytes: aligned below
      if (!memory.has_value())
        return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the workspace of power_attention");
      data_ = *memory;
    } else {
      host_.reset(std::malloc(bytes + 256));
      if (!host_) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the workspace");
      data_ = host_.get();
    }
    data_ = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(data_) + 255) / 256 * 256);
    return ffi::Error::Success();
  }
  void *data() const { return data_; }

 private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> host_;
  void *data_ = nullptr;
};

#define RETURN_IF_ERROR(expression)              \
  if (ffi::Error error_ = (expression); error_.failure()) return error_

using Any = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error forward(Device device, void *stream, ffi::ScratchAllocator *scratch, Any q, Any k, Any v, Any log_g,
                   Any s0, Any z0, Any cu, Any rope_offset, Out y, Out row_norm, Out s, Out z, Ints spec,
                   Reals real) {
  std::shared_ptr<powerattn_plan> plan;
  RETURN_IF_ERROR(plans.get(device, spec, real, &plan));
  powerattn_plan_info info;
  std::memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  if (powerattn_status status = library.plan_query(plan.get(), &info)) return error_of(status);
  Workspace workspace;
  RETURN_IF_ERROR(workspace.take(info.workspace_forward, scratch));
  powerattn_forward_args args;
  std::memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.q = tensor(q);
  args.k = tensor(k);
  args.v = tensor(v);
  args.log_g = tensor(log_g);
  args.y = tensor(*y);
  args.row_norm = tensor(*row_norm);
  args.initial_state = state(s0, z0);
  args.final_state = state(*s, *z);
  args.cu_seqlens = offsets(cu);
  args.rope_offset = offsets(rope_offset);
  args.workspace = workspace.data();
  args.workspace_bytes = info.workspace_forward;
  args.stream = stream;
  if (powerattn_status status = library.forward(plan.get(), &args)) return error_of(status);
  return ffi::Error::Success();
}

ffi::Error backward(Device device, void *stream, ffi::ScratchAllocator *scratch, Any q, Any k, Any v, Any log_g,
                    Any y, Any row_norm, Any d_y, Any s0, Any z0, Any d_s, Any d_z, Any cu, Any rope_offset,
                    Out d_q, Out d_k, Out d_v, Out d_log_g, Out d_s0, Out d_z0, Ints spec, Reals real) {
  std::shared_ptr<powerattn_plan> plan;
  RETURN_IF_ERROR(plans.get(device, spec, real, &plan));
  powerattn_plan_info info;
  std::memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  if (powerattn_status status = library.plan_query(plan.get(), &info)) return error_of(status);
  Workspace workspace;
  RETURN_IF_ERROR(workspace.take(info.workspace_backward, scratch));
  powerattn_backward_args args;
  std::memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.q = tensor(q);
  args.k = tensor(k);
  args.v = tensor(v);
  args.log_g = tensor(log_g);
  args.y = tensor(y);
  args.row_norm = tensor(row_norm);
  args.d_y = tensor(d_y);
  args.d_q = tensor(*d_q);
  args.d_k = tensor(*d_k);
  args.d_v = tensor(*d_v);
  args.d_log_g = tensor(*d_log_g);
  args.initial_state = state(s0, z0);
  args.d_final_state = state(d_s, d_z);
  args.d_initial_state = state(*d_s0, *d_z0);
  args.cu_seqlens = offsets(cu);
  args.rope_offset = offsets(rope_offset);
  args.workspace = workspace.data();
  args.workspace_bytes = info.workspace_backward;
  args.stream = stream;
  if (powerattn_status status = library.backward(plan.get(), &args)) return error_of(status);
  return ffi::Error::Success();
}

template <typename... Args>
ffi::Error forward_cpu(Args... args) {
  return forward({POWERATTN_CPU, 0}, nullptr, nullptr, args...);
}
template <typename... Args>
ffi::Error backward_cpu(Args... args) {
  return backward({POWERATTN_CPU, 0}, nullptr, nullptr, args...);
}
template <typename... Args>
ffi::Error forward_cuda(void *stream, ffi::ScratchAllocator scratch, int32_t ordinal, Args... args) {
  return forward({POWERATTN_CUDA, ordinal}, stream, &scratch, args...);
}
template <typename... Args>
ffi::Error backward_cuda(void *stream, ffi::ScratchAllocator scratch, int32_t ordinal, Args... args) {
  return backward({POWERATTN_CUDA, ordinal}, stream, &scratch, args...);
}

}  // namespace

#define FORWARD_OPERANDS                                                                                       \
  .Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Ret<Any>() \
      .Ret<Any>().Ret<Any>().Attr<Ints>("spec").Attr<Reals>("real")
#define BACKWARD_OPERANDS                                                                                      \
  .Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>() \
      .Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Ret<Any>().Ret<Any>().Ret<Any>().Ret<Any>().Ret<Any>()      \
      .Attr<Ints>("spec").Attr<Reals>("real")
#define FORWARD_TYPES Any, Any, Any, Any, Any, Any, Any, Any, Out, Out, Out, Out, Ints, Reals
#define BACKWARD_TYPES \
  Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Out, Out, Out, Out, Out, Out, Ints, Reals
#define DEVICE_CONTEXT .Ctx<ffi::PlatformStream<void *>>().Ctx<ffi::ScratchAllocator>().Ctx<ffi::DeviceOrdinal>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(powerattn_xla_forward_cpu, (forward_cpu<FORWARD_TYPES>),
                              ffi::Ffi::Bind() FORWARD_OPERANDS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(powerattn_xla_backward_cpu, (backward_cpu<BACKWARD_TYPES>),
                              ffi::Ffi::Bind() BACKWARD_OPERANDS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(powerattn_xla_forward_cuda, (forward_cuda<FORWARD_TYPES>),
                              ffi::Ffi::Bind() DEVICE_CONTEXT FORWARD_OPERANDS,
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(powerattn_xla_backward_cuda, (backward_cuda<BACKWARD_TYPES>),
                              ffi::Ffi::Bind() DEVICE_CONTEXT BACKWARD_OPERANDS,
                              {ffi::Traits::kCmdBufferCompatible});

extern "C" __attribute__((visibility("default"))) void powerattn_xla_init(
    void *plan_create, void *plan_destroy, void *plan_query, void *forward_address, void *backward_address,
    void *last_error) {
  library.plan_create = reinterpret_cast<decltype(library.plan_create)>(plan_create);
  library.plan_destroy = reinterpret_cast<decltype(library.plan_destroy)>(plan_destroy);
  library.plan_query = reinterpret_cast<decltype(library.plan_query)>(plan_query);
  library.forward = reinterpret_cast<decltype(library.forward)>(forward_address);
  library.backward = reinterpret_cast<decltype(library.backward)>(backward_address);
  library.last_error = reinterpret_cast<decltype(library.last_error)>(last_error);
}
