#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Copies the C++ sources into vendor/, for `cargo package`.
set -eu
cd "$(dirname "$0")"
rm -rf vendor
mkdir vendor
for part in CMakeLists.txt LICENSE cmake include kernels src; do cp -R "../../../$part" "vendor/$part"; done
