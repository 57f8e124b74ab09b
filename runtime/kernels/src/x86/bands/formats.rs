//! Unpacking a run of each row of a band, in the registers that the kernels multiply.
//!
//! Codes are unsigned or signed, as the format has them; see [`Words`] for what instruction sets
//! make of the signed ones. An unsigned code that stands for a number with a sign has an offset, a
//! power of two, which the kernels take off the dot product again.

use super::words::Words;
use crate::bands::{BandLayout, LINE_BYTES};
use crate::quant::TensorType;
use crate::quant::iq4_nl::IQ4_LEVELS;
use crate::quant::mxfp4::MXFP4_LEVELS;
use crate::x86::lanes::PartialLanes;

/// 32 values of each row of a register.
#[derive(Clone, Copy)]
pub(super) struct Run<W: Words> {
    /// Codes: register `i` has values `4 i` to `4 i + 4` of every row.
    pub q: [W; 8],
    /// Scales of the rows, for the first and the second 16 values; the first is for all 32 where
    /// the format has a scale per 32.
    pub scale: [W::Floats; 2],
    /// Minimums, which are subtracted, as `scale`; zero for a format with an offset.
    pub min: [W::Floats; 2],
}

/// A format with bands.
pub(super) trait BandFormat<W: Words> {
    const TYPE: TensorType;
    /// Runs of 32 values per block.
    const RUNS: usize;
    /// Whether scales and minimums are per 16 values; otherwise they are per 32.
    const SCALE_PER_16: bool = false;
    /// Whether tiles multiply it: they know a minimum per 32 values only.
    const HAS_TILES: bool = !Self::SCALE_PER_16 || Self::OFFSET_BITS.is_some();
    /// Largest magnitude of a code.
    const MAX_CODE: usize;
    /// Whether codes have a sign: those are made by [`Words::signed`].
    const SIGNED: bool = false;
    /// Binary logarithm of what codes are too large by, for a format without minimums; of signed
    /// ones, where [`Words::signed`] makes them so.
    const OFFSET_BITS: Option<usize> = None;
    /// Whether unpacking with AVX-512 takes VBMI, which not every processor of `Isa::Avx512` has.
    const NEEDS_VBMI: bool = false;
    const LAYOUT: BandLayout = match crate::bands::layout(Self::TYPE) {
        Some(layout) => layout,
        None => panic!("a format without bands"),
    };
    /// What all runs of a block share.
    type Head: Copy;

    /// Unpacks what the runs of a block share.
    ///
    /// # Safety
    /// The lines and the rest of a block can be read; see [`Words`].
    unsafe fn head(lines: *const u8, rest: *const u8) -> Self::Head;

    /// Unpacks run `J` of a block.
    ///
    /// # Safety
    /// As [`head`](Self::head).
    unsafe fn run<const J: usize>(lines: *const u8, head: Self::Head) -> Run<W>;
}

/// Kinds of codes: what they are too large by, their largest magnitude, and whether they are
/// signed.
macro_rules! codes {
    (unsigned $max:expr) => {
        const MAX_CODE: usize = $max;
    };
    (offset $bits:literal $max:expr) => {
        const MAX_CODE: usize = $max;
        const OFFSET_BITS: Option<usize> = Some($bits);
    };
    (signed $max:expr) => {
        const MAX_CODE: usize = $max;
        const SIGNED: bool = true;
        const OFFSET_BITS: Option<usize> = Some(7);
    };
}

/// Declares a format.
macro_rules! band {
    (
        $(#[$doc:meta])* $name:ident, $runs:expr, $fine:expr, ($($codes:tt)*), $head:ty,
        |$lines:ident, $rest:ident| $make_head:expr,
        |$j:ident, $at:ident, $of:ident| $body:expr
    ) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;

        impl<W: Words> BandFormat<W> for $name {
            const TYPE: TensorType = TensorType::$name;
            const RUNS: usize = $runs;
            const SCALE_PER_16: bool = $fine;
            codes!($($codes)*);
            type Head = $head;

            #[inline(always)]
            unsafe fn head($lines: *const u8, $rest: *const u8) -> $head {
                let _ = ($lines, $rest);
                // SAFETY: everything read lies within the caller's block.
                unsafe { $make_head }
            }

            #[inline(always)]
            unsafe fn run<const $j: usize>($at: *const u8, $of: $head) -> Run<W> {
                // SAFETY: everything read lies within the caller's block.
                unsafe { $body }
            }
        }
    };
}

/// Loads a line, or the half of it that a register has room for.
///
/// # Safety
/// It can be read; see [`Words`].
#[inline(always)]
pub(super) unsafe fn line<W: Words>(lines: *const u8, i: usize) -> W {
    // SAFETY: the caller's line.
    unsafe { W::load(lines.add(i * LINE_BYTES)) }
}

