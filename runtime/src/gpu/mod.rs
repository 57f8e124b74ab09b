//! What of a model runs on one GPU beside routed experts: attention with keys and values, delta nets with their state,
//! routers, shared experts, dense blocks, the head and the embedding, whatever of them the plan put there.
//!
//! The hidden state of a batch lies on the GPU while one part after another runs there. A router's choices come back to
//! the processor, whose store knows where experts are. Nothing is allocated after loading.

mod buffers;
mod delta;
pub mod devices;
pub(crate) mod fits;
mod graph;
mod matrix;
mod mixer;
pub(crate) mod parts;
pub(crate) mod rows;

pub use graph::stays_on;
pub(crate) use graph::{Token, resident_tier};

use crate::error::LoadError;
use crate::layers::places::{Place, Places};
use crate::layers::rope::RopeTable;
use crate::layers::weights::DenseWeights;
use crate::options::LoadOptions;
use crate::options::batches;
use buffers::{Room, Sizes, logit_rows};
use devices::Devices;
use graph::Replay;
use matrix::{Ffn, Maker, Matrix, product};
use mixer::{Batch, Cache, Mixer};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::Routing;
use tier_plan_cuda::{Buffer, CudaError, Device, Ops, View};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{Ffn as FfnSpec, Mixer as MixerSpec, ModelSpec, MoeSpec, Temperature};
use tier_plan_formats::placement::{Placement, TierIdx};

/// Parts of one layer.
struct Layer {
    mixer: Option<(Buffer, Mixer)>,
    /// The norm before router, shared expert and dense block, where one of them is here.
    ffn_norm: Option<Buffer>,
    router: Option<Router>,
    /// The shared expert with the vector that gates it, or the dense block.
    ffn: Option<(Ffn, Option<Buffer>)>,
}

struct Router {
    matrix: Matrix,
    selection_bias: Option<Buffer>,
    routing: Routing,
}

struct Head {
    norm: Buffer,
    matrix: Matrix,
}

/// The parts on GPUs, by tier.
pub(super) struct Gpus {
    pub(super) places: Places,
    by_tier: Vec<Option<Gpu>>,
}

impl Gpus {
    /// Makes what the plan has on GPUs.
    ///
    /// # Errors
    /// When a device fails, or has too little memory.
    pub(super) fn new(
        spec: &ModelSpec,
        plan: &Placement,
        options: &LoadOptions,
        weights: &DenseWeights,
        devices: &Devices,
        places: Places,
        ropes: &[Option<usize>],
    ) -> Result<Self, LoadError> {
        let context = plan.context as usize;
        let mut by_tier = Vec::with_capacity(plan.tiers.len());
        for tier in 0..plan.tiers.len() {
            let device = devices.of(tier).filter(|_| places.uses(tier));
            let gpu = device.map(|device| {
                let sizes = fits::room(spec, plan, options, &places, tier);
                let rows = batches(options, context).1;
                let kv_type = plan.kv_type;
                let parts =
                    Parts { spec, weights, places: &places, tier, kv_type, context, rows, ropes, sizes: &sizes };
                Gpu::new(device, &parts).map_err(|source| LoadError::Gpu { plan: plan.name.clone(), source })
            });
            by_tier.push(gpu.transpose()?);
        }
        Ok(Self { places, by_tier })
    }

    /// The parts on a tier's GPU.
    pub(super) fn of(&mut self, tier: TierIdx) -> &mut Gpu {
        match self.by_tier.get_mut(tier) {
            Some(Some(gpu)) => gpu,
            _ => unreachable!("a place is a tier whose GPU has parts"),
        }
    }
}

/// The parts on one GPU.
pub(super) struct Gpu {
    ops: Ops,
    layers: Vec<Layer>,
    head: Option<Head>,
    embedding: Option<Matrix>,
    room: Room,
    hidden: usize,
    eps: f32,
    /// Rows that go through a part at once.
    rows: usize,
    temperature: Option<Temperature>,
    /// What rotations were last sent for: the position of the first token, and tokens.
    prepared: Option<(usize, usize)>,
    /// What was read last.
    answer: Vec<f32>,
    replay: Replay,
}

