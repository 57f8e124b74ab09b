//! Hyper-connections: what is read of several residual streams, and what is written back.

use super::Check;
use super::small::same_quants;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    GatedValues, Injected, Quants, StreamGates, StreamRows, StreamWeights, StreamsOut,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::{BankConnection, GatedConnection, Linear, Sinkhorn};
use tier_plan_kernels::random::Random;

/// Tolerance of a value, relative to the largest: sums have another order.
const TOLERANCE: f64 = 1e-5;

const EPS: f32 = 1e-5;

const ROWS: usize = 3;

pub(super) fn checks() -> Vec<Check> {
    let gated = [
        (4, Some(20), 96),
        (2, None, 160),
        (8, Some(1), 36),
        (5, Some(3), 300),
    ];
    let gated = gated.map(|(n, rounds, width)| {
        let how = rounds.map_or("".into(), |rounds| format!(", mixed in {rounds} rounds"));
        let name = format!("streams, {n} of {width}{how}");
        Check::new(name, move |ops, random| {
            let streams = Streams::new(random, n, width);
            read_gated(ops, random, &streams, rounds)
        })
    });
    let others = [
        Check::new("streams, a bank", bank),
        Check::new("streams, a weight per value", low_rank),
        Check::new("streams, their mean, and all from one", mean),
    ];
    gated.into_iter().chain(others).collect()
}

/// Rows of streams.
struct Streams {
    n: usize,
    width: usize,
    /// `[ROWS, n, width]`.
    x: Vec<f32>,
    norm: Vec<f32>,
    /// Results of a block, `[ROWS, width]`.
    result: Vec<f32>,
}

impl Streams {
    fn new(random: &mut Random, n: usize, width: usize) -> Self {
        Self {
            n,
            width,
            x: random.floats(ROWS * n * width),
            norm: random.floats(width),
            result: random.floats(ROWS * width),
        }
    }

    fn stream(&self, row: usize, stream: usize) -> &[f32] {
        &self.x[(row * self.n + stream) * self.width..][..self.width]
    }

    /// Returns the sum of a row's streams by their shares, under the norm.
    fn read(&self, row: usize, shares: &[f64]) -> Vec<f64> {
        let mut sum = vec![0.0; self.width];
        for (stream, share) in shares.iter().enumerate() {
            let values = sum.iter_mut().zip(self.stream(row, stream));
            values.for_each(|(sum, v)| *sum += share * f64::from(*v));
        }
        let squares: f64 = sum.iter().map(|v| v * v).sum();
        let factor = 1.0 / (squares / self.width as f64 + f64::from(EPS)).sqrt();
        let normed = sum.iter().zip(&self.norm);
        normed.map(|(v, w)| v * factor * f64::from(*w)).collect()
    }

    /// Reads streams on a device, and compares with the shares of each row, and with the result of
    /// quantizing afterwards.
    fn compare(
        &self,
        ops: &Ops,
        shares: &[Vec<f64>],
        read: impl FnOnce(StreamRows<'_>, StreamsOut<'_, '_>) -> Result<(), CudaError>,
    ) -> Result<Outcome, CudaError> {
        let device = ops.device();
        let (x, norm) = (
            Buffer::of_f32(device, &self.x)?,
            Buffer::of_f32(device, &self.norm)?,
        );
        let values = ROWS * self.width;
        let out = Buffer::new_f32(device, values)?;
        let quantized = self.width.is_multiple_of(32);
        let quants = || Quants::new(device, values.next_multiple_of(32));
        let (mut fused, mut after) = (quants()?, quants()?);
        let to = StreamsOut {
            norm: norm.view(),
            eps: EPS,
            out: out.view(),
            quants: quantized.then_some(&mut fused),
        };
        read(self.rows(&x), to)?;
        let mut outcome = Outcome::default();
        if quantized {
            ops.quantize(out.view(), ROWS, self.width, &mut after)?;
            outcome.merge(same_quants(&fused, &after)?);
        }
        let expected = shares.iter().enumerate();
        let expected: Vec<f64> = expected.flat_map(|(row, s)| self.read(row, s)).collect();
        outcome.compare(&out.view().to_f32()?, near(&expected));
        Ok(outcome)
    }

    fn rows<'a>(&self, x: &'a Buffer) -> StreamRows<'a> {
        StreamRows {
            x: x.view(),
            rows: ROWS,
            n: self.n,
            width: self.width,
        }
    }
}

