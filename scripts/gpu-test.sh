# SPDX-License-Identifier: Apache-2.0
# Everything that needs a CUDA device, in one run, with a report under bench/results/:
#   1. the cases of tests/cases against the float64 oracles, through every implementation of the backend
#   2. graphs, streams, refused arguments, tensors past 2^31 elements, states between the CPU and the device
#   3. outputs and gradients of up to a million tokens
#   4. the small cases again under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
# GPU_BUILD: a folder that holds the programs already (default: build them here).
# GPU_PARTS: some of "cases runtime long sanitizers" (default: all); without cases, the report is appended to.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
JOBS=${POWERATTN_JOBS:-$(nproc)}
build=${GPU_BUILD:-}
if [ -z "$build" ]; then
  build=${POWERATTN_BUILD:-build}/gpu
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=ON -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null
  cmake --build "$build" -j "$JOBS" --target test_gpu_cases test_gpu_long test_gpu_runtime
fi
programs=$build/tests/gpu
[ -d "$programs" ] || programs=$build
report=${GPU_REPORT:-bench/results/gpu-test.txt}
mkdir -p "$(dirname "$report")"
work=$(mktemp -d "${TMPDIR:-/tmp}/powerattn-gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
status=0
parts=" ${GPU_PARTS:-cases runtime long sanitizers} "
part() { case $parts in *" $1 "*) ;; *) return 1 ;; esac; }
if part cases; then : >"$report"; fi

{
  echo "# libpowerattn GPU tests, $(date -u +%Y-%m-%d):$parts"
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
} | tee -a "$report"

# cases LABEL IMPLEMENTATION FILE...: as many processes as there are cores, since the oracle runs on the CPU.
cases() {
  local label=$1 implementation=$2 shard
  shift 2
  for ((shard = 0; shard < JOBS; ++shard)); do
    POWERATTN_CUDA_IMPLEMENTATION=$implementation timeout 600 "$programs/test_gpu_cases" "$@" \
      --shard "$shard/$JOBS" >"$work/$label.$shard" 2>&1 &
  done
  wait
  cat "$work/$label".* >"$work/$label"
  local passed failed ended
  passed=$(grep -c '^pass' "$work/$label" || true)
  failed=$(grep -c '^FAIL' "$work/$label" || true)
  ended=$(grep -c ' passed, ' "$work/$label" || true)
  if [ "$failed" -gt 0 ] || [ "$ended" -ne "$JOBS" ] || [ "$passed" -eq 0 ]; then status=1; fi
  {
    echo "== $label: $passed passed, $failed failed, $((JOBS - ended)) processes ended early"
    grep -A 3 '^FAIL' "$work/$label" || true
    echo "   closest to the tolerance:"
    { grep '^pass' "$work/$label" | sort -k2 -n -r | head -n 5; } || true
  } | tee -a "$report"
}
if part cases; then
  lists=(tests/cases/smoke.txt tests/cases/chunked.txt tests/cases/ci.txt tests/cases/gpu.txt)
  cases every-implementation '' "${lists[@]}" tests/cases/{linear,sm90,sm90_large}.txt
  cases generic-path cuda.generic "${lists[@]}"
fi

if part runtime; then
  echo "== runtime" | tee -a "$report"
  timeout 600 "$programs/test_gpu_runtime" 2>&1 | tee -a "$report" || status=1
fi

if part long; then
  echo "== long sequences" | tee -a "$report"
  timeout 900 "$programs/test_gpu_long" 2>&1 | tee -a "$report" || status=1
fi

# Racecheck and initcheck slow kernels down a hundredfold: small cases, all implementations. What racecheck and
# synccheck say of cuda.sm90 hides the others (docs/cuda.md), which run once more by name.
tools=()
if part sanitizers; then tools=(memcheck racecheck initcheck synccheck); fi
for tool in "${tools[@]}"; do
  rows=('' cuda.generic)
  case $tool in racecheck | synccheck) rows+=(cuda.sm80 cuda.linear) ;; esac
  for implementation in "${rows[@]}"; do
    sanitizer=(tests/cases/sanitizer.txt)
    case $implementation in  # what they can run of it
      cuda.sm80) sanitizer+=(--only 'wd bf16') ;;
      cuda.linear) sanitizer=(tests/cases/linear.txt) ;;
    esac
    if POWERATTN_CUDA_IMPLEMENTATION=$implementation timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$programs/test_gpu_cases" "${sanitizer[@]}" --no-guard >"$work/sanitizer" 2>&1; then
      verdict=clean
    else
      verdict="FAILED ($?)"
      status=1
    fi
    {
      echo "== $tool ${implementation:-every implementation}: $verdict, $(grep -c '^pass' "$work/sanitizer" || true) cases"
      [ "$verdict" = clean ] || grep -vE '^pass' "$work/sanitizer" | head -n 40 || true
      grep -E 'SUMMARY' "$work/sanitizer" || true
    } | tee -a "$report"
  done
done
[ "$status" -eq 0 ] && echo "== all passed" | tee -a "$report"
exit "$status"
