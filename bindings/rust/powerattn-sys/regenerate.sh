#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Writes src/bindings.rs anew from the header (needs libclang).
set -eu
cd "$(dirname "$0")/.."
cargo build -p powerattn-sys --features buildtime_bindgen
newest=$(ls -t "${CARGO_TARGET_DIR:-target}"/debug/build/powerattn-sys-*/out/bindings.rs | head -n 1)
cp "$newest" powerattn-sys/src/bindings.rs
