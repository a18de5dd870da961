// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime's calls over the emulated device. Environment:
//   EMULATION_DEVICE   compute capability, "9.0" (the default) or "8.0"
//   EMULATION_CODE     "8.0": as if the driver had translated PTX of that architecture for a 9.0
//   EMULATION_ORDER    forward, reverse, random: of threads and blocks (default: each launch draws)
//   EMULATION_TIMING   late, early, random: of asynchronous copies and products (default: each launch draws)
//   EMULATION_RACES    set: look for races on shared memory (slower)
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "machine.h"

struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> nodes;
};
struct CUgraphExec_st {
  CUgraph_st graph;
};
struct CUstream_st {
  CUgraph_st *capturing = nullptr;
};
struct CUevent_st {};

namespace {

std::recursive_mutex device_mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

constexpr size_t kMemory = size_t(80) << 30, kPage = 4096;
thread_local cudaError_t last_error = cudaSuccess;
bool lost = false;  // a kernel violated a rule

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t lost_or(cudaError_t error) { return result(lost ? cudaErrorLaunchFailure : error); }

bool is_sm80() {
  const char *capability = std::getenv("EMULATION_DEVICE");
  return capability != nullptr && std::strcmp(capability, "8.0") == 0;
}
// The architecture that kernels were compiled for.
int code_architecture() {
  const char *code = std::getenv("EMULATION_CODE");
  return is_sm80() || (code != nullptr && std::strcmp(code, "8.0") == 0) ? 80 : 90;
}

// Allocations end at an inaccessible page (256-byte aligned, as the device's are) and begin behind one.
struct Allocation {
  size_t bytes;
  void *mapping;
  size_t mapped;
};
std::map<const char *, Allocation> &allocations() {
  static auto *const all = new std::map<const char *, Allocation>;  // outlives every static destructor
  return *all;
}
const std::pair<const char *const, Allocation> *allocation_of(const void *p) {
  auto a = allocations().upper_bound(static_cast<const char *>(p));
  if (a == allocations().begin()) return nullptr;
  --a;
  return static_cast<const char *>(p) < a->first + std::max<size_t>(a->second.bytes, 1) ? &*a : nullptr;
}

struct Limits {
  int shared = 48 * 1024;
  bool large_clusters = false;
};
std::unordered_map<const void *, Limits> limits;

cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (stream != nullptr && stream->capturing != nullptr) {
    stream->capturing->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  return lost ? result(cudaErrorLaunchFailure) : result(work());
}

bool legal(const void *p, size_t bytes) { return bytes == 0 || emulation::is_global(p, bytes); }

}  // namespace

namespace emulation {

bool is_global(const void *p, size_t bytes) {
  const auto *a = allocation_of(p);
  return a != nullptr && static_cast<const char *>(p) + bytes <= a->first + a->second.bytes;
}

cudaError_t set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
  const Lock lock(device_mutex);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > (is_sm80() ? 163 : 227) * 1024) return result(cudaErrorInvalidValue);
    limits[kernel].shared = value;
  } else {
    limits[kernel].large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel, std::function<void()> thread) {
  const Lock lock(device_mutex);
  Launch l;
  l.grid = config.gridDim;
  l.block = config.blockDim;
  l.shared = config.dynamicSmemBytes;
  l.kernel = kernel;
  bool early = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute &a = config.attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) l.cluster = int(a.val.clusterDim.x);
    if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      early = a.val.programmaticStreamSerializationAllowed != 0;
  }
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  const Limits &limit = limits[kernel];
  const bool legal = threads >= 1 && threads <= 1024 && threads % 32 == 0 && l.grid.x >= 1 && l.grid.y >= 1 &&
                     l.grid.z >= 1 && l.grid.x <= 0x7fffffffu && l.grid.y <= 65535 && l.grid.z <= 65535 &&
                     l.shared <= size_t(limit.shared) && l.cluster >= 1 &&
                     l.grid.x % unsigned(l.cluster) == 0 && l.cluster <= (limit.large_clusters ? 16 : 8) &&
                     (l.cluster == 1 || code_architecture() >= 90);
  if (!legal) return result(cudaErrorInvalidConfiguration);
  l.thread = std::move(thread);
  if (early) {  // here it begins after the kernel before all the same, but must not rely on that
    l.thread = [kernel_thread = l.thread] {
      kernel_thread();
      if (!has_waited()) fail("launched early, this thread ends without having waited for the kernel before");
    };
  }
  return enqueue(config.stream, [l] {
    if (!run(l)) lost = true;
    return lost ? cudaErrorLaunchFailure : cudaSuccess;
  });
}

}  // namespace emulation

