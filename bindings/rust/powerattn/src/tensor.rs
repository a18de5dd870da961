// SPDX-License-Identifier: Apache-2.0
use crate::element::Element;
use crate::error::{shape as shape_error, Error};
use crate::plan::Device;
use powerattn_sys as sys;
use std::ffi::c_void;
use std::marker::PhantomData;

/// A strided `[batch, tokens, heads, dim]` view of elements that are only read.
///
/// Rows per token and head (log gates, row norms) are `[batch, tokens, heads]`: [`TensorRef::rows`].
#[derive(Debug)]
pub struct TensorRef<'a, T> {
    pub(crate) raw: Raw,
    marker: PhantomData<&'a T>,
}

impl<T> Clone for TensorRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for TensorRef<'_, T> {}

/// A strided `[batch, tokens, heads, dim]` view of elements that are written.
#[derive(Debug)]
pub struct TensorMut<'a, T> {
    pub(crate) raw: Raw,
    marker: PhantomData<&'a mut T>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub data: *mut c_void,
    pub shape: [usize; 4],
    pub strides: [i64; 3],
    pub device: Device,
}

// SAFETY: a TensorRef is a `&[T]` with strides, a TensorMut a `&mut [T]`; the pointers are only dereferenced by
// the library during a call that borrows the view.
unsafe impl<T: Sync> Send for TensorRef<'_, T> {}
unsafe impl<T: Sync> Sync for TensorRef<'_, T> {}
unsafe impl<T: Send> Send for TensorMut<'_, T> {}
unsafe impl<T: Sync> Sync for TensorMut<'_, T> {}

impl Raw {
    pub(crate) fn tensor(&self) -> sys::powerattn_tensor {
        sys::powerattn_tensor {
            data: self.data,
            stride_b: self.strides[0],
            stride_t: self.strides[1],
            stride_h: self.strides[2],
        }
    }
}

fn contiguous([_, t, h, d]: [usize; 4]) -> Result<[usize; 3], Error> {
    let row = h.checked_mul(d);
    let batch = row.and_then(|row| row.checked_mul(t));
    match (batch, row) {
        (Some(batch), Some(row)) => Ok([batch, row, d]),
        _ => Err(shape_error("shape", "the number of elements overflows".into())),
    }
}

/// Elements from the first to the last that the view reaches, or an error on overflow.
fn extent([b, t, h, d]: [usize; 4], strides: [usize; 3]) -> Result<usize, Error> {
    if b == 0 || t == 0 || h == 0 || d == 0 {
        return Ok(0);
    }
    let mut last = d - 1;
    for (n, stride) in [b, t, h].into_iter().zip(strides) {
        let step = (n - 1).checked_mul(stride);
        last = step
            .and_then(|step| last.checked_add(step))
            .ok_or_else(|| shape_error("strides", "the offset of the last element overflows".into()))?;
    }
    last.checked_add(1).ok_or_else(|| shape_error("strides", "the offset of the last element overflows".into()))
}

fn check_extent(len: usize, shape: [usize; 4], strides: [usize; 3]) -> Result<[i64; 3], Error> {
    let needed = extent(shape, strides)?;
    if needed > len {
        return Err(shape_error(
            "data",
            format!("has {len} elements; shape {shape:?} with strides {strides:?} reaches {needed}"),
        ));
    }
    let mut out = [0i64; 3];
    for (to, from) in out.iter_mut().zip(strides) {
        *to = i64::try_from(from).map_err(|_| shape_error("strides", format!("{from} does not fit in 64 bits")))?;
    }
    Ok(out)
}

impl<'a, T> TensorRef<'a, T> {
    /// A contiguous `[b, t, h, d]` tensor.
    pub fn new(data: &'a [T], shape: [usize; 4]) -> Result<Self, Error> {
        Self::with_strides(data, shape, contiguous(shape)?)
    }

