//! Layers with sliding windows that hold no more than the windows: a text has the bits that it has
//! where they hold everything, whatever it is cut into, goes back to, or begins with.

use super::sequences_tests::{rows, text_of};
use super::{Engine, LogitsMode, Rows, SequenceId};
use crate::error::RunError;
use crate::layers::pages::PAGE;
use crate::options::LoadOptions;
use crate::plans::in_memory::{all_in_memory, in_memory_with};
use proptest::prelude::*;
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::{CacheRoom, KvType};
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_formats::placement::Placement;
use tier_plan_testing::{data, is_nightly};

const CONTEXT: u32 = 256;
const TEXTS: u32 = 3;

/// A model with windows in some layers.
struct Fixture {
    gguf: Arc<Gguf>,
    shape: ModelShape,
    window: usize,
    _file: tempfile::NamedTempFile,
}

impl Fixture {
    /// Makes a model in which all layers but every `period`-th have the window; all with 0.
    fn new(window: u32, period: u32) -> Self {
        let gguf = Gguf::open(&data("arch/gpt-oss.gguf")).unwrap();
        let mut writer = Writer::from_gguf(&gguf);
        let key = |name: &str| format!("gpt-oss.attention.sliding_window{name}");
        writer.set(&key(""), Value::U32(window));
        writer.set(&key("_pattern"), Value::U32(period));
        Self::of(&writer, window)
    }

    /// Makes a model of latent attention in which two layers have the window, and one an indexer.
    fn latent(window: u32) -> Self {
        let gguf = Gguf::open(&data("arch2/dots3note.gguf")).unwrap();
        let mut writer = Writer::from_gguf(&gguf);
        let key = "dots3note.attention.sliding_window";
        writer.set(key, Value::U32(window));
        Self::of(&writer, window)
    }

    fn of(writer: &Writer, window: u32) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), writer.finish()).unwrap();
        let gguf = Arc::new(Gguf::open(file.path()).unwrap());
        Self {
            shape: shape_of(&gguf, &describe(&gguf).unwrap()),
            gguf,
            window: window as usize,
            _file: file,
        }
    }

    fn plan(&self, kv_type: KvType, checkpoints: u32, chunk: u32) -> Placement {
        let room = CacheRoom {
            sequences: TEXTS,
            checkpoints,
            window_chunk: Some(chunk),
            ..CacheRoom::of_one(CONTEXT)
        };
        in_memory_with(&self.shape, room, kv_type)
    }

    fn engine(&self, plan: &Placement, threads: usize, batch: usize) -> Engine {
        let options = LoadOptions {
            threads: Some(threads),
            batch: Some(batch),
            ..LoadOptions::default()
        };
        Engine::load(self.gguf.clone(), plan, &options, &mut |_, _| {}).unwrap()
    }

    /// The logits of every token of a text where all layers hold all positions.
    fn alone(&self, tokens: &[u32], kv_type: KvType) -> Vec<Vec<u32>> {
        let mut plan = all_in_memory(&self.shape, CONTEXT, kv_type);
        plan.window_chunk = None;
        plan.fill_sums(&self.shape);
        let mut engine = self.engine(&plan, 2, 512);
        assert!(engine.sequences.window_pages_in_use().is_empty());
        let n_vocab = engine.spec().n_vocab;
        rows(engine.forward(tokens, LogitsMode::All).unwrap(), n_vocab)
    }

    /// Pages that texts, a batch, and checkpoints may have at once.
    fn most_pages(&self, checkpoints: u32, chunk: u32) -> usize {
        let pages = self.window.div_ceil(PAGE);
        (pages + 2) * TEXTS as usize
            + (chunk as usize).div_ceil(PAGE)
            + (pages + 1) * checkpoints as usize
    }
}

fn text(number: usize) -> Vec<u32> {
    text_of(number, CONTEXT as usize)
}

/// What happens to a text at a time.
#[derive(Debug, Clone)]
enum Action {
    /// A step with this many tokens of each text.
    Step([usize; 2]),
    Keep(usize),
    /// The text is removed and begins with what is kept of it.
    Restart(usize),
    /// The text goes on in a fork, after the old one has gone on otherwise.
    Fork(usize),
    /// The text goes back to this share of itself, in percent.
    Back(usize, usize),
    /// The text forgets a few tokens.
    TakeBack(usize, usize),
}

