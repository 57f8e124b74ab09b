//! Operations of gated delta-net layers beside matmul: a short causal convolution, and the
//! recurrence itself.
//!
//! The recurrence updates a `[head_dim, columns]` part of a head's state in two passes over its
//! rows. The first computes what the state says about the key, the second writes the state and
//! reads it with the query:
//!
//! ```text
//! change[c] = beta * (value[c] - decay * sum over i of key[i] * state[i, c])
//! state[i, c] = decay * state[i, c] + key[i] * change[c]
//! out[c] = sum over i of query[i] * state[i, c]
//! ```
//!
//! Kimi delta attention (arXiv 2510.26692) has a decay per key channel, `decay[i]`, in its place.

use super::Kernels;
use super::ops::{exp, fma};

/// Most taps of a convolution.
pub const MAX_CONV_TAPS: usize = 16;

/// Most columns of a state that are updated together: with a few of these, the sums of a column
/// stay in registers.
const MAX_COLUMNS: usize = 32;

/// Returns how many columns of a head's state are stored and updated together: the largest divisor
/// of the head dimension that [`Kernels::delta_step`] takes.
pub fn delta_columns(head_dim: usize) -> usize {
    (1..=MAX_COLUMNS.min(head_dim))
        .rev()
        .find(|c| head_dim.is_multiple_of(*c))
        .unwrap_or(1)
}

/// One token's update of some columns of a head's state.
#[derive(Debug, Clone, Copy)]
pub struct DeltaStep<'a> {
    /// Query, `[head_dim]`.
    pub query: &'a [f32],
    /// Key, `[head_dim]`.
    pub key: &'a [f32],
    /// Value at those columns, `[columns]`.
    pub value: &'a [f32],
    /// Factor on the old state.
    pub decay: f32,
    /// Strength of the update.
    pub beta: f32,
}

/// One token's update of some columns of a head's state whose rows decay each by itself.
#[derive(Debug, Clone, Copy)]
pub struct ChannelDeltaStep<'a> {
    /// Query, `[head_dim]`.
    pub query: &'a [f32],
    /// Key, `[head_dim]`.
    pub key: &'a [f32],
    /// Value at those columns, `[columns]`.
    pub value: &'a [f32],
    /// Factor on each row of the old state, `[head_dim]`.
    pub decay: &'a [f32],
    /// Strength of the update.
    pub beta: f32,
}