/// What a GPU's parts are made of.
pub(super) struct Parts<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) weights: &'a DenseWeights,
    pub(super) places: &'a Places,
    pub(super) tier: TierIdx,
    pub(super) kv_type: KvType,
    pub(super) context: usize,
    /// Tokens that go through a part at once.
    pub(super) rows: usize,
    /// By layer, the table that it rotates by.
    pub(super) ropes: &'a [Option<usize>],
    pub(super) sizes: &'a Sizes,
}

impl Gpu {
    /// Makes the parts; the tensors are on the device already.
    ///
    /// # Errors
    /// When there is not enough memory, or the device fails.
    pub(super) fn new(device: &Arc<dyn Device>, parts: &Parts<'_>) -> Result<Self, CudaError> {
        let &Parts { spec, weights, places, tier, kv_type, context, rows, ropes, sizes } = parts;
        let maker = Maker { device, weights };
        let here = |place: Place| place == Some(tier);
        let cache = Cache { kv_type, context };
        let mut layers = Vec::with_capacity(spec.layers.len());
        for ((layer, at), rope) in spec.layers.iter().zip(&places.layers).zip(ropes) {
            let mixer = || Ok((maker.vector(layer.mixer_norm)?, Mixer::new(&maker, &layer.mixer, *rope, cache)?));
            let (router, ffn) = match &layer.ffn {
                FfnSpec::Dense(ffn) if here(at.ffn) => (None, Some((Ffn::new(&maker, ffn)?, None))),
                FfnSpec::Dense(_) => (None, None),
                FfnSpec::Moe(moe) => {
                    let shared = moe.shared.as_ref().filter(|_| here(at.shared));
                    let shared = shared.map(|s| Ok((Ffn::new(&maker, &s.ffn)?, maker.opt_vector(s.gate)?)));
                    let router = here(at.ffn).then(|| Router::new(&maker, moe));
                    (router.transpose()?, shared.transpose()?)
                }
            };
            let normed = router.is_some() || ffn.is_some();
            layers.push(Layer {
                mixer: here(at.mixer).then(mixer).transpose()?,
                ffn_norm: normed.then(|| maker.vector(layer.ffn_norm)).transpose()?,
                router,
                ffn,
            });
        }
        let vocabulary = |id| maker.rows(id, 0..spec.n_vocab, spec.hidden);
        let head = || Ok(Head { norm: maker.vector(spec.output_norm)?, matrix: vocabulary(spec.output) });
        Ok(Self {
            layers,
            head: here(places.head).then(head).transpose()?,
            embedding: here(places.embedding).then(|| vocabulary(spec.embedding)),
            room: Room::new(device, sizes)?,
            ops: Ops::new(Arc::clone(device)),
            hidden: spec.hidden,
            eps: spec.norm_eps,
            rows,
            temperature: temperature(spec),
            prepared: None,
            answer: Vec::new(),
            replay: Replay::default(),
        })
    }

