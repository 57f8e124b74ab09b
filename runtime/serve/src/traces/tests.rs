use super::*;
use std::collections::HashSet;

/// A profile of one layer with two of eight experts per token.
fn traces(max_choices: usize) -> Traces {
    Traces {
        path: PathBuf::from("unused"),
        profile: Profile {
            model: SourceId {
                name: "m".into(),
                hash: String::new(),
            },
            layers: vec![0],
            n_expert: 8,
            n_used: 2,
            made: MADE.into(),
            prompts: Vec::new(),
            counted: None,
            guesses: None,
            id: SourceId {
                name: String::new(),
                hash: String::new(),
            },
        },
        open: HashMap::new(),
        max_choices,
        n_choices: 0,
        n_ended: 0,
        random: 1,
        is_changed: false,
        fresh: HashSet::new(),
        seen: None,
        written: Instant::now(),
    }
}

fn rows(id: u64, from: usize, n_computed: usize, n_kept: usize) -> StepRows {
    StepRows {
        id: TextId(id),
        n_prompt: 4,
        from,
        n_computed,
        n_kept,
    }
}

/// Records steps whose tokens choose the experts `n` and `n + 1`, `n` their number in the step.
fn record(traces: &mut Traces, rows: &[StepRows]) {
    let n: usize = rows.iter().map(|rows| rows.n_computed).sum();
    let routing = Routing {
        experts: (0..n as u16).flat_map(|n| [n % 7, n % 7 + 1]).collect(),
        weights: vec![0.5; 2 * n],
    };
    traces.record((&routing, rows));
}

#[test]
fn each_position_of_a_text_is_recorded_once() {
    let mut traces = traces(1000);
    // The cache had a token of the first text; two texts share a step.
    record(&mut traces, &[rows(1, 1, 2, 2), rows(2, 0, 3, 3)]);
    record(&mut traces, &[rows(2, 3, 1, 1), rows(1, 3, 1, 1)]);
    // A draft of two tokens, one of them right.
    record(&mut traces, &[rows(1, 4, 3, 2)]);
    // It gave up its pages, and computes all but the first token again.
    record(&mut traces, &[rows(1, 1, 5, 5)]);
    record(&mut traces, &[rows(1, 6, 1, 1)]);
    traces.end(TextId(1));
    traces.end(TextId(2));
    traces.end(TextId(3));
    let [first, second] = &traces.profile.prompts[..] else {
        panic!("{:?}", traces.profile.prompts);
    };
    assert_eq!((first.prompt_tokens, first.decode_tokens), (3, 3));
    let expected = [0, 1, 1, 2, 1, 2, 0, 1, 1, 2, 0, 1];
    assert_eq!(first.experts, expected);
    assert_eq!(first.weights, vec![128; 12]);
    assert_eq!((second.prompt_tokens, second.decode_tokens), (4, 0));
    assert_eq!(second.experts, [2, 3, 3, 4, 4, 5, 0, 1]);
}

#[test]
fn what_is_held_is_bounded_and_a_sample_of_all_texts() {
    // Room for ten texts of five tokens.
    let mut held_late = 0;
    for seed in 0..200 {
        let mut traces = traces(100);
        traces.random = seed;
        for id in 0..100 {
            record(&mut traces, &[rows(id, 0, 5, 5)]);
            traces.end(TextId(id));
            assert!(traces.n_choices <= 100 && traces.open.is_empty());
        }
        assert_eq!(traces.n_texts(), 10);
        let number = |p: &PromptTrace| p.name["text-".len()..].parse::<u32>().unwrap();
        let late = |p: &&PromptTrace| number(p) > 50;
        held_late += traces.profile.prompts.iter().filter(late).count();
    }
    // Of 2000 draws, each with a chance of a half, within five standard deviations.
    assert!((890..=1110).contains(&held_late), "{held_late}");
}

/// Records a text of five tokens of a real model, and returns its choices.
fn record_text(traces: &mut Traces) -> usize {
    record_text_of(traces, 5)
}

/// Records a text of so many tokens.
fn record_text_of(traces: &mut Traces, n_tokens: usize) -> usize {
    let (n, n_used) = (
        n_tokens * traces.per_token(),
        traces.profile.n_used as usize,
    );
    let experts = (0..n).map(|i| (i % n_used) as u16).collect();
    let weights = vec![0.5; n];
    let rows = [rows(1, 0, n_tokens, n_tokens)];
    traces.record((&Routing { experts, weights }, &rows));
    traces.end(TextId(1));
    n
}