impl Kernels {
    /// Computes `state' = decay * state + beta * key (value - decay * key^T state)^T`, then
    /// `out = query^T state'`.
    ///
    /// `state` is `[head_dim, columns]` and `out` is `[columns]`; columns don't depend on each
    /// other.
    ///
    /// # Panics
    /// When the lengths don't fit, or there are more columns than [`delta_columns`] can return.
    #[inline]
    pub fn delta_step(self, state: &mut [f32], step: &DeltaStep<'_>, out: &mut [f32]) {
        let columns = out.len();
        assert!(
            (1..=MAX_COLUMNS).contains(&columns) && step.value.len() == columns,
            "columns of a delta step"
        );
        assert!(
            step.query.len() == step.key.len(),
            "widths of query and key"
        );
        assert_eq!(
            state.len(),
            step.key.len() * columns,
            "size of a delta state"
        );
        dispatch!(self, delta_step(state: &mut [f32], step: &DeltaStep<'_>, out: &mut [f32]))
    }

    /// Computes `old = diag(decay) state`, `state' = old + beta * key (value - key^T old)^T`, then
    /// `out = query^T state'`.
    ///
    /// `state` is `[head_dim, columns]` and `out` is `[columns]`; columns don't depend on each
    /// other.
    ///
    /// # Panics
    /// When the lengths don't fit, or there are more columns than [`delta_columns`] can return.
    #[inline]
    pub fn channel_delta_step(
        self,
        state: &mut [f32],
        step: &ChannelDeltaStep<'_>,
        out: &mut [f32],
    ) {
        let columns = out.len();
        assert!(
            (1..=MAX_COLUMNS).contains(&columns) && step.value.len() == columns,
            "columns of a delta step"
        );
        assert!(
            step.query.len() == step.key.len() && step.decay.len() == step.key.len(),
            "widths of query, key and decay"
        );
        assert_eq!(
            state.len(),
            step.key.len() * columns,
            "size of a delta state"
        );
        dispatch!(
            self,
            channel_delta_step(state: &mut [f32], step: &ChannelDeltaStep<'_>, out: &mut [f32])
        )
    }

    /// Computes `out[c] = silu(sum over j of weight[c, j] * rows[j][c])`; `rows` are consecutive
    /// tokens, the oldest first.
    ///
    /// # Panics
    /// When the lengths don't fit, or there are no rows or more than [`MAX_CONV_TAPS`].
    #[inline]
    pub fn conv_silu(self, rows: &[&[f32]], weight: &[f32], out: &mut [f32]) {
        assert!(
            (1..=MAX_CONV_TAPS).contains(&rows.len()),
            "taps of a convolution"
        );
        assert!(
            rows.iter().all(|r| r.len() == out.len()),
            "channels of a convolution"
        );
        assert_eq!(
            weight.len(),
            rows.len() * out.len(),
            "size of a convolution's weights"
        );
        dispatch!(self, conv_silu(rows: &[&[f32]], weight: &[f32], out: &mut [f32]))
    }
}

#[inline(always)]
fn delta_step<const FUSED: bool>(state: &mut [f32], step: &DeltaStep<'_>, out: &mut [f32]) {
    // The common widths are constants for the compiler.
    match out.len() {
        32 => columns::<FUSED>(32, state, step, out),
        16 => columns::<FUSED>(16, state, step, out),
        n => columns::<FUSED>(n, state, step, out),
    }
}

#[inline(always)]
fn columns<const FUSED: bool>(n: usize, state: &mut [f32], step: &DeltaStep<'_>, out: &mut [f32]) {
    let mut change = [0.0f32; MAX_COLUMNS];
    for (row, k) in state.chunks_exact(n).zip(step.key) {
        for c in 0..n {
            change[c] = fma::<FUSED>(*k, row[c], change[c]);
        }
    }
    for (change, v) in change.iter_mut().zip(step.value) {
        *change = step.beta * fma::<FUSED>(-step.decay, *change, *v);
    }
    let mut sums = [0.0f32; MAX_COLUMNS];
    for ((row, k), q) in state.chunks_exact_mut(n).zip(step.key).zip(step.query) {
        for c in 0..n {
            row[c] = fma::<FUSED>(*k, change[c], step.decay * row[c]);
            sums[c] = fma::<FUSED>(*q, row[c], sums[c]);
        }
    }
    out.copy_from_slice(&sums[..n]);
}

#[inline(always)]
fn channel_delta_step<const FUSED: bool>(
    state: &mut [f32],
    step: &ChannelDeltaStep<'_>,
    out: &mut [f32],
) {
    match out.len() {
        32 => channel_columns::<FUSED>(32, state, step, out),
        16 => channel_columns::<FUSED>(16, state, step, out),
        n => channel_columns::<FUSED>(n, state, step, out),
    }
}

#[inline(always)]
fn channel_columns<const FUSED: bool>(
    n: usize,
    state: &mut [f32],
    step: &ChannelDeltaStep<'_>,
    out: &mut [f32],
) {
    let mut change = [0.0f32; MAX_COLUMNS];
    for ((row, k), decay) in state.chunks_exact(n).zip(step.key).zip(step.decay) {
        let k = k * decay;
        for c in 0..n {
            change[c] = fma::<FUSED>(k, row[c], change[c]);
        }
    }
    for (change, v) in change.iter_mut().zip(step.value) {
        *change = step.beta * (v - *change);
    }
    let mut sums = [0.0f32; MAX_COLUMNS];
    let inputs = step.key.iter().zip(step.query).zip(step.decay);
    for (row, ((k, q), decay)) in state.chunks_exact_mut(n).zip(inputs) {
        for c in 0..n {
            row[c] = fma::<FUSED>(*k, change[c], decay * row[c]);
            sums[c] = fma::<FUSED>(*q, row[c], sums[c]);
        }
    }
    out.copy_from_slice(&sums[..n]);
}

#[inline(always)]
fn conv_silu<const FUSED: bool>(rows: &[&[f32]], weight: &[f32], out: &mut [f32]) {
    if let ([a, b, c, d], (weight, [])) = (rows, weight.as_chunks::<4>()) {
        let inputs = a.iter().zip(*b).zip(c.iter().zip(*d));
        for ((out, w), ((a, b), (c, d))) in out.iter_mut().zip(weight).zip(inputs) {
            let sum = fma::<FUSED>(
                w[3],
                *d,
                fma::<FUSED>(w[2], *c, fma::<FUSED>(w[1], *b, w[0] * a)),
            );
            *out = silu::<FUSED>(sum);
        }
        return;
    }
    for (channel, (out, weight)) in out
        .iter_mut()
        .zip(weight.chunks_exact(rows.len()))
        .enumerate()
    {
        let mut sum = 0.0;
        for (w, row) in weight.iter().zip(rows) {
            sum = fma::<FUSED>(*w, row[channel], sum);
        }
        *out = silu::<FUSED>(sum);
    }
}

#[inline(always)]
fn silu<const FUSED: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FUSED>(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as f32 / u32::MAX as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn columns_divide_the_head() {
        for (head_dim, expected) in [
            (128, 32),
            (64, 32),
            (16, 16),
            (24, 24),
            (48, 24),
            (37, 1),
            (1, 1),
            (100, 25),
        ] {
            assert_eq!(delta_columns(head_dim), expected, "{head_dim}");
        }
    }

    #[test]
    fn a_step_is_the_formula_on_every_instruction_set() {
        for kernels in Kernels::available() {
            for (dim, columns) in [(128, 32), (16, 16), (7, 7), (5, 1), (40, 20)] {
                let (q, k, v) = (numbers(dim, 1), numbers(dim, 2), numbers(columns, 3));
                let old = numbers(dim * columns, 4);
                let (decay, beta) = (0.8, 0.6);
                let mut state = old.clone();
                let mut out = vec![f32::NAN; columns];
                let step = DeltaStep {
                    query: &q,
                    key: &k,
                    value: &v,
                    decay,
                    beta,
                };
                kernels.delta_step(&mut state, &step, &mut out);
                for c in 0..columns {
                    let at = |i: usize| f64::from(decay) * f64::from(old[i * columns + c]);
                    let seen: f64 = (0..dim).map(|i| f64::from(k[i]) * at(i)).sum();
                    let change = f64::from(beta) * (f64::from(v[c]) - seen);
                    let mut sum = 0.0;
                    for i in 0..dim {
                        let new = at(i) + f64::from(k[i]) * change;
                        assert!(
                            (f64::from(state[i * columns + c]) - new).abs() < 1e-5,
                            "{kernels:?} {dim} {i} {c}"
                        );
                        sum += f64::from(q[i]) * new;
                    }
                    assert!(
                        (f64::from(out[c]) - sum).abs() < 1e-5,
                        "{kernels:?} {dim} {c}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_step_with_a_decay_per_channel_is_the_formula_on_every_instruction_set() {
        for kernels in Kernels::available() {
            for (dim, columns) in [(128, 32), (16, 16), (7, 7), (5, 1), (40, 20)] {
                let (q, k, v) = (numbers(dim, 1), numbers(dim, 2), numbers(columns, 3));
                let old = numbers(dim * columns, 4);
                let decay: Vec<f32> = numbers(dim, 5).iter().map(|x| x + 0.5).collect();
                let beta = 0.6;
                let mut state = old.clone();
                let mut out = vec![f32::NAN; columns];
                let step = ChannelDeltaStep {
                    query: &q,
                    key: &k,
                    value: &v,
                    decay: &decay,
                    beta,
                };
                kernels.channel_delta_step(&mut state, &step, &mut out);
                for c in 0..columns {
                    let at = |i: usize| f64::from(decay[i]) * f64::from(old[i * columns + c]);
                    let seen: f64 = (0..dim).map(|i| f64::from(k[i]) * at(i)).sum();
                    let change = f64::from(beta) * (f64::from(v[c]) - seen);
                    let mut sum = 0.0;
                    for i in 0..dim {
                        let new = at(i) + f64::from(k[i]) * change;
                        assert!(
                            (f64::from(state[i * columns + c]) - new).abs() < 1e-5,
                            "{kernels:?} {dim} {i} {c}"
                        );
                        sum += f64::from(q[i]) * new;
                    }
                    assert!(
                        (f64::from(out[c]) - sum).abs() < 1e-5,
                        "{kernels:?} {dim} {c}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_convolution_is_the_formula_on_every_instruction_set() {
        for kernels in Kernels::available() {
            for (taps, channels) in [(4, 128), (4, 5), (1, 16), (3, 33), (16, 8)] {
                let rows: Vec<Vec<f32>> = (0..taps)
                    .map(|j| numbers(channels, 10 + j as u32))
                    .collect();
                let weight = numbers(channels * taps, 9);
                let rows: Vec<&[f32]> = rows.iter().map(|r| r.as_slice()).collect();
                let mut out = vec![f32::NAN; channels];
                kernels.conv_silu(&rows, &weight, &mut out);
                for c in 0..channels {
                    let x: f64 = (0..taps)
                        .map(|j| f64::from(weight[c * taps + j]) * f64::from(rows[j][c]))
                        .sum();
                    assert!(
                        (f64::from(out[c]) - x / (1.0 + (-x).exp())).abs() < 1e-6,
                        "{kernels:?} {taps} {c}"
                    );
                }
            }
        }
    }
}
