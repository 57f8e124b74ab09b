//! Looking up 64 grid indices at a time, with VBMI.

use super::GridWords;
use super::tables::*;
use std::arch::x86_64::*;

/// Looks a plane up. `high` has the bits of the indices from the ninth on, at the bottom of each byte.
///
/// # Safety
/// The processor has AVX-512 with VBMI.
#[inline(always)]
unsafe fn look_up<const N: usize>(plane: &Plane<N>, index: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the processor is the caller's; there are `N` bytes.
    unsafe {
        let bytes = plane.0.as_ptr();
        if N == 256 {
            return of_256(bytes, index);
        }
        let first = of_512(bytes, index, high);
        if N == 512 {
            return first;
        }
        let tenth = _mm512_test_epi8_mask(high, _mm512_set1_epi8(2));
        let second = of_512(bytes.add(512), index, high);
        let first = _mm512_mask_blend_epi8(tenth, first, second);
        if N == 1024 {
            return first;
        }
        let third = of_512(bytes.add(1024), index, high);
        let fourth = of_512(bytes.add(1536), index, high);
        let second = _mm512_mask_blend_epi8(tenth, third, fourth);
        let eleventh = _mm512_test_epi8_mask(high, _mm512_set1_epi8(4));
        _mm512_mask_blend_epi8(eleventh, first, second)
    }
}

/// Looks up among 512 bytes; see [`look_up`].
///
/// # Safety
/// There are as many, aligned to 64; otherwise as [`look_up`].
#[inline(always)]
unsafe fn of_512(bytes: *const u8, index: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the caller's bytes and processor.
    unsafe {
        let ninth = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1));
        _mm512_mask_blend_epi8(ninth, of_256(bytes, index), of_256(bytes.add(256), index))
    }
}

/// Looks up among 256 bytes; see [`look_up`].
///
/// # Safety
/// As [`of_512`].
#[inline(always)]
unsafe fn of_256(bytes: *const u8, index: __m512i) -> __m512i {
    // SAFETY: the caller's bytes and processor.
    unsafe {
        let p = bytes.cast::<__m512i>();
        let first = _mm512_permutex2var_epi8(p.read(), index, p.add(1).read());
        let second = _mm512_permutex2var_epi8(p.add(2).read(), index, p.add(3).read());
        _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), first, second)
    }
}

/// Takes the lowest bits of a mask from `a` and the others from `b`.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn join(mask: u8, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller's processor.
    unsafe { _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(mask as i8), a, b) }
}

/// Returns codes of a run whose four grid indices per row have 8 values each.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn two_bit_levels<const N: usize>(
    planes: &[Plane<N>; 2],
    index: __m512i,
    high: __m512i,
    signs: __m512i,
    codes: &Bytes,
) -> [__m512i; 8] {
    // SAFETY: the caller's processor.
    unsafe {
        let halves = [
            look_up(&planes[0], index, high),
            look_up(&planes[1], index, high),
        ];
        let codes = codes.load();
        let mut q = [codes; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let level = _mm512_multishift_epi64_epi8(TWO_BITS[i].load(), halves[i % 2]);
            let sign = _mm512_multishift_epi64_epi8(SIGNS_AT_2[i].load(), signs);
            *q = _mm512_permutexvar_epi8(join(3, level, sign), codes);
        }
        q
    }
}

impl GridWords for __m512i {
    const OFFSET_BITS: Option<usize> = Some(OFFSET_BITS);

    #[inline(always)]
    unsafe fn spread(self, from: &'static Spread) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_multishift_epi64_epi8(from.bytes.load(), self) }
    }

    #[inline(always)]
    unsafe fn even_signs(self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_permutex2var_epi8(EVEN_SIGNS[0].load(), self, EVEN_SIGNS[1].load()) }
    }

    #[inline(always)]
    unsafe fn eights<const N: usize>(
        grid: &'static Grid<u64, N>,
        index: Self,
        high: Self,
        signs: Self,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe { two_bit_levels(&grid.planes, index, high, signs, &IQ2_CODES) }
    }

    #[inline(always)]
    unsafe fn ones(index: Self, high: Self, signs: Self) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe { two_bit_levels(&IQ1_GRID.planes, index, high, signs, &IQ1_CODES) }
    }

    #[inline(always)]
    unsafe fn fours<const N: usize>(
        grid: &'static Grid<u32, N>,
        index: [Self; 2],
        high: [Self; 2],
        signs: Self,
        codes: &'static Bytes,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe {
            let codes = codes.load();
            let mut q = [codes; 8];
            for (of_line, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let low = look_up(&grid.planes[0], index[of_line], high[of_line]);
                let other = look_up(&grid.planes[1], index[of_line], high[of_line]);
                for (k, q) in q.iter_mut().enumerate() {
                    let i = 4 * of_line + k;
                    let level = _mm512_multishift_epi64_epi8(FOUR_BITS[i].load(), low);
                    let level = _mm512_mask_multishift_epi64_epi8(
                        level,
                        0xcccc_cccc_cccc_cccc,
                        OTHER_FOUR_BITS[i].load(),
                        other,
                    );
                    let sign = _mm512_multishift_epi64_epi8(SIGNS_AT_3[i].load(), signs);
                    *q = _mm512_permutexvar_epi8(join(7, level, sign), codes);
                }
            }
            q
        }
    }
}
