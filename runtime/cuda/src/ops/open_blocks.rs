//! Blocks of tokens with one vector each: the vectors of complete blocks, and what a text keeps of
//! the tokens of open ones.

use super::compressed::adjacent;
use super::{MAX_KEY, Positions, THREADS, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{Compressor, RopeKind};

/// Most threads per block that pools.
const MAX_POOL_THREADS: usize = 512;

/// Sizes of blocks of tokens with one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Tokens per block.
    pub ratio: usize,
    /// Whether blocks reach back into the block before. Then rows are twice as wide as vectors.
    pub overlap: bool,
    /// Values of a vector.
    pub dim: usize,
}

impl From<&Compressor> for BlockSizes {
    fn from(compressor: &Compressor) -> Self {
        Self {
            ratio: compressor.ratio,
            overlap: compressor.overlap,
            dim: compressor.width(),
        }
    }
}

impl BlockSizes {
    /// Returns the values of a token's row.
    pub fn width(self) -> usize {
        if self.overlap { 2 * self.dim } else { self.dim }
    }

    /// Returns the tokens whose rows are kept.
    pub fn slots(self) -> usize {
        if self.overlap {
            2 * self.ratio
        } else {
            self.ratio
        }
    }

    /// Returns the values of the state.
    pub fn state_values(self) -> usize {
        self.slots() * 2 * self.width()
    }
}

/// Rows of a text's tokens that blocks are pooled from.
#[derive(Clone, Copy)]
pub struct OpenRows<'a> {
    /// Sizes of the blocks.
    pub sizes: BlockSizes,
    /// `[tokens, width]`.
    pub values: View<'a>,
    /// `[tokens, width]`, without what their positions add.
    pub gates: View<'a>,
    /// What a position in the block adds to its gates, `[ratio, width]`.
    pub ape: View<'a>,
    /// The state, `[slots, 2, width]`: values and gates of tokens, each at its position's remainder.
    pub open: View<'a>,
}

impl OpenRows<'_> {
    /// Panics if a buffer is too short for `tokens` tokens.
    fn check(&self, tokens: usize) {
        let (sizes, width) = (self.sizes, self.sizes.width());
        assert!(sizes.ratio > 0 && sizes.dim <= MAX_KEY, "{sizes:?}");
        assert!(
            self.values.words() >= tokens * width && self.gates.words() >= tokens * width,
            "{tokens} rows of {width}"
        );
        assert!(
            self.ape.words() >= sizes.ratio * width && self.open.words() >= sizes.state_values(),
            "{sizes:?}"
        );
    }
}

/// Rotation at positions that have no turns on the device.
#[derive(Clone, Copy)]
pub struct Frequencies<'a> {
    /// Radians per position, `[half]`.
    pub values: View<'a>,
    /// Factor on what rotates.
    pub magnitude: f32,
    /// Which values are rotated together.
    pub kind: RopeKind,
    /// First value that rotates.
    pub first: usize,
    /// Rotated pairs.
    pub half: usize,
}

/// Blocks that a text's tokens may complete, and the cache of their vectors.
#[derive(Clone, Copy)]
pub struct PoolBlocks<'a> {
    /// The tokens' rows, and those before.
    pub rows: OpenRows<'a>,
    /// Weights of the vectors' norm, `[dim]`.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Rotation of a vector, as at the first position of its block.
    pub frequencies: Frequencies<'a>,
    /// The tokens, of one text.
    pub positions: Positions<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// `[blocks of the cache, dim]`.
    pub cache: View<'a>,
}

/// What a text keeps of its tokens.
#[derive(Clone, Copy)]
pub struct KeepCompressed<'a> {
    /// `[tokens, key_dim]`.
    pub vectors: View<'a>,
    /// Values of a vector.
    pub key_dim: usize,
    /// Vectors of the window.
    pub window: usize,
    /// `[window, key_dim]`.
    pub ring: View<'a>,
    /// Rows of up to two compressors.
    pub rows: [Option<OpenRows<'a>>; 2],
    /// The tokens, of one text.
    pub positions: Positions<'a>,
}

