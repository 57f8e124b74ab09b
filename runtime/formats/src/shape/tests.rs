use super::*;
use crate::model::kv::KvType;
use crate::model::shape_of_file;
use proptest::prelude::*;

fn models() -> Vec<Architecture> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../profiles/models");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort_by_key(|path| path.file_stem().map(std::ffi::OsStr::to_owned));
    paths
        .iter()
        .map(|path| {
            let shape = read(path).unwrap();
            assert_eq!(
                path.file_stem().unwrap().to_str(),
                Some(shape.name.as_str())
            );
            shape
        })
        .collect()
}

pub(super) fn model(name: &str) -> Architecture {
    models().into_iter().find(|m| m.name == name).unwrap()
}

#[test]
fn version_1_means_what_it_meant() {
    let found = decode(
        include_bytes!("../../../../tests/data/formats/shape.v1.toml"),
        Path::new("shape.v1.toml"),
    )
    .unwrap();
    let want = Architecture {
        name: "fixture-mla".into(),
        description: "A network that nobody trained".into(),
        arch: "deepseek2".into(),
        layers: 6,
        hidden: 512,
        vocab: 1000,
        context: 4096,
        tied: true,
        leading_dense: 2,
        dense_ffn: 1024,
        mixers: vec![Mixers {
            layers: (0..6).collect(),
            attention: Attention::Mla {
                heads: 4,
                q_rank: 256,
                kv_rank: 128,
                nope: 64,
                rope: 32,
                value: 64,
            },
        }],
        table: None,
        experts: Some(Experts {
            layers: vec![2, 3, 4, 5],
            count: 16,
            used: 3,
            ffn: 256,
            hidden: 512,
            gated: true,
            shared: 2,
            shared_ffn: 512,
            bias: true,
            router_bias: true,
            selection_bias: true,
            by_token: Vec::new(),
        }),
        source: "made up".into(),
        id: found.id.clone(),
    };
    assert_eq!(found, want);
    // Tied, so there is no embedding of its own; six layers, two of them dense.
    let sizes = found.model_shape(Mix::Q4_K_M);
    assert_eq!(
        (sizes.dense.len(), sizes.experts.len()),
        (6 + 2 + 2 * 4 + 1, 4)
    );
    let head = sizes.dense.last().unwrap();
    assert_eq!(head.bytes, 512 * 4 + 1000 * 512 / 256 * 210);
}