fn action() -> impl Strategy<Value = Action> {
    let n = || prop_oneof![2 => Just(1usize), 2 => 0..6usize, 2 => 0..90usize];
    prop_oneof![
        8 => (n(), n()).prop_map(|(a, b)| Action::Step([a, b])),
        2 => (0..2usize).prop_map(Action::Keep),
        1 => (0..2usize).prop_map(Action::Restart),
        1 => (0..2usize).prop_map(Action::Fork),
        1 => (0..2usize, 0..100usize).prop_map(|(text, part)| Action::Back(text, part)),
        1 => (0..2usize, 1..4usize).prop_map(|(text, n)| Action::TakeBack(text, n)),
    ]
}

/// An engine with two texts.
struct Company<'a> {
    engine: Engine,
    texts: [(SequenceId, Vec<u32>); 2],
    alone: &'a [Vec<Vec<u32>>; 2],
}

impl Company<'_> {
    fn act(&mut self, action: &Action) {
        match *action {
            Action::Step(n) => self.step(n),
            Action::Keep(text) => self.engine.keep_sequence(self.texts[text].0),
            Action::Restart(text) => {
                let (old, tokens) = &self.texts[text];
                self.engine.remove_sequence(*old);
                self.texts[text].0 = self.engine.begin_sequence(tokens).unwrap().0;
            }
            Action::Fork(text) => {
                let old = self.texts[text].0;
                let n = self.engine.n_past_of(old);
                let fork = self.engine.fork(old, n).unwrap();
                if n > 0 && n < CONTEXT as usize {
                    let rows = Rows {
                        sequence: old,
                        tokens: &[3],
                        logits: None,
                    };
                    self.engine.step(&[rows]).unwrap();
                }
                self.engine.remove_sequence(old);
                self.texts[text].0 = fork;
            }
            Action::Back(text, part) => {
                let id = self.texts[text].0;
                let n = self.engine.n_past_of(id);
                let wanted = n * part / 100;
                let refused = self.engine.truncate_sequence(id, wanted).is_err();
                let left = self.engine.rewind_sequence(id, wanted).unwrap();
                assert!(left <= wanted && refused == (left < wanted));
            }
            Action::TakeBack(text, n) => {
                let id = self.texts[text].0;
                let past = self.engine.n_past_of(id);
                let n = past.saturating_sub(n);
                // A text that has just begun at a checkpoint has no more than that.
                match self.engine.truncate_sequence(id, n) {
                    Ok(()) | Err(RunError::CannotRewind { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    fn step(&mut self, n: [usize; 2]) {
        let (mut wanted, mut step) = (Vec::new(), Vec::new());
        for (text, n) in n.into_iter().enumerate() {
            let (id, tokens) = &self.texts[text];
            let past = self.engine.n_past_of(*id);
            let end = (past + n).min(tokens.len());
            wanted.extend((past..end).map(|at| (text, at)));
            step.push(Rows {
                sequence: *id,
                tokens: &tokens[past..end],
                logits: Some(LogitsMode::All),
            });
        }
        let n_vocab = self.engine.spec().n_vocab;
        let found = rows(self.engine.step(&step).unwrap(), n_vocab);
        assert_eq!(found.len(), wanted.len());
        for (found, (text, at)) in found.iter().zip(wanted) {
            assert!(*found == self.alone[text][at], "token {at} of text {text}");
        }
    }
}

#[test]
fn a_text_has_the_same_bits_where_layers_hold_their_windows_only() {
    let heads = [(5, 2), (8, 0), (21, 3), (64, 2)];
    let fixtures = heads.map(|(window, period)| Fixture::new(window, period));
    for fixture in fixtures.into_iter().chain([Fixture::latent(21)]) {
        for kv_type in [KvType::F16, KvType::Q8_0] {
            let alone = [0, 1].map(|t| fixture.alone(&text(t), kv_type));
            let batches = prop_oneof![Just(7usize), Just(64), Just(512)];
            let strategy = (
                prop::collection::vec(action(), 4..30),
                0..8u32,
                prop_oneof![Just(16u32), Just(64), Just(100)],
                batches,
            );
            let config = ProptestConfig {
                cases: if is_nightly() { 64 } else { 6 },
                failure_persistence: None,
                ..ProptestConfig::default()
            };
            proptest!(config, |((actions, checkpoints, chunk, batch) in strategy)| {
                let plan = fixture.plan(kv_type, checkpoints, chunk);
                prop_assert_eq!(plan.window_chunk, Some(chunk));
                let mut engine = fixture.engine(&plan, 2, batch);
                prop_assert!(engine.batch() <= chunk as usize);
                let all = engine.pages();
                let texts = [0, 1].map(|t| (engine.add_sequence().unwrap(), text(t)));
                let mut company = Company { engine, texts, alone: &alone };
                let most = fixture.most_pages(checkpoints, chunk);
                for action in &actions {
                    company.act(action);
                    let used = company.engine.sequences.window_pages_in_use();
                    prop_assert!(used.len() == 1 && used[0].1 <= most, "{:?} > {}", used, most);
                }
                for (id, _) in &company.texts {
                    company.engine.remove_sequence(*id);
                }
                prop_assert_eq!(company.engine.pages(), all, "no page is lost");
                company.engine.sequences.forget_kept();
                let used = company.engine.sequences.window_pages_in_use();
                prop_assert_eq!(used, vec![(fixture.window, 0)]);
            });
        }
    }
}

#[test]
fn a_long_context_takes_what_the_formula_says() {
    let fixture = Fixture::new(128, 2);
    let context = 1 << 20;
    for (sequences, checkpoints) in [(1, 0), (3, 7)] {
        let room = CacheRoom {
            sequences,
            checkpoints,
            ..CacheRoom::of_one(context)
        };
        let plan = in_memory_with(&fixture.shape, room, KvType::F16);
        let pages = u64::from(4 * sequences + 32 + 3 * checkpoints);
        let whole = u64::from(context * sequences);
        let found: Vec<u64> = fixture
            .shape
            .caches
            .iter()
            .map(|cache| cache.bytes(KvType::F16, plan.room()) / cache.token_bytes(KvType::F16))
            .collect();
        let expected = (0..found.len()).map(|l| if l % 2 == 0 { pages * 64 } else { whole });
        assert!(found.iter().copied().eq(expected), "{found:?}");
    }
    // An engine holds what its plan says; a shorter context keeps the test small.
    let plan = fixture.plan(KvType::F16, 2, 16);
    let engine = fixture.engine(&plan, 1, 512);
    let bytes: Vec<u64> = engine.sequences.bytes().collect();
    let planned = fixture.shape.caches.iter();
    let planned = planned.map(|cache| cache.bytes(KvType::F16, plan.room()));
    assert!(bytes.iter().copied().eq(planned), "{bytes:?}");
}

#[test]
fn texts_go_back_to_their_windows_and_to_checkpoints() {
    let fixture = Fixture::new(20, 2);
    // Checkpoints after every 64th token.
    let mut engine = fixture.engine(&fixture.plan(KvType::F16, 4, 32), 1, 512);
    let tokens = text(0);
    let id = engine.add_sequence().unwrap();
    let go = |engine: &mut Engine, end: usize| {
        let past = engine.n_past_of(id);
        let rows = Rows {
            sequence: id,
            tokens: &tokens[past..end],
            logits: None,
        };
        engine.step(&[rows]).unwrap();
    };
    go(&mut engine, 200);
    engine.truncate_sequence(id, 192).unwrap();
    go(&mut engine, 201);
    let refused = engine.truncate_sequence(id, 150).unwrap_err();
    assert!(matches!(
        refused,
        RunError::CannotRewind {
            n_past: 201,
            wanted: 150
        }
    ));
    assert!(engine.fork(id, 150).is_err());
    let fork = engine.fork(id, 128).unwrap();
    assert_eq!(engine.n_past_of(fork), 128);
    engine.remove_sequence(fork);
    assert_eq!(engine.rewind_sequence(id, 150).unwrap(), 128);
    go(&mut engine, 180);
    assert_eq!(engine.rewind_sequence(id, 100).unwrap(), 64);
    assert_eq!(engine.rewind_sequence(id, 63).unwrap(), 63, "not so far");
    assert_eq!(engine.rewind_sequence(id, 10).unwrap(), 0);
    go(&mut engine, 256);
    let texts: Vec<_> = (1..TEXTS).map(|_| engine.add_sequence().unwrap()).collect();
    let refused = engine.add_sequence().unwrap_err();
    assert!(matches!(
        refused,
        RunError::TooManyTexts { texts: TEXTS_ALL }
    ));
    texts.into_iter().for_each(|id| engine.remove_sequence(id));
}

const TEXTS_ALL: usize = TEXTS as usize;

#[test]
fn kept_beginnings_come_with_their_windows() {
    for kv_type in [KvType::F32, KvType::Q8_0] {
        let fixture = Fixture::new(20, 2);
        let folder = tempfile::tempdir().unwrap();
        let open = |chunk| {
            let plan = fixture.plan(kv_type, 8, chunk);
            let mut engine = fixture.engine(&plan, 2, 512);
            engine.keep_in(folder.path(), 1 << 30).unwrap();
            engine
        };
        let read = |engine: &mut Engine, tokens: &[u32]| {
            let (sequence, n) = engine.begin_sequence(tokens).unwrap();
            let rest = Rows {
                sequence,
                tokens: &tokens[n..],
                logits: Some(LogitsMode::All),
            };
            let n_vocab = engine.spec().n_vocab;
            let found = rows(engine.step(&[rest]).unwrap(), n_vocab);
            engine.keep_sequence(sequence);
            engine.remove_sequence(sequence);
            assert!(engine.take_kept_notes().is_empty());
            (n, found)
        };
        let mut other = text(0)[..250].to_vec();
        other[203] += 1;
        let alone = fixture.alone(&other, kv_type);
        let mut engine = open(64);
        assert_eq!(read(&mut engine, &text(0)[..240]).0, 0);
        // Checkpoints are at every 32nd token.
        let (n, found) = read(&mut engine, &other);
        assert!(n == 192 && found[..] == alone[192..], "{kv_type}");
        // Another program, with another batch; the prompt ended there.
        let (n, found) = read(&mut open(32), &other);
        assert!(n == 248 && found[..] == alone[248..], "{n} {kv_type}");
        // Where layers hold everything, files are others.
        let mut plan = fixture.plan(kv_type, 8, 32);
        plan.window_chunk = None;
        plan.fill_sums(&fixture.shape);
        for tier in &mut plan.tiers {
            tier.budget_bytes = tier.used_bytes();
        }
        let mut whole = fixture.engine(&plan, 2, 512);
        whole.keep_in(folder.path(), 1 << 30).unwrap();
        let (n, found) = read(&mut whole, &other);
        assert!(n == 0 && found == alone, "{kv_type}");
        assert_eq!(read(&mut open(32), &other).0, 248);
    }
}

#[test]
fn a_chat_goes_back_to_where_its_prompt_ended() {
    let fixture = Fixture::new(20, 2);
    // So few checkpoints that none are on the way.
    let mut engine = fixture.engine(&fixture.plan(KvType::F16, 1, 32), 1, 512);
    let tokens = text(0);
    let id = engine.add_sequence().unwrap();
    let add = |engine: &mut Engine, tokens: &[u32]| {
        let rows = Rows {
            sequence: id,
            tokens,
            logits: None,
        };
        engine.step(&[rows]).unwrap();
    };
    for (from, to) in [(0, 45), (45, 70)] {
        add(&mut engine, &tokens[from..to]);
    }
    for token in &tokens[70..200] {
        add(&mut engine, &[*token]);
    }
    assert_eq!(engine.rewind_sequence(id, 70).unwrap(), 64);
    for token in &tokens[64..200] {
        add(&mut engine, &[*token]);
    }
    assert_eq!(engine.rewind_sequence(id, 64).unwrap(), 64);
    add(&mut engine, &tokens[64..90]);
    for token in &tokens[90..200] {
        add(&mut engine, &[*token]);
    }
    assert_eq!(engine.rewind_sequence(id, 95).unwrap(), 88);
}

#[test]
fn a_step_that_fails_is_undone_as_far_as_windows_reach() {
    let fixture = Fixture::new(20, 2);
    let mut engine = fixture.engine(&fixture.plan(KvType::F16, 1, 32), 1, 512);
    let tokens = text(0);
    let id = engine.add_sequence().unwrap();
    let rows = |tokens| Rows {
        sequence: id,
        tokens,
        logits: None,
    };
    engine.step(&[rows(&tokens[..70])]).unwrap();
    // The first batch of a step fails, then the fourth.
    for (batches, usable) in [(1, true), (4, false)] {
        let sequences = &mut engine.sequences;
        sequences.reserve(id, 130).unwrap();
        for batch in 0..batches {
            sequences.reserve_windows([(id, 32)].into_iter()).unwrap();
            if batch + 1 < batches {
                sequences.advance(id, &tokens[70 + batch * 32..][..32]);
            }
        }
        sequences.undo(id, 70);
        assert_eq!(engine.n_past_of(id), 70);
        let next = engine.step(&[rows(&tokens[70..71])]).map(|_| ());
        assert_eq!(next.is_ok(), usable, "{next:?}");
        assert!(usable || matches!(next, Err(RunError::Broken)));
        let n = engine.rewind_sequence(id, 70).unwrap();
        assert_eq!(n, if usable { 70 } else { 64 });
    }
    let n_vocab = engine.spec().n_vocab;
    let logits = Some(LogitsMode::All);
    let rest = Rows {
        sequence: id,
        tokens: &tokens[64..],
        logits,
    };
    let found = super::sequences_tests::rows(engine.step(&[rest]).unwrap(), n_vocab);
    assert!(found[..] == fixture.alone(&tokens, KvType::F16)[64..]);
    engine.remove_sequence(id);
    engine.sequences.forget_kept();
    assert_eq!(engine.sequences.window_pages_in_use(), [(20, 0)]);
}
