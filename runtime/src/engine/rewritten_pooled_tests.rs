//! Indexers with pooled keys: other blocks and selections than those of the fixture, cut and rewound
//! texts, what is optional, and what is counted.

use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use crate::{Engine, LogitsMode};
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{ArrayValue, Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::{KvRows, KvType};
use tier_plan_formats::model::shape::shape_of;
use tier_plan_formats::model::spec::{Mixer, Reach, Selection};
use tier_plan_testing::data;

const ARCH: &str = "glm5-next";

fn fixture() -> Writer {
    Writer::from_gguf(&Gguf::open(&data("arch2/glm5-next.gguf")).unwrap())
}

/// The fixture with another value of a key.
fn with(key: &str, value: Value) -> Writer {
    let mut file = fixture();
    file.set(&format!("{ARCH}.{key}"), value);
    file
}

/// The fixture with other blocks and another selection.
fn selecting(block: u32, top_k: u32, tail: bool) -> Writer {
    let mut file = with("attention.indexer.kpool", Value::U32(block));
    file.set(
        &format!("{ARCH}.attention.indexer.top_k"),
        Value::U32(top_k),
    );
    let key = format!("{ARCH}.attention.indexer.kpool_select_tail");
    file.set(&key, Value::Bool(tail));
    let name = "blk.1.indexer_compressor_ape.weight";
    let ape = file.tensors.iter_mut().find(|t| t.name == name).unwrap();
    let (row, old) = (ape.dims[0] as usize * 4, ape.data.clone());
    ape.data = old.into_iter().cycle().take(row * block as usize).collect();
    ape.dims[1] = block.into();
    file
}

fn open(writer: &Writer) -> (tempfile::NamedTempFile, Arc<Gguf>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.finish()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    (file, Arc::new(gguf))
}

fn engine(writer: &Writer, checkpoints: u32, batch: usize) -> Engine {
    let (_file, gguf) = open(writer);
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let mut plan = all_in_memory(&shape, 40, KvType::F32);
    plan.checkpoints = checkpoints;
    plan.fill_sums(&shape);
    for tier in &mut plan.tiers {
        tier.budget_bytes = tier.used_bytes();
    }
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(batch),
        ..LoadOptions::default()
    };
    Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap()
}

fn tokens() -> Vec<u32> {
    (0..37).map(|i| i * i * 7 % 90 + 1).collect()
}