impl Ops {
    /// Makes the vectors of the blocks that a text's tokens complete, and stores them.
    ///
    /// One token alone may complete a block or not: the launch serves for every position.
    pub fn pool_blocks(&self, p: &PoolBlocks<'_>) -> Result<(), CudaError> {
        let (n, sizes, turns) = (p.positions.tokens(), p.rows.sizes, p.frequencies);
        p.rows.check(n);
        assert!(p.positions.runs().count() <= 1, "one text");
        assert!(p.norm.words() >= sizes.dim, "a norm of {}", sizes.dim);
        assert!(
            turns.first + 2 * turns.half <= sizes.dim && turns.values.words() >= turns.half,
            "{} turns from {} on",
            turns.half,
            turns.first
        );
        let row = p.kv_type.row_bytes(sizes.dim as u64) as usize;
        assert!(
            p.cache.len() >= p.positions.rows_of_blocks(sizes.ratio) * row,
            "cached vectors"
        );
        let n_blocks = match n {
            0 => 0,
            1 => 1,
            _ => (p.positions.of(0) + n) / sizes.ratio - p.positions.of(0) / sizes.ratio,
        };
        let kernel = match p.kv_type {
            KvType::F32 => "pool_blocks_f32",
            KvType::F16 => "pool_blocks_f16",
            KvType::Q8_0 => "pool_blocks_q8",
        };
        let [positions, begins, tables, page_bits] = p.positions.args();
        let args = [
            p.rows.values.arg(),
            p.rows.gates.arg(),
            p.rows.ape.arg(),
            p.rows.open.arg(),
            int(sizes.ratio),
            Arg::Int(i32::from(sizes.overlap)),
            int(sizes.dim),
            p.norm.arg(),
            Arg::Float(p.eps),
            turns.values.arg(),
            Arg::Float(turns.magnitude),
            int(turns.half),
            adjacent(turns.kind),
            int(turns.first),
            int(n),
            positions,
            begins,
            tables,
            page_bits,
            p.cache.arg(),
        ];
        let threads = sizes.dim.next_multiple_of(32).min(MAX_POOL_THREADS);
        self.launch(kernel, [blocks(n_blocks, 1), 1, 1], threads as u32, &args)
    }

    /// Writes the vectors and rows of a text's tokens to its state: the last ones, as far as the
    /// tokens after them need them.
    pub fn keep_compressed(&self, k: &KeepCompressed<'_>) -> Result<(), CudaError> {
        let (n, dim) = (k.positions.tokens(), k.key_dim);
        assert!(k.positions.runs().count() <= 1 && k.window > 0, "one text");
        assert!(
            k.vectors.words() >= n * dim && k.ring.words() >= k.window * dim,
            "{n} vectors of {dim}"
        );
        k.rows.iter().flatten().for_each(|rows| rows.check(n));
        let (mut args, mut kept, mut columns) = (Vec::new(), k.window, dim);
        args.extend([k.vectors.arg(), int(dim), int(k.window), k.ring.arg()]);
        for rows in &k.rows {
            let pointers = rows.map(|r| [r.values, r.gates, r.ape, r.open].map(View::arg));
            args.extend(pointers.unwrap_or([Arg::Pointer(0); 4]));
            let sizes = rows.map(|r| r.sizes);
            let slots = sizes.map_or(1, BlockSizes::slots);
            let width = sizes.map_or(0, BlockSizes::width);
            args.extend([int(sizes.map_or(1, |s| s.ratio)), int(slots), int(width)]);
            (kept, columns) = (kept.max(slots), columns + 2 * width);
        }
        args.extend([int(n), k.positions.at().arg()]);
        let grid = [blocks(columns, THREADS), few(n.min(kept)), 1];
        self.launch("keep_compressed", grid, THREADS, &args)
    }
}