    fn state(&self, rows: Range<usize>) -> View<'_> {
        self.room.x.view().floats(rows.start * self.hidden..rows.end * self.hidden)
    }

    /// Overwrites rows of the hidden state.
    pub(super) fn put(&self, rows: Range<usize>, x: &[f32]) -> Result<(), CudaError> {
        self.state(rows).write_f32(x)
    }

    /// Rows of the hidden state.
    pub(super) fn take(&self, rows: Range<usize>, x: &mut [f32]) -> Result<(), CudaError> {
        self.state(rows).read_f32(x)
    }

    /// Adds to the first rows of the hidden state, `[_, hidden]`.
    pub(super) fn add(&self, values: &[f32]) -> Result<(), CudaError> {
        for (at, part) in values.chunks(self.rows * self.hidden).enumerate() {
            let first = at * self.rows;
            self.room.out.view().write_f32(part)?;
            let to = self.state(first..first + part.len() / self.hidden);
            self.ops.add(to, self.room.out.view(), part.len())?;
        }
        Ok(())
    }

    /// The hidden state of a batch's tokens, as they come into the first layer.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<(), CudaError> {
        let Some(table) = &self.embedding else { unreachable!("the plan has the embedding elsewhere") };
        for (at, part) in tokens.chunks(self.rows).enumerate() {
            let ids: Vec<u8> = part.iter().flat_map(|t| t.to_ne_bytes()).collect();
            self.room.ids.view().write(&ids)?;
            let to = self.state(at * self.rows..at * self.rows + part.len());
            let ids = self.room.ids.view();
            self.ops.dequantize_chosen(table.ty, table.view(), self.hidden, ids, part.len(), to)?;
        }
        Ok(())
    }

    /// Sends what depends on positions: `n` tokens after `past` others.
    fn prepare(&mut self, past: usize, n: usize, ropes: &mut [RopeTable]) -> Result<(), CudaError> {
        if self.prepared == Some((past, n)) {
            return Ok(());
        }
        self.prepared = None;
        self.room.past.view().write(&(past as i32).to_ne_bytes())?;
        for (rope, turns) in ropes.iter_mut().zip(&self.room.turns) {
            rope.prepare(past, n);
            turns.view().write_f32(&rope.turns())?;
        }
        if let Some(temperature) = &self.temperature {
            let factors: Vec<f32> = (past..past + n).map(|position| temperature.at(position)).collect();
            self.room.factors.view().write_f32(&factors)?;
        }
        self.prepared = Some((past, n));
        Ok(())
    }

    /// A layer's mixer for rows of the batch, the first of which is at position `past`.
    pub(super) fn mixer(
        &mut self,
        index: usize,
        rows: Range<usize>,
        past: usize,
        ropes: &mut [RopeTable],
    ) -> Result<(), CudaError> {
        self.prepare(past, rows.len(), ropes)?;
        self.mix(index, rows.clone(), past, false)?;
        self.add_out(rows)
    }

    /// `room.out` becomes what the layer's mixer adds to rows, after [`prepare`](Self::prepare): launches only. `add` says
    /// that `room.out` has something to be added to the rows before.
    fn mix(&mut self, index: usize, rows: Range<usize>, past: usize, add: bool) -> Result<(), CudaError> {
        let n = rows.len();
        let Some((norm, mixer)) = &self.layers[index].mixer else { unreachable!("the plan has it elsewhere") };
        norm_rows(&self.ops, &mut self.room, norm, rows, self.hidden, self.eps, add, mixer.takes_quants())?;
        mixer.run(&self.ops, &mut self.room, Batch { n, past, eps: self.eps })
    }

    /// Adds what is in `room.out` to rows.
    fn add_out(&self, rows: Range<usize>) -> Result<(), CudaError> {
        let n = rows.len() * self.hidden;
        self.ops.add(self.state(rows), self.room.out.view(), n)
    }

    /// Norms rows for a layer's feed-forward block, in 8 bits too where a part of it here takes that, or experts do.
    fn norm(&mut self, index: usize, rows: Range<usize>, add: bool, for_experts: bool) -> Result<(), CudaError> {
        let layer = &self.layers[index];
        let Some(norm) = &layer.ffn_norm else { unreachable!("the plan has it elsewhere") };
        let quantize = for_experts
            || layer.router.as_ref().is_some_and(|r| r.matrix.takes_quants())
            || layer.ffn.as_ref().is_some_and(|(ffn, _)| ffn.takes_quants());
        norm_rows(&self.ops, &mut self.room, norm, rows, self.hidden, self.eps, add, quantize)
    }

    /// Where the choices for `n` rows begin in `room.answer`, in values, and their number.
    fn choices(&self, index: usize, n: usize) -> (usize, usize) {
        let n_used = self.layers[index].router.as_ref().map_or(0, |r| r.routing.n_used);
        (n * self.hidden, n * n_used)
    }

    /// Norms rows and has the layer's router choose. The choices come after the normed rows, or to the record from a place
    /// on. `for_experts` says that experts take the normed rows in 8 bits, from `room.quants`.
    fn choose(
        &mut self,
        index: usize,
        rows: Range<usize>,
        recorded: Option<usize>,
        add: bool,
        for_experts: bool,
    ) -> Result<(), CudaError> {
        let n = rows.len();
        self.norm(index, rows, add, for_experts)?;
        let (first, len) = self.choices(index, n);
        let Some(router) = &self.layers[index].router else { unreachable!("the plan has it elsewhere") };
        let (ops, room) = (&self.ops, &mut self.room);
        let answer = room.answer.view();
        product(ops, &router.matrix, n, answer, &room.quants, room.router_logits.view())?;
        let bias = router.selection_bias.as_ref().map(Buffer::view);
        let (to, first) = recorded.map_or((answer, first), |at| (room.record.view(), at));
        let (experts, weights) = (to.floats(first..first + len), to.floats(first + len..first + 2 * len));
        ops.route(&router.routing, room.router_logits.view(), bias, n, experts, weights)
    }

    /// The experts that the layer's router chooses for rows, `[rows, n_used]`, and their weights; then the rows as experts
    /// take them, `[rows, hidden]`.
    pub(super) fn route(
        &mut self,
        index: usize,
        rows: Range<usize>,
        experts: &mut [u16],
        weights: &mut [f32],
    ) -> Result<&[f32], CudaError> {
        let n = rows.len();
        self.choose(index, rows, None, false, false)?;
        let (first, len) = self.choices(index, n);
        self.answer.resize(first + 2 * len, 0.0);
        self.room.answer.view().read_f32(&mut self.answer)?;
        let (normed, choices) = self.answer.split_at(first);
        let (numbers, by) = choices.split_at(len);
        self.read_numbers(index, numbers, experts)?;
        weights.copy_from_slice(by);
        Ok(normed)
    }

    /// What the layer's router would choose for rows now, `[rows, n_used]`.
    pub(super) fn guess(&mut self, index: usize, rows: Range<usize>, experts: &mut Vec<u16>) -> Result<(), CudaError> {
        let n = rows.len();
        self.choose(index, rows, None, false, false)?;
        let (first, len) = self.choices(index, n);
        self.answer.resize(len, 0.0);
        self.room.answer.view().floats(first..first + len).read_f32(&mut self.answer)?;
        experts.resize(len, 0);
        self.read_numbers(index, &self.answer, experts)
    }

    /// Experts' numbers, which came from the device as the bits of floats.
    fn read_numbers(&self, index: usize, bits: &[f32], experts: &mut [u16]) -> Result<(), CudaError> {
        let n_expert = self.layers[index].router.as_ref().map_or(0, |r| r.routing.n_expert);
        for (bits, expert) in bits.iter().zip(experts) {
            let number = bits.to_bits();
            // A device that fails may answer anything.
            *expert = u16::try_from(number).ok().filter(|e| usize::from(*e) < n_expert).ok_or_else(|| {
                let (device, what) = (self.ops.device().name().into(), format!("choosing experts of layer {index}"));
                CudaError::Call { device, what, why: format!("it chose number {number} of {n_expert}") }
            })?;
        }
        Ok(())
    }

    /// Adds the shared expert or the dense block to rows; `normed` says that this layer's router has normed them here.
    pub(super) fn ffn(&mut self, index: usize, rows: Range<usize>, normed: bool) -> Result<(), CudaError> {
        self.block(index, rows.clone(), normed, false)?;
        self.add_out(rows)
    }

    /// `room.out` becomes what the shared expert or the dense block adds to rows; `add` as for a mixer, where they are not
    /// normed yet.
    fn block(&mut self, index: usize, rows: Range<usize>, normed: bool, add: bool) -> Result<(), CudaError> {
        let n = rows.len();
        if !normed {
            self.norm(index, rows, add, false)?;
        }
        let Some((ffn, gate)) = &self.layers[index].ffn else { unreachable!("the plan has it elsewhere") };
        let (ops, room, hidden) = (&self.ops, &mut self.room, self.hidden);
        ffn.run(ops, room, n)?;
        match gate {
            Some(gate) => ops.sigmoid_gate(gate.view(), room.answer.view(), n, hidden, hidden, room.out.view()),
            None => Ok(()),
        }
    }

    /// Logits of rows, `[rows, n_vocab]`.
    pub(super) fn head(&mut self, rows: Range<usize>, logits: &mut [f32]) -> Result<(), CudaError> {
        let Some(head) = &self.head else { unreachable!("the plan has it elsewhere") };
        let (ops, room) = (&self.ops, &mut self.room);
        let (n_vocab, mut first) = (head.matrix.n_out, rows.start);
        for part in logits.chunks_mut(logit_rows(n_vocab, self.rows) * n_vocab) {
            let n = part.len() / n_vocab;
            head.run(ops, room, first..first + n, self.eps, false)?;
            room.logits.view().read_f32(part)?;
            first += n;
        }
        Ok(())
    }
}

