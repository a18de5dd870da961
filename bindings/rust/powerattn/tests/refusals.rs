// SPDX-License-Identifier: Apache-2.0
//! What is refused, by whom and how.
use powerattn::{
    device_count, state_bytes, state_monomial, state_rows, version, Backward, BackwardOut, Device, Error, Form,
    Forward, ForwardOut, Indices, Plan, Segments, State, StateMut, StateRef, Status, Step, Stream, Summary, TensorMut,
    TensorRef, Workspace,
};
use std::process::Command;

fn small() -> powerattn::PlanBuilder<f32, f32> {
    Plan::<f32>::builder().batch(1).seq_len(4).heads(2, 1).head_dim(4)
}

#[test]
fn the_library_refuses_with_its_message() {
    let error = small().degree(3).build().unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert!(error.to_string().contains("degree"), "{error}");
    for builder in [
        small().degree(0),
        small().degree(9),
        small().head_dim(0),
        small().head_dim(257),
        small().heads(3, 2),
        small().heads(0, 1),
        small().eps(-1.0),
        small().eps(f64::NAN),
        small().scale(f64::INFINITY),
        small().num_threads(-1),
        small().batch(1 << 40).seq_len(1 << 40),
        small().sequences(2).batch(2),
    ] {
        let error = builder.clone().build().unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{builder:?}: {error}");
        assert!(matches!(error, Error::Library { ref message, .. } if !message.is_empty()));
    }
    assert_eq!(small().seq_len(usize::MAX).build().unwrap_err().status(), Status::InvalidArgument);
    let big = small().degree(6).head_dim(64).form(Form::Chunked).build().unwrap_err();
    assert_eq!(big.status(), Status::StateTooLarge, "{big}");
    if device_count(Device::Cuda(0)).unwrap() == 0 {
        let none = small().device(Device::Cuda(0)).build().unwrap_err();
        assert!(matches!(none.status(), Status::NoDevice | Status::Unsupported), "{none}");
    }
}

#[test]
fn slices_must_hold_their_shapes() {
    let x = vec![0.0f32; 32];
    assert!(TensorRef::new(&x, [1, 4, 2, 4]).is_ok());
    assert!(TensorRef::new(&x, [1, 4, 2, 5]).is_err());
    assert!(TensorRef::new(&x, [usize::MAX, 2, 2, 2]).is_err());
    assert!(TensorRef::with_strides(&x, [1, 4, 2, 4], [0, 8, 4]).is_ok());
    assert!(TensorRef::with_strides(&x, [1, 4, 2, 4], [0, 9, 4]).is_err());
    assert!(TensorRef::with_strides(&x, [3, 1, 1, 4], [usize::MAX, 0, 0]).is_err());
    assert!(TensorRef::with_strides(&x[..0], [0, 4, 2, 4], [usize::MAX, 0, 0]).is_err() == (usize::BITS == 64));
    assert!(TensorRef::with_strides(&x, [7, 4, 2, 4], [0, 8, 4]).is_ok(), "a stride of 0 broadcasts");
}

#[test]
fn shapes_are_compared_with_the_plan() {
    let plan = small().build().unwrap();
    let (q, k) = (vec![1.0f32; 32], vec![1.0f32; 16]);
    let mut y = vec![7.0f32; 32];
    let good = Forward::new(
        TensorRef::new(&q, [1, 4, 2, 4]).unwrap(),
        TensorRef::new(&k, [1, 4, 1, 4]).unwrap(),
        TensorRef::new(&k, [1, 4, 1, 4]).unwrap(),
    );
    let wrong = Forward { k: TensorRef::new(&k, [1, 2, 2, 4]).unwrap(), ..good };
    let error = plan.forward(&wrong, ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap())).unwrap_err();
    assert!(error.to_string().starts_with("k:"), "{error}");
    assert!(plan
        .forward(&good.cu_seqlens(&[0, 4]), ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap()))
        .is_err());
    // Overlapping output rows are the library's to refuse.
    let overlap = TensorMut::with_strides(&mut y, [1, 4, 2, 4], [0, 1, 4]).unwrap();
    assert_eq!(plan.forward(&good, ForwardOut::new(overlap)).unwrap_err().status(), Status::InvalidArgument);
    assert!(y.iter().all(|&y| y == 7.0), "outputs are untouched");
    plan.forward(&good, ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap())).unwrap();
    assert!(y.iter().all(|&y| (y - 1.0).abs() < 1e-6));
    // A state without use_state.
    let stateful = small().use_state().build().unwrap();
    let mut state = State::<f32>::zeros(&stateful, 1).unwrap();
    let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap()).final_state(state.as_mut());
    assert_eq!(plan.forward(&good, out).unwrap_err().status(), Status::InvalidArgument);
}

