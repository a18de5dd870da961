# SPDX-License-Identifier: Apache-2.0
# The Rust crates: formats, clippy, tests, shipped bindings, minimum Rust version, packages, a minute of fuzzing.
. "$ROOT/scripts/debian_prefix.sh"

RUST_MINIMUM=1.63 # rust-version in both Cargo.toml; Debian 12's own compiler

rust_setup() {
  need_apt gcc g++ libc6-dev libclang-16-dev
  # Debian's cargo of today, where there is none; its 1.63 is too old for the test-only dependencies.
  command -v cargo >/dev/null || need_apt cargo-web rustc-web
  build_library
  debian_prefix rust bookworm rustc cargo gcc
  RUST_MINIMUM_PREFIX=$PREFIX
  export CARGO_TARGET_DIR=$BUILD/rust
}

rust_fuzz() {
  local seconds=${POWERATTN_FUZZ_SECONDS:-60}
  cd fuzz
  export CARGO_TARGET_DIR=$BUILD/rust-fuzz
  RUSTFLAGS='-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1 --cfg fuzzing' \
    cargo build --release --target "$(rustc -vV | sed -n 's/^host: //p')"
  local program
  program=$(ls "$CARGO_TARGET_DIR"/*/release/safe_api)
  mkdir -p "$CACHE/fuzz/rust"
  "$program" -max_total_time="$seconds" -rss_limit_mb=4000 -timeout=20 -max_len=512 -print_final_stats=1 \
    -artifact_prefix="$BUILD/" "$CACHE/fuzz/rust"
}

# The oldest compiler builds the two crates and their run-time dependencies (not what only the tests need), at the
# versions of minimum.lock. Its cargo cannot read today's registry, so today's cargo fetches for it.
rust_minimum() {
  local folder=$BUILD/rust-minimum
  rm -rf "$folder"
  mkdir -p "$folder/.cargo"
  cp -R powerattn powerattn-sys "$folder/"
  cp minimum.lock "$folder/Cargo.lock"
  cd "$folder"
  printf '[workspace]\nmembers = ["powerattn-sys", "powerattn"]\n' >Cargo.toml
  sed -i '/^\[dev-dependencies\]/,/^$/d; /^\[\[bench\]\]/,/^$/d' powerattn/Cargo.toml
  rm -rf powerattn/benches powerattn/tests powerattn/examples
  CARGO_TARGET_DIR=$folder/target cargo vendor --locked vendor >.cargo/config.toml
  in_prefix "$RUST_MINIMUM_PREFIX" env RUSTUP_TOOLCHAIN= RUSTC="$RUST_MINIMUM_PREFIX/usr/bin/rustc" \
    CARGO_TARGET_DIR="$folder/target" "$RUST_MINIMUM_PREFIX/usr/bin/cargo" check --offline --locked \
    --features powerattn/ndarray
}

# Both crates as they would be published; the packed -sys crate builds the library from its bundled source.
rust_package() {
  ./powerattn-sys/vendor.sh
  env -u POWERATTN_LIB_DIR -u POWERATTN_INCLUDE_DIR POWERATTN_CUDA=OFF CMAKE_GENERATOR=Ninja \
    CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache \
    cargo package --workspace --allow-dirty
}

rust_bindings() {
  LIBCLANG_PATH=$(ls -d /usr/lib/llvm-*/lib | sort -V | tail -n 1) \
    cargo test -p powerattn-sys --features buildtime_bindgen
}

# docs.rs has no library to link: the documentation must build without one.
rust_docs() {
  env -u POWERATTN_LIB_DIR DOCS_RS=1 RUSTDOCFLAGS='-D warnings' CARGO_TARGET_DIR="$BUILD/rust-docs" \
    cargo doc --no-deps -p powerattn-sys -p powerattn --features powerattn/ndarray
}

rust_example() {
  cargo run --release -p powerattn --example generate | tee /dev/stderr | grep -q '^400 of 400 bytes recited'
}

rust_format() { (cd "$ROOT/bindings/rust" && cargo fmt --all); }

rust_lint() {
  (cd "$ROOT/bindings/rust" && cargo fmt --all --check &&
    cargo clippy --workspace --all-targets --features powerattn/ndarray -- -D warnings)
}

rust_test() {
  cd "$ROOT/bindings/rust"
  export POWERATTN_LIB_DIR=$LIBRARY_PREFIX/lib POWERATTN_INCLUDE_DIR=$ROOT/include
  export LD_LIBRARY_PATH=$POWERATTN_LIB_DIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  say "$(rustc --version)"
  if cargo fmt --version >/dev/null 2>&1; then check "rustfmt" cargo fmt --all --check; else say "skipped: no rustfmt here" && count_tests 0 0 1; fi
  if cargo clippy --version >/dev/null 2>&1; then
    check "clippy, warnings are errors" cargo clippy --workspace --all-targets --features powerattn/ndarray -- -D warnings
  else
    say "skipped: no clippy here"
    count_tests 0 0 1
  fi
  run_counted cargo cargo test --workspace --features powerattn/ndarray
  check "shipped bindings are bindgen's of today" rust_bindings
  check "documentation without a library" rust_docs
  check "the example recites its paragraph" rust_example
  check "Rust $RUST_MINIMUM builds the crates" rust_minimum
  check "packages build from their bundled source" rust_package
  check "the safe API under a minute of fuzzing" rust_fuzz
}
