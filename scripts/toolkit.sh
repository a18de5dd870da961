# SPDX-License-Identifier: Apache-2.0
# A CUDA toolkit folder from Python packages: no root, no installer, about 300 MB. nvcc and the libraries are
# pinned; cuobjdump and nvdisasm only read binaries, and the oldest release that is packaged is newer.
CUDA_VERSION=13.0
TOOLKIT=$CACHE/cuda-$CUDA_VERSION

toolkit_packages() {
  cat <<'LIST'
nvidia-cuda-nvcc==13.0.88
nvidia-nvvm==13.0.88
nvidia-cuda-crt==13.0.88
nvidia-cuda-runtime==13.0.96
nvidia-cuda-cccl==13.0.85
nvidia-cuda-cuobjdump==13.2.78
nvidia-cuda-nvdisasm==13.2.78
LIST
}

toolkit_assemble() {
  local key stage python=python3
  key=$( (toolkit_packages && cat "${BASH_SOURCE[0]}") | sha256sum | cut -c1-12)
  [ "$(cat "$TOOLKIT/complete" 2>/dev/null)" = "$key" ] && return 0
  if ! python3 -m pip --version >/dev/null 2>&1; then
    need_apt python3 python3-pip
    python=/usr/bin/python3
  fi
  say "CUDA $CUDA_VERSION toolkit from packages, into $TOOLKIT"
  stage=$(mktemp -d "$CACHE/cuda-stage.XXXXXX")
  toolkit_packages >"$stage/requirements.txt"
  quietly toolkit-pip "$python" -m pip install --no-cache-dir --no-deps --only-binary=:all: \
    --target "$stage/site" -r "$stage/requirements.txt"
  local cu=$stage/site/nvidia/cu13
  # The packages ship versioned libraries only, and `lib`; CMake and nvcc.profile look for unversioned names and lib64.
  local lib
  for lib in "$cu"/lib/*.so.*; do ln -s "$(basename "$lib")" "${lib%%.so.*}.so"; done
  ln -s lib "$cu/lib64"
  mkdir -p "$cu/lib/stubs"
  chmod +x "$cu"/bin/* "$cu"/nvvm/bin/*
  printf '{"cuda": {"name": "CUDA SDK", "version": "%s.0"}}\n' "$CUDA_VERSION" >"$cu/version.json"
  rm -rf "$TOOLKIT"
  mv "$cu" "$TOOLKIT"
  rm -rf "$stage"
  # A toolkit counts as complete when it compiles a kernel for every architecture that the library ships.
  local probe
  probe=$(mktemp -d "$CACHE/cuda-probe.XXXXXX")
  printf '__global__ void f(float *x) { x[threadIdx.x] *= 2; }\nint main() { f<<<1, 1>>>(nullptr); }\n' >"$probe/probe.cu"
  quietly toolkit-probe "$TOOLKIT/bin/nvcc" -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
    -o "$probe/probe" "$probe/probe.cu"
  quietly toolkit-probe "$TOOLKIT/bin/cuobjdump" -lelf "$probe/probe"
  rm -rf "$probe"
  echo "$key" >"$TOOLKIT/complete"
}

# Puts the toolkit, or one that is installed already, in front of CMake: CUDACXX and CUDAToolkit_ROOT.
need_toolkit() {
  if [ -n "${CUDACXX:-}" ]; then return 0; fi
  if command -v nvcc >/dev/null; then
    CUDACXX=$(command -v nvcc)
  else
    need_apt g++
    toolkit_assemble
    CUDACXX=$TOOLKIT/bin/nvcc
    export CUDAToolkit_ROOT=$TOOLKIT
  fi
  export CUDACXX
}
