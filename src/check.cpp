// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include "state_layout.h"

namespace powerattn {

powerattn_status check_desc(const powerattn_desc &) { return POWERATTN_OK; }
powerattn_status check_forward(const powerattn_plan &, const powerattn_forward_args &) { return POWERATTN_OK; }
powerattn_status check_backward(const powerattn_plan &, const powerattn_backward_args &) { return POWERATTN_OK; }
powerattn_status check_step(const powerattn_plan &, const powerattn_step_args &) { return POWERATTN_OK; }
powerattn_status check_summary(const powerattn_plan &, const powerattn_summary_args &) { return POWERATTN_OK; }
powerattn_status check_summary_reverse(const powerattn_plan &, const powerattn_summary_reverse_args &) {
  return POWERATTN_OK;
}
powerattn_status check_compose(const powerattn_plan &, const powerattn_compose_args &) { return POWERATTN_OK; }
powerattn_status check_convert(const powerattn_plan &, const powerattn_convert_args &) { return POWERATTN_OK; }
powerattn_status check_pack(const powerattn_plan &, const powerattn_pack_args &) { return POWERATTN_OK; }
powerattn_status check_unpack(const powerattn_plan &, const powerattn_pack_args &) { return POWERATTN_OK; }

powerattn_status check_pack_dtype(const Problem &p, int32_t dtype, Dtype *packed) {
  *packed = dtype == 0 ? p.state_dtype : static_cast<Dtype>(dtype);
  return POWERATTN_OK;
}
powerattn_status check_pack_count(const Problem &p, Dtype packed, int64_t count, uint64_t *bytes) {
  *bytes = packed_bytes(p, packed, count);
  return POWERATTN_OK;
}

}  // namespace powerattn