#[test]
fn packed_lengths_and_slots_are_checked() {
    let plan = small().heads(1, 1).sequences(2).build().unwrap();
    let x = vec![1.0f32; 16];
    let mut y = vec![7.0f32; 16];
    let t = TensorRef::new(&x, [1, 4, 1, 4]).unwrap();
    for bad in [[0i64, 3, 2], [1, 2, 3], [0, 2, 5], [0, -1, 4]] {
        let input = Forward::new(t, t, t).cu_seqlens(&bad);
        let error = plan.forward(&input, ForwardOut::new(TensorMut::new(&mut y, [1, 4, 1, 4]).unwrap())).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{bad:?}: {error}");
    }
    assert!(plan
        .forward(&Forward::new(t, t, t), ForwardOut::new(TensorMut::new(&mut y, [1, 4, 1, 4]).unwrap()))
        .is_err());
    assert!(y.iter().all(|&y| y == 7.0));
    let step = Plan::<f32>::builder().batch(2).heads(1, 1).head_dim(4).use_state().build().unwrap();
    let mut state = State::<f32>::zeros(&step, 2).unwrap();
    let t = TensorRef::new(&x[..8], [2, 1, 1, 4]).unwrap();
    for bad in [[0i64, 2], [1, 1]] {
        let input = Step::new(t, t, t).slots(&bad);
        let y = TensorMut::new(&mut y[..8], [2, 1, 1, 4]).unwrap();
        assert_eq!(step.step(&input, state.as_mut(), y).unwrap_err().status(), Status::InvalidArgument);
    }
    let mut one = State::<f32>::zeros(&step, 1).unwrap();
    let y = TensorMut::new(&mut y[..8], [2, 1, 1, 4]).unwrap();
    assert!(step.step(&Step::new(t, t, t), one.as_mut(), y).is_err(), "two sequences need two states or slots");
    assert!(state.s().iter().all(|&s| s == 0.0));
}

#[test]
fn states_of_other_sizes_are_refused() {
    let plan = small().use_state().build().unwrap();
    let state = State::<f32>::zeros(&plan, 2).unwrap();
    let bytes = state.to_bytes().unwrap();
    let other = small().head_dim(5).use_state().build().unwrap();
    let mut wrong = State::<f32>::zeros(&other, 2).unwrap();
    assert!(wrong.read_bytes(&bytes).is_err());
    assert!(wrong.copy_from(&state, &[0], &[0]).is_err());
    let mut version = bytes.clone();
    version[8] ^= 1;
    let mut same = State::<f32>::zeros(&plan, 2).unwrap();
    assert_eq!(same.read_bytes(&version).unwrap_err().status(), Status::Version);
    assert!(same.copy_from(&state, &[0, 1], &[0]).is_err());
    assert!(same.copy_from(&state, &[0, 5], &[0, 1]).is_err());
    assert!(same.copy_from(&state, &[1, -1], &[0, 1]).is_ok());
}