    /// Contiguous rows `[b, t, h]`: log gates, row norms.
    pub fn rows(data: &'a [T], shape: [usize; 3]) -> Result<Self, Error> {
        Self::new(data, [shape[0], shape[1], shape[2], 1])
    }

    /// Strides in elements of batch, tokens and heads; the last dimension has stride 1. A stride of 0 broadcasts.
    pub fn with_strides(data: &'a [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        let strides = check_extent(data.len(), shape, strides)?;
        let data = data.as_ptr() as *mut c_void;
        Ok(Self { raw: Raw { data, shape, strides, device: Device::Cpu }, marker: PhantomData })
    }

    /// A tensor in a device's memory.
    ///
    /// # Safety
    /// `data` must point to memory of `device` that holds the tensor for `'a` and is not written meanwhile, stream
    /// order included.
    pub unsafe fn from_raw_parts(data: *const T, shape: [usize; 4], strides: [i64; 3], device: Device) -> Self {
        Self { raw: Raw { data: data as *mut c_void, shape, strides, device }, marker: PhantomData }
    }

    /// `[b, t, h, d]`.
    pub fn shape(&self) -> [usize; 4] {
        self.raw.shape
    }
}

impl<'a, T> TensorMut<'a, T> {
    /// A contiguous `[b, t, h, d]` tensor.
    pub fn new(data: &'a mut [T], shape: [usize; 4]) -> Result<Self, Error> {
        Self::with_strides(data, shape, contiguous(shape)?)
    }

    /// Contiguous rows `[b, t, h]`: row norms, gradients of log gates.
    pub fn rows(data: &'a mut [T], shape: [usize; 3]) -> Result<Self, Error> {
        Self::new(data, [shape[0], shape[1], shape[2], 1])
    }

    /// Strides in elements of batch, tokens and heads; overlapping elements are refused by the library.
    pub fn with_strides(data: &'a mut [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        let strides = check_extent(data.len(), shape, strides)?;
        let data = data.as_mut_ptr() as *mut c_void;
        Ok(Self { raw: Raw { data, shape, strides, device: Device::Cpu }, marker: PhantomData })
    }

    /// A tensor in a device's memory.
    ///
    /// # Safety
    /// `data` must point to memory of `device` that holds the tensor for `'a` and that nothing else touches
    /// meanwhile, stream order included.
    pub unsafe fn from_raw_parts(data: *mut T, shape: [usize; 4], strides: [i64; 3], device: Device) -> Self {
        Self { raw: Raw { data: data as *mut c_void, shape, strides, device }, marker: PhantomData }
    }

    /// `[b, t, h, d]`.
    pub fn shape(&self) -> [usize; 4] {
        self.raw.shape
    }
}

/// Index arrays of a call (cumulative lengths, slots, lengths, positions): a slice of the host for a CPU plan.
#[derive(Clone, Copy, Debug)]
pub struct Indices<'a> {
    data: *const i64,
    len: usize,
    device: Device,
    marker: PhantomData<&'a [i64]>,
}

// SAFETY: a `&[i64]`.
unsafe impl Send for Indices<'_> {}
unsafe impl Sync for Indices<'_> {}

impl<'a> From<&'a [i64]> for Indices<'a> {
    fn from(data: &'a [i64]) -> Self {
        Self { data: data.as_ptr(), len: data.len(), device: Device::Cpu, marker: PhantomData }
    }
}

impl<'a, const N: usize> From<&'a [i64; N]> for Indices<'a> {
    fn from(data: &'a [i64; N]) -> Self {
        Self::from(&data[..])
    }
}

impl<'a> From<&'a Vec<i64>> for Indices<'a> {
    fn from(data: &'a Vec<i64>) -> Self {
        Self::from(&data[..])
    }
}

