// SPDX-License-Identifier: Apache-2.0
//! Device pointers through the safe API on the emulated CUDA device of tests/emulation: the same calls as on the
//! processor, with the same results. scripts/rust.sh puts the emulated library in the other's place; this is not a part
//! of a plain `cargo test`.
mod common;

use common::{difference, Random};
use powerattn::{
    device_count, Backward, BackwardOut, Device, Forward, ForwardOut, Indices, Plan, Segments, State, StateMut,
    StateRef, Status, Step, Stream, Summary, TensorMut, TensorRef, Workspace,
};
use std::ffi::{c_void, CStr};
use std::os::raw::{c_char, c_int};

extern "C" {
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// A function of the emulated CUDA runtime, which the library has loaded.
fn runtime(name: &'static [u8]) -> *mut c_void {
    let name = CStr::from_bytes_with_nul(name).unwrap();
    // SAFETY: a lookup in everything that is loaded.
    let f = unsafe { dlsym(std::ptr::null_mut(), name.as_ptr()) };
    assert!(!f.is_null(), "no emulated device: scripts/rust.sh says how this test is run");
    f
}

const GPU: Device = Device::Cuda(0);
const DEFAULT: c_int = 4; // cudaMemcpyDefault

fn copy(to: *mut c_void, from: *const c_void, bytes: usize) {
    // SAFETY: the function's own signature; both sides hold the bytes.
    let f: extern "C" fn(*mut c_void, *const c_void, usize, c_int) -> c_int =
        unsafe { std::mem::transmute(runtime(b"_Z10cudaMemcpyPvPKvm14cudaMemcpyKind\0")) };
    assert_eq!(f(to, from, bytes, DEFAULT), 0);
}

/// Numbers on a device. Device memory is never freed: the process ends with the test.
struct Memory<T> {
    host: Vec<T>,
    at: *mut T,
    device: Device,
}

impl<T: Copy> Memory<T> {
    fn new(mut host: Vec<T>, device: Device) -> Self {
        let mut at = host.as_mut_ptr();
        if device != Device::Cpu {
            let bytes = std::mem::size_of_val(&host[..]);
            let mut data = std::ptr::null_mut();
            // SAFETY: the function's own signature.
            let f: extern "C" fn(*mut *mut c_void, usize) -> c_int =
                unsafe { std::mem::transmute(runtime(b"_Z10cudaMallocPPvm\0")) };
            assert_eq!(f(&mut data, bytes.max(1)), 0);
            copy(data, at as *const c_void, bytes);
            at = data as *mut T;
        }
        Self { host, at, device }
    }
    fn get(&mut self) -> Vec<T> {
        if self.device != Device::Cpu {
            let bytes = std::mem::size_of_val(&self.host[..]);
            copy(self.host.as_mut_ptr() as *mut c_void, self.at as *const c_void, bytes);
        }
        self.host.clone()
    }
    fn view(&self, shape: [usize; 4]) -> TensorRef<'_, T> {
        assert_eq!(self.host.len(), shape.iter().product());
        // SAFETY: the whole memory, borrowed while the view lives.
        unsafe { TensorRef::from_raw_parts(self.at, shape, strides(shape), self.device) }
    }
    fn view_mut(&mut self, shape: [usize; 4]) -> TensorMut<'_, T> {
        assert_eq!(self.host.len(), shape.iter().product());
        // SAFETY: the whole memory, borrowed alone while the view lives.
        unsafe { TensorMut::from_raw_parts(self.at, shape, strides(shape), self.device) }
    }
}

impl Memory<i64> {
    fn indices(&self) -> Indices<'_> {
        // SAFETY: the whole memory, borrowed while the view lives.
        unsafe { Indices::from_raw_parts(self.at, self.host.len(), self.device) }
    }
}

fn strides([_, t, h, d]: [usize; 4]) -> [i64; 3] {
    [(t * h * d) as i64, (h * d) as i64, d as i64]
}

fn workspace(bytes: u64, device: Device) -> Workspace {
    if device == Device::Cpu {
        return Workspace::new();
    }
    let memory = Memory::new(vec![0u8; bytes as usize], device);
    // SAFETY: allocated for this workspace alone, with cudaMalloc's alignment of 256.
    unsafe { Workspace::from_raw_parts(memory.at as *mut c_void, bytes, device) }
}

struct Pool {
    s: Memory<f32>,
    z: Memory<f32>,
    count: usize,
}

impl Pool {
    fn zeros(plan: &Plan<f32>, count: usize) -> Self {
        let state = State::<f32>::zeros(plan, count).unwrap();
        let on = |x: &[f32]| Memory::new(x.to_vec(), plan.device());
        Self { s: on(state.s()), z: on(state.z()), count }
    }
    fn view(&self, plan: &Plan<f32>) -> StateRef<'_, f32> {
        // SAFETY: the whole memory, borrowed while the view lives.
        unsafe { StateRef::from_raw_parts(plan, self.s.at, self.z.at, self.count) }.unwrap()
    }
    fn view_mut(&mut self, plan: &Plan<f32>) -> StateMut<'_, f32> {
        // SAFETY: the whole memory, borrowed alone while the view lives.
        unsafe { StateMut::from_raw_parts(plan, self.s.at, self.z.at, self.count) }.unwrap()
    }
}

