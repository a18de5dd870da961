// SPDX-License-Identifier: Apache-2.0
//! Finds or builds libpowerattn, in this order:
//! 1. docs.rs: nothing is linked;
//! 2. `POWERATTN_LIB_DIR` (and `POWERATTN_INCLUDE_DIR` for its header);
//! 3. pkg-config, with the feature `pkg-config` or `POWERATTN_USE_PKG_CONFIG=1`;
//! 4. the bundled source, through CMake. Nothing is downloaded.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The library's own version: before 1.0 a minor version may change the interface.
const VERSIONS: std::ops::Range<&str> = "0.1.0".."0.2.0";

fn main() {
    for name in [
        "POWERATTN_LIB_DIR",
        "POWERATTN_INCLUDE_DIR",
        "POWERATTN_USE_PKG_CONFIG",
        "POWERATTN_CUDA",
        "CUDA_PATH",
        "DOCS_RS",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("DOCS_RS").is_some() {
        ship_bindings();
        return;
    }
    let include = link();
    println!("cargo:rerun-if-changed={}", include.join("power_attention.h").display());
    println!("cargo:include={}", include.display());
    generate(&include);
}

fn target(what: &str) -> String {
    env::var(format!("CARGO_CFG_TARGET_{what}")).unwrap_or_default()
}

/// Emits the link lines and returns the folder of the header.
fn link() -> PathBuf {
    if let Some(dir) = env::var_os("POWERATTN_LIB_DIR").map(PathBuf::from) {
        let name = if cfg!(feature = "static") { "libpowerattn_static.a" } else { "libpowerattn.so" };
        let present = target("OS") != "linux" || dir.join(name).exists();
        assert!(present, "POWERATTN_LIB_DIR is {}, which holds no {name}", dir.display());
        link_from(&dir, cfg!(feature = "static"));
        let beside = dir.join("../include");
        let include = env::var_os("POWERATTN_INCLUDE_DIR").map(PathBuf::from);
        return include.unwrap_or_else(|| if beside.exists() { beside } else { source().join("include") });
    }
    let asked = env::var_os("POWERATTN_USE_PKG_CONFIG").map_or(false, |x| x != "0");
    if asked || cfg!(feature = "pkg-config") {
        match from_pkg_config() {
            Ok(include) => return include,
            Err(why) if asked => panic!("POWERATTN_USE_PKG_CONFIG is set, but {why}"),
            Err(why) => println!("cargo:warning=the bundled libpowerattn is built: {why}"),
        }
    }
    build_bundled()
}

/// The library in `dir`, as a shared or a static one.
fn link_from(dir: &Path, archive: bool) {
    println!("cargo:rustc-link-search=native={}", dir.display());
    println!("cargo:lib_dir={}", dir.display());
    if !archive {
        println!("cargo:rustc-link-lib=dylib=powerattn");
        return;
    }
    println!("cargo:rustc-link-lib=static=powerattn_static");
    let libraries = private_libraries(dir);
    if let (true, Some(cuda)) = (libraries.iter().any(|x| x == "cudart_static"), env::var_os("CUDA_PATH")) {
        println!("cargo:rustc-link-search=native={}", Path::new(&cuda).join("lib64").display());
    }
    for library in libraries {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
}

/// What the static library needs beside itself: Libs.private of the pkg-config file that is installed with it.
fn private_libraries(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("pkgconfig/powerattn.pc")).unwrap_or_default();
    let line =
        text.lines().find_map(|line| line.strip_prefix("Libs.private:")).unwrap_or("-lstdc++ -lm -ldl -lpthread");
    let cxx = if target("VENDOR") == "apple" { "c++" } else { "stdc++" };
    let names = line.split_whitespace().filter_map(|word| word.strip_prefix("-l"));
    names.map(|name| if name == "stdc++" { cxx } else { name }.to_owned()).collect()
}

fn from_pkg_config() -> Result<PathBuf, String> {
    let config = pkg_config::Config::new().range_version(VERSIONS).cargo_metadata(false).probe("powerattn");
    config.map_err(|error| error.to_string().lines().next().unwrap_or("pkg-config failed").to_owned())?;
    // Asked for by name, since pkg-config leaves out the folders that every compiler searches.
    let folder = |name| pkg_config::get_variable("powerattn", name).map(PathBuf::from).map_err(|e| e.to_string());
    link_from(&folder("libdir")?, cfg!(feature = "static"));
    folder("includedir")
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
        .define("POWERATTN_BUILD_STATIC", "ON")
        .define("POWERATTN_BUILD_TESTS", "OFF")
        .define("POWERATTN_BUILD_BENCH", "OFF")
        .define("POWERATTN_BUILD_EXAMPLES", "OFF")
        .define("CMAKE_INSTALL_LIBDIR", "lib")
        .build();
    println!("cargo:root={}", out.display());
    // Static, so that a program runs wherever it is put. With CUDA the shared library holds the CUDA runtime, which a
    // static one would have to find again when the program is linked: only with the feature.
    let lib = out.join("lib");
    let cuda = private_libraries(&lib).iter().any(|x| x == "cudart_static");
    link_from(&lib, cfg!(feature = "static") || !cuda);
    out.join("include")
}

#[cfg(feature = "buildtime_bindgen")]
fn bindings() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs")
}

#[cfg(feature = "buildtime_bindgen")]
fn generate(include: &Path) {
    bindgen::Builder::default()
        .header(include.join("power_attention.h").to_string_lossy())
        .allowlist_item("(powerattn|POWERATTN)_.*")
        .prepend_enum_name(false)
        .generate_comments(false)
        .rust_target(bindgen::RustTarget::stable(63, 0).expect("Rust 1.63 is a bindgen target"))
        .formatter(bindgen::Formatter::Prettyplease)
        .generate()
        .expect("bindgen reads power_attention.h")
        .write_to_file(bindings())
        .expect("the bindings can be written");
}

/// docs.rs may ask for all features, and has the shipped bindings only.
#[cfg(feature = "buildtime_bindgen")]
fn ship_bindings() {
    fs::copy("src/bindings.rs", bindings()).expect("the bindings can be copied");
}

#[cfg(not(feature = "buildtime_bindgen"))]
fn generate(_: &Path) {}

#[cfg(not(feature = "buildtime_bindgen"))]
fn ship_bindings() {}