#[test]
fn sizes_that_fit_nowhere_can_be_printed() {
    assert_eq!(state_rows(64, 2).unwrap(), 2080);
    assert_eq!(state_bytes::<f32>(64, 64, 2, 144).unwrap(), 4 * 144 * 2080 * 65);
    assert!(state_bytes::<f32>(64, 64, 6, 144).unwrap() > 4_000_000_000_000);
    assert!(state_bytes::<f64>(256, 256, 8, usize::MAX >> 1).is_err());
    assert_eq!(state_monomial(3, 2, 1).unwrap(), (vec![0, 1], 2f64.sqrt()));
    assert!(state_monomial(3, 2, 6).is_err());
    assert!(state_monomial(3, -1, 0).is_err());
    assert!(state_monomial(3, 100, 0).is_err());
    assert_eq!(version().0, 0);
    assert_eq!(device_count(Device::Cpu).unwrap(), 1);
    assert!(small().build().unwrap().describe().unwrap().contains('\n'));
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    // 700 TB: the plan is only described, so its state cannot be held by any machine of today.
    let plan = small().head_dim(64).degree(4).build().unwrap();
    let error = State::<f32>::zeros(&plan, 1 << 22).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { bytes } if bytes > 1 << 49), "{error}");
    assert_eq!(error.status(), Status::OutOfMemory);
    assert!(matches!(State::<f32>::zeros(&plan, usize::MAX / 8), Err(Error::Shape { .. })));
}

#[test]
fn states_in_the_callers_memory() {
    let plan = small().use_state().build().unwrap(); // one kv head, D = 10, e = 4
    let (mut s, mut z) = (vec![0.5f32; 2 * 45], vec![0.5f32; 2 * 12]);
    assert!(StateRef::new(&plan, &s[..80], &z[..20], 2).is_ok());
    assert!(StateRef::new(&plan, &s[..79], &z[..20], 2).is_err());
    assert!(StateRef::new(&plan, &s[..80], &z[..19], 2).is_err());
    assert!(StateRef::new(&plan, &s, &z, usize::MAX / 4).is_err());
    assert!(StateRef::with_strides(&plan, &s, &z, 2, [50, 40], [12, 10]).is_ok());
    assert!(StateRef::with_strides(&plan, &s, &z, 2, [51, 40], [12, 10]).is_err());
    assert!(StateRef::with_strides(&plan, &s, &z, 2, [usize::MAX, 0], [12, 10]).is_err());
    // With gaps: what lies between the states is not touched.
    let state = State::<f32>::zeros(&plan, 2).unwrap();
    let gaps = StateMut::with_strides(&plan, &mut s, &mut z, 2, [45, 40], [12, 10]).unwrap();
    plan.convert(state.as_ref(), gaps, &[0, 1], &[1, 0], Stream::default()).unwrap();
    assert!(s[..40].iter().chain(&s[45..85]).chain(&z[..10]).chain(&z[12..22]).all(|&x| x == 0.0));
    assert!(s[40..45].iter().chain(&s[85..]).chain(&z[10..12]).chain(&z[22..]).all(|&x| x == 0.5));
    // States that overlap are the library's to refuse.
    let overlap = StateMut::with_strides(&plan, &mut s, &mut z, 2, [39, 40], [12, 10]).unwrap();
    let error = plan.convert(state.as_ref(), overlap, &[0, 1], &[1, 0], Stream::default()).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument, "{error}");
}

#[test]
fn a_state_is_carried_in_place() {
    let plan = small().use_state().build().unwrap();
    let (q, k) = ([1.0f32, -0.5].repeat(16), [0.25f32, 1.0].repeat(8));
    let qt = TensorRef::new(&q, [1, 4, 2, 4]).unwrap();
    let kt = TensorRef::new(&k, [1, 4, 1, 4]).unwrap();
    let input = Forward::new(qt, kt, kt);
    let run = |state: &mut State<f32>, in_place: bool| {
        let before = state.clone();
        let mut y = vec![0.0f32; 32];
        let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap());
        if in_place {
            plan.forward(&input, out.state_in_place(state.as_mut())).unwrap();
        } else {
            plan.forward(&input.initial_state(before.as_ref()), out.final_state(state.as_mut())).unwrap();
        }
        y
    };
    let (mut a, mut b) = (State::<f32>::zeros(&plan, 1).unwrap(), State::<f32>::zeros(&plan, 1).unwrap());
    for _ in 0..3 {
        assert_eq!(run(&mut a, true), run(&mut b, false));
        assert_eq!(a, b);
    }
    assert!(a.z()[0] > 0.0);
    let mut y = vec![0.0f32; 32];
    let before = b.clone();
    let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap()).state_in_place(a.as_mut());
    assert!(plan.forward(&input.initial_state(before.as_ref()), out).is_err(), "two initial states");
}

