//! Hyper-connections on the CPU: what a block reads of several residual streams, and how its result
//! is written back. The formulas are those of
//! [`Connection`](tier_plan_formats::model::spec::Connection). Rows don't depend on each other.

use super::cpu_context::{CpuContext, add_bias};
use super::weights::DenseWeights;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::{
    BankConnection, Connection, GatedConnection, Linear, LowRankConnection, ModelSpec, Sinkhorn,
    StreamsEnd,
};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, Activations, needs_quants};

thread_local! {
    /// The streams of one row before they are mixed, one buffer per thread.
    static OLD: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Buffers of the connections; they grow to the largest batch of the widest connection.
#[derive(Default)]
pub(crate) struct StreamsScratch {
    /// `[rows, streams * hidden]`: normalized streams.
    normed: Vec<f32>,
    /// `normed` as matrices take it.
    acts: Activations,
    /// `[rows, gates]`, or `[rows, streams]` of what a low-rank connection injects.
    gates: Vec<f32>,
    /// `[rows, rank]`.
    low: Vec<f32>,
    low_acts: Activations,
    /// `[rows, streams * hidden]`: `e^-gate` of every value.
    wide: Vec<f32>,
}

/// With what weights the results of a batch are written back.
#[derive(Default)]
pub(crate) struct WriteBack {
    /// `[batch, streams]`: factor on the result.
    post: Vec<f32>,
    /// `[batch, streams, streams]`: what a stream (first) gives to another; empty where all stay as
    /// they are.
    mix: Vec<f32>,
    /// How a bank takes them, where the streams are one.
    bank: Option<BankConnection>,
}

/// Weights of some rows for writing results back, on their way to another processor.
#[derive(Default)]
pub(crate) struct BackRows {
    /// `[rows, streams]`; empty where a bank needs none.
    pub(crate) post: Vec<f32>,
    /// `[rows, streams, streams]`.
    pub(crate) mix: Option<Vec<f32>>,
}

/// The streams of a model, and what computes with them.
#[derive(Clone, Copy)]
pub(crate) struct Streams<'a> {
    pub(crate) cpu: CpuContext<'a>,
    pub(crate) weights: &'a DenseWeights,
    /// Number of streams.
    pub(crate) n: usize,
    /// Width of one.
    pub(crate) hidden: usize,
    pub(crate) norm_eps: f32,
}

impl<'a> Streams<'a> {
    /// Describes a model's streams; one where it has no more.
    pub(crate) fn new(cpu: CpuContext<'a>, weights: &'a DenseWeights, spec: &ModelSpec) -> Self {
        Self {
            cpu,
            weights,
            n: spec.streams.map_or(1, |streams| streams.n),
            hidden: spec.hidden,
            norm_eps: spec.norm_eps,
        }
    }

    /// Writes what a block reads of rows of streams, `[rows, hidden]`. With `back`, the weights for
    /// the block's result go there, to the rows from the given one on.
    pub(crate) fn read(
        &self,
        connection: &Connection,
        x: &[f32],
        s: &mut StreamsScratch,
        back: Option<(&mut WriteBack, usize)>,
        out: &mut [f32],
    ) {
        match connection {
            Connection::Gated(gated) => {
                self.read_gated(gated, x, s, out);
                if let Some((back, first)) = back {
                    self.keep_gated(gated, &s.gates, first, back);
                }
            }
            Connection::Bank(bank) => {
                self.read_bank(bank, x, out);
                if let Some((back, _)) = back {
                    back.bank = Some(*bank);
                }
            }
            Connection::LowRank(low) => {
                self.read_low_rank(low, x, s, out);
                if let (Some((back, first)), Some(_)) = (back, low.inject) {
                    self.keep_injected(&s.gates, first, back);
                }
            }
        }
    }

