// SPDX-License-Identifier: Apache-2.0
// How a kernel is given threads: it names its work items, the caller decides who runs them. Nothing allocates.
#pragma once

#include <cstdint>

namespace powerattn {

struct ParallelFor {
  // Calls body(context, i) once for each 0 <= i < count, in any order, and returns when all are done.
  void (*run)(void *pool, int64_t count, void (*body)(const void *context, int64_t index), const void *context);
  void *pool;

  template <typename F>
  void operator()(int64_t count, const F &f) const {
    if (count <= 0) return;
    run(pool, count, [](const void *context, int64_t i) { (*static_cast<const F *>(context))(i); }, &f);
  }
};

}  // namespace powerattn
