// SPDX-License-Identifier: Apache-2.0
//! What the borrow checker must refuse. The first example compiles and runs; each of the others is that program with the
//! one change that its title names.
//!
//! ```
//! use powerattn::{Forward, ForwardOut, Plan, Stream, TensorMut, TensorRef, Workspace};
//!
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let x = vec![1.0f32; 4];
//! let (mut y, mut norm) = (vec![0.0f32; 4], vec![0.0f32; 2]);
//! let (mut saved, mut work) = (Workspace::new(), Workspace::new());
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! let out = ForwardOut::new(TensorMut::new(&mut y, [1, 2, 1, 2])?)
//!     .row_norm(TensorMut::rows(&mut norm, [1, 2, 1])?)
//!     .saved(&mut saved);
//! plan.forward_with(&Forward::new(t, t, t), out, &mut work, Stream::default())?;
//! std::thread::scope(|scope| scope.spawn(|| plan.info().chunk_size).join().is_ok());
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! A plan that is gone:
//! ```compile_fail,E0382
//! # use powerattn::{Forward, ForwardOut, Plan, TensorMut, TensorRef};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let x = vec![1.0f32; 4];
//! let mut y = vec![0.0f32; 4];
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! drop(plan);
//! plan.forward(&Forward::new(t, t, t), ForwardOut::new(TensorMut::new(&mut y, [1, 2, 1, 2])?))?;
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! A tensor whose memory is gone:
//! ```compile_fail,E0505
//! # use powerattn::{Forward, ForwardOut, Plan, TensorMut, TensorRef};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let x = vec![1.0f32; 4];
//! let mut y = vec![0.0f32; 4];
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! drop(x);
//! plan.forward(&Forward::new(t, t, t), ForwardOut::new(TensorMut::new(&mut y, [1, 2, 1, 2])?))?;
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! An output that is also an input:
//! ```compile_fail,E0502
//! # use powerattn::{Forward, ForwardOut, Plan, TensorMut, TensorRef};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let mut x = vec![1.0f32; 4];
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! plan.forward(&Forward::new(t, t, t), ForwardOut::new(TensorMut::new(&mut x, [1, 2, 1, 2])?))?;
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! Two outputs in one memory:
//! ```compile_fail,E0499
//! # use powerattn::{Forward, ForwardOut, Plan, TensorMut, TensorRef};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let x = vec![1.0f32; 4];
//! let mut y = vec![0.0f32; 4];
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! let out = ForwardOut::new(TensorMut::new(&mut y, [1, 2, 1, 2])?).row_norm(TensorMut::rows(&mut y, [1, 2, 1])?);
//! plan.forward(&Forward::new(t, t, t), out)?;
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! Saved memory that is also the workspace:
//! ```compile_fail,E0499
//! # use powerattn::{Forward, ForwardOut, Plan, Stream, TensorMut, TensorRef, Workspace};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let x = vec![1.0f32; 4];
//! let mut y = vec![0.0f32; 4];
//! let mut work = Workspace::new();
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! let out = ForwardOut::new(TensorMut::new(&mut y, [1, 2, 1, 2])?).saved(&mut work);
//! plan.forward_with(&Forward::new(t, t, t), out, &mut work, Stream::default())?;
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! An output that is used while the call's view lives:
//! ```compile_fail,E0502
//! # use powerattn::{Forward, ForwardOut, Plan, TensorMut, TensorRef};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).build()?;
//! let x = vec![1.0f32; 4];
//! let mut y = vec![0.0f32; 4];
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! let out = ForwardOut::new(TensorMut::new(&mut y, [1, 2, 1, 2])?);
//! println!("{}", y[0]);
//! plan.forward(&Forward::new(t, t, t), out)?;
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! A state of another element type:
//! ```compile_fail,E0308
//! # use powerattn::{Forward, Plan, State, TensorRef};
//! let plan = Plan::<f32>::builder().seq_len(2).head_dim(2).use_state().build()?;
//! let state = State::<f64>::zeros(&plan, 1)?;
//! let x = vec![1.0f32; 4];
//! let t = TensorRef::new(&x, [1, 2, 1, 2])?;
//! let input = Forward::<f32>::new(t, t, t).initial_state(state.as_ref());
//! # Ok::<(), powerattn::Error>(())
//! ```
//!
//! A workspace shared by two threads:
//! ```compile_fail,E0277
//! fn shared<T: Sync>() {}
//! shared::<powerattn::Workspace>();
//! ```
