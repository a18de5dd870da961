// SPDX-License-Identifier: Apache-2.0
// powerattn_step on CUDA, for every implementation of the table.
#pragma once

#include <string>

#include "common.h"

namespace powerattn::cuda {

bool step_supported(const Problem &p, const DeviceProperties &device, std::string *why);
size_t step_workspace(const Problem &p);
void describe_step(const Problem &p, std::string *text);
powerattn_status generic_step(const powerattn_plan &plan, const powerattn_step_args &args);

}  // namespace powerattn::cuda
