//! The store against the file: in whatever order experts are accessed, and whichever reads fail, an
//! expert that can compute has the bytes of the file.

use super::checksums::Checksums;
use super::checksums::compute_checksums;
use super::ids::{ExpertId, SlotId};
use super::layer::{LayerExperts, Layout};
use super::prefetch::Foresight;
use super::step::ExpertState;
use super::store::*;
use super::view::{ExpertView, ViewLinear};
use crate::tiers::arena::Arena;
use crate::tiers::file::{FileTier, NamedReader, ReadError};
use crate::tiers::source::{ALIGN, ReadAt, Stamp};
use proptest::prelude::*;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_cuda::{Device, shim};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};
use tier_plan_formats::placement::{SlotPolicy, TierIdx};

/// What reads do, and those that were made.
#[derive(Default)]
pub(super) struct Reads {
    pub(super) count: u64,
    /// Numbers of reads that fail, from 1.
    pub(super) failing: Vec<u64>,
    /// One read in so many takes a while longer; 0 for none.
    pub(super) slow_every: u64,
    /// Offsets and lengths of all reads.
    pub(super) log: Vec<(u64, usize)>,
}

impl Reads {
    pub(super) fn failing(failing: Vec<u64>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            failing,
            ..Self::default()
        }))
    }
}

/// The file in memory; reads fail whose numbers are listed.
struct Faulty {
    bytes: Arc<Vec<u8>>,
    reads: Arc<Mutex<Reads>>,
    alignment: usize,
}

