// SPDX-License-Identifier: Apache-2.0
//! What the wrapper adds to a call: the same smallest step through the safe API and through the raw one.
use criterion::{black_box, criterion_group, criterion_main, Criterion};
use powerattn::{Plan, State, Step, Stream, TensorMut, TensorRef, Workspace};
use powerattn_sys as sys;

fn overhead(c: &mut Criterion) {
    let plan = Plan::<f32>::builder().batch(1).heads(1, 1).head_dim(2).use_state().num_threads(1).build().unwrap();
    let mut state = State::<f32>::zeros(&plan, 1).unwrap();
    let x = [0.5f32, -0.25];
    let mut y = [0.0f32; 2];
    let mut workspace = Workspace::new();
    c.bench_function("step, safe", |b| {
        b.iter(|| {
            let t = TensorRef::new(black_box(&x), [1, 1, 1, 2]).unwrap();
            let y = TensorMut::new(&mut y, [1, 1, 1, 2]).unwrap();
            plan.step_with(&Step::new(t, t, t), state.as_mut(), y, &mut workspace, Stream::default()).unwrap();
        })
    });
    unsafe {
        let mut desc: sys::powerattn_desc = std::mem::zeroed();
        desc.struct_size = std::mem::size_of::<sys::powerattn_desc>() as u32;
        desc.dtype = sys::POWERATTN_FLOAT32 as i32;
        desc.degree = 2;
        desc.flags = sys::POWERATTN_USE_STATE as i32;
        (desc.batch, desc.seq_len, desc.heads_q, desc.heads_kv, desc.head_dim, desc.num_threads) = (1, 1, 1, 1, 2, 1);
        let mut raw = std::ptr::null_mut();
        assert_eq!(sys::powerattn_plan_create(&desc, &mut raw), 0);
        let (mut s, mut z) = ([0.0f32; 6], [0.0f32; 3]);
        let mut memory = vec![0u8; plan.info().workspace_step as usize + 512];
        c.bench_function("step, raw", |b| {
            b.iter(|| {
                let tensor = |data: *const f32| sys::powerattn_tensor {
                    data: data as *mut _,
                    stride_b: 2,
                    stride_t: 2,
                    stride_h: 2,
                };
                let mut args: sys::powerattn_step_args = std::mem::zeroed();
                args.struct_size = std::mem::size_of::<sys::powerattn_step_args>() as u32;
                args.q = tensor(black_box(x.as_ptr()));
                args.k = args.q;
                args.v = args.q;
                args.y = tensor(y.as_mut_ptr());
                args.state = sys::powerattn_state {
                    s: s.as_mut_ptr() as *mut _,
                    z: z.as_mut_ptr() as *mut _,
                    s_stride_n: 6,
                    s_stride_h: 6,
                    z_stride_n: 3,
                    z_stride_h: 3,
                };
                args.num_slots = 1;
                args.workspace = memory.as_mut_ptr().add(memory.as_ptr().align_offset(256)) as *mut _;
                args.workspace_bytes = plan.info().workspace_step;
                assert_eq!(sys::powerattn_step(raw, &args), 0);
            })
        });
        sys::powerattn_plan_destroy(raw);
    }
}

criterion_group!(benches, overhead);
criterion_main!(benches);
