//! Loading grid entries one by one.

use super::GridWords;
use super::tables::*;
use crate::x86::bands::words::Words;
use std::arch::x86_64::*;

/// Four indices of each of 8 rows.
#[repr(align(32))]
struct Indices([[u16; 4]; 8]);

/// Writes the indices of a line out, `N` of them being in the grid.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn indices<const N: usize>(index: __m256i, high: __m256i) -> Indices {
    // SAFETY: the caller's processor; 64 bytes are written.
    unsafe {
        let high = if N == 256 {
            _mm256_setzero_si256()
        } else {
            _mm256_and_si256(high, _mm256_set1_epi8((N / 256 - 1) as i8))
        };
        let (a, b) = (
            _mm256_unpacklo_epi8(index, high),
            _mm256_unpackhi_epi8(index, high),
        );
        let mut out = Indices([[0; 4]; 8]);
        let to = out.0.as_mut_ptr().cast::<__m256i>();
        to.write(_mm256_permute2x128_si256::<0x20>(a, b));
        to.add(1).write(_mm256_permute2x128_si256::<0x31>(a, b));
        out
    }
}

/// Gives magnitudes the signs of four bits of each row: those of register `i`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn signed(magnitudes: __m256i, signs: __m256i, i: usize) -> __m256i {
    // SAFETY: the caller's processor.
    unsafe {
        // In each word, the byte that has the signs of these values, four times.
        let byte = i as i32 / 2;
        let each = [0, 4, 8, 12].map(|first| 0x0101_0101 * (first + byte));
        let bits = [0x0804_0201, 0x8040_2010_u32 as i32][i % 2];
        let bits = _mm256_set1_epi32(bits);
        let set = _mm256_and_si256(signs.shuffle(__m256i::quads(each)), bits);
        // -1 where the bit is set, else 1.
        let sign = _mm256_or_si256(_mm256_cmpeq_epi8(set, bits), _mm256_set1_epi8(1));
        _mm256_sign_epi8(magnitudes, sign)
    }
}

/// Returns the entries of a run's four grid indices per row, 4 values of each row in a register.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn entries<const N: usize>(
    grid: &'static Grid<u64, N>,
    index: __m256i,
    high: __m256i,
) -> [__m256i; 8] {
    // SAFETY: the caller's processor; an index is one of the grid.
    unsafe {
        let indices = indices::<N>(index, high);
        let mut q = [_mm256_setzero_si256(); 8];
        for (k, q) in q.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let mut two = [_mm_setzero_si128(); 4];
            for (i, two) in two.iter_mut().enumerate() {
                let at = |row: usize| grid.entries.as_ptr().add(usize::from(indices.0[row][k]));
                let first = _mm_loadl_epi64(at(2 * i).cast());
                let both = _mm_loadh_pd(_mm_castsi128_pd(first), at(2 * i + 1).cast());
                *two = _mm_castpd_si128(both);
            }
            let x = _mm256_castsi256_ps(_mm256_set_m128i(two[2], two[0]));
            let y = _mm256_castsi256_ps(_mm256_set_m128i(two[3], two[1]));
            *q = [
                _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(x, y)),
                _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(x, y)),
            ];
        }
        q
    }
}

impl GridWords for __m256i {
    const OFFSET_BITS: Option<usize> = Some(7);

    #[inline(always)]
    unsafe fn spread(self, from: &'static Spread) -> Self {
        // SAFETY: the caller's processor.
        unsafe {
            let bits = self.right(from.first);
            let mask = (1 << from.step) - 1;
            let mut bytes = bits.and(Self::all(mask));
            for j in 1..4 {
                let moved = bits.left(j * (8 - from.step));
                bytes = bytes.or_and(moved, Self::all(mask << (8 * j)));
            }
            bytes
        }
    }

    #[inline(always)]
    unsafe fn even_signs(self) -> Self {
        // SAFETY: the caller's processor.
        unsafe {
            let seven = self.and(Self::bytes(0x7f));
            let folded = _mm256_xor_si256(seven, seven.right(4)).and(Self::bytes(15));
            // The eighth bit by the parity of four.
            let odd = Self::quads([
                0x0080_8000,
                0x8000_0080_u32 as i32,
                0x8000_0080_u32 as i32,
                0x0080_8000,
            ]);
            _mm256_or_si256(seven, odd.shuffle(folded))
        }
    }

    #[inline(always)]
    unsafe fn eights<const N: usize>(
        grid: &'static Grid<u64, N>,
        index: Self,
        high: Self,
        signs: Self,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe {
            let mut q = entries(grid, index, high);
            for (i, q) in q.iter_mut().enumerate() {
                *q = signed(*q, signs, i);
            }
            q
        }
    }

    #[inline(always)]
    unsafe fn ones(index: Self, high: Self, signs: Self) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe {
            let mut q = entries(&IQ1_GRID, index, high);
            for (i, q) in q.iter_mut().enumerate() {
                *q = _mm256_add_epi8(*q, signed(Self::bytes(1), signs, i));
            }
            q
        }
    }

    #[inline(always)]
    unsafe fn fours<const N: usize>(
        grid: &'static Grid<u32, N>,
        index: [Self; 2],
        high: [Self; 2],
        signs: Self,
        _codes: &'static Bytes,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor; an index is one of the grid.
        unsafe {
            let mut q = [Self::all(0); 8];
            for (of_line, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let indices = indices::<N>(index[of_line], high[of_line]);
                for (k, q) in q.iter_mut().enumerate() {
                    let mut words = [0; 8];
                    for (word, index) in words.iter_mut().zip(&indices.0) {
                        *word = *grid.entries.get_unchecked(usize::from(index[k])) as i32;
                    }
                    let [a, b, c, d, e, f, g, h] = words;
                    let magnitudes = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
                    *q = signed(magnitudes, signs, 4 * of_line + k);
                }
            }
            q
        }
    }
}
