// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, shape as shape_error, Error, Status};
use crate::tensor::Indices;
use powerattn_sys as sys;
use std::marker::PhantomData;
use std::os::raw::c_char;
use std::ptr::{self, NonNull};

/// Where a plan runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    Cpu,
    /// A CUDA device by its index.
    Cuda(i32),
}

/// Form of the computation: equal results within rounding, different cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// The cost model decides.
    #[default]
    Auto,
    /// Weights in tiles: quadratic time, any degree, no state.
    Attention,
    /// Attention inside chunks, state across them: linear time.
    Chunked,
}

/// Pairing of a rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RopeStyle {
    /// Pairs `(i, i + dim/2)`.
    Half,
    /// Pairs `(2i, 2i + 1)`.
    Interleaved,
}

/// Rotary embedding inside the call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Pairing.
    pub style: RopeStyle,
    /// Leading dimensions rotated; 0 for all.
    pub dim: usize,
    /// Base of the angles, usually 10000.
    pub base: f64,
}

impl Default for Rope {
    fn default() -> Self {
        Self { style: RopeStyle::Half, dim: 0, base: 10000.0 }
    }
}

/// What a plan chose and what it needs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PlanInfo {
    /// `Form::Attention` or `Form::Chunked`.
    pub form: Form,
    /// Tokens per chunk.
    pub chunk_size: usize,
    /// Number of states: batch entries or packed sequences.
    pub sequences: usize,
    /// D, the rows of a state; `i64::MAX` where it does not fit.
    pub state_rows: i64,
    /// Bytes of all states; `u64::MAX` where it overflows.
    pub state_bytes: u64,
    /// Bytes of workspace of a forward call.
    pub workspace_forward: u64,
    /// Bytes of workspace of a backward call without saved memory.
    pub workspace_backward: u64,
    /// Bytes of workspace of a backward call with saved memory.
    pub workspace_backward_saved: u64,
    /// Bytes of workspace of a step.
    pub workspace_step: u64,
    /// Bytes of workspace of a summary.
    pub workspace_summary: u64,
    /// Bytes that forward can save for backward.
    pub saved_bytes: u64,
    /// The scale in force.
    pub scale: f64,
    /// The cost model's time of a forward call, seconds.
    pub predicted_forward_s: f64,
    /// The cost model's time of a backward call, seconds.
    pub predicted_backward_s: f64,
}

/// An immutable plan for elements `T` and states `S`; holds no data.
pub struct Plan<T: Element, S: StateElement = <T as Element>::Stat> {
    pub(crate) raw: NonNull<sys::powerattn_plan>,
    pub(crate) desc: sys::powerattn_desc,
    info: PlanInfo,
    marker: PhantomData<(T, S)>,
}

// SAFETY: the C library documents that a plan is immutable after it is made and bound to no thread; it is destroyed
// when the last borrow is gone.
unsafe impl<T: Element, S: StateElement> Send for Plan<T, S> {}
// SAFETY: the C library documents that any number of threads may execute a plan at once.
unsafe impl<T: Element, S: StateElement> Sync for Plan<T, S> {}

impl<T: Element, S: StateElement> Drop for Plan<T, S> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from powerattn_plan_create and nothing borrows it any more.
        unsafe { sys::powerattn_plan_destroy(self.raw.as_ptr()) }
    }
}

impl<T: Element, S: StateElement> std::fmt::Debug for Plan<T, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Describes a plan; see [`Plan::builder`].
#[derive(Clone, Debug)]
#[must_use]
pub struct PlanBuilder<T, S> {
    desc: sys::powerattn_desc,
    overflow: Option<&'static str>,
    marker: PhantomData<(T, S)>,
}

impl<T: Element> Plan<T> {
    /// A description with the library's defaults: degree 2, normalised, scale 1/sqrt(head_dim), on the CPU.
    pub fn builder() -> PlanBuilder<T, T::Stat> {
        // SAFETY: powerattn_desc is a plain C struct for which zero is every field's default.
        let mut desc: sys::powerattn_desc = unsafe { std::mem::zeroed() };
        desc.struct_size = std::mem::size_of::<sys::powerattn_desc>() as u32;
        desc.dtype = T::DTYPE;
        desc.degree = 2;
        desc.batch = 1;
        desc.seq_len = 1;
        desc.heads_q = 1;
        desc.heads_kv = 1;
        PlanBuilder { desc, overflow: None, marker: PhantomData }
    }
}

