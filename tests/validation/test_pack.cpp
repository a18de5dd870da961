// SPDX-License-Identifier: Apache-2.0
// The packed state: its bytes, and what unpack refuses before it writes anything.
#include <functional>

#include "fixture.h"

using fixture::Calls;

namespace {

constexpr powerattn_status kInvalid = POWERATTN_ERROR_INVALID_ARGUMENT;

uint64_t little(const unsigned char *at, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) value = value << 8 | at[i];
  return value;
}

}  // namespace

TEST_CASE("pack: the block is a header, then z and S of each state and head in canonical order") {
  Calls calls(fixture::description());
  const powerattn_state &s = calls.forward.initial_state;
  const int64_t rows = calls.info.state_rows, e = 6;
  for (int64_t i = 0; i < 2 * 2 * rows * e; ++i) static_cast<float *>(s.s)[i] = static_cast<float>(i);
  for (int64_t i = 0; i < 2 * 2 * rows; ++i) static_cast<float *>(s.z)[i] = -static_cast<float>(i);
  REQUIRE(powerattn_state_pack(calls.plan.get(), &calls.pack) == POWERATTN_OK);

  const auto *at = static_cast<const unsigned char *>(calls.pack.packed);
  CHECK(calls.pack.packed_bytes == 64 + 4 * static_cast<uint64_t>(4 * rows * (e + 1)));
  CHECK(std::memcmp(at, "PWRATTN\0", 8) == 0);
  CHECK(little(at + 8, 4) == 1);  // format version
  CHECK(little(at + 12, 4) == POWERATTN_FLOAT32);
  CHECK(little(at + 16, 4) == 2);  // degree
  CHECK(little(at + 20, 4) == 0);
  CHECK(little(at + 24, 8) == 8);  // head_dim
  CHECK(little(at + 32, 8) == 6);  // value_dim
  CHECK(little(at + 40, 8) == 2);  // heads_kv
  CHECK(little(at + 48, 8) == 2);  // count
  CHECK(little(at + 56, 8) == calls.pack.packed_bytes - 64);

  std::vector<float> payload(static_cast<size_t>(4 * rows * (e + 1)));
  std::memcpy(payload.data(), at + 64, payload.size() * 4);
  size_t next = 0;
  for (int64_t block = 0; block < 4; ++block) {
    for (int64_t r = 0; r < rows; ++r) CHECK(payload[next++] == -static_cast<float>(block * rows + r));
    for (int64_t i = 0; i < rows * e; ++i) CHECK(payload[next++] == static_cast<float>(block * rows * e + i));
  }

  // And back, into other memory.
  calls.unpack.packed = calls.pack.packed;
  REQUIRE(powerattn_state_unpack(calls.plan.get(), &calls.unpack) == POWERATTN_OK);
  CHECK(std::memcmp(calls.unpack.state.s, s.s, static_cast<size_t>(4 * rows * e) * 4) == 0);
  CHECK(std::memcmp(calls.unpack.state.z, s.z, static_cast<size_t>(4 * rows) * 4) == 0);
}

TEST_CASE("pack: a block at any alignment") {
  Calls calls(fixture::description());
  auto *odd = static_cast<unsigned char *>(calls.raw(calls.pack.packed_bytes + 1, false)) + 1;
  calls.pack.packed = odd;
  REQUIRE(powerattn_state_pack(calls.plan.get(), &calls.pack) == POWERATTN_OK);
  calls.unpack.packed = odd;
  CHECK(powerattn_state_unpack(calls.plan.get(), &calls.unpack) == POWERATTN_OK);
}