#[test]
fn segments_fold_both_ways() {
    let plan = small().use_state().build().unwrap();
    let (segments, heads, rows, e) = (3, 1, 10, 4);
    let mut pool = State::<f32>::zeros(&plan, segments).unwrap();
    let (s, z) = pool.parts_mut();
    s.iter_mut().enumerate().for_each(|(i, x)| *x = 1.0 + (i / (rows * e)) as f32);
    z.iter_mut().enumerate().for_each(|(i, x)| *x = 1.0 + (i / rows) as f32);
    let log_g = [-1.0f32, -2.0, -3.0];
    for (reversed, order) in [(false, [0, 1, 2]), (true, [2, 1, 0])] {
        let mut out = State::<f32>::zeros(&plan, 1).unwrap();
        let mut total = [0.0f32];
        let input = Segments {
            states: pool.as_ref(),
            log_g: Some(TensorRef::new(&log_g, [segments, 1, heads, 1]).unwrap()),
            reversed,
        };
        let l = TensorMut::new(&mut total, [1, heads, 1, 1]).unwrap();
        plan.compose_into(&input, out.as_mut(), Some(l), Stream::default()).unwrap();
        let expected = order.iter().fold(0.0, |sum, &m: &usize| sum * log_g[m].exp() + 1.0 + m as f32);
        assert!(out.s().iter().chain(out.z()).all(|&x| (x - expected).abs() < 1e-6), "{reversed} {expected}");
        assert_eq!(total, [-6.0]);
    }
    let wrong =
        Segments { states: pool.as_ref(), log_g: Some(TensorRef::new(&log_g, [1, 3, 1, 1]).unwrap()), reversed: false };
    let mut out = State::<f32>::zeros(&plan, 1).unwrap();
    assert!(plan.compose_into(&wrong, out.as_mut(), None, Stream::default()).is_err());
}

#[test]
fn states_pack_with_other_numbers() {
    let plan = small().use_state().build().unwrap();
    let mut state = State::<f32>::zeros(&plan, 2).unwrap();
    state.parts_mut().0.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
    let (whole, half) = (state.to_bytes().unwrap(), state.to_bytes_as::<half::bf16>().unwrap());
    assert_eq!(whole.len() - 64, 2 * (half.len() - 64));
    let mut again = State::<f32>::zeros(&plan, 2).unwrap();
    again.read_bytes(&half).unwrap();
    assert_eq!(again.s()[5], 5.0);
    // Through the plan, as for states of a device, and through a file.
    assert_eq!(plan.pack(state.as_ref(), Stream::default()).unwrap(), whole);
    plan.unpack(&whole, again.as_mut(), Stream::default()).unwrap();
    assert_eq!(again, state);
    let path = std::env::temp_dir().join(format!("powerattn-test-{}.state", std::process::id()));
    state.save(&path).unwrap();
    again.load(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let error = again.load(&path).unwrap_err();
    assert!(matches!(error, Error::File { kind: std::io::ErrorKind::NotFound, .. }), "{error}");
    assert!(state.save(path.join("in/no/folder")).is_err());
}

#[test]
fn a_plan_takes_memory_of_its_own_device_only() {
    let plan = small().use_state().build().unwrap();
    let device = Device::Cuda(0);
    let here = [0.0f32; 32];
    let host = TensorRef::new(&here, [1, 4, 2, 4]).unwrap();
    let kv = TensorRef::new(&here[..16], [1, 4, 1, 4]).unwrap();
    let mut y = [0.0f32; 32];
    // SAFETY (of all): refused by their device before anything follows the pointers.
    let foreign = unsafe { TensorRef::from_raw_parts(256 as *const f32, [1, 4, 2, 4], [32, 8, 4], device) };
    let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap());
    let error = plan.forward(&Forward::new(foreign, kv, kv), out).unwrap_err();
    assert!(error.to_string().contains("Cuda(0)"), "{error}");
    let mut work = unsafe { Workspace::from_raw_parts(256 as *mut _, 1 << 20, device) };
    let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap());
    let refused = plan.forward_with(&Forward::new(host, kv, kv), out, &mut work, Stream::default());
    assert!(plan.info().workspace_forward == 0 || refused.is_err());
    let offsets = unsafe { Indices::from_raw_parts(256 as *const i64, 1, device) };
    let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap());
    assert!(plan.forward(&Forward::new(host, kv, kv).rope_offset(offsets), out).is_err());
    // A stream has no place in a call on the CPU.
    let stream = unsafe { Stream::from_raw(256 as *mut _) };
    let out = ForwardOut::new(TensorMut::new(&mut y, [1, 4, 2, 4]).unwrap());
    let error = plan.forward_with(&Forward::new(host, kv, kv), out, &mut Workspace::new(), stream).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
}

