//! Blocks of tokens with one vector each: the vectors of complete blocks, and the state of open ones.

use super::Check;
use super::compressed::{EPS, Pages, normed, within};
use super::index::rotated;
use super::kv_rows::widened;
use crate::outcome::Outcome;
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{BlockSizes, Frequencies, KeepCompressed, OpenRows, PoolBlocks};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    let check = |kv_type: KvType| {
        Check::new(
            format!("pool_blocks, keep_compressed, {kv_type}"),
            move |ops, random| pool(ops, random, kv_type),
        )
    };
    KvType::ALL.into_iter().map(check).collect()
}

/// Rows of a text, and what pools them.
struct Rows {
    sizes: BlockSizes,
    values: Vec<f32>,
    gates: Vec<f32>,
    ape: Vec<f32>,
    norm: Vec<f32>,
    frequencies: Vec<f32>,
}

impl Rows {
    fn new(random: &mut Random, sizes: BlockSizes, tokens: usize, half: usize) -> Self {
        let width = sizes.width();
        Self {
            sizes,
            values: random.floats(tokens * width),
            gates: random.floats(tokens * width),
            ape: random.floats(sizes.ratio * width),
            norm: random.floats(sizes.dim),
            frequencies: (0..half).map(|i| 0.5f32.powi(i as i32)).collect(),
        }
    }

    /// Returns the vector of a block by the formula.
    fn vector(&self, block: usize) -> Vec<f64> {
        let BlockSizes {
            ratio,
            overlap,
            dim,
        } = self.sizes;
        let (width, first) = (self.sizes.width(), block * ratio);
        let begin = if overlap && block > 0 {
            first - ratio
        } else {
            first
        };
        let pooled = (0..dim).map(|c| {
            let members = (begin..first + ratio).map(|p| {
                let column = if p < first { c } else { width - dim + c };
                let ape = f64::from(self.ape[p % ratio * width + column]);
                let gate = f64::from(self.gates[p * width + column]) + ape;
                (gate.exp(), f64::from(self.values[p * width + column]))
            });
            let members: Vec<(f64, f64)> = members.collect();
            let sum: f64 = members.iter().map(|(weight, _)| weight).sum();
            members.iter().map(|(weight, v)| weight * v).sum::<f64>() / sum
        });
        let pooled: Vec<f64> = pooled.collect();
        let mut vector = normed(&pooled, |i| f64::from(self.norm[i]));
        let turns = self.frequencies.iter().flat_map(|f| {
            let angle = first as f32 * f;
            [2.0 * angle.cos(), 2.0 * angle.sin()]
        });
        let turns: Vec<f32> = turns.collect();
        rotated(&mut vector, dim - turns.len(), &turns, RopeKind::Adjacent);
        vector
    }
}

fn pool(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let sizes = |ratio, overlap, dim| BlockSizes {
        ratio,
        overlap,
        dim,
    };
    for (first, second, window) in [
        (sizes(4, true, 64), Some(sizes(4, true, 32)), 6),
        (sizes(20, false, 36), None, 3),
        (sizes(3, true, 12), None, 50),
    ] {
        let sizes: Vec<BlockSizes> = std::iter::once(first).chain(second).collect();
        // Some batches complete no block, others several.
        for batches in [vec![1; 43], vec![2, 1, 13, 1, 1, 20, 5]] {
            let (of, tokens) = ((&sizes[..], window), batches.iter().sum());
            let mut text = Batches::new(ops, random, of, kv_type, tokens)?;
            let mut past = 0;
            for n in batches {
                text.step(ops, past, n)?;
                past += n;
            }
            outcome.merge(text.compare(tokens)?);
        }
    }
    Ok(outcome)
}

/// Values of a vector of the window.
const DIM: usize = 16;

/// Pairs of a vector that rotate.
const HALF: usize = 4;

/// What a compressor has on the device.
struct OnDevice {
    ape: Buffer,
    norm: Buffer,
    frequencies: Buffer,
    open: Buffer,
    cache: Buffer,
}

/// A text that comes in batches.
struct Batches {
    text: Pages,
    kv_type: KvType,
    rows: Vec<Rows>,
    on_device: Vec<OnDevice>,
    window: usize,
    /// `[tokens, DIM]`.
    vectors: Vec<f32>,
    ring: Buffer,
}

