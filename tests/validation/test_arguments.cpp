// SPDX-License-Identifier: Apache-2.0
// Forward and backward with one wrong argument at a time: the exact status and message, and no output touched.
#include "cases.h"

using namespace cases;

TEST_CASE("forward: one wrong argument at a time") {
  using A = powerattn_forward_args;
  run<A>(fixture::description(), &Calls::forward, powerattn_forward,
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
               a.q.data = shifted(a.q.data, 2);
               return "q is " + address(a.q.data) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.log_g.data = shifted(a.log_g.data, 1);
               return "log_g is " + address(a.log_g.data) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.q.stride_t = INT64_MAX / 2;
               return "q.stride_t is 4611686018427387903; in bytes it does not fit in int64_t";
             }},
             {[](A &a, Calls &) {
               a.k.stride_b = INT64_MAX / 4;
               return "k reaches farther than int64_t bytes with its strides";
             }},
             {[](A &a, Calls &) {
               a.v.stride_t = -(INT64_C(1) << 58);
               return "v reaches farther than int64_t bytes with its strides";
             }},
             {[](A &a, Calls &) {
               a.y.stride_h = 5;
               return "y overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.y.stride_t = 0;
               return "y overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.row_norm.stride_b = a.row_norm.stride_t;
               return "row_norm overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.y = a.q;
               a.y.stride_h = 8;
               return std::string("y overlaps q") + kShared;
             }},
             {[](A &a, Calls &) {
               a.row_norm.data = a.log_g.data;
               return std::string("row_norm overlaps log_g") + kShared;
             }},
             {[](A &a, Calls &) {
               a.final_state.z = a.final_state.s;
               return std::string("final_state.z overlaps final_state.s") + kShared;
             }},
             {[](A &a, Calls &) {  // shifted by one sequence: neither apart nor the same
               a.final_state.s = shifted(a.initial_state.s, 4 * a.initial_state.s_stride_n);
               return std::string("final_state.s overlaps initial_state.s") + kShared;
             }},
             {[](A &a, Calls &) {
               a.initial_state.z = nullptr;
               return "initial_state.z is NULL; a normalised state has z";
             }},
             {[](A &a, Calls &) {
               a.final_state.s = nullptr;
               return "final_state.z is given, but final_state.s is NULL";
             }},
             {[](A &a, Calls &) {
               a.final_state.s = shifted(a.final_state.s, 2);
               return "final_state.s is " + address(a.final_state.s) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.final_state.s_stride_h = a.final_state.s_stride_h - 1;
               return "final_state.s overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.cu_seqlens = a.rope_offset;
               return "cu_seqlens is given; the plan has no packed sequences";
             }},
             {[](A &a, Calls &) {
               a.rope_offset = shifted(a.rope_offset, 4);
               return "rope_offset is " + address(a.rope_offset) + "; it must be aligned to 8 bytes";
             }},
             {[](A &a, Calls &c) {
                a.workspace_bytes = c.info.workspace_forward - 1;
                return "workspace_bytes is " + text(a.workspace_bytes) + "; this plan needs " +
                       text(c.info.workspace_forward);
              },
              kSmall},
             {[](A &a, Calls &c) {
               a.workspace = nullptr;
               return "workspace is NULL; " + text(c.info.workspace_forward) + " bytes are required here";
             }},
             {[](A &a, Calls &) {
               a.workspace = shifted(a.workspace, 128);
               return "workspace is " + address(a.workspace) + "; it must be aligned to 256 bytes";
             }},
             {[](A &a, Calls &) {
               a.y.data = shifted(a.workspace, 16);
               return std::string("workspace overlaps y") + kShared;
             }},
             {[](A &a, Calls &) {
               a.stream = reinterpret_cast<void *>(4096);
               return "stream is 0x1000; it must be NULL on the CPU";
             }},
         });
}

TEST_CASE("forward: states need the flag") {
  powerattn_desc d = fixture::description();
  Calls calls(d);
  d.flags = 0;
  const fixture::Plan plan = fixture::make(d);
  CHECK(powerattn_forward(plan.get(), &calls.forward) == kInvalid);
  CHECK(std::string(powerattn_last_error()) ==
        "initial_state is given; the plan was made without POWERATTN_USE_STATE");
  calls.forward.initial_state = {};
  CHECK(powerattn_forward(plan.get(), &calls.forward) == kInvalid);
  CHECK(std::string(powerattn_last_error()) ==
        "final_state is given; the plan was made without POWERATTN_USE_STATE");
  calls.backward.initial_state = {};
  CHECK(powerattn_backward(plan.get(), &calls.backward) == kInvalid);
  CHECK(std::string(powerattn_last_error()) ==
        "d_final_state is given; the plan was made without POWERATTN_USE_STATE");
  CHECK(powerattn_step(plan.get(), &calls.step) == POWERATTN_ERROR_UNSUPPORTED);
  CHECK(std::string(powerattn_last_error()) == "this plan cannot run step: needs POWERATTN_USE_STATE");
  CHECK(calls.untouched());
}