/// Logits of all tokens, in batches of this size.
fn logits(writer: &Writer, batch: usize) -> Vec<f32> {
    let mut engine = engine(writer, 0, batch);
    let mut all = Vec::new();
    for part in tokens().chunks(batch) {
        all.extend_from_slice(engine.forward(part, LogitsMode::All).unwrap());
    }
    all
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn any_block_and_selection_gives_the_same_bits_in_any_batches() {
    let mut seen = Vec::new();
    for (block, top_k, tail) in [
        (1, 5, true),
        (2, 7, true),
        (3, 10, true),
        (3, 10, false),
        (4, 14, false),
        (7, 7, true),
        (11, 25, false),
    ] {
        let file = selecting(block, top_k, tail);
        let expected = logits(&file, 40);
        assert!(
            expected.iter().all(|x| x.is_finite()),
            "{block} {top_k} {tail}"
        );
        for batch in [1, 5, 16] {
            let same = bits(&logits(&file, batch)) == bits(&expected);
            assert!(same, "{block} {top_k} {tail}, batches of {batch}");
        }
        assert!(!seen.contains(&bits(&expected)), "{block} {top_k} {tail}");
        seen.push(bits(&expected));
    }
}

#[test]
fn a_selection_of_all_blocks_is_attention_to_all_positions() {
    // 36 tokens have nine complete blocks; 12 positions are three of four, and so are 15.
    let all = logits(&selecting(4, 1 << 20, true), 40);
    assert!(logits(&selecting(4, 36, true), 40) == all);
    assert!(logits(&selecting(4, 39, true), 40) == all);
    assert!(logits(&selecting(4, 32, true), 40) != all);
    // Nothing but the own block's tail is left out, which ends with the block.
    assert!(logits(&selecting(1, 37, false), 40) == all);
    let plain = logits(&fixture(), 40);
    assert!(plain == logits(&selecting(4, 15, true), 40) && plain != all);
    assert!(plain != logits(&selecting(4, 11, true), 40));
}

#[test]
fn a_text_goes_back_into_the_middle_of_a_block() {
    for (block, top_k) in [(4, 12), (3, 7), (13, 13)] {
        let file = selecting(block, top_k, true);
        let expected = logits(&file, 40);
        let (text, n_vocab) = (tokens(), expected.len() / tokens().len());
        let mut engine = engine(&file, 5, 16);
        engine.forward(&text[..34], LogitsMode::Last).unwrap();
        for wanted in [33, 21, 9] {
            let left = engine.rewind(wanted);
            assert!(left <= wanted);
            // Another ending, which must leave nothing behind.
            engine.forward(&[7, 5, 3, 2], LogitsMode::Last).unwrap();
            let left = engine.rewind(left);
            let found = engine.forward(&text[left..], LogitsMode::All).unwrap();
            let expected = &expected[left * n_vocab..];
            assert!(
                bits(found) == bits(expected),
                "{block} {top_k}, back to {left}"
            );
        }
    }
}

fn reach(writer: &Writer, layer: usize) -> Reach {
    let (_file, gguf) = open(writer);
    match &describe(&gguf).unwrap().layers[layer].mixer {
        Mixer::Mla(mla) => mla.reach.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn defaults_are_those_of_the_reference() {
    let plain = logits(&fixture(), 40);
    let without = |key: &str| {
        let mut file = fixture();
        file.unset(&format!("{ARCH}.{key}"));
        file
    };
    // The tail, gating by sigmoids, and the epsilon of keys, which is 0.
    assert!(logits(&without("attention.indexer.kpool_select_tail"), 40) == plain);
    let sigmoid = with("expert_gating_func", Value::U32(2));
    assert!(logits(&sigmoid, 40) == plain);
    let eps = "attention.layer_norm_epsilon";
    let zero = logits(&with(eps, Value::F32(0.0)), 40);
    assert!(logits(&without(eps), 40) == zero);
    // Limits of shared experts and dense blocks are those of the routed ones.
    let exp = [1.0, 1.25, 1.5, 1.0].to_vec();
    let same = with("swiglu_clamp_shexp", Value::Array(ArrayValue::F32(exp)));
    let absent = logits(&without("swiglu_clamp_shexp"), 40);
    assert!(absent == logits(&same, 40) && absent != plain);
    // Decays without a bound.
    assert!(logits(&without("kda.gate_lower_bound"), 40) != plain);
    // Without the list, every layer of latent attention has an indexer.
    let mut own = without("attention.indexer.types");
    let of_layer_1 = own.tensors.iter().filter(|t| t.name.contains(".indexer"));
    let copies: Vec<_> = of_layer_1
        .map(|t| (t.name.replace("blk.1.", "blk.3."), t.clone()))
        .collect();
    for (name, mut tensor) in copies {
        tensor.name = name;
        own.tensors.push(tensor);
    }
    assert!(matches!(reach(&own, 3), Reach::Indexed(_)));
    let twelve = Selection {
        blocks: 3,
        block: 4,
        tail: true,
    };
    assert!(matches!(reach(&fixture(), 3), Reach::Reused(chosen) if chosen == twelve));
}

#[test]
fn blocks_have_one_key_and_open_ones_are_state() {
    let caches = |writer: &Writer| {
        let (_file, gguf) = open(writer);
        shape_of(&gguf, &describe(&gguf).unwrap()).caches
    };
    for (block, top_k, tail, chosen) in [(4, 12, true, 15), (3, 10, false, 9)] {
        let found = caches(&selecting(block, top_k, tail));
        let latents = KvRows {
            width: 32,
            per_token: 1,
            every: 1,
            queries: 2 * 4,
            window: None,
            chosen: Some(chosen),
        };
        let keys = KvRows {
            every: block.into(),
            queries: 8,
            chosen: None,
            ..latents
        };
        let mut rows = vec![latents, keys];
        rows.sort_unstable();
        let mut of_layer = found[1].rows.clone();
        of_layer.sort_unstable();
        assert_eq!(of_layer, rows);
        assert_eq!(found[1].state_bytes, u64::from(4 * 2 * 32 * block));
        // The layer that shares the choice has latents alone.
        assert_eq!(
            (&found[3].rows[..], found[3].state_bytes),
            (&[latents][..], 0)
        );
    }
    // Vectors of tokens are no rows: their window is state, with the rows of open blocks.
    let deepseek4 = Gguf::open(&data("arch2/deepseek4.gguf")).unwrap();
    let spec = describe(&deepseek4).unwrap();
    let caches = shape_of(&deepseek4, &spec).caches;
    for (cache, layer) in caches.iter().zip(&spec.layers) {
        let Mixer::Compressed(attention) = &layer.mixer else {
            panic!("{:?}", layer.mixer);
        };
        let open: usize = attention
            .compressors()
            .map(|c| c.past() * 2 * c.kv.n_out)
            .sum();
        let window = attention.window * attention.key_dim;
        assert_eq!(cache.state_bytes, 4 * (window + open) as u64);
        let every: Vec<u64> = cache.rows.iter().map(|rows| rows.every).collect();
        let expected: &[u64] = match &attention.far {
            None => &[],
            Some(far) if far.index.is_some() => &[4, 4],
            Some(_) => &[128],
        };
        assert_eq!(every, expected);
    }
}

#[test]
fn a_text_may_begin_with_latent_attention() {
    // Layers 1 and 3 alone: no delta attention is left.
    let mut file = fixture();
    file.tensors
        .retain(|t| !t.name.starts_with("blk.0.") && !t.name.starts_with("blk.2."));
    for tensor in &mut file.tensors {
        tensor.name = tensor
            .name
            .replace("blk.1.", "blk.0.")
            .replace("blk.3.", "blk.1.");
    }
    let set =
        |file: &mut Writer, key: &str, value: Value| file.set(&format!("{ARCH}.{key}"), value);
    set(&mut file, "block_count", Value::U32(2));
    set(&mut file, "leading_dense_block_count", Value::U32(0));
    let list = ArrayValue::U32(vec![1, 1]);
    set(&mut file, "attention.head_count_kv", Value::Array(list));
    let list = ArrayValue::Bool(vec![true, false]);
    set(&mut file, "attention.indexer.types", Value::Array(list));
    let expected = logits(&file, 40);
    assert!(expected.iter().all(|x| x.is_finite()));
    assert!(bits(&logits(&file, 3)) == bits(&expected));
    // The open block is a state all the same.
    let mut engine = engine(&file, 3, 16);
    let text = tokens();
    engine.forward(&text[..30], LogitsMode::Last).unwrap();
    let left = engine.rewind(29);
    let found = engine.forward(&text[left..], LogitsMode::All).unwrap();
    let n_vocab = expected.len() / text.len();
    assert!(bits(found) == bits(&expected[left * n_vocab..]));
}
