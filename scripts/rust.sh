# SPDX-License-Identifier: Apache-2.0
# The Rust crates: formats, clippy, tests, Miri, shipped bindings, minimum Rust version, packages, a minute of fuzzing.
. "$ROOT/scripts/debian_prefix.sh"
. "$ROOT/scripts/emulation.sh"

RUST_MINIMUM=1.63 # rust-version in both Cargo.toml; Debian 12's own compiler

rust_setup() {
  need_apt gcc g++ libc6-dev libclang-16-dev binutils valgrind
  # Debian's cargo of today, where there is none; its 1.63 is too old for the test-only dependencies.
  command -v cargo >/dev/null || need_apt cargo-web rustc-web
  build_library
  emulated_library
  debian_prefix rust bookworm rustc cargo gcc
  RUST_MINIMUM_PREFIX=$PREFIX
  export CARGO_TARGET_DIR=$BUILD/rust
}

# libFuzzer on a stable compiler: the flags are those of cargo-fuzz, except the address sanitizer.
rust_fuzz() {
  local seconds=${POWERATTN_FUZZ_SECONDS:-60} program log=$BUILD/rust-fuzz.log
  cd fuzz
  export CARGO_TARGET_DIR=$BUILD/rust-fuzz
  RUSTFLAGS='-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1 --cfg fuzzing' \
    cargo build --release --target "$(rustc -vV | sed -n 's/^host: //p')"
  program=$(ls "$CARGO_TARGET_DIR"/*/release/safe_api)
  mkdir -p "$CACHE/fuzz/rust"
  "$program" -max_total_time="$seconds" -rss_limit_mb=4000 -timeout=20 -max_len=512 -len_control=0 \
    -print_final_stats=1 -artifact_prefix="$BUILD/" "$CACHE/fuzz/rust" 2>&1 | tee "$log"
  # It fuzzes with coverage: the counters are there, and inputs reach well into the crate.
  awk '/inline 8-bit counters/ { gsub(/[^0-9 ]/, ""); counters = $2 } match($0, /cov: [0-9]+/) { cov = substr($0, RSTART + 5, RLENGTH - 5) }
    END { print counters " counters, " cov " reached"; exit !(counters > 1000 && cov > 450) }' "$log"
}

# The two crates and their run-time dependencies, without what only the tests need, at the versions of minimum.lock:
# sets BARE to the folder.
rust_bare() {
  BARE=$BUILD/rust-bare
  [ -e "$BARE/complete" ] && [ -z "$(find Cargo.toml minimum.lock powerattn powerattn-sys -newer "$BARE/complete" -print -quit)" ] && return 0
  rm -rf "$BARE"
  mkdir -p "$BARE/.cargo"
  cp -R powerattn powerattn-sys "$BARE/"
  cp minimum.lock "$BARE/Cargo.lock"
  printf '[workspace]\nmembers = ["powerattn-sys", "powerattn"]\nresolver = "2"\n' >"$BARE/Cargo.toml"
  sed -i '/^\[dev-dependencies\]/,/^$/d; /^\[\[bench\]\]/,/^$/d; /^\[\[test\]\]/,/^$/d' "$BARE/powerattn/Cargo.toml"
  rm -rf "$BARE"/powerattn/{benches,tests,examples}
  (cd "$BARE" && CARGO_TARGET_DIR=$BARE/target cargo vendor --locked vendor >.cargo/config.toml)
  touch "$BARE/complete"
}

# The oldest compiler. Its cargo cannot read today's registry, so today's cargo has fetched for it.
rust_minimum() {
  rust_bare
  cd "$BARE"
  in_prefix "$RUST_MINIMUM_PREFIX" env RUSTUP_TOOLCHAIN= RUSTC="$RUST_MINIMUM_PREFIX/usr/bin/rustc" \
    CARGO_TARGET_DIR="$BARE/target" "$RUST_MINIMUM_PREFIX/usr/bin/cargo" check --offline --locked \
    --features powerattn/ndarray
}

# Miri is a component of a nightly toolchain.
rust_has_miri() {
  cargo +nightly miri --version >/dev/null 2>&1 && return 0
  command -v rustup >/dev/null && rustup component add --toolchain nightly miri rust-src >/dev/null 2>&1
}

# What the crate does without the C library: views inside their slices, memory, alignment. DOCS_RS: nothing is linked.
rust_miri() {
  cargo +nightly miri setup # Miri's own standard library, from the registry: before the vendored folder is in force
  rust_bare
  cd "$BARE"
  DOCS_RS=1 CARGO_TARGET_DIR=$BARE/target cargo +nightly miri test --offline --locked -p powerattn --lib --features ndarray
}

# The unit tests and the refusals with the C library in the picture: nobody reads or writes past a slice. Left out are a
# test that runs itself again with another library and one that asks for more memory than there is.
rust_valgrind() {
  local host
  host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
  env "CARGO_TARGET_${host}_RUNNER=valgrind -q --error-exitcode=9" \
    cargo test -p powerattn --features ndarray --lib --test refusals -- \
    --skip a_library_that_is_not --skip memory_that_is_not_there
}

# Both crates as they would be published, unpacked by themselves: a program that depends on them builds the library from
# the bundled source, then finds an installed one each way that README.md names.
rust_package() {
  local folder=$BUILD/rust-package/crates lib=$POWERATTN_LIB_DIR version=0.1.0 crate
  ./powerattn-sys/vendor.sh
  cargo package --workspace --allow-dirty --no-verify
  rm -rf "$folder"
  mkdir -p "$folder"
  for crate in powerattn powerattn-sys; do tar -xzf "$CARGO_TARGET_DIR/package/$crate-$version.crate" -C "$folder"; done
  cp -R consumer "$folder/consumer"
  cp Cargo.lock "$folder/consumer/"
  cd "$folder/consumer"
  unset POWERATTN_LIB_DIR POWERATTN_INCLUDE_DIR LD_LIBRARY_PATH
  export CARGO_TARGET_DIR=$BUILD/rust-package/target CMAKE_GENERATOR=Ninja POWERATTN_CUDA=OFF \
    CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache
  local program=$CARGO_TARGET_DIR/debug/consumer recited='400 of 400 bytes recited'
  shared() { readelf -d "$program" | grep -q 'NEEDED.*libpowerattn'; }
  recites() { "$@" "$program" | grep "$recited"; }

  cargo build
  recites env
  if shared; then echo "the bundled library is not static" && return 1; fi
  POWERATTN_LIB_DIR=$lib cargo build
  shared && recites env LD_LIBRARY_PATH="$lib"
  POWERATTN_LIB_DIR=$lib cargo build --features static
  if shared; then echo "the feature static links a shared library" && return 1; fi
  recites env
  POWERATTN_USE_PKG_CONFIG=1 PKG_CONFIG_PATH=$lib/pkgconfig cargo build
  shared && recites env LD_LIBRARY_PATH="$lib"
  # A place that holds no library is an error with the place's name.
  if POWERATTN_LIB_DIR=/nowhere cargo build 2>missing.log; then return 1; fi
  grep 'POWERATTN_LIB_DIR is /nowhere' missing.log
  if POWERATTN_USE_PKG_CONFIG=1 PKG_CONFIG_LIBDIR=/nowhere cargo build 2>missing.log; then return 1; fi
  grep 'POWERATTN_USE_PKG_CONFIG is set, but' missing.log
}

rust_bindings() {
  LIBCLANG_PATH=$(ls -d /usr/lib/llvm-*/lib | sort -V | tail -n 1) \
    cargo test -p powerattn-sys --features buildtime_bindgen
}

