// SPDX-License-Identifier: Apache-2.0
// Every allocation of the library fails in turn: OUT_OF_MEMORY with a message, nothing leaked, and the next
// call works. Execute calls do not allocate at all. Linked to the library's objects, so that its operator new
// is the one below.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "fixture.h"

namespace {

std::atomic<int64_t> made{0};      // allocations so far
std::atomic<int64_t> living{0};    // allocations not yet freed
std::atomic<int64_t> fail_at{-1};  // this one throws; -1: none

void *allocate(std::size_t bytes, std::size_t alignment) {
  if (made.fetch_add(1) == fail_at.load()) return nullptr;
  void *p = alignment <= alignof(std::max_align_t)
                ? std::malloc(bytes == 0 ? 1 : bytes)
                : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (p != nullptr) living.fetch_add(1);
  return p;
}

void *allocate_or_throw(std::size_t bytes, std::size_t alignment = 1) {
  void *p = allocate(bytes, alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

void release(void *p) {
  if (p != nullptr) living.fetch_sub(1);
  std::free(p);
}

}  // namespace

void *operator new(std::size_t n) { return allocate_or_throw(n); }
void *operator new[](std::size_t n) { return allocate_or_throw(n); }
void *operator new(std::size_t n, std::align_val_t a) {
  return allocate_or_throw(n, static_cast<std::size_t>(a));
}
void *operator new[](std::size_t n, std::align_val_t a) {
  return allocate_or_throw(n, static_cast<std::size_t>(a));
}
void *operator new(std::size_t n, const std::nothrow_t &) noexcept { return allocate(n, 1); }
void *operator new[](std::size_t n, const std::nothrow_t &) noexcept { return allocate(n, 1); }
void operator delete(void *p) noexcept { release(p); }
void operator delete[](void *p) noexcept { release(p); }
void operator delete(void *p, std::size_t) noexcept { release(p); }
void operator delete[](void *p, std::size_t) noexcept { release(p); }
void operator delete(void *p, std::align_val_t) noexcept { release(p); }
void operator delete[](void *p, std::align_val_t) noexcept { release(p); }
void operator delete(void *p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void *p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete(void *p, const std::nothrow_t &) noexcept { release(p); }

namespace {

void every_allocation_of_a_plan_fails(const powerattn_desc &d) {
  powerattn_plan *plan = nullptr;
  REQUIRE(powerattn_plan_create(&d, &plan) == POWERATTN_OK);  // what lives as long as the process is made here
  powerattn_plan_destroy(plan);

  plan = nullptr;
  int64_t failures = 0;
  for (;; ++failures) {
    const int64_t before = living.load();
    fail_at.store(made.load() + failures);
    const powerattn_status status = powerattn_plan_create(&d, &plan);
    const bool reached = made.load() > fail_at.load();
    fail_at.store(-1);
    if (!reached) {  // the plan took fewer allocations: all have failed once
      REQUIRE(status == POWERATTN_OK);
      powerattn_plan_destroy(plan);
      CHECK(living.load() == before);
      break;
    }
    const int64_t after = living.load();  // doctest's own allocations come later
    REQUIRE(status == POWERATTN_ERROR_OUT_OF_MEMORY);
    REQUIRE(std::string(powerattn_last_error()) == "out of host memory for the library's own objects");
    REQUIRE(plan == nullptr);
    REQUIRE(after == before);
  }
  CHECK(failures >= 3);  // the plan, its text, ...
}

}  // namespace

TEST_CASE("allocation: every one of plan_create fails in turn") {
  every_allocation_of_a_plan_fails(fixture::description());
  powerattn_desc d = fixture::description();
  d.num_threads = 2;
  d.dtype = POWERATTN_BFLOAT16;
  d.seq_len = 300;
  every_allocation_of_a_plan_fails(d);
  d.flags = 0;
  d.degree = 6;
  d.head_dim = d.value_dim = 64;  // the path that refuses states
  every_allocation_of_a_plan_fails(d);
}

TEST_CASE("allocation: a refused plan leaks nothing when its message cannot be built either") {
  powerattn_desc d = fixture::description();
  d.state_limit = 1;
  powerattn_plan *plan = nullptr;
  for (int64_t n = 0; n < 40; ++n) {
    const int64_t before = living.load();
    fail_at.store(made.load() + n);
    const powerattn_status status = powerattn_plan_create(&d, &plan);
    fail_at.store(-1);
    const int64_t after = living.load();
    CHECK((status == POWERATTN_ERROR_STATE_TOO_LARGE || status == POWERATTN_ERROR_OUT_OF_MEMORY));
    CHECK(after == before);
    CHECK(plan == nullptr);
  }
}

TEST_CASE("allocation: execute, query and describe calls make none") {
  for (const int threads : {1, 2}) {
    for (const bool packed : {false, true}) {
      powerattn_desc d = packed ? fixture::packed_description() : fixture::description();
      d.num_threads = threads;
      fixture::Calls c(d);
      const powerattn_plan *plan = c.plan.get();
      char text[64];
      powerattn_plan_info info = {};
      info.struct_size = sizeof(info);
      const int64_t before = made.load();
      const powerattn_status statuses[] = {
          powerattn_forward(plan, &c.forward),
          powerattn_backward(plan, &c.backward),
          packed ? POWERATTN_OK : powerattn_step(plan, &c.step),
          powerattn_summary(plan, &c.summary),
          powerattn_summary_reverse(plan, &c.reverse),
          powerattn_state_compose(plan, &c.compose),
          powerattn_state_convert(plan, &c.convert),
          powerattn_state_pack(plan, &c.pack),
          powerattn_state_unpack(plan, &c.unpack),
          powerattn_plan_query(plan, &info),
          powerattn_plan_describe(plan, text, sizeof(text), nullptr),
      };
      const int64_t after = made.load();
      for (const powerattn_status status : statuses) CHECK(status == POWERATTN_OK);
      CHECK(after == before);
    }
  }
}

TEST_CASE("allocation: refusing arguments makes none either") {
  fixture::Calls c(fixture::description());
  c.forward.q.data = nullptr;
  const int64_t before = made.load();
  const powerattn_status status = powerattn_forward(c.plan.get(), &c.forward);
  const int64_t after = made.load();
  CHECK(status == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(after == before);
}
