//! Products with AMX: tiles of 8-bit integers, for many tokens at once.
//!
//! A tile product takes the weights of some rows that share a scale, 32 values of each row or 16 where the format is
//! finer, and the same values of 16 tokens. Its integers then go through AVX-512, sixteen tokens a register: these few
//! instructions for each product bound the speed, the tiles themselves are faster. Weights come apart once for every
//! token, and activations are put in the order of the tiles once for every row.
//!
//! The order of all sums is that of the AVX-512 kernels with `BY_SCALE`, which do what is left over of the tokens.

use super::avx512_unpack::{self as unpack, Tile, Unpack};
use super::prefetch;
use crate::activations::ActBlock;
use crate::matmul::{Panel, PanelFn};
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// Tokens of a tile product.
const TOKENS: usize = 16;

/// Fewest tokens for which it pays to put weights into the order of the tiles.
const MIN_TOKENS: usize = 20;

/// Fewest tokens left over that are worth a tile product of their own.
const MIN_REST: usize = 9;

/// Weight rows of a tile product.
const ROWS: usize = 16;

/// Tile products that are under way before the first is waited for.
const AHEAD: usize = 2;

/// Tile products whose integers are kept.
const RING: usize = 4;

/// Bytes of activations in the order of the tiles: they stay in the second-level cache.
const PANEL_BYTES: usize = 768 << 10;

/// The most bytes that 256 values have in a format of small blocks.
const MOST_BYTES: usize = 272;

/// Whether the processor has the tiles and the system lets this process use them, which it is asked for once.
pub(crate) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        /// `amx-tile` and `amx-int8` in EDX of leaf 7.
        const TILE_AND_INT8: u32 = 0b11 << 24;
        /// Of EBX and ECX of leaf 0xd: the tiles' configuration and their data, in XCR0.
        const STATE: u64 = 0b11 << 17;
        if __cpuid(0).eax < 7
            || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8
            || !is_x86_feature_detected!("xsave")
        {
            return false;
        }
        // SAFETY: the system has enabled XSAVE, so the register can be read.
        let enabled = unsafe { xcr0() };
        enabled & STATE == STATE && ask()
    })
}

/// What the system has enabled of the extended state.
///
/// # Safety
/// The system has enabled XSAVE.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's.
    unsafe { _xgetbv(0) }
}

