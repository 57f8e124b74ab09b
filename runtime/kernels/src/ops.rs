//! Element-wise operations and reductions between matmuls, each compiled for every instruction set
//! from one source.
//!
//! Plain Rust loops are enough here: the compiler vectorizes them for the features of the function
//! around them. `dispatch!` makes that function once per instruction set, and picks one at run
//! time.
//!
//! Sums run in 32 lanes that the compiler keeps in registers, so their order does not depend on the
//! instruction set's width. With and without fused multiply-add the last bits differ (`FUSED`).

use super::Kernels;
use half::f16;

/// Calls `$name::<true>` compiled for the instruction set of `$k`, or `$name::<false>` as plain
/// code.
macro_rules! dispatch {
    ($k:expr, $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn avx512($($arg: $ty),*) $(-> $out)? {
            $name::<true>($($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2($($arg: $ty),*) $(-> $out)? {
            $name::<true>($($arg),*)
        }
        match $k.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the `Kernels` value proves that the processor has the instructions.
            $crate::Isa::Amx | $crate::Isa::Avx512 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the `Kernels` value proves that the processor has the instructions.
            $crate::Isa::Avx2 => unsafe { avx2($($arg),*) },
            _ => $name::<false>($($arg),*),
        }
    }};
}

impl Kernels {
    /// Computes RMS norm: `out = x / sqrt(mean(x^2) + eps) * weight`; an empty `weight` stands for
    /// ones.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(
            x.len() == out.len() && (weight.is_empty() || weight.len() == x.len()),
            "lengths of a norm"
        );
        dispatch!(self, rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]))
    }

    /// Computes SwiGLU: `gate = silu(gate) * up`, where `silu(g) = g / (1 + exp(-g))`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "lengths of gate and up");
        dispatch!(self, silu_mul(gate: &mut [f32], up: &[f32]))
    }

    /// Computes `gate = gelu(gate) * up` with the tanh form of GELU (arXiv 1606.08415):
    /// `gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3)))`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn gelu_mul(self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "lengths of gate and up");
        dispatch!(self, gelu_mul(gate: &mut [f32], up: &[f32]))
    }

    /// Computes `gate = min(silu(gate), limit) * up` with up clamped to `-limit..=limit`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn limited_silu_mul(self, gate: &mut [f32], up: &[f32], limit: f32) {
        assert_eq!(gate.len(), up.len(), "lengths of gate and up");
        dispatch!(self, limited_silu_mul(gate: &mut [f32], up: &[f32], limit: f32))
    }

    /// Computes `gate = beta * tanh(gate / beta) * sigmoid(gate) * u`, where `u` is
    /// `linear * tanh(up / linear)`, or up itself where `linear` is 0.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn situ_mul(self, gate: &mut [f32], up: &[f32], beta: f32, linear: f32) {
        assert_eq!(gate.len(), up.len(), "lengths of gate and up");
        dispatch!(self, situ_mul(gate: &mut [f32], up: &[f32], beta: f32, linear: f32))
    }

    /// Computes the clamped SwiGLU of gpt-oss: `gate = g / (1 + exp(-alpha * g)) * (u + 1)`. There
    /// `g` is gate, at most `limit`, and `u` is up, clamped to `-limit..=limit`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn clamped_swiglu(self, gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
        assert_eq!(gate.len(), up.len(), "lengths of gate and up");
        dispatch!(self, clamped_swiglu(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32))
    }

    /// Computes `x = exp(x)` to a few units in the last place; 0 below -86.5, where results near
    /// the smallest float begin.
    #[inline]
    pub fn exp(self, x: &mut [f32]) {
        dispatch!(self, exp_all(x: &mut [f32]))
    }

    /// Computes `x += y`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn add(self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        dispatch!(self, add(x: &mut [f32], y: &[f32]))
    }

    /// Computes `y += a * x`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn axpy(self, a: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        dispatch!(self, axpy(a: f32, x: &[f32], y: &mut [f32]))
    }

    /// Returns the dot product of `a` and `b`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "lengths of a dot product");
        dispatch!(self, dot(a: &[f32], b: &[f32]) -> f32)
    }

    /// Rounds `x` to 16-bit floats, ties to even.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn to_f16(self, x: &[f32], out: &mut [f16]) {
        assert_eq!(x.len(), out.len(), "lengths of a conversion");
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions (AVX-512 comes with AVX2 and F16C); the
            // lengths are equal.
            crate::Isa::Amx | crate::Isa::Avx512 | crate::Isa::Avx2 => unsafe {
                super::x86::rows::narrow(x, out)
            },
            _ => {
                for (to, from) in out.iter_mut().zip(x) {
                    *to = f16::from_f32_const(*from);
                }
            }
        }
    }
}

/// Partial sums of a reduction.
pub(super) const LANES: usize = 32;

