//! Attention of DeepSeek V4 on a GPU: a window of near tokens, and compressed vectors of the blocks
//! before. The arithmetic is that of `layers/compressed.rs` and `layers/compressed_index.rs`.
//!
//! Blocks that a batch completes are stored first, then all tokens attend, and the state is written
//! last: kernels find what is before the batch in the state, and the batch's own rows beside it.

use super::block_rope::BlockRope;
use super::buffers::GpuBuffers;
use super::full::MAX_TEXTS;
use super::matrix::{GpuLoader, Matrix, of_rows, products};
use super::mixer::{Mixed, MixerBatch, after_states, output};
use super::mla::HeadMatrices;
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::Segment;
use crate::layers::pages::StateIdx;
use std::ops::Range;
use tier_plan_cuda::ops::{
    AttendCompressed, BatchMatrices, BlockKeys, BlockSizes, Choice, CompressedRows, FarRows,
    IndexHeads, IndexQueries, Input, KeepCompressed, OpenRows, PoolBlocks, RopeTurns, TokenGroup,
    TokenGroups, TurnBack,
};
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::{CompressedIndex, CompressedSpec, Compressor};

/// What makes one vector of a block of tokens.
struct BlockPool {
    sizes: BlockSizes,
    values: Matrix,
    gates: Matrix,
    ape: Buffer,
    norm: Buffer,
}

impl BlockPool {
    fn new(loader: &GpuLoader<'_>, compressor: &Compressor) -> Result<Self, CudaError> {
        Ok(Self {
            sizes: BlockSizes::from(compressor),
            values: loader.linear(&compressor.kv)?,
            gates: loader.linear(&compressor.gate)?,
            ape: loader.vector(compressor.ape)?,
            norm: loader.vector(compressor.norm)?,
        })
    }
}

/// What chooses among complete blocks.
struct Index {
    spec: CompressedIndex,
    choice: Choice,
    q: Matrix,
    head_weights: Matrix,
}

/// The rotation of a layer.
struct Rope {
    /// Index of its table.
    table: usize,
    of_blocks: BlockRope,
}

/// The projections of groups of heads to the output.
struct GroupOutput {
    matrices: HeadMatrices,
    bias: Option<Buffer>,
    /// Group of each job where there are few rows.
    which: Buffer,
    /// Where groups of rows are described where there are many.
    groups: Buffer,
}

/// A layer's attention with its cache and state.
pub(super) struct Compressed {
    spec: CompressedSpec,
    q_down: Matrix,
    q_norm: Buffer,
    q: Matrix,
    kv: Matrix,
    kv_norm: Buffer,
    sinks: Buffer,
    /// That of the vectors, then that of the index.
    pools: Vec<BlockPool>,
    index: Option<Index>,
    o_down: GroupOutput,
    o: Matrix,
    rope: Rope,
    cache: DeviceCache,
}

