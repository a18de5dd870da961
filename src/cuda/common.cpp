// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/cuda/step.h"
#include "text.h"

namespace powerattn::cuda {

powerattn_status device_properties(int device_index, const DeviceProperties **properties) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<DeviceProperties>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (device_index >= 0 && size_t(device_index) < known.size() && known[size_t(device_index)]) {
    *properties = known[size_t(device_index)].get();
    return POWERATTN_OK;
  }
  cudaDeviceProp raw;
  const cudaError_t error = cudaGetDeviceProperties(&raw, device_index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fail(POWERATTN_ERROR_NO_DEVICE, "CUDA device %d cannot be used: %s", device_index,
                cudaGetErrorString(error));
  }
  auto made = std::make_unique<DeviceProperties>();
  std::snprintf(made->name, sizeof(made->name), "%.63s", raw.name);
  made->major = raw.major;
  made->minor = raw.minor;
  made->sm_count = raw.multiProcessorCount;
  made->l2_bytes = size_t(raw.l2CacheSize);
  made->shared_per_block = raw.sharedMemPerBlockOptin;
  made->memory_bytes = raw.totalGlobalMem;
  int clock_khz = 0;
  if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device_index) != cudaSuccess)
    cudaGetLastError();
  made->bandwidth = 2.0 * double(clock_khz) * 1e3 * double(raw.memoryBusWidth) / 8.0;
  if (made->major >= 8) {
    const DeviceGuard guard(device_index);
    const cudaError_t found = guard.error() == cudaSuccess ? step_architecture(&made->code) : guard.error();
    if (found != cudaSuccess) {
      cudaGetLastError();
      return fail(POWERATTN_ERROR_NO_DEVICE,
                  "CUDA device %d (%s, compute capability %d.%d) cannot run the code of this build: %s",
                  device_index, made->name, made->major, made->minor, cudaGetErrorString(found));
    }
  }
  if (known.size() <= size_t(device_index)) known.resize(size_t(device_index) + 1);
  known[size_t(device_index)] = std::move(made);
  *properties = known[size_t(device_index)].get();
  return POWERATTN_OK;
}

const DeviceProperties *device_of(const Problem &p) {
  const DeviceProperties *properties = nullptr;
  return device_properties(p.device_index, &properties) == POWERATTN_OK ? properties : nullptr;
}

bool fits_shared(const Problem &p, const DeviceProperties &device, size_t bytes, std::string *why) {
  if (device.shared_per_block >= bytes) return true;
  why->clear();
  append(why, "head_dim %d needs %zu bytes of shared memory per block, the device has %zu",
         static_cast<int>(p.head_dim), bytes, device.shared_per_block);
  return false;
}

DeviceGuard::DeviceGuard(int device_index) {
  cudaGetLastError();
  int current = 0;
  error_ = cudaGetDevice(&current);
  if (error_ == cudaSuccess && current != device_index) {
    error_ = cudaSetDevice(device_index);
    if (error_ == cudaSuccess) previous_ = current;
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

powerattn_status check_launch(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return POWERATTN_OK;
  cudaGetLastError();
  return fail(POWERATTN_ERROR_DEVICE, "%s: the device reported %s (%s)", what, cudaGetErrorName(error),
              cudaGetErrorString(error));
}

}  // namespace powerattn::cuda
