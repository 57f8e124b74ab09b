//! The kernels as typed operations: sizes are checked here, once, so that no kernel looks beyond its buffers.

use super::device::{Arg, Buffer, Device, Grid, View};
use super::{CudaError, source};
use crate::kernels::needs_quants;
use crate::model::kv::KvType;
use crate::model::spec::{Activation, Gating, RopeKind};
use crate::quant::TensorType;
use std::sync::Arc;

/// Threads of a block where nothing asks for another number.
const THREADS: u32 = 256;

/// Rows of a matrix that a block multiplies, a warp each.
const MATVEC_ROWS: usize = 4;

/// Rows of a block of a product with many tokens, as the kernel has them.
const TILE_ROWS: u32 = 64;

/// Tokens of such a block.
const TILE_TOKENS: usize = 32;

/// Positions of a chunk of the context, as the kernel has it.
pub const CHUNK: usize = 256;

/// Query heads of an attention block, as the kernel has it.
const HEADS: usize = 8;

/// The widest key, as the kernel has it.
pub const MAX_KEY: usize = 640;

/// Experts of a layer at most, as the router has it.
pub const MAX_EXPERTS: usize = 1024;

/// Groups of experts at most, as the router has it.
pub const MAX_GROUPS: usize = 128;

/// Operations on a device.
#[derive(Clone)]
pub struct Ops {
    device: Arc<dyn Device>,
}

/// 8-bit activations on a device, 32 values a scale, quantised as the processor quantises them.
pub struct Quants {
    /// `[rows, cols]`.
    pub codes: Buffer,
    /// `[rows, cols / 32]`.
    pub scales: Buffer,
    /// `[rows, cols / 16]`: scale times the sum of codes.
    pub sums: Buffer,
    room: usize,
    rows: usize,
    cols: usize,
}

impl Quants {
    /// Room for `values` values.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(device: &Arc<dyn Device>, values: usize) -> Result<Self, CudaError> {
        Ok(Self {
            codes: Buffer::new(device, values)?,
            scales: Buffer::room_f32(device, values / 32)?,
            sums: Buffer::room_f32(device, values / 16)?,
            room: values,
            rows: 0,
            cols: 0,
        })
    }
}

/// Matrices of one type and size: one for all jobs, or several of which each job has one.
#[derive(Clone, Copy)]
pub enum Matrices<'a> {
    /// The same for every job.
    One(View<'a>),
    /// The job's own, by number.
    Table(&'a Table<'a>),
    /// The one that `which`, `[jobs]` whole numbers on the device, says; a number outside the table is none, and the
    /// job's result stays as it is.
    Chosen(&'a Table<'a>, View<'a>),
}

/// Matrices by number; some may be missing.
pub struct Table<'a> {
    pointers: Buffer,
    n: usize,
    /// Bytes of the smallest; none when all are missing.
    least: Option<usize>,
    /// What it names, where it keeps it itself.
    _held: Vec<Arc<Buffer>>,
    _borrowed: std::marker::PhantomData<View<'a>>,
}

/// Bytes of a buffer that has several owners.
pub type SharedPart = (Arc<Buffer>, std::ops::Range<usize>);

impl Table<'static> {
    /// A table that keeps the memory of its matrices.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a matrix is not inside its buffer.
    pub fn owning(device: &Arc<dyn Device>, matrices: Vec<Option<SharedPart>>) -> Result<Self, CudaError> {
        let views: Vec<_> =
            matrices.iter().map(|m| m.as_ref().map(|(buffer, range)| buffer.view().part(range.clone()))).collect();
        let Table { pointers, n, least, .. } = Table::new(device, &views)?;
        let held = matrices.into_iter().flatten().map(|(buffer, _)| buffer).collect();
        Ok(Self { pointers, n, least, _held: held, _borrowed: std::marker::PhantomData })
    }
}

