//! Reading memory at full bandwidth, to measure it.

use super::Kernels;

/// Bytes per iteration.
const STEP: usize = 256;

impl Kernels {
    /// Reads all bytes with the widest loads and returns the exclusive or of their 64-bit words.
    /// The bytes after the last multiple of 256 are not read.
    pub fn read_all(self, bytes: &[u8]) -> u64 {
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the `Kernels` value proves that the processor has the instructions.
            crate::Isa::Amx | crate::Isa::Avx512 => unsafe { read_avx512(bytes) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the `Kernels` value proves that the processor has the instructions.
            crate::Isa::Avx2 => unsafe { read_avx2(bytes) },
            _ => read(bytes, |_| ()),
        }
    }
}

/// Runs the loop, which each instruction set compiles for itself.
#[inline(always)]
fn read(bytes: &[u8], prefetch: impl Fn(*const u8)) -> u64 {
    let mut sums = [0u64; STEP / 8];
    for step in bytes.as_chunks::<STEP>().0 {
        prefetch(step.as_ptr());
        for (sum, word) in sums.iter_mut().zip(step.as_chunks::<8>().0) {
            *sum ^= u64::from_ne_bytes(*word);
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn read_avx512(bytes: &[u8]) -> u64 {
    read(bytes, |p| super::x86::prefetch(p, STEP))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(bytes: &[u8]) -> u64 {
    read(bytes, |p| super::x86::prefetch(p, STEP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_reads_every_word() {
        for len in [0, 8, STEP - 1, STEP, 5 * STEP + 13] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * i + 7) as u8).collect();
            let words = bytes[..len - len % STEP]
                .chunks_exact(8)
                .map(|w| u64::from_ne_bytes(w.try_into().unwrap()));
            let expected = words.fold(0, |all, word| all ^ word);
            for kernels in Kernels::available() {
                assert_eq!(
                    kernels.read_all(&bytes),
                    expected,
                    "{} bytes with {}",
                    len,
                    kernels.isa()
                );
            }
        }
    }
}
