//! The store against the file: whatever is asked in whatever order, and whichever reads fail, an expert that is shown
//! has the bytes of the file.

use super::*;
use crate::model::describe;
use crate::model::spec::ModelSpec;
use crate::tiers::arena::Arena;
use crate::tiers::source::{ALIGN, ReadAt, Stamp};
use proptest::prelude::*;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The file in memory; reads fail whose numbers are listed.
struct Faulty {
    bytes: Arc<Vec<u8>>,
    failing: Arc<Mutex<(u64, Vec<u64>)>>,
    alignment: usize,
}

impl ReadAt for Faulty {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut failing = self.failing.lock().unwrap();
        failing.0 += 1;
        if failing.1.contains(&failing.0) {
            // Not one that is tried again.
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let bytes = &self.bytes[offset as usize..];
        let n = bytes.len().min(into.len());
        into[..n].copy_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn stamp(&self) -> io::Result<Stamp> {
        Ok(Stamp { len: self.bytes.len() as u64, modified: None })
    }

    fn alignment(&self) -> usize {
        self.alignment
    }
}

fn fixture() -> (Arc<Gguf>, ModelSpec, PathBuf) {
    // Gate and up in one tensor, and biases: the most parts that an expert has.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/gpt-oss.gguf");
    let gguf = Arc::new(Gguf::open(&path).unwrap());
    let spec = describe(&gguf).unwrap();
    (gguf, spec, path)
}

struct Setup {
    policy: SlotPolicy,
    slots: usize,
    staging: usize,
    layout: Layout,
}

fn store(setup: &Setup, failing: &Arc<Mutex<(u64, Vec<u64>)>>) -> ExpertStore {
    let (gguf, spec, path) = fixture();
    let moes: Vec<&MoeSpec> = spec.moe_layers().map(|(_, moe)| moe).collect();
    let mut layers: Vec<LayerExperts> = moes
        .iter()
        .map(|moe| LayerExperts::new(&gguf, moe, (0..moe.n_expert).map(|_| Home::Pooled).collect(), 0))
        .collect();
    let room = layers.iter().map(|l| l.buffer_bytes(setup.layout)).max().unwrap();
    let mut arena = Arena::new("dram", (room * (setup.slots * layers.len() + setup.staging)) as u64).unwrap();
    for layer in &mut layers {
        let slots = (0..setup.slots).map(|_| arena.take(layer.buffer_bytes(setup.layout)).unwrap()).collect();
        layer.set_slots(slots, setup.layout, setup.policy);
    }
    let staging = (0..setup.staging).map(|_| arena.take(room).unwrap()).collect();
    let bytes = Arc::new(std::fs::read(&path).unwrap());
    let alignment = if setup.layout == Layout::WholePages { ALIGN } else { 1 };
    let faulty = Faulty { bytes, failing: Arc::clone(failing), alignment };
    let files = FileTier::of(vec![(path, Box::new(faulty))]).unwrap();
    ExpertStore::new(gguf, layers, Some(files), staging, 0, 1, true)
}

/// All bytes of an expert that the store shows, and those of the file.
fn shown(store: &ExpertStore, step: &Step, at: usize) -> (Vec<u8>, Vec<u8>) {
    let flat = |view: ExpertView<'_>| {
        let linears = [view.gate, view.up, view.down];
        let bytes = |l: &ViewLinear<'_>| [l.weights.bytes(), l.bias.map_or(&[][..], |b| b.bytes)].concat();
        linears.iter().flat_map(bytes).collect::<Vec<u8>>()
    };
    let layer = &store.layers[step.layer()];
    (flat(store.view(step, at).0), flat(store.mapped(layer, step.experts()[at] as usize)))
}

/// One step as the engine takes it: a token's experts as they become ready, or a batch's in order.
fn take(store: &mut ExpertStore, layer: usize, used: &[u32], batch: bool) -> Result<(), ReadError> {
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
        assert_eq!(found, expected, "expert {} of layer {layer}", step.experts()[at]);
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

/// Layer, experts, whether a batch; and a guess of what comes next.
type Steps = Vec<(usize, Vec<u32>, bool, Option<(usize, Vec<u32>)>)>;

fn steps() -> impl Strategy<Value = Steps> {
    let (_, spec, _) = fixture();
    let (layers, n) = (spec.moe_layers().count(), spec.moe_layers().map(|(_, m)| m.n_expert as u32).min().unwrap());
    let chosen = proptest::sample::subsequence((0..n).collect::<Vec<u32>>(), 1..=n as usize).prop_shuffle();
    let guess = proptest::option::of((0..layers, chosen.clone()));
    proptest::collection::vec((0..layers, chosen, any::<bool>(), guess), 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_shown_is_what_the_file_has(
        steps in steps(),
        slots in 0usize..6,
        staging in 0usize..17,
        whole_pages in any::<bool>(),
        policy in prop_oneof![
            Just(SlotPolicy::Lru),
            (1u32..20).prop_map(|half_life| SlotPolicy::Lfu { half_life }),
            Just(SlotPolicy::Adaptive { half_life: 8, recent_half_life: 2, recent_weight: 4 }),
        ],
        failing in proptest::collection::vec(1u64..120, 0..12),
    ) {
        let layout = if whole_pages { Layout::WholePages } else { Layout::Packed };
        let failing = Arc::new(Mutex::new((0, failing)));
        let setup = Setup { policy, slots, staging, layout };
        let mut store = store(&setup, &failing);
        let (mut failed, mut guessed) = (0, false);
        let mut next = None;
        for (layer, used, batch, guess) in &steps {
            // A token's experts are all in flight at once, so staging must hold them; without any, they compute in place.
            let many = |used: &[u32]| setup.staging > 0 && used.len() > setup.staging;
            let batch = *batch || many(used);
            if let Some((to, experts)) = guess {
                guessed |= store.wants_guess(batch);
                store.expect(*to, experts.iter().copied(), batch);
            }
            // Every other guess comes true.
            let used = next.take().filter(|(to, _)| to == layer).map_or(used, |(_, experts)| experts);
            next = guess.as_ref().map(|(to, experts)| (*to, experts));
            let batch = batch || many(used);
            if let Err(error) = take(&mut store, *layer, used, batch) {
                prop_assert!(error.to_string().contains("gpt-oss.gguf"), "{}", error);
                failed += 1;
            }
            prop_assert_eq!(store.staging.len() + store.buffers_ahead(), setup.staging, "all buffers are known");
            prop_assert!(store.layers.iter().all(|l| l.slots.iter().all(Option::is_some)));
        }
        store.forget_ahead();
        while store.buffers_ahead() > 0 {
            let arrival = store.files.as_ref().unwrap().wait().unwrap();
            prop_assert!(store.land_ahead(arrival).is_none());
        }
        prop_assert_eq!(store.staging.len(), setup.staging, "all buffers came back");
        let (reads, failing) = &*failing.lock().unwrap();
        let due = failing.iter().any(|number| number <= reads);
        // A read ahead that fails is not worth a word.
        let told = if guessed { failed == 0 || due } else { (failed > 0) == due };
        prop_assert!(told, "{} failed", failed);
    }
}
