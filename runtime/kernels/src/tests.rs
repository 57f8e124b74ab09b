//! Every kernel against plain code that shares nothing with it, on every instruction set of this
//! processor.

use super::*;
use crate::quant::{TensorType, dequantize_row};
use half::f16;
pub(super) use tier_plan_testing::Random as Rng;

/// Returns random blocks whose scales are ordinary numbers: any bits do for the rest.
pub(super) fn random_weights(ty: TensorType, rows: usize, cols: usize, rng: &mut Rng) -> Vec<u8> {
    let bytes = rows * ty.row_bytes(cols as u64).unwrap() as usize;
    let mut out: Vec<u8> = (0..bytes).map(|_| rng.next() as u8).collect();
    for block in out.chunks_exact_mut(ty.block_bytes()) {
        let value = 0.01 + 0.02 * (rng.next() % 100) as f32 / 100.0;
        let value = if rng.next().is_multiple_of(2) {
            value
        } else {
            -value
        };
        let half = f16::from_f32(value).to_le_bytes();
        use TensorType::*;
        match ty {
            F32 => block.copy_from_slice(&(50.0 * value).to_le_bytes()),
            F16 => block.copy_from_slice(&f16::from_f32(50.0 * value).to_le_bytes()),
            BF16 => block.copy_from_slice(&half::bf16::from_f32(50.0 * value).to_le_bytes()),
            MXFP4 => block[0] = 120 + block[0] % 8,
            Q2_K => {
                [block[80], block[81], block[82], block[83]] = [half[0], half[1], half[0], half[1]]
            }
            Q3_K => [block[108], block[109]] = half,
            Q6_K => [block[208], block[209]] = half,
            TQ1_0 => [block[52], block[53]] = half,
            TQ2_0 => [block[64], block[65]] = half,
            // Any bits are an ordinary scale.
            NVFP4 => {}
            I8 | I16 | I32 | I64 | F64 => {}
            Q4_1 | Q5_1 | Q4_K | Q5_K => {
                [block[0], block[1], block[2], block[3]] = [half[0], half[1], half[0], half[1]]
            }
            IQ1_M => {
                let bits = f16::from_f32(value).to_bits();
                for i in 0..4 {
                    let nibble = (bits >> (4 * i) & 15) as u8;
                    block[49 + 2 * i] = block[49 + 2 * i] & 0x0f | nibble << 4;
                }
            }
            Q1_0 | Q2_0 => [block[0], block[1]] = half,
            Q4_0 | Q5_0 | Q8_0 | IQ1_S | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_NL
            | IQ4_XS => [block[0], block[1]] = half,
        }
    }
    out
}

/// Returns `[tokens, rows]` results in 64-bit floats with their sums of magnitudes, from the
/// dequantized weights and the activations that the 8-bit form stands for (or the values
/// themselves).
fn reference(w: Weights<'_>, x: &[f32], quantized: bool) -> Vec<(f64, f64)> {
    let cols = w.n_cols();
    let mut decoded = vec![0.0; cols];
    let mut out = vec![(0.0, 0.0); x.len() / cols * w.n_rows()];
    for row in 0..w.n_rows() {
        dequantize_row(w.ty(), w.row(row).unwrap(), &mut decoded);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let sums = &mut out[t * w.n_rows() + row];
            for (weights, run) in decoded.chunks(32).zip(x.chunks(32)) {
                let largest = run.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (w, v) in weights.iter().zip(run) {
                    let scale = f64::from(largest) / 127.0;
                    let v = if quantized && largest > 0.0 {
                        (f64::from(*v) / scale).round_ties_even() * scale
                    } else {
                        f64::from(*v)
                    };
                    sums.0 += f64::from(*w) * v;
                    sums.1 += (f64::from(*w) * v).abs();
                }
            }
        }
    }
    out
}

fn columns(ty: TensorType) -> &'static [usize] {
    match ty.block_len() {
        1 => &[1, 31, 32, 33, 100, 256, 512],
        32 => &[32, 224, 256, 288, 768],
        64 => &[64, 192, 256, 320, 832],
        128 => &[128, 256, 384, 896],
        _ => &[256, 768, 2048],
    }
}

