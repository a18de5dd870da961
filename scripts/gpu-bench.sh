# SPDX-License-Identifier: Apache-2.0
# The GPU benchmark: the device's matrix-multiply rate and copy bandwidth, the library, and the installed peers, in one
# run. Writes bench/results/gpu.csv (ours and the ceilings) and bench/results/gpu-peers.csv; bench/gpu/plot.py draws.
# GPU_BUILD: a folder that holds bench_gpu already (default: build it here). Arguments go to bench_gpu.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${GPU_BUILD:-}
if [ -z "$build" ]; then
  build=${POWERATTN_BUILD:-build}/gpu
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPOWERATTN_CUDA=ON -DPOWERATTN_BUILD_EXAMPLES=OFF \
    -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null
  cmake --build "$build" -j "${POWERATTN_JOBS:-$(nproc)}" --target bench_gpu
fi
program=$build/tests/gpu/bench_gpu
[ -x "$program" ] || program=$build/bench_gpu
results=${GPU_RESULTS:-bench/results}
mkdir -p "$results"
"$program" --csv "$results/gpu.csv" "$@"
if python3 -c 'import torch' 2>/dev/null; then
  python3 bench/gpu/peers.py --csv "$results/gpu-peers.csv" ${GPU_PEERS_ARGS:-}
else
  echo "peers: PyTorch is not installed here; only the library was measured"
fi
