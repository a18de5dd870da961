# SPDX-License-Identifier: Apache-2.0
# What runs before a kernel set is chosen runs on any x86-64-v2 processor: no object but the isa_* ones has an
# instruction of AVX or later, and those share no function with the rest of the library (a weak copy of an inline
# function, compiled for AVX-512, could be the one that the linker keeps). cmake -DOBJECTS=FILE -P this
cmake_minimum_required(VERSION 3.24)

file(STRINGS "${OBJECTS}" objects)
set(plain 0)
set(wide 0)
foreach(object IN LISTS objects)
  if(object MATCHES "/isa_(avx2|avx512|amx)\\.cpp\\.")
    math(EXPR wide "${wide} + 1")
    execute_process(COMMAND nm --defined-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
    list(FILTER weak EXCLUDE REGEX "9powerattn(4avx2|6avx512|3amx)")  # the set's own namespace
    if(weak)
      list(JOIN weak "\n  " text)
      message(FATAL_ERROR "${object} defines symbols that another file may share:\n  ${text}")
    endif()
  elseif(object MATCHES "\\.cpp\\.o")
    math(EXPR plain "${plain} + 1")
    # AVX and later are VEX or EVEX encoded: their mnemonics begin with v (verr, verw and vm* are no user code), or they
    # are BMI, FMA and tile instructions.
    execute_process(COMMAND objdump -d --no-show-raw-insn "${object}" OUTPUT_VARIABLE code COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "\t(v[a-z0-9]+|andn|bextr|bls[a-z]+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|tzcnt|movbe|tile[a-z]+|tdp[a-z0-9]+)[ \n]"
      found "${code}")
    if(found)
      list(REMOVE_DUPLICATES found)
      message(FATAL_ERROR "${object} has instructions beyond x86-64-v2: ${found}")
    endif()
  endif()
endforeach()
if(plain LESS 10 OR wide LESS 2)
  message(FATAL_ERROR "only ${plain} plain and ${wide} wide objects: the check is not looking at the library")
endif()
message(STATUS "${plain} objects of x86-64-v2, ${wide} of wider sets that share nothing")