#[test]
fn matmul_matches_the_dequantized_weights() {
    let mut rng = Rng(1);
    for k in Kernels::available() {
        for ty in TensorType::ALL {
            for &cols in columns(ty) {
                let (rows, tokens) = (5, 3);
                let bytes = random_weights(ty, rows, cols, &mut rng);
                let w = Weights::new(ty, &bytes, rows, cols).unwrap();
                let x = rng.normals(tokens * cols);
                let mut acts = Activations::new(tokens, cols);
                acts.fill(k, tokens, cols, &x, needs_quants(ty));
                let mut out = vec![f32::NAN; tokens * rows];
                // SAFETY: one thread.
                unsafe { k.matmul(w, 0..rows, acts.view(), OutMatrix::new(&mut out, rows)) };
                let want = reference(w, &x, needs_quants(ty));
                for (i, (got, (want, magnitude))) in out.iter().zip(want).enumerate() {
                    // A value that lies between two whole numbers may round either way: 1e-3 of one
                    // of many terms.
                    let bound = if needs_quants(ty) { 1e-4 } else { 1e-6 } * magnitude;
                    let off = (f64::from(*got) - want).abs();
                    assert!(
                        off <= bound,
                        "{} {ty} {cols} columns, value {i}: {got}, expected {want}",
                        k.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn matmul_has_the_same_bits_with_any_other_tokens_and_rows() {
    /// Enough for kernels that take many tokens at once, with some left over.
    const TOKENS: usize = 43;
    let mut rng = Rng(2);
    for k in Kernels::available() {
        for ty in TensorType::ALL {
            let cols = columns(ty)[3 % columns(ty).len()];
            let rows = 150;
            let bytes = random_weights(ty, rows, cols, &mut rng);
            let w = Weights::new(ty, &bytes, rows, cols).unwrap();
            let x = rng.normals(TOKENS * cols);
            let mut acts = Activations::new(TOKENS, cols);
            acts.fill(k, TOKENS, cols, &x, needs_quants(ty));
            let mut single = vec![0.0; TOKENS * rows];
            for t in 0..TOKENS {
                let (view, out) = (
                    acts.view().rows_range(t..t + 1),
                    &mut single[t * rows..][..rows],
                );
                // SAFETY: one thread.
                unsafe { k.matmul(w, 0..rows, view, OutMatrix::new(out, rows)) };
            }
            for tokens in (1..=9).chain([17, 20, 32, 40, TOKENS]) {
                let stride = rows + 3;
                let mut out = vec![-1.0; tokens * stride];
                let part = 7..rows - 1;
                // SAFETY: one thread.
                unsafe {
                    let out = OutMatrix::new(&mut out, stride);
                    k.matmul(w, part.clone(), acts.view().rows_range(0..tokens), out);
                }
                for t in 0..tokens {
                    for r in 0..stride {
                        let want = if part.contains(&r) {
                            single[t * rows + r]
                        } else {
                            -1.0
                        };
                        let got = out[t * stride + r];
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "{} {ty} {tokens} tokens: [{t}, {r}]",
                            k.isa()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn interleaved_rows_give_the_same_bits() {
    /// Enough for tiles, with some tokens left over.
    const TOKENS: usize = 75;
    let mut rng = Rng(12);
    for k in Kernels::available() {
        for ty in TensorType::ALL {
            let rows = 3 * BAND_ROWS;
            if !Weights::has_bands(ty, rows) {
                assert_eq!(k.fastest_order(ty, rows), RowOrder::Sequential, "{ty}");
                continue;
            }
            for &cols in columns(ty) {
                let sequential = random_weights(ty, rows, cols, &mut rng);
                let w = Weights::new(ty, &sequential, rows, cols).unwrap();
                let mut bytes = sequential.clone();
                k.interleave(ty, w.row_bytes(), &mut bytes);
                let bands = Weights::new(ty, &bytes, rows, cols).unwrap();
                let bands = bands.in_order(RowOrder::Interleaved).unwrap();
                assert!(bands.row(0).is_none() && bands.rows(8..rows).is_none());
                let mut scratch = Vec::new();
                for row in [0, 21, rows - 1] {
                    assert_eq!(bands.row_in(row, &mut scratch), w.row(row), "{ty}");
                }
                assert_eq!(bands.row_in(rows, &mut scratch), None);
                let x = rng.normals(TOKENS * cols);
                let mut acts = Activations::new(TOKENS, cols);
                acts.fill(k, TOKENS, cols, &x, true);
                for (tokens, part) in [(1, 0..rows), (5, 16..48), (16, 16..32), (TOKENS, 0..rows)] {
                    let x = acts.view().rows_range(0..tokens);
                    let [want, got] = [w, bands].map(|w| {
                        let mut out = vec![-1.0; tokens * rows];
                        // SAFETY: one thread.
                        unsafe { k.matmul(w, part.clone(), x, OutMatrix::new(&mut out, rows)) };
                        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                    });
                    assert!(
                        want == got,
                        "{} {ty} {cols} columns, {tokens} tokens",
                        k.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn a_factor_multiplies_every_product_once() {
    let (rows, cols, tokens) = (37, 256, 43);
    let mut rng = Rng(9);
    for k in Kernels::available() {
        for ty in [TensorType::F16, TensorType::Q4_0, TensorType::NVFP4] {
            let bytes = random_weights(ty, rows, cols, &mut rng);
            let w = Weights::new(ty, &bytes, rows, cols).unwrap();
            let mut acts = Activations::new(tokens, cols);
            acts.fill(
                k,
                tokens,
                cols,
                &rng.normals(tokens * cols),
                needs_quants(ty),
            );
            let stride = rows + 2;
            let (mut plain, mut scaled) =
                (vec![-1.0; tokens * stride], vec![-1.0; tokens * stride]);
            for (w, out) in [(w, &mut plain), (w.scaled(0.3), &mut scaled)] {
                // SAFETY: one thread.
                unsafe { k.matmul(w, 3..rows, acts.view(), OutMatrix::new(out, stride)) };
            }
            for (i, (plain, scaled)) in plain.iter().zip(&scaled).enumerate() {
                let want = if (3..rows).contains(&(i % stride)) {
                    0.3 * plain
                } else {
                    -1.0
                };
                assert_eq!(
                    scaled.to_bits(),
                    want.to_bits(),
                    "{} {ty} value {i}",
                    k.isa()
                );
            }
        }
    }
}

#[test]
fn instruction_sets_agree() {
    let mut rng = Rng(3);
    for ty in TensorType::ALL {
        let cols = *columns(ty).last().unwrap();
        let rows = 40;
        let bytes = random_weights(ty, rows, cols, &mut rng);
        let w = Weights::new(ty, &bytes, rows, cols).unwrap();
        let x = rng.normals(cols);
        let magnitudes = reference(w, &x, false);
        let mut outs = Vec::new();
        for k in Kernels::available() {
            let mut acts = Activations::new(1, cols);
            acts.fill(k, 1, cols, &x, needs_quants(ty));
            let mut out = vec![0.0; rows];
            // SAFETY: one thread.
            unsafe { k.matmul(w, 0..rows, acts.view(), OutMatrix::new(&mut out, rows)) };
            outs.push(out);
        }
        // Sets that multiply bands give the same bits.
        let bands: Vec<_> = Kernels::available()
            .into_iter()
            .zip(&outs)
            .filter(|(k, _)| k.fastest_order(ty, BAND_ROWS) == RowOrder::Interleaved)
            .map(|(_, out)| out)
            .collect();
        assert!(
            bands.windows(2).all(|two| two[0] == two[1]),
            "{ty}: {bands:?}"
        );
        for out in &outs[1..] {
            for ((a, b), (_, magnitude)) in outs[0].iter().zip(out).zip(&magnitudes) {
                assert!(
                    f64::from((a - b).abs()) <= 2e-6 * magnitude,
                    "{ty}: {a} and {b}"
                );
            }
        }
    }
}

#[test]
fn eight_bit_activations_cost_little_accuracy() {
    let mut rng = Rng(4);
    let k = Kernels::best();
    for ty in TensorType::ALL.into_iter().filter(|ty| needs_quants(*ty)) {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/dequant");
        let bytes = std::fs::read(dir.join(format!("{ty}.bin"))).unwrap();
        let golden = std::fs::read(dir.join(format!("{ty}.f32"))).unwrap();
        let golden: Vec<f32> = golden
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let w = Weights::new(ty, &bytes, 8, 256).unwrap();
        let x = rng.normals(16 * 256);
        let mut acts = Activations::new(16, 256);
        acts.fill(k, 16, 256, &x, true);
        let mut out = vec![0.0; 16 * 8];
        // SAFETY: one thread.
        unsafe { k.matmul(w, 0..8, acts.view(), OutMatrix::new(&mut out, 8)) };
        let (mut off, mut all) = (0.0, 0.0);
        for t in 0..16 {
            for r in 0..8 {
                let pairs = golden[256 * r..][..256].iter().zip(&x[256 * t..][..256]);
                let want: f64 = pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                off += (f64::from(out[8 * t + r]) - want).powi(2);
                all += want.powi(2);
            }
        }
        assert!(off / all < 1e-4, "{ty}: NMSE {}", off / all);
    }
}

/// Memory whose last byte is followed by a page that must not be touched.
#[cfg(unix)]
pub(super) struct Guarded {
    base: *mut u8,
    len: usize,
}

#[cfg(unix)]
impl Guarded {
    /// Maps 64 KiB and a guard page.
    pub fn new() -> Self {
        let (len, guard) = (64 << 10, 64 << 10);
        // SAFETY: a fresh anonymous mapping, of which the end is then closed.
        let base = unsafe {
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            let base = libc::mmap(std::ptr::null_mut(), len + guard, protection, flags, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            assert_eq!(
                libc::mprotect(base.byte_add(len), guard, libc::PROT_NONE),
                0
            );
            base.cast::<u8>()
        };
        Self { base, len }
    }

    /// Returns the last `n` elements before the guard, all zero at first.
    pub fn last<T: Copy>(&mut self, n: usize) -> &mut [T] {
        let bytes = n * size_of::<T>();
        assert!(bytes <= self.len);
        // SAFETY: inside the mapping; aligned when `T` divides a page; any bytes are a number.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(self.len - bytes).cast(), n) }
    }
}

#[cfg(unix)]
impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.base.cast(), self.len + (64 << 10)) };
    }
}

#[cfg(unix)]
#[test]
#[cfg_attr(miri, ignore = "Miri knows the ends of buffers itself")]
fn nothing_past_the_end_is_read_or_written() {
    let mut rng = Rng(8);
    let (mut memory, mut result) = (Guarded::new(), Guarded::new());
    for k in Kernels::available() {
        for ty in TensorType::ALL {
            for &cols in columns(ty) {
                for tokens in [1, 3, 8] {
                    let rows = 2;
                    let bytes = random_weights(ty, rows, cols, &mut rng);
                    let inside = memory.last::<u8>(bytes.len());
                    inside.copy_from_slice(&bytes);
                    let w = Weights::new(ty, inside, rows, cols).unwrap();
                    let mut acts = Activations::new(tokens, cols);
                    acts.fill(
                        k,
                        tokens,
                        cols,
                        &rng.normals(tokens * cols),
                        needs_quants(ty),
                    );
                    let out = OutMatrix::new(result.last::<f32>(tokens * rows), rows);
                    // SAFETY: one thread.
                    unsafe { k.matmul(w, 0..rows, acts.view(), out) };
                }
            }
        }
        for n in 0..70 {
            let values = rng.normals(n);
            let out = result.last::<f32>(n);
            out.copy_from_slice(&values);
            k.exp(out);
            k.silu_mul(out, &values);
            k.clamped_swiglu(out, &values, 1.702, 7.0);
            k.rms_norm(&values, &[], 1e-6, out);
            let half = memory.last::<f16>(n);
            k.to_f16(out, half);
        }
    }
}

/// Returns the bytes of a block that are codes; none where codes index a grid, which bounds their
/// levels.
fn codes(ty: TensorType) -> std::ops::Range<usize> {
    use TensorType::*;
    match ty {
        Q4_0 | Q4_1 | Q5_0 | Q5_1 | IQ4_NL | MXFP4 => ty.block_bytes() - 16..ty.block_bytes(),
        Q8_0 => 2..34,
        Q2_K | Q3_K => 0..80,
        Q1_0 | Q2_0 => 2..18,
        TQ1_0 => 0..52,
        TQ2_0 => 0..64,
        NVFP4 => 4..36,
        Q4_K | Q5_K | IQ4_XS => 16..ty.block_bytes(),
        Q6_K => 0..208,
        IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S => 0..0,
        F32 | F16 | BF16 | I8 | I16 | I32 | I64 | F64 => 0..0,
    }
}

#[test]
fn extremes_do_not_overflow() {
    // All codes at their largest magnitude against activations at theirs, with either sign.
    for k in Kernels::available() {
        for ty in TensorType::ALL.into_iter().filter(|ty| needs_quants(*ty)) {
            for fill in [0x00u8, 0x80, 0x7f, 0xff, 0x88, 0x77] {
                let cols = 256;
                let mut rng = Rng(5);
                let mut bytes = random_weights(ty, 1, cols, &mut rng);
                bytes
                    .chunks_exact_mut(ty.block_bytes())
                    .for_each(|block| block[codes(ty)].fill(fill));
                let w = Weights::new(ty, &bytes, 1, cols).unwrap();
                for x in [vec![1.0; cols], vec![-1.0; cols]] {
                    let mut acts = Activations::new(1, cols);
                    acts.fill(k, 1, cols, &x, true);
                    let mut out = [0.0];
                    // SAFETY: one thread.
                    unsafe { k.matmul(w, 0..1, acts.view(), OutMatrix::new(&mut out, 1)) };
                    let (want, magnitude) = reference(w, &x, true)[0];
                    let off = (f64::from(out[0]) - want).abs();
                    assert!(
                        off <= 1e-5 * magnitude + 1e-6,
                        "{} {ty} {fill:#x}: {} {want}",
                        k.isa(),
                        out[0]
                    );
                }
            }
        }
    }
}

#[test]
fn small_operations_match_plain_arithmetic() {
    for k in Kernels::available() {
        let mut rng = Rng(6);
        for n in [0usize, 1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 257] {
            let (a, b) = (rng.normals(n), rng.normals(n));
            let half: Vec<f16> = b.iter().map(|v| f16::from_f32(*v)).collect();
            let close = |got: f32, want: f64, scale: f64, what: &str| {
                let off = (f64::from(got) - want).abs();
                assert!(
                    off <= 1e-6 * scale.max(1e-30),
                    "{} {what} of {n}: {got}, expected {want}",
                    k.isa()
                );
            };
            let sum = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();
            let size = sum(&|i| f64::from(a[i] * b[i]).abs());
            close(
                k.dot(&a, &b),
                sum(&|i| f64::from(a[i]) * f64::from(b[i])),
                size,
                "dot",
            );

            let mut narrow = vec![f16::ZERO; n];
            k.to_f16(&b, &mut narrow);
            assert_eq!(narrow, half);

            let (mut y, mut s) = (a.clone(), a.clone());
            k.axpy(0.3, &b, &mut y);
            k.add(&mut s, &b);
            for i in 0..n {
                let (ai, bi) = (f64::from(a[i]), f64::from(b[i]));
                close(
                    y[i],
                    ai + f64::from(0.3f32) * bi,
                    ai.abs() + bi.abs(),
                    "axpy",
                );
                close(s[i], ai + bi, ai.abs() + bi.abs(), "add");
            }

            let mut norm = vec![0.0; n];
            let mean = sum(&|i| f64::from(a[i]).powi(2)) / n.max(1) as f64;
            for weight in [&b[..], &[]] {
                k.rms_norm(&a, weight, 1e-5, &mut norm);
                for i in 0..n {
                    let w = if weight.is_empty() {
                        1.0
                    } else {
                        f64::from(b[i])
                    };
                    let want = f64::from(a[i]) / (mean + f64::from(1e-5f32)).sqrt() * w;
                    close(norm[i], want, want.abs(), "rms_norm");
                }
            }

            let mut gate: Vec<f32> = a.iter().map(|v| 5.0 * v).collect();
            let before = gate.clone();
            k.silu_mul(&mut gate, &b);
            for i in 0..n {
                let g = f64::from(before[i]);
                let want = g / (1.0 + (-g).exp()) * f64::from(b[i]);
                close(gate[i], want, want.abs(), "silu_mul");
            }

            // The bound is inside the range of both inputs, so that each side of it is met.
            let (alpha, limit) = (1.702, 1.5);
            let mut gate = before.clone();
            k.clamped_swiglu(&mut gate, &b, alpha, limit);
            for i in 0..n {
                let g = f64::from(before[i]).min(f64::from(limit));
                let u = f64::from(b[i]).clamp(-f64::from(limit), f64::from(limit));
                let want = g / (1.0 + (-f64::from(alpha) * g).exp()) * (u + 1.0);
                close(gate[i], want, want.abs(), "clamped_swiglu");
            }

            for (beta, linear) in [(1.5, 2.0), (4.0, 0.0), (25.0, 30.0)] {
                let mut gate = before.clone();
                k.situ_mul(&mut gate, &b, beta, linear);
                for i in 0..n {
                    let bounded =
                        |x: f32, by: f32| f64::from(by) * (f64::from(x) / f64::from(by)).tanh();
                    let g = bounded(before[i], beta) / (1.0 + (-f64::from(before[i])).exp());
                    let u = if linear > 0.0 {
                        bounded(b[i], linear)
                    } else {
                        f64::from(b[i])
                    };
                    close(gate[i], g * u, (g * u).abs(), "situ_mul");
                }
            }
        }
    }
}

#[test]
fn exp_is_accurate_over_its_range() {
    for k in Kernels::available() {
        let x: Vec<f32> = (0..400_000)
            .map(|i| -86.4 + i as f32 * (175.1 / 400_000.0))
            .collect();
        let mut y = x.clone();
        k.exp(&mut y);
        for (x, y) in x.iter().zip(&y) {
            let want = f64::from(*x).exp();
            assert!(
                (f64::from(*y) - want).abs() <= 4e-7 * want,
                "{} exp({x}) = {y}, expected {want}",
                k.isa()
            );
        }
        let mut edge = [
            f32::NEG_INFINITY,
            -87.0,
            89.0,
            1e30,
            f32::INFINITY,
            f32::NAN,
            0.0,
            -0.0,
        ];
        k.exp(&mut edge);
        assert_eq!(
            edge[..5],
            [0.0, 0.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]
        );
        assert!(edge[5].is_nan() && edge[6] == 1.0 && edge[7] == 1.0);
    }
}

#[test]
fn the_eight_bit_form_is_the_same_everywhere() {
    let mut rng = Rng(7);
    for cols in [32, 224, 256, 320, 2048] {
        let mut x = rng.normals(cols);
        x[..3].copy_from_slice(&[0.0, 1e-38, -1e20]);
        let forms: Vec<_> = Kernels::available()
            .into_iter()
            .map(|k| {
                let mut acts = Activations::new(1, cols);
                acts.fill(k, 1, cols, &x, true);
                let blocks = acts.view().blocks().to_vec();
                blocks
                    .iter()
                    .map(|b| (b.q, b.scale.map(f32::to_bits), b.sums.map(f32::to_bits)))
                    .collect::<Vec<_>>()
            })
            .collect();
        assert!(forms.iter().all(|form| *form == forms[0]), "{cols} columns");
    }
    // What is not a number must not vanish in the rounding.
    let mut acts = Activations::new(1, 32);
    let mut x = [1.0; 32];
    x[5] = f32::NAN;
    acts.fill(Kernels::best(), 1, 32, &x, true);
    assert!(acts.view().blocks()[0].scale[0].is_nan());
}

#[test]
fn weights_and_outputs_check_their_sizes() {
    let bytes = [0u8; 144 * 3];
    assert!(Weights::new(TensorType::Q4_K, &bytes, 3, 256).is_some());
    assert!(Weights::new(TensorType::Q4_K, &bytes, 2, 256).is_none());
    assert!(Weights::new(TensorType::Q4_K, &bytes, 3, 255).is_none());
    assert!(Weights::new(TensorType::Q4_K, &bytes, usize::MAX, 256).is_none());
    let w = Weights::new(TensorType::Q4_K, &bytes, 3, 256).unwrap();
    assert!(
        w.row(3).is_none()
            && w.rows(1..4).is_none()
            && w.rows(1..3).is_some_and(|w| w.n_rows() == 2)
    );
    let mut out = [0.0; 5];
    let m = OutMatrix::new(&mut out, 3);
    assert!(
        m.holds(1, 3)
            && m.holds(2, 2)
            && !m.holds(2, 3)
            && !m.holds(1, 4)
            && !m.holds(usize::MAX, 1)
    );
}
