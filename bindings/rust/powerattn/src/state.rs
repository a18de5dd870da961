// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, shape as shape_error, Error};
use crate::plan::{Device, Plan};
use crate::tensor::Indices;
use powerattn_sys as sys;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::{size_of, zeroed};
use std::path::Path;
use std::ptr;

/// D = C(head_dim + degree - 1, degree), the rows of a state.
pub fn state_rows(head_dim: usize, degree: i32) -> Result<usize, Error> {
    let mut rows = 0;
    // SAFETY: rows is written on success.
    check(unsafe { sys::powerattn_state_rows(to_i64("head_dim", head_dim)?, degree, &mut rows) })?;
    usize::try_from(rows).map_err(|_| shape_error("state_rows", format!("{rows} does not fit in this machine's usize")))
}

/// Bytes of S and z of `count` states (sequences x kv heads x layers) with elements `S`.
pub fn state_bytes<S: StateElement>(
    head_dim: usize,
    value_dim: usize,
    degree: i32,
    count: usize,
) -> Result<u64, Error> {
    let mut bytes = 0;
    let (d, e, n) = (to_i64("head_dim", head_dim)?, to_i64("value_dim", value_dim)?, to_i64("count", count)?);
    // SAFETY: bytes is written on success.
    check(unsafe { sys::powerattn_state_bytes(d, e, degree, S::DTYPE, n, &mut bytes) })?;
    Ok(bytes)
}

/// Row `row` of the canonical order: its ascending indices and its weight,
/// `phi(x)[row] = weight * x[indices[0]] * ...`.
pub fn state_monomial(head_dim: usize, degree: i32, row: usize) -> Result<(Vec<usize>, f64), Error> {
    // The library refuses other degrees before it writes an index.
    let mut indices = vec![0i32; usize::try_from(degree).unwrap_or(0).clamp(1, 64)];
    let mut weight = 0.0;
    let (d, row) = (to_i64("head_dim", head_dim)?, to_i64("row", row)?);
    // SAFETY: there is room for `degree` indices whenever the library accepts the degree (at most 8).
    check(unsafe { sys::powerattn_state_monomial(d, degree, row, indices.as_mut_ptr(), &mut weight) })?;
    Ok((indices.into_iter().map(|i| i as usize).collect(), weight))
}

pub(crate) fn to_i64(argument: &'static str, value: usize) -> Result<i64, Error> {
    i64::try_from(value).map_err(|_| shape_error(argument, format!("{value} does not fit in 64 bits")))
}

/// Sizes of a pool of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub count: usize,
    pub heads: usize,
    pub rows: usize,
    pub value_dim: usize,
    pub head_dim: usize,
    pub degree: i32,
}

impl Dims {
    pub(crate) fn of<T: Element, S: StateElement>(plan: &Plan<T, S>, count: usize) -> Result<Self, Error> {
        let desc = &plan.desc;
        Ok(Self {
            count,
            heads: desc.heads_kv as usize,
            rows: state_rows(desc.head_dim as usize, desc.degree)?,
            value_dim: desc.value_dim as usize,
            head_dim: desc.head_dim as usize,
            degree: desc.degree,
        })
    }

    fn elements(&self) -> Result<(usize, usize), Error> {
        let overflow = || shape_error("state", format!("the number of elements of {self:?} overflows"));
        let z = self.count.checked_mul(self.heads).and_then(|n| n.checked_mul(self.rows)).ok_or_else(overflow)?;
        let s = z.checked_mul(self.value_dim).ok_or_else(overflow)?;
        Ok((s, z))
    }
}

/// Owned states of some sequences (or slots): S `[count, heads_kv, D, value_dim]` and z `[count, heads_kv, D]`.
#[derive(Clone, Debug, PartialEq)]
pub struct State<S: StateElement> {
    s: Vec<S>,
    z: Vec<S>,
    dims: Dims,
}

/// A view of states that are only read.
#[derive(Clone, Copy, Debug)]
pub struct StateRef<'a, S> {
    pub(crate) raw: sys::powerattn_state,
    pub(crate) dims: Dims,
    pub(crate) device: Device,
    marker: PhantomData<&'a S>,
}

/// A view of states that are written.
#[derive(Debug)]
pub struct StateMut<'a, S> {
    pub(crate) raw: sys::powerattn_state,
    pub(crate) dims: Dims,
    pub(crate) device: Device,
    marker: PhantomData<&'a mut S>,
}

// SAFETY: as for TensorRef and TensorMut.
unsafe impl<S: Sync> Send for StateRef<'_, S> {}
unsafe impl<S: Sync> Sync for StateRef<'_, S> {}
unsafe impl<S: Send> Send for StateMut<'_, S> {}
unsafe impl<S: Sync> Sync for StateMut<'_, S> {}

