// SPDX-License-Identifier: Apache-2.0
//! Every case of the smoke and ci tiers (tests/cases/*.txt, grammar in tests/case.h) through the safe API and through
//! the raw C functions: the results must be the same bits.
mod common;

use common::Random;
use powerattn::{
    Backward, BackwardOut, Element, Form, Forward, ForwardOut, Indices, Plan, PlanBuilder, Rope, RopeStyle, State,
    StateElement, Step, Stream, Summary, SummaryReverse, TensorMut, TensorRef, Workspace,
};
use powerattn_sys as sys;
use std::ffi::c_void;
use std::mem::{size_of, zeroed};

#[derive(Clone, Debug, Default)]
struct Case {
    op: String,
    dtype: String,
    b: usize,
    t: usize,
    hq: usize,
    hkv: usize,
    d: usize,
    e: usize,
    p: i32,
    sequences: Option<Vec<usize>>,
    pad: usize,
    gate: String,
    unnorm: bool,
    state: bool,
    bstate: bool,
    scale: Option<f64>,
    eps: f64,
    rope: Option<RopeStyle>,
    rope_dim: usize,
    rope_base: f64,
    offset: bool,
    layout: String,
    slots: bool,
    lengths: bool,
    form: Form,
    chunk: usize,
    threads: i32,
    tf32: bool,
}

fn parse(line: &str) -> Case {
    let mut words = line.split_whitespace();
    let mut case = Case {
        op: words.next().unwrap().into(),
        dtype: words.next().unwrap().into(),
        b: 1,
        hq: 1,
        hkv: 1,
        p: 2,
        rope_base: 10000.0,
        ..Case::default()
    };
    let number = |text: &str| text.parse::<usize>().unwrap_or_else(|_| panic!("{line}: {text}"));
    let mut t = None;
    for word in words {
        match word {
            "gated" | "fading" | "reset" => case.gate = word.into(),
            "unnorm" => case.unnorm = true,
            "state" => case.state = true,
            "bstate" => case.bstate = true,
            "rope-half" => case.rope = Some(RopeStyle::Half),
            "rope-inter" => case.rope = Some(RopeStyle::Interleaved),
            "offset" => case.offset = true,
            "bhtd" | "wide" | "bcast" => case.layout = word.into(),
            "slots" => case.slots = true,
            "lengths" => case.lengths = true,
            "attn" => case.form = Form::Attention,
            "chunked" => case.form = Form::Chunked,
            "tf32" => case.tf32 = true,
            _ => {
                if let Some(x) = word.strip_prefix("seq") {
                    case.sequences = Some(x.split(',').map(number).collect());
                } else if let Some(x) = word.strip_prefix("pad") {
                    case.pad = number(x);
                } else if let Some(x) = word.strip_prefix("scale") {
                    case.scale = Some(x.parse().unwrap());
                } else if let Some(x) = word.strip_prefix("eps") {
                    case.eps = x.parse().unwrap();
                } else if let Some(x) = word.strip_prefix("rdim") {
                    case.rope_dim = number(x);
                } else if let Some(x) = word.strip_prefix("rbase") {
                    case.rope_base = x.parse().unwrap();
                } else if let Some(x) = word.strip_prefix("threads") {
                    case.threads = number(x) as i32;
                } else {
                    let (letter, rest) = word.split_at(1);
                    match letter {
                        "b" => case.b = number(rest),
                        "t" => t = Some(number(rest)),
                        "d" => case.d = number(rest),
                        "e" => case.e = number(rest),
                        "p" => case.p = number(rest) as i32,
                        "c" => case.chunk = number(rest),
                        "h" => {
                            let mut heads = rest.split('/').map(number);
                            case.hq = heads.next().unwrap();
                            case.hkv = heads.next().unwrap_or(case.hq);
                        }
                        _ => panic!("{line}: unknown word {word}"),
                    }
                }
            }
        }
    }
    if case.e == 0 {
        case.e = case.d;
    }
    if let Some(lengths) = &case.sequences {
        case.b = 1;
        t = t.or(Some(lengths.iter().sum::<usize>() + case.pad));
    }
    case.t = t.unwrap_or_else(|| panic!("{line}: no t"));
    case
}

