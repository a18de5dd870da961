# SPDX-License-Identifier: Apache-2.0
# The library with the emulated CUDA device of tests/emulation, for the bindings' device tests. Sourced.

# emulated_library: builds it and sets EMULATED_PATH, the folders for the loader. The folder and the options are those of
# the cuda part, which builds its tests there.
emulated_library() {
  local folder=$BUILD/emulation
  need_apt doctest-dev
  TARGETS=powerattn cmake_build "$folder" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=EMULATED \
    -DPOWERATTN_BUILD_EXAMPLES=OFF -DPOWERATTN_BUILD_BENCH=OFF
  EMULATED_PATH=$folder:$folder/tests/emulation
}
