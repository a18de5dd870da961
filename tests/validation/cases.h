// SPDX-License-Identifier: Apache-2.0
// Tables of refused arguments: each case breaks one thing in arguments that are accepted, and says what is due.
#pragma once

#include <functional>

#include "fixture.h"

namespace cases {

using fixture::address;
using fixture::Calls;
using fixture::shifted;

inline constexpr powerattn_status kInvalid = POWERATTN_ERROR_INVALID_ARGUMENT;
inline constexpr powerattn_status kSmall = POWERATTN_ERROR_WORKSPACE_TOO_SMALL;

// One refusal: `change` breaks the arguments and returns the message that is due.
template <class Args>
struct Case {
  std::function<std::string(Args &, Calls &)> change;
  powerattn_status status = kInvalid;
};

template <class Args>
using Call = powerattn_status (*)(const powerattn_plan *, const Args *);

template <class Args>
void run(const powerattn_desc &desc, Args Calls::*member, Call<Args> call,
         const std::vector<Case<Args>> &cases) {
  Calls calls(desc);
  const Args good = calls.*member;
  for (const Case<Args> &c : cases) {
    Args args = good;
    const std::string message = c.change(args, calls);
    const powerattn_status status = call(calls.plan.get(), &args);
    CHECK(std::string(powerattn_last_error()) == message);
    CHECK(status == c.status);
    CHECK(calls.untouched());
  }

  CHECK(call(nullptr, &good) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "plan is NULL");
  CHECK(call(calls.plan.get(), nullptr) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "args is NULL");
  Args sized = good;
  sized.struct_size -= 8;
  CHECK(call(calls.plan.get(), &sized) == kInvalid);
  CHECK(std::string(powerattn_last_error()) == "args->struct_size is " + std::to_string(sizeof(Args) - 8) +
                                                   "; it must be " + std::to_string(sizeof(Args)) +
                                                   " (sizeof the struct)");
  CHECK(calls.untouched());

  const powerattn_status status = call(calls.plan.get(), &good);
  CHECK(std::string(powerattn_last_error()) == "");
  CHECK(status == POWERATTN_OK);
  CHECK_FALSE(calls.untouched());
}

inline std::string text(uint64_t n) { return std::to_string(n); }

inline constexpr const char *kShared = "; an output may not share memory with another tensor";

}  // namespace cases
