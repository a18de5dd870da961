// SPDX-License-Identifier: Apache-2.0
// Device memory for the case runner of tests/run_case.h. Every byte that is allocated is set (all bits: NaN),
// and every block is checked for writes past its ends when it is released.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

namespace powerattn_test {

inline void cuda_must(cudaError_t error, const char *what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class CudaMemory : public Memory {
 public:
  // `guard` bytes before and behind every block; 0 leaves the finding of stray accesses to compute-sanitizer.
  explicit CudaMemory(size_t guard = 4096) : guard_(guard) {
    cuda_must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~CudaMemory() override { cudaStreamDestroy(stream_); }

  int32_t device_type() const override { return POWERATTN_CUDA; }
  void *stream() override { return stream_; }

  void *allocate(size_t bytes) override {
    char *base = nullptr;
    const size_t total = (bytes ? bytes : 1) + 2 * guard_;
    cuda_must(cudaMalloc(reinterpret_cast<void **>(&base), total), "cudaMalloc");
    cuda_must(cudaMemset(base, 0xff, total), "cudaMemset");
    cuda_must(cudaStreamSynchronize(nullptr), "cudaMemset");  // not ordered with stream_, and asynchronous
    sizes_[base + guard_] = bytes;
    return base + guard_;
  }

  void release(void *p) override {
    cudaStreamSynchronize(stream_);
    char *block = static_cast<char *>(p);
    const size_t bytes = sizes_[block];
    sizes_.erase(block);
    std::vector<unsigned char> edge(guard_);
    for (const char *side : {block - guard_, block + bytes}) {
      if (guard_ && cudaMemcpy(edge.data(), side, guard_, cudaMemcpyDeviceToHost) == cudaSuccess) {
        for (unsigned char c : edge) damaged_ = damaged_ || c != 0xff;
      }
    }
    cudaFree(block - guard_);
  }

  void write(void *to, const void *host, size_t bytes) override {
    if (!bytes) return;
    cuda_must(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream_), "copy to the device");
    cuda_must(cudaStreamSynchronize(stream_), "copy to the device");
  }
  void read(void *host, const void *from, size_t bytes) override {
    cuda_must(cudaStreamSynchronize(stream_), "kernels");
    if (bytes) cuda_must(cudaMemcpy(host, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
  }

  // True once something was written outside the blocks.
  bool damaged() const { return damaged_; }

 private:
  size_t guard_;
  cudaStream_t stream_ = nullptr;
  std::map<char *, size_t> sizes_;
  bool damaged_ = false;
};

}  // namespace powerattn_test
