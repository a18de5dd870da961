// SPDX-License-Identifier: Apache-2.0
use powerattn_sys as sys;

pub(crate) mod sealed {
    /// # Safety
    /// A plain number for which all bytes zero is a value, 0.
    pub unsafe trait Number: Copy {}
    // SAFETY: an integer.
    unsafe impl Number for u8 {}
    // SAFETY: IEEE 754 zero is all bytes zero.
    unsafe impl Number for f32 {}
    // SAFETY: as f32.
    unsafe impl Number for f64 {}
    // SAFETY: `repr(transparent)` over `u16`, with IEEE 754 zero.
    #[cfg(feature = "half")]
    unsafe impl Number for half::f16 {}
    // SAFETY: as f16.
    #[cfg(feature = "half")]
    unsafe impl Number for half::bf16 {}
}

/// Element type of queries, keys, values and outputs: `f32`, `f64`, `half::f16`, `half::bf16`.
pub trait Element: Copy + Default + Send + Sync + 'static + sealed::Number {
    /// Type of log gates, row norms and default states: `f64` with `f64`, else `f32`.
    type Stat: StateElement;
    #[doc(hidden)]
    const DTYPE: i32;
}

/// Element type of states: `f32`, `f64`, `half::bf16`.
pub trait StateElement: Element {
    /// Elements of a plan that only moves such states: a type that every library takes beside them.
    #[doc(hidden)]
    type Beside: Element;
}

impl Element for f32 {
    type Stat = f32;
    const DTYPE: i32 = sys::POWERATTN_FLOAT32 as i32;
}
impl StateElement for f32 {
    type Beside = f32;
}

impl Element for f64 {
    type Stat = f64;
    const DTYPE: i32 = sys::POWERATTN_FLOAT64 as i32;
}
impl StateElement for f64 {
    type Beside = f64;
}

#[cfg(feature = "half")]
impl Element for half::f16 {
    type Stat = f32;
    const DTYPE: i32 = sys::POWERATTN_FLOAT16 as i32;
}

#[cfg(feature = "half")]
impl Element for half::bf16 {
    type Stat = f32;
    const DTYPE: i32 = sys::POWERATTN_BFLOAT16 as i32;
}
#[cfg(feature = "half")]
impl StateElement for half::bf16 {
    type Beside = f32;
}