/// Asks the system for the tiles.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// The kernel of a type, and how many of the first of `tokens` tokens it is the fastest for; it takes any number.
pub(crate) fn tiled(ty: TensorType, tokens: usize) -> Option<(PanelFn, usize)> {
    let rest = tokens % TOKENS;
    let count = if rest < MIN_REST { tokens - rest } else { tokens };
    let kernel: PanelFn = match ty {
        _ if tokens < MIN_TOKENS => return None,
        TensorType::F32 | TensorType::F16 | TensorType::BF16 => return None,
        TensorType::Q4_0 => product::<unpack::Q4_0>,
        TensorType::Q4_1 => product::<unpack::Q4_1>,
        TensorType::Q5_0 => product::<unpack::Q5_0>,
        TensorType::Q5_1 => product::<unpack::Q5_1>,
        TensorType::Q8_0 => product::<unpack::Q8_0>,
        TensorType::Q2_K => product::<unpack::Q2_K>,
        TensorType::Q3_K => product::<unpack::Q3_K>,
        TensorType::Q4_K => product::<unpack::Q4_K>,
        TensorType::Q5_K => product::<unpack::Q5_K>,
        TensorType::Q6_K => product::<unpack::Q6_K>,
        TensorType::IQ4_NL => product::<unpack::IQ4_NL>,
        TensorType::IQ4_XS => product::<unpack::IQ4_XS>,
        TensorType::MXFP4 => product::<unpack::MXFP4>,
        TensorType::IQ2_XXS => product::<unpack::IQ2_XXS>,
        TensorType::IQ2_XS => product::<unpack::IQ2_XS>,
        TensorType::IQ2_S => product::<unpack::IQ2_S>,
        TensorType::IQ3_XXS => product::<unpack::IQ3_XXS>,
        TensorType::IQ3_S => product::<unpack::IQ3_S>,
        TensorType::IQ1_S => product::<unpack::IQ1_S>,
        TensorType::IQ1_M => product::<unpack::IQ1_M>,
    };
    Some((kernel, count))
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// What the products of this thread work in.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// The parts of a thread's scratch memory, for a format with `lanes` sums a row (8 of 32 values or 16 of 16).
///
/// Of each `lanes`, then each group of 256 values there are tiles of both sides, so that a sum goes through memory in one
/// direction.
struct Buffers {
    /// `[token / 16, lanes, groups, 64 / lanes, 16, 4]`: activations.
    x: *mut i8,
    /// `[token / 16, lanes, groups, 2, 16]`: their scales and their sums.
    x_scales: *mut f32,
    /// `[lanes, groups, 16, 256 / lanes]`: codes of 16 rows.
    w: *mut u8,
    /// `[groups, 2, 16, 16]`: scales and minimums of 16 rows, of each 16 values.
    w_unsorted: *mut f32,
    /// `[lanes, groups, 2, 16]`: the same of 16 rows.
    w_scales: *mut f32,
    /// `[token / 16, lanes, 16, 16]`: the sums of rows with tokens.
    sums: *mut f32,
}

impl Buffers {
    fn new(scratch: &mut Vec<Line>, panels: usize, groups: usize, lanes: usize) -> Self {
        let x = panels * groups * TOKENS * GROUP / 64;
        let x_scales = panels * groups * lanes * 2;
        let w = groups * ROWS * GROUP / 64;
        let w_unsorted = groups * ROWS * 2;
        let w_scales = groups * lanes * 2;
        let sums = panels * lanes * ROWS;
        let all = x + x_scales + w + w_unsorted + w_scales + sums;
        if scratch.len() < all {
            scratch.resize(all, Line([0; 64]));
        }
        let base = scratch.as_mut_ptr();
        // SAFETY: the parts lie one after another within the `all` lines there are.
        unsafe {
            Self {
                x: base.cast(),
                x_scales: base.add(x).cast(),
                w: base.add(x + x_scales).cast(),
                w_unsorted: base.add(x + x_scales + w).cast(),
                w_scales: base.add(x + x_scales + w + w_unsorted).cast(),
                sums: base.add(x + x_scales + w + w_unsorted + w_scales).cast(),
            }
        }
    }
}

/// Computes a panel of any number of tokens.
///
/// # Safety
/// As [`PanelFn`], and [`permitted`] was true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn product<U: Unpack>(panel: &Panel<'_>) {
    let lanes = if U::FINE { 16 } else { 8 };
    let cols = panel.x.cols();
    let groups = cols.div_ceil(GROUP);
    let tokens = panel.x.blocks().len() / groups;
    assert!(U::GROUP_BYTES <= MOST_BYTES && panel.row_bytes >= cols / GROUP * U::GROUP_BYTES);
    let group_bytes = TOKENS * (GROUP + lanes * 8);
    let most = (PANEL_BYTES / (group_bytes * groups)).max(1);
    let panels = tokens.div_ceil(TOKENS);
    // As many as make parts of about the same size.
    let at_once = panels.div_ceil(panels.div_ceil(most));
    SCRATCH.with_borrow_mut(|scratch| {
        let to = Buffers::new(scratch, at_once, groups, lanes);
        configure(GROUP / lanes);
        for (i, blocks) in panel.x.blocks().chunks(at_once * TOKENS * groups).enumerate() {
            let first_token = i * at_once * TOKENS;
            let n_panels = (blocks.len() / groups).div_ceil(TOKENS);
            for (p, blocks) in blocks.chunks(TOKENS * groups).enumerate() {
                // SAFETY: the buffers were made for so many; the instructions are the caller's promise.
                unsafe { arrange_tokens::<U>(blocks, p, groups, &to) };
            }
            for (b, rows) in panel.weights.chunks(ROWS * panel.row_bytes).enumerate() {
                let n_rows = rows.len() / panel.row_bytes;
                // SAFETY: as above; the tiles are configured, and the caller's output holds the product.
                unsafe {
                    arrange_rows::<U>(rows, panel.row_bytes, cols, &to);
                    for lane in 0..lanes {
                        for p in 0..n_panels {
                            add_up::<U>(lane, p, groups, &to);
                        }
                    }
                    for p in 0..n_panels {
                        let count = (blocks.len() / groups - p * TOKENS).min(TOKENS);
                        let (token, row) = (first_token + p * TOKENS, panel.first_row + b * ROWS);
                        finish(panel, token, count, row, n_rows, to.sums.add(p * lanes * ROWS * TOKENS), lanes);
                    }
                }
            }
        }
        // SAFETY: gives the tiles back, which nothing reads any more.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    });
}

/// Sets tile 0 up for results, 1 for `bytes` bytes of each row, 2 for as many of each token.
#[inline]
fn configure(bytes: usize) {
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..3].copy_from_slice(&[64, bytes as u16, 64]);
    config.rows[..3].copy_from_slice(&[ROWS as u8, ROWS as u8, (bytes / 4) as u8]);
    // SAFETY: a valid configuration of palette 1; only `product` runs this, on a processor with tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags)) };
}

/// Writes the activations and scales of up to 16 tokens, and zeros for those that are missing.
///
/// # Safety
/// The buffers have room, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn arrange_tokens<U: Unpack>(blocks: &[ActBlock], p: usize, groups: usize, to: &Buffers) {
    let lanes = if U::FINE { 16 } else { 8 };
    let tile = TOKENS * GROUP / lanes;
    let count = blocks.len() / groups;
    for g in 0..groups {
        let read = |at: &dyn Fn(&ActBlock) -> __m512i| {
            let mut rows = [_mm512_setzero_si512(); TOKENS];
            for (t, row) in rows.iter_mut().enumerate().take(count) {
                *row = at(&blocks[t * groups + g]);
            }
            transpose(rows)
        };
        let step = |lane: usize| (p * lanes + lane) * groups + g;
        for eight in 0..4 {
            // SAFETY: a block has four registers of values.
            let columns = read(&|block| unsafe { _mm512_load_si512(block.q.as_ptr().cast::<__m512i>().add(eight)) });
            for (i, column) in columns.into_iter().enumerate() {
                let (run, half) = (i / 2, i % 2);
                let (lane, line) =
                    if U::FINE { (2 * run + eight / 2, 2 * (eight % 2) + half) } else { (run, 2 * eight + half) };
                // SAFETY: the tile of this lane and group has this line.
                unsafe { _mm512_store_si512(to.x.add(step(lane) * tile + line * 64).cast(), column) };
            }
        }
        // SAFETY: a block has a register of scales and one of sums.
        let scales = read(&|block| unsafe { _mm512_load_si512(block.scale.as_ptr().cast()) });
        // SAFETY: as above.
        let sums =
            read(&|block| unsafe { _mm512_load_si512(block.sums.as_ptr().cast()) }).map(|s| _mm512_castsi512_ps(s));
        for lane in 0..lanes {
            let (scale, sum) = if U::FINE {
                (scales[lane], sums[lane])
            } else {
                (scales[2 * lane], _mm512_add_ps(sums[2 * lane], sums[2 * lane + 1]))
            };
            // SAFETY: every lane and group has two registers.
            unsafe {
                let to = to.x_scales.add(step(lane) * 2 * TOKENS);
                _mm512_store_si512(to.cast(), scale);
                _mm512_store_ps(to.add(TOKENS), sum);
            }
        }
    }
}

