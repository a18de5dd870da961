// SPDX-License-Identifier: Apache-2.0
// How a kernel is given threads: it names its work items, the caller decides who runs them. Nothing allocates.
#pragma once

#include <cstdint>

namespace powerattn {

struct ParallelFor {
  using Body = void (*)(const void *context, int64_t index, int worker);

  int workers = 1;
  // Calls body(context, i, worker) once for each 0 <= i < count, in any order, and returns when all are done.
  // worker is in 0 .. workers-1, and one worker runs one item at a time: it selects scratch memory.
  void (*run)(int workers, int64_t count, Body body, const void *context) = nullptr;

  template <typename F>  // f(i)
  void operator()(int64_t count, const F &f) const {
    if (count <= 0) return;
    run(
        workers, count, [](const void *context, int64_t i, int) { (*static_cast<const F *>(context))(i); }, &f);
  }

  template <typename F>  // f(i, worker)
  void with_worker(int64_t count, const F &f) const {
    if (count <= 0) return;
    run(
        workers, count,
        [](const void *context, int64_t i, int worker) { (*static_cast<const F *>(context))(i, worker); }, &f);
  }
};

}  // namespace powerattn
