// SPDX-License-Identifier: Apache-2.0
// Where the data of a test lives: host memory here, device memory in the tests of a GPU backend. The runner
// moves bytes through this and knows nothing else about the device.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "power_attention.h"

namespace powerattn_test {

class Memory {
 public:
  virtual ~Memory() = default;
  virtual int32_t device_type() const { return POWERATTN_CPU; }
  virtual void *stream() { return nullptr; }
  // 256-byte aligned, never null.
  virtual void *allocate(size_t bytes) {
    // The end is exact, so that a sanitizer sees one byte too far.
    void *p = nullptr;
    return posix_memalign(&p, 256, bytes ? bytes : 1) == 0 ? p : nullptr;
  }
  virtual void release(void *p) { std::free(p); }
  // Ordered with the stream; `read` waits for it.
  virtual void write(void *to, const void *host, size_t bytes) {
    if (bytes) std::memcpy(to, host, bytes);
  }
  virtual void read(void *host, const void *from, size_t bytes) {
    if (bytes) std::memcpy(host, from, bytes);
  }
};

class Buffer {
 public:
  Buffer() = default;
  Buffer(Memory &memory, size_t bytes) : memory_(&memory), data_(memory.allocate(bytes)), bytes_(bytes) {}
  Buffer(Buffer &&other) noexcept { *this = static_cast<Buffer &&>(other); }
  Buffer &operator=(Buffer &&other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() {
    if (data_) memory_->release(data_);
  }

  void *data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void write(const void *host) {
    if (bytes_) memory_->write(data_, host, bytes_);
  }
  void read(void *host) const {
    if (bytes_) memory_->read(host, data_, bytes_);
  }
  // All bits set: a NaN in every dtype.
  void poison() { write(std::vector<unsigned char>(bytes_, 0xffu).data()); }

 private:
  Memory *memory_ = nullptr;
  void *data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace powerattn_test
