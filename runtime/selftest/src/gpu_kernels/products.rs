//! Matrix products, quantization and dequantization, for every format.

use super::Check;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    BatchMatrices, Input, Matrices, MatrixTable, Matvec, Quants, TokenGroup, TokenGroups,
    TransposedMatvec,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_kernels::quant::{TensorType, dequantize_row};
use tier_plan_kernels::random::Random;
use tier_plan_kernels::reference;
use tier_plan_kernels::{Activations, Kernels, Q8Row, Weights, needs_quants};

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![
        Check::new("quantize", quantize),
        Check::new("matvec_transposed", transposed),
    ];
    for ty in TensorType::ALL {
        checks.push(Check::new(
            format!("dequantize_{ty}"),
            move |ops, random| decoding(ops, random, ty),
        ));
    }
    for ty in TensorType::ALL {
        checks.push(Check::new(format!("matvec_{ty}"), move |ops, random| {
            product(ops, random, ty)
        }));
        checks.push(Check::new(
            format!("matvec_{ty}, chosen experts"),
            move |ops, random| chosen(ops, random, ty),
        ));
    }
    for ty in TensorType::ALL {
        checks.push(Check::new(format!("matmul_{ty}"), move |ops, random| {
            batches(ops, random, ty)
        }));
    }
    checks
}

fn quantize(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (rows, cols) in [(1, 32), (3, 96), (2, 256), (5, 768)] {
        let mut x = random.activations(rows * cols);
        // A run of zeros, one too small for a scale, one of ties, and an infinite value.
        x[..32].fill(0.0);
        if rows > 1 {
            x[32..64].fill(1e-37);
            (0..32).for_each(|i| x[64 + i] = i as f32 - 0.5);
            x[95] = 127.0;
            x[cols + 3] = f32::INFINITY;
        }
        let on_device = Buffer::of_f32(ops.device(), &x)?;
        let mut quants = Quants::new(ops.device(), rows * cols)?;
        ops.quantize(on_device.view(), rows, cols, &mut quants)?;
        let mut acts = Activations::new(rows, cols);
        acts.fill(Kernels::SCALAR, rows, cols, &x, true);
        let codes = quants.codes.view().to_bytes()?;
        let (scales, sums) = (quants.scales.view().to_f32()?, quants.sums.view().to_f32()?);
        for row in 0..rows {
            let Q8Row {
                codes: q,
                scales: s,
                sums: of_halves,
            } = acts.view().q8_row(row);
            let got: Vec<i8> = codes[row * cols..][..cols]
                .iter()
                .map(|b| *b as i8)
                .collect();
            let runs = cols / 32;
            for run in 0..runs {
                let infinite = !s[run].is_finite();
                outcome.compare_exact(&[scales[row * runs + run].to_bits()], &[s[run].to_bits()]);
                // Codes of an infinite scale are meaningless.
                if !infinite {
                    outcome.compare_exact(&got[32 * run..][..32], &q[32 * run..][..32]);
                    outcome.compare_exact(
                        &sums[2 * (row * runs + run)..][..2],
                        &of_halves[2 * run..][..2],
                    );
                }
            }
        }
    }
    Ok(outcome)
}

fn decoding(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let (n_rows, cols) = (5, 2 * ty.block_len().max(32));
    let row_bytes = ty.row_bytes(cols as u64).unwrap_or_default() as usize;
    let bytes = random.weights(ty, n_rows * cols);
    let weights = Buffer::of_bytes(ops.device(), &bytes)?;
    let rows = [3u32, 0, 4, 3];
    let out = Buffer::new_f32(ops.device(), rows.len() * cols)?;
    ops.dequantize(ty, weights.view(), cols, &rows, out.view())?;
    let got: Vec<u32> = out.view().to_f32()?.into_iter().map(f32::to_bits).collect();
    let mut outcome = Outcome::default();
    let mut expected = vec![0.0; cols];
    for (row, got) in rows.iter().zip(got.chunks_exact(cols)) {
        dequantize_row(
            ty,
            &bytes[*row as usize * row_bytes..][..row_bytes],
            &mut expected,
        );
        let expected: Vec<u32> = expected.iter().map(|v| v.to_bits()).collect();
        outcome.compare_exact(got, &expected);
    }
    Ok(outcome)
}

/// Compares two tokens of three heads.
fn transposed(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (heads, jobs, n_rows, n_cols) = (3, 6, 40, 300);
    let (w, x) = (
        random.floats(heads * n_rows * n_cols),
        random.floats(jobs * n_rows),
    );
    let (weights, on_device) = (
        Buffer::of_f32(ops.device(), &w)?,
        Buffer::of_f32(ops.device(), &x)?,
    );
    let out = Buffer::new_f32(ops.device(), jobs * n_cols)?;
    let matvec = TransposedMatvec {
        w: weights.view(),
        heads,
        jobs,
        n_rows,
        n_cols,
        x: on_device.view(),
    };
    ops.matvec_transposed(&matvec, out.view())?;
    let expected = (0..jobs * n_cols).map(|i| {
        let (job, c) = (i / n_cols, i % n_cols);
        let product = |r: usize| {
            f64::from(x[job * n_rows + r]) * f64::from(w[(job % heads * n_rows + r) * n_cols + c])
        };
        Expected {
            value: (0..n_rows).map(product).sum(),
            allowed: 1e-5,
        }
    });
    let mut outcome = Outcome::default();
    outcome.compare(&out.view().to_f32()?, expected);
    Ok(outcome)
}

