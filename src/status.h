// SPDX-License-Identifier: Apache-2.0
// The thread-local message behind powerattn_last_error().
#pragma once

#include <cstdarg>

#include "power_attention.h"

namespace powerattn {

#if defined(__GNUC__)
#define POWERATTN_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define POWERATTN_PRINTF(f, a)
#endif

// Records the message and returns `status`. Never allocates: long messages are cut.
powerattn_status fail(powerattn_status status, const char *format, ...) POWERATTN_PRINTF(2, 3);

powerattn_status fail_list(powerattn_status status, const char *format, va_list arguments);

const char *last_error();
void clear_error();

}  // namespace powerattn
