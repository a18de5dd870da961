// SPDX-License-Identifier: Apache-2.0
// Time on a CUDA device: medians of graph replays, so that launch gaps of the host do not count, and the time
// of each kernel of a graph. Work is captured once and replayed; data are the caller's.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>
#if defined(__CUDACC__)
#include <cuda.h>
#include <cxxabi.h>

#include <cstdlib>
#endif

#include "../../tests/gpu/device_problem.h"
#include "clock.h"

namespace powerattn_bench {

using powerattn_test::device_must;

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A captured piece of work.
class Captured {
 public:
  explicit Captured(const std::function<void(cudaStream_t)> &work) {
    device_must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    device_must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    try {
      work(stream_);
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph_);
      release();
      throw;
    }
    const cudaError_t error = cudaStreamEndCapture(stream_, &graph_);
    if (error != cudaSuccess) release();
    device_must(error, "capture");
  }
  Captured(const Captured &) = delete;
  Captured &operator=(const Captured &) = delete;
  ~Captured() { release(); }
  cudaGraph_t graph() const { return graph_; }
  cudaStream_t stream() const { return stream_; }

 private:
  void release() {
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
};

class Executable {
 public:
  explicit Executable(cudaGraph_t graph) { device_must(cudaGraphInstantiate(&exec_, graph, 0), "instantiate"); }
  Executable(const Executable &) = delete;
  Executable &operator=(const Executable &) = delete;
  ~Executable() { cudaGraphExecDestroy(exec_); }
  void launch(cudaStream_t stream) const { device_must(cudaGraphLaunch(exec_, stream), "replay"); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

class Event {
 public:
  Event() { device_must(cudaEventCreate(&event_), "event"); }
  Event(const Event &) = delete;
  Event &operator=(const Event &) = delete;
  ~Event() { cudaEventDestroy(event_); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

inline double median(std::vector<float> times) {
  std::sort(times.begin(), times.end());
  return times.empty() ? 0 : times[times.size() / 2];
}

// What a device is allowed to draw it is allowed over tens of milliseconds: then it lowers its clock. So either
// every replay runs at the clock that short work gets, after a rest whenever kBurstMs of work were done, or
// (`warm_ms`) all at the clock of a long run, after as much of the same work.
inline double warm_ms = 0;
constexpr double kBurstMs = 20;
constexpr auto kRest = std::chrono::milliseconds(100);

// Replays until `budget_ms` have been measured: at least five times, three where one replay takes a fifth of a
// second, after two warm-ups (one there). `measure` runs the work once, to its end, and notes what it took.
template <class Measure>
void replay(const Executable &exec, cudaStream_t stream, double budget_ms, Measure measure) {
  const auto run = [&] {
    const double before = seconds();
    exec.launch(stream);
    device_must(cudaStreamSynchronize(stream), "kernels");
    return seconds() - before;
  };
  std::this_thread::sleep_for(kRest);
  for (const double start = seconds(); (seconds() - start) * 1e3 < warm_ms;) run();
  const double begin = seconds();
  double warm = run();
  if (warm < 0.2) warm = run();
  const int least = warm < 0.2 ? 5 : 3;
  double spent = 0, since_rest = kBurstMs;
  for (int i = 0; i < 2000; ++i) {
    if (i >= least && (spent > budget_ms || seconds() - begin > 5)) break;
    if (warm_ms == 0 && since_rest >= kBurstMs) {
      std::this_thread::sleep_for(kRest);
      since_rest = 0;
    }
    const double before = seconds();
    measure();
    const double ms = (seconds() - before) * 1e3;
    spent += ms;
    since_rest += ms;
  }
}

struct Time {
  double ms = 0, mhz = 0;  // medians; mhz: 0 where it was not measured
};

// Median milliseconds of a piece of work, and the clock it ran at.
inline Time median_time(const std::function<void(cudaStream_t)> &work, double budget_ms) {
  const Captured captured(work);
  const Executable exec(captured.graph());
  const cudaStream_t stream = captured.stream();
  const Event a, b;
  Clock clock;
  std::vector<float> times, clocks;
  replay(exec, stream, budget_ms, [&] {
    clock.begin(stream);
    device_must(cudaEventRecord(a.get(), stream), "event");
    exec.launch(stream);
    device_must(cudaEventRecord(b.get(), stream), "event");
    clock.end(stream);
    device_must(cudaStreamSynchronize(stream), "kernels");
    float ms = 0;
    device_must(cudaEventElapsedTime(&ms, a.get(), b.get()), "event");
    times.push_back(ms);
    clocks.push_back(float(clock.mhz()));
  });
  return {median(times), median(clocks)};
}

struct NodeTime {
  std::string name;
  double ms;
};

#if defined(__CUDACC__)

// The graph calls whose form CUDA 13 changed. An edge to a kernel that is launched early says so in its data,
// without which it can neither be read nor be removed.
inline cudaError_t dependencies(cudaGraphNode_t node, cudaGraphNode_t *from, cudaGraphEdgeData *edge,
                                size_t *count) {
#if CUDART_VERSION >= 13000
  return cudaGraphNodeGetDependencies(node, from, edge, count);
#else
  return cudaGraphNodeGetDependencies_v2(node, from, edge, count);
#endif
}
inline cudaError_t join(cudaGraph_t graph, cudaGraphNode_t from, cudaGraphNode_t to) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddDependencies(graph, &from, &to, nullptr, 1);
#else
  return cudaGraphAddDependencies(graph, &from, &to, 1);
#endif
}
inline cudaError_t part(cudaGraph_t graph, cudaGraphNode_t from, cudaGraphNode_t to,
                        const cudaGraphEdgeData &edge) {
#if CUDART_VERSION >= 13000
  return cudaGraphRemoveDependencies(graph, &from, &to, &edge, 1);
#else
  return cudaGraphRemoveDependencies_v2(graph, &from, &to, &edge, 1);
#endif
}

// "output64_kernel" out of "void powerattn::output64_kernel<2>(powerattn::Args)".
inline std::string short_name(const char *mangled) {
  int status = 0;
  char *const text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 && text != nullptr ? text : mangled;
  std::free(text);
  for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(at, 23);
  name.resize(std::min(name.find_first_of("(<"), name.size()));
  const size_t colon = name.rfind(':'), space = name.rfind(' ');
  const size_t begin =
      std::max(colon == std::string::npos ? 0 : colon + 1, space == std::string::npos ? 0 : space + 1);
  return name.substr(begin);
}

// The driver tells the name: the runtime that launched the kernel is the library's own.
inline std::string node_name(cudaGraphNode_t node) {
  cudaGraphNodeType type;
  device_must(cudaGraphNodeGetType(node, &type), "graph");
  if (type == cudaGraphNodeTypeMemset) return "memset";
  if (type == cudaGraphNodeTypeMemcpy) return "memcpy";
  if (type != cudaGraphNodeTypeKernel) return "node";
#if CUDART_VERSION >= 12030
  static void *const driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return "kernel";
  const auto get = reinterpret_cast<CUresult (*)(CUgraphNode, CUDA_KERNEL_NODE_PARAMS *)>(
      dlsym(driver, "cuGraphKernelNodeGetParams_v2"));
  const auto function_name =
      reinterpret_cast<CUresult (*)(const char **, CUfunction)>(dlsym(driver, "cuFuncGetName"));
  const auto kernel_name =
      reinterpret_cast<CUresult (*)(const char **, CUkernel)>(dlsym(driver, "cuKernelGetName"));
  CUDA_KERNEL_NODE_PARAMS params = {};
  if (get == nullptr || get(node, &params) != CUDA_SUCCESS) return "kernel";
  const char *name = nullptr;
  if (params.func != nullptr && function_name != nullptr && function_name(&name, params.func) == CUDA_SUCCESS &&
      name)
    return short_name(name);
  if (params.kern != nullptr && kernel_name != nullptr && kernel_name(&name, params.kern) == CUDA_SUCCESS &&
      name)
    return short_name(name);
#endif
  return "kernel";
}

// What each kernel and memset of the work takes in its place: the captured chain with an event between every
// two nodes.
inline std::vector<NodeTime> node_times(const std::function<void(cudaStream_t)> &work, double budget_ms) {
  const Captured captured(work);
  const cudaGraph_t graph = captured.graph();
  size_t count = 0;
  device_must(cudaGraphGetNodes(graph, nullptr, &count), "graph");
  std::vector<cudaGraphNode_t> nodes(count), order;
  device_must(cudaGraphGetNodes(graph, nodes.data(), &count), "graph");
  std::map<cudaGraphNode_t, cudaGraphNode_t> after;
  std::map<cudaGraphNode_t, cudaGraphEdgeData> edges;  // to each node
  for (const cudaGraphNode_t node : nodes) {
    size_t n = 0;
    device_must(dependencies(node, nullptr, nullptr, &n), "graph");
    if (n > 1) throw std::runtime_error("the calls of this plan are no chain");
    cudaGraphNode_t from = nullptr;
    if (n == 1) device_must(dependencies(node, &from, &edges[node], &n), "graph");
    after[from] = node;
  }
  for (auto at = after.find(nullptr); at != after.end() && order.size() < count; at = after.find(order.back()))
    order.push_back(at->second);
  if (order.size() != count) throw std::runtime_error("the calls of this plan are no chain");

  std::vector<Event> events(count + 1);
  cudaGraphNode_t mark = nullptr;
  for (size_t i = 0; i <= count; ++i) {
    const cudaGraphNode_t *const before = i > 0 ? &order[i - 1] : nullptr;
    if (i > 0 && i < count) device_must(part(graph, order[i - 1], order[i], edges[order[i]]), "graph");
    device_must(cudaGraphAddEventRecordNode(&mark, graph, before, i > 0 ? 1 : 0, events[i].get()), "graph");
    if (i < count) device_must(join(graph, mark, order[i]), "graph");
  }
  const Executable exec(graph);
  std::vector<std::vector<float>> times(count);
  replay(exec, captured.stream(), budget_ms, [&] {
    exec.launch(captured.stream());
    device_must(cudaStreamSynchronize(captured.stream()), "kernels");
    for (size_t i = 0; i < count; ++i) {
      float ms = 0;
      device_must(cudaEventElapsedTime(&ms, events[i].get(), events[i + 1].get()), "event");
      times[i].push_back(ms);
    }
  });
  std::vector<NodeTime> result;
  for (size_t i = 0; i < count; ++i) result.push_back({node_name(order[i]), median(times[i])});
  return result;
}

#else
inline std::vector<NodeTime> node_times(const std::function<void(cudaStream_t)> &, double) {
  throw std::runtime_error("the emulated device has no clock");
}
#endif

}  // namespace powerattn_bench
