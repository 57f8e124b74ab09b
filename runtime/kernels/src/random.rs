//! Pseudorandom data for tests and benchmarks, equal in every run.

#![forbid(unsafe_code)]

use crate::quant::TensorType;
use half::f16;

/// A linear congruential generator, seeded by a name.
pub struct Random(u64);

impl Random {
    /// Returns the generator that belongs to a name.
    pub fn new(name: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(name.as_bytes()))
    }

    /// Returns the next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        // The low bits of the state have short periods: the high ones are mixed into them.
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let mixed = (self.0 ^ self.0 >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mixed ^ mixed >> 32
    }

    /// Returns a number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    /// Returns a number between -1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Returns `n` numbers between -1 and 1.
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// Returns `n` numbers distributed like activations: most small, one in fifty large.
    pub fn activations(&mut self, n: usize) -> Vec<f32> {
        let one = |random: &mut Self| {
            let v = random.float() * random.float();
            if random.below(50) == 0 { 20.0 * v } else { v }
        };
        (0..n).map(|_| one(self)).collect()
    }

    /// Returns `values` weights of a type: random bits, but ordinary numbers for the floats that
    /// multiply scales.
    pub fn weights(&mut self, ty: TensorType, values: usize) -> Vec<u8> {
        let n_bytes = ty
            .row_bytes(values as u64)
            .unwrap_or_else(|| panic!("{values} {ty} values")) as usize;
        let mut bytes: Vec<u8> = (0..n_bytes).map(|_| self.next_u64() as u8).collect();
        for block in bytes.chunks_exact_mut(ty.block_bytes()) {
            let value = 0.05 * self.float();
            let halves: &[usize] = match ty {
                TensorType::F32 => {
                    block.copy_from_slice(&value.to_le_bytes());
                    &[]
                }
                TensorType::BF16 => {
                    block.copy_from_slice(&value.to_le_bytes()[2..]);
                    &[]
                }
                // Any bits are a number.
                TensorType::I8 | TensorType::I16 | TensorType::I32 | TensorType::I64 => &[],
                TensorType::F64 => {
                    block.copy_from_slice(&f64::from(value).to_le_bytes());
                    &[]
                }
                TensorType::MXFP4 => {
                    block[0] = 118 + block[0] % 8;
                    &[]
                }
                TensorType::NVFP4 => {
                    // From 2^-6 to nearly 2.
                    block[..4]
                        .iter_mut()
                        .for_each(|scale| *scale = 8 + *scale % 56);
                    &[]
                }
                TensorType::IQ1_M => {
                    let bits = f16::from_f32(value).to_bits();
                    for i in 0..4 {
                        block[49 + 2 * i] =
                            block[49 + 2 * i] & 15 | ((bits >> (4 * i) & 15) as u8) << 4;
                    }
                    &[]
                }
                TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => {
                    &[0, 2]
                }
                TensorType::Q2_K => &[80, 82],
                TensorType::Q3_K => &[108],
                TensorType::Q6_K => &[208],
                TensorType::TQ1_0 => &[52],
                TensorType::TQ2_0 => &[64],
                TensorType::Q1_0 | TensorType::Q2_0 => &[0],
                TensorType::F16 | TensorType::Q4_0 | TensorType::Q5_0 | TensorType::Q8_0 => &[0],
                TensorType::IQ1_S
                | TensorType::IQ2_XXS
                | TensorType::IQ2_XS
                | TensorType::IQ2_S => &[0],
                TensorType::IQ3_XXS
                | TensorType::IQ3_S
                | TensorType::IQ4_NL
                | TensorType::IQ4_XS => &[0],
            };
            for at in halves {
                let value = 0.05 * self.float();
                block[*at..*at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
            }
        }
        bytes
    }
}
