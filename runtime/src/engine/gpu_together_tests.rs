//! Parts that a GPU can run only together: all on an emulated one, none, and some.

use super::gpu_tests::{ALL, Experts, compare, keep_kv_on_host, load, open, plan, refused};
use crate::engine::LogitsMode;
use crate::plans::in_memory::all_in_memory;
use tier_plan_formats::model::gpu::{CpuOnly, Part};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::DenseKind;
use tier_plan_formats::placement::Placement;
use tier_plan_testing::nmse;

#[test]
fn parts_that_share_something_are_on_one_gpu_or_on_none() {
    let (name, of) = ("arch2/gemma4.gguf", (64, KvType::F16));
    // Experts in main memory come between a layer's parts and its inputs of tokens.
    for experts in [Experts::Memory, Experts::File] {
        compare(name, of, |shape| plan(shape, of, ALL, true, experts));
    }
    let (gguf, shape) = open(name);
    let together: Vec<_> = shape.cpu_only.iter().filter(|o| o.is_together()).collect();
    assert!(together.len() > 3, "{together:?}");
    for away in &together {
        let Part::Dense(kind) = away.part else {
            panic!("{away:?}")
        };
        let but_one = |of, layer| (of, layer) != (kind, away.layer);
        let with_cache = kind != DenseKind::Attention;
        let split = plan(&shape, of, but_one, with_cache, Experts::Gpu);
        let error = refused(&gguf, &split, usize::MAX).to_string();
        assert!(error.contains("unless one GPU has all of them"), "{error}");
    }
    // Rows of a batch that a part takes in two goes.
    let of = (600, KvType::F32);
    let long = |plan: &Placement| {
        let mut engine = load(&gguf, plan, 560);
        let n_vocab = engine.spec().n_vocab as u32;
        let tokens: Vec<u32> = (0..540).map(|i| (i * 37 + 5) % n_vocab).collect();
        engine.forward(&tokens, LogitsMode::Last).unwrap().to_vec()
    };
    let found = long(&plan(&shape, of, ALL, true, Experts::Memory));
    let off = nmse(&found, &long(&all_in_memory(&shape, of.0, of.1)));
    assert!(off < 1e-4, "{off:e}");
    let of = (64, KvType::F16);
    // All that is apart from these may be there alone, and these without it.
    let others = |kind, layer| {
        let is = |only: &&CpuOnly| (only.part, only.layer) == (Part::Dense(kind), layer);
        !shape.cpu_only.iter().any(|only| is(&only))
    };
    compare(name, of, |shape| {
        plan(shape, of, others, false, Experts::Gpu)
    });
    // Layers that share nothing may have their caches in main memory, beside those that do.
    compare(name, of, |shape| {
        let mut plan = plan(shape, of, ALL, false, Experts::Memory);
        assert!(keep_kv_on_host(&mut plan, shape, |_| true) > 0);
        plan
    });
    let these = |kind, layer| !others(kind, layer) && kind != DenseKind::TokenTable;
    compare(name, of, |shape| {
        plan(shape, of, these, false, Experts::Gpu)
    });
}
