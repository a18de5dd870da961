// SPDX-License-Identifier: Apache-2.0
// Shared memory, the copies that complete later, and the barriers in shared memory that say when.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulation {

// ---- Shared memory ----------------------------------------------------------------------------------------

unsigned char *dynamic_shared() { return self->owner->shared; }

uint32_t shared_address(const void *p) {
  const auto offset = static_cast<const unsigned char *>(p) - self->owner->shared;
  if (offset < 0 || size_t(offset) > self->owner->shared_bytes)
    fail("%p is not in the block's dynamic shared memory", p);
  return kSharedBase + uint32_t(offset);
}

unsigned char *shared_pointer(const Block &block, uint32_t address, uint32_t bytes, const char *what) {
  if (address < kSharedBase || uint64_t(address) - kSharedBase + bytes > block.shared_bytes)
    fail("%s: %u bytes at shared address 0x%x, the block has 0x%x to 0x%zx", what, bytes, address, kSharedBase,
         kSharedBase + block.shared_bytes);
  return block.shared + (address - kSharedBase);
}

void note_write(Block &block, const Thread &thread, uint32_t address, uint32_t bytes) {
  ++machine.clock;
  for (uint32_t a = (address - kSharedBase) / 16; a <= (address - kSharedBase + bytes - 1) / 16; ++a)
    block.writes[a] = {uint32_t(thread.index) + 1, machine.clock};
}

// What ordinary instructions wrote is visible to wgmma and bulk copies only behind a fence.proxy.async of the
// writer, or of the reader.
void check_proxy(const Block &block, const Thread &reader, uint32_t address, uint32_t bytes, const char *what) {
  for (uint32_t a = (address - kSharedBase) / 16; a <= (address - kSharedBase + bytes - 1) / 16; ++a) {
    const Block::Write &w = block.writes[a];
    if (w.thread == 0 || reader.fenced > w.clock || block.threads[w.thread - 1]->fenced > w.clock) continue;
    fail("%s reads shared address 0x%x, which thread %u wrote without fence.proxy.async behind it", what,
         kSharedBase + 16 * a, w.thread - 1);
  }
}

void wait_for_kernel_before() { self->waited = true; }
bool has_waited() { return self->waited; }

void proxy_fence() { self->fenced = ++machine.clock; }

void shared_store(uint32_t address, const void *from, uint32_t bytes) {
  if (address % bytes) fail("st.shared of %u bytes at 0x%x", bytes, address);
  std::memcpy(shared_pointer(*self->owner, address, bytes, "st.shared"), from, bytes);
  access(*self->owner, *self, address, bytes, true, "st.shared");
  note_write(*self->owner, *self, address, bytes);
}
void shared_load(void *to, uint32_t address, uint32_t bytes) {
  if (address % bytes) fail("ld.shared of %u bytes at 0x%x", bytes, address);
  std::memcpy(to, shared_pointer(*self->owner, address, bytes, "ld.shared"), bytes);
  access(*self->owner, *self, address, bytes, false, "ld.shared");
}

// ---- cp.async ---------------------------------------------------------------------------------------------

namespace {

void perform(Thread &t, const Copy &c) {
  if (c.bytes == 0) {
    leave_clock(t.owner->mbarriers[c.barrier], t);
    return arrive(*t.owner, c.barrier, 1, 0, 0);
  }
  unsigned char *to = shared_pointer(*t.owner, c.dst, c.bytes, "cp.async");
  if (c.src != nullptr)
    std::memcpy(to, c.src, c.bytes);
  else
    std::memset(to, 0, c.bytes);
  note_access(*t.owner, uint32_t(t.index), now(t), c.dst, c.bytes, true);
  note_write(*t.owner, t, c.dst, c.bytes);
}
void begin(const Copy &c) {
  self->copies.back().push_back(c);
  ++machine.under_way;
}
void perform(Thread &t, std::vector<Copy> &group) {
  std::vector<Copy> copies;
  copies.swap(group);
  machine.under_way -= int64_t(copies.size());
  for (const Copy &c : copies) perform(t, c);
}

}  // namespace

void copy16(uint32_t dst, const void *src, bool valid) {
  if (dst % 16) fail("cp.async of 16 bytes to shared address 0x%x", dst);
  if (reinterpret_cast<uintptr_t>(src) % 16) fail("cp.async of 16 bytes from %p", src);
  if (valid && !is_global(src, 16)) fail("cp.async reads %p, which no allocation holds", src);
  shared_pointer(*self->owner, dst, 16, "cp.async");
  check_race(*self->owner, *self, dst, 16, true, "cp.async");
  const Copy c{dst, 16, 0, valid ? src : nullptr, {}};
  if (machine.timing == Timing::kEarly)
    perform(*self, c);
  else
    begin(c);
}
void copy_commit() { self->copies.emplace_back(); }
void copy_wait(int pending) {
  auto &groups = self->copies;
  const size_t open = 1,
               done = groups.size() - open > size_t(pending) ? groups.size() - open - size_t(pending) : 0;
  for (size_t i = 0; i < done; ++i) perform(*self, groups[i]);
  groups.erase(groups.begin(), groups.begin() + long(done));
}
void barrier_arrive_copies(uint32_t barrier) {
  // Behind the copies that are under way. The count is the barrier's own: no increment.
  const Copy c{0, 0, barrier, nullptr, {}};
  bool pending = false;
  for (const auto &group : self->copies) pending = pending || !group.empty();
  if (pending)
    begin(c);
  else
    perform(*self, c);
}

