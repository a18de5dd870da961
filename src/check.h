// SPDX-License-Identifier: Apache-2.0
// Validation: one flat list of named checks for each call, before anything is done. A check reports through
// fail() what the argument is called, what it was and what is allowed; on refusal nothing has been written.
#pragma once

#include "backend.h"

namespace powerattn {

constexpr int64_t kMaxDim = 256;
constexpr int32_t kMaxDegree = 8;
constexpr int32_t kMaxThreads = 1024;
constexpr uint64_t kBufferAlignment = 256;  // workspace and saved

powerattn_status check_desc(const powerattn_desc &d);
powerattn_status check_forward(const powerattn_plan &plan, const powerattn_forward_args &a);
powerattn_status check_backward(const powerattn_plan &plan, const powerattn_backward_args &a);
powerattn_status check_step(const powerattn_plan &plan, const powerattn_step_args &a);
powerattn_status check_summary(const powerattn_plan &plan, const powerattn_summary_args &a);
powerattn_status check_summary_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &a);
powerattn_status check_compose(const powerattn_plan &plan, const powerattn_compose_args &a);
powerattn_status check_convert(const powerattn_plan &plan, const powerattn_convert_args &a);
powerattn_status check_pack(const powerattn_plan &plan, const powerattn_pack_args &a);
powerattn_status check_unpack(const powerattn_plan &plan, const powerattn_pack_args &a);

// dtype of packed numbers (0 = state_dtype) and the bytes of a packed block.
powerattn_status check_pack_dtype(const Problem &p, int32_t dtype, Dtype *packed);
powerattn_status check_pack_count(const Problem &p, Dtype packed, int64_t count, uint64_t *bytes);

}  // namespace powerattn
