use super::*;
use crate::tests::Rng;

/// Widths with and without a last short block, of whole registers and not.
const WIDTHS: [usize; 10] = [1, 7, 16, 24, 32, 33, 64, 80, 128, 200];

#[test]
fn rows_in_8_bits_take_the_bytes_that_they_say() {
    let bytes = [
        (1, 3),
        (16, 18),
        (24, 26),
        (32, 34),
        (33, 37),
        (64, 68),
        (80, 86),
        (128, 136),
        (576, 612),
    ];
    for (width, expected) in bytes {
        assert_eq!(q8_row_bytes(width), expected, "{width}");
    }
}

#[test]
fn rows_in_8_bits_come_back_to_half_a_step() {
    let mut rng = Rng(1);
    for kernels in Kernels::available() {
        for width in WIDTHS {
            for size in [1.0, 3e-7, 1e-4, 300.0, 5e6] {
                let x: Vec<f32> = (0..3 * width)
                    .map(|_| size * rng.normal().clamp(-1.6, 1.6))
                    .collect();
                let mut bytes = vec![0xaa; 3 * q8_row_bytes(width)];
                for (x, bytes) in x
                    .chunks_exact(width)
                    .zip(bytes.chunks_exact_mut(q8_row_bytes(width)))
                {
                    kernels.to_q8(x, bytes);
                }
                let mut back = vec![f32::NAN; x.len()];
                kernels.from_q8(&bytes, width, &mut back);
                for (x, back) in x.chunks_exact(width).zip(back.chunks_exact(width)) {
                    for (x, back) in x.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                        let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        // A scale is rounded up: by a 1024th, or to the next multiple of the least
                        // 16-bit float.
                        let step =
                            (largest / 127.0 * (1.0 + 1.0 / 1024.0)).max(largest / 127.0 + 6e-8);
                        for (x, back) in x.iter().zip(back) {
                            assert!(
                                (x - back).abs() <= 0.5001 * step,
                                "{kernels:?} {width} {x} {back} {step}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_stores_the_same_bytes() {
    let mut rng = Rng(2);
    for width in WIDTHS {
        let x = rng.normals(width);
        let mut expected = vec![0; q8_row_bytes(width)];
        Kernels::SCALAR.to_q8(&x, &mut expected);
        let mut wide = vec![0.0; width];
        Kernels::SCALAR.from_q8(&expected, width, &mut wide);
        for kernels in Kernels::available() {
            let mut bytes = vec![1; expected.len()];
            kernels.to_q8(&x, &mut bytes);
            assert_eq!(bytes, expected, "{kernels:?} {width}");
            let mut back = vec![1.0; width];
            kernels.from_q8(&bytes, width, &mut back);
            assert_eq!(back, wide, "{kernels:?} {width}");
        }
    }
}

#[test]
fn a_whole_block_is_a_block_of_q8_0() {
    use crate::quant::{TensorType, dequantize_row};
    let x = Rng(3).normals(96);
    let mut bytes = vec![0; q8_row_bytes(96)];
    Kernels::best().to_q8(&x, &mut bytes);
    let (mut ours, mut theirs) = (vec![0.0; 96], vec![1.0; 96]);
    Kernels::best().from_q8(&bytes, 96, &mut ours);
    dequantize_row(TensorType::Q8_0, &bytes, &mut theirs);
    assert_eq!(ours, theirs);
}

#[test]
fn what_8_bits_cannot_hold_is_not_hidden() {
    for kernels in Kernels::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e7, -3e38] {
            let mut x = vec![1.0; 70];
            x[40] = bad;
            let mut bytes = vec![0; q8_row_bytes(70)];
            kernels.to_q8(&x, &mut bytes);
            let mut back = vec![0.0; 70];
            kernels.from_q8(&bytes, 70, &mut back);
            assert!(
                back[32..64].iter().all(|v| v.is_nan()),
                "{kernels:?} {bad}: {back:?}"
            );
            assert!(
                back[..32]
                    .iter()
                    .chain(&back[64..])
                    .all(|v| (v - 1.0).abs() < 1e-2),
                "{kernels:?} {bad}"
            );
        }
        let mut bytes = vec![1; q8_row_bytes(40)];
        kernels.to_q8(&[0.0; 40], &mut bytes);
        assert_eq!(bytes, [0; 44]);
    }
}

#[test]
fn sixteen_bits_widen_exactly() {
    let all: Vec<f16> = (0..=u16::MAX)
        .map(f16::from_bits)
        .filter(|v| !v.is_nan())
        .collect();
    for kernels in Kernels::available() {
        for n in [0, 1, 7, 8, 9, all.len()] {
            let mut out = vec![f32::NAN; n];
            kernels.from_f16(&all[all.len() - n..], &mut out);
            assert!(
                out.iter()
                    .zip(&all[all.len() - n..])
                    .all(|(a, b)| *a == b.to_f32()),
                "{kernels:?} {n}"
            );
        }
    }
}

/// Random rows stored in each way, and what they widen to.
fn stored(width: usize, n_rows: usize, rng: &mut Rng) -> (Vec<f32>, Vec<f16>, Vec<u8>) {
    let x = rng.normals(n_rows * width);
    let half = x.iter().map(|v| f16::from_f32(*v)).collect();
    let mut bytes = vec![0; n_rows * q8_row_bytes(width)];
    for (x, bytes) in x
        .chunks_exact(width)
        .zip(bytes.chunks_exact_mut(q8_row_bytes(width)))
    {
        Kernels::SCALAR.to_q8(x, bytes);
    }
    (x, half, bytes)
}

fn widened(kernels: Kernels, rows: StoredRows<'_>, width: usize) -> Vec<f32> {
    let mut wide = vec![f32::NAN; rows.count(width) * width];
    kernels.widen_rows(rows, width, &mut wide);
    wide
}

/// Returns rows that are read again next, which changes no result.
fn with_next(rows: StoredRows<'_>, width: usize) -> RowBlock<'_> {
    RowBlock {
        next: rows.bytes(),
        ..RowBlock::new(rows, width)
    }
}

#[test]
fn dots_are_the_formula_and_do_not_depend_on_their_neighbors() {
    let mut rng = Rng(4);
    for kernels in Kernels::available() {
        for width in WIDTHS {
            let (n_queries, n_rows, stride) = (7, 11, 13);
            let queries = rng.normals(n_queries * width);
            let (full, half, bytes) = stored(width, n_rows, &mut rng);
            for rows in [
                StoredRows::F32(&full),
                StoredRows::F16(&half),
                StoredRows::Q8(&bytes),
            ] {
                let wide = widened(kernels, rows, width);
                let mut scores = vec![-7.0; n_queries * stride];
                kernels.row_dots(&queries, with_next(rows, width), &mut scores, stride);
                for (q, query) in queries.chunks_exact(width).enumerate() {
                    for (r, row) in wide.chunks_exact(width).enumerate() {
                        let products = || {
                            query
                                .iter()
                                .zip(row)
                                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        };
                        let (want, size): (f64, f64) =
                            (products().sum(), products().map(f64::abs).sum());
                        let found = scores[q * stride + r];
                        assert!(
                            (f64::from(found) - want).abs() <= 1e-6 * size,
                            "{kernels:?} {width} {q} {r}"
                        );
                        for row in [rows.range(r..r + 1, width), StoredRows::F32(row)] {
                            let mut alone = [0.0];
                            kernels.row_dots(query, RowBlock::new(row, width), &mut alone, 1);
                            assert_eq!(
                                alone[0].to_bits(),
                                found.to_bits(),
                                "{kernels:?} {width} {q} {r} {row:?}"
                            );
                        }
                    }
                    let between = &scores[q * stride + n_rows..(q + 1) * stride];
                    assert!(
                        between.iter().all(|s| *s == -7.0),
                        "{kernels:?}: what is between the rows stays"
                    );
                }
                let mut none = [5.0];
                kernels.row_dots(
                    &queries,
                    RowBlock::new(rows.range(3..3, width), width),
                    &mut none,
                    1,
                );
                kernels.row_dots(&[], RowBlock::new(rows, width), &mut none, 1);
                assert_eq!(none, [5.0]);
            }
        }
    }
}

#[test]
fn mixtures_are_the_formula_and_do_not_depend_on_their_neighbors() {
    let mut rng = Rng(5);
    for kernels in Kernels::available() {
        for (width, out_width) in
            WIDTHS
                .map(|w| (w, w))
                .into_iter()
                .chain([(96, 64), (576, 512), (40, 9)])
        {
            let (n_queries, n_rows, stride) = (7, 5, 6);
            let (full, half, bytes) = stored(width, n_rows, &mut rng);
            let (weights, old) = (
                rng.normals(n_queries * stride),
                rng.normals(n_queries * out_width),
            );
            for rows in [
                StoredRows::F32(&full),
                StoredRows::F16(&half),
                StoredRows::Q8(&bytes),
            ] {
                let wide = widened(kernels, rows, width);
                let mut out = old.clone();
                kernels.add_weighted_rows(
                    &weights,
                    stride,
                    with_next(rows, width),
                    &mut out,
                    out_width,
                );
                for q in 0..n_queries {
                    let weights = &weights[q * stride..][..n_rows];
                    for i in 0..out_width {
                        let term =
                            |(r, w): (usize, &f32)| f64::from(*w) * f64::from(wide[r * width + i]);
                        let terms = || weights.iter().enumerate().map(term);
                        let before = f64::from(old[q * out_width + i]);
                        let want = before + terms().sum::<f64>();
                        let size = before.abs() + terms().map(f64::abs).sum::<f64>();
                        let found = f64::from(out[q * out_width + i]);
                        assert!(
                            (found - want).abs() <= 1e-6 * size,
                            "{kernels:?} {width} {out_width} {q} {i}"
                        );
                    }
                    // Alone, and row by row, every other one widened before.
                    let mut alone = old[q * out_width..][..out_width].to_vec();
                    for (r, weight) in weights.iter().enumerate() {
                        let row = match r % 2 {
                            0 => rows.range(r..r + 1, width),
                            _ => StoredRows::F32(&wide[r * width..(r + 1) * width]),
                        };
                        kernels.add_weighted_rows(
                            &[*weight],
                            1,
                            RowBlock::new(row, width),
                            &mut alone,
                            out_width,
                        );
                    }
                    let same = alone
                        .iter()
                        .zip(&out[q * out_width..])
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{kernels:?} {width} {out_width} {q}");
                }
            }
        }
    }
}

#[test]
fn softmax_numerators_match_the_formula() {
    let mut rng = Rng(6);
    for kernels in Kernels::available() {
        assert_eq!(kernels.exp_minus_max(&mut []), (f32::NEG_INFINITY, 0.0));
        for n in [1, 5, 31, 32, 33, 100, 256] {
            let x: Vec<f32> = rng.normals(n).into_iter().map(|v| 8.0 * v).collect();
            let mut found = x.clone();
            let (largest, sum) = kernels.exp_minus_max(&mut found);
            assert_eq!(largest, x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let want: Vec<f64> = x.iter().map(|v| f64::from(v - largest).exp()).collect();
            for (found, want) in found.iter().zip(&want) {
                assert!(
                    (f64::from(*found) - want).abs() <= 1e-6 * want + 1e-37,
                    "{kernels:?} {n}"
                );
            }
            assert!(
                (f64::from(sum) / want.iter().sum::<f64>() - 1.0).abs() < 1e-6,
                "{kernels:?} {n}"
            );
        }
        let (_, sum) = kernels.exp_minus_max(&mut [1.0, f32::NAN]);
        assert!(sum.is_nan(), "{kernels:?}: a NaN is not hidden");
    }
}

#[test]
fn axpby_matches_the_formula() {
    for kernels in Kernels::available() {
        let mut y = vec![1.0, 2.0, -3.0];
        kernels.axpby(0.5, &mut y, 2.0, &[4.0, 0.25, 1.0]);
        assert_eq!(y, [8.5, 1.5, 0.5]);
        kernels.axpby(1.0, &mut y, 0.0, &[7.0, 7.0, 7.0]);
        assert_eq!(y, [8.5, 1.5, 0.5]);
    }
}

#[cfg(unix)]
#[test]
#[cfg_attr(miri, ignore = "Miri knows the ends of buffers itself")]
fn nothing_past_the_end_is_read_or_written() {
    use crate::tests::Guarded;
    let mut rng = Rng(7);
    let (mut memory, mut others, mut result) = (Guarded::new(), Guarded::new(), Guarded::new());
    for kernels in Kernels::available() {
        for width in 1..70 {
            for (n_queries, n_rows) in [(1, 1), (3, 5), (6, 4)] {
                let (full, half, bytes) = stored(width, n_rows, &mut rng);
                let values = rng.normals(n_queries * width);
                for kind in 0..3 {
                    let rows = match kind {
                        0 => {
                            let rows = memory.last::<f32>(full.len());
                            rows.copy_from_slice(&full);
                            StoredRows::F32(rows)
                        }
                        1 => {
                            let rows = memory.last::<f16>(half.len());
                            rows.copy_from_slice(&half);
                            StoredRows::F16(rows)
                        }
                        _ => {
                            let rows = memory.last::<u8>(bytes.len());
                            rows.copy_from_slice(&bytes);
                            StoredRows::Q8(rows)
                        }
                    };
                    let wide = result.last::<f32>(full.len());
                    kernels.widen_rows(rows, width, wide);
                    assert!(wide.iter().all(|v| v.is_finite()));
                    let queries = others.last::<f32>(values.len());
                    queries.copy_from_slice(&values);
                    let scores = result.last::<f32>(n_queries * n_rows);
                    kernels.row_dots(queries, with_next(rows, width), scores, n_rows);
                    assert!(scores.iter().all(|v| v.is_finite()));
                    let weights = others.last::<f32>(n_queries * n_rows);
                    weights.copy_from_slice(scores);
                    let out = result.last::<f32>(n_queries * width);
                    out.fill(0.0);
                    kernels.add_weighted_rows(weights, n_rows, with_next(rows, width), out, width);
                    assert!(out.iter().all(|v| v.is_finite()));
                }
                let row = result.last::<u8>(q8_row_bytes(width));
                kernels.to_q8(&full[..width], row);
            }
        }
    }
}
