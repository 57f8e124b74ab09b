//! Tests with the demo model: texts in company have the tokens that they have alone.

use super::*;
use crate::LoadOptions;
use crate::engine::generate::{Limits as Alone, generate};
use crate::model::Model;
use crate::model::kv::{CacheRoom, KvType};
use crate::plans::in_memory::in_memory_with;
use crate::sampler::{Sampler, SamplerConfig};
use crate::tokenizer::TokenizerSource;
use std::ops::ControlFlow;

struct Loaded {
    engine: Engine,
    tokenizer: Tokenizer,
}

fn loaded(sequences: u32, context: u32) -> Loaded {
    let model = Model::open("../profiles/demo/demo.gguf".as_ref()).unwrap();
    let source = TokenizerSource::from_gguf(model.gguf()).unwrap();
    let room = CacheRoom {
        sequences,
        ..CacheRoom::of_one(context)
    };
    let plan = in_memory_with(model.shape(), room, KvType::F16);
    let options = LoadOptions::default();
    let gguf = Arc::clone(model.gguf());
    Loaded {
        engine: Engine::load(gguf, &plan, &options, &mut |_, _| ()).unwrap(),
        tokenizer: Tokenizer::new(source).unwrap(),
    }
}

fn options(tokenizer: &Tokenizer, prompt: &str, max_new: usize) -> TextOptions {
    TextOptions {
        prompt: tokenizer.encode(prompt, true).unwrap(),
        max_new,
        sampling: SamplerConfig::default(),
        stop: Vec::new(),
        ignore_eos: true,
        n_top: None,
        shown: Arc::new([]),
        grammar: None,
    }
}

/// Steps until no text is left, and returns the text of each and how it ended.
fn run(batcher: &mut Batcher<'_>) -> HashMap<TextId, (String, Option<Finish>)> {
    let mut came: HashMap<TextId, (String, Option<Finish>)> = HashMap::new();
    while !batcher.is_empty() {
        batcher
            .step(&mut |id, event| match event {
                Event::Begun { .. } => {}
                Event::Drawn(drawn) => {
                    let entry = came.entry(id).or_default();
                    entry.0 += &drawn.text;
                    entry.1 = drawn.finish;
                }
                Event::Failed(error) => panic!("{error}"),
            })
            .unwrap();
    }
    came
}

#[test]
fn texts_in_company_are_those_alone_and_no_page_is_lost() {
    let Loaded {
        mut engine,
        tokenizer,
    } = loaded(3, 256);
    let same = "In the beginning God created the heaven and the earth. ".repeat(6);
    let prompts = ["a".to_string(), same.clone(), same + "And"];
    let mut alone = Vec::new();
    for prompt in &prompts {
        engine.clear();
        let ids = tokenizer.encode(prompt, true).unwrap();
        let limits = Alone {
            max_tokens: 20,
            is_end: &|_| false,
            draft: 0,
        };
        let mut greedy = Sampler::new(SamplerConfig::default());
        let go_on = |_: &Engine, _| ControlFlow::Continue(());
        let generated = generate(&mut engine, &ids, &mut greedy, &limits, go_on).unwrap();
        alone.push(tokenizer.decode(&generated.tokens));
    }
    engine.clear();
    for max_texts in [1, 3] {
        let batching = Options {
            max_texts,
            ..Options::default()
        };
        let mut batcher = Batcher::new(&mut engine, &tokenizer, batching);
        let asked = prompts.iter().map(|prompt| options(&tokenizer, prompt, 20));
        let ids: Vec<TextId> = asked
            .flat_map(|options| batcher.submit(&Arc::new(options), 1).unwrap())
            .collect();
        let came = run(&mut batcher);
        for (id, alone) in ids.iter().zip(&alone) {
            let (text, finish) = &came[id];
            assert_eq!(text.trim_start(), alone.trim_start(), "{max_texts} texts");
            assert_eq!(*finish, Some(Finish::Length));
        }
        let pages = batcher.pages();
        assert_eq!(pages.free, pages.total, "a page is lost");
    }
}

#[test]
fn a_canceled_text_is_gone_and_its_pages_are_free() {
    let Loaded {
        mut engine,
        tokenizer,
    } = loaded(2, 256);
    let batching = Options {
        max_texts: 2,
        ..Options::default()
    };
    let mut batcher = Batcher::new(&mut engine, &tokenizer, batching);
    let asked = Arc::new(options(&tokenizer, &"word ".repeat(80), 100));
    let ids = batcher.submit(&asked, 3).unwrap();
    assert_eq!((batcher.n_running(), batcher.n_waiting()), (0, 3));
    for _ in 0..4 {
        batcher.step(&mut |_, _| ()).unwrap();
    }
    assert_eq!(batcher.statuses().len(), 3);
    for id in ids {
        batcher.cancel(id);
    }
    assert!(batcher.is_empty() && batcher.statuses().is_empty());
    let pages = batcher.pages();
    assert_eq!(pages.free, pages.total);
    assert_eq!(
        batcher.step(&mut |_, _| panic!("an event")).unwrap(),
        Step::default()
    );
}

