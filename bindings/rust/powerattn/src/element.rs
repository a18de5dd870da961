// SPDX-License-Identifier: Apache-2.0
use powerattn_sys as sys;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    #[cfg(feature = "half")]
    impl Sealed for half::f16 {}
    #[cfg(feature = "half")]
    impl Sealed for half::bf16 {}
}

/// Element type of queries, keys, values and outputs: `f32`, `f64`, `half::f16`, `half::bf16`.
pub trait Element: Copy + Default + Send + Sync + 'static + sealed::Sealed {
    /// Type of log gates, row norms and default states: `f64` with `f64`, else `f32`.
    type Stat: StateElement;
    #[doc(hidden)]
    const DTYPE: i32;
}

/// Element type of states: `f32`, `f64`, `half::bf16`.
pub trait StateElement: Element {}

impl Element for f32 {
    type Stat = f32;
    const DTYPE: i32 = sys::POWERATTN_FLOAT32 as i32;
}
impl StateElement for f32 {}

impl Element for f64 {
    type Stat = f64;
    const DTYPE: i32 = sys::POWERATTN_FLOAT64 as i32;
}
impl StateElement for f64 {}

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
impl StateElement for half::bf16 {}
