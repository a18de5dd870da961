// SPDX-License-Identifier: Apache-2.0
//! Finds or builds libpowerattn, in this order:
//! 1. docs.rs: nothing is linked;
//! 2. `POWERATTN_LIB_DIR` (and `POWERATTN_INCLUDE_DIR` for its header);
//! 3. pkg-config, with the feature `pkg-config` or `POWERATTN_USE_PKG_CONFIG=1`;
//! 4. the bundled source, through CMake. Nothing is downloaded.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    for name in ["POWERATTN_LIB_DIR", "POWERATTN_INCLUDE_DIR", "POWERATTN_USE_PKG_CONFIG", "POWERATTN_CUDA", "DOCS_RS"]
    {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("DOCS_RS").is_some() {
        return;
    }
    let include = link();
    println!("cargo:rerun-if-changed={}", include.join("power_attention.h").display());
    println!("cargo:include={}", include.display());
    generate(&include);
}

/// Emits the link lines and returns the folder of the header.
fn link() -> PathBuf {
    if let Some(dir) = env::var_os("POWERATTN_LIB_DIR") {
        let dir = PathBuf::from(dir);
        println!("cargo:rustc-link-search=native={}", dir.display());
        println!("cargo:rustc-link-lib=dylib=powerattn");
        println!("cargo:lib_dir={}", dir.display());
        return env::var_os("POWERATTN_INCLUDE_DIR").map_or_else(|| source().join("include"), PathBuf::from);
    }
    if let Some(include) = from_pkg_config() {
        return include;
    }
    build_bundled()
}

#[cfg(feature = "pkg-config")]
fn from_pkg_config() -> Option<PathBuf> {
    let found = pkg_config::Config::new().atleast_version("0.1.0").probe("powerattn").ok()?;
    Some(found.include_paths.into_iter().find(|p| p.join("power_attention.h").exists()).unwrap_or_default())
}

#[cfg(not(feature = "pkg-config"))]
fn from_pkg_config() -> Option<PathBuf> {
    if env::var_os("POWERATTN_USE_PKG_CONFIG").is_some() {
        println!("cargo:warning=POWERATTN_USE_PKG_CONFIG needs the feature `pkg-config` of powerattn-sys");
    }
    None
}

/// The bundled source: `vendor/` in a published crate, the repository in a checkout.
fn source() -> PathBuf {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let vendor = here.join("vendor");
    if vendor.join("CMakeLists.txt").exists() {
        vendor
    } else {
        here.join("../../..")
    }
}

fn build_bundled() -> PathBuf {
    let source = source();
    for part in ["CMakeLists.txt", "include", "src", "kernels", "cmake"] {
        println!("cargo:rerun-if-changed={}", source.join(part).display());
    }
    let cuda = env::var("POWERATTN_CUDA").unwrap_or_else(|_| "AUTO".into());
    let out = cmake::Config::new(&source)
        .profile("Release")
        .define("POWERATTN_CUDA", cuda)
        .define("POWERATTN_BUILD_TESTS", "OFF")
        .define("POWERATTN_BUILD_BENCH", "OFF")
        .define("POWERATTN_BUILD_EXAMPLES", "OFF")
        .define("CMAKE_INSTALL_LIBDIR", "lib")
        .build();
    println!("cargo:rustc-link-search=native={}", out.join("lib").display());
    println!("cargo:rustc-link-lib=dylib=powerattn");
    println!("cargo:lib_dir={}", out.join("lib").display());
    println!("cargo:root={}", out.display());
    out.join("include")
}

#[cfg(feature = "buildtime_bindgen")]
fn generate(include: &Path) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    bindgen::Builder::default()
        .header(include.join("power_attention.h").to_string_lossy())
        .allowlist_item("(powerattn|POWERATTN)_.*")
        .prepend_enum_name(false)
        .generate_comments(false)
        .rust_target(bindgen::RustTarget::stable(63, 0).expect("Rust 1.63 is a bindgen target"))
        .formatter(bindgen::Formatter::Prettyplease)
        .generate()
        .expect("bindgen reads power_attention.h")
        .write_to_file(out)
        .expect("the bindings can be written");
}

#[cfg(not(feature = "buildtime_bindgen"))]
fn generate(_: &Path) {}
