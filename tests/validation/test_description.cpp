// SPDX-License-Identifier: Apache-2.0
// One wrong field of the description at a time: the exact status and the exact message.
#include <cmath>
#include <functional>

#include "fixture.h"

using fixture::description;
using fixture::packed_description;

namespace {

struct Case {
  std::function<void(powerattn_desc &)> change;
  powerattn_status status;
  const char *message;
};

constexpr powerattn_status kInvalid = POWERATTN_ERROR_INVALID_ARGUMENT;

void run(const std::vector<Case> &cases, powerattn_desc (*base)()) {
  for (const Case &c : cases) {
    powerattn_desc d = base();
    c.change(d);
    powerattn_plan *const poison = reinterpret_cast<powerattn_plan *>(16);
    powerattn_plan *plan = poison;
    const powerattn_status status = powerattn_plan_create(&d, &plan);
    CHECK(std::string(powerattn_last_error()) == c.message);
    CHECK(status == c.status);
    CHECK(plan == poison);
    if (status == POWERATTN_OK) powerattn_plan_destroy(plan);
  }
}

}  // namespace

TEST_CASE("description: one wrong field at a time") {
  run(
      {
          {[](auto &d) { d.struct_size = 0; }, kInvalid,
           "desc->struct_size is 0; it must be 184 (sizeof the struct)"},
          {[](auto &d) { d.struct_size = 183; }, kInvalid,
           "desc->struct_size is 183; it must be 184 (sizeof the struct)"},
          {[](auto &d) { d.struct_size = 0xFFFFFFFFu; }, kInvalid,
           "desc->struct_size is 4294967295; it must be 184 (sizeof the struct)"},
          {[](auto &d) { d.device_type = 2; }, kInvalid, "device_type is 2; allowed are CPU (0) and CUDA (1)"},
          {[](auto &d) { d.device_index = -1; }, kInvalid, "device_index is -1; it must be >= 0"},
          {[](auto &d) { d.device_index = 1; }, POWERATTN_ERROR_NO_DEVICE,
           "device_index is 1; there are 1 cpu devices here"},
          {[](auto &d) { d.dtype = 0; }, kInvalid,
           "dtype is 0; allowed are FLOAT32 (1), FLOAT16 (2), BFLOAT16 (3) and FLOAT64 (4)"},
          {[](auto &d) { d.dtype = 5; }, kInvalid,
           "dtype is 5; allowed are FLOAT32 (1), FLOAT16 (2), BFLOAT16 (3) and FLOAT64 (4)"},
          {[](auto &d) { d.dtype = POWERATTN_FLOAT64, d.device_type = POWERATTN_CUDA; },
           POWERATTN_ERROR_UNSUPPORTED, "dtype is FLOAT64; it is supported on the CPU only"},
          {[](auto &d) { d.state_dtype = POWERATTN_FLOAT16; }, kInvalid,
           "state_dtype is 2; allowed here are 0 and FLOAT32 (1) and BFLOAT16 (3)"},
          {[](auto &d) { d.state_dtype = POWERATTN_FLOAT64; }, kInvalid,
           "state_dtype is 4; allowed here are 0 and FLOAT32 (1) and BFLOAT16 (3)"},
          {[](auto &d) { d.dtype = POWERATTN_FLOAT64, d.state_dtype = POWERATTN_FLOAT32; }, kInvalid,
           "state_dtype is 1; allowed here are 0 and FLOAT64 (4)"},
          {[](auto &d) { d.degree = 0; }, kInvalid, "degree is 0; allowed are 1 .. 8"},
          {[](auto &d) { d.degree = 9; }, kInvalid, "degree is 9; allowed are 1 .. 8"},
          {[](auto &d) { d.degree = INT32_MIN; }, kInvalid, "degree is -2147483648; allowed are 1 .. 8"},
          {[](auto &d) { d.degree = 3; }, kInvalid,
           "degree is 3; it must be even unless flags has POWERATTN_UNNORMALIZED"},
          {[](auto &d) { d.flags = 16; }, kInvalid, "flags is 0x10; allowed are the bits of 0xf"},
          {[](auto &d) { d.flags = INT32_MIN; }, kInvalid, "flags is 0x80000000; allowed are the bits of 0xf"},
          {[](auto &d) { d.form = 3; }, kInvalid,
           "form is 3; allowed are AUTO (0), ATTENTION (1) and CHUNKED (2)"},
          {[](auto &d) { d.form = -1; }, kInvalid,
           "form is -1; allowed are AUTO (0), ATTENTION (1) and CHUNKED (2)"},
          {[](auto &d) { d.batch = -1; }, kInvalid, "batch is -1; it must be >= 0"},
          {[](auto &d) { d.seq_len = -7; }, kInvalid, "seq_len is -7; it must be >= 0"},
          {[](auto &d) { d.heads_q = 0; }, kInvalid, "heads_q is 0; allowed are 1 .. 1048576"},
          {[](auto &d) { d.heads_kv = 0; }, kInvalid, "heads_kv is 0; allowed are 1 .. 1048576"},
          {[](auto &d) { d.heads_kv = 3; }, kInvalid, "heads_q is 4; it must be a multiple of heads_kv 3"},
          {[](auto &d) { d.heads_kv = 8; }, kInvalid, "heads_q is 4; it must be a multiple of heads_kv 8"},
          {[](auto &d) { d.head_dim = 0; }, kInvalid, "head_dim is 0; allowed are 1 .. 256"},
          {[](auto &d) { d.head_dim = 257; }, kInvalid, "head_dim is 257; allowed are 1 .. 256"},
          {[](auto &d) { d.value_dim = -1; }, kInvalid, "value_dim is -1; allowed are 0 .. 256"},
          {[](auto &d) { d.value_dim = 257; }, kInvalid, "value_dim is 257; allowed are 0 .. 256"},
          {[](auto &d) { d.sequences = -1; }, kInvalid, "sequences is -1; it must be >= 0"},
          {[](auto &d) { d.sequences = 1; }, kInvalid, "batch is 2; it must be 1 with packed sequences"},
          {[](auto &d) { d.max_seq_len = 6; }, kInvalid, "max_seq_len is 6; allowed are 0 .. 5"},
          {[](auto &d) { d.max_seq_len = -1; }, kInvalid, "max_seq_len is -1; allowed are 0 .. 5"},
          {[](auto &d) { d.chunk_size = -1; }, kInvalid, "chunk_size is -1; allowed are 0 .. 2147483647"},
          {[](auto &d) { d.chunk_size = 4, d.form = POWERATTN_FORM_ATTENTION; }, kInvalid,
           "chunk_size is 4; it must be 0 with form ATTENTION, which has no chunks"},
          {[](auto &d) { d.batch = INT64_MAX; }, kInvalid,
           "batch 9223372036854775807 x seq_len 5 x heads_q 4 x head_dim is too much: a tensor may have "
           "2^48 bytes"},
          {[](auto &d) { d.seq_len = INT64_MAX / 64; }, kInvalid,
           "batch 2 x seq_len 144115188075855871 x heads_q 4 x head_dim is too much: a tensor may have "
           "2^48 bytes"},
          {[](auto &d) { d.heads_q = INT64_MAX - 1, d.batch = 0; }, kInvalid,
           "heads_q is 9223372036854775806; allowed are 1 .. 1048576"},
          {[](auto &d) { d.seq_len = INT64_C(1) << 40, d.batch = 0; }, kInvalid,
           "batch 0 x seq_len 1099511627776 x heads_q 4 x head_dim is too much: a tensor may have 2^48 bytes"},
          {[](auto &d) { d.scale = 0.5; }, kInvalid,
           "scale is 0.5 without POWERATTN_CUSTOM_SCALE; set the flag, or 0 for 1/sqrt(head_dim)"},
          {[](auto &d) { d.flags |= POWERATTN_CUSTOM_SCALE, d.scale = std::nan(""); }, kInvalid,
           "scale is nan; it must be finite"},
          {[](auto &d) { d.flags |= POWERATTN_CUSTOM_SCALE, d.scale = INFINITY; }, kInvalid,
           "scale is inf; it must be finite"},
          {[](auto &d) { d.eps = -1e-6; }, kInvalid, "eps is -1e-06; it must be >= 0"},
          {[](auto &d) { d.eps = INFINITY; }, kInvalid, "eps is inf; it must be finite"},
          {[](auto &d) { d.rope_base = -1; }, kInvalid, "rope_base is -1; it must be > 0, or 0 for 10000"},
          {[](auto &d) { d.rope_base = std::nan(""); }, kInvalid, "rope_base is nan; it must be finite"},
          {[](auto &d) { d.rope_style = 3; }, kInvalid,
           "rope_style is 3; allowed are NONE (0), HALF (1) and INTERLEAVED (2)"},
          {[](auto &d) { d.rope_style = POWERATTN_ROPE_HALF, d.rope_dim = 3; }, kInvalid,
           "rope_dim is 3; it must be even and 2 .. head_dim 8, or 0 for head_dim"},
          {[](auto &d) { d.rope_style = POWERATTN_ROPE_HALF, d.rope_dim = 10; }, kInvalid,
           "rope_dim is 10; it must be even and 2 .. head_dim 8, or 0 for head_dim"},
          {[](auto &d) { d.rope_style = POWERATTN_ROPE_INTERLEAVED, d.head_dim = 7; }, kInvalid,
           "rope_dim is 0, that is head_dim 7; rotated dimensions must be even in number"},
          {[](auto &d) { d.num_threads = -1; }, kInvalid, "num_threads is -1; allowed are 0 .. 1024"},
          {[](auto &d) { d.num_threads = 1025; }, kInvalid, "num_threads is 1025; allowed are 0 .. 1024"},
          {[](auto &d) { d.reserved[3] = 1; }, kInvalid, "reserved is 1; it must be 0"},
          {[](auto &d) { d.state_limit = 3455; }, POWERATTN_ERROR_STATE_TOO_LARGE,
           "USE_STATE needs states of 4.0 kB (4032 bytes: 2 sequences x 2 kv heads x 36 rows x 7 x 4 bytes); "
           "allowed are 3.5 kB (3455 bytes, desc.state_limit)"},
          {[](auto &d) { d.state_limit = 1, d.flags = 0, d.form = POWERATTN_FORM_CHUNKED; },
           POWERATTN_ERROR_STATE_TOO_LARGE,
           "form CHUNKED needs states of 4.0 kB (4032 bytes: 2 sequences x 2 kv heads x 36 rows x 7 x 4 "
           "bytes); allowed are 1 bytes (1 bytes, desc.state_limit)"},
      },
      description);
}

