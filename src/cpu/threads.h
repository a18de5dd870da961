// SPDX-License-Identifier: Apache-2.0
// The process's worker threads. They are started when a plan is made and live until the process ends.
#pragma once

#include <cstdint>

#include "kernels/cpu/parallel.h"

namespace powerattn {

// Makes sure that `threads - 1` workers exist (the caller is the first). Fewer, without an error, where the
// system refuses a thread: the results do not depend on it. Called while a plan is made.
void start_threads(int threads);

// Runs body for every index with at most `threads` threads, the caller being worker 0. Never allocates and
// never throws. When another caller is using the workers, or after a fork, the caller does all the work itself.
void parallel_for(int threads, int64_t count, ParallelFor::Body body, const void *context);

// What a thread does between two looks at something that another will change.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline ParallelFor parallel(int threads) { return {threads, &parallel_for}; }

}  // namespace powerattn