const B: usize = 2;
const T: usize = 40;
const H: usize = 2; // kv heads, two query heads each
const D: usize = 16;

fn plan(device: Device, tokens: usize) -> Plan<f32> {
    let builder = Plan::<f32>::builder().batch(B).seq_len(tokens).heads(2 * H, H).head_dim(D);
    builder.use_state().device(device).build().unwrap()
}

/// Every call of the library, in the order of a training step and of a generation: what came out of each.
fn run(device: Device) -> Vec<(&'static str, Vec<f32>)> {
    let mut results = Vec::new();
    let mut random = Random::new(11);
    let mut draw = |n: usize| random.vec(n).iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let on = |x: Vec<f32>| Memory::new(x, device);
    let empty = |n: usize| Memory::new(vec![f32::NAN; n], device);
    let (queries, keys) = ([B, T, 2 * H, D], [B, T, H, D]);
    let (nq, nk) = (B * T * 2 * H * D, B * T * H * D);
    let (q_host, k_host, v_host) = (draw(nq), draw(nk), draw(nk));
    let gates = draw(B * T * H).iter().map(|x| -0.05 * x.abs()).collect::<Vec<f32>>();
    let (q, k, v, log_g, d_y) = (on(q_host.clone()), on(k_host.clone()), on(v_host.clone()), on(gates), on(draw(nq)));
    let (whole, half, one) = (plan(device, T), plan(device, T / 2), plan(device, 1));
    assert_eq!(whole.device(), device);
    let info = whole.info();
    let largest = [info.workspace_forward, info.workspace_backward, info.workspace_backward_saved]
        .into_iter()
        .chain([info.workspace_summary, one.info().workspace_step, half.info().workspace_summary])
        .max();
    let (mut work, mut saved) = (workspace(largest.unwrap(), device), workspace(info.saved_bytes, device));
    let stream = Stream::default();

    let forward = Forward::new(q.view(queries), k.view(keys), v.view(keys)).log_g(log_g.view([B, T, H, 1]));
    let (mut y, mut norm, mut last) = (empty(nq), empty(B * T * 2 * H), Pool::zeros(&whole, B));
    let out = ForwardOut::new(y.view_mut(queries))
        .row_norm(norm.view_mut([B, T, 2 * H, 1]))
        .final_state(last.view_mut(&whole))
        .saved(&mut saved);
    whole.forward_with(&forward, out, &mut work, stream).unwrap();
    results.extend([("y", y.get()), ("row_norm", norm.get()), ("final S", last.s.get()), ("final z", last.z.get())]);

    let (mut dq, mut dk, mut dv, mut dg) = (empty(nq), empty(nk), empty(nk), empty(B * T * H));
    let incoming = Backward {
        forward,
        y: Some(y.view(queries)),
        row_norm: Some(norm.view([B, T, 2 * H, 1])),
        d_y: d_y.view(queries),
        d_final_state: None,
        saved: Some(&mut saved),
    };
    let gradients = BackwardOut {
        d_q: dq.view_mut(queries),
        d_k: dk.view_mut(keys),
        d_v: dv.view_mut(keys),
        d_log_g: Some(dg.view_mut([B, T, H, 1])),
        d_initial_state: None,
    };
    whole.backward_with(incoming, gradients, &mut work, stream).unwrap();
    results.extend([("d_q", dq.get()), ("d_k", dk.get()), ("d_v", dv.get()), ("d_log_g", dg.get())]);

    // Summaries of the two halves of the tokens, without gates, folded; then packed, read back, swapped.
    let pool = Pool::zeros(&whole, 2 * B);
    let per = (pool.s.host.len() / 2, pool.z.host.len() / 2);
    for m in 0..2 {
        let part =
            |x: &[f32]| on((0..B).flat_map(|b| x[(b * T + m * T / 2) * H * D..][..T / 2 * H * D].to_vec()).collect());
        let (k, v) = (part(&k_host), part(&v_host));
        // SAFETY: the segment's share of the pool, which nothing else borrows.
        let segment =
            unsafe { StateMut::from_raw_parts(&half, pool.s.at.add(m * per.0), pool.z.at.add(m * per.1), B).unwrap() };
        let keys = [B, T / 2, H, D];
        let (k, v) = (k.view(keys), v.view(keys));
        let input = Summary { k, v, log_g: None, cu_seqlens: None, rope_offset: None };
        half.summary(&input, segment, None, &mut work, stream).unwrap();
    }
    let (mut folded, mut total) = (Pool::zeros(&whole, B), empty(B * H));
    let totals = on(vec![-0.5, -0.25, 0.0, -1.0, -0.125, -2.0, -0.75, 0.0]);
    let segments = Segments { states: pool.view(&whole), log_g: Some(totals.view([2, B, H, 1])), reversed: true };
    whole.compose_into(&segments, folded.view_mut(&whole), Some(total.view_mut([B, H, 1, 1])), stream).unwrap();
    results.extend([("folded S", folded.s.get()), ("folded z", folded.z.get()), ("total_log_g", total.get())]);
    let packed = whole.pack(folded.view(&whole), stream).unwrap();
    let mut host = State::<f32>::zeros(&whole, B).unwrap();
    host.read_bytes(&packed).unwrap();
    assert!(host.s() == folded.s.get() && host.z() == folded.z.get());
    let mut again = Pool::zeros(&whole, B);
    whole.unpack(&packed, again.view_mut(&whole), stream).unwrap();
    assert!(host.s() == again.s.get() && host.z() == again.z.get());
    let (from, to) = (Memory::new(vec![1i64, 0], device), Memory::new(vec![0i64, 1], device));
    whole.convert(folded.view(&whole), again.view_mut(&whole), from.indices(), to.indices(), stream).unwrap();
    let (n, swapped) = (host.s().len() / B, again.s.get());
    assert!(swapped[..n] == host.s()[n..] && swapped[n..] == host.s()[..n]);

    // One token more, in slots the other way round.
    let token = |x: &[f32], h: usize| on((0..B).flat_map(|b| x[b * T * h * D..][..h * D].to_vec()).collect());
    let (q, k, v) = (token(&q_host, 2 * H), token(&k_host, H), token(&v_host, H));
    let mut y = empty(B * 2 * H * D);
    let step = Step::new(q.view([B, 1, 2 * H, D]), k.view([B, 1, H, D]), v.view([B, 1, H, D])).slots(from.indices());
    one.step_with(&step, again.view_mut(&one), y.view_mut([B, 1, 2 * H, D]), &mut work, stream).unwrap();
    results.extend([("y of the step", y.get()), ("S after it", again.s.get()), ("z after it", again.z.get())]);
    results
}

