//! Texts that fail in a step alone, beside others that go on as if they were not there.

use super::{Engine, LogitsMode, Rows, SequenceId};
use crate::error::RunError;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use tempfile::TempDir;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::model::Model;
use tier_plan_formats::model::kv::KvType;
use tier_plan_testing::data;

const CONTEXT: u32 = 80;

/// The token whose embedding is not a number.
const BAD: u32 = 7;

/// A model of the tests in which the embedding of [`BAD`] is not a number, with room for four texts.
fn engine(name: &str) -> (Engine, TempDir) {
    let gguf = Gguf::open(&data(&format!("arch/{name}.gguf"))).unwrap();
    let mut model = Writer::from_gguf(&gguf);
    let embedding = gguf.tensor("token_embd.weight").unwrap();
    let row = (embedding.n_bytes / embedding.dims[1]) as usize;
    let mut tensors = model.tensors.iter_mut();
    let tensor = tensors.find(|t| t.name == "token_embd.weight").unwrap();
    tensor.data[BAD as usize * row..][..row].fill(0xff);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    std::fs::write(&path, model.finish()).unwrap();
    let model = Model::open(&path).unwrap();
    let mut plan = all_in_memory(model.shape(), CONTEXT, KvType::F16);
    plan.sequences = 4;
    plan.fill_sums(model.shape());
    for tier in &mut plan.tiers {
        tier.budget_bytes = tier.used_bytes();
    }
    let options = LoadOptions::default();
    let load = Engine::load(Arc::clone(model.gguf()), &plan, &options, &mut |_, _| ());
    (load.unwrap(), folder)
}

fn rows(sequence: SequenceId, tokens: &[u32], logits: LogitsMode) -> Rows<'_> {
    Rows {
        sequence,
        tokens,
        logits: Some(logits),
    }
}

#[test]
fn texts_fail_alone_and_the_others_have_the_same_bits() {
    // With keys and values alone, and with recurrent states.
    for name in ["qwen3moe", "qwen3next"] {
        let (mut engine, _folder) = engine(name);
        let ids: Vec<SequenceId> = (0..3).map(|_| engine.add_sequence().unwrap()).collect();
        let (one, two) = ([3, 4, 5], [9, 8]);
        let first = |engine: &mut Engine| {
            let id = engine.add_sequence().unwrap();
            let logits = engine
                .step(&[rows(id, &one, LogitsMode::All)])
                .unwrap()
                .to_vec();
            engine.remove_sequence(id);
            logits
        };
        let alone = first(&mut engine);
        let gone = engine.add_sequence().unwrap();
        engine.remove_sequence(gone);
        let long = vec![1; CONTEXT as usize + 1];
        let step = [
            rows(ids[0], &one, LogitsMode::All),
            rows(gone, &two, LogitsMode::Last),
            rows(ids[1], &[5, BAD, 6], LogitsMode::All),
            rows(ids[0], &two, LogitsMode::Last),
            rows(ids[2], &[2, u32::MAX], LogitsMode::Last),
            rows(ids[2], &long, LogitsMode::Last),
            rows(ids[2], &two, LogitsMode::Last),
        ];
        let found = engine.step_apart(&step).unwrap();
        let n_vocab = alone.len() / 3;
        assert_eq!(found[0].as_deref().unwrap(), alone, "{name}");
        assert!(matches!(found[1], Err(RunError::NoText)));
        // Its first token is a number, the second is not.
        assert!(
            matches!(found[2], Err(RunError::NotANumber { position: 1 })),
            "{name}"
        );
        assert!(matches!(found[3], Err(RunError::TwiceInStep)));
        assert!(matches!(
            found[4],
            Err(RunError::Token {
                token: u32::MAX,
                ..
            })
        ));
        assert!(matches!(found[5], Err(RunError::ContextFull { .. })));
        assert_eq!(found[6].as_ref().unwrap().len(), n_vocab);
        let past: Vec<usize> = ids.iter().map(|id| engine.n_past_of(*id)).collect();
        assert_eq!(past, [3, 0, 2], "{name}");
        // The others go on. The one that failed can be removed, and all pages are free then.
        let goes_on = [
            rows(ids[0], &two, LogitsMode::Last),
            rows(ids[2], &one, LogitsMode::Last),
        ];
        assert!(
            engine
                .step_apart(&goes_on)
                .unwrap()
                .iter()
                .all(Result::is_ok)
        );
        ids.iter().for_each(|id| engine.remove_sequence(*id));
        let pages = engine.pages();
        assert_eq!(pages.free, pages.total);
        assert!(engine.step_apart(&[]).unwrap().is_empty());
        // The plain step fails as a whole.
        let id = engine.add_sequence().unwrap();
        let failed = engine.step(&[rows(id, &[BAD], LogitsMode::Last)]);
        assert!(matches!(failed, Err(RunError::NotANumber { position: 0 })));
    }
}
