// SPDX-License-Identifier: Apache-2.0
//! Property tests against the float64 definition, and the properties that need no oracle.
mod common;

use common::{difference, oracle, Random, Shape};
use powerattn::{
    Backward, BackwardOut, Compose, Form, Forward, ForwardOut, Plan, State, Step, Stream, Summary, TensorMut,
    TensorRef, Workspace,
};
use proptest::prelude::*;

struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    log_g: Vec<f64>,
}

fn inputs(s: Shape, seed: u64) -> Inputs {
    let mut random = Random::new(seed);
    Inputs {
        q: random.vec(s.b * s.t * s.hq * s.d),
        k: random.vec(s.b * s.t * s.hkv * s.d),
        v: random.vec(s.b * s.t * s.hkv * s.e),
        log_g: (0..s.b * s.t * s.hkv).map(|_| -0.2 * random.next()).collect(),
    }
}

fn plan(s: Shape, degree: i32) -> powerattn::PlanBuilder<f64, f64> {
    Plan::<f64>::builder().batch(s.b).seq_len(s.t).heads(s.hq, s.hkv).head_dim(s.d).value_dim(s.e).degree(degree)
}

fn tensor(x: &[f64], s: Shape, h: usize, d: usize) -> TensorRef<'_, f64> {
    TensorRef::new(x, [s.b, s.t, h, d]).unwrap()
}

fn forward(s: Shape, x: &Inputs, degree: i32, form: Form) -> Vec<f64> {
    let plan = plan(s, degree).form(form).build().unwrap();
    let mut y = vec![f64::NAN; s.b * s.t * s.hq * s.e];
    let input = Forward::new(tensor(&x.q, s, s.hq, s.d), tensor(&x.k, s, s.hkv, s.d), tensor(&x.v, s, s.hkv, s.e))
        .log_g(TensorRef::rows(&x.log_g, [s.b, s.t, s.hkv]).unwrap());
    plan.forward(&input, ForwardOut::new(TensorMut::new(&mut y, [s.b, s.t, s.hq, s.e]).unwrap())).unwrap();
    y
}

