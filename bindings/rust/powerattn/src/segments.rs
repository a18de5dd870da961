// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, shape as shape_error, Error};
use crate::memory::zeros;
use crate::plan::{Device, Plan};
use crate::state::{check_state, State, StateMut, StateRef};
use crate::tensor::{check_optional, check_tensor, Indices, TensorMut, TensorRef};
use crate::workspace::{Stream, Workspace};
use powerattn_sys as sys;
use std::ffi::c_void;
use std::mem::{size_of, zeroed};

/// Inputs of [`Plan::summary`]: keys, values and gates of segments.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a, T: Element> {
    /// `[b, t, heads_kv, head_dim]`
    pub k: TensorRef<'a, T>,
    /// `[b, t, heads_kv, value_dim]`
    pub v: TensorRef<'a, T>,
    /// Log gates `[b, t, heads_kv]`.
    pub log_g: Option<TensorRef<'a, T::Stat>>,
    /// Cumulative token offsets of packed sequences.
    pub cu_seqlens: Option<Indices<'a>>,
    /// Position of each sequence's first token.
    pub rope_offset: Option<Indices<'a>>,
}

/// Inputs of [`Plan::summary_reverse`].
#[derive(Clone, Copy, Debug)]
pub struct SummaryReverse<'a, T: Element> {
    /// `[b, t, heads_q, head_dim]`
    pub q: TensorRef<'a, T>,
    /// Log gates `[b, t, heads_kv]`.
    pub log_g: Option<TensorRef<'a, T::Stat>>,
    /// Output of the forward call with the true initial state; needed when normalised.
    pub y: Option<TensorRef<'a, T>>,
    /// Its denominators; needed when normalised.
    pub row_norm: Option<TensorRef<'a, T::Stat>>,
    /// Gradient of y.
    pub d_y: TensorRef<'a, T>,
    /// Cumulative token offsets of packed sequences.
    pub cu_seqlens: Option<Indices<'a>>,
    /// Position of each sequence's first token.
    pub rope_offset: Option<Indices<'a>>,
}

/// Segments to fold with [`Plan::compose`], in order: states, each with its total log gates
/// `[sequences, heads_kv]`.
#[derive(Clone, Copy, Debug)]
pub struct Compose<'a, S: StateElement, G> {
    /// The segments, first to last.
    pub segments: &'a [(&'a State<S>, &'a [G])],
}

/// Segments to fold with [`Plan::compose_into`]: one pool that holds them one after another.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a, T: Element, S: StateElement = <T as Element>::Stat> {
    /// `segments * sequences` states.
    pub states: StateRef<'a, S>,
    /// Total log gates `[segments, sequences, heads_kv, 1]`.
    pub log_g: Option<TensorRef<'a, T::Stat>>,
    /// Folds the last segment first: reverse summaries into the gradient of a final state.
    pub reversed: bool,
}

impl<T: Element, S: StateElement> Plan<T, S> {
    fn gate_totals(&self, total: Option<TensorMut<'_, T::Stat>>) -> Result<*mut c_void, Error> {
        let total = match total {
            Some(total) => total,
            None => return Ok(std::ptr::null_mut()),
        };
        let (n, h) = (self.info().sequences, self.desc.heads_kv as usize);
        let tensor = check_tensor(&total.raw, "total_log_g", [n, h, 1, 1], self.device())?;
        // The C call takes no strides here.
        if (n > 1 && tensor.stride_b != h as i64) || (h > 1 && tensor.stride_t != 1) {
            return Err(shape_error("total_log_g", "must be contiguous".into()));
        }
        Ok(tensor.data)
    }

    /// State and total log gate of each sequence from keys, values and gates alone. `total_log_g` is
    /// `[sequences, heads_kv, 1, 1]`.
    pub fn summary(
        &self,
        input: &Summary<'_, T>,
        state: StateMut<'_, S>,
        total_log_g: Option<TensorMut<'_, T::Stat>>,
        workspace: &mut Workspace,
        stream: Stream,
    ) -> Result<(), Error> {
        let device = self.device();
        let sequences = self.info().sequences;
        check_state(self, &state.dims, state.device, "state", Some(sequences))?;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_summary_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_summary_args>() as u32;
        args.k = check_tensor(&input.k.raw, "k", self.key_shape(), device)?;
        args.v = check_tensor(&input.v.raw, "v", self.value_shape(), device)?;
        args.log_g = check_optional(input.log_g.as_ref(), "log_g", self.gate_shape(), device)?;
        args.state = state.raw;
        args.total_log_g = self.gate_totals(total_log_g)?;
        args.cu_seqlens = self.check_cu_seqlens(input.cu_seqlens)?;
        args.rope_offset = self.check_indices(input.rope_offset, "rope_offset", sequences)?;
        (args.workspace, args.workspace_bytes) = workspace.get(self.info().workspace_summary, device)?;
        args.stream = stream.0;
        // SAFETY: every view was compared with the plan's shapes and device; they are borrowed through the call.
        check(unsafe { sys::powerattn_summary(self.raw.as_ptr(), &args) })
    }

