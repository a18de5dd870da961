// SPDX-License-Identifier: Apache-2.0
//! The shipped bindings against the library, and against what bindgen makes of the header today.

use powerattn_sys as sys;

#[test]
fn the_library_is_the_one_the_header_describes() {
    let expected =
        sys::POWERATTN_VERSION_MAJOR * 10000 + sys::POWERATTN_VERSION_MINOR * 100 + sys::POWERATTN_VERSION_PATCH;
    assert_eq!(unsafe { sys::powerattn_version() }, expected);
}

#[test]
fn struct_sizes_are_accepted_by_the_library() {
    let mut desc: sys::powerattn_desc = unsafe { core::mem::zeroed() };
    desc.struct_size = core::mem::size_of::<sys::powerattn_desc>() as u32;
    desc.dtype = sys::POWERATTN_FLOAT32 as i32;
    desc.degree = 2;
    desc.batch = 1;
    desc.seq_len = 4;
    desc.heads_q = 1;
    desc.heads_kv = 1;
    desc.head_dim = 4;
    let mut plan = core::ptr::null_mut();
    unsafe {
        assert_eq!(sys::powerattn_plan_create(&desc, &mut plan), sys::POWERATTN_OK as i32);
        sys::powerattn_plan_destroy(plan);
    }
}

#[cfg(feature = "buildtime_bindgen")]
#[test]
fn shipped_bindings_are_up_to_date() {
    let shipped = include_str!("../src/bindings.rs");
    let generated = include_str!(concat!(env!("OUT_DIR"), "/bindings.rs"));
    assert!(shipped == generated, "run ./regenerate.sh: src/bindings.rs is not what the header gives");
}
