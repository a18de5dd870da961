// SPDX-License-Identifier: Apache-2.0
//! Symmetric power attention: attention whose cost is linear in the context and whose memory is set by a dial,
//! the degree. A safe wrapper of [libpowerattn](https://github.com/libpowerattn/libpowerattn).
//!
//! ```
//! use powerattn::{Forward, ForwardOut, Plan, TensorMut, TensorRef};
//!
//! let (b, t, h, d) = (1, 100, 2, 16);
//! let plan = Plan::<f32>::builder().batch(b).seq_len(t).heads(h, h).head_dim(d).build()?;
//! let x: Vec<f32> = (0..b * t * h * d).map(|i| (i % 7) as f32 - 3.0).collect();
//! let mut y = vec![0.0f32; x.len()];
//! let tensor = TensorRef::new(&x, [b, t, h, d])?;
//! plan.forward(
//!     &Forward::new(tensor, tensor, tensor),
//!     ForwardOut::new(TensorMut::new(&mut y, [b, t, h, d])?),
//! )?;
//! assert!((y[0] - x[0]).abs() < 1e-6); // the first token attends to itself alone
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! Tensors are `[batch, tokens, heads, dim]` with strides; see [`TensorRef`]. [`Plan::forward`] and
//! [`Plan::backward`] run whole sequences, [`Plan::step`] one or a few tokens against a [`State`].
//! What the library refuses is an [`Error`] with its status and message.
#![warn(missing_docs, clippy::undocumented_unsafe_blocks)]
#![deny(unsafe_op_in_unsafe_fn)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod attention;
mod element;
mod error;
mod memory;
mod plan;
mod segments;
mod state;
mod step;
mod tensor;
mod workspace;

pub use attention::{Backward, BackwardOut, Forward, ForwardOut};
pub use element::{Element, StateElement};
pub use error::{Error, Status};
pub use plan::{device_count, version, Device, Form, Plan, PlanBuilder, PlanInfo, Rope, RopeStyle};
pub use segments::{Compose, Segments, Summary, SummaryReverse};
pub use state::{state_bytes, state_monomial, state_rows, State, StateMut, StateRef};
pub use step::Step;
pub use tensor::{Indices, TensorMut, TensorRef};
pub use workspace::{Stream, Workspace};

#[cfg(doctest)]
mod borrowing;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