pub(crate) const NO_STATE: sys::powerattn_state = sys::powerattn_state {
    s: ptr::null_mut(),
    z: ptr::null_mut(),
    s_stride_n: 0,
    s_stride_h: 0,
    z_stride_n: 0,
    z_stride_h: 0,
};

fn contiguous(s: *mut c_void, z: *mut c_void, dims: &Dims) -> sys::powerattn_state {
    let s_stride_h = (dims.rows * dims.value_dim) as i64;
    let z_stride_h = dims.rows as i64;
    sys::powerattn_state {
        s,
        z,
        s_stride_n: s_stride_h * dims.heads as i64,
        s_stride_h,
        z_stride_n: z_stride_h * dims.heads as i64,
        z_stride_h,
    }
}

impl<S: StateElement> State<S> {
    /// Zero states of `count` sequences for a plan's heads and sizes.
    pub fn zeros<T: Element, P: StateElement>(plan: &Plan<T, P>, count: usize) -> Result<Self, Error> {
        Self::with_dims(Dims::of(plan, count)?)
    }

    fn with_dims(dims: Dims) -> Result<Self, Error> {
        let (s, z) = dims.elements()?;
        Ok(Self { s: vec![S::default(); s], z: vec![S::default(); z], dims })
    }

    /// S, `[count, heads_kv, D, value_dim]` contiguous.
    pub fn s(&self) -> &[S] {
        &self.s
    }
    /// z, `[count, heads_kv, D]` contiguous.
    pub fn z(&self) -> &[S] {
        &self.z
    }
    /// S and z to be changed.
    pub fn parts_mut(&mut self) -> (&mut [S], &mut [S]) {
        (&mut self.s, &mut self.z)
    }
    /// Number of sequences or slots.
    pub fn count(&self) -> usize {
        self.dims.count
    }
    /// D.
    pub fn rows(&self) -> usize {
        self.dims.rows
    }

    /// A view to pass as an input.
    pub fn as_ref(&self) -> StateRef<'_, S> {
        let (s, z) = (self.s.as_ptr() as *mut c_void, self.z.as_ptr() as *mut c_void);
        StateRef { raw: contiguous(s, z, &self.dims), dims: self.dims, device: Device::Cpu, marker: PhantomData }
    }

    /// A view to pass as an output.
    pub fn as_mut(&mut self) -> StateMut<'_, S> {
        let (s, z) = (self.s.as_mut_ptr() as *mut c_void, self.z.as_mut_ptr() as *mut c_void);
        StateMut { raw: contiguous(s, z, &self.dims), dims: self.dims, device: Device::Cpu, marker: PhantomData }
    }

    /// A CPU plan that only moves states like this one. Its tensors would be f32 (f64 with f64 states), which any
    /// state type is legal beside.
    fn mover(&self) -> Result<MoverPlan<S>, Error> {
        let mut builder = Plan::<f32>::builder()
            .batch(1)
            .heads(self.dims.heads, self.dims.heads)
            .head_dim(self.dims.head_dim)
            .value_dim(self.dims.value_dim)
            .degree(self.dims.degree)
            .use_state();
        if self.dims.degree % 2 != 0 {
            builder = builder.unnormalized();
        }
        let mut desc = builder.desc;
        if S::DTYPE == f64::DTYPE {
            desc.dtype = f64::DTYPE;
        }
        desc.state_dtype = S::DTYPE;
        let mut raw = ptr::null_mut();
        // SAFETY: desc is a whole powerattn_desc; raw is written on success and owned by MoverPlan.
        check(unsafe { sys::powerattn_plan_create(&desc, &mut raw) })?;
        Ok(MoverPlan { raw, marker: PhantomData })
    }

    /// The versioned, self-describing bytes that any binding reads.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let plan = self.mover()?;
        let mut size = 0;
        let count = to_i64("count", self.dims.count)?;
        // SAFETY: size is written on success.
        check(unsafe { sys::powerattn_state_pack_size(plan.raw, 0, count, &mut size) })?;
        let mut bytes = vec![0u8; size as usize];
        // SAFETY: a plain C struct; the state and the bytes live through the call.
        unsafe {
            let mut args: sys::powerattn_pack_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_pack_args>() as u32;
            args.state = self.as_ref().raw;
            args.count = count;
            args.packed = bytes.as_mut_ptr() as *mut c_void;
            args.packed_bytes = size;
            check(sys::powerattn_state_pack(plan.raw, &args))?;
        }
        Ok(bytes)
    }

    /// Reads packed bytes into this state, converting the element type if need be. Bytes of another version or
    /// of other sizes are refused before anything is written.
    pub fn read_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let plan = self.mover()?;
        // SAFETY: as in to_bytes; unpack only reads the bytes.
        unsafe {
            let mut args: sys::powerattn_pack_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_pack_args>() as u32;
            args.count = to_i64("count", self.dims.count)?;
            args.state = self.as_mut().raw;
            args.packed = bytes.as_ptr() as *mut c_void;
            args.packed_bytes = bytes.len() as u64;
            check(sys::powerattn_state_unpack(plan.raw, &args))
        }
    }

    /// Writes the packed state to a file, whole or not at all.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Box<dyn std::error::Error>> {
        let path = path.as_ref();
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        std::fs::write(&partial, self.to_bytes()?)?;
        Ok(std::fs::rename(&partial, path)?)
    }

    /// Reads a state saved by [`State::save`] or by another binding.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(self.read_bytes(&std::fs::read(path)?)?)
    }

    /// Copies states out of another pool: `from[i]` of `other` into slot `to[i]` of this one (fork, rollback,
    /// conversion). Negative slots are skipped.
    pub fn copy_from<P: StateElement>(&mut self, other: &State<P>, from: &[i64], to: &[i64]) -> Result<(), Error> {
        if from.len() != to.len() {
            return Err(shape_error("to", format!("has {} slots, from has {}", to.len(), from.len())));
        }
        if (Dims { count: 0, ..self.dims }) != (Dims { count: 0, ..other.dims }) {
            return Err(shape_error("other", format!("has sizes {:?}, this state {:?}", other.dims, self.dims)));
        }
        let plan = self.mover()?;
        // SAFETY: a plain C struct; both pools and both slices live through the call and do not overlap, since
        // this one is borrowed mutably.
        unsafe {
            let mut args: sys::powerattn_convert_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_convert_args>() as u32;
            args.src_dtype = P::DTYPE;
            args.dst_dtype = S::DTYPE;
            args.src = other.as_ref().raw;
            args.dst = self.as_mut().raw;
            args.count = to_i64("from", from.len())?;
            args.src_slots = from.as_ptr();
            args.dst_slots = to.as_ptr();
            args.src_num_slots = other.dims.count as i64;
            args.dst_num_slots = self.dims.count as i64;
            check(sys::powerattn_state_convert(plan.raw, &args))
        }
    }
}

