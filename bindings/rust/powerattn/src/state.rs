// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, file as file_error, shape as shape_error, Error};
use crate::memory::zeros;
use crate::plan::{Device, Plan};
use crate::tensor::{check_extent, Indices};
use crate::workspace::Stream;
use powerattn_sys as sys;
use std::ffi::c_void;
use std::fs::File;
use std::io::Write;
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
        let rows = match plan.info().state_rows {
            i64::MAX => state_rows(desc.head_dim as usize, desc.degree)?, // refused with the library's words
            rows => rows as usize,
        };
        Ok(Self {
            count,
            heads: desc.heads_kv as usize,
            rows,
            value_dim: desc.value_dim as usize,
            head_dim: desc.head_dim as usize,
            degree: desc.degree,
        })
    }

    /// Strides of states and of kv heads of contiguous S and z. Saturating: where they overflow, `elements` fails.
    fn strides(&self) -> ([usize; 2], [usize; 2]) {
        let s = self.rows.saturating_mul(self.value_dim);
        ([s.saturating_mul(self.heads), s], [self.rows.saturating_mul(self.heads), self.rows])
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

// SAFETY: as for TensorRef.
unsafe impl<S: Sync> Send for StateRef<'_, S> {}
// SAFETY: as for TensorRef.
unsafe impl<S: Sync> Sync for StateRef<'_, S> {}
// SAFETY: as for TensorMut.
unsafe impl<S: Send> Send for StateMut<'_, S> {}
// SAFETY: as for TensorMut.
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
    let ([s_n, s_h], [z_n, z_h]) = dims.strides();
    raw_pool(s, z, [s_n as i64, s_h as i64, z_n as i64, z_h as i64])
}

impl<S: StateElement> State<S> {
    /// Zero states of `count` sequences for a plan's heads and sizes.
    pub fn zeros<T: Element, P: StateElement>(plan: &Plan<T, P>, count: usize) -> Result<Self, Error> {
        Self::with_dims(Dims::of(plan, count)?)
    }

    fn with_dims(dims: Dims) -> Result<Self, Error> {
        let (s, z) = dims.elements()?;
        Ok(Self { s: zeros(s)?, z: zeros(z)?, dims })
    }

    pub(crate) fn dims(&self) -> Dims {
        self.dims
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

    /// A CPU plan that only moves states like this one.
    fn mover(&self) -> Result<Plan<S::Beside, S>, Error> {
        let Dims { heads, head_dim, value_dim, degree, .. } = self.dims;
        let builder = Plan::<S::Beside>::builder()
            .heads(heads, heads)
            .head_dim(head_dim)
            .value_dim(value_dim)
            .degree(degree)
            .use_state()
            .state_type::<S>();
        if degree % 2 == 0 { builder } else { builder.unnormalized() }.build()
    }

    /// The versioned, self-describing bytes that any binding reads.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        self.to_bytes_as::<S>()
    }

    /// The same with numbers of another type, such as `half::bf16` at half the size.
    pub fn to_bytes_as<P: StateElement>(&self) -> Result<Vec<u8>, Error> {
        self.mover()?.pack_as::<P>(self.as_ref(), Stream::default())
    }

    /// Reads packed bytes into this state, converting the element type if need be. Bytes of another version or
    /// of other sizes are refused before anything is written.
    pub fn read_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.mover()?.unpack(bytes, self.as_mut(), Stream::default())
    }

    /// Writes the packed state to a file, whole or not at all.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let bytes = self.to_bytes()?;
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&partial, path)
        };
        write().map_err(|error| file_error(path, &error))
    }

    /// Reads a state saved by [`State::save`] or by another binding.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        self.read_bytes(&std::fs::read(path).map_err(|error| file_error(path, &error))?)
    }

    /// Copies states out of another pool: `from[i]` of `other` into slot `to[i]` of this one (fork, rollback,
    /// conversion). Negative slots are skipped.
    pub fn copy_from<P: StateElement>(&mut self, other: &State<P>, from: &[i64], to: &[i64]) -> Result<(), Error> {
        self.mover()?.convert(other.as_ref(), self.as_mut(), from, to, Stream::default())
    }
}

/// Moving states on the plan's device. The plan's tensors do not matter, its heads and sizes do.
impl<T: Element, S: StateElement> Plan<T, S> {
    /// Packs states into host memory; on CUDA it waits for the stream. See [`State::to_bytes`].
    pub fn pack(&self, states: StateRef<'_, S>, stream: Stream) -> Result<Vec<u8>, Error> {
        self.pack_as::<S>(states, stream)
    }

