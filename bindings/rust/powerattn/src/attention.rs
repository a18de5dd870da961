// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, shape as shape_error, Error};
use crate::plan::{Device, Plan};
use crate::state::{check_state, StateMut, StateRef, NO_STATE};
use crate::tensor::{check_optional, check_optional_out, check_tensor, Indices, TensorMut, TensorRef};
use crate::workspace::{Stream, Workspace};
use powerattn_sys as sys;
use std::mem::{size_of, zeroed};

/// Inputs of [`Plan::forward`].
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a, T: Element, S: StateElement = <T as Element>::Stat> {
    /// `[b, t, heads_q, head_dim]`
    pub q: TensorRef<'a, T>,
    /// `[b, t, heads_kv, head_dim]`
    pub k: TensorRef<'a, T>,
    /// `[b, t, heads_kv, value_dim]`
    pub v: TensorRef<'a, T>,
    /// Log gates `[b, t, heads_kv]`.
    pub log_g: Option<TensorRef<'a, T::Stat>>,
    /// One state per sequence; the plan needs `use_state`.
    pub initial_state: Option<StateRef<'a, S>>,
    /// Cumulative token offsets of packed sequences.
    pub cu_seqlens: Option<Indices<'a>>,
    /// Position of each sequence's first token.
    pub rope_offset: Option<Indices<'a>>,
}

impl<'a, T: Element, S: StateElement> Forward<'a, T, S> {
    /// Queries, keys and values alone.
    pub fn new(q: TensorRef<'a, T>, k: TensorRef<'a, T>, v: TensorRef<'a, T>) -> Self {
        Self { q, k, v, log_g: None, initial_state: None, cu_seqlens: None, rope_offset: None }
    }
    /// Adds log gates.
    pub fn log_g(mut self, log_g: TensorRef<'a, T::Stat>) -> Self {
        self.log_g = Some(log_g);
        self
    }
    /// Adds initial states.
    pub fn initial_state(mut self, state: StateRef<'a, S>) -> Self {
        self.initial_state = Some(state);
        self
    }
    /// Adds the cumulative token offsets of packed sequences.
    pub fn cu_seqlens(mut self, offsets: impl Into<Indices<'a>>) -> Self {
        self.cu_seqlens = Some(offsets.into());
        self
    }
    /// Adds the position of each sequence's first token.
    pub fn rope_offset(mut self, positions: impl Into<Indices<'a>>) -> Self {
        self.rope_offset = Some(positions.into());
        self
    }
}

/// Outputs of [`Plan::forward`].
#[derive(Debug)]
pub struct ForwardOut<'a, T: Element, S: StateElement = <T as Element>::Stat> {
    /// `[b, t, heads_q, value_dim]`
    pub y: TensorMut<'a, T>,
    /// Denominators `[b, t, heads_q]`, which backward needs.
    pub row_norm: Option<TensorMut<'a, T::Stat>>,
    /// One state per sequence; the plan needs `use_state`.
    pub final_state: Option<StateMut<'a, S>>,
    /// `final_state` holds the initial states, which the final ones replace.
    pub in_place: bool,
    /// Memory of `PlanInfo::saved_bytes` that spares backward a recomputation.
    pub saved: Option<&'a mut Workspace>,
}

impl<'a, T: Element, S: StateElement> ForwardOut<'a, T, S> {
    /// The output alone.
    pub fn new(y: TensorMut<'a, T>) -> Self {
        Self { y, row_norm: None, final_state: None, in_place: false, saved: None }
    }
    /// Adds the denominators.
    pub fn row_norm(mut self, row_norm: TensorMut<'a, T::Stat>) -> Self {
        self.row_norm = Some(row_norm);
        self
    }
    /// Adds the final states.
    pub fn final_state(mut self, state: StateMut<'a, S>) -> Self {
        self.final_state = Some(state);
        self
    }
    /// Adds states that are read as the initial ones and replaced by the final ones: half the memory of two pools.
    pub fn state_in_place(mut self, state: StateMut<'a, S>) -> Self {
        self.final_state = Some(state);
        self.in_place = true;
        self
    }
    /// Adds memory for backward.
    pub fn saved(mut self, saved: &'a mut Workspace) -> Self {
        self.saved = Some(saved);
        self
    }
}

