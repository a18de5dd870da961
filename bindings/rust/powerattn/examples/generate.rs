// SPDX-License-Identifier: Apache-2.0
//! Text from a saved state: one power attention state memorises a paragraph (a context of eight bytes is a key, the byte
//! that follows its value) and recites it; half-way the state is saved, loaded again, and the text goes on.
//!
//! usage: cargo run --release --example generate [FILE]
use powerattn::{Plan, State, Step, Stream, Summary, TensorMut, TensorRef, Workspace};
use std::time::Instant;

const CONTEXT: usize = 8;
const D: usize = 128;
const VALUES: usize = 256;

/// A random vector for the last bytes, the same each time: keys of different contexts are nearly orthogonal, and the
/// square of a small inner product is smaller still, so the state recalls each of them.
fn key(history: &[u8]) -> Vec<f32> {
    let context = &history[history.len() - CONTEXT..];
    let mut seed = context.iter().fold(0, |seed: u64, &byte| (seed ^ byte as u64).wrapping_mul(0x0100_0000_01B3));
    let splitmix = || {
        seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = (seed ^ (seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(splitmix).take(D).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let text = match std::env::args().nth(1) {
        Some(file) => std::fs::read(file)?,
        None => include_bytes!("generate.rs").to_vec(),
    };
    let text = &text[..text.len().min(400)];
    let n = text.len().checked_sub(CONTEXT).filter(|&n| n > 0).ok_or("the text is too short")?;
    let keys: Vec<f32> = (0..n).flat_map(|i| key(&text[i..i + CONTEXT])).collect();
    let mut values = vec![0.0f32; n * VALUES];
    (0..n).for_each(|i| values[i * VALUES + text[i + CONTEXT] as usize] = 1.0);

    // Reading: the state of all contexts, without outputs.
    let read = Plan::<f32>::builder().seq_len(n).heads(1, 1).head_dim(D).value_dim(VALUES).use_state().build()?;
    let mut workspace = Workspace::new();
    let mut state = State::<f32>::zeros(&read, 1)?;
    let input = Summary {
        k: TensorRef::new(&keys, [1, n, 1, D])?,
        v: TensorRef::new(&values, [1, n, 1, VALUES])?,
        log_g: None,
        cu_seqlens: None,
        rope_offset: None,
    };
    read.summary(&input, state.as_mut(), None, &mut workspace, Stream::default())?;
    println!("state: {} x {VALUES} numbers for {n} contexts", state.rows());

    // Writing: a step with a key and a value of zero leaves the state as it is.
    let write = Plan::<f32>::builder().heads(1, 1).head_dim(D).value_dim(VALUES).use_state().build()?;
    let (zero_key, zero_value, mut y) = (vec![0.0; D], vec![0.0; VALUES], vec![0.0f32; VALUES]);
    let mut history = text[..CONTEXT].to_vec();
    let path = std::env::temp_dir().join(format!("powerattn-{}.state", std::process::id()));
    let start = Instant::now();
    for i in 0..n {
        if i == n / 2 {
            state.save(&path)?;
            state = State::zeros(&write, 1)?;
            state.load(&path)?;
            println!("resumed from {} bytes", std::fs::metadata(&path)?.len());
            std::fs::remove_file(&path)?;
        }
        let q = key(&history);
        let tokens = Step::new(
            TensorRef::new(&q, [1, 1, 1, D])?,
            TensorRef::new(&zero_key, [1, 1, 1, D])?,
            TensorRef::new(&zero_value, [1, 1, 1, VALUES])?,
        );
        let out = TensorMut::new(&mut y, [1, 1, 1, VALUES])?;
        write.step_with(&tokens, state.as_mut(), out, &mut workspace, Stream::default())?;
        let best = (0..VALUES).max_by(|&a, &b| y[a].total_cmp(&y[b])).unwrap_or(0);
        history.push(best as u8);
    }
    println!("{:.0} us per byte", start.elapsed().as_secs_f64() * 1e6 / n as f64);
    println!("{}", String::from_utf8_lossy(&history));
    let right = history.iter().zip(text).filter(|(a, b)| a == b).count();
    println!("{right} of {} bytes recited", text.len());
    Ok(())
}