impl<T: Element, S: StateElement> PlanBuilder<T, S> {
    fn size(&mut self, value: usize, name: &'static str) -> i64 {
        i64::try_from(value).unwrap_or_else(|_| {
            self.overflow = Some(name);
            0
        })
    }

    /// Batch entries (1 with packed sequences).
    pub fn batch(mut self, n: usize) -> Self {
        self.desc.batch = self.size(n, "batch");
        self
    }
    /// Tokens per batch entry; in a step, tokens of one step.
    pub fn seq_len(mut self, n: usize) -> Self {
        self.desc.seq_len = self.size(n, "seq_len");
        self
    }
    /// Query heads, and kv heads, which divide them.
    pub fn heads(mut self, query: usize, kv: usize) -> Self {
        self.desc.heads_q = self.size(query, "heads_q");
        self.desc.heads_kv = self.size(kv, "heads_kv");
        self
    }
    /// d, 1 to 256.
    pub fn head_dim(mut self, n: usize) -> Self {
        self.desc.head_dim = self.size(n, "head_dim");
        self
    }
    /// e, 1 to 256; default head_dim.
    pub fn value_dim(mut self, n: usize) -> Self {
        self.desc.value_dim = self.size(n, "value_dim");
        self
    }
    /// p, 1 to 8; even unless unnormalised.
    pub fn degree(mut self, p: i32) -> Self {
        self.desc.degree = p;
        self
    }
    /// y = sum w v, without the denominator.
    pub fn unnormalized(mut self) -> Self {
        self.desc.flags |= sys::POWERATTN_UNNORMALIZED as i32;
        self
    }
    /// Calls may pass initial and final states, and steps.
    pub fn use_state(mut self) -> Self {
        self.desc.flags |= sys::POWERATTN_USE_STATE as i32;
        self
    }
    /// float32 products on CUDA may be rounded to TF32.
    pub fn allow_tf32(mut self) -> Self {
        self.desc.flags |= sys::POWERATTN_ALLOW_TF32 as i32;
        self
    }
    /// Scale of q.k instead of 1/sqrt(head_dim).
    pub fn scale(mut self, scale: f64) -> Self {
        self.desc.flags |= sys::POWERATTN_CUSTOM_SCALE as i32;
        self.desc.scale = scale;
        self
    }
    /// Added to the denominator.
    pub fn eps(mut self, eps: f64) -> Self {
        self.desc.eps = eps;
        self
    }
    /// Pins the form.
    pub fn form(mut self, form: Form) -> Self {
        self.desc.form = match form {
            Form::Auto => sys::POWERATTN_FORM_AUTO,
            Form::Attention => sys::POWERATTN_FORM_ATTENTION,
            Form::Chunked => sys::POWERATTN_FORM_CHUNKED,
        } as i32;
        self
    }
    /// Pins the tokens per chunk.
    pub fn chunk_size(mut self, n: usize) -> Self {
        self.desc.chunk_size = self.size(n, "chunk_size");
        self
    }
    /// Packed sequences: `n` of them, with `cu_seqlens` in each call.
    pub fn sequences(mut self, n: usize) -> Self {
        self.desc.sequences = self.size(n, "sequences");
        self
    }
    /// Longest packed sequence, if known.
    pub fn max_seq_len(mut self, n: usize) -> Self {
        self.desc.max_seq_len = self.size(n, "max_seq_len");
        self
    }
    /// Rotary embedding.
    pub fn rope(mut self, rope: Rope) -> Self {
        self.desc.rope_style = match rope.style {
            RopeStyle::Half => sys::POWERATTN_ROPE_HALF,
            RopeStyle::Interleaved => sys::POWERATTN_ROPE_INTERLEAVED,
        } as i32;
        self.desc.rope_dim = self.size(rope.dim, "rope.dim");
        self.desc.rope_base = rope.base;
        self
    }
    /// Threads of a call on the CPU; 0 for all.
    pub fn num_threads(mut self, n: i32) -> Self {
        self.desc.num_threads = n;
        self
    }
    /// Bytes that states may take.
    pub fn state_limit(mut self, bytes: u64) -> Self {
        self.desc.state_limit = bytes;
        self
    }
    /// The device.
    pub fn device(mut self, device: Device) -> Self {
        let (kind, index) = match device {
            Device::Cpu => (sys::POWERATTN_CPU, 0),
            Device::Cuda(index) => (sys::POWERATTN_CUDA, index),
        };
        self.desc.device_type = kind as i32;
        self.desc.device_index = index;
        self
    }
    /// Another element type of states, such as `half::bf16` for decoding.
    pub fn state_type<U: StateElement>(self) -> PlanBuilder<T, U> {
        let mut desc = self.desc;
        desc.state_dtype = U::DTYPE;
        PlanBuilder { desc, overflow: self.overflow, marker: PhantomData }
    }