#[test]
fn the_device_gives_the_results_of_the_processor() {
    assert_eq!(device_count(GPU).unwrap(), 1, "no emulated device: scripts/rust.sh says how this test is run");
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    for ((name, host), (_, device)) in run(Device::Cpu).iter().zip(&run(GPU)) {
        let error = difference(&wide(device), &wide(host));
        assert!(error < 1e-4, "{name} differs by {error}");
    }
}

#[test]
fn a_device_plan_takes_no_host_memory() {
    let plan = plan(GPU, 4);
    let (qs, ks) = ([B, 4, 2 * H, D], [B, 4, H, D]);
    let (q, k) = (vec![1.0f32; B * 4 * 2 * H * D], vec![1.0f32; B * 4 * H * D]);
    let mut y_host = q.clone();
    let mut y = Memory::new(q.clone(), GPU);
    let host = |x| TensorRef::new(x, ks).unwrap();
    let host = Forward::new(TensorRef::new(&q, qs).unwrap(), host(&k), host(&k));
    let (q, k) = (Memory::new(q.clone(), GPU), Memory::new(k.clone(), GPU));
    let there = Forward::new(q.view(qs), k.view(ks), k.view(ks));
    let (mut work, stream) = (workspace(plan.info().workspace_forward, GPU), Stream::default());
    let on_cpu = |result: Result<(), powerattn::Error>| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("is on Cpu; the plan is for Cuda(0)"), "{error}");
    };
    on_cpu(plan.forward_with(&host, ForwardOut::new(y.view_mut(qs)), &mut work, stream));
    on_cpu(plan.forward_with(&there, ForwardOut::new(TensorMut::new(&mut y_host, qs).unwrap()), &mut work, stream));
    let mut state = State::<f32>::zeros(&plan, B).unwrap();
    on_cpu(plan.forward_with(&there, ForwardOut::new(y.view_mut(qs)).final_state(state.as_mut()), &mut work, stream));
    on_cpu(plan.pack(state.as_ref(), stream).map(drop));
    on_cpu(plan.forward_with(&there.rope_offset(&[0, 0]), ForwardOut::new(y.view_mut(qs)), &mut work, stream));
    assert!(plan.info().workspace_summary > 0);
    let input = Summary { k: k.view(ks), v: k.view(ks), log_g: None, cu_seqlens: None, rope_offset: None };
    let mut pool = Pool::zeros(&plan, B);
    on_cpu(plan.summary(&input, pool.view_mut(&plan), None, &mut Workspace::new(), stream));
    let error = plan.forward(&there, ForwardOut::new(y.view_mut(qs))).unwrap_err();
    assert!(error.to_string().contains("forward_with"), "{error}");
    plan.forward_with(&there, ForwardOut::new(y.view_mut(qs)), &mut work, stream).unwrap();
    assert!(y.get().iter().all(|y| (y - 1.0).abs() < 1e-5));
    // A device that is not there.
    let error = Plan::<f32>::builder().head_dim(4).device(Device::Cuda(7)).build().unwrap_err();
    assert_eq!(error.status(), Status::NoDevice, "{error}");
}