/// Returns a run with one scale for all of it, and no minimum.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn without_min<W: Words>(q: [W; 8], scale: W::Floats) -> Run<W> {
    // SAFETY: the caller's processor.
    let min = [unsafe { W::Floats::splat(0.0) }; 2];
    Run {
        q,
        scale: [scale; 2],
        min,
    }
}

/// Returns a run with one scale for all of it, and an addend.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn with_addend<W: Words>(q: [W; 8], [scale, addend]: [W::Floats; 2]) -> Run<W> {
    // SAFETY: the caller's processor.
    let min = [unsafe { W::neg_mul_add(addend, W::Floats::splat(1.0), W::Floats::splat(0.0)) }; 2];
    Run {
        q,
        scale: [scale; 2],
        min,
    }
}

/// Loads four lines of nibbles: the low halves are the first 16 values, the high ones the rest.
///
/// # Safety
/// The four lines from `first` on can be read; see [`Words`].
#[inline(always)]
unsafe fn sixteen_and_sixteen<W: Words>(lines: *const u8, first: usize) -> [W; 8] {
    // SAFETY: the caller's lines.
    unsafe {
        let mask = W::bytes(15);
        let mut q = [mask; 8];
        for i in 0..4 {
            let bytes: W = line(lines, first + i);
            q[i] = bytes.and(mask);
            q[4 + i] = bytes.right(4).and(mask);
        }
        q
    }
}

/// Returns what 4-bit codes stand for, as [`look_up`] takes it.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn table<W: Words>(levels: &[i8; 16]) -> W {
    let word = |i: usize| i32::from_le_bytes(std::array::from_fn(|k| levels[4 * i + k] as u8));
    // SAFETY: the caller's processor.
    unsafe { W::quads([word(0), word(1), word(2), word(3)]) }
}

/// Replaces 4-bit codes by what a table has for them.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn look_up<W: Words>(mut q: [W; 8], table: W) -> [W; 8] {
    for q in &mut q {
        // SAFETY: the caller's processor.
        *q = unsafe { table.shuffle(*q) };
    }
    q
}

/// Puts a fifth bit on top of each code: bit `k` of a row's word is that of value `k`.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn with_fifth_bits<W: Words>(mut q: [W; 8], fifth: W) -> [W; 8] {
    // SAFETY: the caller's processor.
    unsafe {
        let bit = [W::all(0x0804_0201), W::all(0x8040_2010_u32 as i32)];
        for (i, q) in q.iter_mut().enumerate() {
            // In each word, the byte of `fifth` that has the bits of these four values, four times.
            let byte = i as i32 / 2;
            let each = [0, 4, 8, 12].map(|first| 0x0101_0101 * (first + byte));
            *q = q.add_where(fifth.shuffle(W::quads(each)), bit[i % 2], 16);
        }
    }
    q
}

band!(
    /// A scale per 32 values, 16 bytes of codes, 8 too large.
    Q4_0, 1, false, (offset 3 15), W::Floats,
    |_lines, rest| W::load_halves(rest),
    |J, lines, head| without_min(sixteen_and_sixteen(lines, 0), head)
);

band!(
    /// A word of scale and addend, 16 bytes of codes.
    Q4_1, 1, false, (unsigned 15), [W::Floats; 2],
    |lines, _rest| line::<W>(lines, 0).two_halves(),
    |J, lines, head| with_addend(sixteen_and_sixteen(lines, 1), head)
);

band!(
    /// A scale, a word of fifth bits, 16 bytes of codes, 16 too large.
    Q5_0, 1, false, (offset 4 31), W::Floats,
    |_lines, rest| W::load_halves(rest),
    |J, lines, head| {
        without_min(with_fifth_bits(sixteen_and_sixteen(lines, 1), line(lines, 0)), head)
    }
);

band!(
    /// A word of scale and addend, a word of fifth bits, 16 bytes of codes.
    Q5_1, 1, false, (unsigned 31), [W::Floats; 2],
    |lines, _rest| line::<W>(lines, 0).two_halves(),
    |J, lines, head| {
        with_addend(with_fifth_bits(sixteen_and_sixteen(lines, 2), line(lines, 1)), head)
    }
);

band!(
    /// A scale, 32 signed bytes.
    Q8_0, 1, false, (signed 128), W::Floats,
    |_lines, rest| W::load_halves(rest),
    |J, lines, head| {
        let mut q = [W::all(0); 8];
        for (i, q) in q.iter_mut().enumerate() {
            *q = line::<W>(lines, i).signed();
        }
        without_min(q, head)
    }
);