/// Returns `a * b + c`, rounded once where `FUSED`.
#[inline(always)]
pub(super) fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Folds pairs of elements into [`LANES`] partial sums, then adds those up, halving their number
/// each time.
#[inline(always)]
pub(super) fn lanes_sum<A: Copy, B: Copy>(
    a: &[A],
    b: &[B],
    step: impl Fn(f32, A, B) -> f32,
) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (lane, (a, b)) in lanes.iter_mut().zip(rest) {
        *lane = step(0.0, *a, *b);
    }
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = step(lanes[i], a[i], b[i]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn dot<const FUSED: bool>(a: &[f32], b: &[f32]) -> f32 {
    lanes_sum(a, b, |sum, a, b| fma::<FUSED>(a, b, sum))
}

#[inline(always)]
fn rms_norm<const FUSED: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    if x.is_empty() {
        return;
    }
    let factor = 1.0 / (dot::<FUSED>(x, x) / x.len() as f32 + eps).sqrt();
    if weight.is_empty() {
        for (to, x) in out.iter_mut().zip(x) {
            *to = x * factor;
        }
    } else {
        for ((to, x), w) in out.iter_mut().zip(x).zip(weight) {
            *to = x * factor * w;
        }
    }
}

/// Returns `e^x`. The range is reduced to `|r| <= ln(2) / 2`, where seven terms of the series are
/// exact to 1e-8.
#[inline(always)]
pub(super) fn exp<const FUSED: bool>(x: f32) -> f32 {
    /// 1.5 * 2^23: added to a small number and subtracted again, it rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // ln(2) in two parts, the first short enough for its product with a small integer to be exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Compared rather than clamped: a NaN goes through.
    let bounded = if x > 89.0 { 89.0 } else { x };
    let shifted = fma::<FUSED>(bounded, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FUSED>(n, -LN2_LOW, fma::<FUSED>(n, -LN2_HIGH, bounded));
    let mut p = 1.0 / 5040.0;
    for term in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = fma::<FUSED>(p, r, term);
    }
    // Half of 2^n, so that n = 128 (from 88.4 on) is in range; what is too large overflows in the
    // doubling.
    let exponent = (shifted.to_bits() as i32)
        .wrapping_sub(ROUND.to_bits() as i32)
        .wrapping_add(126);
    let value = p * f32::from_bits((exponent as u32) << 23) * 2.0;
    if x < -86.5 { 0.0 } else { value }
}

#[inline(always)]
fn exp_all<const FUSED: bool>(x: &mut [f32]) {
    for x in x {
        *x = exp::<FUSED>(*x);
    }
}

#[inline(always)]
fn silu_mul<const FUSED: bool>(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp::<FUSED>(-*g)) * u;
    }
}

#[inline(always)]
fn gelu_mul<const FUSED: bool>(gate: &mut [f32], up: &[f32]) {
    // As `1 + tanh(z) = 2 / (1 + e^(-2z))`, these are twice the factors in the formula.
    const LINEAR: f32 = 1.595_769;
    const CUBIC: f32 = LINEAR * 0.044_715;
    for (g, u) in gate.iter_mut().zip(up) {
        let z = *g * fma::<FUSED>(CUBIC * *g, *g, LINEAR);
        *g = *g / (1.0 + exp::<FUSED>(-z)) * u;
    }
}

#[inline(always)]
fn limited_silu_mul<const FUSED: bool>(gate: &mut [f32], up: &[f32], limit: f32) {
    for (g, u) in gate.iter_mut().zip(up) {
        // Compared rather than clamped: a NaN goes through.
        let gated = *g / (1.0 + exp::<FUSED>(-*g));
        let gated = if gated > limit { limit } else { gated };
        let below = if *u > limit { limit } else { *u };
        let up = if below < -limit { -limit } else { below };
        *g = gated * up;
    }
}

#[inline(always)]
fn situ_mul<const FUSED: bool>(gate: &mut [f32], up: &[f32], beta: f32, linear: f32) {
    for (g, u) in gate.iter_mut().zip(up) {
        let bounded = beta * tanh::<FUSED>(*g / beta);
        let up = if linear > 0.0 {
            linear * tanh::<FUSED>(*u / linear)
        } else {
            *u
        };
        *g = bounded / (1.0 + exp::<FUSED>(-*g)) * up;
    }
}

/// Returns the hyperbolic tangent: near 0 the first terms of its series, which have no difference of
/// near numbers, and elsewhere `(1 - t) / (1 + t)` with `t = e^(-2|x|)`.
#[inline(always)]
pub(super) fn tanh<const FUSED: bool>(x: f32) -> f32 {
    let square = x * x;
    let mut series = -1382.0 / 155_925.0;
    for term in [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
        series = fma::<FUSED>(series, square, term);
    }
    let t = exp::<FUSED>(-2.0 * x.abs());
    let far = ((1.0 - t) / (1.0 + t)).copysign(x);
    if x.abs() < 0.3 { series * x } else { far }
}

#[inline(always)]
fn clamped_swiglu<const FUSED: bool>(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
    for (g, u) in gate.iter_mut().zip(up) {
        // Compared rather than clamped: a NaN goes through.
        let gated = if *g > limit { limit } else { *g };
        let below = if *u > limit { limit } else { *u };
        let up = if below < -limit { -limit } else { below };
        *g = gated / (1.0 + exp::<FUSED>(-alpha * gated)) * (up + 1.0);
    }
}

#[inline(always)]
fn add<const FUSED: bool>(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[inline(always)]
fn axpy<const FUSED: bool>(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = fma::<FUSED>(a, *x, *y);
    }
}