impl ReadAt for Faulty {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut reads = self.reads.lock().unwrap();
        reads.count += 1;
        reads.log.push((offset, into.len()));
        if reads.failing.contains(&reads.count) {
            // Not one that is tried again.
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let is_slow = reads.slow_every > 0 && reads.count.is_multiple_of(reads.slow_every);
        drop(reads);
        if is_slow {
            std::thread::sleep(Duration::from_micros(300));
        }
        let bytes = &self.bytes[offset as usize..];
        let n = bytes.len().min(into.len());
        into[..n].copy_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn stamp(&self) -> io::Result<Stamp> {
        Ok(Stamp {
            len: self.bytes.len() as u64,
            modified: None,
        })
    }

    fn alignment(&self) -> usize {
        self.alignment
    }
}

pub(super) fn fixture() -> (Arc<Gguf>, ModelSpec, PathBuf) {
    // Gate and up in one tensor, and biases: the most parts that an expert has.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/gpt-oss.gguf");
    let gguf = Arc::new(Gguf::open(&path).unwrap());
    let spec = describe(&gguf).unwrap();
    (gguf, spec, path)
}

pub(super) struct Setup {
    pub(super) policy: SlotPolicy,
    pub(super) slots: usize,
    /// None where the slow tier is mapped.
    pub(super) staging: usize,
    pub(super) layout: Layout,
    /// Experts come from a copy: all of them, or those with even numbers.
    pub(super) copy: Option<bool>,
    /// The slots are on a GPU.
    pub(super) on_gpu: bool,
    /// A byte of this expert of the first layer is not what its checksum was made of, in the file
    /// and in the copy.
    pub(super) damaged: Option<usize>,
}

/// Returns what a store with as many slots per layer is made from, all of whose experts are in one file.
pub(super) fn setup(slots: usize, staging: usize, layout: Layout) -> Setup {
    Setup {
        policy: SlotPolicy::Lru,
        slots,
        staging,
        layout,
        copy: None,
        on_gpu: false,
        damaged: None,
    }
}

/// Makes a copy of every layer's experts, each on a page of its own, and returns their offsets.
fn copy_of(
    gguf: &Gguf,
    moes: &[&MoeSpec],
    bytes: &[u8],
    all: bool,
) -> (Vec<u8>, Vec<Vec<Option<u64>>>) {
    let (mut copy, mut places) = (vec![0xcc; ALIGN], Vec::new());
    for moe in moes {
        let mut layer = vec![None; moe.n_expert];
        // Backwards: in no order that the file has.
        for expert in (0..moe.n_expert).rev().filter(|e| all || e % 2 == 0) {
            layer[expert] = Some(copy.len() as u64);
            for id in moe.expert_tensors() {
                let info = &gguf.tensors()[id];
                let len = info.n_bytes as usize / moe.n_expert;
                copy.extend_from_slice(&bytes[info.offset as usize + expert * len..][..len]);
            }
            copy.resize(copy.len().next_multiple_of(ALIGN), 0xcc);
        }
        places.push(layer);
    }
    (copy, places)
}

pub(super) fn store(setup: &Setup, reads: &Arc<Mutex<Reads>>) -> ExpertStore {
    let (gguf, spec, path) = fixture();
    let moes: Vec<&MoeSpec> = spec.moe_layers().map(|(_, moe)| moe).collect();
    let mut layers: Vec<LayerExperts> = moes
        .iter()
        .map(|moe| LayerExperts::all_pooled(&gguf, moe))
        .collect();
    let mut bytes = std::fs::read(&path).unwrap();
    if let Some(expert) = setup.damaged {
        let info = &gguf.tensors()[moes[0].expert_tensors().next().unwrap()];
        let len = info.n_bytes as usize / moes[0].n_expert;
        bytes[info.offset as usize + expert * len + len / 2] ^= 1;
    }
    let copy = setup.copy.map(|all| copy_of(&gguf, &moes, &bytes, all));
    for (layer, places) in layers
        .iter_mut()
        .zip(copy.iter().flat_map(|(_, places)| places))
    {
        layer.use_copy(1, places, |_| true);
    }
    let room = layers
        .iter()
        .map(|l| l.buffer_bytes(setup.layout))
        .max()
        .unwrap();
    let mut arena = Arena::new(
        "dram",
        (room * (setup.slots * layers.len() + setup.staging)) as u64,
    )
    .unwrap();
    let device: Arc<dyn Device> = shim::shared();
    let mut gpu = PinnedExperts::new(device, layers.len()).unwrap();
    for (at, layer) in layers.iter_mut().enumerate() {
        if setup.on_gpu {
            let any = vec![0; layer.expert_bytes()];
            let any = layer.packed(&any);
            let biased = any.biases().is_some();
            gpu.add_layer(at, any.kind(moes[at]), &[], setup.slots, biased)
                .unwrap();
            layer.set_slots_on_gpu(setup.slots as u32, setup.layout, setup.policy);
            continue;
        }
        let slots = (0..setup.slots)
            .map(|_| arena.take(layer.buffer_bytes(setup.layout)).unwrap())
            .collect();
        layer.set_slots(slots, setup.layout, setup.policy);
    }
    if setup.on_gpu && setup.slots % 2 == 1 {
        gpu.open_transfers().unwrap();
    }
    let staging = (0..setup.staging)
        .map(|_| arena.take(room).unwrap())
        .collect();
    let alignment = if setup.layout == Layout::WholePages {
        ALIGN
    } else {
        1
    };
    let faulty = |bytes| Faulty {
        bytes: Arc::new(bytes),
        reads: Arc::clone(reads),
        alignment,
    };
    let named = |path, bytes| NamedReader {
        path,
        reader: Box::new(faulty(bytes)),
    };
    let mut readers = vec![named(path.clone(), bytes)];
    readers.extend(copy.map(|(bytes, _)| named(path.with_extension("gguf.experts"), bytes)));
    let files = FileTier::from_readers(readers).unwrap();
    let sums = compute_checksums(&gguf, &spec, String::new(), &mut |_, _| true).unwrap();
    let checks = Checksums::bind(&gguf, &spec, &sums, &path).unwrap();
    let mut store = ExpertStore::new(
        gguf,
        layers,
        Some(files),
        staging,
        TierIdx::FIRST,
        TierIdx::new(1),
        setup.staging > 0,
    );
    store.verify(Arc::new(checks));
    if setup.on_gpu {
        store.set_gpus(vec![(TierIdx::FIRST, gpu)]);
    }
    store
}

/// Returns all bytes of an expert in the store's view, and those of the file.
pub(super) fn shown(store: &ExpertStore, step: &Step, at: usize) -> (Vec<u8>, Vec<u8>) {
    let flat = |view: ExpertView<'_>| {
        let linears = [view.gate, view.up, view.down];
        let bytes =
            |l: &ViewLinear<'_>| [l.weights.bytes(), l.bias.map_or(&[][..], |b| b.bytes)].concat();
        linears.iter().flat_map(bytes).collect::<Vec<u8>>()
    };
    let layer = &store.layers[step.layer()];
    if let ExpertState::InSlot(slot) = step.states[at]
        && layer.slots_on_gpu
    {
        return (
            store.bytes_on_gpu(step.layer(), slot),
            matrices(store, layer, step.experts()[at]),
        );
    }
    (
        flat(store.view(step, at).0),
        flat(store.mapped_view(layer, ExpertId::new(step.experts()[at]))),
    )
}

