// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them.
#pragma once

#include <cstddef>

namespace emulation {

// Saves the running context's stack pointer in *save and continues at `to`.
void switch_stack(void **save, void *to);
// A context that will call entry(), which must not return, on stack `n` of a pool that grows as needed; each
// has a guard page below it.
void *new_context(size_t n, void (*entry)());

}  // namespace emulation