    /// Makes the plan; every choice is made here.
    pub fn build(self) -> Result<Plan<T, S>, Error> {
        if let Some(name) = self.overflow {
            return Err(shape_error(name, "does not fit in 64 bits".into()));
        }
        check_version(version())?;
        let mut raw = ptr::null_mut();
        // SAFETY: desc is a whole powerattn_desc; *raw is written on success.
        check(unsafe { sys::powerattn_plan_create(&self.desc, &mut raw) })?;
        let raw = NonNull::new(raw).ok_or_else(|| shape_error("plan", "the library returned no plan".into()))?;
        let mut desc = self.desc;
        if desc.value_dim == 0 {
            desc.value_dim = desc.head_dim;
        }
        let mut plan = Plan { raw, desc, info: EMPTY_INFO, marker: PhantomData };
        plan.info = plan.query()?;
        Ok(plan)
    }
}

const EMPTY_INFO: PlanInfo = PlanInfo {
    form: Form::Auto,
    chunk_size: 0,
    sequences: 0,
    state_rows: 0,
    state_bytes: 0,
    workspace_forward: 0,
    workspace_backward: 0,
    workspace_backward_saved: 0,
    workspace_step: 0,
    workspace_summary: 0,
    saved_bytes: 0,
    scale: 0.0,
    predicted_forward_s: 0.0,
    predicted_backward_s: 0.0,
};

impl<T: Element, S: StateElement> Plan<T, S> {
    fn query(&self) -> Result<PlanInfo, Error> {
        // SAFETY: a plain C struct; the call fills it.
        let mut info: sys::powerattn_plan_info = unsafe { std::mem::zeroed() };
        info.struct_size = std::mem::size_of::<sys::powerattn_plan_info>() as u32;
        // SAFETY: the plan is alive and info is a whole powerattn_plan_info.
        check(unsafe { sys::powerattn_plan_query(self.raw.as_ptr(), &mut info) })?;
        Ok(PlanInfo {
            form: if info.form == sys::POWERATTN_FORM_CHUNKED as i32 { Form::Chunked } else { Form::Attention },
            chunk_size: info.chunk_size as usize,
            sequences: info.sequences as usize,
            state_rows: info.state_rows,
            state_bytes: info.state_bytes,
            workspace_forward: info.workspace_forward,
            workspace_backward: info.workspace_backward,
            workspace_backward_saved: info.workspace_backward_saved,
            workspace_step: info.workspace_step,
            workspace_summary: info.workspace_summary,
            saved_bytes: info.saved_bytes,
            scale: info.scale,
            predicted_forward_s: info.predicted_forward_s,
            predicted_backward_s: info.predicted_backward_s,
        })
    }

    /// What the plan chose and what it needs.
    pub fn info(&self) -> &PlanInfo {
        &self.info
    }

