// SPDX-License-Identifier: Apache-2.0
//! Any description, any shapes, strides and indices through the safe API: an error or a result, never a crash.
//! `cargo fuzz run safe_api`, or ./dev test rust, which runs it for a minute.
#![no_main]
use arbitrary::Arbitrary;
use half::bf16;
use libfuzzer_sys::fuzz_target;
use powerattn::{
    state_monomial, state_rows, Backward, BackwardOut, Error, Form, Forward, ForwardOut, Plan, Rope, RopeStyle,
    Segments, State, StateMut, StateRef, Step, Stream, Summary, SummaryReverse, TensorMut, TensorRef, Workspace,
};

#[derive(Arbitrary, Debug)]
struct Input {
    /// Which field may be anything; the others are kept where most plans are legal.
    wild: u8,
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
    pool: Option<Pool>,
}

/// Pools of states: copies between slots, folding, strided memory.
#[derive(Arbitrary, Debug)]
struct Pool {
    count: u8,
    from: Vec<i64>,
    to: Vec<i64>,
    strides: ([u16; 2], [u16; 2]),
    flags: u8,
    row: u32,
}

fn pools(plan: &Plan<f32>, head_dim: usize, degree: i32, x: &Pool, numbers: &[f32]) -> Result<(), Error> {
    let count = x.count as usize % 7;
    let _ = state_monomial(head_dim, degree, x.row as usize % (state_rows(head_dim, degree)? + 1));
    let mut a = State::<f32>::zeros(plan, count)?;
    let mut b = State::<f32>::zeros(plan, count + 1)?;
    let _ = b.copy_from(&a, &x.from, &x.to);
    // Slices of one memory with any strides: refused, or inside it.
    let (s_strides, z_strides) = (x.strides.0.map(usize::from), x.strides.1.map(usize::from));
    if let Ok(view) = StateRef::with_strides(plan, numbers, numbers, count, s_strides, z_strides) {
        let _ = plan.convert(view, a.as_mut(), &x.from, &x.to, Stream::default());
    }
    let (mut s, mut z) = (numbers.to_vec(), numbers.to_vec());
    if let Ok(view) = StateMut::with_strides(plan, &mut s, &mut z, count, s_strides, z_strides) {
        let _ = plan.convert(b.as_ref(), view, &x.from, &x.to, Stream::default());
    }
    let sequences = plan.info().sequences;
    let pool = State::<f32>::zeros(plan, count * sequences)?;
    let heads = pool.s().len().max(1) / (pool.rows() * (count * sequences).max(1)).max(1);
    let log_g = TensorRef::with_strides(numbers, [count, sequences, heads.max(1), 1], [1, 2, 0]);
    let segments = Segments {
        states: pool.as_ref(),
        log_g: if x.flags & 1 != 0 { log_g.ok() } else { None },
        reversed: x.flags & 2 != 0,
    };
    let mut out = State::<f32>::zeros(plan, sequences)?;
    let _ = plan.compose_into(&segments, out.as_mut(), None, Stream::default());
    let packed = out.to_bytes_as::<bf16>()?;
    out.read_bytes(&packed)
}

