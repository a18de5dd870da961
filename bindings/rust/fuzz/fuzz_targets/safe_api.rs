// SPDX-License-Identifier: Apache-2.0
//! Any description, any shapes, strides and indices through the safe API: an error or a result, never a crash.
//! `cargo fuzz run safe_api`, or ./dev test rust, which runs it for a minute.
#![no_main]
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use powerattn::{
    Backward, BackwardOut, Form, Forward, ForwardOut, Plan, Rope, RopeStyle, State, Step, TensorMut, TensorRef,
};

#[derive(Arbitrary, Debug)]
struct Input {
    batch: u8,
    seq_len: u8,
    heads: (u8, u8),
    dims: (u8, u8),
    degree: i8,
    flags: u8,
    form: u8,
    chunk: u16,
    scale: Option<f64>,
    eps: f64,
    rope: Option<(bool, u8, f64)>,
    sequences: Option<u8>,
    threads: i8,
    huge: Option<(usize, usize)>,
    strides: Option<[u16; 3]>,
    indices: Vec<i64>,
    slots: Option<Vec<i64>>,
    fill: f32,
    bytes: Vec<u8>,
}

fn run(x: &Input) -> Result<(), powerattn::Error> {
    let (b, t) = (x.batch as usize % 4, x.seq_len as usize % 40);
    let (hq, hkv) = (x.heads.0 as usize % 5, x.heads.1 as usize % 5);
    let (d, e) = (x.dims.0 as usize % 10, x.dims.1 as usize % 10);
    let mut builder = Plan::<f32>::builder()
        .batch(b)
        .seq_len(t)
        .heads(hq, hkv)
        .head_dim(d)
        .value_dim(e)
        .degree(x.degree as i32)
        .chunk_size(x.chunk as usize)
        .eps(x.eps)
        .num_threads(x.threads as i32 % 4)
        .form(match x.form % 3 {
            0 => Form::Auto,
            1 => Form::Attention,
            _ => Form::Chunked,
        });
    if x.flags & 1 != 0 {
        builder = builder.unnormalized();
    }
    if x.flags & 2 != 0 {
        builder = builder.use_state();
    }
    if let Some(scale) = x.scale {
        builder = builder.scale(scale);
    }
    if let Some((half, dim, base)) = x.rope {
        let style = if half { RopeStyle::Half } else { RopeStyle::Interleaved };
        builder = builder.rope(Rope { style, dim: dim as usize, base });
    }
    if let Some(n) = x.sequences {
        builder = builder.sequences(n as usize);
    }
    if let Some((batch, seq_len)) = x.huge {
        // Sizes that cannot be allocated: only planned and described, never run.
        let plan = builder.batch(batch).seq_len(seq_len).build()?;
        return plan.describe().map(drop);
    }
    // Degree 8 of ten dimensions has 24310 rows; more than a few states of that would only be slow.
    let plan = builder.state_limit(8 << 20).build()?;
    plan.describe()?;
    let info = *plan.info();
    if info.workspace_forward > 1 << 28 || info.workspace_backward > 1 << 28 {
        return Ok(());
    }
    let e = if e == 0 { d } else { e };
    let q = vec![x.fill; 4096];
    let shape = |h, d| [b, t, h, d];
    let view = |h: usize, d: usize| match x.strides {
        Some(s) => TensorRef::with_strides(&q, shape(h, d), s.map(|s| s as usize % 64)),
        None => TensorRef::with_strides(&q, shape(h, d), [7, 3, d]),
    };
    let (n, rows) = (b * t * hq, b * t * hkv);
    let forward = Forward {
        q: view(hq, d)?,
        k: view(hkv, d)?,
        v: view(hkv, e)?,
        log_g: if x.flags & 4 != 0 { Some(TensorRef::rows(&q, [b, t, hkv])?) } else { None },
        initial_state: None,
        cu_seqlens: x.sequences.map(|_| (&x.indices).into()),
        rope_offset: if x.flags & 8 != 0 { Some((&x.indices).into()) } else { None },
    };
    let (mut y, mut norm) = (vec![0.0; n * e], vec![0.0; n]);
    let out = ForwardOut::new(TensorMut::new(&mut y, shape(hq, e))?).row_norm(TensorMut::rows(&mut norm, [b, t, hq])?);
    if x.flags & 2 != 0 {
        let mut state = State::<f32>::zeros(&plan, info.sequences)?;
        let _ = state.read_bytes(&x.bytes);
        plan.forward(&forward, out.final_state(state.as_mut()))?;
        let step = Step {
            q: forward.q,
            k: forward.k,
            v: forward.v,
            log_g: forward.log_g,
            slots: x.slots.as_ref().map(|s| s.into()),
            lengths: if x.flags & 16 != 0 { Some((&x.indices).into()) } else { None },
            rope_offset: None,
        };
        let mut y2 = vec![0.0; n * e];
        let _ = plan.step(&step, state.as_mut(), TensorMut::new(&mut y2, shape(hq, e))?);
        let again = state.to_bytes()?;
        state.read_bytes(&again)?;
    } else {
        plan.forward(&forward, out)?;
    }
    let (mut dq, mut dk, mut dv) = (vec![0.0; n * d], vec![0.0; rows * d], vec![0.0; rows * e]);
    plan.backward(
        Backward {
            forward,
            y: Some(TensorRef::new(&y, shape(hq, e))?),
            row_norm: Some(TensorRef::rows(&norm, [b, t, hq])?),
            d_y: TensorRef::new(&y, shape(hq, e))?,
            d_final_state: None,
            saved: None,
        },
        BackwardOut {
            d_q: TensorMut::new(&mut dq, shape(hq, d))?,
            d_k: TensorMut::new(&mut dk, shape(hkv, d))?,
            d_v: TensorMut::new(&mut dv, shape(hkv, e))?,
            d_log_g: None,
            d_initial_state: None,
        },
    )
}

fuzz_target!(|x: Input| {
    let _ = run(&x);
});