/// Takes up to 16 rows apart.
///
/// # Safety
/// The rows have `cols` values each, the buffers have room, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn arrange_rows<U: Unpack>(rows: &[u8], row_bytes: usize, cols: usize, to: &Buffers) {
    let (whole, groups) = (cols / GROUP, cols.div_ceil(GROUP));
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        let mut w = row.as_ptr();
        for g in 0..whole {
            prefetch(w, U::GROUP_BYTES);
            // SAFETY: the row has `whole` groups.
            unsafe {
                arrange_group::<U>(U::unpack(w), r, g, groups, to);
                w = w.add(U::GROUP_BYTES);
            }
        }
        if whole < groups {
            let mut padded = [0u8; MOST_BYTES];
            let tail = &row[whole * U::GROUP_BYTES..];
            padded[..tail.len()].copy_from_slice(tail);
            // SAFETY: `padded` is a whole group.
            unsafe { arrange_group::<U>(U::unpack(padded.as_ptr()), r, whole, groups, to) };
        }
    }
    let (lanes, stride) = if U::FINE { (16, 1) } else { (8, 2) };
    for i in 0..2 * groups {
        let mut rows = [_mm512_setzero_si512(); ROWS];
        for (r, row) in rows.iter_mut().enumerate() {
            // SAFETY: the scales or the minimums of a group.
            *row = unsafe { _mm512_load_si512(to.w_unsorted.add((i * ROWS + r) * 16).cast()) };
        }
        let columns = transpose(rows);
        for lane in 0..lanes {
            // SAFETY: every lane and group has two registers.
            unsafe { _mm512_store_si512(to.w_scales.add((lane * groups * 2 + i) * 16).cast(), columns[lane * stride]) };
        }
    }
}