fn near(expected: &[f64]) -> impl Iterator<Item = Expected> + '_ {
    let most = expected.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
    expected.iter().map(move |value| Expected {
        value: *value,
        allowed: TOLERANCE * most,
    })
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Makes a matrix nearly doubly stochastic, as the specification says.
fn balanced(mut mix: Vec<f64>, n: usize, rounds: usize, epsilon: f64) -> Vec<f64> {
    for row in mix.chunks_exact_mut(n) {
        let sum: f64 = row.iter().map(|v| v.exp()).sum();
        row.iter_mut().for_each(|v| *v = v.exp() / sum + epsilon);
    }
    for round in 0..rounds {
        if round > 0 {
            for row in mix.chunks_exact_mut(n) {
                let sum: f64 = row.iter().sum::<f64>() + epsilon;
                row.iter_mut().for_each(|v| *v /= sum);
            }
        }
        for to in 0..n {
            let sum: f64 = (0..n).map(|from| mix[from * n + to]).sum::<f64>() + epsilon;
            (0..n).for_each(|from| mix[from * n + to] /= sum);
        }
    }
    mix
}

fn read_gated(
    ops: &Ops,
    random: &mut Random,
    streams: &Streams,
    rounds: Option<usize>,
) -> Result<Outcome, CudaError> {
    let (n, width, device) = (streams.n, streams.width, ops.device());
    let n_gates = 2 * n + rounds.map_or(0, |_| n * n);
    let spec = GatedConnection {
        gates: Linear {
            weight: 0,
            bias: None,
            n_out: n_gates,
            n_in: n * width,
            first_row: 0,
        },
        base: 0,
        scale: 0,
        epsilon: 1e-3,
        post_scale: 2.0,
        post_offset: 0.125,
        sinkhorn: rounds.map(|rounds| Sinkhorn { rounds }),
    };
    let (gates, base) = (random.floats(ROWS * n_gates), random.floats(n_gates));
    let scale = [0.5, -1.5, 2.0];
    // By row: `pre`, `post`, and the logits of the matrix.
    let gate = |row: usize, i: usize| {
        let kind = scale[(i / n).min(2)];
        f64::from(gates[row * n_gates + i]) * f64::from(kind) + f64::from(base[i])
    };
    let epsilon = f64::from(spec.epsilon);
    let shares: Vec<Vec<f64>> = (0..ROWS)
        .map(|row| (0..n).map(|i| sigmoid(gate(row, i)) + epsilon).collect())
        .collect();
    let on_device = [
        Buffer::of_f32(device, &gates)?,
        Buffer::of_f32(device, &base)?,
    ];
    let scales = Buffer::of_f32(device, &scale)?;
    let (post, mix) = (
        Buffer::new_f32(device, ROWS * n)?,
        Buffer::new_f32(device, ROWS * n * n)?,
    );
    let back = StreamWeights {
        post: post.view(),
        mix: rounds.map(|_| mix.view()),
    };
    let by = StreamGates {
        spec,
        gates: on_device[0].view(),
        base: on_device[1].view(),
        scale: scales.view(),
        back: Some(back),
    };
    let mut outcome = streams.compare(ops, &shares, |of, to| ops.read_gated(of, &by, to))?;
    let once = StreamGates { back: None, ..by };
    outcome.merge(streams.compare(ops, &shares, |of, to| ops.read_gated(of, &once, to))?);
    let x = Buffer::of_f32(device, &streams.x)?;
    let result = Buffer::of_f32(device, &streams.result)?;
    ops.write_streams(streams.rows(&x), result.view(), back)?;
    let mut expected = Vec::new();
    for row in 0..ROWS {
        let logits: Vec<f64> = (2 * n..n_gates).map(|i| gate(row, i)).collect();
        let mix = rounds.map(|rounds| balanced(logits, n, rounds, epsilon));
        for to in 0..n {
            let post = 2.0 * sigmoid(gate(row, n + to)) + 0.125;
            let kept = |i: usize| match &mix {
                None => f64::from(streams.stream(row, to)[i]),
                Some(mix) => (0..n)
                    .map(|from| mix[from * n + to] * f64::from(streams.stream(row, from)[i]))
                    .sum(),
            };
            let results = &streams.result[row * width..][..width];
            let values = results.iter().enumerate();
            expected.extend(values.map(|(i, f)| kept(i) + post * f64::from(*f)));
        }
    }
    outcome.compare(&x.view().to_f32()?, near(&expected));
    Ok(outcome)
}