// ---- Bulk copies ------------------------------------------------------------------------------------------

namespace {

void perform(Block &block, size_t n) {
  const Block::Load load = std::move(block.loads[n]);
  block.loads.erase(block.loads.begin() + long(n));
  --machine.under_way;
  const Copy &c = load.copy;
  unsigned char *to = shared_pointer(block, c.dst, c.bytes, "cp.async.bulk");
  if (c.src != nullptr) std::memcpy(to, c.src, c.bytes);
  for (const Piece &piece : load.pieces) {
    std::memset(to, 0, 16);
    if (piece.bytes > 0) std::memcpy(to, piece.src, piece.bytes);
    to += 16;
  }
  for (uint32_t a = (c.dst - kSharedBase) / 16; a < (c.dst - kSharedBase + c.bytes) / 16; ++a)
    block.writes[a] = {};
  const auto thread = size_t(load.thread->index);
  note_access(block, uint32_t(thread), machine.races ? c.clock[thread] : 0, c.dst, c.bytes, true);
  leave_clock(block.mbarriers[c.barrier], c.clock);
  arrive(block, c.barrier, 0, 0, c.bytes);
}

void perform(Thread &t, const BulkStore &s) {
  check_proxy(*t.owner, t, s.src, s.bytes, "cp.async.bulk");
  note_access(*t.owner, uint32_t(t.index), now(t), s.src, s.bytes, false);
  const unsigned char *from = shared_pointer(*t.owner, s.src, s.bytes, "cp.async.bulk");
  for (const Piece &piece : s.pieces) {
    if (piece.bytes > 0) std::memcpy(const_cast<void *>(piece.src), from, piece.bytes);
    from += 16;
  }
  if (s.dst == nullptr) return;
  if (!s.add) {
    std::memcpy(s.dst, from, s.bytes);
    return;
  }
  auto *to = static_cast<float *>(s.dst);
  for (uint32_t i = 0; i < s.bytes / 4; ++i) {
    float x;
    std::memcpy(&x, from + 4 * i, 4);
    to[i] += x;
  }
}

}  // namespace

void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t barrier) {
  if (bytes == 0 || bytes % 16 || dst % 16 || reinterpret_cast<uintptr_t>(src) % 16)
    fail("cp.async.bulk of %u bytes from %p to 0x%x: multiples of 16", bytes, src, dst);
  if (!is_global(src, bytes)) fail("cp.async.bulk reads %u bytes at %p, which no allocation holds", bytes, src);
  begin_load({self, {dst, bytes, barrier, src, {}}, {}}, "cp.async.bulk");
}
void begin_load(Block::Load load, const char *what) {
  Block &block = *self->owner;
  shared_pointer(block, load.copy.dst, load.copy.bytes, what);
  check_race(block, *self, load.copy.dst, load.copy.bytes, true, what);
  load.copy.clock = self->clock;
  block.loads.push_back(std::move(load));
  if (machine.races) ++self->clock[size_t(self->index)];
  ++machine.under_way;
  if (machine.timing == Timing::kEarly) perform(block, block.loads.size() - 1);
}

void begin_store(BulkStore store, const char *what) {
  shared_pointer(*self->owner, store.src, store.bytes, what);
  check_race(*self->owner, *self, store.src, store.bytes, false, what);
  self->stores.push_back(std::move(store));
  if (machine.timing == Timing::kEarly) bulk_store_wait(0);
}
namespace {
void begin_bytes(void *dst, uint32_t src, uint32_t bytes, bool add) {
  if (bytes == 0 || bytes % 16 || src % 16 || reinterpret_cast<uintptr_t>(dst) % 16)
    fail("cp.async.bulk of %u bytes from 0x%x to %p: multiples of 16", bytes, src, dst);
  if (!is_global(dst, bytes))
    fail("cp.async.bulk writes %u bytes at %p, which no allocation holds", bytes, dst);
  begin_store({dst, src, bytes, add, {}}, "cp.async.bulk");
}
}  // namespace
void bulk_store(void *dst, uint32_t src, uint32_t bytes) { begin_bytes(dst, src, bytes, false); }
void bulk_add(float *dst, uint32_t src, uint32_t bytes) { begin_bytes(dst, src, bytes, true); }
void bulk_store_wait(int pending) {
  auto &stores = self->stores;
  while (stores.size() > size_t(pending)) {
    perform(*self, stores.front());
    stores.erase(stores.begin());
  }
}

