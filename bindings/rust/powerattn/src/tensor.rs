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

// SAFETY: a `&[T]` with strides; the library only reads through it, during a call that borrows the view.
unsafe impl<T: Sync> Send for TensorRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for TensorRef<'_, T> {}
// SAFETY: a `&mut [T]` with strides; the library writes through it during a call that owns the view.
unsafe impl<T: Send> Send for TensorMut<'_, T> {}
// SAFETY: nothing can be reached through a shared TensorMut but its shape.
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

pub(crate) fn check_extent(len: usize, shape: [usize; 4], strides: [usize; 3]) -> Result<[i64; 3], Error> {
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
// SAFETY: as above.
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

    pub(crate) fn len(&self) -> usize {
        self.len
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
    use ndarray::{ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4};
    use std::ffi::c_void;

    fn strides(shape: &[usize], strides: &[isize]) -> Result<[i64; 3], Error> {
        if shape[3] > 1 && strides[3] != 1 {
            return Err(shape_error("array", format!("the last dimension has stride {}, it needs 1", strides[3])));
        }
        Ok([strides[0] as i64, strides[1] as i64, strides[2] as i64])
    }

    /// Rows per token and head: log gates, row norms.
    impl<'a, T> From<ArrayView3<'a, T>> for TensorRef<'a, T> {
        fn from(view: ArrayView3<'a, T>) -> Self {
            let (b, t, h) = view.dim();
            let raw = raw_rows(view.as_ptr() as *mut c_void, [b, t, h], view.strides());
            Self { raw, marker: PhantomData }
        }
    }

    impl<'a, T> From<ArrayViewMut3<'a, T>> for TensorMut<'a, T> {
        fn from(mut view: ArrayViewMut3<'a, T>) -> Self {
            let (b, t, h) = view.dim();
            let data = view.as_mut_ptr() as *mut c_void;
            Self { raw: raw_rows(data, [b, t, h], view.strides()), marker: PhantomData }
        }
    }

    fn raw_rows(data: *mut c_void, [b, t, h]: [usize; 3], strides: &[isize]) -> Raw {
        let strides = [strides[0] as i64, strides[1] as i64, strides[2] as i64];
        Raw { data, shape: [b, t, h, 1], strides, device: Device::Cpu }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_stay_inside_their_slice() {
        let x: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let t = TensorRef::with_strides(&x, [2, 2, 1, 3], [16, 7, 0]).unwrap();
        // The last element that the view promises is the last that may be read.
        let at = |b: i64, n: i64, i: i64| {
            // SAFETY: inside the shape, so inside the slice: that is what is tested (under Miri).
            unsafe { *(t.raw.data as *const f32).offset((b * t.raw.strides[0] + n * t.raw.strides[1] + i) as isize) }
        };
        assert_eq!((at(0, 0, 0), at(1, 1, 2)), (0.0, 25.0));
        assert!(TensorRef::with_strides(&x[..26], [2, 2, 1, 3], [16, 7, 0]).is_ok());
        assert!(TensorRef::with_strides(&x[..25], [2, 2, 1, 3], [16, 7, 0]).is_err());
        let mut y = x.clone();
        let m = TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap();
        // SAFETY: element 31 of 32, and the view is the only way to them.
        unsafe { *(m.raw.data as *mut f32).add(31) = 5.0 };
        assert_eq!(y[31], 5.0);
    }

    #[test]
    fn empty_views_reach_nothing() {
        let none: [f32; 0] = [];
        for shape in [[0, 4, 2, 4], [3, 0, 2, 4], [3, 4, 0, 4], [3, 4, 2, 0]] {
            assert_eq!(TensorRef::new(&none, shape).unwrap().shape(), shape);
            assert!(TensorMut::new(&mut [0f32; 0], shape).is_ok());
        }
        assert!(TensorRef::new(&none, [1, 1, 1, 1]).is_err());
    }

    #[test]
    fn offsets_that_overflow_are_refused() {
        let x = [0f32; 8];
        for strides in [[usize::MAX, 1, 1], [usize::MAX / 2 + 1, 1, 1], [isize::MAX as usize, 1, 1]] {
            assert!(TensorRef::with_strides(&x, [3, 1, 1, 1], strides).is_err());
        }
        assert!(TensorRef::new(&x, [1, 1, usize::MAX, 2]).is_err());
        assert!(TensorRef::new(&x, [2, usize::MAX, 1, 1]).is_err());
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn ndarray_views_are_their_memory() {
        use ndarray::{s, Array3, Array4};
        let x = Array4::from_shape_fn((2, 3, 4, 5), |(b, t, h, i)| (b * 1000 + t * 100 + h * 10 + i) as f32);
        let view = x.slice(s![..;-1, 1.., ..;2, 1..4]);
        let t = TensorRef::try_from(view).unwrap();
        assert_eq!(t.shape(), [2, 2, 2, 3]);
        let at = |i: [i64; 4]| {
            let offset: i64 = (0..3).map(|k| i[k] * t.raw.strides[k]).sum::<i64>() + i[3];
            // SAFETY: inside the shape.
            unsafe { *(t.raw.data as *const f32).offset(offset as isize) }
        };
        assert_eq!(at([0, 0, 0, 0]), 1101.0);
        assert_eq!(at([1, 1, 1, 2]), 223.0);
        let mut g = Array3::<f32>::zeros((2, 3, 4));
        let rows = TensorMut::from(g.view_mut().permuted_axes([0, 2, 1]));
        assert_eq!((rows.shape(), rows.raw.strides), ([2, 4, 3, 1], [12, 1, 4]));
    }
}