/// Returns the file's bytes of an expert's matrices, one after the other.
pub(super) fn matrices(store: &ExpertStore, layer: &LayerExperts, expert: u32) -> Vec<u8> {
    let view = store.mapped_view(layer, ExpertId::new(expert));
    let gate = view.is_gated.then_some(view.gate);
    let linears = gate.into_iter().chain([view.up, view.down]);
    linears.flat_map(|l| l.weights.bytes()).copied().collect()
}

/// Takes one step as the engine does: a token's experts as they become ready, or a batch's in
/// order.
pub(super) fn take(
    store: &mut ExpertStore,
    layer: usize,
    used: &[u32],
    batch: bool,
) -> Result<(), ReadError> {
    let mut order = used.to_vec();
    if batch {
        order.sort_unstable();
    }
    let chosen: Vec<u16> = used.iter().map(|&e| e as u16).collect();
    store.note(layer, &chosen);
    let mut step = store.begin(layer, used, order);
    let n = used.len();
    let look = |store: &mut ExpertStore, step: &mut Step, at: usize| {
        let (found, expected) = shown(store, step, at);
        assert_eq!(
            found,
            expected,
            "expert {} of layer {layer}",
            step.experts()[at]
        );
        store.release(step, at);
    };
    if batch {
        for at in 0..n {
            while !step.is_ready(at) {
                store.wait(&mut step)?;
            }
            look(store, &mut step, at);
        }
    } else {
        let mut ready: Vec<usize> = (0..n).filter(|at| step.is_ready(*at)).collect();
        let mut left = n;
        loop {
            left -= ready.len();
            ready.drain(..).for_each(|at| look(store, &mut step, at));
            if left == 0 {
                break;
            }
            ready.push(store.wait(&mut step)?);
        }
    }
    store.finish(&mut step)
}

/// Fails unless every buffer is where it belongs, or in a read for a later step.
pub(super) fn check_buffers(store: &ExpertStore, staging: usize) {
    if staging > 0 {
        let all = store.staging.len() + store.in_transit.len() + store.buffers_ahead();
        assert_eq!(all, staging, "all staging buffers are known");
    }
    for (at, layer) in store.layers.iter().enumerate() {
        for (slot, buffer) in layer.slots.iter().enumerate() {
            let slot = SlotId::new(slot as u32);
            assert_eq!(buffer.is_none(), store.is_lent(at, slot), "slot {slot:?}");
        }
    }
}

/// Ends all reads for later steps. Fails unless all buffers come back.
pub(super) fn drain(store: &mut ExpertStore, staging: usize) {
    store.drop_predictions();
    while store.prefetcher.is_used() || store.buffers_ahead() > 0 {
        let completion = store.files.as_ref().unwrap().wait().unwrap();
        assert!(store.take_completion(completion).is_none());
    }
    while !store.in_transit.is_empty() {
        store.wait_for_transfer();
    }
    assert_eq!(store.staging.len(), staging, "all buffers came back");
    let mut slots = store.layers.iter().flat_map(|l| &l.slots);
    assert!(slots.all(Option::is_some), "all slots came back");
}

/// A layer and some of its experts.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) layer: usize,
    pub(super) experts: Vec<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct TestStep {
    pub(super) used: Choice,
    pub(super) batch: bool,
    /// Of the next step.
    pub(super) prediction: Option<Choice>,
}

