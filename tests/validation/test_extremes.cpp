// SPDX-License-Identifier: Apache-2.0
// Legal, but at the edge of the numbers: positions and strides that overflow where they are multiplied or added
// carelessly. The sanitizers judge; the values are judged where they are defined.
#include <cmath>

#include "fixture.h"

using fixture::Calls;

namespace {

// With float32 states the fast kernels run, with bfloat16 states the reference.
std::vector<powerattn_desc> with_both_states(powerattn_desc d) {
  std::vector<powerattn_desc> all = {d, d};
  all[1].state_dtype = POWERATTN_BFLOAT16;  // half as large as the fixture's memory
  return all;
}

void accepted(const Calls &c) {
  const powerattn_plan *plan = c.plan.get();
  const powerattn_status statuses[] = {
      powerattn_forward(plan, &c.forward),
      powerattn_backward(plan, &c.backward),
      c.desc.sequences > 0 ? POWERATTN_OK : powerattn_step(plan, &c.step),
      powerattn_summary(plan, &c.summary),
      powerattn_summary_reverse(plan, &c.reverse),
  };
  for (const powerattn_status status : statuses) {
    INFO(powerattn_last_error());
    CHECK(status == POWERATTN_OK);
  }
}

}  // namespace

TEST_CASE("extremes: any position of the rotary embedding") {
  for (powerattn_desc d : with_both_states(fixture::description())) {
    for (const int64_t position : {INT64_MAX, INT64_MIN, INT64_MAX - 2}) {
      d.rope_style = POWERATTN_ROPE_HALF;
      Calls c(d);
      c.forward.rope_offset = c.integers({position, position});
      c.backward.rope_offset = c.step.rope_offset = c.summary.rope_offset = c.reverse.rope_offset =
          c.forward.rope_offset;
      accepted(c);
    }
  }
}

TEST_CASE("extremes: strides of dimensions with one index are never used") {
  for (powerattn_desc d : with_both_states(fixture::packed_description())) {
    d.seq_len = d.max_seq_len = 1;
    d.heads_q = d.heads_kv = 1;
    Calls c(d);
    // The second and third sequence begin past the last token.
    c.forward.cu_seqlens = c.integers({0, 1, 1, 1});
    c.backward.cu_seqlens = c.summary.cu_seqlens = c.reverse.cu_seqlens = c.forward.cu_seqlens;
    const int64_t far = INT64_MAX - 7;
    for (powerattn_tensor *t :
         {&c.forward.q,        &c.forward.k,         &c.forward.v,    &c.forward.log_g,    &c.forward.y,
          &c.forward.row_norm, &c.backward.q,        &c.backward.k,   &c.backward.v,       &c.backward.log_g,
          &c.backward.y,       &c.backward.row_norm, &c.backward.d_y, &c.backward.d_q,     &c.backward.d_k,
          &c.backward.d_v,     &c.backward.d_log_g,  &c.summary.k,    &c.summary.v,        &c.summary.log_g,
          &c.reverse.q,        &c.reverse.log_g,     &c.reverse.y,    &c.reverse.row_norm, &c.reverse.d_y}) {
      t->stride_b = t->stride_t = t->stride_h = far;
    }
    accepted(c);
    for (powerattn_state *s : {&c.forward.final_state, &c.summary.state}) s->s_stride_h = s->z_stride_h = -far;
    accepted(c);
  }
}

TEST_CASE("extremes: an offset past the last token of a batch of one") {
  powerattn_desc d = fixture::description();
  d.batch = 1;
  d.seq_len = 1;
  Calls c(d);
  for (powerattn_tensor *t : {&c.step.q, &c.step.k, &c.step.v, &c.step.log_g, &c.step.y}) {
    t->stride_b = INT64_MIN;
    t->stride_t = INT64_MAX;
  }
  c.step.slots = c.integers({INT64_MIN});
  c.step.lengths = nullptr;
  CHECK(powerattn_step(c.plan.get(), &c.step) == POWERATTN_OK);
  const auto *y = static_cast<const float *>(c.step.y.data);  // a skipped sequence: zeros
  for (int i = 0; i < 4 * 6; ++i) CHECK(y[i] == 0);
}
