# SPDX-License-Identifier: Apache-2.0
# Shared by ./dev and every scripts/<part>.sh; sourced, never run.
#
# A part is a file scripts/<part>.sh that defines
#   <part>_setup   installs and builds what the tests need; safe to repeat, quick when nothing changed
#   <part>_test    runs the tests; calls count_tests after each runner
# Both run with `set -eu -o pipefail` in a subshell of their own, from the repository root. The first command
# that fails fails the part. `skip_part "why"` ends a part that cannot run on this machine; with CI=true that
# is a failure, because CI must run everything.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${POWERATTN_CACHE:-$HOME/.cache/powerattn}
BUILD=${POWERATTN_BUILD:-$ROOT/build}
JOBS=${POWERATTN_JOBS:-$(nproc)}
mkdir -p "$CACHE"
export CCACHE_DIR=${CCACHE_DIR:-$CACHE/ccache}
# Paths relative to the tree, so that another clone finds what this one compiled.
export CCACHE_BASEDIR=$ROOT CCACHE_NOHASHDIR=true
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
export CMAKE_BUILD_PARALLEL_LEVEL=$JOBS
START_SECONDS=${START_SECONDS:-$(date +%s)}
export START_SECONDS

if [ -t 1 ]; then BOLD=$'\e[1m' GREEN=$'\e[32m' RED=$'\e[31m' PLAIN=$'\e[0m'; else BOLD='' GREEN='' RED='' PLAIN=''; fi

elapsed() {
  local s=$(($(date +%s) - START_SECONDS))
  printf '%d:%02d' $((s / 60)) $((s % 60))
}
say() { printf '%s[%s] %s%s\n' "$BOLD" "$(elapsed)" "$*" "$PLAIN"; }
fail() {
  printf '%s[%s] %s%s\n' "$RED" "$(elapsed)" "$*" "$PLAIN" >&2
  exit 1
}

# skip_part why: ends the part; a printed, counted skip for a user, a failure in CI.
skip_part() {
  if [ "${CI:-}" = true ]; then fail "cannot run: $1"; fi
  say "skipped: $1"
  if [ -n "${RESULTS:-}" ]; then echo "$1" >"$RESULTS/skip"; fi
  exit 0
}

# quietly log-name command...: the output goes to a file and is shown only on failure.
quietly() {
  local log=$CACHE/log/$1.log
  shift
  mkdir -p "$CACHE/log"
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 60 "$log" >&2
    fail "failed: $* (whole output: $log)"
  fi
}

# need_apt package...: installs the Debian packages that are missing.
need_apt() {
  command -v dpkg-query >/dev/null || return 0 # another distribution: the tools are the user's to bring
  local missing=() p
  for p in "$@"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -ne 0 ]; then
    fail "these Debian packages are missing; install them with:  sudo apt-get install ${missing[*]}"
  fi
  say "installing ${missing[*]}"
  # One process at a time may hold dpkg's lock; wait for it instead of failing.
  quietly apt-update apt-get -o DPkg::Lock::Timeout=300 update
  quietly apt-install env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}

# need_venv name requirements-file [interpreter]: sets VENV to a Python environment with exactly these pinned
# packages. The folder's name holds the hash of the file and of the interpreter, so a change makes a new one
# and an old checkout finds its own.
need_venv() {
  local name=$1 file=$2 python=${3:-python3} key
  if ! command -v "$python" >/dev/null || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need_apt python3 python3-venv
    python=/usr/bin/python3
  fi
  key=$( (cat "$file" && "$python" -c 'import sys; print(sys.version, sys.executable)') | sha256sum | cut -c1-12)
  VENV=$CACHE/venv-$name-$key
  if [ ! -e "$VENV/complete" ]; then
    say "Python packages of $(realpath --relative-to="$ROOT" "$file")"
    (
      exec 9>"$CACHE/venv-$name.lock" # two runs at once: the second waits and finds it complete
      flock 9
      [ -e "$VENV/complete" ] && exit 0
      rm -rf "$VENV"
      "$python" -m venv "$VENV"
      quietly "venv-$name" "$VENV/bin/python" -m pip install --no-cache-dir -r "$file"
      touch "$VENV/complete"
    )
  fi
}

# What every build of the library needs.
need_build_tools() { need_apt g++ cmake ninja-build pkg-config ccache; }