    /// Writes the hidden state that the head reads, `[rows, hidden]`, before the output norm.
    pub(crate) fn end(&self, end: &StreamsEnd, x: &[f32], s: &mut StreamsScratch, out: &mut [f32]) {
        match end {
            StreamsEnd::Gated(gated) => self.read_gated(gated, x, s, out),
            StreamsEnd::LowRank(low) => self.read_low_rank(low, x, s, out),
            StreamsEnd::Bank(bank) => self.read_bank(bank, x, out),
            StreamsEnd::Mean => {
                let (n, hidden) = (self.n, self.hidden);
                let mean = |row: usize, out: &mut [f32]| {
                    out.fill(0.0);
                    for stream in x[row * n * hidden..][..n * hidden].chunks_exact(hidden) {
                        self.cpu.kernels.add(out, stream);
                    }
                    out.iter_mut().for_each(|v| *v /= n as f32);
                };
                self.cpu.pool.for_each_slice(out, hidden, mean);
            }
        }
    }

    /// Writes the results of rows of a block, `[rows, hidden]`, back to their streams. `first` is
    /// the number of the first row in the batch.
    pub(crate) fn write(&self, back: &WriteBack, first: usize, result: &[f32], x: &mut [f32]) {
        let (n, kernels) = (self.n, self.cpu.kernels);
        let hidden = self.hidden;
        if let Some(bank) = back.bank {
            return self.write_bank(bank, result, x);
        }
        self.cpu.pool.for_each_slice(x, n * hidden, |row, streams| {
            let result = &result[row * hidden..][..hidden];
            let post = &back.post[(first + row) * n..][..n];
            if back.mix.is_empty() {
                for (post, stream) in post.iter().zip(streams.chunks_exact_mut(hidden)) {
                    kernels.axpy(*post, result, stream);
                }
                return;
            }
            let mix = &back.mix[(first + row) * n * n..][..n * n];
            OLD.with_borrow_mut(|old| {
                old.clear();
                old.extend_from_slice(streams);
                for (to, stream) in streams.chunks_exact_mut(hidden).enumerate() {
                    stream.fill(0.0);
                    for (from, old) in old.chunks_exact(hidden).enumerate() {
                        kernels.axpy(mix[from * n + to], old, stream);
                    }
                    kernels.axpy(post[to], result, stream);
                }
            });
        });
    }

    /// Reads by weights for whole streams. Leaves all weights in `s.gates`, `[rows, gates]`.
    fn read_gated(
        &self,
        gated: &GatedConnection,
        x: &[f32],
        s: &mut StreamsScratch,
        out: &mut [f32],
    ) {
        let (n, hidden, kernels) = (self.n, self.hidden, self.cpu.kernels);
        let (width, n_gates) = (n * hidden, gated.gates.n_out);
        let normed = resized(&mut s.normed, x.len());
        self.cpu.pool.for_each_slice(normed, width, |row, normed| {
            kernels.rms_norm(&x[row * width..][..width], &[], self.norm_eps, normed);
        });
        self.fill(&[&gated.gates], normed, &mut s.acts);
        let gates = resized(&mut s.gates, x.len() / width * n_gates);
        self.product(&gated.gates, s.acts.view(), gates);
        let (base, scale) = (
            self.weights.vector(gated.base),
            self.weights.vector(gated.scale),
        );
        for row in gates.chunks_exact_mut(n_gates) {
            weigh(row, n, base, scale, gated);
        }
        let gates = &*gates;
        self.cpu.pool.for_each_slice(out, hidden, |row, out| {
            out.fill(0.0);
            let pre = &gates[row * n_gates..][..n];
            for (pre, stream) in pre.iter().zip(x[row * width..].chunks_exact(hidden)) {
                kernels.axpy(*pre, stream, out);
            }
        });
    }