TEST_CASE("description: packed sequences") {
  run({{[](auto &d) { d.batch = 0; }, kInvalid, "batch is 0; it must be 1 with packed sequences"},
       {[](auto &d) { d.sequences = INT64_MAX; }, kInvalid,
        "sequences 9223372036854775807 x heads_q 4 is too much: allowed are 2^37 in all"}},
      packed_description);
}

TEST_CASE("description: null pointers") {
  powerattn_plan *plan = nullptr;
  CHECK(powerattn_plan_create(nullptr, &plan) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "desc is NULL");
  const powerattn_desc d = description();
  CHECK(powerattn_plan_create(&d, nullptr) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "plan is NULL");
  powerattn_plan_destroy(nullptr);
}

TEST_CASE("description: a newer caller's trailing bytes must be zero") {
  struct Newer {
    powerattn_desc d;
    unsigned char more[24];
  } newer = {};
  newer.d = description();
  newer.d.struct_size = sizeof(newer);
  powerattn_plan *plan = nullptr;
  REQUIRE(powerattn_plan_create(&newer.d, &plan) == POWERATTN_OK);
  powerattn_plan_destroy(plan);
  plan = nullptr;
  newer.more[23] = 1;
  CHECK(powerattn_plan_create(&newer.d, &plan) == kInvalid);
  CHECK(std::string(powerattn_last_error()) ==
        "desc has a nonzero byte at offset 207; this library knows 184 bytes of it and the rest must be zero");
  CHECK(plan == nullptr);
}