#[test]
fn unnormalised_needs_no_row_norm() {
    let plan = small().degree(3).unnormalized().use_state().build().unwrap();
    let x = [0.5f32; 32];
    let (q, k) = (TensorRef::new(&x, [1, 4, 2, 4]).unwrap(), TensorRef::new(&x[..16], [1, 4, 1, 4]).unwrap());
    let input = Forward::new(q, k, k);
    let (mut dq, mut dk, mut dv) = ([f32::NAN; 32], [f32::NAN; 16], [f32::NAN; 16]);
    plan.backward(
        Backward { forward: input, y: None, row_norm: None, d_y: q, d_final_state: None, saved: None },
        BackwardOut {
            d_q: TensorMut::new(&mut dq, [1, 4, 2, 4]).unwrap(),
            d_k: TensorMut::new(&mut dk, [1, 4, 1, 4]).unwrap(),
            d_v: TensorMut::new(&mut dv, [1, 4, 1, 4]).unwrap(),
            d_log_g: None,
            d_initial_state: None,
        },
    )
    .unwrap();
    assert!(dq.iter().chain(&dk).chain(&dv).all(|x| x.is_finite()));
    // Normalised, it does.
    let plan = small().build().unwrap();
    let error = plan
        .backward(
            Backward { forward: input, y: None, row_norm: None, d_y: q, d_final_state: None, saved: None },
            BackwardOut {
                d_q: TensorMut::new(&mut dq, [1, 4, 2, 4]).unwrap(),
                d_k: TensorMut::new(&mut dk, [1, 4, 1, 4]).unwrap(),
                d_v: TensorMut::new(&mut dv, [1, 4, 1, 4]).unwrap(),
                d_log_g: None,
                d_initial_state: None,
            },
        )
        .unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument, "{error}");
    let mut total = [0.0f32; 4];
    let stateful = small().heads(2, 2).use_state().build().unwrap();
    let mut state = State::<f32>::zeros(&stateful, 1).unwrap();
    let summary = Summary { k: q, v: q, log_g: None, cu_seqlens: None, rope_offset: None };
    let gaps = TensorMut::with_strides(&mut total, [1, 2, 1, 1], [4, 2, 1]).unwrap();
    let error = stateful.summary(&summary, state.as_mut(), Some(gaps), &mut Workspace::new(), Stream::default());
    assert!(error.unwrap_err().to_string().contains("contiguous"));
}