# docs.rs has no library to link and asks for all features: the documentation must build all the same. The target folder
# is that of the test before, which has built bindgen.
rust_docs() {
  env -u POWERATTN_LIB_DIR DOCS_RS=1 RUSTDOCFLAGS='-D warnings' cargo doc --no-deps -p powerattn-sys -p powerattn --all-features
}

rust_example() {
  cargo run -p powerattn --example generate | tee /dev/stderr | grep -q '^400 of 400 bytes recited'
}

# rust_fmt [--check]: the workspace, and what is not a member of it.
rust_fmt() { cargo fmt --all "$@" && rustfmt --edition 2021 --config-path . "$@" fuzz/fuzz_targets/*.rs consumer/build.rs; }

rust_format() { (cd "$ROOT/bindings/rust" && rust_fmt); }

rust_lint() {
  (cd "$ROOT/bindings/rust" && rust_fmt --check &&
    cargo clippy --workspace --all-targets --features powerattn/ndarray -- -D warnings)
}

# rust_tool name command...: a tool of cargo's that this machine lacks is a failure in CI, a counted skip elsewhere.
rust_tool() {
  local tool=$1
  shift
  if cargo "$tool" --version >/dev/null 2>&1; then
    "$@"
  elif [ "${CI:-}" = true ]; then
    say "FAILED  no cargo $tool here" && count_tests 0 1
  else
    say "skipped: no cargo $tool here" && count_tests 0 0 1
  fi
}

rust_test() {
  cd "$ROOT/bindings/rust"
  export POWERATTN_LIB_DIR=$LIBRARY_PREFIX/lib POWERATTN_INCLUDE_DIR=$ROOT/include
  export LD_LIBRARY_PATH=$POWERATTN_LIB_DIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  say "$(rustc --version)"
  rust_tool fmt check "rustfmt" rust_fmt --check
  rust_tool clippy check "clippy, warnings are errors" \
    cargo clippy --workspace --all-targets --features powerattn/ndarray -- -D warnings
  run_counted cargo cargo test --workspace --features powerattn/ndarray
  check "shipped bindings are bindgen's of today" rust_bindings
  check "documentation without a library" rust_docs
  check "the example recites its paragraph" rust_example
  LD_LIBRARY_PATH=$EMULATED_PATH run_counted cargo cargo test -p powerattn --features ndarray --test device
  check "refusals under valgrind" rust_valgrind
  if rust_has_miri; then
    check "unit tests under Miri" rust_miri
  else
    say "skipped: no Miri here" && count_tests 0 0 1
  fi
  check "Rust $RUST_MINIMUM builds the crates" rust_minimum
  check "packages build from their bundled source and find an installed one" rust_package
  check "the safe API under a minute of fuzzing" rust_fuzz
}