pub(super) fn steps() -> impl Strategy<Value = Vec<TestStep>> {
    let (_, spec, _) = fixture();
    let (layers, n) = (
        spec.moe_layers().count(),
        spec.moe_layers()
            .map(|(_, m)| m.n_expert as u32)
            .min()
            .unwrap(),
    );
    let chosen =
        proptest::sample::subsequence((0..n).collect::<Vec<u32>>(), 1..=n as usize).prop_shuffle();
    let choice = (0..layers, chosen).prop_map(|(layer, experts)| Choice { layer, experts });
    let prediction = proptest::option::of(choice.clone());
    let step = (choice, any::<bool>(), prediction);
    let step = step.prop_map(|(used, batch, prediction)| TestStep {
        used,
        batch,
        prediction,
    });
    proptest::collection::vec(step, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_view_has_the_bytes_of_the_file(
        steps in steps(),
        slots in 0usize..6,
        staging in 0usize..16,
        whole_pages in any::<bool>(),
        copy in proptest::option::of(any::<bool>()),
        on_gpu in any::<bool>(),
        warm in proptest::collection::vec((0usize..3, proptest::collection::vec(0u32..10, 0..9)), 0..4),
        policy in prop_oneof![
            Just(SlotPolicy::Lru),
            (1u32..20).prop_map(|half_life| SlotPolicy::Lfu { half_life }),
            Just(SlotPolicy::Adaptive { half_life: 8, recent_half_life: 2, recent_weight: 4 }),
        ],
        failing in proptest::collection::vec(1u64..120, 0..12),
    ) {
        let layout = if whole_pages { Layout::WholePages } else { Layout::Packed };
        let reads = Reads::failing(failing);
        let setup = Setup { policy, slots, staging, layout, copy, on_gpu, damaged: None };
        let mut store = store(&setup, &reads);
        let may_warm = store.warm_up(&warm).unwrap();
        prop_assert!(may_warm <= (slots * store.layers.len()) as u64);
        let in_flight = |used: &[u32]| staging > 0 && used.len() > staging;
        let (mut failed, mut predicted) = (0, false);
        let mut next: Option<&Choice> = None;
        for TestStep { used: Choice { layer, experts: used }, batch, prediction } in &steps {
            // A token's experts are all in flight at once, so staging must hold them.
            let batch = *batch || in_flight(used);
            if let Some(choice) = prediction {
                predicted |= store.wants_prediction(batch);
                let experts = choice.experts.iter().copied();
                store.predict(choice.layer, experts, Foresight::of_router(batch));
            }
            // Every other prediction comes true.
            let used = next.take().filter(|choice| choice.layer == *layer).map_or(used, |choice| &choice.experts);
            next = prediction.as_ref();
            let batch = batch || in_flight(used);
            if let Err(error) = take(&mut store, *layer, used, batch) {
                prop_assert!(error.to_string().contains("gpt-oss.gguf"), "{}", error);
                failed += 1;
            }
            check_buffers(&store, staging);
        }
        drain(&mut store, staging);
        prop_assert!(store.warmed() <= may_warm);
        for layer in &store.layers {
            for (expert, slot) in layer.cache.resident().filter(|_| on_gpu) {
                let at = store.layers.iter().position(|l| std::ptr::eq(l, layer)).unwrap();
                let expected = matrices(&store, layer, expert);
                prop_assert!(store.bytes_on_gpu(at, SlotId::new(slot)) == expected, "slot {} of expert {}", slot, expert);
            }
            for (expert, slot) in layer.cache.resident().filter(|_| !on_gpu) {
                let held = layer.slots[slot as usize].as_ref().unwrap();
                for part in &layer.parts {
                    let at = layer.slice_location(&store.gguf, part, expert as usize, layer.layout).buffer_offset;
                    let all = store.gguf.bytes(&store.gguf.tensors()[part.tensor]);
                    let expected = &all[expert as usize * part.slice_bytes..][..part.slice_bytes];
                    prop_assert!(&held[at..at + part.slice_bytes] == expected, "slot {} of expert {}", slot, expert);
                }
            }
        }
        let reads = reads.lock().unwrap();
        let due = reads.failing.iter().any(|number| *number <= reads.count);
        // A failed prefetch is not reported.
        let told = if predicted || may_warm > 0 { failed == 0 || due } else { (failed > 0) == due };
        prop_assert!(told, "{} failed", failed);
    }
}

#[test]
fn without_prefetching_nothing_comes_of_predictions() {
    let reads = Arc::default();
    let mut store = store(&setup(4, 0, Layout::WholePages), &reads);
    assert!(!store.can_prefetch());
    for from in [
        Foresight::Exact,
        Foresight::Share,
        Foresight::of_router(false),
    ] {
        store.predict(1, 0..4, from);
        store.start_predicted();
    }
    store.read_most(1, 4, 64);
    assert_eq!(reads.lock().unwrap().count, 0);
    drain(&mut store, 0);
}

#[test]
fn warm_up_fills_empty_slots_between_steps() {
    for (staging, slots) in [(0, 4), (1, 4), (6, 4), (6, 2)] {
        let setup = Setup {
            policy: SlotPolicy::Lru,
            slots,
            staging,
            layout: Layout::WholePages,
            copy: None,
            on_gpu: false,
            damaged: None,
        };
        let mut store = store(&setup, &Arc::default());
        let wanted = [(0, vec![5, 1, 5, 99, 3, 7, 2]), (1, vec![4, 0])];
        let slots = slots as u64;
        assert_eq!(store.warm_up(&wanted).unwrap(), slots + 2);
        // Each step starts a few reads, and takes in those of the steps before. Expert 4 it reads
        // itself.
        while store.warmed() < slots + 1 {
            take(&mut store, 1, &[4], false).unwrap();
        }
        // Two are read at once, so either may come first.
        let mut expected: Vec<u32> = [5, 1, 3, 7].into_iter().take(slots as usize).collect();
        let mut found = store.residents()[0].clone();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected, "{staging}");
        let mut step = store.begin(0, &[1, 5], vec![1, 5]);
        assert_eq!((step.slot_hits, step.misses), (2, 0));
        (0..2).for_each(|at| store.release(&mut step, at));
        store.finish(&mut step).unwrap();
        assert_eq!(store.residents()[0][..2], [5, 1]);
    }
}

