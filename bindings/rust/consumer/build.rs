// SPDX-License-Identifier: Apache-2.0
//! What a crate with C code of its own gets from `links = "powerattn"`.
use std::path::Path;

fn main() {
    let folder = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    assert!(Path::new(&folder("DEP_POWERATTN_INCLUDE")).join("power_attention.h").exists());
    assert!(Path::new(&folder("DEP_POWERATTN_LIB_DIR")).exists());
}
