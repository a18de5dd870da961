# SPDX-License-Identifier: Apache-2.0
# The CUDA backend: POWERATTN_CUDA = AUTO | ON | OFF | EMULATED. Sets POWERATTN_HAVE_CUDA and POWERATTN_CUDA_LIBRARIES
# and offers powerattn_cuda_objects() for code of one architecture. EMULATED is for tests: the same sources as plain C++,
# on the device that tests/emulation makes of the host's CPU.

set(POWERATTN_HAVE_CUDA OFF)
set(POWERATTN_CUDA_EMULATED OFF)
set(POWERATTN_CUDA_LIBRARIES "")

string(TOUPPER "${POWERATTN_CUDA}" powerattn_cuda)
if(powerattn_cuda MATCHES "^(ON|TRUE|YES|1)$")
  set(powerattn_cuda ON)
elseif(powerattn_cuda MATCHES "^(OFF|FALSE|NO|0)$")
  set(powerattn_cuda OFF)
elseif(NOT powerattn_cuda MATCHES "^(AUTO|EMULATED)$")
  message(FATAL_ERROR "POWERATTN_CUDA is '${POWERATTN_CUDA}'; allowed are AUTO, ON and OFF")
endif()

if(NOT EXISTS "${PROJECT_SOURCE_DIR}/src/cuda/CMakeLists.txt")
  if(powerattn_cuda STREQUAL "ON")
    message(FATAL_ERROR "POWERATTN_CUDA=ON, but this source tree has no CUDA backend")
  endif()
  message(STATUS "powerattn: CUDA backend off (not in this source tree)")
elseif(powerattn_cuda STREQUAL "OFF")
  message(STATUS "powerattn: CUDA backend off (POWERATTN_CUDA=OFF)")
elseif(powerattn_cuda STREQUAL "EMULATED")
  set(POWERATTN_HAVE_CUDA ON)
  set(POWERATTN_CUDA_EMULATED ON)
  set(POWERATTN_INSTALL OFF)  # a library for tests; the emulated runtime is in no export set
  set(POWERATTN_CUDA_LIBRARIES powerattn_emulation)
  set(CUDAToolkit_INCLUDE_DIRS "${PROJECT_SOURCE_DIR}/tests/emulation/include")
  add_subdirectory("${PROJECT_SOURCE_DIR}/tests/emulation" "${PROJECT_BINARY_DIR}/tests/emulation")
  message(STATUS "powerattn: CUDA backend on an emulated device (for tests)")
else()
  # 80: mma + cp.async kernels; 90a: wgmma + TMA kernels (not forward compatible, so SASS only); the PTX of
  # 80 lets the generic kernels run on any newer device.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;80-virtual")
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit QUIET)
  endif()
  if(CMAKE_CUDA_COMPILER AND TARGET CUDA::cudart_static AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
    set(POWERATTN_HAVE_CUDA ON)
    set(POWERATTN_CUDA_LIBRARIES CUDA::cudart_static)
    message(STATUS "powerattn: CUDA backend on (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, "
                   "architectures ${CMAKE_CUDA_ARCHITECTURES})")
  else()
    if(NOT CMAKE_CUDA_COMPILER)
      set(reason "no CUDA compiler found; set CUDACXX or put nvcc on PATH")
    elseif(NOT TARGET CUDA::cudart_static)
      set(reason "nvcc found, but the toolkit has no static runtime (cudart_static)")
    else()
      set(reason "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0")
    endif()
    if(powerattn_cuda STREQUAL "ON")
      message(FATAL_ERROR "POWERATTN_CUDA=ON, but ${reason}")
    endif()
    message(STATUS "powerattn: CUDA backend off (${reason}); building the CPU library")
  endif()
endif()

# powerattn_cuda_objects(<name> ARCHITECTURES <list> SOURCES <files>): an object library of the CUDA backend
# compiled for these architectures only, linked into the library.
function(powerattn_cuda_objects name)
  cmake_parse_arguments(arg "" "" "ARCHITECTURES;SOURCES" ${ARGN})
  add_library(${name} OBJECT ${arg_SOURCES})
  if(POWERATTN_CUDA_EMULATED)  # as C++; the emulator's headers before those of the same name
    set_source_files_properties(${arg_SOURCES} PROPERTIES LANGUAGE CXX)
    target_include_directories(${name} BEFORE PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_compile_options(${name} PRIVATE -x c++ ${POWERATTN_EMULATION_OPTIONS})
    target_compile_definitions(${name} PRIVATE __CUDA_ARCH__=900)
  endif()
  target_include_directories(${name} PRIVATE
    "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/src" "${PROJECT_SOURCE_DIR}/kernels/common"
    "${PROJECT_SOURCE_DIR}" ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_features(${name} PRIVATE cxx_std_17 $<$<NOT:$<BOOL:${POWERATTN_CUDA_EMULATED}>>:cuda_std_17>)
  target_compile_definitions(${name} PRIVATE POWERATTN_BUILDING POWERATTN_HAVE_CUDA=1)
  target_link_libraries(${name} PRIVATE powerattn_options)
  set_target_properties(${name} PROPERTIES
    POSITION_INDEPENDENT_CODE ON
    CUDA_ARCHITECTURES "${arg_ARCHITECTURES}"
    CUDA_SEPARABLE_COMPILATION OFF
    CXX_VISIBILITY_PRESET hidden
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  set_property(GLOBAL APPEND PROPERTY POWERATTN_OBJECT_LIBRARIES ${name})
endfunction()
