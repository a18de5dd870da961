// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>

#include <memory>
#endif

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;

char *stack(size_t n) {  // its lowest byte
  static std::vector<char *> pool;
  while (pool.size() <= n) {
    void *p = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) {
      std::perror("emulation: no stack for a thread");
      std::abort();
    }
    pool.push_back(static_cast<char *>(p) + kGuard);
  }
  return pool[n];
}

}  // namespace

#if defined(__x86_64__)

extern "C" void emulation_switch_stack(void **save, void *to);
asm(R"(
.text
.globl emulation_switch_stack
.hidden emulation_switch_stack
.type emulation_switch_stack, @function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack, .-emulation_switch_stack
)");

void switch_stack(void **save, void *to) { emulation_switch_stack(save, to); }

void *new_context(size_t n, void (*entry)()) {
  // From the top: a null return address (16-byte alignment at entry), the entry, six registers.
  auto **top = reinterpret_cast<void **>(stack(n) + kStack);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void *>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  return top - 8;
}

#else

void switch_stack(void **save, void *to) {
  ucontext_t here;
  *save = &here;
  if (swapcontext(&here, static_cast<ucontext_t *>(to)) != 0) std::abort();
}

void *new_context(size_t n, void (*entry)()) {
  static std::vector<std::unique_ptr<ucontext_t> > pool;
  while (pool.size() <= n) pool.push_back(std::make_unique<ucontext_t>());
  ucontext_t *c = pool[n].get();
  if (getcontext(c) != 0) std::abort();
  c->uc_stack.ss_sp = stack(n);
  c->uc_stack.ss_size = kStack;
  c->uc_link = nullptr;
  makecontext(c, entry, 0);
  return c;
}

#endif

}  // namespace emulation