impl Compressed {
    /// Loads the matrices and vectors. `rope` is the layer's rope table.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        a: &CompressedSpec,
        rope: usize,
        cache: DeviceCache,
    ) -> Result<Self, CudaError> {
        let device = loader.device;
        let index = a.far.and_then(|far| far.index).map(|spec| {
            Ok::<_, CudaError>(Index {
                q: loader.linear(&spec.q)?,
                head_weights: loader.linear(&spec.weights)?,
                choice: Choice::from(&spec),
                spec,
            })
        });
        let (whole, rank) = (loader.linear(&a.o_down)?, a.o_down.n_out / a.n_group);
        let jobs = 0..MAX_TEXTS * a.n_group;
        let which: Vec<i32> = jobs.map(|job| (job % a.n_group) as i32).collect();
        let bias = loader.weights.bias(&a.o_down);
        let pools = a.compressors().map(|c| BlockPool::new(loader, c));
        Ok(Self {
            q_down: loader.linear(&a.q_down.down)?,
            q_norm: loader.vector(a.q_down.norm)?,
            q: loader.linear(&a.q)?,
            kv: loader.linear(&a.kv)?,
            kv_norm: loader.vector(a.kv_norm)?,
            sinks: loader.vector(a.sinks)?,
            pools: pools.collect::<Result<_, _>>()?,
            index: index.transpose()?,
            o_down: GroupOutput {
                matrices: HeadMatrices::new(loader, &whole, 0, rank, rank)?,
                bias: bias.map(|bias| Buffer::of_f32(device, bias)).transpose()?,
                which: Buffer::of_i32(device, &which)?,
                groups: Buffer::new_f32(device, TokenGroups::WORDS * a.n_group)?,
            },
            o: loader.linear(&a.o)?,
            rope: Rope {
                table: rope,
                of_blocks: BlockRope::new(loader, &a.rope, rope)?,
            },
            cache,
            spec: a.clone(),
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        let pools = self.pools.iter().flat_map(|p| [&p.values, &p.gates]);
        let index = self.index.iter().map(|index| &index.head_weights);
        let own = [&self.q_down, &self.kv].into_iter();
        own.chain(pools).chain(index).any(Matrix::takes_quants)
    }

    /// Stores the tokens' vectors and the blocks that they complete, and computes their attention.
    /// Rows that a checkpoint follows end a launch that writes the state.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let MixerBatch { n, segments, .. } = batch;
        let chooses = self.chooses(buffers);
        self.project(ops, buffers, batch, chooses)?;
        for segment in segments {
            self.pool(ops, buffers, segment, batch)?;
        }
        if chooses {
            self.choose(ops, buffers)?;
        }
        for segment in segments {
            self.attend(ops, buffers, segment, chooses, n)?;
            let segment = std::slice::from_ref(segment);
            after_states(segment, &self.cache, |rows, state| {
                self.keep(ops, buffers, &rows, (state, n))
            })?;
        }
        self.output(ops, buffers, n)
    }

    /// Returns whether a token may see more blocks than it attends to.
    fn chooses(&self, buffers: &GpuBuffers) -> bool {
        let positions = buffers.positions.all();
        let mut index = self.index.iter();
        index.any(|index| positions.may_list(index.choice))
    }

    /// Returns where values (0) or gates (1) of a compressor's `n` rows are in `buffers.raw`.
    fn open(&self, pool: usize, part: usize, n: usize) -> Range<usize> {
        let before = self.pools[..pool].iter().map(|p| 2 * p.sizes.width());
        let width = self.pools[pool].sizes.width();
        let first = n * (before.sum::<usize>() + part * width);
        first..first + n * width
    }

    /// Returns a compressor's rows of some of the batch's `n` tokens.
    fn open_rows<'a>(
        &'a self,
        buffers: &'a GpuBuffers,
        pool: usize,
        rows: &Range<usize>,
        (state, n): (StateIdx, usize),
    ) -> OpenRows<'a> {
        let BlockPool { sizes, ape, .. } = &self.pools[pool];
        let of = |part: usize| {
            let all = buffers.raw.view().floats(self.open(pool, part, n));
            of_rows(all, rows, sizes.width())
        };
        let before = self.pools[..pool].iter().map(|p| p.sizes.state_values());
        let first = self.spec.window_values() + before.sum::<usize>();
        let state = self.cache.state(0, state);
        OpenRows {
            sizes: *sizes,
            values: of(0),
            gates: of(1),
            ape: ape.view(),
            open: state.floats(first..first + sizes.state_values()),
        }
    }

    fn turns<'a>(&self, buffers: &'a GpuBuffers) -> RopeTurns<'a> {
        RopeTurns {
            values: buffers.turns[self.rope.table].view(),
            kind: self.spec.rope.kind,
            half: self.spec.rope.dims / 2,
        }
    }

    /// Projects to queries in `buffers.q`, to vectors in `buffers.k`, and to the compressors' rows in
    /// `buffers.raw`; where a token `chooses`, to queries of the index in `buffers.v`, and to weights
    /// of its heads. Normalizes and rotates.
    fn project(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
        chooses: bool,
    ) -> Result<(), CudaError> {
        let (a, MixerBatch { n, eps, .. }) = (&self.spec, batch);
        let (x, low, raw) = (
            buffers.answer.view(),
            buffers.low.view(),
            buffers.raw.view(),
        );
        let (q, kv, index_q) = (buffers.q.view(), buffers.k.view(), buffers.v.view());
        let mut matrices = vec![(&self.q_down, low), (&self.kv, kv)];
        for (i, pool) in self.pools.iter().enumerate() {
            matrices.push((&pool.values, raw.floats(self.open(i, 0, n))));
            matrices.push((&pool.gates, raw.floats(self.open(i, 1, n))));
        }
        let index = self.index.as_ref().filter(|_| chooses);
        matrices.extend(index.map(|i| (&i.head_weights, buffers.index_weights.view())));
        products(ops, &matrices, n, x, &buffers.quants)?;
        let rank = self.q_down.n_out;
        ops.rms_norm(low, Some(self.q_norm.view()), n, rank, eps, low)?;
        let mut matrices = vec![(&self.q, q)];
        matrices.extend(index.map(|index| (&index.q, index_q)));
        if matrices.iter().any(|(matrix, _)| matrix.takes_quants()) {
            ops.quantize(low, n, rank, &mut buffers.inner)?;
        }
        products(ops, &matrices, n, low, &buffers.inner)?;
        ops.place_compressed(&CompressedRows {
            queries: q,
            n_head: a.n_head,
            key_dim: a.key_dim,
            vectors: kv,
            norm: self.kv_norm.view(),
            eps,
            index: index.map(|index| IndexHeads {
                queries: index_q,
                n_head: index.spec.n_head,
                key_dim: index.spec.key_dim,
            }),
            turns: self.turns(buffers),
            tokens: n,
        })
    }

    /// Stores the vectors of the blocks that a text's tokens complete, and the index's keys of them.
    fn pool(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        segment: &Segment<'_>,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let (rotated, rows) = (self.spec.rope.dims, &segment.rows);
        for (i, pool) in self.pools.iter().enumerate() {
            ops.pool_blocks(&PoolBlocks {
                rows: self.open_rows(buffers, i, rows, (segment.state, batch.n)),
                norm: pool.norm.view(),
                eps: batch.eps,
                frequencies: self.rope.of_blocks.from(pool.sizes.dim - rotated),
                positions: buffers.positions.all().part(rows.clone()),
                kv_type: self.cache.kv_type(),
                cache: self.cache.rows(i),
            })?;
        }
        Ok(())
    }

    /// Lists in `buffers.chosen` the blocks that tokens choose which see more than they attend to.
    fn choose(&self, ops: &Ops, buffers: &GpuBuffers) -> Result<(), CudaError> {
        let Some(Index { spec, choice, .. }) = &self.index else {
            return Ok(());
        };
        let queries = IndexQueries {
            queries: buffers.v.view(),
            n_head: spec.n_head,
            key_dim: spec.key_dim,
            head_weights: Some(buffers.index_weights.view()),
            scale: 1.0 / ((spec.n_head * spec.key_dim) as f32).sqrt(),
            positions: buffers.positions.all(),
            kv_type: self.cache.kv_type(),
            keys: self.cache.rows(1),
            key_rows: BlockKeys::OfBlocks,
            choice: *choice,
        };
        ops.choose_positions(&queries, buffers.ratings.view(), buffers.chosen.view())
    }

    /// Computes attention of a text's tokens, to `buffers.latents`.
    fn attend(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        segment: &Segment<'_>,
        chooses: bool,
        n: usize,
    ) -> Result<(), CudaError> {
        let (a, rows) = (&self.spec, &segment.rows);
        let choice = self.index.as_ref().map(|index| index.choice);
        let lists = |choice: Choice| of_rows(buffers.chosen.view(), rows, choice.kept);
        let state = self.cache.state(0, segment.state);
        let attention = AttendCompressed {
            queries: of_rows(buffers.q.view(), rows, a.q.n_out),
            n_head: a.n_head,
            key_dim: a.key_dim,
            scale: a.scale,
            vectors: of_rows(buffers.k.view(), rows, a.key_dim),
            window: a.window,
            ring: state.floats(0..a.window_values()),
            far: self.pools.first().map(|pool| FarRows {
                rows: self.cache.rows(0),
                kv_type: self.cache.kv_type(),
                ratio: pool.sizes.ratio,
                choice,
                lists: choice.filter(|_| chooses).map(lists),
            }),
            sinks: self.sinks.view(),
            positions: buffers.positions.all().part(rows.clone()),
        };
        debug_assert!(rows.end <= n, "rows of the batch");
        let out = of_rows(buffers.latents.view(), rows, a.q.n_out);
        ops.attend_compressed(&attention, &buffers.attend, out)
    }

    /// Writes rows of a text, which are of the batch's `n`, to its state.
    fn keep(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        rows: &Range<usize>,
        (state, n): (StateIdx, usize),
    ) -> Result<(), CudaError> {
        let a = &self.spec;
        let open = |i: usize| self.open_rows(buffers, i, rows, (state, n));
        ops.keep_compressed(&KeepCompressed {
            vectors: of_rows(buffers.k.view(), rows, a.key_dim),
            key_dim: a.key_dim,
            window: a.window,
            ring: self.cache.state(0, state).floats(0..a.window_values()),
            rows: [0, 1].map(|i| (i < self.pools.len()).then(|| open(i))),
            positions: buffers.positions.all().part(rows.clone()),
        })
    }

    /// Turns results back, takes each group of heads to `buffers.mixed`, and all to the output.
    fn output(&self, ops: &Ops, buffers: &mut GpuBuffers, n: usize) -> Result<(), CudaError> {
        let (a, o_down) = (&self.spec, &self.o_down);
        let (groups, width, rank) = (a.n_group, a.o_down.n_in, a.o_down.n_out / a.n_group);
        let (found, x, mixed) = (
            buffers.latents.view(),
            buffers.q.view(),
            buffers.mixed.view(),
        );
        // Recorded steps have few rows: they may not send groups.
        let is_few = n <= MAX_TEXTS;
        let turned = TurnBack {
            x: found,
            heads: a.n_head,
            dim: a.key_dim,
            turns: self.turns(buffers),
            tokens: n,
            group: (!is_few).then_some(a.n_head / groups),
        };
        // The queries are read.
        ops.turn_back(&turned, x)?;
        let (matrices, inner) = (&o_down.matrices, &mut buffers.inner);
        if is_few {
            matrices.product(ops, &o_down.which, n * groups, x, inner, mixed)?;
        } else {
            if matrices.takes_quants() {
                ops.quantize(x, n * groups, width, inner)?;
            }
            let group = |matrix: usize| TokenGroup {
                matrix,
                first: matrix * n,
                tokens: n,
            };
            let each: Vec<TokenGroup> = (0..groups).map(group).collect();
            let sent = TokenGroups::send(&each, o_down.groups.view())?;
            let (ty, batch) = (matrices.ty, BatchMatrices::Groups(&matrices.table, sent));
            let x = Input::for_type(ty, x, inner);
            ops.matmul(ty, batch, rank, width, x, found)?;
            ops.ungroup(found, groups, n, rank, mixed)?;
        }
        if let Some(bias) = &o_down.bias {
            ops.add_bias(mixed, bias.view(), None, n, groups * rank)?;
        }
        output(ops, &self.o, n, buffers, Mixed::Floats)
    }
}