/// The same activations on the CPU and on a device.
pub(super) struct Inputs {
    acts: Activations,
    floats: Buffer,
    quants: Quants,
}

impl Inputs {
    pub(super) fn new(
        ops: &Ops,
        random: &mut Random,
        ty: TensorType,
        rows: usize,
        cols: usize,
    ) -> Result<Self, CudaError> {
        let x = random.activations(rows * cols);
        let mut acts = Activations::new(rows, cols);
        acts.fill(Kernels::SCALAR, rows, cols, &x, needs_quants(ty));
        let floats = Buffer::of_f32(ops.device(), &x)?;
        let mut quants = Quants::new(ops.device(), rows * cols.next_multiple_of(32))?;
        if needs_quants(ty) {
            ops.quantize(floats.view(), rows, cols, &mut quants)?;
        }
        Ok(Self {
            acts,
            floats,
            quants,
        })
    }

    pub(super) fn input(&self, ty: TensorType) -> Input<'_> {
        Input::for_type(ty, self.floats.view(), &self.quants)
    }

    /// Returns the plain product with one row of activations.
    pub(super) fn expected(&self, w: Weights<'_>, row: usize) -> Vec<Expected> {
        Expected::of_product(reference::matvec(w, &self.acts, row))
    }
}

/// Returns pairs of rows and columns, the columns a multiple of the format's blocks.
fn sizes(ty: TensorType) -> [(usize, usize); 4] {
    let cols = |n: usize| n.next_multiple_of(ty.block_len().max(32));
    [
        (1, cols(1)),
        (7, cols(96)),
        (9, cols(1056)),
        (4, cols(2048)),
    ]
}

/// Makes a matvec of a format without a bias.
fn matvec<'a>(
    ty: TensorType,
    matrices: Matrices<'a>,
    jobs: usize,
    (n_rows, n_cols): (usize, usize),
    x: Input<'a>,
    jobs_per_x: usize,
) -> Matvec<'a> {
    Matvec {
        ty,
        matrices,
        bias: None,
        jobs,
        n_rows,
        n_cols,
        x,
        jobs_per_x,
    }
}

fn product(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (i, (n_rows, cols)) in sizes(ty).into_iter().enumerate() {
        let tokens = [1, 3, 2, 1][i];
        let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
        let bytes = random.weights(ty, n_rows * cols);
        let weights = Buffer::of_bytes(ops.device(), &bytes)?;
        let out = Buffer::new_f32(ops.device(), tokens * n_rows)?;
        let one = Matrices::One(weights.view());
        ops.matvec(
            &matvec(ty, one, tokens, (n_rows, cols), inputs.input(ty), 1),
            out.view(),
        )?;
        let got = out.view().to_f32()?;
        let Some(w) = Weights::new(ty, &bytes, n_rows, cols) else {
            continue;
        };
        for (t, got) in got.chunks_exact(n_rows).enumerate() {
            outcome.compare(got, inputs.expected(w, t));
        }
    }
    // Float formats take any number of columns.
    if !needs_quants(ty) {
        let (n_rows, cols) = (3, 37);
        let inputs = Inputs::new(ops, random, ty, 1, cols)?;
        let bytes = random.weights(ty, n_rows * cols);
        let weights = Buffer::of_bytes(ops.device(), &bytes)?;
        let out = Buffer::new_f32(ops.device(), n_rows)?;
        let one = Matrices::One(weights.view());
        ops.matvec(
            &matvec(ty, one, 1, (n_rows, cols), inputs.input(ty), 1),
            out.view(),
        )?;
        if let Some(w) = Weights::new(ty, &bytes, n_rows, cols) {
            outcome.compare(&out.view().to_f32()?, inputs.expected(w, 0));
        }
    }
    Ok(outcome)
}

