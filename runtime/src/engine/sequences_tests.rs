//! Several texts in one engine: each has the bits that it has alone, whatever is beside it, however
//! its prompt is cut, and under any plan.

use super::{Engine, LogitsMode, Pages, Rows, SequenceId};
use crate::error::RunError;
use crate::layers::pages::pages_for;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use proptest::prelude::*;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_formats::model::{describe, spec::Mixer};
use tier_plan_formats::placement::{Pins, Placement, TierIdx};
use tier_plan_testing::{data, is_nightly, models};

pub(super) const CONTEXT: u32 = 40;
pub(super) const TEXTS: u32 = 4;

/// A model, and its texts' logits when each is alone.
pub(super) struct Fixture {
    pub(super) gguf: Arc<Gguf>,
    pub(super) shape: ModelShape,
    /// Whether a text can go back to fewer tokens.
    rewinds: bool,
}

impl Fixture {
    pub(super) fn new(name: &str) -> Self {
        Self::of("arch", name)
    }

    pub(super) fn of(folder: &str, name: &str) -> Self {
        let gguf = Arc::new(Gguf::open(&data(&format!("{folder}/{name}.gguf"))).unwrap());
        let spec = describe(&gguf).unwrap();
        let recurrent = |mixer: &Mixer| mixer.state_bytes() > 0;
        Self {
            shape: shape_of(&gguf, &spec),
            rewinds: !spec.layers.iter().any(|layer| recurrent(&layer.mixer)),
            gguf,
        }
    }

    fn plan(&self, sequences: u32, kv_type: KvType, checkpoints: u32, pinned: bool) -> Placement {
        let mut plan = all_in_memory(&self.shape, CONTEXT, kv_type);
        plan.sequences = sequences;
        plan.checkpoints = checkpoints;
        if pinned {
            for (layer, experts) in plan.layers.iter_mut().zip(&self.shape.experts) {
                layer.pinned = vec![Pins {
                    tier: TierIdx::FIRST,
                    experts: (0..experts.n_expert / 2).collect(),
                }];
            }
        }
        plan.fill_sums(&self.shape);
        for tier in &mut plan.tiers {
            tier.budget_bytes = tier.used_bytes();
        }
        plan
    }

    fn engine(&self, plan: &Placement, threads: usize, batch: usize) -> Engine {
        let options = LoadOptions {
            threads: Some(threads),
            batch: Some(batch),
            ..LoadOptions::default()
        };
        Engine::load(self.gguf.clone(), plan, &options, &mut |_, _| {}).unwrap()
    }

    /// The logits of every token of a text that is alone, `[tokens, n_vocab]`, as bits.
    pub(super) fn alone(&self, tokens: &[u32], kv_type: KvType) -> Vec<Vec<u32>> {
        let mut engine = self.engine(&self.plan(1, kv_type, 0, false), 1, 512);
        let n_vocab = engine.spec().n_vocab;
        let logits = engine.forward(tokens, LogitsMode::All).unwrap();
        rows(logits, n_vocab)
    }
}

pub(super) fn rows(logits: &[f32], n_vocab: usize) -> Vec<Vec<u32>> {
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect();
    logits.chunks_exact(n_vocab).map(bits).collect()
}

/// The tokens of a text that a number names. All begin alike.
pub(super) fn text(number: usize) -> Vec<u32> {
    text_of(number, CONTEXT as usize)
}

/// The same, with some number of tokens.
pub(super) fn text_of(number: usize, len: usize) -> Vec<u32> {
    let differs = |i: usize| if i < 11 { 0 } else { number };
    (0..len)
        .map(|i| ((i * i * 7 + differs(i) * (13 + i)) % 90 + 1) as u32)
        .collect()
}

/// What happens to one of the texts at a time.
#[derive(Debug, Clone)]
pub(super) enum Action {
    /// A step with this many tokens of each text, in this order, of as many as it has left.
    Step(Vec<(usize, usize)>),
    /// The text is kept for others.
    Keep(usize),
    /// The text is removed, and begins anew with what is kept of it.
    Restart(usize),
    /// The text goes on in a copy of itself; the copy's beginning is shared with the old one until
    /// that is removed.
    Fork(usize),
    /// The text forgets its last tokens.
    Back(usize, usize),
}