TEST_CASE("forward: packed sequences") {
  using A = powerattn_forward_args;
  const auto with = [](std::vector<int64_t> values, const char *message) {
    return Case<A>{[values, message](A &a, Calls &c) {
      a.cu_seqlens = c.integers(values);
      return std::string(message);
    }};
  };
  run<A>(fixture::packed_description(), &Calls::forward, powerattn_forward,
         {
             {[](A &a, Calls &) {
               a.cu_seqlens = nullptr;
               return "cu_seqlens is NULL; 4 elements are required here";
             }},
             {[](A &a, Calls &) {
               a.cu_seqlens = shifted(a.cu_seqlens, 4);
               return "cu_seqlens is " + address(a.cu_seqlens) + "; it must be aligned to 8 bytes";
             }},
             with({1, 3, 3, 9}, "cu_seqlens[0] is 1; it must be 0"),
             with({-1, 3, 3, 9}, "cu_seqlens[0] is -1; it must be 0"),
             with({0, 3, 2, 8}, "cu_seqlens[2] is 2 after 3; it must not decrease"),
             with({0, -3, 3, 9}, "cu_seqlens[1] is -3 after 0; it must not decrease"),
             with({0, 3, 6, 11}, "cu_seqlens[3] is 11; it must be <= seq_len 10"),
             with({0, INT64_MAX, INT64_MAX, INT64_MAX},
                  "cu_seqlens[1] is 9223372036854775807; it must be <= seq_len 10"),
             with({0, 7, 7, 9}, "cu_seqlens[1] makes a sequence of 7 tokens; max_seq_len is 6"),
         });
}

TEST_CASE("backward: one wrong argument at a time") {
  using A = powerattn_backward_args;
  run<A>(fixture::description(), &Calls::backward, powerattn_backward,
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
               a.d_q.data = shifted(a.d_q.data, 1);
               return "d_q is " + address(a.d_q.data) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.d_log_g.data = shifted(a.d_log_g.data, 2);
               return "d_log_g is " + address(a.d_log_g.data) + "; it must be aligned to 4 bytes";
             }},
             {[](A &a, Calls &) {
               a.cu_seqlens = a.rope_offset;
               return "cu_seqlens is given; the plan has no packed sequences";
             }},
             {[](A &a, Calls &) {
               a.stream = reinterpret_cast<void *>(8);
               return "stream is 0x8; it must be NULL on the CPU";
             }},
             {[](A &a, Calls &c) {
               a.workspace = nullptr;
               return "workspace is NULL; " + text(c.info.workspace_backward) + " bytes are required here";
             }},
             {[](A &a, Calls &) {
               a.reserved = 7;
               return "reserved is 7; it must be 0";
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
               a.d_y.data = nullptr;
               return "d_y.data is NULL; float32 [2, 5, 4, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.d_q.data = nullptr;
               return "d_q.data is NULL; float32 [2, 5, 4, 8] is required here";
             }},
             {[](A &a, Calls &) {
               a.d_k.data = nullptr;
               return "d_k.data is NULL; float32 [2, 5, 2, 8] is required here";
             }},
             {[](A &a, Calls &) {
               a.d_v.data = nullptr;
               return "d_v.data is NULL; float32 [2, 5, 2, 6] is required here";
             }},
             {[](A &a, Calls &) {
               a.log_g.data = nullptr;
               return "d_log_g is given without log_g";
             }},
             {[](A &a, Calls &) {
               a.d_k.data = a.d_q.data;
               return std::string("d_k overlaps d_q") + kShared;
             }},
             {[](A &a, Calls &) {
               a.d_v.data = a.d_y.data;
               return std::string("d_v overlaps d_y") + kShared;
             }},
             {[](A &a, Calls &) {
               a.d_k.stride_b = 0;
               return "d_k overlaps itself: its strides put two elements at one address";
             }},
             {[](A &a, Calls &) {
               a.d_initial_state = a.d_final_state;
               return std::string("d_initial_state.s overlaps d_final_state.s") + kShared;
             }},
             {[](A &a, Calls &) {
               a.d_final_state.z = nullptr;
               return "d_final_state.z is NULL; a normalised state has z";
             }},
             {[](A &a, Calls &c) {
                a.workspace_bytes = c.info.workspace_backward - 1;
                return "workspace_bytes is " + text(a.workspace_bytes) + "; this plan needs " +
                       text(c.info.workspace_backward);
              },
              kSmall},
         });
}

