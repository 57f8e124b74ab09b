//! Matmuls of every format.

use super::*;

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
fn many_tokens_and_rows_are_cut_into_blocks() {
    // More tokens, and more rows, than a cache holds at a time; the last of both are fewer.
    const TOKENS: usize = 53;
    const COLS: usize = 8192;
    let mut rng = Rng(31);
    for k in Kernels::available() {
        for ty in [TensorType::Q4_K, TensorType::Q6_K, TensorType::Q8_0] {
            let rows = 5 * BAND_ROWS;
            let mut bytes = random_weights(ty, rows, COLS, &mut rng);
            k.interleave(ty, bytes.len() / rows, &mut bytes);
            let w = Weights::new(ty, &bytes, rows, COLS).unwrap();
            let w = w.in_order(RowOrder::Interleaved).unwrap();
            let mut acts = Activations::new(TOKENS, COLS);
            acts.fill(k, TOKENS, COLS, &rng.normals(TOKENS * COLS), true);
            let product = |tokens: std::ops::Range<usize>| {
                let mut out = vec![0.0; tokens.len() * rows];
                let x = acts.view().rows_range(tokens);
                // SAFETY: one thread.
                unsafe { k.matmul(w, 0..rows, x, OutMatrix::new(&mut out, rows)) };
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let together = product(0..TOKENS);
            for (token, sums) in together.chunks_exact(rows).enumerate() {
                let alone = product(token..token + 1);
                assert!(sums == alone, "{} {ty}, token {token}", k.isa());
            }
        }
    }
}
