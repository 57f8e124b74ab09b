//! Every kernel against plain code that shares nothing with it, on every instruction set of this
//! processor.

mod matmul;

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