TEST_CASE("pack: one wrong argument at a time") {
  Calls calls(fixture::description());
  const powerattn_pack_args good = calls.pack;
  const std::string size = std::to_string(good.packed_bytes);
  const auto refused = [&](const std::function<void(powerattn_pack_args &)> &change, const std::string &message,
                           powerattn_status status = kInvalid) {
    powerattn_pack_args a = good;
    change(a);
    CHECK(powerattn_state_pack(calls.plan.get(), &a) == status);
    CHECK(std::string(powerattn_last_error()) == message);
    CHECK(calls.untouched());
  };
  refused([](auto &a) { a.dtype = POWERATTN_FLOAT16; },
          "dtype is 2; allowed are 0, FLOAT32 (1), BFLOAT16 (3) and FLOAT64 (4)");
  refused([](auto &a) { a.count = -1; }, "count is -1; it must be >= 0");
  refused([](auto &a) { a.count = INT64_MAX; },
          "9223372036854775807 packed states of 2 kv heads, head_dim 8 and degree 2 take more bytes than "
          "uint64_t holds",
          POWERATTN_ERROR_UNSUPPORTED);
  refused([](auto &a) { a.state.s = nullptr, a.state.z = nullptr; },
          "state.s is NULL; float32 [2, 2, 36, 6] is required here");
  refused([](auto &a) { a.packed = nullptr; },
          "packed is NULL; " + size + " bytes of host memory are required here");
  refused([](auto &a) { --a.packed_bytes; },
          "packed_bytes is " + std::to_string(good.packed_bytes - 1) + "; these states need " + size);
  refused([](auto &a) { a.packed = a.state.s; },
          "packed overlaps state.s; an output may not share memory with another tensor");

  uint64_t bytes = 77;
  CHECK(powerattn_state_pack_size(calls.plan.get(), 9, 2, &bytes) == kInvalid);
  CHECK(powerattn_state_pack_size(calls.plan.get(), 0, -2, &bytes) == kInvalid);
  CHECK(powerattn_state_pack_size(calls.plan.get(), 0, 2, nullptr) == kInvalid);
  CHECK(powerattn_state_pack_size(nullptr, 0, 2, &bytes) == kInvalid);
  CHECK(bytes == 77);
  CHECK(powerattn_state_pack_size(calls.plan.get(), POWERATTN_BFLOAT16, 2, &bytes) == POWERATTN_OK);
  CHECK(bytes == 64 + (good.packed_bytes - 64) / 2);
}

TEST_CASE("unpack: a block that is not ours is refused, naming the difference, before anything is written") {
  Calls calls(fixture::description());
  auto *block = static_cast<unsigned char *>(calls.unpack.packed);
  const auto refused = [&](size_t at, unsigned char value, const std::string &message,
                           powerattn_status status = kInvalid) {
    const unsigned char before = block[at];
    block[at] = value;
    CHECK(powerattn_state_unpack(calls.plan.get(), &calls.unpack) == status);
    CHECK(std::string(powerattn_last_error()) == message);
    CHECK(calls.untouched());
    block[at] = before;
  };
  refused(0, 'p', "packed is not a packed state: its magic is not \"PWRATTN\"");
  refused(8, 2, "packed has format version 2; this library reads version 1", POWERATTN_ERROR_VERSION);
  refused(12, 2, "packed has dtype 2; allowed are FLOAT32, BFLOAT16 and FLOAT64");
  refused(12, 4, "packed has a damaged header: it says 4032 bytes of payload, its shape needs 8064");
  refused(16, 4, "packed has degree 4; this call needs 2");
  refused(20, 1, "packed has a damaged header: its reserved bytes are not zero");
  refused(24, 9, "packed has head_dim 9; this call needs 8");
  refused(32, 8, "packed has value_dim 8; this call needs 6");
  refused(40, 1, "packed has heads_kv 1; this call needs 2");
  refused(48, 3, "packed has count 3; this call needs 2");
  refused(55, 0x80, "packed has count -9223372036854775806; this call needs 2");
  refused(56, 0, "packed has a damaged header: it says 3840 bytes of payload, its shape needs 4032");

  powerattn_pack_args a = calls.unpack;
  a.packed_bytes = 63;
  CHECK(powerattn_state_unpack(calls.plan.get(), &a) == kInvalid);
  CHECK(std::string(powerattn_last_error()) ==
        "packed_bytes is 63; a packed state has at least its header of 64");
  a.packed_bytes = calls.unpack.packed_bytes - 1;
  CHECK(powerattn_state_unpack(calls.plan.get(), &a) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "packed_bytes is 4095; this packed state has 4096");
  a = calls.unpack;
  a.packed = nullptr;
  CHECK(powerattn_state_unpack(calls.plan.get(), &a) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "packed is NULL; it must be a packed state in host memory");
  CHECK(calls.untouched());
  CHECK(powerattn_state_unpack(calls.plan.get(), &calls.unpack) == POWERATTN_OK);
}
