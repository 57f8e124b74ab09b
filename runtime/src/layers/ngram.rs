//! What the n-grams that end with a token add to its streams; see [`NgramBlock`] for the formulas.
//!
//! The rows of the table are known as soon as the tokens are, so they can be read ahead exactly.

use super::cpu_context::{CpuContext, add_bias};
use super::mixer::Segment;
use super::recurrent::{RecurrentState, copy_ngram_state};
use super::streams::Streams;
use super::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::spec::{NgramBlock, NgramTable};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::quant::dequantize_row;
use tier_plan_kernels::{Activations, needs_quants};

/// Smallest magnitude under the root of a gate.
const MIN_SCORE: f32 = 1e-6;

/// The rows of a batch's n-grams, and the buffers of their blocks.
#[derive(Default)]
pub(crate) struct Ngrams {
    /// `[batch, heads]`: rows of the table.
    rows: Vec<u64>,
    /// `[rows, hidden]`: a token's rows, one after the other.
    found: Vec<f32>,
    acts: Activations,
    /// `[rows, streams * hidden]`.
    keys: Vec<f32>,
    /// `[rows, hidden]`.
    values: Vec<f32>,
    /// `[rows, streams * hidden]`: gated values.
    gated: Vec<f32>,
    /// `[rows, streams * hidden]`: the convolution's inputs.
    inputs: Vec<f32>,
}

/// Rows of a batch that an n-gram block adds to.
pub(crate) struct NgramInput<'a> {
    pub(crate) table: &'a NgramTable,
    pub(crate) block: &'a NgramBlock,
    /// The rows, counted in the batch.
    pub(crate) rows: Range<usize>,
    pub(crate) segments: &'a [Segment<'a>],
}

impl Ngrams {
    /// Forgets the rows of the last batch.
    pub(crate) fn clear(&mut self) {
        self.rows.clear();
    }

    /// Adds the rows that a text's next tokens read. `before` are the tokens before them, as many as
    /// matter.
    pub(crate) fn name(&mut self, table: &NgramTable, before: &[u32], tokens: &[u32]) {
        let context = [before, tokens].concat();
        let n_heads = table.n_heads();
        for end in before.len() + 1..=context.len() {
            let first = self.rows.len();
            self.rows.resize(first + n_heads, 0);
            table.rows(&context[..end], &mut self.rows[first..]);
        }
    }

    /// Returns the rows of the table that the batch reads.
    pub(crate) fn named(&self) -> &[u64] {
        &self.rows
    }

    /// Adds a block to rows of streams, `[rows, streams * hidden]`, and takes the state of each text
    /// past them.
    pub(crate) fn add(
        &mut self,
        on: Streams<'_>,
        input: &NgramInput<'_>,
        states: &mut [RecurrentState],
        x: &mut [f32],
    ) {
        self.find(on.cpu, on.weights, input.table, input.rows.clone());
        self.multiply(on, input.block, input.rows.len());
        self.gate(on, input.block, x);
        for segment in input.segments {
            for (rows, checkpoint) in segment.parts() {
                if let Some(state) = states.get_mut(segment.state as usize) {
                    self.convolve(on, input.block, rows, &mut state.ngram, x);
                }
                if let Some(to) = checkpoint {
                    copy_ngram_state(states, segment.state, to);
                }
            }
        }
    }

    /// Reads the rows of the table that some rows of the batch name. Returns them, `[rows, hidden]`.
    pub(crate) fn find(
        &mut self,
        cpu: CpuContext<'_>,
        weights: &DenseWeights,
        table: &NgramTable,
        rows: Range<usize>,
    ) -> &[f32] {
        let (n, hidden) = (rows.len(), table.n_heads() * table.width);
        self.found.resize(n * hidden, 0.0);
        let stored = weights.matrix(table.table, table.n_rows, table.width);
        let named = &self.rows[rows.start * table.n_heads()..];
        let found = &mut self.found[..n * hidden];
        cpu.pool.for_each_slice(found, hidden, |t, row| {
            let named = &named[t * table.n_heads()..][..table.n_heads()];
            for (head, to) in named.iter().zip(row.chunks_exact_mut(table.width)) {
                if let Some(bytes) = stored.row(*head as usize) {
                    dequantize_row(stored.ty(), bytes, to);
                }
            }
        });
        found
    }

