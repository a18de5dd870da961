# SPDX-License-Identifier: Apache-2.0
# Format and static checks of the C, C++ and CUDA sources, by tools of pinned versions.

c_sources() { git ls-files --cached --others --exclude-standard -- '*.c' '*.cpp' '*.h' '*.cu' '*.cuh'; }

# The public header and the C99 test that mirrors it keep their aligned comments; generated and binding
# sources have formatters of their own.
formatted_sources() { c_sources | grep -v -e '^include/' -e '^tests/validation/c99.c$' -e '^bindings/'; }

format_c() {
  need_venv format scripts/requirements-format.txt
  formatted_sources | xargs "$VENV/bin/clang-format" -i
}

check_format() {
  need_venv format scripts/requirements-format.txt
  formatted_sources | xargs "$VENV/bin/clang-format" --dry-run --Werror
}

check_shell() { bash -n dev .ci/run scripts/*.sh; }

check_includes() { cmake "-DROOT=$ROOT" -P tests/abi/include_direction.cmake; }

# clang-tidy over the library's own C++ (the checks are in .clang-tidy), the host side of CUDA on the emulated device's
# headers; a minute or two, so not a part of the tests.
check_tidy() {
  need_apt clang-tidy-16
  quietly tidy-configure cmake -S . -B "$BUILD/tidy" -G Ninja -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DPOWERATTN_CUDA=EMULATED \
    -DPOWERATTN_BUILD_TESTS=OFF -DPOWERATTN_BUILD_BENCH=OFF -DPOWERATTN_BUILD_EXAMPLES=OFF
  git ls-files -- 'src/*.cpp' 'kernels/cpu/*.cpp' |
    xargs -P "$JOBS" -n 1 clang-tidy-16 --quiet --warnings-as-errors='*' -p "$BUILD/tidy"
}

lint_c() {
  need_build_tools
  check_shell
  say "shell scripts parse"
  check_includes
  say "include directions"
  check_format
  say "clang-format"
  check_tidy
  say "clang-tidy"
}