trait Number: Element + PartialEq + std::fmt::Debug {
    fn from_f64(x: f64) -> Self;
    fn bits(self) -> u64;
}
macro_rules! number {
    ($t:ty, $from:expr) => {
        impl Number for $t {
            fn from_f64(x: f64) -> Self {
                $from(x)
            }
            fn bits(self) -> u64 {
                self.to_bits() as u64
            }
        }
    };
}
number!(f32, |x| x as f32);
number!(f64, |x| x);
number!(half::f16, half::f16::from_f64);
number!(half::bf16, half::bf16::from_f64);

/// A tensor with its storage: shape [b, t, h, d], strides of the case's layout.
struct Tensor<T> {
    data: Vec<T>,
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<T: Number> Tensor<T> {
    fn new(shape: [usize; 4], layout: &str) -> Self {
        let [b, t, h, d] = shape;
        let strides = match layout {
            "bhtd" => [h * t * d, d, t * d],
            "wide" => [t * h * (d + 3) + 5, h * (d + 3), d + 3],
            "bcast" => [0, h * d, d],
            _ => [t * h * d, h * d, d],
        };
        let batches = if strides[0] == 0 { 1 } else { b };
        let len = if b * t * h * d == 0 { 0 } else { (strides[0] * (batches - 1) + t * h * (d + 3)).max(1) };
        Self { data: vec![T::from_f64(f64::NAN); len], shape, strides }
    }
    fn random(shape: [usize; 4], layout: &str, random: &mut Random, map: impl Fn(f64) -> f64) -> Self {
        let mut tensor = Self::new(shape, layout);
        tensor.data.iter_mut().for_each(|x| *x = T::from_f64(map(random.normal())));
        tensor
    }
    fn view(&self) -> TensorRef<'_, T> {
        TensorRef::with_strides(&self.data, self.shape, self.strides).unwrap()
    }
    fn view_mut(&mut self) -> TensorMut<'_, T> {
        TensorMut::with_strides(&mut self.data, self.shape, self.strides).unwrap()
    }
    fn raw(&self) -> sys::powerattn_tensor {
        let [stride_b, stride_t, stride_h] = self.strides.map(|s| s as i64);
        sys::powerattn_tensor { data: self.data.as_ptr() as *mut c_void, stride_b, stride_t, stride_h }
    }
    fn bits(&self) -> Vec<u64> {
        self.data.iter().map(|x| x.bits()).collect()
    }
}

fn state_raw<S: StateElement>(state: &State<S>, heads: usize, e: usize) -> sys::powerattn_state {
    let rows = state.rows() as i64;
    sys::powerattn_state {
        s: state.s().as_ptr() as *mut c_void,
        z: state.z().as_ptr() as *mut c_void,
        s_stride_n: rows * e as i64 * heads as i64,
        s_stride_h: rows * e as i64,
        z_stride_n: rows * heads as i64,
        z_stride_h: rows,
    }
}

fn builder<T: Element>(case: &Case) -> PlanBuilder<T, T::Stat> {
    let mut b = Plan::<T>::builder()
        .batch(case.b)
        .seq_len(case.t)
        .heads(case.hq, case.hkv)
        .head_dim(case.d)
        .value_dim(case.e)
        .degree(case.p)
        .eps(case.eps)
        .form(case.form)
        .chunk_size(case.chunk)
        .num_threads(case.threads);
    if case.unnorm {
        b = b.unnormalized();
    }
    if case.state || !matches!(case.op.as_str(), "fwd" | "bwd") {
        b = b.use_state();
    }
    if case.tf32 {
        b = b.allow_tf32();
    }
    if let Some(scale) = case.scale {
        b = b.scale(scale);
    }
    if let Some(lengths) = &case.sequences {
        b = b.sequences(lengths.len());
    }
    if let Some(style) = case.rope {
        b = b.rope(Rope { style, dim: case.rope_dim, base: case.rope_base });
    }
    b
}