    /// Multiplies `n` rows of the table to keys and values.
    fn multiply(&mut self, on: Streams<'_>, block: &NgramBlock, n: usize) {
        let Streams { cpu, weights, .. } = on;
        let (hidden, found) = (on.hidden, &self.found[..n * on.hidden]);
        let quantize = [&block.key, &block.value]
            .iter()
            .any(|linear| needs_quants(weights.ty(linear.weight)));
        let acts = &mut self.acts;
        acts.fill_shared(cpu.pool, cpu.kernels, n, hidden, found, quantize);
        self.keys.resize(n * block.key.n_out, 0.0);
        self.values.resize(n * hidden, 0.0);
        let jobs = [
            MatJob::new(weights.linear(&block.key), acts.view(), &mut self.keys),
            MatJob::new(weights.linear(&block.value), acts.view(), &mut self.values),
        ];
        matmul_all(cpu.pool, cpu.kernels, &jobs);
        add_bias(&mut self.keys, weights.bias(&block.key));
        add_bias(&mut self.values, weights.bias(&block.value));
    }

    /// Computes gated values, and the convolution's inputs.
    fn gate(&mut self, on: Streams<'_>, block: &NgramBlock, x: &[f32]) {
        let Streams { cpu, weights, .. } = on;
        let (hidden, n_streams) = (on.hidden, on.n);
        let key_norm = weights.vector(block.key_norm);
        let query_norm = weights.vector(block.query_norm);
        let conv_norm = weights.vector(block.conv_norm);
        self.gated.resize(x.len(), 0.0);
        self.inputs.resize(x.len(), 0.0);
        let (keys, values) = (&self.keys, &self.values);
        let work = |i: usize, gated: &mut [f32], inputs: &mut [f32]| {
            let of_stream = |norm: &'_ [f32]| -> Range<usize> {
                debug_assert_eq!(norm.len(), n_streams * hidden);
                i % n_streams * hidden..(i % n_streams + 1) * hidden
            };
            let norm = |x: &[f32], weight: &[f32], out: &mut [f32]| {
                let weight = &weight[of_stream(weight)];
                cpu.kernels.rms_norm(x, weight, on.norm_eps, out);
            };
            norm(&keys[i * hidden..][..hidden], key_norm, gated);
            norm(&x[i * hidden..][..hidden], query_norm, inputs);
            let score = cpu.kernels.dot(gated, inputs) / (hidden as f32).sqrt();
            let root = score.abs().max(MIN_SCORE).sqrt();
            let signed = match score {
                0.0 => 0.0,
                score if score < 0.0 => -root,
                _ => root,
            };
            let gate = 1.0 / (1.0 + (-signed).exp());
            let values = &values[i / n_streams * hidden..][..hidden];
            gated
                .iter_mut()
                .zip(values)
                .for_each(|(to, value)| *to = gate * value);
            norm(gated, conv_norm, inputs);
        };
        let n = x.len() / hidden;
        cpu.pool
            .for_each_pair(n, &mut self.gated, &mut self.inputs, work);
    }

    /// Adds values and their convolution to some rows of one text after `past`, `[past tokens,
    /// channels]`, which then ends with them.
    fn convolve(
        &self,
        on: Streams<'_>,
        block: &NgramBlock,
        rows: Range<usize>,
        past: &mut [f32],
        x: &mut [f32],
    ) {
        let (channels, keep, n) = (block.channels(), block.past(), rows.len());
        let conv = on.weights.vector(block.conv);
        let inputs = &self.inputs[rows.start * channels..rows.end * channels];
        let gated = &self.gated[rows.start * channels..rows.end * channels];
        let before = &*past;
        let x = &mut x[rows.start * channels..rows.end * channels];
        on.cpu.pool.for_each_slice(x, channels, |t, x| {
            let gated = &gated[t * channels..][..channels];
            for (channel, (x, value)) in x.iter_mut().zip(gated).enumerate() {
                let taps = &conv[channel * block.taps..][..block.taps];
                let mut sum = 0.0;
                for (tap, weight) in taps.iter().enumerate() {
                    let at = t + tap * block.dilation;
                    let input = match at.checked_sub(keep) {
                        Some(at) => inputs[at * channels + channel],
                        None => before[at * channels + channel],
                    };
                    sum += weight * input;
                }
                *x += value + sum / (1.0 + (-sum).exp());
            }
        });
        let new = n.min(keep);
        past.copy_within(new * channels.., 0);
        past[(keep - new) * channels..].copy_from_slice(&inputs[(n - new) * channels..]);
    }
}