impl Indices<'_> {
    /// Indices in a device's memory.
    ///
    /// # Safety
    /// `data` must point to `len` integers in memory of `device`, not written while a call uses them.
    pub unsafe fn from_raw_parts(data: *const i64, len: usize, device: Device) -> Self {
        Self { data, len, device, marker: PhantomData }
    }

    /// The pointer, after comparing the length and the device with the plan's.
    pub(crate) fn check(&self, argument: &'static str, expected: usize, device: Device) -> Result<*const i64, Error> {
        if self.len != expected {
            return Err(shape_error(argument, format!("has {} entries; the plan needs {expected}", self.len)));
        }
        if self.device != device {
            return Err(shape_error(argument, format!("is on {:?}; the plan is for {device:?}", self.device)));
        }
        Ok(self.data)
    }
}

/// Checks a view against the plan: shape and device.
pub(crate) fn check_tensor(
    raw: &Raw,
    argument: &'static str,
    expected: [usize; 4],
    device: Device,
) -> Result<sys::powerattn_tensor, Error> {
    if raw.shape != expected {
        return Err(shape_error(argument, format!("has shape {:?}; the plan needs {expected:?}", raw.shape)));
    }
    if raw.device != device {
        return Err(shape_error(argument, format!("is on {:?}; the plan is for {device:?}", raw.device)));
    }
    Ok(raw.tensor())
}

pub(crate) const NO_TENSOR: sys::powerattn_tensor =
    sys::powerattn_tensor { data: std::ptr::null_mut(), stride_b: 0, stride_t: 0, stride_h: 0 };

/// The same for an optional view.
pub(crate) fn check_optional<T: Element>(
    view: Option<&TensorRef<'_, T>>,
    argument: &'static str,
    expected: [usize; 4],
    device: Device,
) -> Result<sys::powerattn_tensor, Error> {
    view.map_or(Ok(NO_TENSOR), |view| check_tensor(&view.raw, argument, expected, device))
}

/// The same for an optional output.
pub(crate) fn check_optional_out<T: Element>(
    view: Option<&TensorMut<'_, T>>,
    argument: &'static str,
    expected: [usize; 4],
    device: Device,
) -> Result<sys::powerattn_tensor, Error> {
    view.map_or(Ok(NO_TENSOR), |view| check_tensor(&view.raw, argument, expected, device))
}

#[cfg(feature = "ndarray")]
mod from_ndarray {
    use super::{shape_error, Device, Error, PhantomData, Raw, TensorMut, TensorRef};
    use ndarray::{ArrayView4, ArrayViewMut4};
    use std::ffi::c_void;

    fn strides(shape: &[usize], strides: &[isize]) -> Result<[i64; 3], Error> {
        if shape[3] > 1 && strides[3] != 1 {
            return Err(shape_error("array", format!("the last dimension has stride {}, it needs 1", strides[3])));
        }
        Ok([strides[0] as i64, strides[1] as i64, strides[2] as i64])
    }

    impl<'a, T> TryFrom<ArrayView4<'a, T>> for TensorRef<'a, T> {
        type Error = Error;
        fn try_from(view: ArrayView4<'a, T>) -> Result<Self, Error> {
            let strides = strides(view.shape(), view.strides())?;
            let (b, t, h, d) = view.dim();
            let raw = Raw { data: view.as_ptr() as *mut c_void, shape: [b, t, h, d], strides, device: Device::Cpu };
            Ok(Self { raw, marker: PhantomData })
        }
    }

    impl<'a, T> TryFrom<ArrayViewMut4<'a, T>> for TensorMut<'a, T> {
        type Error = Error;
        fn try_from(mut view: ArrayViewMut4<'a, T>) -> Result<Self, Error> {
            let strides = strides(view.shape(), view.strides())?;
            let (b, t, h, d) = view.dim();
            let raw = Raw { data: view.as_mut_ptr() as *mut c_void, shape: [b, t, h, d], strides, device: Device::Cpu };
            Ok(Self { raw, marker: PhantomData })
        }
    }
}
