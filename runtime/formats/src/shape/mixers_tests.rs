//! Version 3 of model shapes: mixers by layer, and what else differs between layers; mixes of one
//! type.

use super::tests::model;
use super::*;

const MIXED: &str = include_str!("../../../../tests/data/formats/shape.v3.toml");

#[test]
fn version_3_means_what_it_meant() {
    let shape = decode(MIXED.as_bytes(), Path::new("shape.v3.toml")).unwrap();
    let sizes = shape.model_shape(Mix::F16);
    let rows = |width, per_token, queries, window| KvRows {
        width,
        per_token,
        every: 1,
        queries,
        window,
        chosen: None,
    };
    let caches = |at: usize| (sizes.caches[at].rows.clone(), sizes.caches[at].state_bytes);
    // Keys and values of different widths, ascending.
    assert_eq!(
        caches(0),
        (vec![rows(16, 2, 2, None), rows(24, 2, 2, None)], 0)
    );
    assert_eq!(caches(1), (vec![rows(32, 2, 4, Some(8))], 0));
    // A row of 30 that four tokens share.
    let shared = KvRows {
        every: 4,
        ..rows(30, 1, 8, None)
    };
    assert_eq!(caches(2), (vec![rows(32, 1, 4, Some(16)), shared], 4096));
    assert_eq!(
        (caches(0), caches(1), caches(2)),
        (caches(3), caches(4), caches(5))
    );
    let bytes = |kind: DenseKind, layer: u32| {
        let found = sizes
            .dense
            .iter()
            .find(|d| (d.kind, d.layer) == (kind, Some(layer)));
        found.map(|d| d.bytes)
    };
    // A norm of 32-bit floats, then matrices of 16-bit ones.
    let attention = |layer| bytes(DenseKind::Attention, layer);
    let of_layer_0 = 4 * 64 + 2 * 64 * (96 + 48 + 32 + 64);
    assert_eq!(attention(0), Some(of_layer_0));
    assert_eq!(attention(1), Some(4 * 64 + 2 * 64 * (128 + 32 + 128)));
    assert_eq!(attention(2), Some(4 * 64 + 2 * 12_800));
    let router = 4 * 64 + 4 * 64 * 8 + 2 * 2 * 64 * 16;
    assert_eq!(bytes(DenseKind::Router, 3), Some(router));
    assert_eq!(bytes(DenseKind::SharedExpert, 3), Some(2 * 2 * 64 * 48));
    assert_eq!(
        bytes(DenseKind::DenseFfn, 0),
        Some(4 * 64 + 2 * 3 * 64 * 128)
    );
    // Layers 2 and 5 are their mixers alone.
    for kind in [
        DenseKind::Router,
        DenseKind::SharedExpert,
        DenseKind::DenseFfn,
    ] {
        assert_eq!((bytes(kind, 2), bytes(kind, 5)), (None, None));
    }
    let layers: Vec<u32> = sizes.experts.iter().map(|e| e.layer).collect();
    assert_eq!(layers, [1, 3, 4]);
    let expert = sizes.experts[0];
    assert_eq!(
        (expert.expert_bytes, expert.expert_macs),
        (2 * 2 * 16 * 32, 2 * 16 * 32)
    );
    let embedding = sizes.dense[0];
    assert_eq!(
        (embedding.kind, embedding.bytes, embedding.token_bytes),
        (DenseKind::Embedding, 2 * 96 * 64, 2 * 64)
    );
    let table = sizes.dense[1];
    assert_eq!(
        (table.kind, table.bytes, table.token_bytes),
        (DenseKind::TokenTable, 2 * 1000 * 32, 2 * 3 * 32)
    );
    // Tied, there is a table and no embedding.
    let tied = MIXED.replace("vocab = 96", "vocab = 96\ntied = true");
    let tied = decode(tied.as_bytes(), Path::new("t.toml")).unwrap();
    let group = tied.model_shape(Mix::F16).dense[0];
    assert_eq!(
        (group.kind, group.bytes, group.token_bytes),
        (DenseKind::TokenTable, 2 * 1000 * 32, 2 * 3 * 32)
    );
    let (all, without) = (shape.parameters(), MIXED.split("[table]").next().unwrap());
    let without = decode(without.as_bytes(), Path::new("t.toml"))
        .unwrap()
        .parameters();
    assert_eq!(all.total - without.total, 32_000);
    assert_eq!(all.active - without.active, 96);
}

