// SPDX-License-Identifier: Apache-2.0
// Text of descriptions and reasons.
#pragma once

#include <string>

#include "status.h"

namespace powerattn {

// Appends as printf would print; at most 511 characters at a time.
void append(std::string *text, const char *format, ...) POWERATTN_PRINTF(2, 3);

}  // namespace powerattn