pub(super) fn action() -> impl Strategy<Value = Action> {
    let texts = TEXTS as usize - 1;
    let part = (0..texts, prop_oneof![3 => Just(1), 2 => 0..12usize]);
    prop_oneof![
        8 => prop::collection::vec(part, 1..=texts).prop_map(|mut parts| {
            let mut seen = Vec::new();
            parts.retain(|(text, _)| !seen.contains(text) && { seen.push(*text); true });
            Action::Step(parts)
        }),
        1 => (0..texts).prop_map(Action::Keep),
        2 => (0..texts).prop_map(Action::Restart),
        1 => (0..texts).prop_map(Action::Fork),
        1 => (0..texts, 1..9usize).prop_map(|(text, n)| Action::Back(text, n)),
    ]
}

/// An engine with some texts, each compared with itself alone.
pub(super) struct Company<'a> {
    fixture: &'a Fixture,
    pub(super) engine: Engine,
    texts: Vec<(SequenceId, Vec<u32>)>,
    alone: &'a [Vec<Vec<u32>>],
    /// Whether a token's logits are as they should be; both are bits.
    agree: fn(&[u32], &[u32]) -> bool,
}

impl<'a> Company<'a> {
    /// Begins all texts but one that an engine has room for.
    pub(super) fn new(
        fixture: &'a Fixture,
        mut engine: Engine,
        alone: &'a [Vec<Vec<u32>>],
        agree: fn(&[u32], &[u32]) -> bool,
    ) -> Self {
        let texts = (0..TEXTS as usize - 1)
            .map(|t| (engine.add_sequence().unwrap(), text(t)))
            .collect();
        Self {
            fixture,
            engine,
            texts,
            alone,
            agree,
        }
    }

    /// Takes actions, and ends the texts: no page is lost.
    pub(super) fn act_all(&mut self, actions: &[Action]) {
        for action in actions {
            self.act(action);
        }
        for (id, _) in &self.texts {
            self.engine.remove_sequence(*id);
        }
        let Pages { free, total } = self.engine.pages();
        assert_eq!(free, total, "no page is lost");
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Step(parts) => self.step(parts),
            Action::Keep(text) => self.engine.keep_sequence(self.texts[*text].0),
            Action::Restart(text) => {
                let (old, tokens) = &self.texts[*text];
                self.engine.remove_sequence(*old);
                assert_eq!(self.engine.n_past_of(*old), 0);
                let (id, n) = self.engine.begin_sequence(tokens).unwrap();
                assert_eq!(self.engine.n_past_of(id), n);
                assert!(n < tokens.len());
                self.texts[*text].0 = id;
            }
            Action::Fork(text) => {
                let old = self.texts[*text].0;
                let n = self.engine.n_past_of(old);
                let fork = self.engine.fork(old, n).unwrap();
                assert_eq!(self.engine.n_past_of(fork), n);
                // What the old text adds must not reach the fork.
                if n < CONTEXT as usize && n > 0 {
                    let rows = Rows {
                        sequence: old,
                        tokens: &[3],
                        logits: None,
                    };
                    self.engine.step(&[rows]).unwrap();
                }
                self.engine.remove_sequence(old);
                self.texts[*text].0 = fork;
            }
            Action::Back(text, n) => {
                let id = self.texts[*text].0;
                let n_past = self.engine.n_past_of(id);
                let wanted = n_past.saturating_sub(*n);
                let can = self.fixture.rewinds || wanted == 0 || n_past == wanted;
                let left = self.engine.rewind_sequence(id, wanted).unwrap();
                assert!(left <= wanted && (left == wanted || !can));
                assert_eq!(self.engine.n_past_of(id), left);
                // Where it is now, it can be cut to.
                self.engine.truncate_sequence(id, left).unwrap();
            }
        }
    }

    fn step(&mut self, parts: &[(usize, usize)]) {
        let mut wanted = Vec::new();
        let mut step = Vec::new();
        for (text, n) in parts {
            let (id, tokens) = &self.texts[*text];
            let past = self.engine.n_past_of(*id);
            let end = (past + n).min(tokens.len());
            // All ways to want logits take turns.
            let logits = [None, Some(LogitsMode::Last), Some(LogitsMode::All)][(past + text) % 3];
            match logits {
                None => {}
                Some(LogitsMode::All) => wanted.extend((past..end).map(|at| (*text, at))),
                Some(LogitsMode::Last) => wanted.extend((past < end).then(|| (*text, end - 1))),
            }
            step.push(Rows {
                sequence: *id,
                tokens: &tokens[past..end],
                logits,
            });
        }
        let n_vocab = self.engine.spec().n_vocab;
        let found = rows(self.engine.step(&step).unwrap(), n_vocab);
        assert_eq!(found.len(), wanted.len());
        for (found, (text, at)) in found.iter().zip(wanted) {
            assert!(
                (self.agree)(found, &self.alone[text][at]),
                "token {at} of text {text}, in {parts:?}"
            );
        }
    }
}

