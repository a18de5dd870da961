// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: finding devices, the ordered table of implementations, and the operations on states. The
// static CUDA runtime opens the driver when the first of these functions asks for a device, not before.
#include "backend.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "common.h"
#include "kernels/cuda/states.h"

namespace powerattn {

extern const Implementation kCudaGeneric;
#if defined(POWERATTN_HAVE_SM80)
extern const Implementation kCudaSm80;
#endif
#if defined(POWERATTN_HAVE_LINEAR)
extern const Implementation kCudaLinear;
#endif
#if defined(POWERATTN_HAVE_SM90)
extern const Implementation kCudaSm90, kCudaSm90Next;
#endif

namespace {

using cuda::check_launch;
using cuda::DeviceGuard;
using cuda::stream_of;

// Fastest first; the generic path runs what nothing above it takes.
const Implementation *const kAll[] = {
#if defined(POWERATTN_HAVE_LINEAR)
    &kCudaLinear,
#endif
#if defined(POWERATTN_HAVE_SM90)
    &kCudaSm90,
#endif
#if defined(POWERATTN_HAVE_SM80)
    &kCudaSm80,
#endif
    &kCudaGeneric, nullptr};

// Rows whose kernels have not run on a device: reached by their name only.
const Implementation *const kUnmeasured[] = {
#if defined(POWERATTN_HAVE_SM90)
    &kCudaSm90Next,
#endif
    nullptr};

// The table, or the row that POWERATTN_CUDA_IMPLEMENTATION names ("cuda.generic"): for tests and comparisons.
const Implementation *const *implementations() {
  static const Implementation *const *const table = [] {
    static const Implementation *one[] = {nullptr, nullptr};
    const char *name = std::getenv("POWERATTN_CUDA_IMPLEMENTATION");
    for (const Implementation *const *rows : {kAll, kUnmeasured}) {
      for (const Implementation *const *i = rows; name != nullptr && *i != nullptr; ++i) {
        if (std::strcmp((*i)->name, name) == 0) {
          one[0] = *i;
          return static_cast<const Implementation *const *>(one);
        }
      }
    }
    return static_cast<const Implementation *const *>(kAll);
  }();
  return table;
}

// No driver, one that is too old, and no device are all "none here".
powerattn_status device_count(int32_t *count) {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {
    cudaGetLastError();
    n = 0;
  }
  *count = n;
  return POWERATTN_OK;
}

powerattn_status open_device(int32_t device_index, uint64_t *memory_bytes) {
  const cuda::DeviceProperties *properties = nullptr;
  const powerattn_status status = cuda::device_properties(device_index, &properties);
  if (status != POWERATTN_OK) return status;
  if (properties->major < 8)
    return fail(POWERATTN_ERROR_NO_DEVICE,
                "CUDA device %d (%s) has compute capability %d.%d; 8.0 or newer is needed", device_index,
                properties->name, properties->major, properties->minor);
  *memory_bytes = properties->memory_bytes;
  return POWERATTN_OK;
}

powerattn_status check_pointer(const Problem &p, const void *pointer, const char *argument) {
  cudaPointerAttributes attributes;
  const cudaError_t error = cudaPointerGetAttributes(&attributes, pointer);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fail(POWERATTN_ERROR_DEVICE, "%s: the device cannot tell what %p is (%s)", argument, pointer,
                cudaGetErrorString(error));
  }
  if (attributes.type == cudaMemoryTypeManaged) return POWERATTN_OK;
  if (attributes.type != cudaMemoryTypeDevice)
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "%s is %p, which is host memory; a CUDA plan needs memory of its device %d", argument, pointer,
                p.device_index);
  if (attributes.device != p.device_index)
    return fail(POWERATTN_ERROR_INVALID_ARGUMENT,
                "%s is %p, memory of CUDA device %d; the plan is for device %d", argument, pointer,
                attributes.device, p.device_index);
  return POWERATTN_OK;
}

powerattn_status compose(const powerattn_plan &plan, const powerattn_compose_args &args) {
  const DeviceGuard guard(plan.problem.device_index);
  if (guard.error() != cudaSuccess) return check_launch(guard.error(), "compose");
  return check_launch(cuda::compose(plan.problem, args, stream_of(args.stream)), "compose");
}