    /// Gradient of each sequence's initial state when its final state gets no gradient.
    pub fn summary_reverse(
        &self,
        input: &SummaryReverse<'_, T>,
        d_state: StateMut<'_, S>,
        total_log_g: Option<TensorMut<'_, T::Stat>>,
        workspace: &mut Workspace,
        stream: Stream,
    ) -> Result<(), Error> {
        let device = self.device();
        let sequences = self.info().sequences;
        check_state(self, &d_state.dims, d_state.device, "d_state", Some(sequences))?;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_summary_reverse_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_summary_reverse_args>() as u32;
        args.q = check_tensor(&input.q.raw, "q", self.query_shape(), device)?;
        args.log_g = check_optional(input.log_g.as_ref(), "log_g", self.gate_shape(), device)?;
        args.y = check_optional(input.y.as_ref(), "y", self.output_shape(), device)?;
        args.row_norm = check_optional(input.row_norm.as_ref(), "row_norm", self.norm_shape(), device)?;
        args.d_y = check_tensor(&input.d_y.raw, "d_y", self.output_shape(), device)?;
        args.d_state = d_state.raw;
        args.total_log_g = self.gate_totals(total_log_g)?;
        args.cu_seqlens = self.check_cu_seqlens(input.cu_seqlens)?;
        args.rope_offset = self.check_indices(input.rope_offset, "rope_offset", sequences)?;
        (args.workspace, args.workspace_bytes) = workspace.get(self.info().workspace_summary, device)?;
        args.stream = stream.0;
        // SAFETY: as in summary.
        check(unsafe { sys::powerattn_summary_reverse(self.raw.as_ptr(), &args) })
    }

    /// Folds segments in order, `S <- exp(L_m) S + S_m`, into a new state and its total log gates.
    pub fn compose(&self, input: &Compose<'_, S, T::Stat>) -> Result<(State<S>, Vec<T::Stat>), Error> {
        self.on_host("compose_into")?;
        let (sequences, heads) = (self.info().sequences, self.desc.heads_kv as usize);
        let segments = input.segments.len();
        let mut out = State::<S>::zeros(self, sequences)?;
        let gates = sequences * heads; // no more than the elements of `out`
        let mut total = zeros::<T::Stat>(gates)?;
        // The C call folds one pool, so the segments are brought together first.
        let count = segments.checked_mul(sequences).ok_or_else(|| shape_error("segments", "too many".into()))?;
        let mut pool = State::<S>::zeros(self, count)?;
        let mut log_g = Vec::new();
        for (m, (state, l)) in input.segments.iter().enumerate() {
            check_state(self, &state.dims(), Device::Cpu, "segments", Some(sequences))?;
            if l.len() != gates {
                return Err(shape_error("segments", format!("a total_log_g has {} entries, not {gates}", l.len())));
            }
            let (s, z) = pool.parts_mut();
            s[m * state.s().len()..][..state.s().len()].copy_from_slice(state.s());
            z[m * state.z().len()..][..state.z().len()].copy_from_slice(state.z());
            log_g.extend_from_slice(l);
        }
        let folded = Segments {
            states: pool.as_ref(),
            log_g: Some(TensorRef::new(&log_g, [segments, sequences, heads, 1])?),
            reversed: false,
        };
        let total_log_g = TensorMut::new(&mut total, [sequences, heads, 1, 1])?;
        self.compose_into(&folded, out.as_mut(), Some(total_log_g), Stream::default())?;
        Ok((out, total))
    }

    /// Folds the segments of one pool, on the plan's device. `total_log_g` is `[sequences, heads_kv, 1, 1]`.
    pub fn compose_into(
        &self,
        input: &Segments<'_, T, S>,
        out: StateMut<'_, S>,
        total_log_g: Option<TensorMut<'_, T::Stat>>,
        stream: Stream,
    ) -> Result<(), Error> {
        let (device, sequences) = (self.device(), self.info().sequences);
        let states = &input.states;
        let count = states.dims.count;
        let segments = count.checked_div(sequences).unwrap_or(0);
        check_state(self, &states.dims, states.device, "states", Some(segments * sequences))?;
        check_state(self, &out.dims, out.device, "out", Some(sequences))?;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_compose_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_compose_args>() as u32;
        args.count = segments as i64;
        if segments > 0 {
            // Segment 0 of the fold, and the way to the next one; wrapping, since the memory may be a device's.
            let (first, sign) = if input.reversed { (segments as isize - 1, -1) } else { (0, 1) };
            let s_stride = states.raw.s_stride_n * sequences as i64;
            let z_stride = states.raw.z_stride_n * sequences as i64;
            args.segments = states.raw;
            args.segments.s = (states.raw.s as *mut S).wrapping_offset(first * s_stride as isize) as *mut c_void;
            args.segments.z = (states.raw.z as *mut S).wrapping_offset(first * z_stride as isize) as *mut c_void;
            args.s_stride_segment = sign * s_stride;
            args.z_stride_segment = sign * z_stride;
            if let Some(log_g) = &input.log_g {
                let shape = [segments, sequences, self.desc.heads_kv as usize, 1];
                let l = check_tensor(&log_g.raw, "log_g", shape, device)?;
                args.log_g = (l.data as *mut T::Stat).wrapping_offset(first * l.stride_b as isize) as *const c_void;
                args.log_g_stride_segment = sign * l.stride_b;
                args.log_g_stride_n = l.stride_t;
                args.log_g_stride_h = l.stride_h;
            }
        }
        args.out = out.raw;
        args.out_log_g = self.gate_totals(total_log_g)?;
        args.stream = stream.0;
        // SAFETY: every view was compared with the plan's sizes and device; they are borrowed through the call.
        check(unsafe { sys::powerattn_state_compose(self.raw.as_ptr(), &args) })
    }
}