/// Compares two tokens that chose three of five experts each; one expert is missing, one index
/// invalid.
fn chosen(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let (n_rows, cols, n_expert, n_used, tokens) = (6, ty.block_len().max(32) * 3, 5, 3, 2);
    let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
    let experts: Vec<Vec<u8>> = (0..n_expert)
        .map(|_| random.weights(ty, n_rows * cols))
        .collect();
    let on_device = experts
        .iter()
        .map(|bytes| Buffer::of_bytes(ops.device(), bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let views: Vec<_> = on_device
        .iter()
        .enumerate()
        .map(|(e, b)| (e != 2).then_some(b.view()))
        .collect();
    let table = MatrixTable::new(ops.device(), &views)?;
    let choices = [4, 2, 0, 1, -1, 3];
    let which = Buffer::of_i32(ops.device(), &choices)?;
    let jobs = tokens * n_used;
    let untouched = 7.5f32;
    let out = Buffer::of_f32(ops.device(), &vec![untouched; jobs * n_rows])?;
    let chosen = Matrices::Chosen(&table, which.view());
    ops.matvec(
        &matvec(ty, chosen, jobs, (n_rows, cols), inputs.input(ty), n_used),
        out.view(),
    )?;
    let mut outcome = Outcome::default();
    let got = out.view().to_f32()?;
    for ((job, choice), got) in choices.iter().enumerate().zip(got.chunks_exact(n_rows)) {
        match usize::try_from(*choice).ok().filter(|e| *e != 2) {
            Some(e) => {
                let Some(w) = Weights::new(ty, &experts[e], n_rows, cols) else {
                    continue;
                };
                outcome.compare(got, inputs.expected(w, job / n_used));
            }
            None => outcome.compare_exact(got, &vec![untouched; n_rows]),
        }
    }
    // By index, each matrix with its own activations.
    let present: Vec<_> = on_device
        .iter()
        .take(tokens)
        .map(|b| Some(b.view()))
        .collect();
    let table = MatrixTable::new(ops.device(), &present)?;
    ops.matvec(
        &matvec(
            ty,
            Matrices::Table(&table),
            tokens,
            (n_rows, cols),
            inputs.input(ty),
            1,
        ),
        out.view(),
    )?;
    let got = out.view().to_f32()?;
    for (e, got) in got.chunks_exact(n_rows).take(tokens).enumerate() {
        let Some(w) = Weights::new(ty, &experts[e], n_rows, cols) else {
            continue;
        };
        outcome.compare(got, inputs.expected(w, e));
    }
    Ok(outcome)
}

/// Compares many tokens: with one matrix, and with those of several experts, of which one is
/// missing.
fn batches(ops: &Ops, random: &mut Random, ty: TensorType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let cols = |n: usize| n.next_multiple_of(ty.block_len().max(32));
    let mut sizes = vec![(1, 3, cols(32)), (40, 70, cols(96))];
    // Float formats take any number of columns.
    if !needs_quants(ty) {
        sizes.extend([(33, 65, 37), (9, 5, 1028)]);
    }
    for (tokens, n_rows, cols) in sizes {
        let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
        let bytes = random.weights(ty, n_rows * cols);
        let weights = Buffer::of_bytes(ops.device(), &bytes)?;
        let out = Buffer::new_f32(ops.device(), tokens * n_rows)?;
        ops.matmul(
            ty,
            BatchMatrices::One(weights.view(), tokens),
            n_rows,
            cols,
            inputs.input(ty),
            out.view(),
        )?;
        let Some(w) = Weights::new(ty, &bytes, n_rows, cols) else {
            continue;
        };
        for (t, got) in out.view().to_f32()?.chunks_exact(n_rows).enumerate() {
            outcome.compare(got, inputs.expected(w, t));
        }
    }
    let (tokens, n_rows, cols) = (45, 5, cols(64));
    let inputs = Inputs::new(ops, random, ty, tokens, cols)?;
    let experts: Vec<Vec<u8>> = (0..3).map(|_| random.weights(ty, n_rows * cols)).collect();
    let on_device = experts
        .iter()
        .map(|bytes| Buffer::of_bytes(ops.device(), bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let views: Vec<_> = on_device
        .iter()
        .enumerate()
        .map(|(e, b)| (e != 1).then_some(b.view()))
        .collect();
    let table = MatrixTable::new(ops.device(), &views)?;
    let group = |matrix, first, tokens| TokenGroup {
        matrix,
        first,
        tokens,
    };
    let groups = [group(2, 0, 2), group(1, 2, 4), group(0, 6, 39)];
    let untouched = 7.5f32;
    let out = Buffer::of_f32(ops.device(), &vec![untouched; tokens * n_rows])?;
    let buffer = Buffer::new_f32(ops.device(), TokenGroups::WORDS * groups.len())?;
    let sent = TokenGroups::send(&groups, buffer.view())?;
    ops.matmul(
        ty,
        BatchMatrices::Groups(&table, sent),
        n_rows,
        cols,
        inputs.input(ty),
        out.view(),
    )?;
    let got = out.view().to_f32()?;
    for g in groups {
        let Some(w) = Weights::new(ty, &experts[g.matrix], n_rows, cols) else {
            continue;
        };
        for t in g.first..g.first + g.tokens {
            let got = &got[t * n_rows..][..n_rows];
            match g.matrix {
                1 => outcome.compare_exact(got, &vec![untouched; n_rows]),
                _ => outcome.compare(got, inputs.expected(w, t)),
            }
        }
    }
    Ok(outcome)
}
