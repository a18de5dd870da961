# SPDX-License-Identifier: Apache-2.0
# Install components: runtime (the library) and devel (header, CMake package, pkg-config file, static library).
include(CMakePackageConfigHelpers)

set(powerattn_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/powerattn")
set(powerattn_targets powerattn)
if(POWERATTN_BUILD_STATIC)
  list(APPEND powerattn_targets powerattn_static)
endif()

install(TARGETS ${powerattn_targets} EXPORT powerattnTargets
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime NAMELINK_COMPONENT devel
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT devel
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}" COMPONENT runtime)
install(FILES "${PROJECT_SOURCE_DIR}/include/power_attention.h"
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT devel)
install(EXPORT powerattnTargets NAMESPACE powerattn:: DESTINATION "${powerattn_package_dir}" COMPONENT devel)

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/powerattnConfig.cmake.in" "${PROJECT_BINARY_DIR}/powerattnConfig.cmake"
  INSTALL_DESTINATION "${powerattn_package_dir}" NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may break; from then on a major one.
if(PROJECT_VERSION_MAJOR EQUAL 0)
  set(powerattn_compatibility SameMinorVersion)
else()
  set(powerattn_compatibility SameMajorVersion)
endif()
write_basic_package_version_file("${PROJECT_BINARY_DIR}/powerattnConfigVersion.cmake"
  COMPATIBILITY ${powerattn_compatibility})
install(FILES "${PROJECT_BINARY_DIR}/powerattnConfig.cmake" "${PROJECT_BINARY_DIR}/powerattnConfigVersion.cmake"
  DESTINATION "${powerattn_package_dir}" COMPONENT devel)

# powerattn.pc finds its prefix from its own place, so the tree can be moved.
file(RELATIVE_PATH powerattn_pc_prefix "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
string(REGEX REPLACE "/$" "" powerattn_pc_prefix "${powerattn_pc_prefix}")
set(powerattn_pc_private "-lstdc++ -lm -ldl -lpthread")
if(POWERATTN_HAVE_CUDA)
  set(powerattn_pc_private "-lcudart_static -lrt ${powerattn_pc_private}")
endif()
configure_file("${PROJECT_SOURCE_DIR}/cmake/powerattn.pc.in" "${PROJECT_BINARY_DIR}/powerattn.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/powerattn.pc"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig" COMPONENT devel)