/// Writes 256 weights of a row to their tiles.
///
/// # Safety
/// The buffers have room, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn arrange_group<U: Unpack>(tile: Tile, row: usize, g: usize, groups: usize, to: &Buffers) {
    let [q0, q1, q2, q3] = tile.q;
    // The first and the second halves of runs 0, 2, 4 and 6, and the same of runs 1, 3, 5 and 7.
    let even = [_mm512_unpacklo_epi64(q0, q1), _mm512_unpacklo_epi64(q2, q3)];
    let odd = [_mm512_unpackhi_epi64(q0, q1), _mm512_unpackhi_epi64(q2, q3)];
    // SAFETY: every lane and group has 16 rows.
    unsafe {
        for (parity, [first, second]) in [even, odd].into_iter().enumerate() {
            if U::FINE {
                for (half, v) in [first, second].into_iter().enumerate() {
                    let to = |run: usize| to.w.add((((2 * run + half) * groups + g) * ROWS + row) * 16).cast();
                    _mm_store_si128(to(parity), _mm512_castsi512_si128(v));
                    _mm_store_si128(to(2 + parity), _mm512_extracti32x4_epi32::<1>(v));
                    _mm_store_si128(to(4 + parity), _mm512_extracti32x4_epi32::<2>(v));
                    _mm_store_si128(to(6 + parity), _mm512_extracti32x4_epi32::<3>(v));
                }
            } else {
                let to = |run: usize| to.w.add(((run * groups + g) * ROWS + row) * 32).cast();
                let low = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second);
                let high = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), second);
                _mm256_store_si256(to(parity), _mm512_castsi512_si256(low));
                _mm256_store_si256(to(2 + parity), _mm512_extracti64x4_epi64::<1>(low));
                _mm256_store_si256(to(4 + parity), _mm512_castsi512_si256(high));
                _mm256_store_si256(to(6 + parity), _mm512_extracti64x4_epi64::<1>(high));
            }
        }
        let scales = to.w_unsorted.add((g * 2 * ROWS + row) * 16);
        _mm512_store_ps(scales, tile.scale);
        _mm512_store_ps(scales.add(ROWS * 16), tile.min);
    }
}

