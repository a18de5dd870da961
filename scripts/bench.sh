# SPDX-License-Identifier: Apache-2.0
# The CPU benchmarks. bench/run.sh knows the programs and their arguments; here they are built for speed.
bench() {
  need_build_tools
  # The peers that the ratios are taken against; where one is missing the program says so.
  need_apt libopenblas-dev libdnnl-dev
  cmake_build "$BUILD/bench" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_BUILD_TESTS=OFF -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DPOWERATTN_BUILD_BENCH=ON -DPOWERATTN_CUDA=OFF
  bash bench/run.sh "$BUILD/bench" "$@"
}
