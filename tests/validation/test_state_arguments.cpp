// SPDX-License-Identifier: Apache-2.0
// The calls on states with one wrong argument at a time: the exact status and message, and no output touched.
#include "cases.h"

using namespace cases;

TEST_CASE("step: one wrong argument at a time") {
  using A = powerattn_step_args;
  const auto slots = [](std::vector<int64_t> values, const char *message) {
    return Case<A>{[values, message](A &a, Calls &c) {
      a.slots = c.integers(values);
      return std::string(message);
    }};
  };
  const auto lengths = [](std::vector<int64_t> values, const char *message) {
    return Case<A>{[values, message](A &a, Calls &c) {
      a.lengths = c.integers(values);
      return std::string(message);
    }};
  };
  run<A>(fixture::description(), &Calls::step, powerattn_step,
         {
             {[](A &a, Calls &) {
               a.q.data = nullptr;
               return "q.data is NULL; float32 [2, 5, 4, 8] is required here";
             }},
             {[](A &a, Calls &) {
               a.k.data = nullptr;
               return "k.data is NULL; float32 [2, 5, 2, 8] is required here";
             }},
             {[](A &a, Calls &) {
               a.v.data = nullptr;
               return "v.data is NULL; float32 [2, 5, 2, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.y.data = nullptr;
               return "y.data is NULL; float32 [2, 5, 4, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.y.stride_t = 1;
               return "y overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.state.s = shifted(a.state.s, 2);
               return "state.s is " + address(a.state.s) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.slots = shifted(a.slots, 4);
               return "slots is " + address(a.slots) + "; it must be aligned to 8 bytes";
             }},
             {[](A &a, Calls &) {
               a.rope_offset = shifted(a.rope_offset, 1);
               return "rope_offset is " + address(a.rope_offset) + "; it must be aligned to 8 bytes";
             }},
             {[](A &a, Calls &) {
               a.stream = reinterpret_cast<void *>(8);
               return "stream is 0x8; it must be NULL on the CPU";
             }},
             {[](A &a, Calls &c) {
               a.workspace = nullptr;
               return "workspace is NULL; " + text(c.info.workspace_step) + " bytes are required here";
             }},
             {[](A &a, Calls &) {
               a.reserved = 1;
               return "reserved is 1; it must be 0";
             }},
             {[](A &a, Calls &) {
               a.num_slots = -1;
               return "num_slots is -1; it must be >= 0";
             }},
             {[](A &a, Calls &) {
               a.state = {};
               return "state.s is NULL; float32 [3, 2, 36, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.state.z = nullptr;
               return "state.z is NULL; a normalised state has z";
             }},
             {[](A &a, Calls &) {
               a.state.s_stride_n = 0;
               return "state.s overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.y.data = a.state.s;
               return std::string("state.s overlaps y") + kShared;
             }},
             {[](A &a, Calls &) {
               a.num_slots = 1, a.slots = nullptr;
               return "slots is NULL and there are 1 slots; 2 are needed";
             }},
             slots({3, 0}, "slots[0] is 3; there are 3 slots"),
             slots({0, INT64_MAX}, "slots[1] is 9223372036854775807; there are 3 slots"),
             slots({1, 1}, "slots[1] is 1 for the second time; slots must be different"),
             lengths({5, 6}, "lengths[1] is 6; allowed are 0 .. 5 (seq_len)"),
             lengths({-1, 5}, "lengths[0] is -1; allowed are 0 .. 5 (seq_len)"),
             {[](A &a, Calls &) {
               a.lengths = shifted(a.lengths, 4);
               return "lengths is " + address(a.lengths) + "; it must be aligned to 8 bytes";
             }},
             {[](A &a, Calls &c) {
                a.workspace_bytes = c.info.workspace_step - 1;
                return "workspace_bytes is " + text(a.workspace_bytes) + "; this plan needs " +
                       text(c.info.workspace_step);
              },
              kSmall},
         });
}

TEST_CASE("step: negative slots may repeat, large pools are checked for duplicates") {
  powerattn_desc d = fixture::description();
  d.head_dim = d.value_dim = d.heads_q = d.heads_kv = 1;
  d.seq_len = 1;
  d.batch = 3;
  const fixture::Plan plan = fixture::make(d);
  const powerattn_plan_info info = fixture::query(plan.get());
  const int64_t pool = 200000;
  std::vector<float> s(pool), z(pool), q(3), k(3), v(3), y(3);
  const fixture::Buffer workspace(info.workspace_step + 1);
  powerattn_step_args a = {};
  a.struct_size = sizeof(a);
  a.q = {q.data(), 1, 1, 1};
  a.k = {k.data(), 1, 1, 1};
  a.v = {v.data(), 1, 1, 1};
  a.y = {y.data(), 1, 1, 1};
  a.state = {s.data(), z.data(), 1, 1, 1, 1};
  a.num_slots = pool;
  a.workspace = workspace.data();
  a.workspace_bytes = info.workspace_step;

  int64_t slots[3] = {-1, -1, 7};
  a.slots = slots;
  CHECK(powerattn_step(plan.get(), &a) == POWERATTN_OK);
  a.num_slots = 150000;  // the least number is negative like any other (no overflow on the way)
  slots[0] = slots[1] = INT64_MIN;
  CHECK(powerattn_step(plan.get(), &a) == POWERATTN_OK);
  a.num_slots = pool;
  slots[0] = slots[1] = 199999;  // more windows of slots than sequences: compared pair by pair
  CHECK(powerattn_step(plan.get(), &a) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "slots[0] and [1] are both 199999; slots must be different");
  a.num_slots = 150000;  // fewer: by bitmap
  slots[0] = slots[2] = 149999, slots[1] = 5;
  CHECK(powerattn_step(plan.get(), &a) == kInvalid);
  CHECK(std::string(powerattn_last_error()) ==
        "slots[2] is 149999 for the second time; slots must be different");
}

