// SPDX-License-Identifier: Apache-2.0
// The judge itself: what it lets pass and what it does not.
#include "doctest/doctest.h"
#include "judge.h"

using namespace powerattn_test;

namespace {

constexpr int kSets = 1000, kDraws = 9;

// Errors of `numbers` numbers around 0, `scale` times as large as those of the plain implementation.
Report draw(Random *random, int64_t numbers, double scale) {
  const Vector exact(static_cast<size_t>(numbers), 0.0);
  const Vector plain = random->normals(numbers, 0, 1, POWERATTN_FLOAT64);
  const Vector got = random->normals(numbers, 0, scale, POWERATTN_FLOAT64);
  Report report;
  judge("x", POWERATTN_FLOAT16, got, exact, {&plain}, &report);
  return report;
}

// Of 1000 sets of draws, those that fail.
int failures(int64_t numbers, double scale, int draws) {
  Random random(1);
  int failed = 0;
  for (int set = 0; set < kSets; ++set) {
    Pool pool;
    for (int i = 0; i < draws; ++i) pool.add(draw(&random, numbers, scale));
    failed += pool.verdict().problems.empty() ? 0 : 1;
  }
  return failed;
}

}  // namespace

TEST_CASE("judge: an error of a single number needs many draws") {
  CHECK(failures(1, 1, 1) > 250);
  CHECK(failures(1, 1, kDraws) < 50);
  CHECK(failures(1, 1, 30) == 0);
  CHECK(failures(1, 3, kDraws) > 800);
  CHECK(failures(1, 4, kDraws) > 950);
}

TEST_CASE("judge: many numbers tell at once, and nothing of it is lost by pooling") {
  CHECK(failures(4096, 1.5, 1) < 30);
  CHECK(failures(4096, 2.2, 1) == kSets);
  CHECK(failures(4096, 1.5, kDraws) == 0);
  CHECK(failures(4096, 2.2, kDraws) == kSets);
}

TEST_CASE("judge: one wrong draw is enough") {
  Random random(2);
  Pool pool;
  for (int i = 0; i < kDraws - 1; ++i) pool.add(draw(&random, 4096, 0.5));
  CHECK(pool.verdict().problems == "");
  SUBCASE("far off") { pool.add(draw(&random, 4096, 20)); }
  SUBCASE("one number far off") {
    Vector got(4096, 0.0);
    got[7] = 100;
    const Vector exact(4096, 0.0), plain = random.normals(4096, 0, 1, POWERATTN_FLOAT64);
    Report report;
    judge("x", POWERATTN_FLOAT16, got, exact, {&plain}, &report);
    pool.add(report);
  }
  SUBCASE("not finite, or missing") {
    const double nan = std::nan("");
    const Vector exact(3, 0.0), plain(3, 0.0);
    for (const Vector &got : {Vector{0, nan, 0}, Vector{0, 0}}) {
      Report report;
      judge("x", POWERATTN_FLOAT16, got, exact, {&plain}, &report);
      CHECK(report.wrong);
      pool.add(report);
    }
  }
  CHECK(pool.verdict().problems != "");
}

TEST_CASE("judge: where the plain implementation overflows, nothing is tested") {
  const Vector exact(3, 0.0), overflow{0, 0, HUGE_VAL};
  Report report;
  judge("x", POWERATTN_FLOAT16, exact, exact, {&overflow}, &report);
  CHECK(report.empty);
  CHECK(report.problems != "");
  Random random(3);
  Pool pool;
  pool.add(report);
  CHECK(pool.verdict().problems != "");
  pool.add(draw(&random, 3, 0.5));
  CHECK(pool.verdict().problems == "");
}

TEST_CASE("judge: the rounding of the result is allowed, and only that where the plain one is exact") {
  const Vector exact{1024, 0, 0, 0};
  for (const double off : {0.4, 1.1}) {  // of the spacing of float16 at 1024, which is 1
    const Vector got{1024 + off, 0, 0, 0};
    Report report;
    judge("x", POWERATTN_FLOAT16, got, exact, {&exact}, &report);
    CHECK(report.problems.empty() == (off < 0.5));
  }
}