fn cases() -> u32 {
    if is_nightly() { 64 } else { 4 }
}

#[test]
fn a_text_has_the_same_bits_alone_and_in_company() {
    for name in models("arch") {
        compare_with_company(&Fixture::new(&name), cases());
    }
}

#[test]
fn texts_of_later_architectures_have_the_same_bits_in_company() {
    // The other model of its architecture has a vocabulary that these texts don't fit.
    for name in models("arch2").iter().filter(|name| *name != "llama4-long") {
        compare_with_company(&Fixture::of("arch2", name), cases() / 2);
    }
}

/// Compares texts that take random actions together with each text alone.
fn compare_with_company(fixture: &Fixture, cases: u32) {
    let kv_types = [KvType::F32, KvType::F16, KvType::Q8_0];
    let alone: Vec<Vec<Vec<Vec<u32>>>> = kv_types
        .iter()
        .map(|kv| {
            (0..TEXTS as usize)
                .map(|t| fixture.alone(&text(t), *kv))
                .collect()
        })
        .collect();
    let strategy = (
        prop::collection::vec(action(), 4..24),
        0..3usize,
        0..6u32,
        any::<bool>(),
        1..=3usize,
        prop_oneof![Just(3usize), Just(16), Just(512)],
    );
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |((actions, kv, checkpoints, pinned, threads, batch) in strategy)| {
        let plan = fixture.plan(TEXTS, kv_types[kv], checkpoints, pinned);
        let engine = fixture.engine(&plan, threads, batch);
        Company::new(fixture, engine, &alone[kv], |a, b| a == b).act_all(&actions);
    });
}

#[test]
fn pages_are_shared_by_forks_and_freed_with_the_last() {
    let fixture = Fixture::new("qwen3moe");
    let mut engine = fixture.engine(&fixture.plan(TEXTS, KvType::F16, 0, false), 1, 512);
    let total = engine.pages().total;
    assert_eq!(
        total,
        pages_for(CONTEXT.next_multiple_of(64) as usize) * TEXTS as usize
    );
    let tokens = text(0);
    let first = engine.add_sequence().unwrap();
    let step = |engine: &mut Engine, id, tokens: &[u32]| {
        let logits = Some(LogitsMode::Last);
        let rows = Rows {
            sequence: id,
            tokens,
            logits,
        };
        let n_vocab = engine.spec().n_vocab;
        engine.step(&[rows]).map(|logits| rows_of(logits, n_vocab))
    };
    step(&mut engine, first, &tokens[..20]).unwrap();
    assert_eq!(
        engine.pages(),
        Pages {
            free: total - 3,
            total
        }
    );
    let second = engine.fork(first, 20).unwrap();
    assert_eq!(engine.pages().free, total - 3);
    // The page that both would write to is copied, the full ones stay shared.
    let a = step(&mut engine, second, &tokens[20..21]).unwrap();
    assert_eq!(engine.pages().free, total - 4);
    let b = step(&mut engine, first, &tokens[20..21]).unwrap();
    assert_eq!((engine.pages().free, a), (total - 4, b));
    let third = engine.fork(first, 16).unwrap();
    engine.remove_sequence(first);
    assert_eq!(engine.pages().free, total - 3);
    engine.remove_sequence(second);
    assert_eq!(engine.pages().free, total - 2);
    assert!(matches!(
        step(&mut engine, second, &tokens[..1]),
        Err(RunError::NoText)
    ));
    engine.remove_sequence(third);
    engine.remove_sequence(third);
    assert_eq!(engine.pages().free, total);
}