/// A raw plan from the safe plan's own text of choices: the same description, made by hand.
fn raw_desc(case: &Case, dtype: u32, state_dtype: u32) -> sys::powerattn_desc {
    let mut desc: sys::powerattn_desc = unsafe { zeroed() };
    desc.struct_size = size_of::<sys::powerattn_desc>() as u32;
    desc.dtype = dtype as i32;
    desc.state_dtype = state_dtype as i32;
    desc.degree = case.p;
    let needs_state = case.state || !matches!(case.op.as_str(), "fwd" | "bwd");
    desc.flags = [
        (case.unnorm, sys::POWERATTN_UNNORMALIZED),
        (case.scale.is_some(), sys::POWERATTN_CUSTOM_SCALE),
        (needs_state, sys::POWERATTN_USE_STATE),
        (case.tf32, sys::POWERATTN_ALLOW_TF32),
    ]
    .iter()
    .map(|&(on, bit)| if on { bit as i32 } else { 0 })
    .sum();
    desc.form = match case.form {
        Form::Attention => sys::POWERATTN_FORM_ATTENTION,
        Form::Chunked => sys::POWERATTN_FORM_CHUNKED,
        _ => sys::POWERATTN_FORM_AUTO,
    } as i32;
    desc.batch = case.b as i64;
    desc.seq_len = case.t as i64;
    desc.heads_q = case.hq as i64;
    desc.heads_kv = case.hkv as i64;
    desc.head_dim = case.d as i64;
    desc.value_dim = case.e as i64;
    desc.sequences = case.sequences.as_ref().map_or(0, |s| s.len() as i64);
    desc.chunk_size = case.chunk as i64;
    desc.scale = case.scale.unwrap_or(0.0);
    desc.eps = case.eps;
    if let Some(style) = case.rope {
        desc.rope_style = if style == RopeStyle::Half { 1 } else { 2 };
        desc.rope_dim = case.rope_dim as i64;
        desc.rope_base = case.rope_base;
    }
    desc.num_threads = case.threads;
    desc
}

struct RawPlan(*mut sys::powerattn_plan);
impl RawPlan {
    fn new(desc: &sys::powerattn_desc) -> Self {
        let mut raw = std::ptr::null_mut();
        assert_eq!(unsafe { sys::powerattn_plan_create(desc, &mut raw) }, 0);
        RawPlan(raw)
    }
}
impl Drop for RawPlan {
    fn drop(&mut self) {
        unsafe { sys::powerattn_plan_destroy(self.0) }
    }
}

fn ok(status: i32) {
    assert_eq!(status, 0, "{}", unsafe { std::ffi::CStr::from_ptr(sys::powerattn_last_error()) }.to_string_lossy());
}

fn scratch(bytes: u64) -> (Vec<u8>, *mut c_void) {
    let mut memory = vec![0xABu8; bytes as usize + 256];
    let pad = memory.as_ptr().align_offset(256);
    let data = if bytes == 0 { std::ptr::null_mut() } else { memory[pad..].as_mut_ptr() as *mut c_void };
    (memory, data)
}

