// SPDX-License-Identifier: Apache-2.0
// Times the library on one CUDA device beside the device's own ceilings, measured in the same run:
//   bench_gpu [--csv FILE] [--only TEXT] [--quick]
// Medians of graph replays, so that launch gaps of the host do not count; random data (zeros run faster).
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../tests/gpu/device_problem.h"

using namespace powerattn_test;

namespace {

FILE *csv = nullptr;
std::string only;
bool quick = false;
double matmul_rate = 0, copy_rate = 0, in_place_rate = 0;

// Median milliseconds of a captured piece of work, repeated until about 60 ms have been measured.
double median_ms(const std::function<void(cudaStream_t)> &work) {
  cudaStream_t stream;
  device_must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  device_must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  work(stream);
  device_must(cudaStreamEndCapture(stream, &graph), "capture");
  device_must(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  std::vector<float> times;
  float total = 0;
  for (int i = 0; i < 2000 && (i < 7 || total < (quick ? 15 : 60)); ++i) {
    cudaEventRecord(a, stream);
    device_must(cudaGraphLaunch(exec, stream), "replay");
    cudaEventRecord(b, stream);
    device_must(cudaStreamSynchronize(stream), "kernels");
    float ms = 0;
    cudaEventElapsedTime(&ms, a, b);
    if (i >= 2) times.push_back(ms), total += ms;  // two warm-ups
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(a);
  cudaEventDestroy(b);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

void row(const std::string &what, const std::string &config, const std::string &implementation, double ms,
         double flops, double bytes) {
  const double rate = flops / ms * 1e-9, bandwidth = bytes / ms * 1e-6;
  std::printf("%-12s %-44s %-14s %9.4f ms", what.c_str(), config.c_str(), implementation.c_str(), ms);
  if (flops > 0) {
    std::printf(" %7.1f TFLOP/s useful", rate);
    if (matmul_rate > 0) std::printf(" (%4.1f %% of the matmul rate)", 100 * rate / matmul_rate);
  }
  if (bytes > 0) {
    std::printf(" %7.0f GB/s", bandwidth);
    if (in_place_rate > 0) std::printf(" (%4.1f %% of the in-place rate)", 100 * bandwidth / in_place_rate);
  }
  std::printf("\n");
  std::fflush(stdout);
  if (csv) {
    std::fprintf(csv, "%s,%s,%s,%.6f,%.3f,%.3f\n", what.c_str(), config.c_str(), implementation.c_str(), ms,
                 rate, bandwidth);
    std::fflush(csv);
  }
}

// cuBLAS, when one can be loaded: 8192^3 bfloat16, float32 sums.
void measure_matmul() {
  using Create = int (*)(void **);
  using SetStream = int (*)(void *, cudaStream_t);
  using Gemm = int (*)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int,
                       int, const void *, void *, int, int, int, int);
  void *library = nullptr;
  for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
    if (!library) library = dlopen(name, RTLD_NOW);
  if (!library) {
    std::printf("matmul       no cuBLAS on the library path: no matmul rate\n");
    return;
  }
  const auto create = reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"));
  const auto set_stream = reinterpret_cast<SetStream>(dlsym(library, "cublasSetStream_v2"));
  const auto set_workspace =
      reinterpret_cast<int (*)(void *, void *, size_t)>(dlsym(library, "cublasSetWorkspace_v2"));
  const auto gemm = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
  void *handle = nullptr;
  if (!create || !set_stream || !set_workspace || !gemm || create(&handle) != 0) return;
  const int n = 8192;
  const Block a = random_block(size_t(n) * n, POWERATTN_BFLOAT16, 0, 1, 1),
              b = random_block(size_t(n) * n, POWERATTN_BFLOAT16, 0, 1, 2), c(size_t(n) * n * 2),
              workspace(64 << 20);
  const float one = 1, zero = 0;
  const double ms = median_ms([&](cudaStream_t stream) {
    set_stream(handle, stream);
    set_workspace(handle, workspace.get(), workspace.bytes());
    gemm(handle, 1, 0, n, n, n, &one, a.get(), 14 /* bfloat16 */, n, b.get(), 14, n, &zero, c.get(), 14, n,
         68 /* float32 sums */, 99);
  });
  row("matmul", "8192^3 bf16", "cuBLAS", ms, 2.0 * n * n * n, 0);
  matmul_rate = 2.0 * n * n * n / ms * 1e-9;
}

// x <- 1.0001 x, 16 bytes per access: what a state step cannot beat.
__global__ void __launch_bounds__(256) scale_in_place(float4 *x, size_t count) {
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

void measure_copies() {
  const size_t bytes = size_t(2) << 30;
  const Block a = random_block(bytes / 4, POWERATTN_FLOAT32, 0, 1, 3), b(bytes);
  double ms = median_ms(
      [&](cudaStream_t stream) { cudaMemcpyAsync(b.get(), a.get(), bytes, cudaMemcpyDeviceToDevice, stream); });
  copy_rate = 2.0 * double(bytes) / ms * 1e-6;
  row("copy", "2 GiB device to device", "cudaMemcpy", ms, 0, 2.0 * double(bytes));
  for (int blocks : {132 * 8, 132 * 32, 132 * 128}) {
    ms = median_ms([&](cudaStream_t stream) {
      scale_in_place<<<blocks, 256, 0, stream>>>(static_cast<float4 *>(b.get()), bytes / 16);
    });
    row("in place", "2 GiB " + std::to_string(blocks) + " blocks", "kernel", ms, 0, 2.0 * double(bytes));
    in_place_rate = std::max(in_place_rate, 2.0 * double(bytes) / ms * 1e-6);
  }
}

std::string forward_name(const powerattn_plan *plan, const char *operation) {
  char text[16384];
  if (powerattn_plan_describe(plan, text, sizeof text, nullptr) != POWERATTN_OK) return "?";
  const char *at = std::strstr(text, operation);
  const char *runs = std::strstr(text, "runs ");
  if (runs) at = std::strstr(runs, operation);
  if (!at) return "?";
  at += std::strlen(operation) + 1;
  return std::string(at, std::strcspn(at, ",\n"));
}

double rows_of(int64_t d, int p) {
  double rows = 1;
  for (int i = 1; i <= p; ++i) rows = rows * double(d + p - i) / double(i);
  return rows;
}

struct Config {
  int32_t dtype;
  int64_t b, t, hq, hkv, d;
  int p;
  bool gated;
  int32_t form;
  bool backward;
};

// Useful operations of the cheaper form, exact D: the same count whatever form runs.
double useful(const Config &c, bool backward, int64_t chunk) {
  const double tokens = double(c.b) * double(c.t) * double(c.hq), d = double(c.d), e = d;
  const double columns = e + (c.p % 2 ? 0 : 1), state = 4 * rows_of(c.d, c.p) * columns;
  const double span = chunk > 0 ? double(std::min(chunk, c.t)) : double(c.t);
  const double pairs = (span + 1) / 2;
  double flops = tokens * pairs * 2 * (d + e) + (chunk > 0 ? tokens * state : 0);
  if (backward) flops += tokens * pairs * 2 * (3 * d + 2 * e) + (chunk > 0 ? tokens * 2 * state : 0);
  return flops;
}

void run(const Config &c) {
  char name[128];
  std::snprintf(name, sizeof name, "%s p%d d%lld b%lld t%lld h%lld%s%s%s",
                c.dtype == POWERATTN_BFLOAT16  ? "bf16"
                : c.dtype == POWERATTN_FLOAT16 ? "f16"
                                               : "f32",
                c.p, (long long)c.d, (long long)c.b, (long long)c.t, (long long)c.hq,
                c.hkv == c.hq ? "" : ("/" + std::to_string(c.hkv)).c_str(), c.gated ? " gated" : "",
                c.form == POWERATTN_FORM_ATTENTION ? " attention"
                : c.form == POWERATTN_FORM_CHUNKED ? " chunked"
                                                   : "");
  if (!only.empty() && std::string(name).find(only) == std::string::npos) return;
  try {
    powerattn_desc x = DeviceProblem::description(c.dtype, c.b, c.t, c.hq, c.hkv, c.d, c.d, c.p);
    x.form = c.form;
    DeviceProblem p;
    p.make(x, c.gated, DeviceProblem::kForward | (c.backward ? DeviceProblem::kBackward : 0));
    const int64_t chunk = p.info.form == POWERATTN_FORM_CHUNKED ? p.info.chunk_size : 0;
    const double forward = median_ms([&](cudaStream_t s) {
      const auto a = p.forward_args(s);
      api_must(powerattn_forward(p.plan, &a), "forward");
    });
    row("forward", name, forward_name(p.plan, "forward"), forward, useful(c, false, chunk), 0);
    if (c.backward && p.info.workspace_backward > 0) {
      const double both = median_ms([&](cudaStream_t s) {
        const auto a = p.forward_args(s, true);
        const auto g = p.backward_args(s, true);
        api_must(powerattn_forward(p.plan, &a), "forward");
        api_must(powerattn_backward(p.plan, &g), "backward");
      });
      row("fwd+bwd", name, forward_name(p.plan, "backward"), both, useful(c, true, chunk), 0);
    }
  } catch (const std::exception &error) {
    std::printf("forward      %-44s failed: %s\n", name, error.what());
  }
}

// Bytes that a step must move: every state once in, once out.
void run_step(int32_t state_dtype, int64_t units, int64_t d, int64_t tokens, int64_t group) {
  char name[128];
  std::snprintf(name, sizeof name, "%s state d%lld b*h%lld tokens%lld group%lld",
                state_dtype == POWERATTN_BFLOAT16 ? "bf16" : "f32", (long long)d, (long long)units,
                (long long)tokens, (long long)group);
  if (!only.empty() && std::string(name).find(only) == std::string::npos) return;
  try {
    const int64_t heads = std::min<int64_t>(units, 8);
    powerattn_desc x =
        DeviceProblem::description(POWERATTN_BFLOAT16, units / heads, tokens, heads * group, heads, d, d, 2);
    x.flags |= POWERATTN_USE_STATE;
    x.state_dtype = state_dtype;
    // Pools that together pass the cache several times, so that no replay finds its states there.
    const double one =
        double(units) * rows_of(d, 2) * double(d + 1) * (state_dtype == POWERATTN_BFLOAT16 ? 2 : 4);
    const int sets = int(std::clamp(400e6 / one, 1.0, 64.0));
    std::vector<DeviceProblem> p(static_cast<size_t>(sets));
    for (auto &one_set : p) one_set.make(x, true, DeviceProblem::kStep);
    const double ms = median_ms([&](cudaStream_t s) {
                        for (auto &one_set : p) {
                          const auto a = one_set.step_args(s);
                          api_must(powerattn_step(one_set.plan, &a), "step");
                        }
                      }) /
                      sets;
    row("step", name, forward_name(p[0].plan, "step"), ms, 0, 2 * one);
  } catch (const std::exception &error) {
    std::printf("step         %-44s failed: %s\n", name, error.what());
  }
}

}  // namespace

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--csv") && i + 1 < argc) csv = std::fopen(argv[++i], "w");
    if (!std::strcmp(argv[i], "--only") && i + 1 < argc) only = argv[++i];
    if (!std::strcmp(argv[i], "--quick")) quick = true;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("SKIPPED: no CUDA device\n");
    return 77;
  }
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  std::printf("# %s, %d multiprocessors, libpowerattn %u\n", device.name, device.multiProcessorCount,
              powerattn_version());
  if (csv) std::fprintf(csv, "what,config,implementation,ms,tflops,gbps\n");
  try {
    measure_copies();
    in_place_rate = std::max(in_place_rate, copy_rate);
    measure_matmul();
  } catch (const std::exception &error) {
    std::printf("ceilings failed: %s\n", error.what());
  }
  const int32_t bf16 = POWERATTN_BFLOAT16, automatic = POWERATTN_FORM_AUTO;
  run({bf16, 1, 65536, 8, 8, 64, 2, true, automatic, true});
  run({bf16, 1, 65536, 8, 8, 128, 2, true, automatic, true});
  run({bf16, 16, 4096, 8, 8, 64, 2, true, automatic, true});
  run({bf16, 64, 1024, 8, 8, 64, 2, true, automatic, true});
  run({bf16, 1, 65536, 8, 8, 64, 1, true, automatic, true});
  run({POWERATTN_FLOAT16, 1, 65536, 8, 8, 64, 2, true, automatic, true});
  run({POWERATTN_FLOAT32, 1, 65536, 8, 8, 64, 2, true, automatic, true});
  run({bf16, 1, 65536, 8, 2, 64, 2, true, automatic, true});
  run({bf16, 16, 4096, 8, 8, 64, 4, true, POWERATTN_FORM_ATTENTION, true});
  for (int64_t d : {64, 128}) {
    for (int64_t t : {1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144}) {
      if (quick && t > 16384) continue;
      for (int32_t form : {POWERATTN_FORM_ATTENTION, POWERATTN_FORM_CHUNKED}) {
        if (form == POWERATTN_FORM_ATTENTION && t > 32768) continue;
        run({bf16, std::max<int64_t>(1, 65536 / t), t, 8, 8, d, 2, true, form, true});
      }
    }
  }
  for (int32_t state : {POWERATTN_FLOAT32, POWERATTN_BFLOAT16})
    for (int64_t units : {8, 64, 192, 256, 512}) run_step(state, units, 64, 1, 1);
  run_step(POWERATTN_FLOAT32, 256, 128, 1, 1);
  run_step(POWERATTN_FLOAT32, 256, 64, 4, 1);
  run_step(POWERATTN_FLOAT32, 256, 64, 16, 1);
  run_step(POWERATTN_FLOAT32, 64, 64, 1, 8);
  if (csv) std::fclose(csv);
  return 0;
}