bool complete_one() {
  if (machine.under_way == 0) return false;
  const size_t blocks = machine.blocks.size(), first = machine.random() % blocks;
  for (size_t n = 0; n < blocks; ++n) {
    Block &block = *machine.blocks[(first + n) % blocks];
    if (!block.loads.empty()) {
      const size_t which = machine.order == Order::kForward ? 0 : machine.random() % block.loads.size();
      perform(block, which);
      return true;
    }
    const size_t threads = block.threads.size(), start = machine.random() % threads;
    for (size_t i = 0; i < threads; ++i) {
      Thread &t = *block.threads[(start + i) % threads];
      if (t.exited) continue;
      for (auto &group : t.copies) {
        if (group.empty()) continue;
        perform(t, group);
        return true;
      }
    }
  }
  return false;
}

// ---- mbarrier ---------------------------------------------------------------------------------------------

namespace {

Mbarrier &barrier_at(Block &block, uint32_t address) {
  const auto b = block.mbarriers.find(address);
  if (b == block.mbarriers.end()) fail("no mbarrier was initialised at 0x%x", address);
  return b->second;
}

}  // namespace

void barrier_init(uint32_t address, int arrivals) {
  if (address % 8 || arrivals < 1) fail("mbarrier.init(0x%x, %d)", address, arrivals);
  shared_pointer(*self->owner, address, 8, "mbarrier.init");
  const bool fresh =
      self->owner->mbarriers.emplace(address, Mbarrier{arrivals, arrivals, 0, 0, {}, {}, {}, {}}).second;
  if (!fresh) fail("mbarrier 0x%x is initialised twice", address);
}

void arrive(Block &block, uint32_t address, int count, int64_t bytes_expected, int64_t bytes_done) {
  Mbarrier &b = barrier_at(block, address);
  if (b.pending < count)
    fail("mbarrier 0x%x: %d arrivals in phase %u, which misses %d of %d", address, count, b.phase, b.pending,
         b.expected);
  b.bytes += bytes_expected - bytes_done;
  b.pending -= count;
  if (b.pending > 0 || b.bytes != 0) return;
  // Threads that were let go by the last phase and have not looked yet would now find the parity they wait for
  // gone.
  if (!b.released.empty())
    fail("mbarrier 0x%x: phase %u completes before thread %d has seen that phase %u did", address, b.phase,
         b.released.front()->index, b.phase - 1);
  b.complete_clock = b.clock;
  ++b.phase;
  b.pending = b.expected;
  b.released.swap(b.waiting);
  for (Thread *t : b.released) wake(t);
}

void barrier_arrive(uint32_t address, int count, uint32_t expected_bytes) {
  leave_clock(barrier_at(*self->owner, address), *self);
  arrive(*self->owner, address, count, expected_bytes, 0);
}

void store_remote(uint32_t to, int rank, float x, uint32_t barrier) {
  if (to % 4) fail("st.async to shared address 0x%x", to);
  void *const place = cluster_map(shared_pointer(*self->owner, to, 4, "st.async"), rank);
  std::memcpy(place, &x, 4);
  Block &block = *machine.blocks[size_t(rank)];
  leave_clock(barrier_at(block, barrier), *self);
  arrive(block, barrier, 0, 0, 4);
}

void barrier_expect(uint32_t address, uint32_t bytes) { arrive(*self->owner, address, 0, bytes, 0); }

void barrier_wait(uint32_t address, uint32_t parity) {
  Mbarrier &b = barrier_at(*self->owner, address);
  if (parity > 1) fail("mbarrier.try_wait.parity with parity %u", parity);
  if ((b.phase & 1) == parity) {
    b.waiting.push_back(self);
    sleep({"mbarrier.try_wait.parity", address, parity});
    b.released.erase(std::find(b.released.begin(), b.released.end(), self));
  }
  take_clock(b, *self);
}

// ---- Ends -------------------------------------------------------------------------------------------------

void check_exit(Thread &t) {
  for (const auto &group : t.copies) {
    if (!group.empty()) fail("the thread returns with cp.async under way");
  }
  if (!t.stores.empty()) fail("the thread returns while a bulk store still reads shared memory");
}

void check_exit(Block &block) {
  if (!block.loads.empty()) fail("the block returns with bulk loads under way");
  int registers = 0;
  const int threads = int(block.threads.size());
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp &warp = block.warps[w], &first = block.warps[w / 4 * 4];
    registers += warp.registers * kLanes;
    for (const auto &group : warp.products) {
      if (!group.empty()) fail("warp %zu returns with wgmma under way", w);
    }
    if (warp.issued != first.issued)
      fail("warps %zu and %zu of one warpgroup issued %lld and %lld wgmma", w / 4 * 4, w,
           static_cast<long long>(first.issued), static_cast<long long>(warp.issued));
    if ((warp.registers == 0) != (block.warps[0].registers == 0)) fail("setmaxnreg in some warps only");
  }
  // The block is launched with at most 65536 / threads registers a thread, in steps of 8; setmaxnreg shares
  // them out.
  const int pool = 65536 / threads / 8 * 8 * threads;
  if (registers > pool) fail("setmaxnreg shares out %d registers, the block has %d", registers, pool);
}

}  // namespace emulation