    /// The same with numbers of another type.
    pub fn pack_as<P: StateElement>(&self, states: StateRef<'_, S>, stream: Stream) -> Result<Vec<u8>, Error> {
        check_state(self, &states.dims, states.device, "states", None)?;
        let count = to_i64("count", states.dims.count)?;
        let mut size = 0;
        // SAFETY: size is written on success.
        check(unsafe { sys::powerattn_state_pack_size(self.raw.as_ptr(), P::DTYPE, count, &mut size) })?;
        let mut bytes = zeros::<u8>(usize::try_from(size).unwrap_or(usize::MAX))?;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_pack_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_pack_args>() as u32;
        args.dtype = P::DTYPE;
        args.state = states.raw;
        args.count = count;
        args.packed = bytes.as_mut_ptr() as *mut c_void;
        args.packed_bytes = size;
        args.stream = stream.0;
        // SAFETY: the states were compared with the plan, and `bytes` has the size that the plan asked for.
        check(unsafe { sys::powerattn_state_pack(self.raw.as_ptr(), &args) })?;
        Ok(bytes)
    }

    /// Reads packed bytes into states; on CUDA it waits for the stream. See [`State::read_bytes`].
    pub fn unpack(&self, bytes: &[u8], states: StateMut<'_, S>, stream: Stream) -> Result<(), Error> {
        check_state(self, &states.dims, states.device, "states", None)?;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_pack_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_pack_args>() as u32;
        args.state = states.raw;
        args.count = to_i64("count", states.dims.count)?;
        args.packed = bytes.as_ptr() as *mut c_void;
        args.packed_bytes = bytes.len() as u64;
        args.stream = stream.0;
        // SAFETY: the states were compared with the plan; unpack only reads the bytes, no more than there are.
        check(unsafe { sys::powerattn_state_unpack(self.raw.as_ptr(), &args) })
    }

    /// Copies `from[i]` of `src` into slot `to[i]` of `dst`, converting the element type; negative slots are skipped.
    pub fn convert<'a, A: StateElement, B: StateElement>(
        &self,
        src: StateRef<'_, A>,
        dst: StateMut<'_, B>,
        from: impl Into<Indices<'a>>,
        to: impl Into<Indices<'a>>,
        stream: Stream,
    ) -> Result<(), Error> {
        let (from, to) = (from.into(), to.into());
        check_state(self, &src.dims, src.device, "src", None)?;
        check_state(self, &dst.dims, dst.device, "dst", None)?;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_convert_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_convert_args>() as u32;
        args.src_dtype = A::DTYPE;
        args.dst_dtype = B::DTYPE;
        args.src = src.raw;
        args.dst = dst.raw;
        args.count = to_i64("from", from.len())?;
        args.src_slots = from.check("from", from.len(), self.device())?;
        args.dst_slots = to.check("to", from.len(), self.device())?;
        args.src_num_slots = to_i64("src", src.dims.count)?;
        args.dst_num_slots = to_i64("dst", dst.dims.count)?;
        args.stream = stream.0;
        // SAFETY: both pools and both index arrays were compared with the plan and are borrowed through the call.
        check(unsafe { sys::powerattn_state_convert(self.raw.as_ptr(), &args) })
    }
}

/// Bounds of a strided pool inside slices of the host; strides are of states and of kv heads, in elements.
fn check_pool(
    (s, z): (usize, usize),
    dims: &Dims,
    s_strides: [usize; 2],
    z_strides: [usize; 2],
) -> Result<[i64; 4], Error> {
    dims.elements()?;
    let pool = |len, run, [n, h]: [usize; 2]| check_extent(len, [dims.count, dims.heads, 1, run], [n, h, 0]);
    let s = pool(s, dims.rows * dims.value_dim, s_strides)?;
    let z = pool(z, dims.rows, z_strides)?;
    Ok([s[0], s[1], z[0], z[1]])
}

fn raw_pool(s: *mut c_void, z: *mut c_void, [s_n, s_h, z_n, z_h]: [i64; 4]) -> sys::powerattn_state {
    sys::powerattn_state { s, z, s_stride_n: s_n, s_stride_h: s_h, z_stride_n: z_n, z_stride_h: z_h }
}

