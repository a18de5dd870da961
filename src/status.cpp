// SPDX-License-Identifier: Apache-2.0
// The thread-local message: a fixed buffer, so that reporting a failure cannot fail.
#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace powerattn {
namespace {

thread_local char message[1024] = "";

}  // namespace

powerattn_status fail(powerattn_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail_list(status, format, arguments);
  va_end(arguments);
  return status;
}

powerattn_status fail_list(powerattn_status status, const char *format, va_list arguments) {
  // The caller has started the list; the analyzer cannot see that.
  std::vsnprintf(message, sizeof(message), format, arguments);  // NOLINT(clang-analyzer-valist.Uninitialized)
  return status;
}

const char *last_error() { return message; }

void clear_error() { message[0] = '\0'; }

}  // namespace powerattn

extern "C" const char *powerattn_status_string(powerattn_status status) {
  switch (status) {
    case POWERATTN_OK:
      return "ok";
    case POWERATTN_ERROR_INVALID_ARGUMENT:
      return "invalid argument";
    case POWERATTN_ERROR_UNSUPPORTED:
      return "unsupported";
    case POWERATTN_ERROR_STATE_TOO_LARGE:
      return "state too large";
    case POWERATTN_ERROR_OUT_OF_MEMORY:
      return "out of memory";
    case POWERATTN_ERROR_WORKSPACE_TOO_SMALL:
      return "workspace too small";
    case POWERATTN_ERROR_NO_DEVICE:
      return "no such device";
    case POWERATTN_ERROR_DEVICE:
      return "device error";
    case POWERATTN_ERROR_VERSION:
      return "format version mismatch";
    case POWERATTN_ERROR_INTERNAL:
      return "internal error";
    default:
      return "unknown status";
  }
}