impl Batches {
    fn new(
        ops: &Ops,
        random: &mut Random,
        (sizes, window): (&[BlockSizes], usize),
        kv_type: KvType,
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let text = Pages::new(ops, tokens)?;
        let rows: Vec<Rows> = sizes
            .iter()
            .map(|sizes| Rows::new(random, *sizes, tokens, HALF))
            .collect();
        let buffer = |values: &[f32]| Buffer::of_f32(ops.device(), values);
        let on_device = rows.iter().map(|r| {
            let row = kv_type.row_bytes(r.sizes.dim as u64) as usize;
            let before = vec![0x5a; text.rows(r.sizes.ratio) * row];
            Ok::<_, CudaError>(OnDevice {
                ape: buffer(&r.ape)?,
                norm: buffer(&r.norm)?,
                frequencies: buffer(&r.frequencies)?,
                open: buffer(&vec![f32::NAN; r.sizes.state_values()])?,
                cache: Buffer::of_bytes(ops.device(), &before)?,
            })
        });
        Ok(Self {
            kv_type,
            on_device: on_device.collect::<Result<_, _>>()?,
            window,
            vectors: random.floats(tokens * DIM),
            ring: buffer(&vec![f32::NAN; window * DIM])?,
            rows,
            text,
        })
    }

    /// Pools what `n` tokens complete, and keeps them.
    fn step(&mut self, ops: &Ops, past: usize, n: usize) -> Result<(), CudaError> {
        self.text.set(past, n)?;
        let positions = self.text.batch.all();
        let part = |values: &[f32], width: usize| {
            Buffer::of_f32(ops.device(), &values[past * width..][..n * width])
        };
        let mut new = Vec::new();
        for r in &self.rows {
            let width = r.sizes.width();
            new.push([part(&r.values, width)?, part(&r.gates, width)?]);
        }
        let open = |i: usize| OpenRows {
            sizes: self.rows[i].sizes,
            values: new[i][0].view(),
            gates: new[i][1].view(),
            ape: self.on_device[i].ape.view(),
            open: self.on_device[i].open.view(),
        };
        for (i, of) in self.on_device.iter().enumerate() {
            ops.pool_blocks(&PoolBlocks {
                rows: open(i),
                norm: of.norm.view(),
                eps: EPS,
                frequencies: Frequencies {
                    values: of.frequencies.view(),
                    magnitude: 2.0,
                    kind: RopeKind::Adjacent,
                    first: self.rows[i].sizes.dim - 2 * HALF,
                    half: HALF,
                },
                positions,
                kv_type: self.kv_type,
                cache: of.cache.view(),
            })?;
        }
        let vectors = part(&self.vectors, DIM)?;
        ops.keep_compressed(&KeepCompressed {
            vectors: vectors.view(),
            key_dim: DIM,
            window: self.window,
            ring: self.ring.view(),
            rows: [0, 1].map(|i| (i < self.rows.len()).then(|| open(i))),
            positions,
        })
    }

    /// Compares the stored vectors, and the state.
    fn compare(&self, tokens: usize) -> Result<Outcome, CudaError> {
        let mut outcome = Outcome::default();
        let allowed = match self.kv_type {
            KvType::F32 => 1e-4,
            KvType::F16 => 1e-2,
            KvType::Q8_0 => 2e-1,
        };
        for (r, of) in self.rows.iter().zip(&self.on_device) {
            let (ratio, slots, width) = (r.sizes.ratio, r.sizes.slots(), r.sizes.width());
            let row = self.kv_type.row_bytes(r.sizes.dim as u64) as usize;
            let mut rest = of.cache.view().to_bytes()?;
            for block in 0..tokens / ratio {
                let bytes = &mut rest[self.text.at(block, ratio) * row..][..row];
                let got = widened(self.kv_type, bytes, r.sizes.dim);
                outcome.compare(&got, r.vector(block).into_iter().map(within(allowed)));
                bytes.fill(0x5a);
            }
            outcome.compare_exact(&rest, &vec![0x5a; rest.len()]);
            let open = of.open.view().to_f32()?;
            for p in tokens.saturating_sub(slots)..tokens {
                let ape = &r.ape[p % ratio * width..][..width];
                let gates = r.gates[p * width..][..width].iter().zip(ape);
                let mut kept = r.values[p * width..][..width].to_vec();
                kept.extend(gates.map(|(g, a)| g + a));
                outcome.compare_exact(&open[p % slots * 2 * width..][..2 * width], &kept);
            }
        }
        let kept = self.ring.view().to_f32()?;
        for p in tokens.saturating_sub(self.window)..tokens {
            let got = &kept[p % self.window * DIM..][..DIM];
            outcome.compare_exact(got, &self.vectors[p * DIM..][..DIM]);
        }
        Ok(outcome)
    }
}