fn rows_of(logits: &[f32], n_vocab: usize) -> Vec<Vec<u32>> {
    rows(logits, n_vocab)
}

#[test]
fn a_step_that_does_not_fit_changes_nothing() {
    let fixture = Fixture::new("qwen3moe");
    let mut engine = fixture.engine(&fixture.plan(1, KvType::F16, 0, false), 1, 512);
    let (a, b) = (
        engine.add_sequence().unwrap(),
        engine.add_sequence().unwrap(),
    );
    let tokens = text(0);
    let rows = |sequence, n: usize| Rows {
        sequence,
        tokens: &tokens[..n],
        logits: None,
    };
    engine.step(&[rows(a, 20), rows(b, 9)]).unwrap();
    let before = engine.pages();
    let errors = [
        engine.step(&[rows(b, 1), rows(a, 21)]).unwrap_err(),
        engine.step(&[rows(a, 12), rows(b, 9)]).unwrap_err(),
        engine.step(&[rows(a, 1), rows(a, 1)]).unwrap_err(),
        engine
            .step(&[Rows {
                tokens: &[1 << 30],
                ..rows(a, 1)
            }])
            .unwrap_err(),
    ];
    assert!(matches!(
        errors[0],
        RunError::ContextFull {
            wanted: 41,
            context: 40
        }
    ));
    assert!(
        matches!(errors[1], RunError::NoPages { .. }),
        "{}",
        errors[1]
    );
    assert!(matches!(errors[2], RunError::TwiceInStep));
    assert!(matches!(errors[3], RunError::Token { .. }));
    assert_eq!(engine.pages(), before);
    assert_eq!([a, b].map(|id| engine.n_past_of(id)), [20, 9]);
    // The first text has what it asks for once the second is gone.
    engine.remove_sequence(b);
    engine.step(&[rows(a, 12)]).unwrap();
}

#[test]
fn recurrent_states_are_as_many_as_planned_and_forks_copy_them() {
    let fixture = Fixture::new("qwen3next");
    let mut engine = fixture.engine(&fixture.plan(2, KvType::F16, 0, false), 1, 512);
    let a = engine.add_sequence().unwrap();
    let tokens = text(0);
    let rows = |sequence| Rows {
        sequence,
        tokens: &tokens[..5],
        logits: None,
    };
    engine.step(&[rows(a)]).unwrap();
    assert!(matches!(
        engine.fork(a, 3),
        Err(RunError::CannotRewind {
            n_past: 5,
            wanted: 3
        })
    ));
    let b = engine.fork(a, 5).unwrap();
    assert!(matches!(
        engine.add_sequence(),
        Err(RunError::TooManyTexts { texts: 2 })
    ));
    engine.remove_sequence(a);
    let c = engine.add_sequence().unwrap();
    assert_eq!([b, c].map(|id| engine.n_past_of(id)), [5, 0]);
}

#[test]
fn a_kept_beginning_is_not_read_again() {
    for (name, checkpoints, again) in [
        ("qwen3moe", 0, 26),
        ("qwen3next", 5, 24),
        ("qwen3next", 0, 0),
    ] {
        let fixture = Fixture::new(name);
        let mut engine = fixture.engine(&fixture.plan(2, KvType::F16, checkpoints, false), 2, 512);
        let tokens = text(0);
        let read = |engine: &mut Engine, tokens: &[u32]| {
            let (sequence, n) = engine.begin_sequence(tokens).unwrap();
            let logits = Some(LogitsMode::Last);
            let rows = Rows {
                sequence,
                tokens: &tokens[n..],
                logits,
            };
            let found = engine.step(&[rows]).unwrap().to_vec();
            engine.keep_sequence(sequence);
            engine.remove_sequence(sequence);
            (n, found)
        };
        assert_eq!(read(&mut engine, &tokens[..30]).0, 0);
        let mut other = tokens[..30].to_vec();
        other[26] += 1;
        let alone = fixture.alone(&other, KvType::F16);
        let (n, logits) = read(&mut engine, &other);
        assert_eq!(n, again, "{name}");
        let n_vocab = engine.spec().n_vocab;
        assert!(rows(&logits, n_vocab)[0] == alone[29], "{name}");
        // The same text again: one token, for the logits.
        let states = checkpoints > 0 || fixture.rewinds;
        let expected = if fixture.rewinds {
            29
        } else if states {
            24
        } else {
            0
        };
        assert_eq!(read(&mut engine, &other).0, expected, "{name}");
        // A longer one begins where the other ended.
        other.push(5);
        assert_eq!(
            read(&mut engine, &other).0,
            if states { 30 } else { 0 },
            "{name}"
        );
    }
}

