// SPDX-License-Identifier: Apache-2.0
// The clock that a device ran at: cycles of its multiprocessors over nanoseconds between two stamps on a
// stream. A device at its power cap lowers it by a tenth or more, so that a time says little without it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../tests/gpu/device_problem.h"

namespace powerattn_bench {

// A block for each multiprocessor, as it is the only one that fits there.
constexpr int kStampBytes = 120 << 10;

static __global__ void __launch_bounds__(32) stamp_clock(int64_t *cycles, int64_t *nanoseconds) {
  uint32_t sm;
  int64_t now;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  if (threadIdx.x == 0) cycles[sm] = clock64(), nanoseconds[sm] = now;
}

class Clock {
 public:
  Clock() {
    using powerattn_test::device_must;
    int device = 0;
    device_must(cudaGetDevice(&device), "device");
    device_must(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, device), "device");
    device_must(cudaMallocHost(&stamps_, sizeof(int64_t) * size_t(sms_) * 4), "cudaMallocHost");
    device_must(cudaFuncSetAttribute(stamp_clock, cudaFuncAttributeMaxDynamicSharedMemorySize, kStampBytes),
                "stamp");
  }
  Clock(const Clock &) = delete;
  Clock &operator=(const Clock &) = delete;
  ~Clock() { cudaFreeHost(stamps_); }

  void begin(cudaStream_t stream) {
    for (int i = 0; i < 4 * sms_; ++i) stamps_[i] = 0;
    stamp(stamps_, stream);
  }
  void end(cudaStream_t stream) { stamp(stamps_ + 2 * sms_, stream); }
  // MHz between the two, when the stream is done: a mean of the multiprocessors that have both stamps.
  double mhz() const {
    double sum = 0;
    int count = 0;
    for (int i = 0; i < sms_; ++i) {
      const int64_t *const a = stamps_ + i, *const b = a + 2 * sms_;
      if (a[sms_] == 0 || b[sms_] <= a[sms_]) continue;
      sum += double(b[0] - a[0]) / double(b[sms_] - a[sms_]);
      ++count;
    }
    return count > 0 ? 1e3 * sum / count : 0;
  }

 private:
  void stamp(int64_t *to, cudaStream_t stream) const {
    stamp_clock<<<sms_, 32, kStampBytes, stream>>>(to, to + sms_);
    powerattn_test::device_must(cudaGetLastError(), "stamp");
  }
  int sms_ = 0;
  int64_t *stamps_ = nullptr;
};

}  // namespace powerattn_bench