impl<'a> Table<'a> {
    /// A table on the device of its matrices.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a matrix does not begin at a multiple of 16.
    pub fn new(device: &Arc<dyn Device>, matrices: &[Option<View<'a>>]) -> Result<Self, CudaError> {
        let address = |m: &Option<View<'a>>| m.map_or(0, |view| view.aligned().address()).to_ne_bytes();
        let bytes: Vec<u8> = matrices.iter().flat_map(address).collect();
        Ok(Self {
            pointers: Buffer::of_bytes(device, &bytes)?,
            n: matrices.len(),
            least: matrices.iter().flatten().map(|m| m.len()).min(),
            _held: Vec::new(),
            _borrowed: std::marker::PhantomData,
        })
    }
}

/// Tokens of a batch that one matrix of a table is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The matrix, by its number; one that is missing leaves its results as they are.
    pub matrix: usize,
    /// The first token, of those gathered.
    pub first: usize,
    /// Tokens.
    pub tokens: usize,
}

/// Matrices of a product with many tokens.
#[derive(Clone, Copy)]
pub enum Batch<'a> {
    /// One matrix and so many tokens.
    One(View<'a>, usize),
    /// Several, each with tokens of its own.
    Groups(&'a Table<'a>, &'a [Group]),
}

/// Activations of a product.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// For quantised formats.
    Quants(&'a Quants),
    /// For F32, F16 and BF16: `[rows, cols]`.
    Floats(View<'a>),
}

/// Attention of tokens to a cache.
#[derive(Clone, Copy)]
pub struct Attend<'a> {
    /// `[tokens, n_head_kv * group, key_width]`.
    pub queries: View<'a>,
    /// `[n_head_kv, context, key_width]`.
    pub keys: View<'a>,
    /// `[n_head_kv, context, value_row_width]`; may be the keys.
    pub values: View<'a>,
    /// How both are stored.
    pub kv_type: KvType,
    /// Positions that there is room for.
    pub context: usize,
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Query heads that read each of them.
    pub group: usize,
    /// Values of a key.
    pub key_width: usize,
    /// Values of a row of `values`.
    pub value_row_width: usize,
    /// The first of them, which are mixed.
    pub value_width: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Tokens, whose rows are stored already.
    pub tokens: usize,
    /// Tokens before them.
    pub past: usize,
    /// Positions that a token sees at most.
    pub window: Option<usize>,
    /// A score a head beside those of the positions, `[n_head_kv * group]`.
    pub sinks: Option<View<'a>>,
}

/// How a router chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Experts of the layer.
    pub n_expert: usize,
    /// Experts of a token.
    pub n_used: usize,
    /// Logits to scores.
    pub gating: Gating,
    /// Groups, and how many of them may be chosen from.
    pub groups: Option<(usize, usize)>,
    /// Divide the chosen weights by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f32,
}

fn int(value: usize) -> Arg {
    Arg::Int(i32::try_from(value).unwrap_or_else(|_| panic!("{value} is too large for a kernel")))
}

fn null_or(view: Option<View<'_>>) -> Arg {
    view.map_or(Arg::Pointer(0), View::arg)
}

/// Blocks of `threads` for `n` threads.
fn blocks(n: usize, threads: u32) -> u32 {
    let blocks = n.div_ceil(threads as usize);
    u32::try_from(blocks).ok().filter(|b| *b <= i32::MAX as u32).unwrap_or_else(|| panic!("{n} threads"))
}

/// The second or third number of blocks, which can't be as large as the first.
fn few(n: usize) -> u32 {
    assert!(n <= 65_535, "{n} jobs in one launch");
    n as u32
}

impl Ops {
    /// Operations on a device.
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { device }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn launch(&self, kernel: &'static str, blocks: [u32; 3], threads: u32, args: &[Arg]) -> Result<(), CudaError> {
        if blocks.contains(&0) {
            return Ok(());
        }
        // SAFETY: every caller in this module passes the kernel's arguments and has checked that its buffers, all of this
        // device, are as long as the kernel goes.
        unsafe { self.device.launch(kernel, Grid { blocks, threads }, args) }
    }