    /// Reads the hidden state and the bank, each by its share in a softmax.
    fn read_bank(&self, bank: &BankConnection, x: &[f32], out: &mut [f32]) {
        let (n, hidden, kernels) = (self.n, self.hidden, self.cpu.kernels);
        let score = self.weights.vector(bank.score);
        self.cpu.pool.for_each_slice(out, hidden, |row, out| {
            let streams = &x[row * n * hidden..][..n * hidden];
            let (current, banked) = streams.split_at(hidden);
            if bank.n_bank == 0 {
                return out.copy_from_slice(current);
            }
            let sources = || {
                let banked = banked.chunks_exact(hidden).take(bank.n_bank);
                banked.chain([current])
            };
            OLD.with_borrow_mut(|shares| {
                shares.clear();
                shares.extend(sources().map(|source| {
                    let mean = kernels.dot(source, source) / hidden as f32;
                    kernels.dot(score, source) / (mean + self.norm_eps).sqrt()
                }));
                let (_, sum) = kernels.exp_minus_max(shares);
                out.fill(0.0);
                for (share, source) in shares.iter().zip(sources()) {
                    kernels.axpy(share / sum, source, out);
                }
            });
        });
    }

    /// Adds results to the hidden state, or has them take its place, which joins the bank then.
    fn write_bank(&self, bank: BankConnection, result: &[f32], x: &mut [f32]) {
        let (n, hidden, kernels) = (self.n, self.hidden, self.cpu.kernels);
        self.cpu.pool.for_each_slice(x, n * hidden, |row, streams| {
            let result = &result[row * hidden..][..hidden];
            let (current, banked) = streams.split_at_mut(hidden);
            if bank.banks {
                banked[bank.n_bank * hidden..][..hidden].copy_from_slice(current);
                current.copy_from_slice(result);
            } else {
                kernels.add(current, result);
            }
        });
    }

    fn keep_gated(
        &self,
        gated: &GatedConnection,
        gates: &[f32],
        first: usize,
        back: &mut WriteBack,
    ) {
        let n = self.n;
        for (row, gates) in gates.chunks_exact(gated.gates.n_out).enumerate() {
            back.set_post(first + row, &gates[n..2 * n]);
            match gated.sinkhorn {
                Some(_) => back.set_mix(first + row, &gates[2 * n..]),
                None => back.mix.clear(),
            }
        }
    }

    /// Reads by weights for every value. Leaves the products of `inject` in `s.gates`, `[rows,
    /// streams]`.
    fn read_low_rank(
        &self,
        low: &LowRankConnection,
        x: &[f32],
        s: &mut StreamsScratch,
        out: &mut [f32],
    ) {
        let (n, hidden, kernels) = (self.n, self.hidden, self.cpu.kernels);
        let (rows, rank) = (x.len() / (n * hidden), low.down.n_out);
        let norm = self.weights.vector(low.norm);
        let normed = resized(&mut s.normed, x.len());
        self.cpu.pool.for_each_slice(normed, hidden, |i, normed| {
            let weight = &norm[i % n * hidden..][..hidden];
            kernels.rms_norm(&x[i * hidden..][..hidden], weight, self.norm_eps, normed);
        });
        let readers: Vec<&Linear> = std::iter::once(&low.down).chain(&low.inject).collect();
        self.fill(&readers, normed, &mut s.acts);
        if let Some(inject) = &low.inject {
            let injected = resized(&mut s.gates, rows * n);
            self.product(inject, s.acts.view(), injected);
        }
        let narrow = resized(&mut s.low, rows * rank);
        self.product(&low.down, s.acts.view(), narrow);
        for value in narrow.iter_mut() {
            let scaled = *value / n as f32;
            *value = scaled * sigmoid(scaled);
        }
        let quantize = needs_quants(self.weights.ty(low.up.weight));
        let (pool, low_acts) = (self.cpu.pool, &mut s.low_acts);
        low_acts.fill_shared(pool, kernels, rows, rank, narrow, quantize);
        let wide = resized(&mut s.wide, x.len());
        self.product(&low.up, low_acts.view(), wide);
        self.cpu.pool.for_each_slice(wide, hidden, |_, gates| {
            gates.iter_mut().for_each(|gate| *gate = -*gate);
            kernels.exp(gates);
        });
        let (normed, wide) = (&s.normed, &s.wide);
        self.cpu.pool.for_each_slice(out, hidden, |row, out| {
            out.fill(0.0);
            for at in (row * n..(row + 1) * n).map(|i| i * hidden) {
                let values = normed[at..].iter().zip(&wide[at..]);
                for (out, (value, gate)) in out.iter_mut().zip(values) {
                    *out += value / (1.0 + gate);
                }
            }
            out.iter_mut().for_each(|v| *v /= n as f32);
        });
    }