    /// The plan as text: form, chunk, kernels, tiling with reasons, costs, memory.
    pub fn describe(&self) -> Result<String, Error> {
        let mut needed = 0;
        // SAFETY: no text is written with capacity 0; then the buffer has the bytes that were asked for.
        unsafe {
            check(sys::powerattn_plan_describe(self.raw.as_ptr(), ptr::null_mut(), 0, &mut needed))?;
            let mut text = vec![0u8; needed];
            check(sys::powerattn_plan_describe(
                self.raw.as_ptr(),
                text.as_mut_ptr() as *mut c_char,
                text.len(),
                &mut needed,
            ))?;
            text.pop();
            Ok(String::from_utf8_lossy(&text).into_owned())
        }
    }

    /// Where the plan runs.
    pub fn device(&self) -> Device {
        if self.desc.device_type == sys::POWERATTN_CUDA as i32 {
            Device::Cuda(self.desc.device_index)
        } else {
            Device::Cpu
        }
    }

    pub(crate) fn tensor_shape(&self, heads: i64, dim: i64) -> [usize; 4] {
        [self.desc.batch as usize, self.desc.seq_len as usize, heads as usize, dim as usize]
    }

    pub(crate) fn query_shape(&self) -> [usize; 4] {
        self.tensor_shape(self.desc.heads_q, self.desc.head_dim)
    }
    pub(crate) fn key_shape(&self) -> [usize; 4] {
        self.tensor_shape(self.desc.heads_kv, self.desc.head_dim)
    }
    pub(crate) fn value_shape(&self) -> [usize; 4] {
        self.tensor_shape(self.desc.heads_kv, self.desc.value_dim)
    }
    pub(crate) fn output_shape(&self) -> [usize; 4] {
        self.tensor_shape(self.desc.heads_q, self.desc.value_dim)
    }
    pub(crate) fn gate_shape(&self) -> [usize; 4] {
        self.tensor_shape(self.desc.heads_kv, 1)
    }
    pub(crate) fn norm_shape(&self) -> [usize; 4] {
        self.tensor_shape(self.desc.heads_q, 1)
    }

    /// `cu_seqlens` against the plan: present exactly when sequences are packed, of the right length.
    pub(crate) fn check_cu_seqlens(&self, cu_seqlens: Option<Indices<'_>>) -> Result<*const i64, Error> {
        match (cu_seqlens, self.desc.sequences) {
            (Some(_), 0) => Err(shape_error("cu_seqlens", "given, but the plan has no packed sequences".into())),
            (Some(x), n) => x.check("cu_seqlens", n as usize + 1, self.device()),
            (None, 0) => Ok(ptr::null()),
            (None, _) => Err(shape_error("cu_seqlens", "missing, but the plan has packed sequences".into())),
        }
    }

    /// An optional index array.
    pub(crate) fn check_indices(
        &self,
        indices: Option<Indices<'_>>,
        argument: &'static str,
        expected: usize,
    ) -> Result<*const i64, Error> {
        indices.map_or(Ok(ptr::null()), |x| x.check(argument, expected, self.device()))
    }
}

/// Version of the library in use: (major, minor, patch).
pub fn version() -> (u32, u32, u32) {
    // SAFETY: no arguments, no state.
    let number = unsafe { sys::powerattn_version() };
    (number / 10000, number / 100 % 100, number % 100)
}

/// The structs of this crate are those of one minor version: a library of another one is refused before it sees them.
fn check_version((major, minor, patch): (u32, u32, u32)) -> Result<(), Error> {
    if (major, minor) == (sys::POWERATTN_VERSION_MAJOR, sys::POWERATTN_VERSION_MINOR) {
        return Ok(());
    }
    Err(Error::Library {
        status: Status::Version,
        message: format!(
            "libpowerattn is version {major}.{minor}.{patch}; this crate needs {}.{}",
            sys::POWERATTN_VERSION_MAJOR,
            sys::POWERATTN_VERSION_MINOR
        ),
    })
}

/// Devices of the kind of `device` that can be used here.
pub fn device_count(device: Device) -> Result<usize, Error> {
    let kind = match device {
        Device::Cpu => sys::POWERATTN_CPU,
        Device::Cuda(_) => sys::POWERATTN_CUDA,
    };
    let mut count = 0;
    // SAFETY: count is written on success.
    check(unsafe { sys::powerattn_device_count(kind as i32, &mut count) })?;
    Ok(count as usize)
}