TEST_CASE("summary: one wrong argument at a time") {
  using A = powerattn_summary_args;
  run<A>(fixture::description(), &Calls::summary, powerattn_summary,
         {
             {[](A &a, Calls &) {
               a.reserved = 1;
               return "reserved is 1; it must be 0";
             }},
             {[](A &a, Calls &) {
               a.k.data = nullptr;
               return "k.data is NULL; float32 [2, 5, 2, 8] is required here";
             }},
             {[](A &a, Calls &) {
               a.state = {};
               return "state.s is NULL; float32 [2, 2, 36, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.total_log_g = shifted(a.total_log_g, 2);
               return "total_log_g is " + address(a.total_log_g) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.total_log_g = a.log_g.data;
               return std::string("total_log_g overlaps log_g") + kShared;
             }},
             {[](A &a, Calls &) {
               a.state.s = a.v.data;
               return std::string("state.s overlaps v") + kShared;
             }},
             {[](A &a, Calls &c) {
                a.workspace_bytes = c.info.workspace_summary - 1;
                return "workspace_bytes is " + text(a.workspace_bytes) + "; this plan needs " +
                       text(c.info.workspace_summary);
              },
              kSmall},
         });
}

TEST_CASE("summary_reverse: one wrong argument at a time") {
  using A = powerattn_summary_reverse_args;
  run<A>(fixture::description(), &Calls::reverse, powerattn_summary_reverse,
         {
             {[](A &a, Calls &) {
               a.reserved = 1;
               return "reserved is 1; it must be 0";
             }},
             {[](A &a, Calls &) {
               a.q.data = nullptr;
               return "q.data is NULL; float32 [2, 5, 4, 8] is required here";
             }},
             {[](A &a, Calls &) {
               a.y.data = nullptr;
               return "y.data is NULL; float32 [2, 5, 4, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.row_norm.data = nullptr;
               return "row_norm.data is NULL; float32 [2, 5, 4, 1] is required here";
             }},
             {[](A &a, Calls &) {
               a.d_state.s = nullptr;
               return "d_state.s is NULL; float32 [2, 2, 36, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.d_state.z = a.d_y.data;
               return std::string("d_state.z overlaps d_y") + kShared;
             }},
         });
}

TEST_CASE("compose: one wrong argument at a time") {
  using A = powerattn_compose_args;
  run<A>(fixture::description(), &Calls::compose, powerattn_state_compose,
         {
             {[](A &a, Calls &) {
               a.reserved = 1;
               return "reserved is 1; it must be 0";
             }},
             {[](A &a, Calls &) {
               a.count = -1;
               return "count is -1; it must be >= 0";
             }},
             {[](A &a, Calls &) {
               a.segments = {};
               return "segments.s is NULL; it may be NULL only with count 0";
             }},
             {[](A &a, Calls &) {
               a.segments.z = nullptr;
               return "segments.z is NULL; a normalised state has z";
             }},
             {[](A &a, Calls &) {
               a.s_stride_segment = INT64_MAX / 2;
               return "segments.s.s_stride_segment is 4611686018427387903; in bytes it does not fit in int64_t";
             }},
             {[](A &a, Calls &) {
               a.out = {};
               return "out.s is NULL; float32 [2, 2, 36, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.out.s = a.segments.s;
               return std::string("out.s overlaps segments.s") + kShared;
             }},
             {[](A &a, Calls &) {
               a.log_g = shifted(a.log_g, 1);
               return "log_g is " + address(a.log_g) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.out_log_g = const_cast<void *>(a.log_g);
               return std::string("out_log_g overlaps log_g") + kShared;
             }},
         });
}

TEST_CASE("convert: one wrong argument at a time") {
  using A = powerattn_convert_args;
  run<A>(fixture::description(), &Calls::convert, powerattn_state_convert,
         {
             {[](A &a, Calls &) {
               a.src_dtype = POWERATTN_FLOAT16;
               return "src_dtype is 2; allowed are 0, FLOAT32 (1), BFLOAT16 (3) and FLOAT64 (4)";
             }},
             {[](A &a, Calls &) {
               a.dst_dtype = -1;
               return "dst_dtype is -1; allowed are 0, FLOAT32 (1), BFLOAT16 (3) and FLOAT64 (4)";
             }},
             {[](A &a, Calls &) {
               a.reserved = -1;
               return "reserved is -1; it must be 0";
             }},
             {[](A &a, Calls &) {
               a.count = -1;
               return "count is -1; it must be >= 0";
             }},
             {[](A &a, Calls &) {
               a.src_num_slots = -1;
               return "src_num_slots is -1; it must be >= 0";
             }},
             {[](A &a, Calls &) {
               a.dst_num_slots = -1;
               return "dst_num_slots is -1; it must be >= 0";
             }},
             {[](A &a, Calls &) {
               a.src.s = nullptr;
               return "src.s is NULL; float32 [2, 2, 36, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.dst.z = nullptr;
               return "dst.z is NULL; a normalised state has z";
             }},
             {[](A &a, Calls &) {
               a.dst.s = a.src.s;
               return std::string("dst.s overlaps src.s") + kShared;
             }},
             {[](A &a, Calls &c) {
               a.src_slots = c.integers({2, 0});
               return "src_slots[0] is 2; there are 2 slots";
             }},
             {[](A &a, Calls &c) {
               a.dst_slots = c.integers({0, 0});
               return "dst_slots[1] is 0 for the second time; slots must be different";
             }},
             {[](A &a, Calls &) {
               a.src_slots = nullptr, a.count = 3;
               return "src_slots is NULL and there are 2 slots; 3 are needed";
             }},
         });
}
