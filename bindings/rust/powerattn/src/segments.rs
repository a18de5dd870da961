// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, shape as shape_error, Error};
use crate::plan::Plan;
use crate::state::{check_state, State, StateMut};
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

impl<T: Element, S: StateElement> Plan<T, S> {
    fn gate_totals(&self, total: Option<TensorMut<'_, T::Stat>>) -> Result<*mut c_void, Error> {
        let total = match total {
            Some(total) => total,
            None => return Ok(std::ptr::null_mut()),
        };
        let shape = [self.info().sequences, self.desc.heads_kv as usize, 1, 1];
        check_tensor(&total.raw, "total_log_g", shape, self.device())?;
        Ok(total.raw.data)
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
        let (data, bytes) = workspace.get(self.info().workspace_summary);
        args.workspace = data;
        args.workspace_bytes = bytes;
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
        let (data, bytes) = workspace.get(self.info().workspace_summary);
        args.workspace = data;
        args.workspace_bytes = bytes;
        args.stream = stream.0;
        // SAFETY: as in summary.
        check(unsafe { sys::powerattn_summary_reverse(self.raw.as_ptr(), &args) })
    }

    /// Folds segments in order, `S <- exp(L_m) S + S_m`, into a new state and its total log gates.
    pub fn compose(&self, input: &Compose<'_, S, T::Stat>) -> Result<(State<S>, Vec<T::Stat>), Error> {
        self.on_host("device states")?;
        let sequences = self.info().sequences;
        let gates = sequences * self.desc.heads_kv as usize;
        let mut out = State::<S>::zeros(self, sequences)?;
        let mut total = vec![<T::Stat as Default>::default(); gates];
        // The C call folds one strided block, so the segments are brought together first.
        let (mut s, mut z, mut g) = (Vec::new(), Vec::new(), Vec::new());
        for (state, log_g) in input.segments {
            let view = state.as_ref();
            check_state(self, &view.dims, view.device, "segments", Some(sequences))?;
            if log_g.len() != gates {
                return Err(shape_error("segments", format!("a total_log_g has {} entries, not {gates}", log_g.len())));
            }
            s.extend_from_slice(state.s());
            z.extend_from_slice(state.z());
            g.extend_from_slice(log_g);
        }
        let view = out.as_mut();
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_compose_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_compose_args>() as u32;
        args.count = input.segments.len() as i64;
        args.segments = view.raw;
        if !input.segments.is_empty() {
            args.segments.s = s.as_mut_ptr() as *mut c_void;
            args.segments.z = z.as_mut_ptr() as *mut c_void;
            args.log_g = g.as_ptr() as *const c_void;
        } else {
            args.segments = crate::state::NO_STATE;
        }
        args.s_stride_segment = view.raw.s_stride_n * sequences as i64;
        args.z_stride_segment = view.raw.z_stride_n * sequences as i64;
        args.log_g_stride_segment = gates as i64;
        args.log_g_stride_n = self.desc.heads_kv;
        args.log_g_stride_h = 1;
        args.out = view.raw;
        args.out_log_g = total.as_mut_ptr() as *mut c_void;
        // SAFETY: all blocks have the sizes that the strides say and live through the call.
        check(unsafe { sys::powerattn_state_compose(self.raw.as_ptr(), &args) })?;
        Ok((out, total))
    }
}