    /// Quantises `[rows, cols]` to 8 bits, as the processor does, to the bit.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `cols` is no multiple of 32, or there is not room.
    pub fn quantize(&self, x: View<'_>, rows: usize, cols: usize, out: &mut Quants) -> Result<(), CudaError> {
        assert!(
            cols.is_multiple_of(32) && rows * cols <= out.room && x.words() >= rows * cols,
            "{rows} x {cols} values"
        );
        (out.rows, out.cols) = (rows, cols);
        let n_runs = rows * cols / 32;
        let args = [x.arg(), int(n_runs), out.codes.view().arg(), out.scales.view().arg(), out.sums.view().arg()];
        self.launch("quantize", [blocks(n_runs, THREADS / 32), 1, 1], THREADS, &args)
    }

    /// `out[job, row] = sum over c of w[row, c] * x[job / jobs_per_x, c]`, `out` `[jobs, n_rows]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn matvec(
        &self,
        ty: TensorType,
        matrices: Matrices<'_>,
        jobs: usize,
        n_rows: usize,
        n_cols: usize,
        x: Input<'_>,
        jobs_per_x: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = ty.row_bytes(n_cols as u64).unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize;
        let (one, table, which) = match matrices {
            Matrices::One(w) => (Some(w.aligned()), None, None),
            Matrices::Table(table) => (None, Some(table), None),
            Matrices::Chosen(table, which) => (None, Some(table), Some(which)),
        };
        let least = one.map(View::len).or(table.and_then(|t| t.least));
        assert!(least.is_none_or(|len| len >= n_rows * row_bytes), "{n_rows} rows of {row_bytes} bytes");
        assert!(which.is_none_or(|w| w.words() >= jobs), "{jobs} choices");
        assert!(jobs_per_x > 0 && out.words() >= jobs * n_rows, "{jobs} x {n_rows} results");
        let x_rows = jobs.div_ceil(jobs_per_x);
        let n_table = table.map_or(0, |t| t.n);
        let mut args = vec![null_or(one), null_or(table.map(|t| t.pointers.view())), int(n_table), null_or(which)];
        args.extend([int(n_rows), int(n_cols)]);
        match x {
            Input::Quants(x) => {
                assert!(needs_quants(ty) && x.rows >= x_rows && x.cols == n_cols, "activations for {ty}");
                args.extend([x.codes.view().arg(), x.scales.view().arg(), x.sums.view().arg()]);
            }
            Input::Floats(x) => {
                assert!(!needs_quants(ty) && x.words() >= x_rows * n_cols, "activations for {ty}");
                args.push(x.aligned().arg());
            }
        }
        args.extend([int(jobs_per_x), out.arg()]);
        let grid = [blocks(n_rows, MATVEC_ROWS as u32), few(jobs), 1];
        self.launch(source::matvec_kernel(ty), grid, 32 * MATVEC_ROWS as u32, &args)
    }

    /// `out[token, row] = sum over c of w[row, c] * x[token, c]` of a quantised type, for many tokens at a time.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, or the type is not quantised.
    pub fn matmul(
        &self,
        ty: TensorType,
        batch: Batch<'_>,
        n_rows: usize,
        n_cols: usize,
        x: &Quants,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = ty.row_bytes(n_cols as u64).unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize;
        let (one, table, groups) = match batch {
            Batch::One(w, tokens) => (Some(w.aligned()), None, vec![Group { matrix: 0, first: 0, tokens }]),
            Batch::Groups(table, groups) => (None, Some(table), groups.to_vec()),
        };
        let least = one.map(View::len).or(table.and_then(|t| t.least));
        assert!(least.is_none_or(|len| len >= n_rows * row_bytes), "{n_rows} rows of {row_bytes} bytes");
        let last = groups.iter().map(|g| g.first + g.tokens).max().unwrap_or(0);
        assert!(x.cols == n_cols && x.rows >= last && out.words() >= last * n_rows, "{last} x {n_rows} results");
        let n_table = table.map_or(0, |t| t.n);
        let numbers: Vec<i32> = groups.iter().flat_map(|g| [g.matrix, g.first, g.tokens]).map(|v| v as i32).collect();
        let numbers = if table.is_some() { Some(Buffer::of_i32(&self.device, &numbers)?) } else { None };
        let most = groups.iter().map(|g| g.tokens).max().unwrap_or(0);
        let args = [
            null_or(one),
            null_or(table.map(|t| t.pointers.view())),
            int(n_table),
            null_or(numbers.as_ref().map(Buffer::view)),
            int(most),
            int(n_rows),
            int(n_cols),
            x.codes.view().arg(),
            x.scales.view().arg(),
            x.sums.view().arg(),
            out.arg(),
        ];
        let grid = [blocks(n_rows, TILE_ROWS), few(most.div_ceil(TILE_TOKENS)), few(groups.len())];
        self.launch(source::matmul_kernel(ty), grid, 128, &args)
    }

    /// Decodes rows of `n_cols` values: those numbered by `rows`, `out` `[rows, n_cols]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a row is not there, or a size does not fit.
    pub fn dequantize(
        &self,
        ty: TensorType,
        w: View<'_>,
        n_cols: usize,
        rows: &[u32],
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = ty.row_bytes(n_cols as u64).unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize;
        let last = rows.iter().max().map_or(0, |row| *row as usize + 1);
        assert!(w.len() >= last * row_bytes && out.words() >= rows.len() * n_cols, "{last} rows of {row_bytes} bytes");
        let numbers: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let which = Buffer::of_i32(&self.device, &numbers)?;
        let args = [w.aligned().arg(), which.view().arg(), int(rows.len()), int(n_cols), out.arg()];
        let n = rows.len() * if needs_quants(ty) { n_cols / 32 } else { n_cols };
        self.launch(source::dequantize_kernel(ty), [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight` for each of `rows` rows of `width` values; `out` may be `x`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn rms_norm(
        &self,
        x: View<'_>,
        weight: Option<View<'_>>,
        rows: usize,
        width: usize,
        eps: f32,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(x.words() >= rows * width && out.words() >= rows * width, "{rows} rows of {width}");
        assert!(weight.is_none_or(|w| w.words() >= width), "{width} weights");
        let args = [x.arg(), null_or(weight), int(width), Arg::Float(eps), out.arg()];
        self.launch("rms_norm", [blocks(rows, 1), 1, 1], THREADS, &args)
    }

    /// Rotates the first values of every head of `[tokens, heads, head_dim]`; `turns` is `[tokens, half]` of cosine and
    /// sine, prepared on the processor, so that scaling needs no kernel.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn rope(
        &self,
        x: View<'_>,
        turns: View<'_>,
        kind: RopeKind,
        tokens: usize,
        heads: usize,
        head_dim: usize,
        half: usize,
    ) -> Result<(), CudaError> {
        assert!(2 * half <= head_dim && x.words() >= tokens * heads * head_dim, "{tokens} x {heads} x {head_dim}");
        assert!(turns.words() >= 2 * tokens * half, "{tokens} x {half} turns");
        let neighbours = i32::from(kind == RopeKind::Adjacent);
        let args = [x.arg(), turns.arg(), int(head_dim), int(half), Arg::Int(neighbours)];
        self.launch("rope", [blocks(heads, 1), few(tokens), 1], 64, &args)
    }

    /// Stores `[tokens, heads, width]` in a cache `[heads, context, width]` from position `past` on.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, or `width` is no multiple of 4.
    pub fn store(
        &self,
        kv_type: KvType,
        x: View<'_>,
        tokens: usize,
        heads: usize,
        width: usize,
        context: usize,
        past: usize,
        cache: View<'_>,
    ) -> Result<(), CudaError> {
        let bytes = heads * context * kv_type.row_bytes(width as u64) as usize;
        assert!(width.is_multiple_of(4) && x.words() >= tokens * heads * width, "{tokens} x {heads} x {width}");
        assert!(past + tokens <= context && cache.len() >= bytes, "{past} + {tokens} of {context} positions");
        let kernel = match kv_type {
            KvType::F32 => "store_f32",
            KvType::F16 => "store_f16",
            KvType::Q8_0 => "store_q8",
        };
        let args = [x.arg(), int(width), int(context), int(past), cache.arg()];
        self.launch(kernel, [blocks(heads, 1), few(tokens), 1], 128, &args)
    }

    /// Attention; `out` is `[tokens, n_head_kv * group, value_width]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, a width is no multiple of 4, or keys are wider than [`MAX_KEY`].
    pub fn attend(&self, a: &Attend<'_>, out: View<'_>) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        let cache = |width: usize| a.n_head_kv * a.context * a.kv_type.row_bytes(width as u64) as usize;
        assert!(a.key_width.is_multiple_of(4) && a.value_row_width.is_multiple_of(4), "widths of rows");
        assert!(a.key_width <= MAX_KEY && a.value_width <= a.value_row_width, "keys of {}", a.key_width);
        assert!(a.past + a.tokens <= a.context && a.group > 0, "{} + {} of {}", a.past, a.tokens, a.context);
        assert!(a.keys.len() >= cache(a.key_width) && a.values.len() >= cache(a.value_row_width), "cached rows");
        assert!(a.queries.words() >= a.tokens * heads * a.key_width, "queries");
        assert!(out.words() >= a.tokens * heads * a.value_width, "room for attention");
        assert!(a.sinks.is_none_or(|s| s.words() >= heads), "a sink a head");
        if a.tokens == 0 {
            return Ok(());
        }
        let first = a.window.map_or(0, |window| (a.past + 1).saturating_sub(window)) / CHUNK;
        let chunks = (a.past + a.tokens).div_ceil(CHUNK) - first;
        let queries = a.tokens * heads;
        let mixed = Buffer::room_f32(&self.device, queries * chunks * a.value_width)?;
        let (largest, sums) =
            (Buffer::room_f32(&self.device, queries * chunks)?, Buffer::room_f32(&self.device, queries * chunks)?);
        let kernel = match a.kv_type {
            KvType::F32 => "attend_f32",
            KvType::F16 => "attend_f16",
            KvType::Q8_0 => "attend_q8",
        };
        let args = [
            a.queries.arg(),
            a.keys.aligned().arg(),
            a.values.aligned().arg(),
            int(a.context),
            int(a.n_head_kv),
            int(a.group),
            int(a.key_width),
            int(a.value_row_width),
            int(a.value_width),
            Arg::Float(a.scale),
            int(a.past),
            int(a.window.unwrap_or(0)),
            int(first),
            mixed.view().arg(),
            largest.view().arg(),
            sums.view().arg(),
        ];
        let grid = [blocks(chunks, 1), few(a.n_head_kv * a.group.div_ceil(HEADS)), few(a.tokens)];
        self.launch(kernel, grid, 128, &args)?;
        let (mixed, largest, sums) = (mixed.view(), largest.view(), sums.view());
        let args =
            [mixed.arg(), largest.arg(), sums.arg(), int(chunks), int(a.value_width), null_or(a.sinks), out.arg()];
        self.launch("join_chunks", [blocks(heads, 1), few(a.tokens), 1], 128, &args)
    }

    /// Chooses experts for each token: `experts` and `weights` are `[tokens, n_used]`, largest score first.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, or there are more experts or groups than the kernel has room for.
    pub fn route(
        &self,
        r: &Routing,
        logits: View<'_>,
        bias: Option<View<'_>>,
        tokens: usize,
        experts: View<'_>,
        weights: View<'_>,
    ) -> Result<(), CudaError> {
        let (n_group, n_kept) = r.groups.unwrap_or((0, 0));
        assert!(r.n_used <= r.n_expert && r.n_expert <= MAX_EXPERTS && n_group <= MAX_GROUPS, "{r:?}");
        assert!(n_group == 0 || r.n_expert.is_multiple_of(n_group), "{r:?}");
        assert!(logits.words() >= tokens * r.n_expert && bias.is_none_or(|b| b.words() >= r.n_expert), "logits");
        assert!(experts.words() >= tokens * r.n_used && weights.words() >= tokens * r.n_used, "room for choices");
        let gating = match r.gating {
            Gating::Softmax => 0,
            Gating::Sigmoid => 1,
            Gating::SqrtSoftplus => 2,
            Gating::SoftmaxChosen => 3,
        };
        let args = [
            logits.arg(),
            null_or(bias),
            int(r.n_expert),
            int(r.n_used),
            Arg::Int(gating),
            int(n_group),
            int(n_kept),
            Arg::Int(i32::from(r.normalize)),
            Arg::Float(r.scale),
            experts.arg(),
            weights.arg(),
        ];
        self.launch("route", [blocks(tokens, 1), 1, 1], 128, &args)
    }

    /// What stands between the products of an expert, `n` values; the result is in `gate`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn activate(&self, how: Activation, gate: View<'_>, up: View<'_>, n: usize) -> Result<(), CudaError> {
        assert!(gate.words() >= n && up.words() >= n, "{n} values");
        let grid = [blocks(n, THREADS), 1, 1];
        match how {
            Activation::Silu => self.launch("silu_mul", grid, THREADS, &[gate.arg(), up.arg(), int(n)]),
            Activation::ClampedSwiglu { alpha, limit } => {
                let args = [gate.arg(), up.arg(), Arg::Float(alpha), Arg::Float(limit), int(n)];
                self.launch("clamped_swiglu", grid, THREADS, &args)
            }
        }
    }

    /// `x += y`, `n` values.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn add(&self, x: View<'_>, y: View<'_>, n: usize) -> Result<(), CudaError> {
        assert!(x.words() >= n && y.words() >= n, "{n} values");
        self.launch("add", [blocks(n, THREADS), 1, 1], THREADS, &[x.arg(), y.arg(), int(n)])
    }

    /// Adds a bias to each of `rows` rows of `width` values: the first of `[_, width]` biases, or that which `which`,
    /// `[rows]`, numbers; none where the number is not one of theirs.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn add_bias(
        &self,
        x: View<'_>,
        bias: View<'_>,
        which: Option<View<'_>>,
        rows: usize,
        width: usize,
    ) -> Result<(), CudaError> {
        assert!(x.words() >= rows * width && bias.words() >= width, "{rows} rows of {width}");
        assert!(which.is_none_or(|w| w.words() >= rows), "{rows} choices");
        let n = rows * width;
        let n_bias = bias.words() / width.max(1);
        let args = [x.arg(), bias.arg(), int(n_bias), null_or(which), int(width), int(n)];
        self.launch("add_bias", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// `out[token] = onto[token] + sum over k of weights[token, k] * x[token, k]` in the order of `k`; rows of `width`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn weighted_sum(
        &self,
        x: View<'_>,
        weights: View<'_>,
        onto: Option<View<'_>>,
        tokens: usize,
        n_used: usize,
        width: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let n = tokens * width;
        assert!(x.words() >= n * n_used && weights.words() >= tokens * n_used, "{tokens} x {n_used} x {width}");
        assert!(out.words() >= n && onto.is_none_or(|o| o.words() >= n), "{tokens} x {width} sums");
        let args = [x.arg(), weights.arg(), null_or(onto), int(n_used), int(width), int(n), out.arg()];
        self.launch("weighted_sum", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Multiplies each row of `out`, `[rows, width]`, by the sigmoid of `gate . x`, `x` `[rows, n]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn sigmoid_gate(
        &self,
        gate: View<'_>,
        x: View<'_>,
        rows: usize,
        n: usize,
        width: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(gate.words() >= n && x.words() >= rows * n && out.words() >= rows * width, "{rows} x {n}, {width}");
        let args = [gate.arg(), x.arg(), int(n), int(width), out.arg()];
        self.launch("sigmoid_gate", [blocks(rows, 1), 1, 1], THREADS, &args)
    }

    /// Reads all of a buffer with `n_blocks` blocks.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is no room for a word a thread in `out`.
    pub fn read_all(&self, from: View<'_>, n_blocks: u32, out: View<'_>) -> Result<(), CudaError> {
        assert!(out.words() >= (n_blocks * THREADS) as usize, "{n_blocks} blocks");
        let args = [from.aligned().arg(), Arg::Long((from.len() / 16) as i64), out.arg()];
        self.launch("read_all", [n_blocks, 1, 1], THREADS, &args)
    }

    /// Launches a kernel that does nothing.
    ///
    /// # Errors
    /// When the device fails.
    pub fn nothing(&self) -> Result<(), CudaError> {
        self.launch("nothing", [1, 1, 1], 32, &[])
    }
}
