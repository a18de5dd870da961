// SPDX-License-Identifier: Apache-2.0
// The operations of the fast CPU implementation.
#pragma once

#include "backend.h"

namespace powerattn {
namespace cpu {

powerattn_status forward(const powerattn_plan &plan, const powerattn_forward_args &args);
powerattn_status backward(const powerattn_plan &plan, const powerattn_backward_args &args);
powerattn_status summary(const powerattn_plan &plan, const powerattn_summary_args &args);
powerattn_status summary_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &args);

}  // namespace cpu
}  // namespace powerattn