/// A plan owned only for moving states of type `S`.
struct MoverPlan<S> {
    raw: *mut sys::powerattn_plan,
    marker: PhantomData<S>,
}

impl<S> Drop for MoverPlan<S> {
    fn drop(&mut self) {
        // SAFETY: made by powerattn_plan_create, owned here.
        unsafe { sys::powerattn_plan_destroy(self.raw) }
    }
}

impl<S: StateElement> StateRef<'_, S> {
    /// States in a device's memory, `[count, heads_kv, D, value_dim]` and `[count, heads_kv, D]` contiguous.
    ///
    /// # Safety
    /// As [`crate::TensorRef::from_raw_parts`].
    pub unsafe fn from_raw_parts<T: Element, P: StateElement>(
        plan: &Plan<T, P>,
        s: *const S,
        z: *const S,
        count: usize,
    ) -> Result<Self, Error> {
        let dims = Dims::of(plan, count)?;
        let raw = contiguous(s as *mut c_void, z as *mut c_void, &dims);
        Ok(Self { raw, dims, device: plan.device(), marker: PhantomData })
    }
}

impl<S: StateElement> StateMut<'_, S> {
    /// States in a device's memory, `[count, heads_kv, D, value_dim]` and `[count, heads_kv, D]` contiguous.
    ///
    /// # Safety
    /// As [`crate::TensorMut::from_raw_parts`].
    pub unsafe fn from_raw_parts<T: Element, P: StateElement>(
        plan: &Plan<T, P>,
        s: *mut S,
        z: *mut S,
        count: usize,
    ) -> Result<Self, Error> {
        let dims = Dims::of(plan, count)?;
        let raw = contiguous(s as *mut c_void, z as *mut c_void, &dims);
        Ok(Self { raw, dims, device: plan.device(), marker: PhantomData })
    }
}

/// Compares a state's sizes and device with the plan's; `count` None leaves the number of states free.
pub(crate) fn check_state<T: Element, S: StateElement>(
    plan: &Plan<T, S>,
    dims: &Dims,
    device: Device,
    argument: &'static str,
    count: Option<usize>,
) -> Result<(), Error> {
    let expected = Dims { count: count.unwrap_or(dims.count), ..Dims::of(plan, 0)? };
    if *dims != expected {
        return Err(shape_error(argument, format!("has sizes {dims:?}; the plan needs {expected:?}")));
    }
    if device != plan.device() {
        return Err(shape_error(argument, format!("is on {device:?}; the plan is for {:?}", plan.device())));
    }
    Ok(())
}

/// Folding of segments into one state, used by [`crate::Compose`].
pub(crate) fn check_slots(slots: Option<&Indices<'_>>, batch: usize, states: usize) -> Result<(), Error> {
    if slots.is_none() && states < batch {
        return Err(shape_error("state", format!("has {states} states for {batch} sequences; pass slots")));
    }
    Ok(())
}