fn run<T: Number, S: StateElement + Number>(case: &Case, plan: &Plan<T, S>, dtype: u32, state_dtype: u32)
where
    T::Stat: Number,
{
    let raw = RawPlan::new(&raw_desc(case, dtype, state_dtype));
    let mut random = Random::new(case.t as u64 * 31 + case.d as u64);
    let layout = case.layout.as_str();
    let own = if layout == "bcast" { "" } else { layout };
    let Case { b, t, hq, hkv, d, e, .. } = *case;
    let q = Tensor::<T>::random([b, t, hq, d], own, &mut random, |x| x);
    let k = Tensor::<T>::random([b, t, hkv, d], layout, &mut random, |x| x);
    let v = Tensor::<T>::random([b, t, hkv, e], layout, &mut random, |x| x);
    let (mean, reset) = match case.gate.as_str() {
        "fading" => (2.0, false),
        "reset" => (0.02, true),
        _ => (0.02, false),
    };
    let gates = Tensor::<T::Stat>::random([b, t, hkv, 1], "", &mut random, |x| {
        if reset && x > 1.5 {
            f64::NEG_INFINITY
        } else {
            -mean * x.abs()
        }
    });
    let log_g = if case.gate.is_empty() { None } else { Some(gates.view()) };
    let lens: Option<Vec<i64>> = case.sequences.as_ref().map(|lengths| {
        std::iter::once(0)
            .chain(lengths.iter().scan(0, |sum, &n| {
                *sum += n as i64;
                Some(*sum)
            }))
            .collect()
    });
    let count = case.sequences.as_ref().map_or(b, Vec::len);
    let offsets: Option<Vec<i64>> = case.offset.then(|| (0..count as i64).map(|n| 3 + 17 * n).collect());
    let indices = |x: &Option<Vec<i64>>| x.as_ref().map_or(std::ptr::null(), |x| x.as_ptr());
    let no_tensor: sys::powerattn_tensor = unsafe { zeroed() };
    let gate_raw = if case.gate.is_empty() { no_tensor } else { gates.raw() };
    // Without states (of p = 6, say, they would fit nowhere) an empty pool stands in.
    let uses_state = case.state || !matches!(case.op.as_str(), "fwd" | "bwd");
    let new_state = |random: &mut Random| {
        let mut state = State::<S>::zeros(plan, if uses_state { count } else { 0 }).unwrap();
        let (s, z) = state.parts_mut();
        s.iter_mut().for_each(|x| *x = S::from_f64(0.1 * random.normal()));
        z.iter_mut().for_each(|x| *x = S::from_f64(0.1 * random.normal().abs()));
        state
    };
    let info = *plan.info();
    let same = |what: &str, a: Vec<u64>, b: Vec<u64>| assert!(a == b, "{what} differs from the C result: {case:?}");
    let state_bits = |s: &State<S>| s.s().iter().chain(s.z()).map(|x| x.bits()).collect::<Vec<_>>();

    let initial = new_state(&mut random);
    if case.op == "step" {
        let pool_size = if case.slots { 2 * b + 1 } else { b };
        let slots: Option<Vec<i64>> =
            case.slots.then(|| (0..b as i64).map(|n| if n % 3 == 2 { -1 } else { 2 * b as i64 - 2 * n }).collect());
        let lengths: Option<Vec<i64>> = case.lengths.then(|| (0..b as i64).map(|n| n % (t as i64 + 1)).collect());
        let mut pool = State::<S>::zeros(plan, pool_size).unwrap();
        let (s, z) = pool.parts_mut();
        s.iter_mut().chain(z).for_each(|x| *x = S::from_f64(random.normal().abs()));
        let raw_pool = pool.clone();
        let (mut y, raw_y) = (Tensor::<T>::new([b, t, hq, e], own), Tensor::<T>::new([b, t, hq, e], own));
        let input = Step {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            log_g,
            slots: slots.as_ref().map(Indices::from),
            lengths: lengths.as_ref().map(Indices::from),
            rope_offset: offsets.as_ref().map(Indices::from),
        };
        plan.step(&input, pool.as_mut(), y.view_mut()).unwrap();
        let (_memory, work) = scratch(info.workspace_step);
        unsafe {
            let mut args: sys::powerattn_step_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_step_args>() as u32;
            (args.q, args.k, args.v, args.log_g, args.y) = (q.raw(), k.raw(), v.raw(), gate_raw, raw_y.raw());
            args.state = state_raw(&raw_pool, hkv, e);
            args.num_slots = pool_size as i64;
            (args.slots, args.lengths, args.rope_offset) = (indices(&slots), indices(&lengths), indices(&offsets));
            (args.workspace, args.workspace_bytes) = (work, info.workspace_step);
            ok(sys::powerattn_step(raw.0, &args));
        }
        same("y", y.bits(), raw_y.bits());
        return same("state", state_bits(&pool), state_bits(&raw_pool));
    }
    if case.op == "sum" {
        let (mut state, raw_state) = (new_state(&mut random), new_state(&mut random));
        let mut total = Tensor::<T::Stat>::new([count, hkv, 1, 1], "");
        let raw_total = Tensor::<T::Stat>::new([count, hkv, 1, 1], "");
        let total_view = TensorMut::new(&mut total.data[..count * hkv], [count, hkv, 1, 1]).unwrap();
        let input = Summary {
            k: k.view(),
            v: v.view(),
            log_g,
            cu_seqlens: lens.as_ref().map(Indices::from),
            rope_offset: offsets.as_ref().map(Indices::from),
        };
        plan.summary(&input, state.as_mut(), Some(total_view), &mut Workspace::new(), Stream::default()).unwrap();
        let (_memory, work) = scratch(info.workspace_summary);
        unsafe {
            let mut args: sys::powerattn_summary_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_summary_args>() as u32;
            (args.k, args.v, args.log_g, args.state) = (k.raw(), v.raw(), gate_raw, state_raw(&raw_state, hkv, e));
            args.total_log_g = raw_total.data.as_ptr() as *mut c_void;
            (args.cu_seqlens, args.rope_offset) = (indices(&lens), indices(&offsets));
            (args.workspace, args.workspace_bytes) = (work, info.workspace_summary);
            ok(sys::powerattn_summary(raw.0, &args));
        }
        same("total_log_g", total.bits(), raw_total.bits());
        return same("state", state_bits(&state), state_bits(&raw_state));
    }

    let mut y = Tensor::<T>::new([b, t, hq, e], own);
    let mut norm = Tensor::<T::Stat>::new([b, t, hq, 1], "");
    let mut last = new_state(&mut random);
    let forward = Forward {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        log_g,
        initial_state: case.state.then(|| initial.as_ref()),
        cu_seqlens: lens.as_ref().map(Indices::from),
        rope_offset: offsets.as_ref().map(Indices::from),
    };
    // With memory for backward where the plan has any, so that both ways of the backward pass run below.
    let (saves, mut saved) = (case.op == "bwd" && info.saved_bytes > 0, Workspace::new());
    let mut out = ForwardOut::new(y.view_mut()).row_norm(norm.view_mut());
    if case.state {
        out = out.final_state(last.as_mut());
    }
    if saves {
        out = out.saved(&mut saved);
    }
    plan.forward(&forward, out).unwrap();

    if case.op == "rsum" {
        let d_y = Tensor::<T>::random([b, t, hq, e], own, &mut random, |x| x);
        let (mut state, raw_state) = (new_state(&mut random), new_state(&mut random));
        let normalised = !case.unnorm;
        let input = SummaryReverse {
            q: q.view(),
            log_g,
            y: normalised.then(|| y.view()),
            row_norm: normalised.then(|| norm.view()),
            d_y: d_y.view(),
            cu_seqlens: lens.as_ref().map(Indices::from),
            rope_offset: offsets.as_ref().map(Indices::from),
        };
        plan.summary_reverse(&input, state.as_mut(), None, &mut Workspace::new(), Stream::default()).unwrap();
        let (_memory, work) = scratch(info.workspace_summary);
        unsafe {
            let mut args: sys::powerattn_summary_reverse_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_summary_reverse_args>() as u32;
            (args.q, args.log_g, args.d_y) = (q.raw(), gate_raw, d_y.raw());
            if normalised {
                (args.y, args.row_norm) = (y.raw(), norm.raw());
            }
            args.d_state = state_raw(&raw_state, hkv, e);
            (args.cu_seqlens, args.rope_offset) = (indices(&lens), indices(&offsets));
            (args.workspace, args.workspace_bytes) = (work, info.workspace_summary);
            ok(sys::powerattn_summary_reverse(raw.0, &args));
        }
        return same("d_state", state_bits(&state), state_bits(&raw_state));
    }

    let raw_y = Tensor::<T>::new([b, t, hq, e], own);
    let raw_norm = Tensor::<T::Stat>::new([b, t, hq, 1], "");
    let raw_last = new_state(&mut random);
    let (_memory, work) = scratch(info.workspace_forward);
    let (_saved_memory, raw_saved) = scratch(if saves { info.saved_bytes } else { 0 });
    unsafe {
        let mut args: sys::powerattn_forward_args = zeroed();
        args.struct_size = size_of::<sys::powerattn_forward_args>() as u32;
        (args.q, args.k, args.v, args.log_g, args.y) = (q.raw(), k.raw(), v.raw(), gate_raw, raw_y.raw());
        args.row_norm = raw_norm.raw();
        if case.state {
            args.initial_state = state_raw(&initial, hkv, e);
            args.final_state = state_raw(&raw_last, hkv, e);
        }
        (args.cu_seqlens, args.rope_offset) = (indices(&lens), indices(&offsets));
        (args.workspace, args.workspace_bytes) = (work, info.workspace_forward);
        (args.saved, args.saved_bytes) = (raw_saved, if saves { info.saved_bytes } else { 0 });
        ok(sys::powerattn_forward(raw.0, &args));
    }
    same("y", y.bits(), raw_y.bits());
    same("row_norm", norm.bits(), raw_norm.bits());
    if case.state {
        same("final_state", state_bits(&last), state_bits(&raw_last));
    }
    if case.op == "fwd" {
        return;
    }

    let d_y = Tensor::<T>::random([b, t, hq, e], own, &mut random, |x| x);
    let d_last = new_state(&mut random);
    for keep in [false, true] {
        if keep && !saves {
            continue;
        }
        let new = |h, d| Tensor::<T>::new([b, t, h, d], own);
        let (mut dq, mut dk, mut dv) = (new(hq, d), new(hkv, d), new(hkv, e));
        let (raw_dq, raw_dk, raw_dv) = (new(hq, d), new(hkv, d), new(hkv, e));
        let (mut dg, raw_dg) = (Tensor::<T::Stat>::new([b, t, hkv, 1], ""), Tensor::<T::Stat>::new([b, t, hkv, 1], ""));
        let (mut d_initial, raw_d_initial) = (new_state(&mut random), new_state(&mut random));
        plan.backward(
            Backward {
                forward,
                y: Some(y.view()),
                row_norm: Some(norm.view()),
                d_y: d_y.view(),
                d_final_state: case.state.then(|| d_last.as_ref()),
                saved: keep.then_some(&mut saved),
            },
            BackwardOut {
                d_q: dq.view_mut(),
                d_k: dk.view_mut(),
                d_v: dv.view_mut(),
                d_log_g: log_g.map(|_| dg.view_mut()),
                d_initial_state: case.state.then(|| d_initial.as_mut()),
            },
        )
        .unwrap();
        let needed = if keep { info.workspace_backward_saved } else { info.workspace_backward };
        let (_memory, work) = scratch(needed);
        unsafe {
            let mut args: sys::powerattn_backward_args = zeroed();
            args.struct_size = size_of::<sys::powerattn_backward_args>() as u32;
            (args.q, args.k, args.v, args.log_g, args.y) = (q.raw(), k.raw(), v.raw(), gate_raw, y.raw());
            (args.row_norm, args.d_y) = (norm.raw(), d_y.raw());
            (args.d_q, args.d_k, args.d_v) = (raw_dq.raw(), raw_dk.raw(), raw_dv.raw());
            args.d_log_g = if case.gate.is_empty() { no_tensor } else { raw_dg.raw() };
            if case.state {
                args.initial_state = state_raw(&initial, hkv, e);
                args.d_final_state = state_raw(&d_last, hkv, e);
                args.d_initial_state = state_raw(&raw_d_initial, hkv, e);
            }
            (args.cu_seqlens, args.rope_offset) = (indices(&lens), indices(&offsets));
            (args.workspace, args.workspace_bytes) = (work, needed);
            if keep {
                (args.saved, args.saved_bytes) = (raw_saved, info.saved_bytes);
            }
            ok(sys::powerattn_backward(raw.0, &args));
        }
        same("d_q", dq.bits(), raw_dq.bits());
        same("d_k", dk.bits(), raw_dk.bits());
        same("d_v", dv.bits(), raw_dv.bits());
        same("d_log_g", dg.bits(), raw_dg.bits());
        if case.state {
            same("d_initial_state", state_bits(&d_initial), state_bits(&raw_d_initial));
        }
    }
}