impl Head {
    /// Logits of rows; `add` as for a mixer.
    fn run(&self, ops: &Ops, room: &mut Room, rows: Range<usize>, eps: f32, add: bool) -> Result<(), CudaError> {
        let (n, hidden) = (rows.len(), self.matrix.n_in);
        norm_rows(ops, room, &self.norm, rows, hidden, eps, add, self.matrix.takes_quants())?;
        product(ops, &self.matrix, n, room.answer.view(), &room.quants, room.logits.view())
    }
}

/// `room.answer` becomes the norm of rows of the state, after `room.out` is added to them where `add` says so, and
/// `room.quants` the 8-bit form of that.
fn norm_rows(
    ops: &Ops,
    room: &mut Room,
    weight: &Buffer,
    rows: Range<usize>,
    hidden: usize,
    eps: f32,
    add: bool,
    quantize: bool,
) -> Result<(), CudaError> {
    let x = room.x.view().floats(rows.start * hidden..rows.end * hidden);
    let add = add.then(|| room.out.view());
    let quants = quantize.then_some(&mut room.quants);
    ops.add_norm(x, add, weight.view(), rows.len(), hidden, eps, room.answer.view(), quants)
}

impl Router {
    fn new(maker: &Maker<'_>, moe: &MoeSpec) -> Result<Self, CudaError> {
        Ok(Self {
            matrix: maker.linear(&moe.router)?,
            selection_bias: maker.opt_vector(moe.selection_bias)?,
            routing: Routing::from(moe),
        })
    }
}

