// SPDX-License-Identifier: Apache-2.0
//! What is refused, by whom and how.
use powerattn::{
    device_count, state_bytes, state_monomial, state_rows, version, Device, Error, Form, Forward, ForwardOut, Plan,
    State, Status, Step, TensorMut, TensorRef,
};

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
fn plans_are_shared_between_threads() {
    fn send_sync<T: Send + Sync>() {}
    send_sync::<Plan<f32>>();
    send_sync::<State<f32>>();
    send_sync::<TensorRef<'static, f32>>();
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