#[test]
fn mixers_by_layer_are_checked() {
    for (from, to, words) in [
        ("version = 3", "version = 2", "is a key of version 3"),
        ("layers = \"2,5\"", "layers = \"2,6\"", "names layer 6"),
        (
            "layers = \"2,5\"",
            "layers = \"2,4\"",
            "layer 4 is in more than one",
        ),
        ("layers = \"2,5\"", "layers = \"5-2\"", "mixers.layers"),
        (
            "layers = \"1,3-4\"",
            "layers = \"0-4\"",
            "experts.layers names layer 0",
        ),
        (
            "layers = \"1,3-4\"",
            "layers = \"\"",
            "no layer to the experts",
        ),
        (
            "parameters = 12800",
            "parameters = 9000000000000",
            "parameters of a mixer",
        ),
        ("every = 4", "every = 0", "rows.every is 0"),
        ("window = 16", "window = 0", "rows.window is 0"),
        (
            "per_token = 1\nevery",
            "per_token = 90000\nevery",
            "rows.width × per_token",
        ),
        ("hidden = 16", "hidden = 0", "experts.hidden is 0"),
        (
            "gated = false",
            "gated = false\nbias = true",
            "experts with a gate",
        ),
        ("read = 3", "read = 1001", "table.read is 1001"),
        (
            "rows = 1000",
            "rows = 9000000000000000000",
            "parameters; at most",
        ),
        ("value = 16", "value = 0", "attention.heads × value"),
        ("state_bytes = 4096", "state_bites = 4096", "state_bites"),
    ] {
        assert!(MIXED.contains(from), "{from}");
        let text = MIXED.replacen(from, to, 1);
        let error = decode(text.as_bytes(), Path::new("m.toml"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{to}: {error}");
    }
    let start = MIXED.find("[attention]").unwrap();
    let end = MIXED.find("[[mixers]]").unwrap();
    let text = format!("{}{}", &MIXED[..start], &MIXED[end..]);
    let error = decode(text.as_bytes(), Path::new("m.toml"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("layer 0 has no mixer"), "{error}");
}

#[test]
fn mixes_of_one_type_have_it_in_all_but_the_vocabulary() {
    use DenseKind::{Attention, Embedding, Head};
    let model = model("kimi-k2");
    let (values, vocabulary) = (3 * 7168 * 2048u64, 163_840 * 7168u64);
    // Bits per 16 values of experts, of the embedding, and of the head.
    for (mix, experts, embedding, head) in [
        (Mix::NVFP4, 72, 136, 136),
        (Mix::Q2_0, 36, 72, 105),
        (Mix::TQ2_0, 33, 72, 105),
        (Mix::TQ1_0, 27, 72, 105),
        (Mix::Q1_0, 18, 18, 105),
    ] {
        let sizes = model.model_shape(mix);
        let of = |kind: DenseKind| sizes.dense.iter().find(|d| d.kind == kind).unwrap().bytes;
        let name = mix.name();
        assert!(
            sizes
                .experts
                .iter()
                .all(|e| e.expert_bytes == values * experts / 128),
            "{name}"
        );
        assert_eq!(of(Embedding), vocabulary * embedding / 128, "{name}");
        assert_eq!(of(Head), 4 * 7168 + vocabulary * head / 128, "{name}");
        let attention = model.model_shape(Mix::F16);
        let attention = attention
            .dense
            .iter()
            .find(|d| d.kind == Attention)
            .unwrap();
        assert!(of(Attention) < attention.bytes * 9 / 16, "{name}");
    }
}

#[test]
fn version_4_says_which_experts_the_token_chooses() {
    let text = include_str!("../../../../tests/data/formats/shape.v4.toml");
    let read = |text: &str| decode(text.as_bytes(), Path::new("shape.v4.toml"));
    let sizes = read(text).unwrap().model_shape(Mix::F16);
    let by_token: Vec<bool> = sizes.experts.iter().map(|e| e.by_token).collect();
    assert_eq!(
        by_token,
        [true, true, false],
        "layers 1, 3 and 4 have experts"
    );
    assert!(sizes.cpu_only.is_empty(), "GPUs run such routers");
    let mixed = decode(MIXED.as_bytes(), Path::new("shape.v3.toml")).unwrap();
    let mixed = mixed.model_shape(Mix::F16);
    assert!(mixed.experts.iter().all(|e| !e.by_token));
    assert_eq!(mixed.dense, sizes.dense);
    for (from, to, said) in [
        (
            "version = 4",
            "version = 3",
            "experts.by_token is a key of version 4",
        ),
        (
            "\"1,3\"",
            "\"2-3\"",
            "experts.by_token names layer 2, which has no routed experts",
        ),
        ("\"1,3\"", "\"x\"", "experts.by_token: "),
    ] {
        let error = read(&text.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