fn run_case(line: &str) {
    let case = parse(line);

    match (case.dtype.as_str(), case.bstate) {
        ("f32", false) => run(&case, &builder::<f32>(&case).build().unwrap(), sys::POWERATTN_FLOAT32, 0),
        ("f64", _) => run(&case, &builder::<f64>(&case).build().unwrap(), sys::POWERATTN_FLOAT64, 0),
        ("f16", false) => run(&case, &builder::<half::f16>(&case).build().unwrap(), sys::POWERATTN_FLOAT16, 0),
        ("bf16", false) => run(&case, &builder::<half::bf16>(&case).build().unwrap(), sys::POWERATTN_BFLOAT16, 0),
        (dtype, true) => {
            let state = sys::POWERATTN_BFLOAT16;
            match dtype {
                "f32" => run(
                    &case,
                    &builder::<f32>(&case).state_type::<half::bf16>().build().unwrap(),
                    sys::POWERATTN_FLOAT32,
                    state,
                ),
                "f16" => run(
                    &case,
                    &builder::<half::f16>(&case).state_type::<half::bf16>().build().unwrap(),
                    sys::POWERATTN_FLOAT16,
                    state,
                ),
                _ => run(
                    &case,
                    &builder::<half::bf16>(&case).state_type::<half::bf16>().build().unwrap(),
                    sys::POWERATTN_BFLOAT16,
                    state,
                ),
            }
        }
        (dtype, _) => panic!("{line}: unknown dtype {dtype}"),
    }
}

fn tier(name: &str) {
    let file = format!("{}/../../../tests/cases/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut cases = 0;
    for line in text.lines() {
        let line = line.split('#').next().unwrap().trim();
        if !line.is_empty() {
            run_case(line);
            cases += 1;
        }
    }
    assert!(cases > 20, "{file} holds only {cases} cases");
}

#[test]
fn smoke_tier_is_bit_for_bit_the_c_result() {
    tier("smoke");
}

#[test]
fn ci_tier_is_bit_for_bit_the_c_result() {
    tier("ci");
}