/// Inputs of [`Plan::backward`]: those of forward, its outputs, and the incoming gradients.
#[derive(Debug)]
pub struct Backward<'a, T: Element, S: StateElement = <T as Element>::Stat> {
    /// The forward call's inputs.
    pub forward: Forward<'a, T, S>,
    /// The forward call's output; needed when normalised or gated.
    pub y: Option<TensorRef<'a, T>>,
    /// The forward call's denominators; needed when normalised.
    pub row_norm: Option<TensorRef<'a, T::Stat>>,
    /// Gradient of y.
    pub d_y: TensorRef<'a, T>,
    /// Gradient of the final states.
    pub d_final_state: Option<StateRef<'a, S>>,
    /// What forward saved.
    pub saved: Option<&'a mut Workspace>,
}

/// Outputs of [`Plan::backward`]; overwritten, not accumulated.
#[derive(Debug)]
pub struct BackwardOut<'a, T: Element, S: StateElement = <T as Element>::Stat> {
    /// Gradient of q.
    pub d_q: TensorMut<'a, T>,
    /// Gradient of k.
    pub d_k: TensorMut<'a, T>,
    /// Gradient of v.
    pub d_v: TensorMut<'a, T>,
    /// Gradient of the log gates.
    pub d_log_g: Option<TensorMut<'a, T::Stat>>,
    /// Gradient of the initial states.
    pub d_initial_state: Option<StateMut<'a, S>>,
}

impl<T: Element, S: StateElement> Plan<T, S> {
    fn sequences(&self) -> usize {
        self.info().sequences
    }

    fn state_in(&self, state: Option<&StateRef<'_, S>>, argument: &'static str) -> Result<sys::powerattn_state, Error> {
        state.map_or(Ok(NO_STATE), |s| {
            check_state(self, &s.dims, s.device, argument, Some(self.sequences())).map(|()| s.raw)
        })
    }

    fn state_out(
        &self,
        state: Option<&StateMut<'_, S>>,
        argument: &'static str,
    ) -> Result<sys::powerattn_state, Error> {
        state.map_or(Ok(NO_STATE), |s| {
            check_state(self, &s.dims, s.device, argument, Some(self.sequences())).map(|()| s.raw)
        })
    }

    /// Forward pass on the CPU with scratch memory of its own.
    pub fn forward(&self, input: &Forward<'_, T, S>, output: ForwardOut<'_, T, S>) -> Result<(), Error> {
        self.on_host("forward_with")?;
        self.forward_with(input, output, &mut Workspace::new(), Stream::default())
    }

    pub(crate) fn on_host(&self, instead: &str) -> Result<(), Error> {
        match self.device() {
            Device::Cpu => Ok(()),
            device => {
                Err(shape_error("workspace", format!("a plan for {device:?} needs {instead} with device memory")))
            }
        }
    }

