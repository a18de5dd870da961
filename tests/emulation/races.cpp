// SPDX-License-Identifier: Apache-2.0
// Races on shared memory by happens-before: every thread has a vector clock; __syncwarp, named barriers,
// mbarriers and the completion of bulk copies carry clocks from thread to thread; every 2 bytes of shared
// memory remember their last write and the reads since. Two accesses that no chain of these orders are a race,
// whatever order they happened to run in. Seen are the accesses through kernels/cuda/ptx; plain C++ loads and
// stores of shared memory are not.
#include <algorithm>

#include "machine.h"

namespace emulation {
namespace {

using Clock = std::vector<uint32_t>;

void join(Clock &to, const Clock &from) {
  if (to.size() < from.size()) to.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}
bool before(const Thread &t, uint32_t thread,
            uint32_t clock) {  // is that event ordered before what t does now?
  return t.clock[thread] >= clock;
}
[[noreturn]] void report(const char *what, const Thread &t, uint32_t address, const char *other,
                         uint32_t thread) {
  fail("race: %s of thread %d at shared address 0x%x is not ordered after the %s of thread %u", what, t.index,
       address, other, thread);
}

void check_write(const Thread &t, const Word &w, uint32_t address, const char *what) {
  if (w.writer != 0 && !before(t, w.writer - 1, w.write_clock)) report(what, t, address, "write", w.writer - 1);
}

}  // namespace

void begin_races(Block &block) {
  if (!machine.races) return;
  block.words.assign((block.shared_bytes + 1) / 2, {});
  block.readers.clear();
  for (Thread *t : block.threads) {
    t->clock.assign(block.threads.size(), 0);
    t->clock[size_t(t->index)] = 1;
  }
}

// Does the access that t begins here follow every write (and, of a write, every read)?
void check_race(Block &block, const Thread &t, uint32_t address, uint32_t bytes, bool write, const char *what) {
  if (!machine.races) return;
  for (uint32_t a = (address - kSharedBase) / 2; a <= (address - kSharedBase + bytes - 1) / 2; ++a) {
    const Word &w = block.words[a];
    check_write(t, w, kSharedBase + 2 * a, what);
    if (!write) continue;
    if (w.reader != 0 && !before(t, w.reader - 1, w.read_clock))
      report(what, t, kSharedBase + 2 * a, "read", w.reader - 1);
    if (w.readers < 0) continue;
    const Clock &all = block.readers[size_t(w.readers)];
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] != 0 && !before(t, uint32_t(i), all[i]))
        report(what, t, kSharedBase + 2 * a, "read", uint32_t(i));
    }
  }
}

// The access is complete, at thread `index`'s time `now`.
void note_access(Block &block, uint32_t index, uint32_t now, uint32_t address, uint32_t bytes, bool write) {
  if (!machine.races) return;
  const Thread &t = *block.threads[index];
  for (uint32_t a = (address - kSharedBase) / 2; a <= (address - kSharedBase + bytes - 1) / 2; ++a) {
    Word &w = block.words[a];
    if (write) {
      w.writer = index + 1;
      w.write_clock = now;
      w.reader = 0;
      w.readers = -1;
    } else if (w.readers >= 0) {
      block.readers[size_t(w.readers)][index] = now;
    } else if (w.reader == 0 || before(t, w.reader - 1, w.read_clock)) {
      w.reader = index + 1;
      w.read_clock = now;
    } else {  // readers that do not know of each other
      w.readers = int(block.readers.size());
      block.readers.emplace_back(block.threads.size(), 0);
      block.readers.back()[w.reader - 1] = w.read_clock;
      block.readers.back()[index] = now;
      w.reader = 0;
    }
  }
}
void access(Block &block, const Thread &t, uint32_t address, uint32_t bytes, bool write, const char *what) {
  if (!machine.races) return;
  check_race(block, t, address, bytes, write, what);
  note_access(block, uint32_t(t.index), t.clock[size_t(t.index)], address, bytes, write);
}

uint32_t now(const Thread &t) { return machine.races ? t.clock[size_t(t.index)] : 0; }

// All of them meet: each knows afterwards what any knew before.
void synchronise(const std::vector<Thread *> &threads) {
  if (!machine.races) return;
  Clock all;
  for (const Thread *t : threads) join(all, t->clock);
  for (Thread *t : threads) {
    t->clock = all;
    ++t->clock[size_t(t->index)];
  }
}

// mbarriers: an arrival leaves the thread's clock there, a completed phase keeps what was left until then.
void leave_clock(Mbarrier &b, Thread &t) {
  if (!machine.races) return;
  join(b.clock, t.clock);
  ++t.clock[size_t(t.index)];
}
void leave_clock(Mbarrier &b, const std::vector<uint32_t> &clock) {
  if (machine.races) join(b.clock, clock);
}
void take_clock(const Mbarrier &b, Thread &t) {
  if (machine.races) join(t.clock, b.complete_clock);
}

}  // namespace emulation
