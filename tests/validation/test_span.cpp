// SPDX-License-Identifier: Apache-2.0
// Overlap of strided arguments against counting every byte.
#include <doctest/doctest.h>

#include <random>
#include <set>

#include "span.h"

using powerattn::Overlap;
using powerattn::Span;

namespace {

std::vector<int64_t> addresses(const Span &s) {
  std::vector<int64_t> all;
  for (int64_t i = 0; i < s.extent[0]; ++i) {
    for (int64_t j = 0; j < s.extent[1]; ++j) {
      for (int64_t k = 0; k < s.extent[2]; ++k) {
        for (int64_t r = 0; r < s.run; ++r) {
          all.push_back(static_cast<int64_t>(s.base) + i * s.stride[0] + j * s.stride[1] + k * s.stride[2] + r);
        }
      }
    }
  }
  return all;
}

Span random_span(std::mt19937 &random) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  Span s;
  s.base = static_cast<uint64_t>(10000 + pick(-40, 40));
  s.run = pick(1, 8);
  for (int k = 0; k < 3; ++k) {
    s.extent[k] = pick(1, 4);
    s.stride[k] = s.extent[k] > 1 ? pick(-60, 60) : 0;
  }
  return s;
}

}  // namespace

TEST_CASE("span: overlap is exact for random strides") {
  std::mt19937 random(20240817);
  int yes = 0, no = 0, self_yes = 0, self_no = 0;
  for (int trial = 0; trial < 40000; ++trial) {
    const Span a = random_span(random), b = random_span(random);
    const std::vector<int64_t> list_a = addresses(a), list_b = addresses(b);
    const std::set<int64_t> set_a(list_a.begin(), list_a.end()), set_b(list_b.begin(), list_b.end());

    const bool self = set_a.size() < list_a.size();
    REQUIRE(overlaps_itself(a) == (self ? Overlap::kYes : Overlap::kNo));
    (self ? self_yes : self_no) += 1;

    bool shared = false;
    for (const int64_t x : set_b) shared = shared || set_a.count(x) > 0;
    REQUIRE(overlap(a, b) == (shared ? Overlap::kYes : Overlap::kNo));
    (shared ? yes : no) += 1;
  }
  // The cases are worth something only if both answers are common.
  CHECK(yes > 4000);
  CHECK(no > 4000);
  CHECK(self_yes > 4000);
  CHECK(self_no > 4000);
}

TEST_CASE("span: large layouts are told apart at once") {
  // Slices of one packed [b, t, heads, dim] buffer of 2^41 bytes.
  Span q;
  q.base = 1 << 20;
  q.run = 256;
  const int64_t extent[3] = {1 << 10, 1 << 20, 5}, stride[3] = {int64_t{1} << 31, int64_t{1} << 11, 256};
  for (int k = 0; k < 3; ++k) q.extent[k] = extent[k], q.stride[k] = stride[k];
  Span k = q;
  k.base += 5 * 256;
  k.extent[2] = 3;
  CHECK(overlaps_itself(q) == Overlap::kNo);
  CHECK(overlap(q, k) == Overlap::kNo);
  k.base -= 1;
  CHECK(overlap(q, k) == Overlap::kYes);
}

TEST_CASE("span: reach") {
  Span s;
  s.base = 4096;
  s.run = 4;
  CHECK(addressable(s));
  s.extent[0] = 3;
  s.stride[0] = INT64_MAX / 2 - 8;
  CHECK(addressable(s));
  s.stride[0] = INT64_MAX / 2 + 8;
  CHECK_FALSE(addressable(s));
  s.stride[0] = -2048;
  CHECK(addressable(s));
  s.stride[0] = -2049;  // below address 0
  CHECK_FALSE(addressable(s));
}
