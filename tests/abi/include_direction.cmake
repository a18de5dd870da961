# SPDX-License-Identifier: Apache-2.0
# One direction: include -> src (check, plan) -> backend cpu | cuda -> kernels. Resolves every #include "..." as
# the compiler would and compares the two folders with the table below. cmake -DROOT=... -P this
cmake_minimum_required(VERSION 3.24)

# folder of the including file : folders that it may include. Longest match first.
set(rules
  "include/:"
  "kernels/common/:include/ kernels/common/"
  "kernels/cpu/:include/ kernels/common/ kernels/cpu/"
  "kernels/cuda/:include/ kernels/common/ kernels/cuda/"
  "src/cpu/:include/ kernels/common/ kernels/cpu/ src/cpu/ src/backend.h src/status.h src/text.h src/cost.h src/state_layout.h"
  "src/cuda/:include/ kernels/common/ kernels/cuda/ src/cuda/ src/backend.h src/status.h src/text.h src/cost.h src/state_layout.h"
  "src/:include/ kernels/common/ src/[a-z_]+\\.h")

set(errors "")
set(checked 0)
file(GLOB_RECURSE sources RELATIVE "${ROOT}"
  "${ROOT}/include/*.h" "${ROOT}/src/*.h" "${ROOT}/src/*.cpp" "${ROOT}/src/*.cu" "${ROOT}/kernels/*.h"
  "${ROOT}/kernels/*.cpp" "${ROOT}/kernels/*.cu" "${ROOT}/kernels/*.cuh" "${ROOT}/kernels/*.inc")
foreach(source IN LISTS sources)
  set(allowed "none")
  foreach(rule IN LISTS rules)
    string(REGEX MATCH "^([^:]*):(.*)$" match "${rule}")
    set(folder "${CMAKE_MATCH_1}")
    set(targets "${CMAKE_MATCH_2}")
    if(allowed STREQUAL "none" AND source MATCHES "^${folder}")
      set(allowed "${targets}")
    endif()
  endforeach()
  cmake_path(GET source PARENT_PATH here)

  file(STRINGS "${ROOT}/${source}" lines REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS lines)
    if(line MATCHES "include[ \t]*\"([^\"]+)\"")
      set(name "${CMAKE_MATCH_1}")
      set(target "")
      foreach(base "${here}" include src kernels/common .)
        cmake_path(SET path NORMALIZE "${base}/${name}")
        if(NOT target AND EXISTS "${ROOT}/${path}")
          set(target "${path}")
        endif()
      endforeach()
      math(EXPR checked "${checked} + 1")
      if(NOT target)
        list(APPEND errors "${source} includes \"${name}\", which is nowhere in the tree")
        continue()
      endif()
      set(ok FALSE)
      separate_arguments(patterns UNIX_COMMAND "${allowed}")
      foreach(pattern IN LISTS patterns)
        if(target MATCHES "^${pattern}")
          set(ok TRUE)
        endif()
      endforeach()
      if(NOT ok)
        list(APPEND errors "${source} must not include ${target}")
      endif()
    elseif(line MATCHES "include[ \t]*<(cuda|nv|cub/|cutlass|mma)" AND NOT source MATCHES "^(src|kernels)/cuda/")
      list(APPEND errors "${source} includes a CUDA header: ${line}")
    elseif(source MATCHES "^include/" AND NOT line MATCHES "<std(def|int)\\.h>")
      list(APPEND errors "${source} may include <stddef.h> and <stdint.h> only: ${line}")
    endif()
  endforeach()

  file(STRINGS "${ROOT}/${source}" first LIMIT_COUNT 1)
  if(NOT first MATCHES "SPDX-License-Identifier: Apache-2.0")
    list(APPEND errors "${source} does not begin with its SPDX-License-Identifier")
  endif()
endforeach()

if(checked LESS 20)
  list(APPEND errors "only ${checked} includes found: the check is not looking at the tree")
endif()
if(errors)
  list(JOIN errors "\n  " text)
  message(FATAL_ERROR "\n  ${text}\n")
endif()
message(STATUS "${checked} includes follow the direction")
