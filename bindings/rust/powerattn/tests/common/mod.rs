// SPDX-License-Identifier: Apache-2.0
//! Random inputs and the definition in float64, for the integration tests.
#![allow(dead_code)]

/// A small generator: the tests need repeatable numbers, not good ones.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    pub fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.next()).sum::<f64>() - 6.0
    }
    pub fn vec(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.normal()).collect()
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub b: usize,
    pub t: usize,
    pub hq: usize,
    pub hkv: usize,
    pub d: usize,
    pub e: usize,
}

/// y of the definition: sum_j w_ij v_j / sum_j w_ij.
pub fn oracle(q: &[f64], k: &[f64], v: &[f64], log_g: Option<&[f64]>, s: Shape, degree: i32) -> Vec<f64> {
    let scale = 1.0 / (s.d as f64).sqrt();
    let mut y = vec![0.0; s.b * s.t * s.hq * s.e];
    for b in 0..s.b {
        for h in 0..s.hq {
            let g = h / (s.hq / s.hkv);
            let mut total = vec![0.0; s.t + 1];
            for t in 0..s.t {
                total[t + 1] = total[t] + log_g.map_or(0.0, |x| x[(b * s.t + t) * s.hkv + g]);
            }
            for i in 0..s.t {
                let qi = &q[((b * s.t + i) * s.hq + h) * s.d..][..s.d];
                let out = ((b * s.t + i) * s.hq + h) * s.e;
                let mut norm = 0.0;
                for j in 0..=i {
                    let kj = &k[((b * s.t + j) * s.hkv + g) * s.d..][..s.d];
                    let vj = &v[((b * s.t + j) * s.hkv + g) * s.e..][..s.e];
                    let dot: f64 = qi.iter().zip(kj).map(|(x, y)| x * y).sum();
                    let w = (total[i + 1] - total[j + 1]).exp() * (scale * dot).powi(degree);
                    norm += w;
                    for (y, v) in y[out..].iter_mut().zip(vj) {
                        *y += w * v;
                    }
                }
                if norm != 0.0 {
                    y[out..out + s.e].iter_mut().for_each(|y| *y /= norm);
                }
            }
        }
    }
    y
}

pub fn difference(a: &[f64], b: &[f64]) -> f64 {
    let num: f64 = a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum();
    let den: f64 = b.iter().map(|x| x * x).sum();
    (num / den.max(1e-300)).sqrt()
}
