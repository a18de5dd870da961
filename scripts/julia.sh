# SPDX-License-Identifier: Apache-2.0
# The Julia package: its tests on Julia 1.5 (Debian 11's package, unpacked privately) and on the `julia` of PATH, if any.
. "$ROOT/scripts/debian_prefix.sh"
. "$ROOT/scripts/emulation.sh"

julia_setup() {
  need_apt gcc libc6-dev python3
  build_library
  emulated_library
  debian_prefix julia bullseye julia
  JULIA_PREFIX=$PREFIX
}

julia_library() { find "$LIBRARY_PREFIX" -name libpowerattn.so | head -n 1; }

julia_debian() { in_prefix "$JULIA_PREFIX" "$JULIA_PREFIX/usr/bin/julia" --startup-file=no "$@"; }

julia_test() {
  cd "$ROOT/bindings/julia"
  export POWERATTN_LIBRARY JULIA_NUM_THREADS=2 JULIA_DEPOT_PATH=$CACHE/julia-depot
  POWERATTN_LIBRARY=$(julia_library)
  say "$(julia_debian --version)"
  check "one table of API names, none falls behind the header" python3 "$ROOT/tests/api_names.py"
  run_counted julia julia_debian --project=. test/runtests.jl
  POWERATTN_LIBRARY=$BUILD/emulation/libpowerattn.so LD_LIBRARY_PATH=$EMULATED_PATH \
    run_counted julia julia_debian --project=. test/device.jl
  if command -v julia >/dev/null; then
    say "$(julia --version) of PATH"
    run_counted julia julia --startup-file=no --project=. test/runtests.jl
  fi
}