fn run(x: &Input) -> Result<(), powerattn::Error> {
    let wild = |field: u8| x.wild % 16 == field;
    let (b, t) = (x.batch as usize % 4, x.seq_len as usize % 40);
    let (b, t) = if wild(0) { (b, t) } else { (if x.sequences.is_some() { 1 } else { b.max(1) }, t) };
    let (hq, hkv) = (x.heads.0 as usize % 5, x.heads.1 as usize % 5);
    let (hq, hkv) = if wild(1) { (hq, hkv) } else { (hkv.clamp(1, 2) * hq.clamp(1, 2), hkv.clamp(1, 2)) };
    let (d, e) = (x.dims.0 as usize % 10, x.dims.1 as usize % 10);
    let d = if wild(2) { d } else { d.max(1) };
    let degree = if wild(3) { x.degree as i32 } else { [2, 4, 6, 2, 2, 3, 1, 2][x.degree as usize % 8] };
    let unnormalized = x.flags & 1 != 0 || (!wild(4) && degree % 2 != 0);
    let mut builder = Plan::<f32>::builder()
        .batch(b)
        .seq_len(t)
        .heads(hq, hkv)
        .head_dim(d)
        .value_dim(e)
        .degree(degree)
        .chunk_size(if wild(5) { x.chunk as usize } else { x.chunk as usize % 48 })
        .eps(if wild(6) { x.eps } else { 0.0 })
        .num_threads(if wild(7) { x.threads as i32 } else { 1 + (x.threads as i32 & 1) })
        .form(match x.form % 3 {
            0 => Form::Auto,
            1 => Form::Attention,
            _ => Form::Chunked,
        });
    if unnormalized {
        builder = builder.unnormalized();
    }
    if x.flags & 2 != 0 {
        builder = builder.use_state();
    }
    if let Some(scale) = x.scale {
        builder = builder.scale(if wild(8) { scale } else { 0.5 });
    }
    if let Some((half, dim, base)) = x.rope {
        let (dim, base) = if wild(9) { (dim as usize, base) } else { (dim as usize % (d + 1) & !1, 100.0) };
        let style = if half { RopeStyle::Half } else { RopeStyle::Interleaved };
        builder = builder.rope(Rope { style, dim, base });
    }
    let sequences = x.sequences.map(|n| if wild(10) { n as usize } else { 1 + n as usize % 4 });
    if let Some(n) = sequences {
        builder = builder.sequences(n);
    }
    if let (Some((batch, seq_len)), true) = (x.huge, wild(11)) {
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
        Some(s) if wild(12) => TensorRef::with_strides(&q, shape(h, d), s.map(|s| s as usize % 64)),
        _ => TensorRef::with_strides(&q, shape(h, d), [7, 3, d]),
    };
    // Offsets of packed sequences that are legal: sorted, from 0, inside the tokens.
    let mut offsets: Vec<i64> = x.indices.iter().map(|i| i.rem_euclid(t as i64 + 1)).collect();
    offsets.resize(info.sequences + 1, t as i64);
    offsets[0] = 0;
    offsets.sort_unstable();
    let positions: Vec<i64> = (0..info.sequences as i64).map(|i| 3 * i).collect();
    let (n, rows) = (b * t * hq, b * t * hkv);
    let forward = Forward {
        q: view(hq, d)?,
        k: view(hkv, d)?,
        v: view(hkv, e)?,
        log_g: if x.flags & 4 != 0 { Some(TensorRef::rows(&q, [b, t, hkv])?) } else { None },
        initial_state: None,
        cu_seqlens: sequences.map(|_| (if wild(13) { &x.indices } else { &offsets }).into()),
        rope_offset: if x.flags & 8 != 0 {
            Some((if wild(14) { &x.indices } else { &positions }).into())
        } else {
            None
        },
    };
    let (mut y, mut norm) = (vec![0.0; n * e], vec![0.0; n]);
    let out = ForwardOut::new(TensorMut::new(&mut y, shape(hq, e))?).row_norm(TensorMut::rows(&mut norm, [b, t, hq])?);
    if let Some(pool) = &x.pool {
        let _ = pools(&plan, d, degree, pool, &q);
    }
    if x.flags & 2 != 0 {
        let mut state = State::<f32>::zeros(&plan, info.sequences)?;
        let _ = state.read_bytes(&x.bytes);
        plan.forward(&forward, out.final_state(state.as_mut()))?;
        let step = Step {
            q: forward.q,
            k: forward.k,
            v: forward.v,
            log_g: forward.log_g,
            slots: x.slots.as_ref().map(Into::into),
            lengths: if x.flags & 16 != 0 {
                Some((if wild(15) { &x.indices } else { &positions }).into())
            } else {
                None
            },
            rope_offset: None,
        };
        let mut y2 = vec![0.0; n * e];
        let _ = plan.step(&step, state.as_mut(), TensorMut::new(&mut y2, shape(hq, e))?);
        let again = state.to_bytes()?;
        state.read_bytes(&again)?;
        let summary = Summary {
            k: forward.k,
            v: forward.v,
            log_g: forward.log_g,
            cu_seqlens: forward.cu_seqlens,
            rope_offset: forward.rope_offset,
        };
        let mut work = Workspace::new();
        let _ = plan.summary(&summary, state.as_mut(), None, &mut work, Stream::default());
        let reverse = SummaryReverse {
            q: forward.q,
            log_g: forward.log_g,
            y: Some(TensorRef::new(&y, shape(hq, e))?),
            row_norm: Some(TensorRef::rows(&norm, [b, t, hq])?),
            d_y: TensorRef::new(&y, shape(hq, e))?,
            cu_seqlens: forward.cu_seqlens,
            rope_offset: forward.rope_offset,
        };
        let _ = plan.summary_reverse(&reverse, state.as_mut(), None, &mut work, Stream::default());
    } else {
        plan.forward(&forward, out)?;
    }
    // Half of the backward passes after a forward pass that saves.
    let mut saved = Workspace::new();
    let keep = x.flags & 32 != 0;
    if keep {
        plan.forward(&forward, ForwardOut::new(TensorMut::new(&mut y, shape(hq, e))?).saved(&mut saved))?;
    }
    let (mut dq, mut dk, mut dv) = (vec![0.0; n * d], vec![0.0; rows * d], vec![0.0; rows * e]);
    plan.backward(
        Backward {
            forward,
            y: Some(TensorRef::new(&y, shape(hq, e))?),
            row_norm: Some(TensorRef::rows(&norm, [b, t, hq])?),
            d_y: TensorRef::new(&y, shape(hq, e))?,
            d_final_state: None,
            saved: if keep { Some(&mut saved) } else { None },
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