#[test]
fn one_changed_byte_is_an_error_and_never_shown() {
    for (staging, copy) in [(0, None), (5, None), (5, Some(true))] {
        let setup = Setup {
            policy: SlotPolicy::Lru,
            slots: 2,
            staging,
            layout: Layout::Packed,
            copy,
            on_gpu: false,
            damaged: Some(3),
        };
        let mut store = store(&setup, &Arc::default());
        for _ in 0..3 {
            take(&mut store, 0, &[1, 2], false).unwrap();
            let error = take(&mut store, 0, &[0, 3], false).unwrap_err().to_string();
            let name = if copy.is_some() {
                "gpt-oss.gguf.experts"
            } else {
                "gpt-oss.gguf"
            };
            for word in [name, "expert 3 of tensor 'blk.0.", "damaged"] {
                assert!(error.contains(word), "{word}: {error}");
            }
            assert!(!store.layers[0].cache.contains(3));
        }
        take(&mut store, 1, &[3, 0], false).unwrap();
    }
}

#[test]
fn on_a_mapped_tier_experts_without_a_slot_compute_in_place() {
    let setup = Setup {
        policy: SlotPolicy::Lru,
        slots: 2,
        staging: 0,
        layout: Layout::Packed,
        copy: None,
        on_gpu: false,
        damaged: None,
    };
    let mut store = store(&setup, &Arc::default());
    take(&mut store, 0, &[6, 7], true).unwrap();
    // Expert 1 is to have the slot of an expert that computes after it.
    let used = [0, 6, 7, 1, 2];
    let mut order = used.to_vec();
    order.sort_unstable();
    let mut step = store.begin(0, &used, order);
    assert_eq!((step.slot_hits, step.misses), (2, 3));
    assert_eq!(
        step.read_bytes,
        2 * store.expert_bytes(0),
        "two move to slots"
    );
    for at in 0..5 {
        assert!(step.is_ready(at), "position {at}");
        assert_eq!(
            store.view(&step, at).1.get(),
            if at < 3 { 1 } else { 0 },
            "mapped, or in its slot"
        );
        store.release(&mut step, at);
    }
    store.finish(&mut step).unwrap();
    let mut step = store.begin(0, &[1, 2], vec![1, 2]);
    assert_eq!((step.slot_hits, step.misses), (2, 0));
    for at in 0..2 {
        let (found, expected) = shown(&store, &step, at);
        assert_eq!(found, expected);
        store.release(&mut step, at);
    }
    store.finish(&mut step).unwrap();
}