#[test]
fn texts_are_added_to_those_of_the_file() {
    let gguf = tier_plan_runtime::gguf::Gguf::open(&tier_plan_testing::demo_model()).unwrap();
    let spec = tier_plan_runtime::model::describe(&gguf).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("learned.profile");
    let fresh = || Traces::of_nothing(&path, gguf.id(), &spec).unwrap();
    assert!(!fresh().write().unwrap() && !path.exists());
    for n_texts in 1..=3 {
        let mut traces = fresh();
        record_text(&mut traces);
        assert!(traces.write().unwrap());
        let held = Traces::open(&path, gguf.id(), &spec).unwrap();
        assert_eq!(held.n_texts(), n_texts);
        let is_held_out = held.profile.prompts[n_texts - 1].split == Split::HeldOut;
        assert_eq!(is_held_out, n_texts == 2);
    }
    std::fs::write(&path, "damaged").unwrap();
    let mut traces = fresh();
    record_text(&mut traces);
    assert!(traces.write().is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"damaged");
}

#[test]
fn two_writers_of_a_file_lose_nothing() {
    let gguf = tier_plan_runtime::gguf::Gguf::open(&tier_plan_testing::demo_model()).unwrap();
    let spec = tier_plan_runtime::model::describe(&gguf).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("learned.profile");
    let lengths = || {
        let held = Traces::open(&path, gguf.id(), &spec).unwrap();
        let mut lengths: Vec<usize> = held.profile.prompts.iter().map(|p| p.tokens()).collect();
        lengths.sort_unstable();
        lengths
    };
    // A server writes from time to time; runs come and go meanwhile.
    let mut server = Traces::open(&path, gguf.id(), &spec).unwrap();
    let run = |n_tokens| {
        let mut run = Traces::of_nothing(&path, gguf.id(), &spec).unwrap();
        record_text_of(&mut run, n_tokens);
        assert!(run.write().unwrap());
    };
    record_text_of(&mut server, 1);
    run(2);
    assert!(server.write().unwrap());
    run(3);
    record_text_of(&mut server, 4);
    record_text_of(&mut server, 5);
    assert!(server.write().unwrap() && !server.write().unwrap());
    assert_eq!(lengths(), [1, 2, 3, 4, 5]);
    assert_eq!(server.n_texts(), 5);
    let numbers: HashSet<u64> = server.profile.prompts.iter().filter_map(number).collect();
    assert_eq!(numbers.len(), 5);
    // A file that was removed is written with all that is held.
    std::fs::remove_file(&path).unwrap();
    record_text_of(&mut server, 6);
    server.write().unwrap();
    assert_eq!(lengths(), [1, 2, 3, 4, 5, 6]);
    // At the same time.
    let run = &run;
    std::thread::scope(|scope| {
        for writer in 0..4 {
            scope.spawn(move || (0..5).for_each(|i| run(10 + 5 * writer + i)));
        }
    });
    let expected: Vec<usize> = (1..=6).chain(10..30).collect();
    assert_eq!(lengths(), expected);
}

#[test]
fn a_full_sample_takes_texts_of_later_runs() {
    let gguf = tier_plan_runtime::gguf::Gguf::open(&tier_plan_testing::demo_model()).unwrap();
    let spec = tier_plan_runtime::model::describe(&gguf).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("learned.profile");
    for _ in 0..60 {
        let mut traces = Traces::of_nothing(&path, gguf.id(), &spec).unwrap();
        let n = record_text(&mut traces);
        traces.at_most(4 * n).write().unwrap();
    }
    let held = Traces::open(&path, gguf.id(), &spec).unwrap();
    assert_eq!(held.n_texts(), 4);
    // Each of 56 texts has a chance of 4 in the number of those that were taken, or better.
    assert!(held.n_ended > 8, "{}", held.n_ended);
    let numbers: HashSet<u64> = held.profile.prompts.iter().filter_map(number).collect();
    assert_eq!(numbers.len(), 4);
}

#[test]
fn a_long_text_is_recorded_up_to_a_bound() {
    let mut traces = traces(MAX_CHOICES);
    for from in (0..3 * MAX_TEXT_TOKENS).step_by(512) {
        record(&mut traces, &[rows(1, from, 512, 512)]);
    }
    traces.end(TextId(1));
    assert_eq!(traces.profile.prompts[0].tokens(), MAX_TEXT_TOKENS);
}
