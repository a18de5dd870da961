#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a session with a device runs for cuda.linear (degree 1), which has been compiled and checked in emulation but has not
# run on a device:
#   gpu-linear.sh check   every case of tests/cases/linear.txt against float64, memcheck and racecheck of a few
#   gpu-linear.sh time    its kernels alone (milliseconds, bytes, GB/s), and through the API beside the row it would replace
# GPU_BUILD: a folder that holds test_gpu_cases, bench_gpu and linear_kernels already (default: build them here).
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mode=${1:-check}
build=${GPU_BUILD:-}
if [ -z "$build" ]; then
  build=${POWERATTN_BUILD:-build}/gpu
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=ON -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null
  cmake --build "$build" -j "${POWERATTN_JOBS:-$(nproc)}" --target test_gpu_cases bench_gpu linear_kernels
fi
programs=$build/tests/gpu
[ -d "$programs" ] || programs=$build
status=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

# limited SECONDS LABEL COMMAND...
limited() {
  local seconds=$1 label=$2 code=0
  shift 2
  timeout "$seconds" "$@" || code=$?
  case $code in
  0) echo "== $label: ok" ;;
  124) echo "== $label: no end after $seconds s" ;;
  *) echo "== $label: FAILED ($code)" ;;
  esac
  if [ "$code" -ne 0 ]; then status=1; fi
}

export POWERATTN_CUDA_IMPLEMENTATION=cuda.linear
if [ "$mode" = check ]; then
  limited 120 cases "$programs/test_gpu_cases" tests/cases/linear.txt
  few=$(mktemp "${TMPDIR:-/tmp}/powerattn-linear.XXXXXX")
  trap 'rm -f "$few"' EXIT
  grep -E '^bwd bf16 (b1 t257|seq100|b1 t129)' tests/cases/linear.txt >"$few"
  for tool in memcheck racecheck; do
    limited 100 "$tool" compute-sanitizer --tool $tool --error-exitcode 9 "$programs/test_gpu_cases" "$few" --no-guard
  done
else
  limited 200 kernels "$programs/linear_kernels"
  for row in cuda.linear cuda.sm80; do
    POWERATTN_CUDA_IMPLEMENTATION=$row limited 100 "bench $row" "$programs/bench_gpu" targets kernels --only 'bf16 p1'
  done
fi
exit "$status"