# cmake_build folder option...: configures (only when something changed) and builds the repository there; TARGETS="a b"
# in the environment builds only these.
cmake_build() {
  local folder=$1
  shift
  local log
  log=cmake-$(basename "$folder")
  local launcher=()
  if command -v ccache >/dev/null; then
    launcher=(-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache
      -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
  fi
  quietly "$log" cmake -S "$ROOT" -B "$folder" -G Ninja "${launcher[@]}" "$@"
  # shellcheck disable=SC2086
  quietly "$log-build" cmake --build "$folder" -j "$JOBS" ${TARGETS:+--target $TARGETS}
}

# The library that bindings link against: Release, CPU backend (POWERATTN_CUDA=AUTO or ON adds the other), installed
# into $LIBRARY_PREFIX. A binding that runs alone builds it; after the core part it is a matter of a second.
LIBRARY_BUILD=$BUILD/release
LIBRARY_PREFIX=$BUILD/release/install
build_library() {
  need_build_tools
  cmake_build "$LIBRARY_BUILD" -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_BUILD_STATIC=ON \
    -DPOWERATTN_BUILD_TESTS="${1:-OFF}" -DPOWERATTN_BUILD_BENCH="${1:-OFF}" -DPOWERATTN_BUILD_EXAMPLES=ON \
    -DPOWERATTN_WERROR=ON -DPOWERATTN_CUDA="${POWERATTN_CUDA:-OFF}" -DCMAKE_INSTALL_PREFIX="$LIBRARY_PREFIX"
  quietly install cmake --install "$LIBRARY_BUILD"
}

# count_tests passed failed [skipped]: adds to the part's totals, which ./dev test sums up.
count_tests() {
  if [ -n "${RESULTS:-}" ]; then echo "$1 $2 ${3:-0}" >>"$RESULTS/counts"; fi
}

# run_counted runner command...: runs a test runner with its output shown and counts what its closing lines say.
# It returns 0 even when tests fail, so that the rest of the part runs; a part with a counted failure fails.
# runner: ctest | pytest | cargo | julia.
run_counted() {
  local runner=$1 log status=0
  shift
  log=$(mktemp "${TMPDIR:-/tmp}/powerattn-test.XXXXXX")
  "$@" </dev/null 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
  count_log "$runner" "$log" "$status"
  rm -f "$log"
}

# count_log runner log status: a runner that fails without counting a failure counts as one.
count_log() {
  local totals
  totals=$(sed 's/\x1b\[[0-9;]*m//g' "$2" | awk -v runner="$1" -v status="$3" '
    # ctest:  "97% tests passed, 1 tests failed out of 34"
    runner == "ctest" && /tests passed, [0-9]+ tests failed out of/ {
      for (i = 1; i <= NF; i++) { if ($i == "tests" && $(i + 1) == "failed") f = $(i - 1); if ($i == "of") n = $(i + 1) }
      failed += f; passed += n - f
    }
    runner == "ctest" && /\*\*\*(Skipped|Not Run)/ { skipped++; passed-- }
    # pytest: "== 3 failed, 120 passed, 2 skipped in 10.1s =="
    runner == "pytest" && / in [0-9.]+s/ && /passed|failed|error|skipped/ {
      gsub(/[=,]/, " ")
      for (i = 2; i <= NF; i++) {
        if ($i == "passed") passed += $(i - 1)
        if ($i == "failed" || $i ~ /^errors?$/) failed += $(i - 1)
        if ($i == "skipped" || $i == "xfailed") skipped += $(i - 1)
      }
    }
    # cargo:  "test result: ok. 12 passed; 0 failed; 1 ignored; ..."
    runner == "cargo" && /^test result:/ {
      for (i = 2; i <= NF; i++) {
        if ($i == "passed;") passed += $(i - 1)
        if ($i == "failed;") failed += $(i - 1)
        if ($i == "ignored;") skipped += $(i - 1)
      }
    }
    # julia, a table of Test.jl: "Test Summary: | Pass  Fail  Error  Broken  Total", the first row after it is the sum
    runner == "julia" && /^Test Summary: *\|/ { split($0, part, "|"); columns = split(part[2], head, " "); row = NR + 1 }
    runner == "julia" && NR == row && row {
      n = split($0, part, "|"); m = split(part[n], value, " ")
      for (i = 1; i <= columns && i <= m; i++) {
        if (head[i] == "Pass") passed += value[i]
        if (head[i] == "Fail" || head[i] == "Error") failed += value[i]
        if (head[i] == "Broken") skipped += value[i]
      }
    }
    END { if (status != 0 && failed == 0) failed = 1; printf "%d %d %d", passed, failed, skipped }')
  # shellcheck disable=SC2086
  count_tests $totals
}

# check "what" command...: one plain check, counted as one test; its output is shown when it fails. Like
# run_counted it returns 0, so that one failure does not hide the next.
check() {
  local what=$1 log status=0 begin
  shift
  begin=$(date +%s)
  log=$(mktemp "${TMPDIR:-/tmp}/powerattn-check.XXXXXX")
  set +e
  (
    set -e
    "$@"
  ) >"$log" 2>&1 </dev/null
  status=$?
  set -e
  if [ $status -eq 0 ]; then
    say "ok      $what ($(($(date +%s) - begin)) s)"
    count_tests 1 0
  else
    tail -n 80 "$log" >&2
    printf '%s[%s] FAILED  %s%s\n' "$RED" "$(elapsed)" "$what" "$PLAIN"
    count_tests 0 1
  fi
  rm -f "$log"
}