powerattn_status convert(const powerattn_plan &plan, const powerattn_convert_args &args) {
  const Problem &p = plan.problem;
  const DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return check_launch(guard.error(), "convert");
  cuda::ConvertArgs a;
  a.src_dtype = args.src_dtype == 0 ? p.state_dtype : static_cast<Dtype>(args.src_dtype);
  a.dst_dtype = args.dst_dtype == 0 ? p.state_dtype : static_cast<Dtype>(args.dst_dtype);
  a.src_slots = args.src_slots;
  a.dst_slots = args.dst_slots;
  a.src_num_slots = args.src_slots ? args.src_num_slots : args.count;
  a.dst_num_slots = args.dst_slots ? args.dst_num_slots : args.count;
  a.count = args.count;
  a.heads = p.heads_kv;
  a.src = args.src.s;
  a.src_stride_n = args.src.s_stride_n;
  a.src_stride_h = args.src.s_stride_h;
  a.dst = args.dst.s;
  a.dst_stride_n = args.dst.s_stride_n;
  a.dst_stride_h = args.dst.s_stride_h;
  a.elements = p.state_rows * p.value_dim;
  cudaError_t error = cuda::convert(a, stream_of(args.stream));
  if (error == cudaSuccess && args.src.z && args.dst.z) {
    a.src = args.src.z;
    a.src_stride_n = args.src.z_stride_n;
    a.src_stride_h = args.src.z_stride_h;
    a.dst = args.dst.z;
    a.dst_stride_n = args.dst.z_stride_n;
    a.dst_stride_h = args.dst.z_stride_h;
    a.elements = p.state_rows;
    error = cuda::convert(a, stream_of(args.stream));
  }
  return check_launch(error, "convert");
}

// Device bytes of one packed (state, head): z then S, contiguous, in the packed dtype. Copies of the same dtype
// go straight from the pool; others through a temporary device block, since these calls may wait and allocate.
powerattn_status transfer(const powerattn_plan &plan, const powerattn_pack_args &args, Dtype dtype, char *host,
                          bool to_host, const char *what) {
  const Problem &p = plan.problem;
  const DeviceGuard guard(p.device_index);
  if (guard.error() != cudaSuccess) return check_launch(guard.error(), what);
  const cudaStream_t stream = stream_of(args.stream);
  const int64_t element = size_of(dtype), rows = p.state_rows, e = p.value_dim;
  const size_t block = size_t(rows * (e + 1) * element);
  if (args.count == 0 || p.heads_kv == 0) return check_launch(cudaStreamSynchronize(stream), what);
  void *temporary = nullptr;
  cudaError_t error = cudaMalloc(&temporary, block * size_t(p.heads_kv));
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fail(POWERATTN_ERROR_OUT_OF_MEMORY, "%s: no %zu bytes of device memory for one state (%s)", what,
                block * size_t(p.heads_kv), cudaGetErrorString(error));
  }
  for (int64_t n = 0; n < args.count && error == cudaSuccess; ++n) {
    auto *packed = host + n * p.heads_kv * int64_t(block);
    cuda::ConvertArgs s;  // pool -> block; swapped below for the way back
    s.src_dtype = p.state_dtype;
    s.dst_dtype = dtype;
    s.count = 1;
    s.heads = p.heads_kv;
    s.src_num_slots = s.dst_num_slots = 1;
    cuda::ConvertArgs z = s;
    const int64_t size = size_of(p.state_dtype);
    s.src = static_cast<char *>(args.state.s) + n * args.state.s_stride_n * size;
    s.src_stride_h = args.state.s_stride_h;
    s.dst = static_cast<char *>(temporary) + rows * element;
    s.dst_stride_h = rows * (e + 1);
    s.elements = rows * e;
    z.src = args.state.z ? static_cast<char *>(args.state.z) + n * args.state.z_stride_n * size : nullptr;
    z.src_stride_h = args.state.z_stride_h;
    z.dst = temporary;
    z.dst_stride_h = rows * (e + 1);
    z.elements = rows;
    auto run = [&](cuda::ConvertArgs a) {
      if (!to_host) {
        const void *pool = a.src;
        a.src = a.dst;
        a.dst = const_cast<void *>(pool);
        std::swap(a.src_dtype, a.dst_dtype);
        std::swap(a.src_stride_h, a.dst_stride_h);
      }
      return cuda::convert(a, stream);
    };
    if (to_host) {
      error = run(s);
      if (error == cudaSuccess)
        error =
            z.src ? run(z)
                  : cudaMemset2DAsync(temporary, block, 0, size_t(rows * element), size_t(p.heads_kv), stream);
      if (error == cudaSuccess)
        error = cudaMemcpyAsync(packed, temporary, block * size_t(p.heads_kv), cudaMemcpyDeviceToHost, stream);
    } else {
      error = cudaMemcpyAsync(temporary, packed, block * size_t(p.heads_kv), cudaMemcpyHostToDevice, stream);
      if (error == cudaSuccess) error = run(s);
      if (error == cudaSuccess && z.src) error = run(z);
    }
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  }
  cudaFree(temporary);
  return check_launch(error, what);
}

powerattn_status pack(const powerattn_plan &plan, const powerattn_pack_args &args, Dtype dtype, void *payload) {
  return transfer(plan, args, dtype, static_cast<char *>(payload), true, "pack");
}

powerattn_status unpack(const powerattn_plan &plan, const powerattn_pack_args &args, Dtype dtype,
                        const void *payload) {
  return transfer(plan, args, dtype, const_cast<char *>(static_cast<const char *>(payload)), false, "unpack");
}

}  // namespace

const Backend *cuda_backend() {
  static const Backend backend = {"cuda",  implementations(), device_count, open_device, check_pointer,
                                  compose, convert,           pack,         unpack};
  return &backend;
}

}  // namespace powerattn
