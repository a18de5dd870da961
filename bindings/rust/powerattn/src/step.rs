// SPDX-License-Identifier: Apache-2.0
use crate::element::{Element, StateElement};
use crate::error::{check, shape as shape_error, Error};
use crate::plan::Plan;
use crate::state::{check_state, StateMut};
use crate::tensor::{check_optional, check_tensor, Indices, TensorMut, TensorRef};
use crate::workspace::{Stream, Workspace};
use powerattn_sys as sys;
use std::mem::{size_of, zeroed};

/// Inputs of [`Plan::step`]: one or a few tokens of each sequence.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a, T: Element> {
    /// `[b, t, heads_q, head_dim]`
    pub q: TensorRef<'a, T>,
    /// `[b, t, heads_kv, head_dim]`
    pub k: TensorRef<'a, T>,
    /// `[b, t, heads_kv, value_dim]`
    pub v: TensorRef<'a, T>,
    /// Log gates `[b, t, heads_kv]`.
    pub log_g: Option<TensorRef<'a, T::Stat>>,
    /// Slot of each sequence in the pool, all different; negative skips the sequence.
    pub slots: Option<Indices<'a>>,
    /// Valid tokens of each sequence; the rest never touch a state.
    pub lengths: Option<Indices<'a>>,
    /// Position of the first token of each sequence.
    pub rope_offset: Option<Indices<'a>>,
}

impl<'a, T: Element> Step<'a, T> {
    /// Queries, keys and values alone.
    pub fn new(q: TensorRef<'a, T>, k: TensorRef<'a, T>, v: TensorRef<'a, T>) -> Self {
        Self { q, k, v, log_g: None, slots: None, lengths: None, rope_offset: None }
    }
    /// Adds log gates.
    pub fn log_g(mut self, log_g: TensorRef<'a, T::Stat>) -> Self {
        self.log_g = Some(log_g);
        self
    }
    /// Adds slots.
    pub fn slots(mut self, slots: impl Into<Indices<'a>>) -> Self {
        self.slots = Some(slots.into());
        self
    }
    /// Adds the numbers of valid tokens.
    pub fn lengths(mut self, lengths: impl Into<Indices<'a>>) -> Self {
        self.lengths = Some(lengths.into());
        self
    }
    /// Adds positions.
    pub fn rope_offset(mut self, positions: impl Into<Indices<'a>>) -> Self {
        self.rope_offset = Some(positions.into());
        self
    }
}

impl<T: Element, S: StateElement> Plan<T, S> {
    /// One or a few tokens against a pool of states, in place, on the CPU with scratch memory of its own.
    pub fn step(&self, input: &Step<'_, T>, state: StateMut<'_, S>, y: TensorMut<'_, T>) -> Result<(), Error> {
        self.on_host("step_with")?;
        self.step_with(input, state, y, &mut Workspace::new(), Stream::default())
    }

    /// The same with the caller's workspace and stream.
    pub fn step_with(
        &self,
        input: &Step<'_, T>,
        state: StateMut<'_, S>,
        y: TensorMut<'_, T>,
        workspace: &mut Workspace,
        stream: Stream,
    ) -> Result<(), Error> {
        let device = self.device();
        let batch = self.query_shape()[0];
        check_state(self, &state.dims, state.device, "state", None)?;
        if input.slots.is_none() && state.dims.count < batch {
            let count = state.dims.count;
            return Err(shape_error("state", format!("has {count} states for {batch} sequences; pass slots")));
        }
        // SAFETY: a plain C struct for which zero is absent everywhere.
        let mut args: sys::powerattn_step_args = unsafe { zeroed() };
        args.struct_size = size_of::<sys::powerattn_step_args>() as u32;
        args.q = check_tensor(&input.q.raw, "q", self.query_shape(), device)?;
        args.k = check_tensor(&input.k.raw, "k", self.key_shape(), device)?;
        args.v = check_tensor(&input.v.raw, "v", self.value_shape(), device)?;
        args.log_g = check_optional(input.log_g.as_ref(), "log_g", self.gate_shape(), device)?;
        args.y = check_tensor(&y.raw, "y", self.output_shape(), device)?;
        args.state = state.raw;
        args.num_slots = state.dims.count as i64;
        args.slots = self.check_indices(input.slots, "slots", batch)?;
        args.lengths = self.check_indices(input.lengths, "lengths", batch)?;
        args.rope_offset = self.check_indices(input.rope_offset, "rope_offset", batch)?;
        (args.workspace, args.workspace_bytes) = workspace.get(self.info().workspace_step, device)?;
        args.stream = stream.0;
        // SAFETY: every view was compared with the plan's shapes and device; they are borrowed through the call.
        check(unsafe { sys::powerattn_step(self.raw.as_ptr(), &args) })
    }
}