TEST_CASE("description: what is legal is accepted") {
  const std::vector<std::function<void(powerattn_desc &)>> legal = {
      [](auto &d) { d.batch = 0; },
      [](auto &d) { d.seq_len = 0; },
      [](auto &d) { d.value_dim = 0; },
      [](auto &d) { d.head_dim = 1, d.value_dim = 1; },
      [](auto &d) { d.head_dim = 256, d.value_dim = 256; },
      [](auto &d) { d.degree = 8, d.head_dim = 2; },
      [](auto &d) { d.degree = 3, d.flags |= POWERATTN_UNNORMALIZED; },
      [](auto &d) { d.flags |= POWERATTN_CUSTOM_SCALE, d.scale = 0; },
      [](auto &d) { d.flags |= POWERATTN_ALLOW_TF32; },
      [](auto &d) { d.dtype = POWERATTN_FLOAT64, d.state_dtype = POWERATTN_FLOAT64; },
      [](auto &d) { d.dtype = POWERATTN_BFLOAT16, d.state_dtype = POWERATTN_BFLOAT16; },
      [](auto &d) { d.form = POWERATTN_FORM_CHUNKED, d.chunk_size = 3; },
      [](auto &d) { d.form = POWERATTN_FORM_ATTENTION; },
      [](auto &d) { d.rope_style = POWERATTN_ROPE_HALF, d.rope_dim = 4, d.rope_base = 500000; },
      [](auto &d) { d.batch = 1, d.sequences = 7, d.max_seq_len = 5; },
      [](auto &d) { d.state_limit = 4032; },
      [](auto &d) { d.eps = 1e-3, d.num_threads = 1024; },
  };
  for (const auto &change : legal) {
    powerattn_desc d = description();
    change(d);
    fixture::make(d);
    CHECK(std::string(powerattn_last_error()).empty());
  }
}
