# SPDX-License-Identifier: Apache-2.0
# The library on the CPU: every CTest label, the sanitizers, the fuzzer, the checks of the tree, the documentation.

core_tools() {
  need_build_tools
  need_apt doctest-dev abigail-tools binutils python3
}

core_setup() {
  core_tools
  need_apt clang-16 libclang-rt-16-dev doxygen
  if foreign_machines; then need_apt g++-aarch64-linux-gnu qemu-user; fi
  . scripts/lint.sh
  . scripts/docs.sh
  say "building: Release"
  build_library ON
  say "building: address and undefined-behaviour sanitizers"
  core_sanitized asan "address;undefined" -DPOWERATTN_EMULATE_ISA=ON
  say "building: thread sanitizer"
  TARGETS="test_concurrency test_pipeline test_properties" core_sanitized tsan thread
}

# core_sanitized folder sanitizers option...: a sanitized build of the library and its tests, quick to compile, with
# line numbers. One of them emulates the AVX-512 and AMX kernels, so that they are tested on every machine.
core_sanitized() {
  cmake_build "$BUILD/$1" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="-O1 -g1" -DPOWERATTN_SANITIZE="$2" -DPOWERATTN_CUDA=OFF \
    -DPOWERATTN_BUILD_BENCH=OFF -DPOWERATTN_BUILD_EXAMPLES=OFF "${@:3}"
}

core_ctest() {
  local folder=$1
  shift
  run_counted ctest ctest --test-dir "$folder" -j "$JOBS" --no-tests=error --output-on-failure --timeout 900 "$@"
}

core_test() {
  say "tests: Release"
  core_ctest "$LIBRARY_BUILD" -LE 'gpu|fuzz'
  say "tests: address and undefined-behaviour sanitizers"
  ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    core_ctest "$BUILD/asan" -L core
  say "tests: thread sanitizer, concurrent use"
  TSAN_OPTIONS=halt_on_error=1 core_ctest "$BUILD/tsan" -L core -R '^concurrent|^lanes|number of threads'
  if [ -f tests/fuzz/CMakeLists.txt ]; then
    check "fuzzing the descriptions and arguments, 60 s" core_fuzz
  fi
  if foreign_machines; then
    check "a processor of x86-64-v2 runs the library" core_x86_64_v2
    check "aarch64: builds, and runs under qemu" core_aarch64
  fi
  check "clang-format" check_format
  check "shell scripts parse" check_shell
  check "documentation builds without warnings" docs_build
  check "examples of the documentation compile and run" core_doc_examples
  check "demo, short: gradients by finite differences" "$LIBRARY_BUILD/examples/train_lm" --check-gradients
  check "demo, short: trains, generates, time per token" "$LIBRARY_BUILD/examples/train_lm" --short
}

core_fuzz() {
  cmake_build "$BUILD/fuzz" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_COMPILER=clang-16 -DCMAKE_CXX_COMPILER=clang++-16 \
    -DPOWERATTN_SANITIZE="address;undefined" -DPOWERATTN_BUILD_FUZZ=ON -DPOWERATTN_CUDA=OFF -DPOWERATTN_BUILD_BENCH=OFF \
    -DPOWERATTN_BUILD_EXAMPLES=OFF
  local failed=$BUILD/fuzz/tests/fuzz/failed- artifact
  rm -f "$failed"*
  if ctest --test-dir "$BUILD/fuzz" -L fuzz --no-tests=error --output-on-failure; then return 0; fi
  for artifact in "$failed"*; do
    [ -e "$artifact" ] || continue
    echo "replay with: base64 -d >unit <<<TEXT && $BUILD/fuzz/tests/fuzz/fuzz_api unit   ($(basename "$artifact"))"
    base64 -w 0 "$artifact"
    echo
  done
  return 1
}

# On x86-64 the other machines that the library is for are emulated.
foreign_machines() { [ "$(uname -m)" = x86_64 ]; }

core_x86_64_v2() {
  qemu-x86_64 -cpu Nehalem "$LIBRARY_BUILD/tests/numerics/test_cases" "--test-case=cases: smoke"
}

core_aarch64() {
  TARGETS="powerattn_c99 test_cases" cmake_build "$BUILD/aarch64" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_WERROR=ON \
    -DCMAKE_TOOLCHAIN_FILE="$ROOT/cmake/aarch64-linux-gnu.cmake" -DPOWERATTN_CUDA=OFF -DPOWERATTN_BUILD_BENCH=OFF \
    -DPOWERATTN_BUILD_EXAMPLES=OFF
  qemu-aarch64 -L /usr/aarch64-linux-gnu "$BUILD/aarch64/tests/validation/powerattn_c99"
  qemu-aarch64 -L /usr/aarch64-linux-gnu "$BUILD/aarch64/tests/numerics/test_cases" "--test-case=cases: smoke,cases: wide"
}

core_doc_examples() {
  python3 scripts/doc_examples.py "$LIBRARY_PREFIX" "$BUILD/doc-examples" README.md docs/*.md
}