/// Multiplies 16 rows with 16 tokens and adds up, over all groups, the values of one lane.
///
/// # Safety
/// The buffers are filled, the tiles configured, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn add_up<U: Unpack>(lane: usize, p: usize, groups: usize, from: &Buffers) {
    #[repr(C, align(64))]
    struct Products(MaybeUninit<[i32; RING * ROWS * TOKENS]>);
    let lanes = if U::FINE { 16 } else { 8 };
    let bytes = GROUP / lanes;
    let step = (p * lanes + lane) * groups;
    let mut products = Products(MaybeUninit::uninit());
    let products = products.0.as_mut_ptr().cast::<i32>();
    // SAFETY: the parts of the buffers for this lane and these tokens.
    let (x, x_scales, w, w_scales, sums) = unsafe {
        (
            from.x.add(step * TOKENS * bytes),
            from.x_scales.add(step * 2 * TOKENS),
            from.w.add(lane * groups * ROWS * bytes),
            from.w_scales.add(lane * groups * 2 * ROWS),
            from.sums.add((p * lanes + lane) * ROWS * TOKENS),
        )
    };
    let multiply = |g: usize| {
        // SAFETY: tiles of group `g`, and room for one product; no other code uses tiles.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm1, [{w} + {bytes}]",
                "tileloadd tmm2, [{x} + {line}]",
                "tdpbusd tmm0, tmm1, tmm2",
                "tilestored [{to} + {line}], tmm0",
                w = in(reg) w.add(g * ROWS * bytes),
                x = in(reg) x.add(g * TOKENS * bytes),
                to = in(reg) products.add(g % RING * ROWS * TOKENS),
                bytes = in(reg) bytes,
                line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _,
                options(nostack, preserves_flags),
            );
        }
    };
    for g in 0..AHEAD.min(groups) {
        multiply(g);
    }
    // The minimums first, while the first products are under way: registers hold sums of one kind at a time.
    let mut mins = [_mm512_setzero_ps(); ROWS];
    for g in 0..groups {
        // SAFETY: scales of group `g`.
        unsafe {
            let sum = _mm512_load_ps(x_scales.add(g * 2 * TOKENS + TOKENS));
            let min = w_scales.add(g * 2 * ROWS + ROWS);
            for (r, acc) in mins.iter_mut().enumerate() {
                *acc = _mm512_fnmadd_ps(_mm512_set1_ps(*min.add(r)), sum, *acc);
            }
        }
    }
    for (r, acc) in mins.into_iter().enumerate() {
        // SAFETY: the sums of this lane and these rows.
        unsafe { _mm512_store_ps(sums.add(r * TOKENS), acc) };
    }
    let mut acc = [_mm512_setzero_ps(); ROWS];
    for g in 0..groups {
        if g + AHEAD < groups {
            multiply(g + AHEAD);
        }
        // SAFETY: scales of group `g`, and products that were stored.
        unsafe {
            let scale = _mm512_load_ps(x_scales.add(g * 2 * TOKENS));
            let weights = w_scales.add(g * 2 * ROWS);
            let products = products.add(g % RING * ROWS * TOKENS);
            for (r, acc) in acc.iter_mut().enumerate() {
                let product = _mm512_cvtepi32_ps(_mm512_load_si512(products.add(r * TOKENS).cast()));
                let product = _mm512_mul_ps(product, _mm512_set1_ps(*weights.add(r)));
                *acc = _mm512_fmadd_ps(product, scale, *acc);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        // SAFETY: as above.
        unsafe {
            let to = sums.add(r * TOKENS);
            _mm512_store_ps(to, _mm512_add_ps(acc, _mm512_load_ps(to)));
        }
    }
}

/// Adds the lanes of `[lanes, 16, 16]` sums up, in the order in which a register's are, and writes the products of
/// `n_rows` rows with `count` tokens.
///
/// # Safety
/// The output holds them, no other thread touches them, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn finish(
    panel: &Panel<'_>,
    token: usize,
    count: usize,
    row: usize,
    n_rows: usize,
    sums: *const f32,
    lanes: usize,
) {
    let mut rows = [_mm512_setzero_si512(); ROWS];
    for (r, out) in rows.iter_mut().enumerate().take(n_rows) {
        let mut all = [_mm512_setzero_ps(); 16];
        for (lane, sum) in all.iter_mut().enumerate().take(lanes) {
            // SAFETY: the sums of a lane and a row.
            *sum = unsafe { _mm512_load_ps(sums.add((lane * ROWS + r) * TOKENS)) };
        }
        let mut n = lanes;
        while n > 1 {
            n /= 2;
            for lane in 0..n {
                all[lane] = _mm512_add_ps(all[lane], all[lane + n]);
            }
        }
        // With 8 lanes the register's other 8 are zero: they make a negative zero positive.
        let sum = if lanes == 8 { _mm512_add_ps(all[0], _mm512_setzero_ps()) } else { all[0] };
        *out = _mm512_castps_si512(sum);
    }
    let mask = (0xffffu32 >> (16 - n_rows)) as __mmask16;
    for (t, values) in transpose(rows).into_iter().enumerate().take(count) {
        // SAFETY: the caller's output.
        unsafe { _mm512_mask_storeu_epi32(panel.out.at(token + t, row).cast(), mask, values) };
    }
}

/// Turns 16 rows of 16 into 16 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    let (mut quads, mut out) = ([zero; 16], [zero; 16]);
    // Of each four rows, column `c` of every four columns.
    for i in 0..4 {
        let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low2, high2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        quads[i] = _mm512_unpacklo_epi64(low, low2);
        quads[4 + i] = _mm512_unpackhi_epi64(low, low2);
        quads[8 + i] = _mm512_unpacklo_epi64(high, high2);
        quads[12 + i] = _mm512_unpackhi_epi64(high, high2);
    }
    for c in 0..4 {
        let [q0, q1, q2, q3] = [quads[4 * c], quads[4 * c + 1], quads[4 * c + 2], quads[4 * c + 3]];
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(q0, q1), _mm512_shuffle_i32x4::<0xdd>(q0, q1));
        let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(q2, q3), _mm512_shuffle_i32x4::<0xdd>(q2, q3));
        out[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
    out
}
