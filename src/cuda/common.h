// SPDX-License-Identifier: Apache-2.0
// What the CUDA implementations share on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "backend.h"
#include "status.h"

namespace powerattn::cuda {

struct DeviceProperties {
  char name[64] = {};
  int major = 0, minor = 0;
  int code = 0;  // architecture that this build's code for it was compiled for, 10 major + minor
  int sm_count = 0;
  size_t l2_bytes = 0;
  size_t shared_per_block = 0;  // opt-in maximum
  size_t memory_bytes = 0;
  double bandwidth = 0;  // bytes per second, from the memory clock and bus
};

// Read once per device and kept. Fails with NO_DEVICE and the reason.
powerattn_status device_properties(int device_index, const DeviceProperties **properties);
// The properties of a problem's device; null where it cannot be read: then nothing is chosen.
const DeviceProperties *device_of(const Problem &p);
// Whether blocks that need so much shared memory run there; if not, why.
bool fits_shared(const Problem &p, const DeviceProperties &device, size_t bytes, std::string *why);
// The multiprocessors of the device whose rates the cost models hold.
constexpr int kReferenceSms = 132;

inline bool with_rope(const Problem &p) { return p.rope.style != POWERATTN_ROPE_NONE; }

// Makes the plan's device current and the caller's again at the end. Also drops a pending error of an earlier
// call that is none of ours, so that what cudaGetLastError says afterwards is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device_index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = -1;
  cudaError_t error_ = cudaSuccess;
};

// OK, or DEVICE with what was being done and what the device said.
powerattn_status check_launch(cudaError_t error, const char *what);

// Cuts a workspace into 256-byte aligned arrays. With a null base it only counts, so that the same code gives
// sizes.
class Carver {
 public:
  explicit Carver(void *base) : base_(static_cast<char *>(base)) {}
  template <class T>
  T *take(size_t count) {
    return static_cast<T *>(bytes(count * sizeof(T)));
  }
  void *bytes(size_t n) {
    void *p = base_ ? base_ + used_ : nullptr;
    used_ += (n + 255) / 256 * 256;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char *base_;
  size_t used_ = 0;
};

// Sizes from the walks that also give a call its pointers: through `saved`, and through what a forward and a
// backward have in the workspace beside it (which holds what `saved` would, where that is not given).
template <class Saved, class Forward, class Backward>
Sizes sizes_of(Saved walk_saved, Forward walk_forward, Backward walk_backward) {
  Carver saved(nullptr), forward(nullptr), backward(nullptr);
  walk_saved(&saved);
  walk_forward(&forward);
  walk_backward(&backward);
  Sizes s;
  s.saved = saved.used();
  s.forward = forward.used() + s.saved;
  s.backward_saved = backward.used();
  s.backward = backward.used() + s.saved;
  return s;
}

inline cudaStream_t stream_of(void *stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace powerattn::cuda