    fn keep_injected(&self, injected: &[f32], first: usize, back: &mut WriteBack) {
        let n = self.n;
        back.mix.clear();
        for (row, injected) in injected.chunks_exact(n).enumerate() {
            let post = back.post_of(first + row, n);
            for (post, injected) in post.iter_mut().zip(injected) {
                *post = 2.0 * sigmoid(injected / n as f32);
            }
        }
    }

    /// Fills `acts` with rows of streams as some matrices take them.
    fn fill(&self, readers: &[&Linear], rows: &[f32], acts: &mut Activations) {
        let width = self.n * self.hidden;
        let quantize = |linear: &&Linear| needs_quants(self.weights.ty(linear.weight));
        let (pool, kernels) = (self.cpu.pool, self.cpu.kernels);
        let quantize = readers.iter().any(quantize);
        acts.fill_shared(pool, kernels, rows.len() / width, width, rows, quantize);
    }

    fn product(&self, linear: &Linear, x: ActView<'_>, out: &mut [f32]) {
        let job = MatJob::new(self.weights.linear(linear), x, out);
        matmul_all(self.cpu.pool, self.cpu.kernels, &[job]);
        add_bias(out, self.weights.bias(linear));
    }
}

impl WriteBack {
    /// Returns the weights of some rows of a batch.
    pub(crate) fn rows(&self, rows: &Range<usize>, n: usize) -> BackRows {
        let part = |values: &[f32], width: usize| {
            let values = values.get(rows.start * width..rows.end * width);
            values.unwrap_or_default().to_vec()
        };
        BackRows {
            post: part(&self.post, n),
            mix: (!self.mix.is_empty()).then(|| part(&self.mix, n * n)),
        }
    }

    /// Takes the weights of rows from `first` on that another processor has made for a block.
    pub(crate) fn put(&mut self, connection: &Connection, first: usize, n: usize, rows: &BackRows) {
        self.bank = match connection {
            Connection::Bank(bank) => Some(*bank),
            Connection::Gated(_) | Connection::LowRank(_) => None,
        };
        for (i, post) in rows.post.chunks_exact(n).enumerate() {
            self.set_post(first + i, post);
        }
        match &rows.mix {
            None => self.mix.clear(),
            Some(mix) => {
                for (i, mix) in mix.chunks_exact(n * n).enumerate() {
                    self.set_mix(first + i, mix);
                }
            }
        }
    }

    fn post_of(&mut self, row: usize, n: usize) -> &mut [f32] {
        at(&mut self.post, row, n)
    }

    fn set_post(&mut self, row: usize, post: &[f32]) {
        self.post_of(row, post.len()).copy_from_slice(post);
    }

    fn set_mix(&mut self, row: usize, mix: &[f32]) {
        at(&mut self.mix, row, mix.len()).copy_from_slice(mix);
    }
}

/// Returns a row of `width` values of a buffer that grows as needed.
fn at(buffer: &mut Vec<f32>, row: usize, width: usize) -> &mut [f32] {
    let end = (row + 1) * width;
    if buffer.len() < end {
        buffer.resize(end, 0.0);
    }
    &mut buffer[row * width..end]
}