    /// Forward pass with the caller's workspace and stream.
    pub fn forward_with(
        &self,
        input: &Forward<'_, T, S>,
        output: ForwardOut<'_, T, S>,
        workspace: &mut Workspace,
        stream: Stream,
    ) -> Result<(), Error> {
        let device = self.device();
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_forward_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_forward_args>() as u32;
        args.q = check_tensor(&input.q.raw, "q", self.query_shape(), device)?;
        args.k = check_tensor(&input.k.raw, "k", self.key_shape(), device)?;
        args.v = check_tensor(&input.v.raw, "v", self.value_shape(), device)?;
        args.log_g = check_optional(input.log_g.as_ref(), "log_g", self.gate_shape(), device)?;
        args.y = check_tensor(&output.y.raw, "y", self.output_shape(), device)?;
        args.row_norm = check_optional_out(output.row_norm.as_ref(), "row_norm", self.norm_shape(), device)?;
        args.initial_state = self.state_in(input.initial_state.as_ref(), "initial_state")?;
        args.final_state = self.state_out(output.final_state.as_ref(), "final_state")?;
        if output.in_place {
            if input.initial_state.is_some() || output.final_state.is_none() {
                return Err(shape_error("in_place", "needs a final_state and no initial_state beside it".into()));
            }
            args.initial_state = args.final_state;
        }
        args.cu_seqlens = self.check_cu_seqlens(input.cu_seqlens)?;
        args.rope_offset = self.check_indices(input.rope_offset, "rope_offset", self.sequences())?;
        if let Some(saved) = output.saved {
            (args.saved, args.saved_bytes) = saved.get(self.info().saved_bytes, device)?;
        }
        (args.workspace, args.workspace_bytes) = workspace.get(self.info().workspace_forward, device)?;
        args.stream = stream.0;
        // SAFETY: every view was compared with the plan's shapes and device; they are borrowed through the call.
        check(unsafe { sys::powerattn_forward(self.raw.as_ptr(), &args) })
    }

    /// Backward pass on the CPU with scratch memory of its own.
    pub fn backward(&self, input: Backward<'_, T, S>, output: BackwardOut<'_, T, S>) -> Result<(), Error> {
        self.on_host("backward_with")?;
        self.backward_with(input, output, &mut Workspace::new(), Stream::default())
    }

    /// Backward pass with the caller's workspace and stream.
    pub fn backward_with(
        &self,
        input: Backward<'_, T, S>,
        output: BackwardOut<'_, T, S>,
        workspace: &mut Workspace,
        stream: Stream,
    ) -> Result<(), Error> {
        let device = self.device();
        let forward = &input.forward;
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_backward_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_backward_args>() as u32;
        args.q = check_tensor(&forward.q.raw, "q", self.query_shape(), device)?;
        args.k = check_tensor(&forward.k.raw, "k", self.key_shape(), device)?;
        args.v = check_tensor(&forward.v.raw, "v", self.value_shape(), device)?;
        args.log_g = check_optional(forward.log_g.as_ref(), "log_g", self.gate_shape(), device)?;
        args.y = check_optional(input.y.as_ref(), "y", self.output_shape(), device)?;
        args.row_norm = check_optional(input.row_norm.as_ref(), "row_norm", self.norm_shape(), device)?;
        args.d_y = check_tensor(&input.d_y.raw, "d_y", self.output_shape(), device)?;
        args.d_q = check_tensor(&output.d_q.raw, "d_q", self.query_shape(), device)?;
        args.d_k = check_tensor(&output.d_k.raw, "d_k", self.key_shape(), device)?;
        args.d_v = check_tensor(&output.d_v.raw, "d_v", self.value_shape(), device)?;
        args.d_log_g = check_optional_out(output.d_log_g.as_ref(), "d_log_g", self.gate_shape(), device)?;
        args.initial_state = self.state_in(forward.initial_state.as_ref(), "initial_state")?;
        args.d_final_state = self.state_in(input.d_final_state.as_ref(), "d_final_state")?;
        args.d_initial_state = self.state_out(output.d_initial_state.as_ref(), "d_initial_state")?;
        args.cu_seqlens = self.check_cu_seqlens(forward.cu_seqlens)?;
        args.rope_offset = self.check_indices(forward.rope_offset, "rope_offset", self.sequences())?;
        let mut needed = self.info().workspace_backward;
        if let Some(saved) = input.saved {
            let (data, bytes) = saved.get(self.info().saved_bytes, device)?;
            args.saved = data;
            args.saved_bytes = bytes;
            if !data.is_null() {
                needed = self.info().workspace_backward_saved;
            }
        }
        (args.workspace, args.workspace_bytes) = workspace.get(needed, device)?;
        args.stream = stream.0;
        // SAFETY: as in forward_with.
        check(unsafe { sys::powerattn_backward(self.raw.as_ptr(), &args) })
    }
}
