# SPDX-License-Identifier: Apache-2.0
# powerattn_options: build-only flags (warnings, sanitizers, coverage) of the library, tests and benchmarks.
# Nothing of it reaches a consumer.

add_library(powerattn_options INTERFACE)
set(host "$<COMPILE_LANGUAGE:C,CXX>")

target_compile_options(powerattn_options INTERFACE
  $<${host}:-Wall> $<${host}:-Wextra> $<${host}:-Wpointer-arith> $<${host}:-Wno-unused-parameter>)
if(POWERATTN_WERROR)
  target_compile_options(powerattn_options INTERFACE $<${host}:-Werror>)
endif()

if(POWERATTN_SANITIZE)
  list(JOIN POWERATTN_SANITIZE "," sanitizers)
  target_compile_options(powerattn_options INTERFACE
    $<${host}:-fsanitize=${sanitizers}> $<${host}:-fno-omit-frame-pointer> $<${host}:-fno-sanitize-recover=all>)
  target_link_options(powerattn_options INTERFACE -fsanitize=${sanitizers})
endif()

if(POWERATTN_COVERAGE)
  target_compile_options(powerattn_options INTERFACE $<${host}:--coverage>)
  target_link_options(powerattn_options INTERFACE --coverage)
endif()