#[test]
fn kept_beginnings_make_room_for_texts() {
    for name in ["qwen3moe", "qwen3next"] {
        let fixture = Fixture::new(name);
        let mut engine = fixture.engine(&fixture.plan(2, KvType::F16, 2, false), 1, 512);
        let total = engine.pages().total;
        for number in 0..12 {
            let (sequence, _) = engine.begin_sequence(&text(number)).unwrap();
            let n = engine.n_past_of(sequence);
            let tokens = &text(number)[n..];
            engine
                .step(&[Rows {
                    sequence,
                    tokens,
                    logits: None,
                }])
                .unwrap();
            engine.keep_sequence(sequence);
            engine.remove_sequence(sequence);
            assert_eq!(engine.pages().free, total, "{name} {number}");
        }
    }
}

#[test]
fn kept_beginnings_survive_the_engine() {
    for (name, checkpoints, again) in [
        ("qwen3moe", 0, 24),
        ("qwen3next", 5, 24),
        ("deepseek-v3", 0, 24),
    ] {
        for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
            let fixture = Fixture::new(name);
            let folder = tempfile::tempdir().unwrap();
            let open = |plan_for: u32| {
                let plan = fixture.plan(plan_for, kv_type, checkpoints, false);
                let mut engine = fixture.engine(&plan, 2, 512);
                engine.keep_in(folder.path(), 1 << 30).unwrap();
                engine
            };
            let tokens = text(0);
            let read = |engine: &mut Engine, tokens: &[u32]| {
                let (sequence, n) = engine.begin_sequence(tokens).unwrap();
                let rest = Rows {
                    sequence,
                    tokens: &tokens[n..],
                    logits: Some(LogitsMode::Last),
                };
                let n_vocab = engine.spec().n_vocab;
                let found = rows(engine.step(&[rest]).unwrap(), n_vocab);
                engine.keep_sequence(sequence);
                engine.remove_sequence(sequence);
                assert!(engine.take_kept_notes().is_empty());
                (n, found)
            };
            assert_eq!(read(&mut open(2), &tokens[..30]).0, 0);
            // Another program, with more texts, and a text that is the same only so far.
            let mut other = tokens[..31].to_vec();
            other[27] += 1;
            let alone = fixture.alone(&other, kv_type);
            let (n, found) = read(&mut open(3), &other);
            assert_eq!(n, again, "{name} {kv_type}");
            assert!(found[0] == alone[30], "{name} {kv_type}");
            // A damaged page ends what is there before it, and is named.
            let mut files: Vec<_> = std::fs::read_dir(folder.path())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            files.retain(|path| path.extension().is_some_and(|e| e == "page"));
            for path in files {
                let mut bytes = std::fs::read(&path).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 8;
                std::fs::write(&path, bytes).unwrap();
            }
            let mut engine = open(1);
            let (sequence, n) = engine.begin_sequence(&other).unwrap();
            assert_eq!((n, engine.take_kept_notes().len()), (0, 1));
            let all = Rows {
                sequence,
                tokens: &other,
                logits: Some(LogitsMode::Last),
            };
            let n_vocab = engine.spec().n_vocab;
            assert!(rows(engine.step(&[all]).unwrap(), n_vocab)[0] == alone[30]);
        }
    }
}