fn shapes() -> impl Strategy<Value = Shape> {
    (1usize..3, 1usize..70, 1usize..3, 1usize..4, 1usize..20, 1usize..20).prop_map(|(b, t, hkv, group, d, e)| Shape {
        b,
        t,
        hq: hkv * group,
        hkv,
        d,
        e,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn forward_is_the_definition(s in shapes(), seed in any::<u64>(), half_degree in 1i32..3) {
        let x = inputs(s, seed);
        let expected = oracle(&x.q, &x.k, &x.v, Some(&x.log_g), s, 2 * half_degree);
        for form in [Form::Attention, Form::Chunked] {
            prop_assert!(difference(&forward(s, &x, 2 * half_degree, form), &expected) < 1e-9);
        }
    }

    #[test]
    fn steps_and_segments_are_the_whole_pass(s in shapes(), seed in any::<u64>(), cut in 0.0f64..1.0) {
        let s = Shape { b: 1, ..s };
        let x = inputs(s, seed);
        let whole = forward(s, &x, 2, Form::Auto);
        let cut = ((s.t as f64 * cut) as usize).min(s.t);
        // The first part as a summary, the rest token by token.
        let part = plan(Shape { t: cut, ..s }, 2).use_state().build().unwrap();
        let mut state = State::<f64>::zeros(&part, 1).unwrap();
        let (mut work, gates) = (Workspace::new(), s.hkv);
        let head = |x: &'_ [f64], h: usize, d: usize| -> Vec<f64> { x[..cut * h * d].to_vec() };
        let (k, v, g) = (head(&x.k, s.hkv, s.d), head(&x.v, s.hkv, s.e), head(&x.log_g, s.hkv, 1));
        let mut total = vec![0.0; gates];
        part.summary(
            &Summary {
                k: TensorRef::new(&k, [1, cut, s.hkv, s.d]).unwrap(),
                v: TensorRef::new(&v, [1, cut, s.hkv, s.e]).unwrap(),
                log_g: Some(TensorRef::rows(&g, [1, cut, s.hkv]).unwrap()),
                cu_seqlens: None,
                rope_offset: None,
            },
            state.as_mut(),
            Some(TensorMut::new(&mut total, [1, s.hkv, 1, 1]).unwrap()),
            &mut work,
            Stream::default(),
        ).unwrap();
        let (folded, total2) = part.compose(&Compose { segments: &[(&state, &total)] }).unwrap();
        prop_assert_eq!(&folded, &state);
        prop_assert_eq!(&total2, &total);
        let one = plan(Shape { t: 1, ..s }, 2).use_state().build().unwrap();
        for i in cut..s.t {
            let row = |x: &'_ [f64], n: usize| -> Vec<f64> { x[i * n..(i + 1) * n].to_vec() };
            let (q, k) = (row(&x.q, s.hq * s.d), row(&x.k, s.hkv * s.d));
            let (v, g) = (row(&x.v, s.hkv * s.e), row(&x.log_g, s.hkv));
            let mut y = vec![f64::NAN; s.hq * s.e];
            one.step(
                &Step::new(
                    TensorRef::new(&q, [1, 1, s.hq, s.d]).unwrap(),
                    TensorRef::new(&k, [1, 1, s.hkv, s.d]).unwrap(),
                    TensorRef::new(&v, [1, 1, s.hkv, s.e]).unwrap(),
                ).log_g(TensorRef::rows(&g, [1, 1, s.hkv]).unwrap()),
                state.as_mut(),
                TensorMut::new(&mut y, [1, 1, s.hq, s.e]).unwrap(),
            ).unwrap();
            prop_assert!(difference(&y, &whole[i * s.hq * s.e..(i + 1) * s.hq * s.e]) < 1e-7);
        }
    }

    #[test]
    fn gradients_are_directional_derivatives(s in shapes(), seed in any::<u64>()) {
        let s = Shape { t: s.t.min(24), d: s.d.max(2), ..s };
        let x = inputs(s, seed);
        let mut random = Random::new(seed ^ 77);
        let n = s.b * s.t * s.hq * s.e;
        let d_y = random.vec(n);
        let plan = plan(s, 2).build().unwrap();
        let (mut y, mut norm) = (vec![0.0; n], vec![0.0; s.b * s.t * s.hq]);
        let input = Forward::new(tensor(&x.q, s, s.hq, s.d), tensor(&x.k, s, s.hkv, s.d), tensor(&x.v, s, s.hkv, s.e))
            .log_g(TensorRef::rows(&x.log_g, [s.b, s.t, s.hkv]).unwrap());
        plan.forward(&input, ForwardOut::new(TensorMut::new(&mut y, [s.b, s.t, s.hq, s.e]).unwrap())
            .row_norm(TensorMut::rows(&mut norm, [s.b, s.t, s.hq]).unwrap())).unwrap();
        let mut d = Inputs { q: x.q.clone(), k: x.k.clone(), v: x.v.clone(), log_g: x.log_g.clone() };
        plan.backward(
            Backward {
                forward: input,
                y: Some(tensor(&y, s, s.hq, s.e)),
                row_norm: Some(TensorRef::rows(&norm, [s.b, s.t, s.hq]).unwrap()),
                d_y: tensor(&d_y, s, s.hq, s.e),
                d_final_state: None,
                saved: None,
            },
            BackwardOut {
                d_q: TensorMut::new(&mut d.q, [s.b, s.t, s.hq, s.d]).unwrap(),
                d_k: TensorMut::new(&mut d.k, [s.b, s.t, s.hkv, s.d]).unwrap(),
                d_v: TensorMut::new(&mut d.v, [s.b, s.t, s.hkv, s.e]).unwrap(),
                d_log_g: Some(TensorMut::rows(&mut d.log_g, [s.b, s.t, s.hkv]).unwrap()),
                d_initial_state: None,
            },
        ).unwrap();
        // v enters linearly: its derivative is exact whatever the step. Queries may sit at a small denominator,
        // where central differences are poor, so the comparison is with the oracle's own difference quotient.
        let dir = random.vec(x.v.len());
        let moved: Vec<f64> = x.v.iter().zip(&dir).map(|(v, r)| v + r).collect();
        let y2 = oracle(&x.q, &x.k, &moved, Some(&x.log_g), s, 2);
        let y1 = oracle(&x.q, &x.k, &x.v, Some(&x.log_g), s, 2);
        let numeric: f64 = y2.iter().zip(&y1).zip(&d_y).map(|((a, b), c)| (a - b) * c).sum();
        let exact: f64 = d.v.iter().zip(&dir).map(|(a, b)| a * b).sum();
        prop_assert!((numeric - exact).abs() <= 1e-8 * (1.0 + numeric.abs()));
        // y does not change when a query is scaled: its gradient is orthogonal to it.
        for i in 0..s.b * s.t * s.hq {
            let (q, dq) = (&x.q[i * s.d..][..s.d], &d.q[i * s.d..][..s.d]);
            let dot: f64 = q.iter().zip(dq).map(|(a, b)| a * b).sum();
            let size: f64 = q.iter().zip(dq).map(|(a, b)| (a * b).abs()).sum();
            prop_assert!(dot.abs() <= 1e-6 * (1.0 + size));
        }
    }

    #[test]
    fn states_survive_their_bytes(heads in 1usize..3, d in 1usize..9, e in 1usize..9, count in 0usize..4, seed in any::<u64>()) {
        let plan = Plan::<f32>::builder().batch(1).heads(heads, heads).head_dim(d).value_dim(e).use_state().build().unwrap();
        let mut state = State::<f32>::zeros(&plan, count).unwrap();
        let mut random = Random::new(seed);
        let (s, z) = state.parts_mut();
        s.iter_mut().chain(z).for_each(|x| *x = random.normal() as f32);
        let mut again = State::<f32>::zeros(&plan, count).unwrap();
        let bytes = state.to_bytes().unwrap();
        again.read_bytes(&bytes).unwrap();
        prop_assert_eq!(&again, &state);
        // Any cut or flipped header byte is refused and leaves the state as it was.
        let cut = bytes.len() * (seed % 97) as usize / 97;
        if cut < bytes.len() {
            prop_assert!(again.read_bytes(&bytes[..cut]).is_err());
        }
        prop_assert_eq!(&again, &state);
    }
}
