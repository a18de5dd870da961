# SPDX-License-Identifier: Apache-2.0
# Toolchain file: Debian's cross compiler, and its programs run by qemu. cmake -DCMAKE_TOOLCHAIN_FILE=this
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
