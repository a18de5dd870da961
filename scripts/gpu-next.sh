#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a session with a Hopper device runs first for the kernels of cuda.sm90.next, which have been compiled and checked in
# emulation but have not run on a device. Two calls of at most ten minutes each:
#   gpu-next.sh check   each case in a process of its own with a time limit (a lost wake-up is a hang), the kernels alone
#                       against float64, hundreds of launches of each, memcheck and racecheck of a few cases
#   gpu-next.sh time    the kernels alone and through the API, cuda.sm90.next beside the rows it replaces, with the device's
#                       matrix-multiply and copy rates in the same run
# GPU_BUILD: a folder that holds test_gpu_cases, bench_gpu and sm90_kernels already (default: build them here).
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mode=${1:-check}
build=${GPU_BUILD:-}
if [ -z "$build" ]; then
  build=${POWERATTN_BUILD:-build}/gpu
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=ON -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null
  cmake --build "$build" -j "${POWERATTN_JOBS:-$(nproc)}" --target test_gpu_cases bench_gpu sm90_kernels
fi
programs=$build/tests/gpu
[ -d "$programs" ] || programs=$build
results=${GPU_RESULTS:-bench/results}
mkdir -p "$results"
report=$results/gpu-next-$mode.txt
work=$(mktemp -d "${TMPDIR:-/tmp}/powerattn-next.XXXXXX")
trap 'rm -rf "$work"' EXIT
status=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$report"

# limited SECONDS LABEL COMMAND...: the end of its output, and what became of it
limited() {
  local seconds=$1 label=$2 code=0
  shift 2
  timeout "$seconds" "$@" >"$work/out" 2>&1 || code=$?
  {
    grep -E '^(ok|FAIL|pass|time| ) ' "$work/out" || tail -n 5 "$work/out"
    case $code in
    0) echo "== $label: ok" ;;
    124) echo "== $label: HANGS (no end after $seconds s): $(tail -c 200 "$work/out" | tr '\n' ' ')" ;;
    *) echo "== $label: FAILED ($code)"; tail -n 20 "$work/out" ;;
    esac
  } | tee -a "$report"
  if [ "$code" -ne 0 ]; then status=1; fi
}

if [ "$mode" = check ]; then
  # The kernels alone first: what hangs or misses there need not be looked for in the API.
  for size in d64 d128; do
    limited 60 "kernels check $size" "$programs/sm90_kernels" check 1 $size
    limited 60 "kernels backward $size" "$programs/sm90_kernels" backward 1 $size
  done
  n=0
  while IFS= read -r line; do
    case $line in '' | '#'*) continue ;; esac
    echo "$line" >"$work/case.txt"
    n=$((n + 1))
    if [ "$SECONDS" -gt 360 ]; then  # a call ends after ten minutes; stress and the sanitizer must still run
      echo "== case $n: NOT RUN, no time: $line" | tee -a "$report"
      status=1
      continue
    fi
    POWERATTN_CUDA_IMPLEMENTATION=cuda.sm90.next limited 60 "case $n" "$programs/test_gpu_cases" "$work/case.txt"
  done < <(cat tests/cases/sm90.txt tests/cases/sm90_large.txt)
  for size in d64 d128; do limited 90 "stress $size" "$programs/sm90_kernels" stress 2 $size; done
  grep -E 'bwd bf16 (b1 t127|seq65|b1 t130)' tests/cases/sm90.txt >"$work/few.txt"
  for tool in memcheck racecheck; do
    POWERATTN_CUDA_IMPLEMENTATION=cuda.sm90.next limited 120 "$tool" compute-sanitizer --tool $tool --error-exitcode 9 \
      "$programs/test_gpu_cases" "$work/few.txt" --no-guard
  done
else
  for size in d64 d128; do limited 120 "kernels time $size" "$programs/sm90_kernels" time 1 $size; done
  for row in cuda.sm90 cuda.sm90.next cuda.sm80; do
    POWERATTN_CUDA_IMPLEMENTATION=$row limited 110 "bench $row" "$programs/bench_gpu" targets kernels sweep --quick \
      --seconds 100 --only 'bf16 p2' --csv "$results/gpu-next-$row.csv"
    cat "$work/out" >>"$report"
  done
fi
if [ "$status" -eq 0 ]; then echo "== all passed" | tee -a "$report"; fi
exit "$status"