#[test]
fn version_2_means_what_it_meant() {
    let text = include_str!("../../../../tests/data/formats/shape.v2.toml");
    let load =
        |text: &str| decode(text.as_bytes(), Path::new("shape.v2.toml")).map_err(|e| e.to_string());
    let windows = |text: &str| {
        let of = |cache: CacheShape| {
            // Keys and values of two heads each.
            let [rows] = cache.rows[..] else {
                panic!("{cache:?}")
            };
            assert_eq!(
                (rows.width, rows.per_token, rows.queries, cache.state_bytes),
                (16, 4, 2, 0)
            );
            rows.window
        };
        load(text)
            .unwrap()
            .model_shape(Mix::F16)
            .caches
            .into_iter()
            .map(of)
            .collect::<Vec<_>>()
    };
    let near = Some(16);
    // The second and the fourth of five layers look at everything.
    assert_eq!(windows(text), [near, None, near, None, near]);
    assert_eq!(windows(&text.replace("full_every = 2\n", "")), [near; 5]);
    assert_eq!(
        windows(
            &text
                .replace("full_every = 2\n", "")
                .replace("window = 16\n", "")
        ),
        [None; 5]
    );
    for (from, to, words) in [
        (
            "version = 2",
            "version = 1",
            "attention.window is a key of version 2",
        ),
        ("window = 16", "window = 0", "attention.window is 0"),
        (
            "window = 16\n",
            "",
            "attention.full_every is given, but no window",
        ),
    ] {
        let error = load(&text.replace(from, to)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn parameters_of_the_models_that_ship() {
    // Published totals and active parameters, in 1e9 to the digits printed.
    let known = [
        ("deepseek-r1", "671.0", "37.6"),
        ("deepseek-v3", "671.0", "37.6"),
        ("deepseek-v4-flash", "284.3", "13.8"),
        ("deepseek-v4.1-flash", "747.7", "16.0"),
        ("gemma-4-26b-a4b", "25.2", "3.8"),
        ("glm-4.5", "352.8", "33.6"),
        ("glm-4.5-air", "106.9", "13.4"),
        ("glm-4.6", "352.8", "33.6"),
        ("glm-5.2", "743.2", "41.1"),
        ("glm-5.3-flash", "320.9", "17.9"),
        ("gpt-oss-120b", "116.8", "5.7"),
        ("gpt-oss-20b", "20.9", "4.2"),
        ("hy3", "295.0", "20.7"),
        ("kimi-k2", "1026.4", "32.9"),
        ("kimi-k2.5", "1026.4", "32.9"),
        ("kimi-k3", "2767.2", "93.1"),
        ("ling-1t", "999.7", "51.1"),
        ("ling-flash-2.0", "102.9", "6.2"),
        ("llama-3.1-405b", "405.9", "405.9"),
        ("mimo-v2-flash", "308.8", "15.4"),
        ("minimax-m2", "228.7", "11.0"),
        ("minimax-m3", "426.0", "25.7"),
        ("mixtral-8x22b", "140.6", "39.2"),
        ("mixtral-8x7b", "46.7", "12.9"),
        ("moe-10t", "10169", "64"),
        ("nemotron-3-nano-30b", "31.6", "3.6"),
        ("nemotron-3-super-120b", "120.7", "12.8"),
        ("qwen3-235b-a22b", "235.1", "22.2"),
        ("qwen3-30b-a3b", "30.5", "3.35"),
        ("qwen3.8-flash-next", "175.9", "6.3"),
        ("step-3.5-flash", "196.9", "12.0"),
    ];
    let models = models();
    assert_eq!(
        models.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(),
        known.map(|k| k.0)
    );
    for (model, (name, total, active)) in models.iter().zip(known) {
        let p = model.parameters();
        let shown = |n: u64, like: &str| {
            let digits = like.split_once('.').map_or(0, |(_, d)| d.len());
            format!("{:.digits$}", n as f64 / 1e9)
        };
        assert_eq!(
            (
                shown(p.total, total).as_str(),
                shown(p.active, active).as_str()
            ),
            (total, active),
            "{name}"
        );
    }
    // The routed experts of Kimi K2.5, and all that is none of them.
    let k2 = model("kimi-k2.5");
    let routed = 3 * 7168 * 2048;
    assert_eq!(u64::from(k2.moe_layers()) * 384, 23_040);
    assert_eq!(routed, 44_040_192);
    let rest = k2.parameters().total - 23_040 * routed;
    assert!((11.65e9..11.75e9).contains(&(rest as f64)), "{rest}");
}

/// A shape of the golden models, whose dimensions are small and whose files hold 16-bit matrices.
fn golden(arch: &str, lines: &str, tables: &str) -> Architecture {
    let text = format!(
        "format = \"tier-plan shape\"\nversion = 2\nname = \"golden\"\narch = \"{arch}\"\nlayers = 3\nhidden = 64\n\
         vocab = 96\ncontext = 256\nsource = \"test\"\n{lines}\n{tables}"
    );
    decode(text.as_bytes(), Path::new("golden.toml")).unwrap()
}

#[test]
fn shapes_are_those_of_the_files_they_describe() {
    let mla = "[attention]\nkind = \"mla\"\nheads = 4\nq_rank = 96\nkv_rank = 64\nnope = 48\nrope = 32\nvalue = 48\n";
    let gqa = |more: &str| {
        format!("[attention]\nkind = \"gqa\"\nheads = 4\nkv_heads = 2\nhead = 16\n{more}\n")
    };
    let experts = |used: u32, ffn: u32, more: &str| {
        format!("[experts]\ncount = 8\nused = {used}\nffn = {ffn}\n{more}\n")
    };
    let dense = "leading_dense = 1\ndense_ffn = 64";
    let shared = experts(3, 32, "shared = 1\nselection_bias = true");
    let cases = [
        ("deepseek-v3", "deepseek2", dense, format!("{mla}{shared}")),
        ("kimi-k2", "deepseek2", dense, format!("{mla}{shared}")),
        (
            "glm4moe",
            "glm4moe",
            dense,
            gqa("bias = true\nnorms = \"head\"") + &shared,
        ),
        (
            "gpt-oss",
            "gpt-oss",
            "",
            gqa("bias = true\noutput_bias = true\nsinks = true\nwindow = 16\nfull_every = 2")
                + &experts(3, 32, "bias = true\nrouter_bias = true"),
        ),
        (
            "minimax-m2",
            "minimax-m2",
            "",
            gqa("norms = \"full\"") + &experts(3, 64, "selection_bias = true"),
        ),
        ("mixtral", "llama", "", gqa("") + &experts(2, 64, "")),
        (
            "llama-dense",
            "llama",
            "leading_dense = 3\ndense_ffn = 64",
            gqa(""),
        ),
        (
            "qwen3-dense",
            "qwen3",
            "tied = true\nleading_dense = 3\ndense_ffn = 64",
            gqa("norms = \"head\"").replace("head = 16", "head = 8"),
        ),
    ];
    for (file, arch, lines, tables) in cases {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../../tests/data/arch/{file}.gguf"));
        let want = shape_of_file(&path).unwrap();
        let found = golden(arch, lines, &tables).model_shape(Mix::F16);
        assert_eq!(
            ModelShape {
                id: want.id.clone(),
                ..found
            },
            want,
            "{file}"
        );
    }
}

/// An architecture whose attention chooses among its keys and values has them with it, whether or not
/// a shape says how many it chooses. What a token reads stays what the shape says.
#[test]
fn keys_that_an_index_chooses_among_stay_with_their_attention() {
    let apart = |name: &str| {
        let sizes = model(name).model_shape(Mix::Q4_K_M);
        let caches = sizes.caches.iter();
        caches.filter(|c| c.can_be_apart()).count()
    };
    assert_eq!(["minimax-m3", "qwen3.8-flash-next"].map(apart), [0, 0]);
    assert_eq!(["minimax-m2", "gpt-oss-20b"].map(apart), [62, 24]);
    let sizes = model("minimax-m3").model_shape(Mix::Q4_K_M);
    let rows = &sizes.caches[0].rows[0];
    assert_eq!(rows.read(1 << 20, 1), rows.per_token << 20);
}

#[test]
fn known_sizes_of_published_files() {
    // Bytes of files as published, tokenizer and header included; a mix may differ a little by its
    // maker's hand.
    let cases = [
        ("mixtral-8x7b", Mix::Q4_K_M, 28.45e9),
        ("mixtral-8x7b", Mix::Q2_K, 17.3e9),
        ("qwen3-30b-a3b", Mix::Q4_K_M, 18.56e9),
        ("qwen3-30b-a3b", Mix::Q8_0, 32.48e9),
        ("gpt-oss-20b", Mix::MXFP4, 12.11e9),
        ("gpt-oss-120b", Mix::MXFP4, 63.39e9),
        ("deepseek-r1", Mix::Q4_K_M, 404.4e9),
        ("deepseek-r1", Mix::Q8_0, 713.3e9),
        ("kimi-k2", Mix::Q4_K_M, 620e9),
        ("llama-3.1-405b", Mix::F16, 811.7e9),
    ];
    for (name, mix, published) in cases {
        let bytes = model(name).model_shape(mix).weight_bytes() as f64;
        assert!(
            (bytes / published - 1.0).abs() < 0.015,
            "{name} {}: {:.2} GB",
            mix.name(),
            bytes / 1e9
        );
    }
}

#[test]
fn mixes_have_names_and_fall_in_size() {
    for mix in Mix::ALL {
        assert_eq!(Mix::from_name(&mix.name().to_uppercase()), Some(mix));
    }
    assert_eq!(Mix::from_name("q4"), None);
    for model in models() {
        // A dense model has no experts for MXFP4 to be about. The mixes that have one type nearly
        // everywhere are as large as that.
        let is_graded = |mix: &&Mix| match mix {
            Mix::NVFP4 | Mix::Q2_0 | Mix::TQ2_0 | Mix::TQ1_0 | Mix::Q1_0 => false,
            Mix::MXFP4 => model.experts.is_some(),
            _ => true,
        };
        let bytes: Vec<u64> = Mix::ALL
            .iter()
            .filter(is_graded)
            .map(|mix| model.model_shape(*mix).weight_bytes())
            .collect();
        // Rows of some are no whole number of large blocks, so that their small mixes are alike, and
        // a table counts as an embedding, whose types differ less.
        let widths = |e: &Experts| [e.ffn, e.hidden].iter().all(|w| w.is_multiple_of(256));
        let is_whole =
            model.hidden.is_multiple_of(256) && model.experts.as_ref().is_none_or(widths);
        if is_whole && model.table.is_none() {
            assert!(
                bytes[1..].windows(2).all(|w| w[0] > w[1]),
                "{}: {bytes:?}",
                model.name
            );
        }
        let ids: std::collections::HashSet<String> = Mix::ALL
            .iter()
            .map(|mix| model.model_shape(*mix).id.hash)
            .collect();
        assert_eq!(ids.len(), Mix::ALL.len());
    }
}

#[test]
fn a_layer_of_kimi_k2_by_hand() {
    let shape = model("kimi-k2").model_shape(Mix::Q4_K_M);
    // 144 bytes for 256 values of Q4_K, 210 of Q6_K: the last layer is one of those with more bits.
    let (q4, q6) = (2048 * 7168 / 256 * 144, 2048 * 7168 / 256 * 210);
    assert_eq!(shape.experts.last().unwrap().expert_bytes, 2 * q4 + q6);
    assert_eq!(
        shape
            .experts
            .iter()
            .find(|e| e.layer == 7)
            .unwrap()
            .expert_bytes,
        3 * q4
    );
    assert_eq!(KvType::F16.token_bytes(&shape), 61 * 576 * 2);
    let embedding = shape.dense[0];
    assert_eq!(
        (embedding.kind, embedding.token_bytes),
        (DenseKind::Embedding, 7168 / 256 * 144)
    );
    assert_eq!(embedding.bytes, 163_840 * embedding.token_bytes);
    assert!(shape.id.name.contains("without weights"));
}

const KIMI: &str = include_str!("../../../../profiles/models/kimi-k2.toml");

fn refused(from: &str, to: &str) -> String {
    assert!(KIMI.contains(from), "{from}");
    decode(KIMI.replacen(from, to, 1).as_bytes(), Path::new("k.toml"))
        .unwrap_err()
        .to_string()
}

#[test]
fn errors_say_what_and_how_to_mend() {
    for (from, to, words) in [
        (
            "version = 1",
            "version = 5",
            "model shape version 5, but this program reads up to version 4",
        ),
        (
            "tier-plan shape",
            "tier-plan machine",
            "not a model shape: its format is \"tier-plan machine\"",
        ),
        ("hidden = 7168", "hiden = 7168", "unknown field `hiden`"),
        (
            "layers = 61",
            "layers = 0",
            "layers is 0, but must be 1 to 4096",
        ),
        (
            "hidden = 7168",
            "hidden = 9999999",
            "hidden is 9999999, but must be 1 to 1048576",
        ),
        ("context = 131072", "context = 0", "context is 0"),
        (
            "leading_dense = 1",
            "leading_dense = 62",
            "leading_dense is 62, but there are 61 layers",
        ),
        (
            "leading_dense = 1",
            "leading_dense = 61",
            "leaves no layer to the experts",
        ),
        ("leading_dense = 1\n", "", "no layer would have it"),
        ("dense_ffn = 18432\n", "", "dense_ffn is 0"),
        (
            "heads = 64",
            "heads = 60000",
            "attention.heads × (nope + rope) come to 11520000",
        ),
        ("kv_rank = 512", "kv_rank = 0", "attention.kv_rank is 0"),
        ("kind = \"mla\"", "kind = \"gqa\"", "line"),
        ("count = 384", "count = 0", "experts.count is 0"),
        (
            "used = 8",
            "used = 385",
            "experts.used is 385, but must be 1 to 384",
        ),
        (
            "shared = 1",
            "shared = 4000000",
            "experts.shared × ffn come to",
        ),
        ("count = 384", "count = 65535", "parameters; at most"),
        ("name = \"kimi-k2\"", "name = \"\"", "name must be"),
    ] {
        let error = refused(from, to);
        assert!(error.contains(words), "{to}: {error}");
    }
    let gguf = decode(b"GGUF\x03\0\0\0", Path::new("m.gguf"))
        .unwrap_err()
        .to_string();
    assert!(
        gguf.contains("it is a GGUF model; profiles/models holds examples"),
        "{gguf}"
    );
}

proptest! {
    #[test]
    fn any_shape_is_refused_or_adds_up(
        numbers in proptest::collection::vec(prop_oneof![0u32..70, any::<u32>(), Just(1 << 20)], 12),
        mla in any::<bool>(),
    ) {
        let [l, d, h, v, df, a, b, c, e, u, f, s] = numbers[..] else { unreachable!() };
        let attention = if mla {
            format!("[attention]\nkind = \"mla\"\nheads = {a}\nkv_rank = {b}\nnope = {c}\nrope = {c}\nvalue = {b}\n")
        } else {
            format!("[attention]\nkind = \"gqa\"\nheads = {a}\nkv_heads = {b}\nhead = {c}\n")
        };
        let text = format!(
            "format = \"tier-plan shape\"\nversion = 1\nname = \"x\"\narch = \"x\"\nlayers = {l}\nhidden = {h}\nvocab = {v}\n\
             context = 1\nleading_dense = {d}\ndense_ffn = {df}\nsource = \"\"\n{attention}[experts]\ncount = {e}\n\
             used = {u}\nffn = {f}\nshared = {s}\n"
        );
        if let Ok(shape) = decode(text.as_bytes(), Path::new("x.toml")) {
            let p = shape.parameters();
            prop_assert!(p.active <= p.total);
            let sizes = shape.model_shape(Mix::BF16);
            // Two bytes a parameter, and two more for each that is never quantized.
            let bytes = sizes.weight_bytes();
            prop_assert!(bytes >= 2 * p.total && bytes <= 4 * p.total, "{bytes} {p:?}");
            prop_assert!(sizes.token_bytes() <= bytes);
        }
    }
}
