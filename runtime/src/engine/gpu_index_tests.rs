//! Models with indexers of positions or blocks on an emulated GPU: texts that come to where tokens
//! begin to choose what they attend to, and recorded steps on both sides of it.

use super::gpu_tests::{ALL, Experts, Watched, load, plan};
use crate::engine::{Engine, LogitsMode, Rows, SequenceId};
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::gguf::testing::{Writer, WriterTensor};
use tier_plan_formats::gguf::{Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, ModelShape, shape_of};
use tier_plan_formats::model::spec::{LayerSpec, Mixer};
use tier_plan_formats::placement::Placement;
use tier_plan_testing::{data, is_nightly, nmse};

const CONTEXT: u32 = 300;

/// Largest error of a token's logits from the processor's, as in the tests of single texts.
const SMALL_ERROR: f64 = 1e-5;

/// Returns a small model with these sizes of its indexers.
fn choosing(
    name: &str,
    sizes: &[(&str, Value)],
) -> (tempfile::NamedTempFile, Arc<Gguf>, ModelShape) {
    let fixture = Gguf::open(&data(&format!("arch2/{name}.gguf"))).unwrap();
    let mut writer = Writer::from_gguf(&fixture);
    for (key, value) in sizes {
        let key = format!("{name}.attention.indexer.{key}");
        writer.set(&key, value.clone());
        if let ("kpool", Value::U32(block)) = (key.rsplit('.').next().unwrap(), value) {
            // A row per position of a block.
            let is_ape = |t: &&mut WriterTensor| t.name.ends_with("_ape.weight");
            for ape in writer.tensors.iter_mut().filter(is_ape) {
                ape.data.truncate((4 * ape.dims[0] as u32 * block) as usize);
                ape.dims[1] = u64::from(*block);
            }
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.finish()).unwrap();
    let gguf = Arc::new(Gguf::open(file.path()).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    (file, gguf, shape)
}

/// Returns the key of how many positions or blocks are chosen.
fn top_k(n: u32) -> (&'static str, Value) {
    ("top_k", Value::U32(n))
}

/// Returns the positions that a token attends to at most in layers that choose, and those layers
/// that have an index of their own.
fn reach(gguf: &Gguf) -> (usize, usize) {
    let spec = describe(gguf).unwrap();
    let of_layer = |layer: &LayerSpec| match &layer.mixer {
        Mixer::Mla(a) => a.reach.indexer().map(|i| i.selection.most()),
        Mixer::Gqa(a) => a.index.map(|index| index.most_rows()),
        _ => None,
    };
    let most: Vec<usize> = spec.layers.iter().filter_map(of_layer).collect();
    (most[0], most.len())
}

fn token(text: u32, at: u32) -> u32 {
    (at * at * 7 + text * (13 + at)) % 90 + 1
}

/// An engine on a GPU, one on the processor, and how the former is used.
struct Pair {
    engine: Engine,
    plain: Engine,
    device: Arc<Watched>,
}

impl Pair {
    fn new(gguf: &Arc<Gguf>, shape: &ModelShape, texts: u32) -> Self {
        let on_gpu = plan(shape, (CONTEXT, KvType::F32), ALL, true, Experts::Gpu);
        Self::of(gguf, shape, on_gpu, texts, 64)
    }

    fn of(
        gguf: &Arc<Gguf>,
        shape: &ModelShape,
        mut on_gpu: Placement,
        texts: u32,
        batch: usize,
    ) -> Self {
        let of = (CONTEXT, KvType::F32);
        let mut plain = all_in_memory(shape, of.0, of.1);
        for plan in [&mut on_gpu, &mut plain] {
            plan.sequences = texts;
            plan.fill_sums(shape);
            let tiers = plan.tiers.iter_mut();
            tiers.for_each(|tier| tier.budget_bytes = tier.used_bytes());
        }
        let device = Arc::new(Watched::new(usize::MAX));
        let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
        let options = LoadOptions {
            threads: Some(2),
            batch: Some(batch),
            ..LoadOptions::default()
        };
        let gguf = Arc::clone(gguf);
        let loaded = Engine::load_on(gguf.clone(), &on_gpu, &options, Some(&give), &mut |_, _| {});
        Self {
            engine: loaded.unwrap(),
            plain: load(&gguf, &plain, batch),
            device,
        }
    }

    /// Adds tokens of texts to both, and compares the last logits of each. Returns the launches and
    /// recordings.
    fn step(&mut self, texts: &[(SequenceId, u32, std::ops::Range<u32>)]) -> [usize; 2] {
        let tokens: Vec<Vec<u32>> = texts
            .iter()
            .map(|(_, text, at)| at.clone().map(|at| token(*text, at)).collect())
            .collect();
        let rows: Vec<Rows<'_>> = texts
            .iter()
            .zip(&tokens)
            .map(|((sequence, ..), tokens)| Rows {
                sequence: *sequence,
                tokens,
                logits: Some(LogitsMode::Last),
            })
            .collect();
        self.device.take();
        let got = self.engine.step(&rows).unwrap().to_vec();
        let [launches, _, _, recordings] = self.device.take();
        let expected = self.plain.step(&rows).unwrap();
        let off = nmse(&got, expected);
        assert!(off < SMALL_ERROR, "{texts:?}: {off:e}");
        [launches, recordings]
    }

    fn add(&mut self) -> SequenceId {
        let added = self.engine.add_sequence().unwrap();
        assert_eq!(self.plain.add_sequence().unwrap(), added);
        added
    }
}

#[test]
fn a_text_comes_to_where_it_chooses() {
    // Chunks of 256 positions end before the first choice, and after it. Four at night only.
    let models = [
        ("glm-dsa", 258, 256),
        ("dots3note", 100, 0),
        // Blocks of 8 and of 4 positions, and those after the last block of 4.
        ("minimax-m3", 5, 0),
        ("glm5-next", 256, 256),
        ("minimax-m3", 33, 256),
        ("glm5-next", 40, 0),
        ("qwen4exp", 256, 256),
        ("qwen4exp", 40, 0),
    ];
    let n_models = if is_nightly() { models.len() } else { 4 };
    for &(name, most, chooses_from) in &models[..n_models] {
        let (_file, gguf, shape) = choosing(name, &[top_k(most)]);
        let most = reach(&gguf).0 as u32;
        assert!(most < 290, "{name} attends to all");
        let mut pair = Pair::new(&gguf, &shape, 1);
        let text = pair.add();
        // A prompt with parts in which none, some, and all tokens choose.
        let prompt = most.min(250) - 2;
        pair.step(&[(text, 0, 0..prompt)]);
        let mut launches = Vec::new();
        for at in prompt..prompt + 12 {
            let [launched, recorded] = pair.step(&[(text, 0, at..at + 1)]);
            if launched > 0 && recorded == 0 {
                launches.push((at, launched));
            }
        }
        // Launched once in each chunk, then recorded.
        if chooses_from > prompt {
            assert_eq!(launches.len(), 2, "{name}: {launches:?}");
            // Queries, ratings, and choices of two layers.
            assert!(launches[1].1 > launches[0].1, "{name}: {launches:?}");
        } else {
            assert_eq!(launches.len(), 1, "{name}: {launches:?}");
        }
        pair.step(&[(text, 0, prompt + 12..290)]);
        pair.step(&[(text, 0, 290..291)]);
    }
}

#[test]
fn texts_choose_beside_others_that_attend_to_all() {
    let skip_tail = ("kpool_select_tail", Value::Bool(false));
    for (name, sizes) in [
        ("deepseek32", &[top_k(40)][..]),
        ("minimax-m3", &[top_k(5)]),
        ("qwen4exp", &[top_k(40)]),
        ("glm5-next", &[top_k(40)]),
        ("glm5-next", &[top_k(40), skip_tail]),
        // Blocks that end in other pages than they begin in.
        ("glm5-next", &[top_k(36), ("kpool", Value::U32(3))]),
    ] {
        let (_file, gguf, shape) = choosing(name, sizes);
        assert!(reach(&gguf).0 < 50, "{name} attends to all");
        let mut pair = Pair::new(&gguf, &shape, 3);
        let texts = [pair.add(), pair.add(), pair.add()];
        // Parts of prompts on both sides, with many tokens and with few.
        pair.step(&[(texts[0], 0, 0..50), (texts[1], 1, 0..7)]);
        pair.step(&[
            (texts[0], 0, 50..53),
            (texts[1], 1, 7..44),
            (texts[2], 2, 0..3),
        ]);
        pair.step(&[
            (texts[2], 2, 3..39),
            (texts[0], 0, 53..55),
            (texts[1], 1, 44..45),
        ]);
        for i in 0..5 {
            let past = [55 + i, 45 + i, 39 + i];
            let step = [0, 1, 2].map(|t: usize| (texts[t], t as u32, past[t]..past[t] + 1));
            let [launches, recordings] = pair.step(&step);
            assert_eq!(recordings, usize::from(i == 1), "step {i}");
            assert_eq!(launches > 0, i < 2, "step {i}");
        }
    }
}

/// A layer takes 540 rows in two parts, and the next one attends to what the first part chose too.
#[test]
fn a_large_batch_keeps_what_was_chosen_in_all_its_parts() {
    let of = (CONTEXT, KvType::F32);
    let skip_tail = [("kpool_select_tail", Value::Bool(false))];
    // The layer that is on the processor, if any: one that reads choices, or one that makes them.
    let cases = [
        ("glm-dsa", &[][..], None),
        ("glm-dsa", &[], Some(1)),
        ("glm5-next", &[], Some(3)),
        ("glm5-next", &skip_tail, Some(1)),
        // The others at night.
        ("glm5-next", &[], None),
        ("glm5-next", &[], Some(1)),
        ("glm5-next", &skip_tail, Some(3)),
    ];
    let n_cases = if is_nightly() { cases.len() } else { 4 };
    for (name, sizes, away) in cases.into_iter().take(n_cases) {
        let (_file, gguf, shape) = choosing(name, sizes);
        let on_gpu = |kind, layer| away.is_none() || (kind, layer) != (DenseKind::Attention, away);
        let on_gpu = plan(&shape, of, on_gpu, away.is_none(), Experts::Gpu);
        let mut pair = Pair::of(&gguf, &shape, on_gpu, 3, 540);
        let texts = [0, 1, 2].map(|text| (pair.add(), text, 0..180));
        pair.step(&texts);
    }
}

#[test]
fn lists_that_come_to_the_processor_take_the_place_of_those_before() {
    // The first part of a batch, of 512 rows, has no lists.
    let (_file, gguf, shape) = choosing("glm-dsa", &[top_k(170)]);
    let reads = (DenseKind::Attention, Some(1));
    let on_gpu = |kind, layer| (kind, layer) != reads;
    let of = (CONTEXT, KvType::F32);
    let on_gpu = plan(&shape, of, on_gpu, false, Experts::Gpu);
    let mut pair = Pair::of(&gguf, &shape, on_gpu, 8, 700);
    let counts = [0, 1].map(|_| {
        let lens = [170, 170, 170, 180].into_iter().zip(0..);
        let texts: Vec<_> = lens.map(|(n, text)| (pair.add(), text, 0..n)).collect();
        pair.step(&texts);
        pair.engine.backends.processors.cpu.mixer.n_chosen()
    });
    assert!(counts[0] > 0 && counts[0] == counts[1], "{counts:?}");
}

#[test]
fn attention_to_all_positions_costs_no_choice() {
    for (name, far, near) in [
        ("deepseek32", 512, 8),
        ("minimax-m3", 64, 2),
        ("glm5-next", 512, 8),
        ("qwen4exp", 512, 8),
    ] {
        // More than a text can have, so that no token ever chooses.
        let (_file, gguf, shape) = choosing(name, &[top_k(far)]);
        let mut pair = Pair::new(&gguf, &shape, 1);
        let text = pair.add();
        pair.step(&[(text, 0, 0..20)]);
        let without = pair.step(&[(text, 0, 20..21)])[0];
        let (_file, gguf, shape) = choosing(name, &[top_k(near)]);
        let (most, n_index) = reach(&gguf);
        assert!(most < 20, "{name}");
        let mut pair = Pair::new(&gguf, &shape, 1);
        let text = pair.add();
        pair.step(&[(text, 0, 0..20)]);
        let with = pair.step(&[(text, 0, 20..21)])[0];
        // Per index: queries, perhaps with keys, weights of heads, ratings, and the choice.
        assert!(
            (2 * n_index..=4 * n_index).contains(&(with - without)),
            "{name}: {with} launches instead of {without}"
        );
    }
}
