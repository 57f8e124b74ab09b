//! 16-bit floats on x86-64: the products and sums of a key-value cache.

use half::f16;
use std::arch::x86_64::*;

/// # Safety
/// The processor has the instructions; the lengths are equal.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn dot_avx512(a: &[f32], b: &[f16]) -> f32 {
    let (pa, pb, n) = (a.as_ptr(), b.as_ptr(), a.len());
    let (mut even, mut odd) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    let mut i = 0;
    // SAFETY: all loads are below `n`, the masked ones by their mask.
    unsafe {
        while i + 32 <= n {
            let b0 = _mm512_cvtph_ps(_mm256_loadu_si256(pb.add(i).cast()));
            let b1 = _mm512_cvtph_ps(_mm256_loadu_si256(pb.add(i + 16).cast()));
            even = _mm512_fmadd_ps(_mm512_loadu_ps(pa.add(i)), b0, even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(pa.add(i + 16)), b1, odd);
            i += 32;
        }
        while i < n {
            let mask = ((1u32 << (n - i).min(16)) - 1) as __mmask16;
            let b = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, pb.add(i).cast()));
            even = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, pa.add(i)), b, even);
            i += 16;
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
}

/// # Safety
/// As [`dot_avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn axpy_avx512(a: f32, x: &[f16], y: &mut [f32]) {
    let (px, py, n) = (x.as_ptr(), y.as_mut_ptr(), y.len());
    let factor = _mm512_set1_ps(a);
    let mut i = 0;
    // SAFETY: all accesses are below `n`, the masked ones by their mask.
    unsafe {
        while i + 16 <= n {
            let x = _mm512_cvtph_ps(_mm256_loadu_si256(px.add(i).cast()));
            _mm512_storeu_ps(py.add(i), _mm512_fmadd_ps(factor, x, _mm512_loadu_ps(py.add(i))));
            i += 16;
        }
        if i < n {
            let mask = ((1u32 << (n - i)) - 1) as __mmask16;
            let x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, px.add(i).cast()));
            let y = _mm512_maskz_loadu_ps(mask, py.add(i));
            _mm512_mask_storeu_ps(py.add(i), mask, _mm512_fmadd_ps(factor, x, y));
        }
    }
}

/// # Safety
/// As [`dot_avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn dot_avx2(a: &[f32], b: &[f16]) -> f32 {
    let (pa, pb, n) = (a.as_ptr(), b.as_ptr(), a.len());
    let (mut even, mut odd) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    let mut i = 0;
    // SAFETY: all loads are below `n`.
    unsafe {
        while i + 16 <= n {
            let b0 = _mm256_cvtph_ps(_mm_loadu_si128(pb.add(i).cast()));
            let b1 = _mm256_cvtph_ps(_mm_loadu_si128(pb.add(i + 8).cast()));
            even = _mm256_fmadd_ps(_mm256_loadu_ps(pa.add(i)), b0, even);
            odd = _mm256_fmadd_ps(_mm256_loadu_ps(pa.add(i + 8)), b1, odd);
            i += 16;
        }
    }
    let tail = a[i..].iter().zip(&b[i..]).map(|(a, b)| a * b.to_f32_const());
    super::avx2::sum(_mm256_add_ps(even, odd)) + tail.sum::<f32>()
}

/// # Safety
/// As [`dot_avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn axpy_avx2(a: f32, x: &[f16], y: &mut [f32]) {
    let (px, py, n) = (x.as_ptr(), y.as_mut_ptr(), y.len());
    let factor = _mm256_set1_ps(a);
    let mut i = 0;
    // SAFETY: all accesses are below `n`.
    unsafe {
        while i + 8 <= n {
            let x = _mm256_cvtph_ps(_mm_loadu_si128(px.add(i).cast()));
            _mm256_storeu_ps(py.add(i), _mm256_fmadd_ps(factor, x, _mm256_loadu_ps(py.add(i))));
            i += 8;
        }
    }
    for (y, x) in y[i..].iter_mut().zip(&x[i..]) {
        *y += a * x.to_f32_const();
    }
}

/// # Safety
/// As [`dot_avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn narrow_avx2(x: &[f32], out: &mut [f16]) {
    let (px, po, n) = (x.as_ptr(), out.as_mut_ptr(), out.len());
    let mut i = 0;
    // SAFETY: all accesses are below `n`.
    unsafe {
        while i + 8 <= n {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(px.add(i)));
            _mm_storeu_si128(po.add(i).cast(), half);
            i += 8;
        }
    }
    for (to, from) in out[i..].iter_mut().zip(&x[i..]) {
        *to = f16::from_f32_const(*from);
    }
}