TEST_CASE("saved: its size, alignment and overlap, in both directions") {
  powerattn_desc d = fixture::description();
  d.form = POWERATTN_FORM_CHUNKED;
  d.chunk_size = 2;
  Calls c(d);
  const uint64_t needed = c.info.saved_bytes;
  REQUIRE(needed > 256);
  const auto refused = [&](powerattn_status status, powerattn_status expected, const std::string &message) {
    CHECK(std::string(powerattn_last_error()) == message);
    CHECK(status == expected);
    CHECK(c.untouched());
  };
  const powerattn_plan *plan = c.plan.get();

  powerattn_forward_args f = c.forward;
  f.saved_bytes = needed - 1;
  refused(powerattn_forward(plan, &f), kSmall,
          "saved_bytes is " + text(needed - 1) + "; this plan needs " + text(needed));
  f = c.forward;
  f.saved = shifted(f.saved, 64);
  refused(powerattn_forward(plan, &f), kInvalid,
          "saved is " + address(f.saved) + "; it must be aligned to 256 bytes");
  f.saved = f.workspace;
  refused(powerattn_forward(plan, &f), kInvalid, std::string("workspace overlaps saved") + kShared);

  powerattn_backward_args b = c.backward;
  b.saved = c.forward.saved;
  b.saved_bytes = needed - 1;
  refused(powerattn_backward(plan, &b), kSmall,
          "saved_bytes is " + text(needed - 1) + "; this plan needs " + text(needed));
  b.saved_bytes = needed;
  b.workspace_bytes = c.info.workspace_backward_saved - 1;
  refused(powerattn_backward(plan, &b), kSmall,
          "workspace_bytes is " + text(b.workspace_bytes) + "; this plan needs " +
              text(c.info.workspace_backward_saved));
  b.workspace_bytes = c.info.workspace_backward;
  b.saved = b.workspace;
  refused(powerattn_backward(plan, &b), kInvalid, std::string("workspace overlaps saved") + kShared);

  CHECK(powerattn_forward(plan, &c.forward) == POWERATTN_OK);
  b.saved = c.forward.saved;
  b.workspace_bytes = c.info.workspace_backward_saved;
  CHECK(powerattn_backward(plan, &b) == POWERATTN_OK);
  CHECK(std::string(powerattn_last_error()) == "");
}

TEST_CASE("backward: slices of a packed d_qkv are legal outputs") {
  Calls calls(fixture::description());
  const int64_t row = 4 * 8 + 2 * 8 + 2 * 6;  // d_q, d_k, d_v of one token beside each other
  auto *data = static_cast<float *>(calls.raw(2 * 5 * row * 4, true));
  const auto slice = [&](int64_t first, int64_t inner) {
    return powerattn_tensor{data + first, 5 * row, row, inner};
  };
  powerattn_backward_args a = calls.backward;
  a.d_q = slice(0, 8);
  a.d_k = slice(32, 8);
  a.d_v = slice(48, 6);
  CHECK(powerattn_backward(calls.plan.get(), &a) == POWERATTN_OK);
  CHECK(std::string(powerattn_last_error()) == "");
  a.d_v = slice(47, 6);
  CHECK(powerattn_backward(calls.plan.get(), &a) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == std::string("d_v overlaps d_k") + kShared);
}

TEST_CASE("arguments: empty problems take NULL pointers") {
  for (const bool no_batch : {true, false}) {
    powerattn_desc d = fixture::description();
    d.flags = 0;
    (no_batch ? d.batch : d.seq_len) = 0;
    const fixture::Plan plan = fixture::make(d);
    const powerattn_plan_info info = fixture::query(plan.get());
    const fixture::Buffer workspace(info.workspace_forward + info.workspace_backward + 1);
    powerattn_forward_args f = {};
    f.struct_size = sizeof(f);
    f.workspace = workspace.data();
    f.workspace_bytes = workspace.bytes();
    CHECK(powerattn_forward(plan.get(), &f) == POWERATTN_OK);
    powerattn_backward_args b = {};
    b.struct_size = sizeof(b);
    b.workspace = workspace.data();
    b.workspace_bytes = workspace.bytes();
    CHECK(powerattn_backward(plan.get(), &b) == POWERATTN_OK);
    CHECK(std::string(powerattn_last_error()) == "");
  }
}

TEST_CASE("arguments: final_state in place of initial_state, broadcast inputs and negative strides are legal") {
  Calls calls(fixture::description());
  powerattn_forward_args a = calls.forward;
  a.final_state = a.initial_state;
  a.k.stride_t = 0;
  a.v.stride_h = 0;
  a.q.data = shifted(a.q.data, 4 * 4 * a.q.stride_t);
  a.q.stride_t = -a.q.stride_t;
  CHECK(powerattn_forward(calls.plan.get(), &a) == POWERATTN_OK);
  CHECK(std::string(powerattn_last_error()) == "");
}