impl<'a, S: StateElement> StateRef<'a, S> {
    /// States in the caller's memory, S `[count, heads_kv, D, value_dim]` and z `[count, heads_kv, D]` contiguous.
    pub fn new<T: Element>(plan: &Plan<T, S>, s: &'a [S], z: &'a [S], count: usize) -> Result<Self, Error> {
        let dims = Dims::of(plan, count)?;
        let (s_strides, z_strides) = dims.strides();
        Self::with_strides(plan, s, z, count, s_strides, z_strides)
    }

    /// The same with gaps: strides of states and of kv heads, in elements.
    pub fn with_strides<T: Element>(
        plan: &Plan<T, S>,
        s: &'a [S],
        z: &'a [S],
        count: usize,
        s_strides: [usize; 2],
        z_strides: [usize; 2],
    ) -> Result<Self, Error> {
        let dims = Dims::of(plan, count)?;
        let strides = check_pool((s.len(), z.len()), &dims, s_strides, z_strides)?;
        let raw = raw_pool(s.as_ptr() as *mut c_void, z.as_ptr() as *mut c_void, strides);
        Ok(Self { raw, dims, device: Device::Cpu, marker: PhantomData })
    }

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

impl<'a, S: StateElement> StateMut<'a, S> {
    /// States in the caller's memory, S `[count, heads_kv, D, value_dim]` and z `[count, heads_kv, D]` contiguous.
    pub fn new<T: Element>(plan: &Plan<T, S>, s: &'a mut [S], z: &'a mut [S], count: usize) -> Result<Self, Error> {
        let dims = Dims::of(plan, count)?;
        let (s_strides, z_strides) = dims.strides();
        Self::with_strides(plan, s, z, count, s_strides, z_strides)
    }

    /// The same with gaps: strides of states and of kv heads, in elements; overlaps are refused by the library.
    pub fn with_strides<T: Element>(
        plan: &Plan<T, S>,
        s: &'a mut [S],
        z: &'a mut [S],
        count: usize,
        s_strides: [usize; 2],
        z_strides: [usize; 2],
    ) -> Result<Self, Error> {
        let dims = Dims::of(plan, count)?;
        let strides = check_pool((s.len(), z.len()), &dims, s_strides, z_strides)?;
        let raw = raw_pool(s.as_mut_ptr() as *mut c_void, z.as_mut_ptr() as *mut c_void, strides);
        Ok(Self { raw, dims, device: Device::Cpu, marker: PhantomData })
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    const DIMS: Dims = Dims { count: 2, heads: 3, rows: 10, value_dim: 4, head_dim: 4, degree: 2 };

    #[test]
    fn pools_stay_inside_their_slices() {
        let (s_strides, z_strides) = DIMS.strides();
        assert_eq!((s_strides, z_strides), ([120, 40], [30, 10]));
        assert_eq!(DIMS.elements().unwrap(), (240, 60));
        assert_eq!(check_pool((240, 60), &DIMS, s_strides, z_strides).unwrap(), [120, 40, 30, 10]);
        assert!(check_pool((239, 60), &DIMS, s_strides, z_strides).is_err());
        assert!(check_pool((240, 59), &DIMS, s_strides, z_strides).is_err());
        assert!(check_pool((240, 60), &DIMS, [usize::MAX, 40], z_strides).is_err());
        assert!(check_pool((0, 0), &Dims { count: 0, ..DIMS }, s_strides, z_strides).is_ok());
        for dims in [Dims { count: usize::MAX, ..DIMS }, Dims { rows: usize::MAX / 2, ..DIMS }] {
            assert!(dims.elements().is_err());
            assert!(State::<f32>::with_dims(dims).is_err());
        }
    }

    #[test]
    fn views_of_a_state_are_its_memory() {
        let mut state = State::<f64>::with_dims(DIMS).unwrap();
        let view = state.as_mut();
        let last = |n: i64, h: i64, strides: (i64, i64), run: i64| (n * strides.0 + h * strides.1 + run - 1) as usize;
        let (s_strides, z_strides) =
            ((view.raw.s_stride_n, view.raw.s_stride_h), (view.raw.z_stride_n, view.raw.z_stride_h));
        // SAFETY: the last elements of the last state, written as the library would (under Miri).
        unsafe {
            *(view.raw.s as *mut f64).add(last(1, 2, s_strides, 40)) = 5.0;
            *(view.raw.z as *mut f64).add(last(1, 2, z_strides, 10)) = 7.0;
        }
        assert_eq!((state.s()[239], state.z()[59]), (5.0, 7.0));
        assert_eq!(state.clone().as_ref().dims, DIMS);
    }
}