/// The library is missing, or another one is found, in a process of its own: this test program, run again.
#[test]
fn a_library_that_is_not_the_one_of_the_crate() {
    if std::env::var_os("POWERATTN_TEST_CHILD").is_some() {
        println!("child: {}", small().build().map(|_| ()).unwrap_err());
        return;
    }
    let child = |name: &str, value: &std::ffi::OsStr| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["a_library_that_is_not_the_one_of_the_crate", "--exact", "--nocapture"]);
        let output = command.env("POWERATTN_TEST_CHILD", "1").env(name, value).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    if !cfg!(target_os = "linux") || cfg!(feature = "static") {
        return; // LD_PRELOAD and LD_LIBRARY_PATH are what this test turns
    }
    let folder = std::env::temp_dir().join(format!("powerattn-version-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (source, library) = (folder.join("other.c"), folder.join("other.so"));
    std::fs::write(&source, "unsigned powerattn_version(void) { return 10200; }").unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
    assert!(built.success());
    let (_, text) = child("LD_PRELOAD", library.as_os_str());
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(text.contains("libpowerattn is version 1.2.0; this crate needs 0.1 (Version)"), "{text}");
    let (success, text) = child("LD_LIBRARY_PATH", "/nowhere".as_ref());
    if !success {
        // Linked against a folder that only LD_LIBRARY_PATH names: the loader says which library it is.
        assert!(text.contains("libpowerattn.so.0"), "{text}");
    }
}

#[test]
fn plans_are_shared_between_threads() {
    fn send_sync<T: Send + Sync>() {}
    fn send<T: Send>() {}
    send_sync::<Plan<f32>>();
    send_sync::<State<f32>>();
    send_sync::<TensorRef<'static, f32>>();
    send_sync::<TensorMut<'static, half::bf16>>();
    send_sync::<StateRef<'static, f32>>();
    send_sync::<StateMut<'static, f64>>();
    send_sync::<Indices<'static>>();
    send_sync::<Stream>();
    send_sync::<Error>();
    send::<Workspace>(); // and not Sync: src/borrowing.rs
    let plan = Plan::<f32>::builder().batch(1).seq_len(200).heads(2, 2).head_dim(16).build().unwrap();
    let x: Vec<f32> = (0..200 * 32).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    let run = || {
        let mut y = vec![0.0f32; x.len()];
        let t = TensorRef::new(&x, [1, 200, 2, 16]).unwrap();
        plan.forward(&Forward::new(t, t, t), ForwardOut::new(TensorMut::new(&mut y, [1, 200, 2, 16]).unwrap()))
            .unwrap();
        y
    };
    let expected = run();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| (0..8).map(|_| run()).collect::<Vec<_>>())).collect();
        for worker in workers {
            assert!(worker.join().unwrap().iter().all(|y| *y == expected));
        }
    });
}

#[test]
fn each_thread_reads_its_own_message() {
    std::thread::scope(|scope| {
        for n in 0..4 {
            scope.spawn(move || {
                for i in 0..200 {
                    let dim = 1000 * (n + 1) + i;
                    let error = small().head_dim(dim).build().unwrap_err().to_string();
                    assert!(error.contains(&dim.to_string()), "thread {n}: {error}");
                }
            });
        }
    });
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_views_keep_their_strides() {
    use ndarray::Array4;
    let x = Array4::from_shape_fn((1, 2, 9, 4), |(_, h, t, i)| (h * 7 + t * 3 + i) as f32 / 10.0 - 1.0); // [b, h, t, d]
    let view = x.view().permuted_axes([0, 2, 1, 3]);
    let t = TensorRef::try_from(view).unwrap();
    assert_eq!(t.shape(), [1, 9, 2, 4]);
    let plan = Plan::<f32>::builder().batch(1).seq_len(9).heads(2, 2).head_dim(4).build().unwrap();
    let mut y = Array4::<f32>::zeros((1, 2, 9, 4));
    let out = TensorMut::try_from(y.view_mut().permuted_axes([0, 2, 1, 3])).unwrap();
    plan.forward(&Forward::new(t, t, t), ForwardOut::new(out)).unwrap();
    let plain = x.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().to_owned();
    let p = TensorRef::try_from(plain.view()).unwrap();
    let mut y2 = vec![0.0; 72];
    plan.forward(&Forward::new(p, p, p), ForwardOut::new(TensorMut::new(&mut y2, [1, 9, 2, 4]).unwrap())).unwrap();
    assert!(y.view().permuted_axes([0, 2, 1, 3]).iter().zip(&y2).all(|(a, b)| a == b));
    let last = x.view().permuted_axes([0, 2, 3, 1]);
    assert!(TensorRef::try_from(last).is_err(), "the last dimension must be contiguous");
}