// ---- Errors, devices --------------------------------------------------------------------------------------

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t e = last_error;
  last_error = lost ? cudaErrorLaunchFailure : cudaSuccess;
  return e;
}
const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
  }
  return "unknown";
}
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "a kernel broke a rule of the device (see the emulator's report)"
                                         : cudaGetErrorName(error);
}

cudaError_t cudaGetDeviceCount(int *count) {
  const char *visible = std::getenv("CUDA_VISIBLE_DEVICES");
  *count = visible != nullptr && *visible == '\0' ? 0 : 1;
  return *count ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  *p = {};
  std::snprintf(p->name, sizeof(p->name), "emulated device");
  p->totalGlobalMem = kMemory;
  p->major = is_sm80() ? 8 : 9;
  p->multiProcessorCount = is_sm80() ? 108 : 132;
  p->sharedMemPerBlockOptin = size_t(is_sm80() ? 163 : 227) * 1024;
  p->l2CacheSize = (is_sm80() ? 40 : 50) << 20;
  p->memoryBusWidth = 5120;
  return cudaSuccess;
}
cudaError_t emulation::get_attributes(cudaFuncAttributes *attributes) {
  attributes->ptxVersion = code_architecture();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  *value = is_sm80() ? 1215000 : 2619000;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return lost_or(cudaSuccess); }
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void *>(&cuTensorMapEncodeTiled) : nullptr;
  if (found != nullptr) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- Memory -----------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void **p, size_t bytes) {
  const Lock lock(device_mutex);
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > kMemory) return result(cudaErrorMemoryAllocation);
  const size_t rounded = (bytes + 255) / 256 * 256, pages = (rounded + kPage - 1) / kPage * kPage;
  void *mapping = mmap(nullptr, pages + 2 * kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return result(cudaErrorMemoryAllocation);
  char *base = static_cast<char *>(mapping);
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + pages, kPage, PROT_NONE);
  *p = base + kPage + pages - rounded;
  allocations()[static_cast<char *>(*p)] = {bytes, mapping, pages + 2 * kPage};
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
  const Lock lock(device_mutex);
  if (p == nullptr) return cudaSuccess;
  const auto a = allocations().find(static_cast<char *>(p));
  if (a == allocations().end()) return result(cudaErrorInvalidValue);
  munmap(a->second.mapping, a->second.mapped);
  allocations().erase(a);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
  *p = std::malloc(bytes);
  return *p != nullptr ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void *p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = *total = kMemory;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p) {
  const Lock lock(device_mutex);
  const bool device = allocation_of(p) != nullptr;
  attributes->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = device ? 0 : -1;
  attributes->devicePointer = device ? const_cast<void *>(p) : nullptr;
  attributes->hostPointer = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const Lock lock(device_mutex);
  const bool to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
             from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to && !legal(dst, bytes)) || (from && !legal(src, bytes))) return result(cudaErrorInvalidValue);
  return enqueue(stream, [=] {
    if (bytes) std::memmove(dst, src, bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
}
cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
  const Lock lock(device_mutex);
  if (height && !legal(p, pitch * (height - 1) + width)) return result(cudaErrorInvalidValue);
  return enqueue(stream, [=] {
    for (size_t i = 0; i < height; ++i) std::memset(static_cast<char *>(p) + i * pitch, value, width);
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset2DAsync(p, bytes, value, bytes, bytes ? 1 : 0, stream);
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

// ---- Streams, graphs, events ------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream != nullptr && stream->capturing != nullptr) return result(cudaErrorStreamCaptureUnsupported);
  return lost_or(cudaSuccess);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->capturing != nullptr) return result(cudaErrorInvalidValue);
  stream->capturing = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (stream == nullptr || stream->capturing == nullptr) return result(cudaErrorInvalidValue);
  *graph = stream->capturing;
  stream->capturing = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{*graph};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Lock lock(device_mutex);
  for (const auto &node : exec->graph.nodes) {
    const cudaError_t error = enqueue(stream, node);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return lost_or(cudaSuccess); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return lost_or(cudaSuccess); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {  // the emulator has no clock
  *ms = 0;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