band!(
    /// A scale, 16 bytes of indices of levels.
    IQ4_NL, 1, false, (signed 128), W::Floats,
    |_lines, rest| W::load_halves(rest),
    |J, lines, head| {
        let levels = table::<W>(&IQ4_LEVELS).signed();
        without_min(look_up(sixteen_and_sixteen(lines, 0), levels), head)
    }
);

band!(
    /// An exponent, 16 bytes of indices of levels, which are made 16 too large.
    MXFP4, 1, false, (offset 4 28), W::Floats,
    |_lines, rest| W::load_exponents(rest),
    |J, lines, head| {
        let levels = table(&MXFP4_LEVELS.map(|level| level + 16));
        without_min(look_up(sixteen_and_sixteen(lines, 0), levels), head)
    }
);

/// What the runs of a Q4_K or Q5_K block share.
#[derive(Clone, Copy)]
pub(super) struct KHead<W: Words> {
    /// Factors of scales and minimums.
    d: [W::Floats; 2],
    /// The three words of scales and minimums.
    packed: [W; 3],
}

/// Unpacks [`KHead`] from a block's first four lines.
///
/// # Safety
/// They can be read; see [`Words`].
#[inline(always)]
unsafe fn k_head<W: Words>(lines: *const u8) -> KHead<W> {
    // SAFETY: the caller's lines.
    unsafe {
        KHead {
            d: line::<W>(lines, 0).two_halves(),
            packed: [line(lines, 1), line(lines, 2), line(lines, 3)],
        }
    }
}

/// Unpacks the scale and the minimum of run `j`, as `scales_and_mins` does for all eight.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn k_scale<W: Words>(head: KHead<W>, j: usize) -> [W::Floats; 2] {
    let [a, b, c] = head.packed;
    // SAFETY: the caller's processor.
    unsafe {
        let (scale, min) = if j < 4 {
            let six = W::all(63);
            (a.right(8 * j).and(six), b.right(8 * j).and(six))
        } else {
            let (i, four, two) = (j - 4, W::all(15), W::all(0x30));
            let (low, high) = (c.right(8 * i).and(four), c.right(8 * i + 4).and(four));
            (
                low.or_and(a.right(8 * i + 2), two),
                high.or_and(b.right(8 * i + 2), two),
            )
        };
        [
            W::mul(scale.to_floats(), head.d[0]),
            W::mul(min.to_floats(), head.d[1]),
        ]
    }
}

band!(
    /// Two factors, 12 bytes of scales and minimums, 128 bytes of codes.
    Q4_K, 8, false, (unsigned 15), KHead<W>,
    |lines, _rest| k_head(lines),
    |J, lines, head| {
        let [scale, min] = k_scale(head, J);
        let odd = J % 2 == 1;
        // The high halves, of odd runs, stay where they are if they may: sixteen times too large.
        let in_place = odd && W::WIDE_CODES;
        let mask = W::bytes(if in_place { 0xf0 } else { 15 });
        let mut q = [mask; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let line: W = line(lines, 4 + J / 2 * 8 + i);
            *q = if odd && !in_place { line.right(4) } else { line }.and(mask);
        }
        let factor = W::Floats::splat(1.0 / 16.0);
        let scale = if in_place { W::mul(scale, factor) } else { scale };
        Run { q, scale: [scale; 2], min: [min; 2] }
    }
);

band!(
    /// As Q4_K with 32 bytes of fifth bits before the codes.
    Q5_K, 8, false, (unsigned 31), KHead<W>,
    |lines, _rest| k_head(lines),
    |J, lines, head| {
        let [scale, min] = k_scale(head, J);
        let (four, sixteen) = (W::bytes(15), W::bytes(16));
        let mut q = [four; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let low: W = line(lines, 12 + J / 2 * 8 + i);
            let low = if J % 2 == 1 { low.right(4) } else { low };
            let fifth: W = line(lines, 4 + i);
            let fifth = if J < 4 { fifth.left(4 - J) } else { fifth.right(J - 4) };
            *q = low.and(four).or_and(fifth, sixteen);
        }
        Run { q, scale: [scale; 2], min: [min; 2] }
    }
);

/// Returns the codes at bits `2 part` of the bytes of eight lines from `first` on, and what undoes
/// that they are too large: they stay where they are if they may.
///
/// # Safety
/// The lines can be read; see [`Words`].
#[inline(always)]
unsafe fn two_bits<W: Words>(lines: *const u8, first: usize, part: usize) -> ([W; 8], f32) {
    // SAFETY: the caller's lines.
    unsafe {
        let shift = if W::WIDE_CODES { 0 } else { 2 * part };
        let mask = W::bytes(3 << (2 * part - shift));
        let mut q = [mask; 8];
        for (i, q) in q.iter_mut().enumerate() {
            *q = line::<W>(lines, first + i).right(shift).and(mask);
        }
        (q, 1.0 / f32::from(1u8 << (2 * part - shift)))
    }
}

