# SPDX-License-Identifier: Apache-2.0
# Builds the library and examples/train_lm.c, trains on a text and generates.
demo() {
  local text=${1:-}
  [ $# -gt 0 ] && shift
  if [ -n "$text" ] && [ ! -r "$text" ]; then fail "cannot read '$text'"; fi
  say "building the library and the example (a minute the first time)"
  need_build_tools
  cmake_build "$LIBRARY_BUILD-demo" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_BUILD_TESTS=OFF -DPOWERATTN_BUILD_BENCH=OFF \
    -DPOWERATTN_BUILD_EXAMPLES=ON -DPOWERATTN_CUDA=OFF
  say "training on ${text:-the licence texts of this machine}"
  if [ -n "$text" ]; then set -- --text "$text" "$@"; fi
  "$LIBRARY_BUILD-demo/examples/train_lm" "$@"
}