#[test]
fn a_text_that_cannot_fit_is_refused() {
    let Loaded {
        mut engine,
        tokenizer,
    } = loaded(1, 128);
    let batching = Options {
        max_texts: 1,
        ..Options::default()
    };
    let mut batcher = Batcher::new(&mut engine, &tokenizer, batching);
    let most = batcher.pages().total * PAGE;
    let asked = Arc::new(options(&tokenizer, "a", most + 1));
    let refused = batcher.submit(&asked, 2);
    assert!(matches!(refused, Err(SubmitError::TooLong { .. })));
    assert!(batcher.is_empty());
}

#[test]
fn a_stop_string_ends_a_text_and_is_named() {
    let Loaded {
        mut engine,
        tokenizer,
    } = loaded(2, 256);
    let batching = Options {
        max_texts: 2,
        ..Options::default()
    };
    let mut batcher = Batcher::new(&mut engine, &tokenizer, batching);
    let free = Arc::new(options(&tokenizer, "In the beginning", 20));
    let id = batcher.submit(&free, 1).unwrap()[0];
    let whole = run(&mut batcher).remove(&id).unwrap().0;
    let stop: String = whole.chars().skip(6).take(3).collect();
    let end = whole.find(&stop).unwrap();
    let stopped = TextOptions {
        stop: vec![stop.clone()],
        n_top: Some(1),
        ..(*free).clone()
    };
    let id = batcher.submit(&Arc::new(stopped), 1).unwrap()[0];
    let mut tokens = 0;
    let (mut text, mut finish) = (String::new(), None);
    while !batcher.is_empty() {
        batcher
            .step(&mut |of, event| {
                assert_eq!(of, id);
                if let Event::Drawn(drawn) = event {
                    text += &drawn.text;
                    assert!(drawn.tokens.iter().all(|t| t.start < text.len()));
                    tokens += drawn.tokens.len();
                    finish = drawn.finish;
                }
            })
            .unwrap();
    }
    assert_eq!(
        (text.as_str(), finish),
        (&whole[..end], Some(Finish::StopString(stop)))
    );
    assert!(tokens > 0);
}

/// A grammar of texts that are one token again and again, and then end.
struct Again {
    token: u32,
    end: u32,
    left: usize,
    n_vocab: usize,
}

impl Guide for Again {
    fn accept(&mut self, token: u32) -> Result<(), String> {
        assert_eq!(token, self.token);
        self.left -= 1;
        Ok(())
    }

    fn mask(&mut self) -> Result<Vec<u32>, String> {
        if self.left == 7 {
            return Err("seven are left".into());
        }
        let token = if self.left == 0 { self.end } else { self.token };
        let mut mask = vec![0; self.n_vocab.div_ceil(32)];
        mask[token as usize / 32] = 1 << (token % 32);
        Ok(mask)
    }
}

#[test]
fn a_grammar_keeps_a_text_and_no_other() {
    let Loaded {
        mut engine,
        tokenizer,
    } = loaded(3, 256);
    let n_vocab = engine.spec().n_vocab;
    let batching = Options {
        max_texts: 3,
        ..Options::default()
    };
    let mut batcher = Batcher::new(&mut engine, &tokenizer, batching);
    let free = Arc::new(options(&tokenizer, "In the beginning", 6));
    let alone = batcher.submit(&free, 1).unwrap()[0];
    let expected = run(&mut batcher).remove(&alone);
    let token = tokenizer.encode("a", false).unwrap()[0];
    let end = tokenizer.eos().unwrap();
    let kept = |left: usize| {
        Arc::new(TextOptions {
            grammar: Some(Grammar::new(move || {
                Box::new(Again {
                    token,
                    end,
                    left,
                    n_vocab,
                })
            })),
            ..options(&tokenizer, "In the beginning", 20)
        })
    };
    let two = batcher.submit(&kept(4), 2).unwrap();
    let other = batcher.submit(&free, 1).unwrap()[0];
    let came = run(&mut batcher);
    for id in two {
        let text = tokenizer.decode(&[token; 4]);
        assert_eq!(came[&id], (text, Some(Finish::EndToken)));
    }
    assert_eq!(Some(&came[&other]), expected.as_ref());
    // One that cannot go on fails alone.
    let bad = batcher.submit(&kept(9), 1).unwrap()[0];
    let mut failed = Vec::new();
    while !batcher.is_empty() {
        let mut see = |id, event| {
            if let Event::Failed(error) = event {
                failed.push((id, error.to_string()));
            }
        };
        batcher.step(&mut see).unwrap();
    }
    let error = "the grammar of the text: seven are left".to_string();
    assert_eq!(failed, [(bad, error)]);
}
