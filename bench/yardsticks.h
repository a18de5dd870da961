// SPDX-License-Identifier: Apache-2.0
// What this machine can do, measured beside the library in the same run: OpenBLAS sgemm, oneDNN's bfloat16
// multiply (where it was found at build time and the processor has one), copies.
#pragma once

#include <dlfcn.h>
#include <time.h>
#if defined(POWERATTN_BENCH_ONEDNN)
#include <oneapi/dnnl/dnnl.hpp>
#endif

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace bench {

// With --clock cpu: processor time of the process, for one thread on a machine that others use too.
inline bool cpu_clock = false;

inline double now() {
  if (cpu_clock) {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// OpenBLAS, found at run time: float32, 1024 x 1024 x 1024.
class Sgemm {
 public:
  Sgemm() {
    for (const char *name : {"libopenblas.so.0", "libopenblas.so"}) {
      if ((library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL)) != nullptr) break;
    }
    if (library_ == nullptr) return;
    multiply_ = reinterpret_cast<Multiply>(dlsym(library_, "sgemm_"));
    set_threads_ = reinterpret_cast<SetThreads>(dlsym(library_, "openblas_set_num_threads"));
    a_.assign(kSize * kSize, 0.5f);
    b_.assign(kSize * kSize, 0.25f);
    c_.assign(kSize * kSize, 0.0f);
  }
  bool found() const { return multiply_ != nullptr && set_threads_ != nullptr; }

  // One multiply; FLOP/s.
  double rate(int threads) {
    if (!found()) return 0;
    set_threads_(threads);
    const int n = kSize;
    const float one = 1, zero = 0;
    const double start = now();
    multiply_("N", "N", &n, &n, &n, &one, a_.data(), &n, b_.data(), &n, &zero, c_.data(), &n);
    return 2.0 * n * n * n / (now() - start);
  }

 private:
  using Multiply = void (*)(const char *, const char *, const int *, const int *, const int *, const float *,
                            const float *, const int *, const float *, const int *, const float *, float *,
                            const int *);
  using SetThreads = void (*)(int);
  static constexpr int kSize = 1024;
  void *library_ = nullptr;
  Multiply multiply_ = nullptr;
  SetThreads set_threads_ = nullptr;
  std::vector<float> a_, b_, c_;
};

// Copies `bytes` with `threads` threads, each its own part; bytes read and written per second.
inline double copy_rate(int threads, std::vector<char> *from, std::vector<char> *to) {
  const size_t part = from->size() / static_cast<size_t>(threads);
  const double start = now();
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back([=] { std::memcpy(to->data() + part * i, from->data() + part * i, part); });
  }
  for (std::thread &w : workers) w.join();
  return 2.0 * static_cast<double>(part) * threads / (now() - start);
}

// One multiply of 2048 x 2048 x 2048 in bfloat16 by oneDNN, FLOP/s; `why` says why there is none.
class Bfloat16Multiply {
 public:
  explicit Bfloat16Multiply(int threads) {
#if defined(POWERATTN_BENCH_ONEDNN)
    setenv("OMP_NUM_THREADS", std::to_string(threads).c_str(), 1);  // read when its first primitive runs
    try {
      make();
    } catch (const dnnl::error &e) {
      multiply_ = dnnl::primitive();
      why_ = std::string("oneDNN has none for this processor (") + e.what() + ")";
    }
#else
    (void)threads;
#endif
  }
#if defined(POWERATTN_BENCH_ONEDNN)
  bool found() const { return static_cast<bool>(multiply_); }
  double rate() {
    const double start = now();
    multiply_.execute(stream_, {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}});
    stream_.wait();
    return 2.0 * kSize * kSize * kSize / (now() - start);
  }
#else
  bool found() const { return false; }
  double rate() { return 0; }
#endif
  const std::string &why() const { return why_; }

 private:
#if defined(POWERATTN_BENCH_ONEDNN)
  static constexpr int64_t kSize = 2048;
  void make() {
    using dnnl::memory;
    const memory::desc matrix({kSize, kSize}, memory::data_type::bf16, memory::format_tag::ab);
#if DNNL_VERSION_MAJOR >= 3
    multiply_ = dnnl::matmul(dnnl::matmul::primitive_desc(engine_, matrix, matrix, matrix));
#else
    multiply_ = dnnl::matmul(dnnl::matmul::primitive_desc(dnnl::matmul::desc(matrix, matrix, matrix), engine_));
#endif
    for (memory *x : {&a_, &b_, &c_}) {
      *x = memory(matrix, engine_);
      std::memset(x->get_data_handle(), 0x3c, kSize * kSize * 2);  // 0x3c3c: about 0.0115
    }
  }
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::primitive multiply_;
  dnnl::memory a_, b_, c_;
  std::string why_;
#else
  std::string why_ = "built without oneDNN (Debian: libdnnl-dev)";
#endif
};

}  // namespace bench
