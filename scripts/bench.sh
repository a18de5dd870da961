# SPDX-License-Identifier: Apache-2.0
# The CPU benchmarks: ratios against this machine's own matrix multiply and copy rates, measured in one run.
bench() {
  need_build_tools
  # The peers that the ratios are taken against: sgemm, loaded at run time, and a bfloat16 multiply.
  need_apt libopenblas0-pthread libdnnl-dev
  cmake_build "$BUILD/bench" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_BUILD_TESTS=OFF -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DPOWERATTN_BUILD_BENCH=ON -DPOWERATTN_CUDA=OFF
  mkdir -p "$BUILD/bench/results"
  "$BUILD/bench/bench/bench_cpu" --csv "$BUILD/bench/results/cpu.csv" "$@"
  say "table: $BUILD/bench/results/cpu.csv; a plot of it: python3 bench/plot.py $BUILD/bench/results/cpu.csv"
}