fn bank(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let streams = Streams::new(random, 4, 96);
    let score = random.floats(streams.width);
    let on_device = Buffer::of_f32(ops.device(), &score)?;
    let mut outcome = Outcome::default();
    for (n_bank, banks) in [(0, true), (2, true), (3, false)] {
        let bank = BankConnection {
            score: 0,
            n_bank,
            banks,
        };
        let logit = |row: usize, stream: usize| {
            let values = streams.stream(row, stream);
            let squares: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
            let products = values.iter().zip(&score);
            let dot: f64 = products.map(|(v, s)| f64::from(*v) * f64::from(*s)).sum();
            dot / (squares / streams.width as f64 + f64::from(EPS)).sqrt()
        };
        let shares: Vec<Vec<f64>> = (0..ROWS)
            .map(|row| {
                let weights: Vec<f64> = (0..=n_bank).map(|j| logit(row, j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                weights.iter().map(|w| w / sum).collect()
            })
            .collect();
        let read = |of: StreamRows<'_>, to: StreamsOut<'_, '_>| {
            ops.read_bank(of, &bank, on_device.view(), to)
        };
        outcome.merge(streams.compare(ops, &shares, read)?);
        let x = Buffer::of_f32(ops.device(), &streams.x)?;
        let result = Buffer::of_f32(ops.device(), &streams.result)?;
        ops.write_bank(streams.rows(&x), result.view(), &bank)?;
        let mut expected = streams.x.clone();
        let rows = expected.chunks_exact_mut(streams.n * streams.width);
        for (row, result) in rows.zip(streams.result.chunks_exact(streams.width)) {
            let (current, banked) = row.split_at_mut(streams.width);
            if banks {
                banked[n_bank * streams.width..][..streams.width].copy_from_slice(current);
                current.copy_from_slice(result);
            } else {
                current.iter_mut().zip(result).for_each(|(x, f)| *x += f);
            }
        }
        outcome.compare_exact(&x.view().to_f32()?, &expected);
    }
    Ok(outcome)
}

fn low_rank(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (n, width) in [(4, 96), (3, 40)] {
        let (streams, device) = (Streams::new(random, n, width), ops.device());
        let norm = random.floats(n * width);
        let [gates, injected] = [n * width, n].map(|each| random.floats(ROWS * each));
        let on_device = |values: &[f32]| Buffer::of_f32(device, values);
        let (x, weights) = (on_device(&streams.x)?, on_device(&norm)?);
        let normed = Buffer::new_f32(device, streams.x.len())?;
        ops.norm_streams(streams.rows(&x), weights.view(), EPS, normed.view())?;
        let expected: Vec<f64> = (0..ROWS * n)
            .flat_map(|at| {
                let values = streams.stream(at / n, at % n);
                let squares: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
                let factor = 1.0 / (squares / width as f64 + f64::from(EPS)).sqrt();
                let weights = &norm[at % n * width..][..width];
                let values = values.iter().zip(weights);
                values.map(move |(v, w)| f64::from(*v) * factor * f64::from(*w))
            })
            .collect();
        outcome.compare(&normed.view().to_f32()?, near(&expected));
        let (by, products) = (on_device(&gates)?, on_device(&injected)?);
        let (out, post) = (
            Buffer::new_f32(device, ROWS * width)?,
            Buffer::new_f32(device, ROWS * n)?,
        );
        let quantized = width.is_multiple_of(32);
        let quants = || Quants::new(device, (ROWS * width).next_multiple_of(32));
        let (mut fused, mut after) = (quants()?, quants()?);
        let values = GatedValues {
            gates: by.view(),
            back: Some(Injected {
                products: products.view(),
                post: post.view(),
            }),
        };
        let fuses = quantized.then_some(&mut fused);
        ops.read_low_rank(streams.rows(&normed), &values, out.view(), fuses)?;
        if quantized {
            ops.quantize(out.view(), ROWS, width, &mut after)?;
            outcome.merge(same_quants(&fused, &after)?);
        }
        let value = |row: usize, i: usize| {
            let of = |j: usize| (row * n + j) * width + i;
            let values = (0..n).map(|j| expected[of(j)] * sigmoid(f64::from(gates[of(j)])));
            values.sum::<f64>() / n as f64
        };
        let read: Vec<f64> = (0..ROWS * width)
            .map(|at| value(at / width, at % width))
            .collect();
        outcome.compare(&out.view().to_f32()?, near(&read));
        let factors = injected
            .iter()
            .map(|v| 2.0 * sigmoid(f64::from(*v) / n as f64));
        outcome.compare(&post.view().to_f32()?, near(&factors.collect::<Vec<_>>()));
        ops.squash_streams(products.view(), n, ROWS * n)?;
        let squashed = injected.iter().map(|v| f64::from(*v) / n as f64);
        let squashed: Vec<f64> = squashed.map(|v| v * sigmoid(v)).collect();
        outcome.compare(&products.view().to_f32()?, near(&squashed));
    }
    Ok(outcome)
}

fn mean(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let streams = Streams::new(random, 3, 64);
    let shares = vec![vec![1.0 / 3.0; 3]; ROWS];
    let mut outcome = streams.compare(ops, &shares, |of, to| ops.read_mean(of, to))?;
    let x = Buffer::new_f32(ops.device(), streams.x.len())?;
    let from = Buffer::of_f32(ops.device(), &streams.result)?;
    ops.spread(from.view(), streams.rows(&x))?;
    let rows = streams.result.chunks_exact(streams.width);
    let expected: Vec<f32> = rows.flat_map(|row| row.repeat(streams.n)).collect();
    outcome.compare_exact(&x.view().to_f32()?, &expected);
    Ok(outcome)
}
