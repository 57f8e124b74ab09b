//! Registers of floats, so that one source of a float kernel serves every instruction set.
//!
//! [`Lanes`] is implemented by the register types themselves: `__m256` (8 lanes), `__m512` (16
//! lanes), and a pair of `float32x4_t` (8 lanes). A kernel is written once as an
//! `#[inline(always)]` function over `L: Lanes`. A thin wrapper with `#[target_feature]` calls it
//! with the register type, and is the only thing that is compiled for the set:
//!
//! ```text
//! #[inline(always)]               // has no features of its own: inherits those of its caller
//! unsafe fn float_panel<L: Lanes, W, const N>(panel) { ... L::mul_add(w, x, sum) ... }
//!
//! #[target_feature(enable = "avx2,fma,f16c")]
//! unsafe fn float<W, const N>(panel)                 { float_panel::<__m256, W, N>(panel) }
//! ```
//!
//! Nothing here may be called from code that is compiled for less than the register's instruction
//! set: the intrinsics would then be real calls that pass registers through memory.

/// A register of [`COUNT`](Self::COUNT) floats.
///
/// # Safety of all functions
/// The caller is compiled for the instruction set that the register belongs to, and the processor
/// has it. Pointers need no alignment.
pub(super) trait Lanes: Copy {
    /// Floats in the register.
    const COUNT: usize;

    /// Returns zeros.
    ///
    /// # Safety
    /// See [`Lanes`].
    unsafe fn zero() -> Self;

    /// Loads `COUNT` 32-bit floats.
    ///
    /// # Safety
    /// `4 * COUNT` bytes can be read; see [`Lanes`].
    unsafe fn load_f32(p: *const u8) -> Self;

    /// Loads `COUNT` 16-bit floats and widens them.
    ///
    /// # Safety
    /// `2 * COUNT` bytes can be read; see [`Lanes`].
    unsafe fn load_f16(p: *const u8) -> Self;

    /// Loads `COUNT` bfloat16 values and widens them.
    ///
    /// # Safety
    /// `2 * COUNT` bytes can be read; see [`Lanes`].
    unsafe fn load_bf16(p: *const u8) -> Self;

    /// Returns `a * b + c`, rounded once.
    ///
    /// # Safety
    /// See [`Lanes`].
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self;

    /// Returns the sum of all lanes of two registers, added in an order that the instruction set
    /// fixes.
    ///
    /// # Safety
    /// See [`Lanes`].
    unsafe fn sum_both(a: Self, b: Self) -> f32;

    /// Prefetches the `bytes` bytes that a kernel reads some hundred bytes after `p`, where that
    /// pays.
    #[inline(always)]
    fn prefetch(_p: *const u8, _bytes: usize) {}
}