band!(
    /// 16 bytes of scales and minimums, 64 bytes of codes, two factors.
    Q2_K, 8, true, (unsigned 3), [W::Floats; 2],
    |lines, _rest| line::<W>(lines, 20).two_halves(),
    |J, lines, head| {
        let (q, factor) = two_bits::<W>(lines, 4 + J / 4 * 8, J % 4);
        let factor = W::mul(head[0], W::Floats::splat(factor));
        // Four bytes of a scale and a minimum each.
        let words: W = line(lines, J / 2);
        let (mut scale, mut min) = ([factor; 2], [factor; 2]);
        for i in 0..2 {
            let at = 8 * (2 * (J % 2) + i);
            let four = W::all(15);
            scale[i] = W::mul(words.right(at).and(four).to_floats(), factor);
            min[i] = W::mul(words.right(at + 4).and(four).to_floats(), head[1]);
        }
        Run { q, scale, min }
    }
);

band!(
    /// 32 bytes of third bits, 64 bytes of codes, 12 bytes of scales, one factor. Codes are 4 too
    /// large.
    Q3_K, 8, true, (offset 2 7), W::Floats,
    |_lines, rest| W::load_halves(rest),
    |J, lines, head| {
        let (low, third) = (W::bytes(3), W::bytes(4));
        let mut q = [low; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let codes: W = line(lines, 8 + J / 4 * 8 + i);
            let bits: W = line(lines, i);
            let bits = if J < 2 { bits.left(2 - J) } else { bits.right(J - 2) };
            *q = codes.right(J % 4 * 2).and(low).or_and(bits, third);
        }
        // Of two of the three words, one has the low four bits of a scale, and the third the others.
        let part = J / 2;
        let words: W = line(lines, 24 + part % 2);
        let highs: W = line(lines, 26);
        let mut scale = [head; 2];
        for (i, scale) in scale.iter_mut().enumerate() {
            let byte = 2 * (J % 2) + i;
            let low = words.right(8 * byte + part / 2 * 4).and(W::all(15));
            let high = highs.right(8 * byte + 2 * part).left(4);
            let code = low.or_and(high, W::all(0x30)).add(W::all(-32));
            *scale = W::mul(code.to_floats(), head);
        }
        Run { q, scale, min: [W::Floats::splat(0.0); 2] }
    }
);

band!(
    /// 128 bytes of low bits, 64 bytes of high bits, 16 scales, one factor.
    Q6_K, 8, true, (offset 5 63), W::Floats,
    |_lines, rest| W::load_halves(rest),
    |J, lines, head| {
        let (half, part) = (J / 4, J % 4);
        let (four, high) = (W::bytes(15), W::bytes(0x30));
        let mut q = [four; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let low: W = line(lines, 16 * half + 8 * (part % 2) + i);
            let low = if part < 2 { low } else { low.right(4) };
            let bits: W = line(lines, 32 + 8 * half + i);
            let bits = match part {
                0 => bits.left(4),
                1 => bits.left(2),
                2 => bits,
                _ => bits.right(2),
            };
            *q = low.and(four).or_and(bits, high);
        }
        // The four scales of runs `J` and `J ^ 1` are one word.
        let words: W = line(lines, 48 + J / 2);
        let mut scale = [head; 2];
        for (i, scale) in scale.iter_mut().enumerate() {
            let byte = 2 * (J % 2) + i;
            let code = words.left(24 - 8 * byte).right_signed(24);
            *scale = W::mul(code.to_floats(), head);
        }
        Run { q, scale, min: [W::Floats::splat(0.0); 2] }
    }
);

/// What the runs of an IQ4_XS block share.
#[derive(Clone, Copy)]
pub(super) struct XsHead<W: Words> {
    d: W::Floats,
    /// High and low bits of the scales.
    high: W,
    low: W,
}

band!(
    /// A factor and 16 high bits of scales, four bytes of their low bits, 128 bytes of indices.
    IQ4_XS, 8, false, (signed 128), XsHead<W>,
    |lines, _rest| {
        let first: W = line(lines, 0);
        XsHead { d: first.two_halves()[0], high: first.right(16), low: line(lines, 1) }
    },
    |J, lines, head| {
        let q = look_up(sixteen_and_sixteen(lines, 2 + 4 * J), table::<W>(&IQ4_LEVELS).signed());
        let low = head.low.right(4 * J).and(W::all(15));
        let high = head.high.right(2 * J).left(4);
        let s = low.or_and(high, W::all(0x30)).add(W::all(-32));
        without_min(q, W::mul(s.to_floats(), head.d))
    }
);
