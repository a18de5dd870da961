// SPDX-License-Identifier: Apache-2.0
// What the device itself can do, measured in the run that it is compared with: bfloat16 matrix products,
// copies, and a copy in place, which a state step cannot beat.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <string>
#include <vector>

#include "timing.h"

namespace powerattn_bench {

struct Ceiling {
  std::string what, config, implementation;
  Time time;
  double flops, bytes;
};

// cuBLAS, where one can be loaded: 8192^3 bfloat16, float32 sums. Empty where there is none.
inline std::vector<Ceiling> measure_matmul(double budget_ms) {
  using powerattn_test::Block;
  using powerattn_test::random_block;
  using Create = int (*)(void **);
  using SetStream = int (*)(void *, cudaStream_t);
  using SetWorkspace = int (*)(void *, void *, size_t);
  using Gemm = int (*)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int,
                       int, const void *, void *, int, int, int, int);
  void *library = nullptr;
  for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
    if (library == nullptr) library = dlopen(name, RTLD_NOW);
  if (library == nullptr) return {};
  const auto create = reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"));
  const auto set_stream = reinterpret_cast<SetStream>(dlsym(library, "cublasSetStream_v2"));
  const auto set_workspace = reinterpret_cast<SetWorkspace>(dlsym(library, "cublasSetWorkspace_v2"));
  const auto gemm = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
  void *handle = nullptr;
  if (!create || !set_stream || !set_workspace || !gemm || create(&handle) != 0) return {};
  const int n = 8192;
  const Block a = random_block(size_t(n) * n, POWERATTN_BFLOAT16, 0, 1, 1),
              b = random_block(size_t(n) * n, POWERATTN_BFLOAT16, 0, 1, 2), c(size_t(n) * n * 2),
              workspace(64 << 20);
  const float one = 1, zero = 0;
  int status = 0;
  const Time time = median_time(
      [&](cudaStream_t stream) {
        set_stream(handle, stream);
        set_workspace(handle, workspace.get(), workspace.bytes());
        status = gemm(handle, 1, 0, n, n, n, &one, a.get(), 14 /* bfloat16 */, n, b.get(), 14, n, &zero,
                      c.get(), 14, n, 68 /* float32 sums */, 99);
      },
      budget_ms);
  if (status != 0) return {};
  return {{"matmul", "8192^3 bf16", "cuBLAS", time, 2.0 * n * n * n, 0}};
}

// x <- 1.0001 x, 16 bytes per access.
static __global__ void __launch_bounds__(256) scale_in_place(float4 *x, size_t count) {
  constexpr int kUnroll = 4;
  const size_t stride = size_t(gridDim.x) * 256;
  for (size_t i = blockIdx.x * size_t(256) + threadIdx.x; i < count; i += stride * kUnroll) {
    float4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * stride < count) v[u] = x[i + u * stride];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride >= count) break;
      v[u].x *= 1.0001f, v[u].y *= 1.0001f, v[u].z *= 1.0001f, v[u].w *= 1.0001f;
      x[i + u * stride] = v[u];
    }
  }
}

inline std::vector<Ceiling> measure_copies(double budget_ms) {
  using powerattn_test::Block;
  const size_t bytes = size_t(2) << 30;
  const Block a = powerattn_test::random_block(bytes / 4, POWERATTN_FLOAT32, 0, 1, 3), b(bytes);
  std::vector<Ceiling> rows;
  const auto add = [&](const char *what, const std::string &config, const char *implementation,
                       const std::function<void(cudaStream_t)> &work) {
    rows.push_back({what, config, implementation, median_time(work, budget_ms), 0, 2.0 * double(bytes)});
  };
  add("copy", "2 GiB device to device", "cudaMemcpy",
      [&](cudaStream_t s) { cudaMemcpyAsync(b.get(), a.get(), bytes, cudaMemcpyDeviceToDevice, s); });
  for (int blocks : {132 * 8, 132 * 32, 132 * 128})
    add("in place", "2 GiB " + std::to_string(blocks) + " blocks", "kernel", [&](cudaStream_t s) {
      scale_in_place<<<blocks, 256, 0, s>>>(static_cast<float4 *>(b.get()), bytes / 16);
    });
  return rows;
}

}  // namespace powerattn_bench