/// Returns a buffer of exactly `len` values, which are to be written.
fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Turns a row's products into its weights, in place: `pre`, and where there are more, `post` and
/// the matrix.
fn weigh(row: &mut [f32], n: usize, base: &[f32], scale: &[f32], gated: &GatedConnection) {
    let (pre, rest) = row.split_at_mut(n);
    for (pre, base) in pre.iter_mut().zip(base) {
        *pre = sigmoid(*pre * scale[0] + base) + gated.epsilon;
    }
    if rest.is_empty() {
        return;
    }
    let (post, mix) = rest.split_at_mut(n);
    for (post, base) in post.iter_mut().zip(&base[n..]) {
        *post = gated.post_scale * sigmoid(*post * scale[1] + base) + gated.post_offset;
    }
    if let Some(sinkhorn) = gated.sinkhorn {
        for (mix, base) in mix.iter_mut().zip(&base[2 * n..]) {
            *mix = *mix * scale[2] + base;
        }
        normalize(mix, n, sinkhorn, gated.epsilon);
    }
}

/// Makes a matrix `[source, destination]` nearly doubly stochastic; see [`Sinkhorn`].
fn normalize(mix: &mut [f32], n: usize, sinkhorn: Sinkhorn, epsilon: f32) {
    for row in mix.chunks_exact_mut(n) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|v| *v = (*v - largest).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|v| *v = *v / sum + epsilon);
    }
    divide_columns(mix, n, epsilon);
    for _ in 1..sinkhorn.rounds {
        for row in mix.chunks_exact_mut(n) {
            let sum = row.iter().sum::<f32>() + epsilon;
            row.iter_mut().for_each(|v| *v /= sum);
        }
        divide_columns(mix, n, epsilon);
    }
}

fn divide_columns(mix: &mut [f32], n: usize, epsilon: f32) {
    for to in 0..n {
        let column = || (0..n).map(|from| from * n + to);
        let sum = column().map(|i| mix[i]).sum::<f32>() + epsilon;
        column().for_each(|i| mix[i] /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_bring_both_sums_to_one() {
        let mut random = tier_plan_testing::Random(5);
        let start: Vec<f32> = (0..16).map(|_| random.below(100) as f32 / 25.0).collect();
        let sums = |rounds: usize, epsilon: f32| {
            let mut mix = start.clone();
            normalize(&mut mix, 4, Sinkhorn { rounds }, epsilon);
            let columns = (0..4).map(|to| (0..4).map(|from| mix[4 * from + to]).sum::<f32>());
            let rows = mix.chunks_exact(4).map(|row| row.iter().sum::<f32>());
            let far = |sums: Vec<f32>| sums.iter().map(|s| (s - 1.0).abs()).fold(0.0, f32::max);
            (far(rows.collect()), far(columns.collect()))
        };
        // It ends on columns.
        let (rows, columns) = sums(1, 0.0);
        assert!(columns < 1e-6 && rows > 0.05, "{rows} {columns}");
        let (rows, columns) = sums(60, 0.0);
        assert!(columns < 1e-6 && rows < 1e-4, "{rows} {columns}");
        // Epsilon in the denominators keeps sums below 1.
        let (_, columns) = sums(3, 0.1);
        assert!((0.08..0.12).contains(&columns), "{columns}");
    }

    #[test]
    fn weights_follow_the_formula() {
        let linear = Linear {
            weight: 0,
            bias: None,
            n_out: 4,
            n_in: 1,
            first_row: 0,
        };
        let gated = GatedConnection {
            gates: linear,
            base: 0,
            scale: 0,
            epsilon: 0.25,
            post_scale: 3.0,
            post_offset: 0.5,
            sinkhorn: None,
        };
        let mut row = [1.0, -2.0, 0.5, 4.0];
        weigh(&mut row, 2, &[0.5, 1.0, -1.0, 0.0], &[2.0, 0.5], &gated);
        let s = |x: f32| 1.0 / (1.0 + (-x).exp());
        let expected = [
            s(2.5) + 0.25,
            s(-3.0) + 0.25,
            3.0 * s(-0.75) + 0.5,
            3.0 * s(2.0) + 0.5,
        ];
        assert!(row.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
        let mut ends = [1.0, -2.0];
        weigh(&mut ends, 2, &[0.5, 1.0], &[2.0], &gated);
        assert_eq!(ends, [row[0], row[1]]);
    }
}
