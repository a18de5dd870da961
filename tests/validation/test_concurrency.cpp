// SPDX-License-Identifier: Apache-2.0
// One plan, many threads: each gets the bits that it would get alone, and its own error message.
#include <atomic>
#include <cmath>
#include <thread>

#include "fixture.h"

namespace {

constexpr int kThreads = 4;
constexpr int kRounds = 5;

void fill(const powerattn_tensor &t, int64_t count, int seed) {
  for (int64_t i = 0; i < count; ++i) {
    static_cast<float *>(t.data)[i] = std::sin(0.7f * static_cast<float>(i) + static_cast<float>(seed));
  }
}

// Inputs of one caller; callers differ.
void prepare(fixture::Calls *c, int seed) {
  const powerattn_desc &d = c->desc;
  const int64_t tokens = d.batch * d.seq_len;
  fill(c->forward.q, tokens * d.heads_q * d.head_dim, seed);
  fill(c->forward.k, tokens * d.heads_kv * d.head_dim, seed + 1);
  fill(c->forward.v, tokens * d.heads_kv * d.value_dim, seed + 2);
  fill(c->backward.d_y, tokens * d.heads_q * d.value_dim, seed + 3);
  c->backward.y = c->forward.y;
  c->backward.row_norm = c->forward.row_norm;
}

std::vector<unsigned char> outputs(const fixture::Calls &c) {
  const powerattn_desc &d = c.desc;
  const auto tokens = static_cast<size_t>(d.batch * d.seq_len);
  std::vector<unsigned char> all;
  const auto add = [&](const void *data, size_t count) {
    const auto *bytes = static_cast<const unsigned char *>(data);
    all.insert(all.end(), bytes, bytes + count * 4);
  };
  const auto hq = static_cast<size_t>(d.heads_q), hkv = static_cast<size_t>(d.heads_kv);
  add(c.forward.y.data, tokens * hq * static_cast<size_t>(d.value_dim));
  add(c.backward.d_q.data, tokens * hq * static_cast<size_t>(d.head_dim));
  add(c.backward.d_k.data, tokens * hkv * static_cast<size_t>(d.head_dim));
  add(c.backward.d_v.data, tokens * hkv * static_cast<size_t>(d.value_dim));
  add(c.forward.final_state.s,
      static_cast<size_t>(c.info.sequences * d.heads_kv * c.info.state_rows * d.value_dim));
  return all;
}

}  // namespace

TEST_CASE("concurrent execution of one plan gives every thread its own bits") {
  for (const int plan_threads : {1, 2}) {
    powerattn_desc d = fixture::description();
    d.seq_len = 37;
    d.num_threads = plan_threads;
    const fixture::Plan plan = fixture::make(d);

    std::vector<std::unique_ptr<fixture::Calls>> calls;
    std::vector<std::vector<unsigned char>> alone;
    for (int i = 0; i < kThreads; ++i) {
      calls.push_back(std::make_unique<fixture::Calls>(d));
      prepare(calls.back().get(), 10 * i);
      REQUIRE(powerattn_forward(plan.get(), &calls.back()->forward) == POWERATTN_OK);
      REQUIRE(powerattn_backward(plan.get(), &calls.back()->backward) == POWERATTN_OK);
      alone.push_back(outputs(*calls.back()));
    }
    REQUIRE(alone[0] != alone[1]);

    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        fixture::Calls &c = *calls[static_cast<size_t>(i)];
        for (int round = 0; round < kRounds; ++round) {
          if (powerattn_forward(plan.get(), &c.forward) != POWERATTN_OK) ++wrong;
          if (powerattn_backward(plan.get(), &c.backward) != POWERATTN_OK) ++wrong;
          if (outputs(c) != alone[static_cast<size_t>(i)]) ++wrong;
        }
      });
    }
    for (std::thread &t : threads) t.join();
    CHECK(wrong.load() == 0);
  }
}

TEST_CASE("concurrent errors keep their own messages") {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&wrong, i] {
      for (int round = 0; round < 200; ++round) {
        powerattn_desc d = fixture::description();
        d.head_dim = 300 + i;
        powerattn_plan *plan = nullptr;
        if (powerattn_plan_create(&d, &plan) != POWERATTN_ERROR_INVALID_ARGUMENT) ++wrong;
        if (powerattn_last_error() != "head_dim is " + std::to_string(300 + i) + "; allowed are 1 .. 256")
          ++wrong;
      }
    });
  }
  for (std::thread &t : threads) t.join();
  CHECK(wrong.load() == 0);
  CHECK(std::string(powerattn_last_error()) == "");
}

TEST_CASE("concurrent plans are made and destroyed") {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&wrong, i] {
      for (int round = 0; round < 20; ++round) {
        powerattn_desc d = fixture::description();
        d.num_threads = 1 + i % 2;
        powerattn_plan *plan = nullptr;
        if (powerattn_plan_create(&d, &plan) != POWERATTN_OK) ++wrong;
        powerattn_plan_destroy(plan);
      }
    });
  }
  for (std::thread &t : threads) t.join();
  CHECK(wrong.load() == 0);
}
