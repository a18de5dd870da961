// SPDX-License-Identifier: Apache-2.0
// Where a thread is in the source: for reports of violated rules, deadlocks and crashes.
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace emulation {
namespace {

// What addr2line knows of a code address, inlined functions included.
std::string source_of(void *pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "";
  char command[1024];
  const auto offset = static_cast<char *>(pc) - static_cast<char *>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof(command), "addr2line -Cpsfie '%s' %#tx 2>/dev/null", info.dli_fname, offset);
  std::string text;
  if (FILE *pipe = popen(command, "r")) {
    char line[2048];
    while (std::fgets(line, sizeof(line), pipe)) {  // not the launch machinery around the kernel
      if (std::strstr(line, "cudaLaunchKernelEx") != nullptr || std::strstr(line, "std::_Function") != nullptr)
        continue;
      text += "    " + std::string(line, std::min<size_t>(std::strcspn(line, "\n"), 220)) + "\n";
    }
    pclose(pipe);
  }
  return text;
}

void crashed(int signal, siginfo_t *info, void *) {
  std::fprintf(stderr, "emulation: signal %d at address %p", signal, info->si_addr);
  if (self != nullptr)
    std::fprintf(stderr, "; block %u,%u,%u thread %d\n%s", self->owner->block.x, self->owner->block.y,
                 self->owner->block.z, self->index, where().c_str());
  std::fprintf(stderr, "\n");
  _exit(3);
}

// An access to an inaccessible page ends the process with a report. The handler has its own stack: the thread's
// may be what overflowed.
const bool handler = [] {
  static char stack[256 * 1024];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = crashed;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  return true;
}();

}  // namespace

std::string where() {
  void *frames[16];
  const int count = backtrace(frames, 16);
  std::string text;
  Dl_info mine;
  dladdr(reinterpret_cast<void *>(&where), &mine);
  int told = 0;
  for (int i = 0; i < count && told < 3; ++i) {
    Dl_info info;
    if (dladdr(frames[i], &info) == 0 || info.dli_fbase == mine.dli_fbase) continue;  // the emulator itself
    text += source_of(frames[i]);
    ++told;
  }
  return text;
}

}  // namespace emulation
