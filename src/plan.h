// SPDX-License-Identifier: Apache-2.0
// describe -> plan: resolves the defaults of a validated description and chooses how each operation runs.
#pragma once

#include <memory>

#include "backend.h"

namespace powerattn {

powerattn_status make_plan(const powerattn_desc &desc, std::unique_ptr<powerattn_plan> *plan);
void query_plan(const powerattn_plan &plan, powerattn_plan_info *info);

}  // namespace powerattn