/// How scores grow with the position; all layers of a model have the same, which comes from its metadata.
fn temperature(spec: &ModelSpec) -> Option<Temperature> {
    spec.layers.iter().find_map(|l| match &l.mixer {
        MixerSpec::Mla(a) => a.temperature,
        MixerSpec::Gqa(_) | MixerSpec::Delta(_) => None,
    })
}

/// One layer's mixer by itself on the emulated device: `x` is `[tokens, hidden]`, normed, and goes through it in batches.
#[cfg(test)]
pub(super) fn mixer_alone(
    mixer: &MixerSpec,
    norm: tier_plan_formats::model::spec::TensorId,
    eps: f32,
    mut weights: DenseWeights,
    kv_type: KvType,
    (x, hidden): (&[f32], usize),
    batches: &[usize],
) -> Vec<f32> {
    use tier_plan_formats::model::spec::{GatedFfn, LayerSpec, Linear};
    let device: Arc<dyn Device> = tier_plan_cuda::shim::shared();
    weights.move_to(&device);
    let linear = Linear { weight: 0, bias: None, n_out: 0, n_in: 0, first_row: 0 };
    let ffn = FfnSpec::Dense(GatedFfn { gate: linear, up: linear, down: linear });
    let layer = LayerSpec { mixer_norm: norm, mixer: mixer.clone(), ffn_norm: norm, ffn };
    let spec = ModelSpec {
        arch: String::new(),
        hidden,
        n_vocab: 1,
        context: 0,
        norm_eps: eps,
        embedding: 0,
        output_norm: 0,
        output: 0,
        layers: vec![layer],
    };
    let places = Places {
        layers: vec![crate::layers::places::LayerPlaces { mixer: Some(0), ..Default::default() }],
        ..Places::default()
    };
    let (context, rows) = (x.len() / hidden, batches.iter().copied().max().unwrap());
    let sizes = Sizes::new(&spec, &places, 0, context, rows, context);
    let (mut ropes, by_layer) = super::layers::rope::rope_tables(&spec, &weights);
    let (weights, places, ropes_of, sizes) = (&weights, &places, &by_layer[..], &sizes);
    let parts = Parts { spec: &spec, weights, places, tier: 0, kv_type, context, rows, ropes: ropes_of, sizes };
    let mut gpu = Gpu::new(&device, &parts).unwrap();
    let (mut past, mut out) = (0, Vec::new());
    for &n in batches {
        gpu.prepare(past, n, &mut ropes).unwrap();
        gpu.room.answer.view().write_f32(&x[past * hidden..][..n * hidden]).unwrap();
        let (_, mixer) = gpu.layers[0].mixer.as_ref().unwrap();
        if mixer.takes_quants() {
            gpu.ops.quantize(gpu.room.answer.view(), n, hidden, &mut gpu.room.quants).unwrap();
        }
        mixer.run(&gpu.ops, &mut gpu.room, Batch { n, past, eps }).unwrap();
        out.extend(gpu.room.out.view().floats(0..n * hidden).to_f32().unwrap());
        past += n;
    }
    out
}
