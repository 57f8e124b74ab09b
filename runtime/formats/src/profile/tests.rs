use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

/// Written by `make_profile.py` beside it, which knows only the description of the format.
const V1: &[u8] = include_bytes!("../../../../tests/data/formats/profile.v1.profile");

fn load(bytes: &[u8]) -> Result<Profile, String> {
    decode(bytes, Path::new("m.profile")).map_err(|e| e.to_string())
}

/// The rule of `make_profile.py`.
fn fixture_prompt(
    p: usize,
    domain: &str,
    name: &str,
    split: Split,
    prompt_tokens: u32,
    decode_tokens: u32,
) -> PromptTrace {
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for token in 0..(prompt_tokens + decode_tokens) as usize {
        for layer in 0..3 {
            for rank in 0..3 {
                experts.push(((7 * p + 5 * token + 11 * layer + 13 * rank) % 40) as u16);
                weights.push((255 - 60 * rank - token) as u8);
            }
        }
    }
    PromptTrace {
        domain: domain.into(),
        name: name.into(),
        split,
        prompt_tokens,
        decode_tokens,
        experts,
        weights,
    }
}

fn fixture() -> Profile {
    Profile {
        model: SourceId {
            name: "fixture".into(),
            hash: "000102030405060708090a0b0c0d0e0f".into(),
        },
        layers: vec![1, 2, 5],
        n_expert: 40,
        n_used: 3,
        made: "by hand, à la main".into(),
        prompts: vec![
            fixture_prompt(0, "code", "a.txt", Split::Train, 3, 2),
            fixture_prompt(1, "scripture", "heldout-1.txt", Split::HeldOut, 2, 0),
            fixture_prompt(2, "code", "empty", Split::Train, 0, 0),
        ],
        counted: None,
        guesses: None,
        id: SourceId {
            name: "fixture".into(),
            hash: "f395ca134f02aa55f50df4c73c532b78".into(),
        },
    }
}

#[test]
fn version_1_means_what_it_meant() {
    assert_eq!(load(V1).unwrap(), fixture());
}

/// Written by `make_profile.py` too.
const V3: &[u8] = include_bytes!("../../../../tests/data/formats/profile.v3.profile");

#[test]
fn version_3_means_what_it_meant() {
    let guesses = vec![
        Guesses { made: 0, right: 0 },
        Guesses { made: 6, right: 5 },
        Guesses { made: 6, right: 3 },
    ];
    let found = load(V3).unwrap();
    let want = Profile {
        guesses: Some(guesses.clone()),
        id: found.id.clone(),
        ..fixture()
    };
    assert_eq!(found, want);
    assert_eq!(load(&want.encode()).unwrap(), want);
    let refused = |guesses: &[Guesses], words: &str| {
        let bad = Profile {
            guesses: Some(guesses.to_vec()),
            ..fixture()
        };
        let unread = load(&bad.encode()).unwrap_err();
        assert!(unread.contains(words), "{words}: {unread}");
        let folder = tempfile::tempdir().unwrap();
        let unwritten = bad.write(&folder.path().join("p")).unwrap_err().to_string();
        assert!(unwritten.contains(words), "{words}: {unwritten}");
    };
    refused(&guesses[..2], "guesses of 2 layers, but there are 3");
    refused(
        &[guesses[0], guesses[1], Guesses { made: 1, right: 2 }],
        "layer 5 has 2 right guesses of 1",
    );
    let mut old = V3.to_vec();
    old[8] = 2;
    let body = old.len() - 8;
    let sum = xxh3_64(&old[..body]).to_le_bytes();
    old[body..].copy_from_slice(&sum);
    assert!(
        load(&old)
            .unwrap_err()
            .contains("unknown field `guesses` in version 2")
    );
}

/// Written by `make_profile.py` too.
const V2: &[u8] = include_bytes!("../../../../tests/data/formats/profile.v2.profile");

#[test]
fn version_2_means_what_it_meant() {
    let counts = |layer: u64| {
        (0..40)
            .map(|expert| 1000 * (layer + 1) + expert * expert)
            .collect::<Vec<u64>>()
    };
    let found = load(V2).unwrap();
    let want = Profile {
        model: SourceId {
            name: "fixture".into(),
            hash: String::new(),
        },
        prompts: Vec::new(),
        counted: Some((0..3).map(counts).collect()),
        made: "counted by hand".into(),
        id: found.id.clone(),
        ..fixture()
    };
    assert_eq!(found, want);
    assert_eq!(
        found.id.name,
        "fixture, marginal counts of prompt processing"
    );
    assert_eq!(found.clone().identified().id, found.id);
    assert_eq!(load(&want.encode()).unwrap().counted, want.counted);
    // Counts are of prompt tokens, all in all.
    assert_eq!(want.counts(None, None, None)[2][3], 3009);
    assert_eq!(
        want.counts(Some(Phase::Prompt), Some(Split::Train), None)[0][0],
        1000
    );
    assert!(
        want.counts(Some(Phase::Decode), None, None)
            .iter()
            .flatten()
            .all(|c| *c == 0)
    );
    assert!(
        want.counts(None, Some(Split::HeldOut), None)
            .iter()
            .flatten()
            .all(|c| *c == 0)
    );
    // They hold for every file of a model, traces only for their own.
    let other = SourceId {
        name: "other".into(),
        hash: "ff".into(),
    };
    assert!(
        want.check_model(&other, Path::new("p")).is_ok()
            && fixture().check_model(&other, Path::new("p")).is_err()
    );
    let error = want
        .check_traces("this", Path::new("p"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("but this needs the choices of every token"),
        "{error}"
    );
    assert!(fixture().check_traces("this", Path::new("p")).is_ok());
}

#[test]
fn counts_that_make_no_sense_are_refused() {
    let good = load(V2).unwrap();
    let refused = |change: &dyn Fn(&mut Profile), words: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let folder = tempfile::tempdir().unwrap();
        let unwritten = bad.write(&folder.path().join("p")).unwrap_err().to_string();
        assert!(unwritten.contains(words), "{words}: {unwritten}");
        let unread = load(&bad.encode()).unwrap_err();
        assert!(
            unread.contains(words) || unread.contains("bytes of counts"),
            "{words}: {unread}"
        );
    };
    refused(
        &|p| p.counted.as_mut().unwrap()[1].fill(0),
        "layer 2 has no uses of any expert",
    );
    refused(
        &|p| p.counted.as_mut().unwrap()[1][0] = u64::MAX,
        "layer 2 has an expert with 18446744073709551615 uses",
    );
    refused(
        &|p| p.counted.as_mut().unwrap()[1].truncate(3),
        "layer 2 has 3 counts for 40 experts",
    );
    refused(
        &|p| p.counted.as_mut().unwrap().truncate(1),
        "counts of 1 layers, but there are 3",
    );
    refused(&|p| p.prompts = fixture().prompts, "both counts and traces");
    // A header of version 1 knows no counts.
    let mut old = V2.to_vec();
    old[8] = 1;
    let body = old.len() - 8;
    let sum = xxh3_64(&old[..body]).to_le_bytes();
    old[body..].copy_from_slice(&sum);
    assert!(
        load(&old)
            .unwrap_err()
            .contains("unknown field `counts` in version 1")
    );
}

/// Rebuilds a file around another header, version or payload, with a right checksum.
fn rebuild(
    header: impl Fn(&str) -> String,
    version: u32,
    payload: impl Fn(&[u8]) -> Vec<u8>,
) -> Vec<u8> {
    let length = u32::from_le_bytes(V1[12..16].try_into().unwrap()) as usize;
    let header = header(std::str::from_utf8(&V1[16..16 + length]).unwrap());
    let mut out = V1[..8].to_vec();
    out.extend(version.to_le_bytes());
    out.extend((header.len() as u32).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(payload(&V1[16 + length..V1.len() - 8]));
    let sum = xxh3_64(&out);
    out.extend(sum.to_le_bytes());
    out
}

fn with_header(from: &str, to: &str) -> Vec<u8> {
    let change = |header: &str| {
        assert!(header.contains(from), "{from}");
        header.replacen(from, to, 1)
    };
    rebuild(change, 1, <[u8]>::to_vec)
}

#[test]
fn errors_say_what_and_how_to_mend() {
    assert!(load(&rebuild(str::to_string, 1, <[u8]>::to_vec)).is_ok());
    let mut first_bit = V1.to_vec();
    first_bit[V1.len() - 20] ^= 1;
    let zero = |payload: &[u8]| vec![0; payload.len()];
    let ones = |payload: &[u8]| vec![0xff; payload.len()];
    let cases = [
        (
            b"GGUF\x03\0\0\0".to_vec(),
            "not a profile: it is a GGUF model; `tier-plan profile` writes one",
        ),
        (
            b"format = \"tier-plan placement\"".to_vec(),
            "not a profile: it is a placement plan",
        ),
        (Vec::new(), "not a profile: it is empty"),
        (
            b"tierprof\x01".to_vec(),
            "the file is cut short; run `tier-plan profile` again",
        ),
        (V1[..20].to_vec(), "the file is cut short"),
        (
            V1[..V1.len() - 1].to_vec(),
            "the checksum is wrong: the file is damaged or cut short",
        ),
        (first_bit, "the checksum is wrong"),
        (
            rebuild(str::to_string, 4, <[u8]>::to_vec),
            "profile version 4, but this program reads up to version 3; update tier-plan",
        ),
        (rebuild(str::to_string, 0, <[u8]>::to_vec), "version is 0"),
        (
            rebuild(|_| "{".into(), 1, <[u8]>::to_vec),
            "header: EOF while parsing",
        ),
        (
            with_header("\"made\"", "\"color\""),
            "header: unknown field `color`",
        ),
        (
            with_header("held-out", "test"),
            "header: unknown variant `test`, expected `train` or `held-out`",
        ),
        (
            with_header("[1,2,5]", "[]"),
            "no layers; only models with routed experts have a profile",
        ),
        (
            with_header("[1,2,5]", "[1,5,2]"),
            "layer 2 comes after layer 5, but layers must ascend",
        ),
        (
            with_header("[1,2,5]", "[1,2,5000]"),
            "layer 5000 is past 4095",
        ),
        (
            with_header("[1,2,5]", "[1,2,5,6]"),
            "prompt 'a.txt' chose expert 60, but there are only 40",
        ),
        (
            with_header("\"n_expert\":40", "\"n_expert\":0"),
            "n_expert is 0, but must be 1 to 65536",
        ),
        (
            with_header("\"n_expert\":40", "\"n_expert\":65537"),
            "n_expert is 65537",
        ),
        (
            with_header("\"n_expert\":40", "\"n_expert\":36"),
            "chose expert 37, but there are only 36",
        ),
        (
            with_header("\"n_used\":3", "\"n_used\":0"),
            "n_used is 0, but must be 1 to 40 with n_expert = 40",
        ),
        (with_header("\"n_used\":3", "\"n_used\":41"), "n_used is 41"),
        (
            with_header("\"prompt_tokens\":3", "\"prompt_tokens\":4294967295"),
            "prompt 'a.txt' has more tokens than the file has choices",
        ),
        (
            with_header("\"decode_tokens\":0", "\"decode_tokens\":1"),
            "prompt 'heldout-1.txt' has more tokens than",
        ),
        (
            with_header("\"prompt_tokens\":2", "\"prompt_tokens\":1"),
            "prompt 'empty' says offset 111, but its choices start at 95",
        ),
        (
            with_header("\"offset\":111", "\"offset\":18446744073709551615"),
            "says offset 18446744073709551615",
        ),
        (
            rebuild(str::to_string, 1, zero),
            "a token of prompt 'a.txt' chose expert 0 twice in one layer",
        ),
        (
            rebuild(str::to_string, 1, ones),
            "prompt 'a.txt' chose expert 63, but there are only 40",
        ),
        (
            rebuild(str::to_string, 1, |p| [p, &[0]].concat()),
            "1 bytes after the last prompt belong to none",
        ),
    ];
    for (bytes, why) in cases {
        let error = load(&bytes).expect_err(why);
        assert!(
            error.starts_with("m.profile: ") && error.contains(why),
            "wanted {why:?}, got {error:?}"
        );
    }
    let layers: Vec<String> = (0..4096).map(|l| l.to_string()).collect();
    let header = |h: &str| {
        h.replace("[1,2,5]", &format!("[{}]", layers.join(",")))
            .replace("\"n_expert\":40", "\"n_expert\":65536")
    };
    let many = load(&rebuild(header, 1, <[u8]>::to_vec)).unwrap_err();
    assert!(many.contains("4194304"), "{many}");
}

#[test]
fn a_profile_of_another_model_names_both() {
    let path = Path::new("m.profile");
    let profile = fixture();
    assert!(profile.check_model(&profile.model, path).is_ok());
    let other = SourceId {
        name: "other".into(),
        hash: "f".repeat(32),
    };
    assert_eq!(
        profile.check_model(&other, path).unwrap_err().to_string(),
        "m.profile: this profile was made for the model 'fixture' (000102030405), but the model given is 'other' \
         (ffffffffffff); give its own model, or run `tier-plan profile` on this one"
    );
}

#[test]
fn only_a_sound_profile_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.profile");
    let profile = fixture().identified();
    profile.write(&path).unwrap();
    assert_eq!(read(&path).unwrap(), profile);
    let refuse = |change: fn(&mut Profile), why: &str| {
        let mut profile = profile.clone();
        change(&mut profile);
        let error = profile.write(&path).unwrap_err().to_string();
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
        assert!(load(&profile.encode()).is_err(), "{why}: written yet read");
    };
    refuse(
        |p| p.prompts[0].experts.truncate(4),
        "prompt 'a.txt' has 4 experts, but its tokens make 45",
    );
    refuse(
        |p| p.prompts[0].weights.push(1),
        "prompt 'a.txt' has 46 weights, but its tokens make 45",
    );
    refuse(
        |p| p.prompts[1].experts[3] = 40,
        "prompt 'heldout-1.txt' chose expert 40, but there are only 40",
    );
    refuse(
        |p| p.prompts[1].experts[1] = p.prompts[1].experts[0],
        "chose expert 7 twice in one layer",
    );
    refuse(|p| p.n_used = 0, "n_used is 0");
    refuse(|p| p.layers.clear(), "no layers");
    assert_eq!(
        read(&path).unwrap(),
        profile,
        "the file from before is still there"
    );
}

/// A trace of sizes as large as the largest models', with experts that do not repeat within a
/// choice.
fn large(layers: u32, n_expert: u32, n_used: u32, tokens: u32) -> Profile {
    let n = layers as usize * tokens as usize;
    let mut state = 1u64;
    let mut experts = Vec::with_capacity(n * n_used as usize);
    for _ in 0..n {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let first = (state >> 40) as u32;
        experts.extend((0..n_used).map(|rank| ((first + 41 * rank) % n_expert) as u16));
    }
    let weights = experts.iter().map(|&e| e as u8).collect();
    let id = SourceId {
        name: "kimi".into(),
        hash: "0".repeat(32),
    };
    let prompt = PromptTrace {
        domain: "code".into(),
        name: "long".into(),
        split: Split::Train,
        prompt_tokens: tokens / 2,
        decode_tokens: tokens - tokens / 2,
        experts,
        weights,
    };
    let layers = (1..=layers).collect();
    Profile {
        model: id.clone(),
        layers,
        n_expert,
        n_used,
        made: String::new(),
        prompts: vec![prompt],
        counted: None,
        guesses: None,
        id,
    }
}

#[test]
fn ten_thousand_tokens_of_the_largest_model_stay_small() {
    let profile = large(61, 384, 8, 10_000).identified();
    let bytes = profile.encode();
    // 17 bits a choice.
    assert!(bytes.len() < 10_500_000, "{} bytes", bytes.len());
    let start = std::time::Instant::now();
    let back = load(&bytes).unwrap();
    let took = start.elapsed();
    assert!(back == profile);
    // Generous, for a busy machine; it takes a twentieth of that.
    println!("{} bytes, decoded in {took:?}", bytes.len());
    assert!(
        cfg!(debug_assertions) || took.as_secs_f64() < 2.0,
        "decoding took {took:?}"
    );
    let counts = back.counts(None, None, None);
    assert!(
        counts
            .iter()
            .all(|layer| layer.iter().sum::<u64>() == 80_000)
    );
}

#[test]
fn counts_follow_phase_split_and_domain() {
    let profile = fixture();
    assert_eq!(profile.domains(), ["code", "scripture"]);
    let tokens = |phase, split| profile.n_tokens(phase, split);
    assert_eq!(tokens(None, None), 7);
    assert_eq!(tokens(Some(Phase::Prompt), None), 5);
    assert_eq!(tokens(Some(Phase::Decode), None), 2);
    assert_eq!(tokens(None, Some(Split::HeldOut)), 2);
    assert_eq!(tokens(Some(Phase::Decode), Some(Split::HeldOut)), 0);
    // Prompt 0 of the fixture chooses 5t, 5t + 13, 5t + 26 (mod 40) in its first layer; its tokens
    // 3 and 4 are decoded.
    let decode = profile.counts(Some(Phase::Decode), None, None);
    let hit: Vec<usize> = (0..40).filter(|&e| decode[0][e] > 0).collect();
    assert_eq!(hit, [1, 6, 15, 20, 28, 33]);
    assert_eq!(
        profile.counts(None, None, Some("nowhere")),
        vec![vec![0; 40]; 3]
    );
    let sum = |c: Vec<Vec<u64>>| c.iter().flatten().sum::<u64>();
    assert_eq!(sum(profile.counts(None, Some(Split::Train), None)), 45);
    assert_eq!(sum(profile.counts(None, None, Some("scripture"))), 18);
    assert_eq!(
        sum(profile.counts(Some(Phase::Prompt), Some(Split::Train), Some("code"))),
        27
    );
    assert_eq!(profile.chosen(0, 3, 0), [15, 28, 1]);
}

fn any_profile() -> impl Strategy<Value = Profile> {
    let sizes = prop_oneof![
        1u32..600,
        Just(1),
        Just(2),
        Just(255),
        Just(256),
        Just(257),
        Just(65_536)
    ];
    (
        sizes,
        1u32..9,
        proptest::collection::btree_set(0u32..4096, 1..5),
        "\\PC{0,12}",
    )
        .prop_flat_map(|(n_expert, n_used, layers, made)| {
            let n_used = n_used.min(n_expert);
            let layers: Vec<u32> = layers.into_iter().collect();
            let n_layer = layers.len();
            let split =
                any::<bool>().prop_map(|held| if held { Split::HeldOut } else { Split::Train });
            let prompt = (any::<u64>(), "\\PC{0,6}", split, 0u32..6, 0u32..6).prop_map(
                move |(seed, name, split, prompt_tokens, decode_tokens)| {
                    let choices = (prompt_tokens + decode_tokens) as usize * n_layer;
                    let first =
                        |c: usize| seed.wrapping_mul(2 * c as u64 + 1) % u64::from(n_expert);
                    let expert =
                        |c, rank| ((first(c) + u64::from(rank)) % u64::from(n_expert)) as u16;
                    let experts: Vec<u16> = (0..choices)
                        .flat_map(|c| (0..n_used).map(move |rank| expert(c, rank)))
                        .collect();
                    let weights = (0..experts.len())
                        .map(|i| (seed >> (i % 57)) as u8)
                        .collect();
                    let domain = format!("d{}", seed % 3);
                    PromptTrace {
                        domain,
                        name,
                        split,
                        prompt_tokens,
                        decode_tokens,
                        experts,
                        weights,
                    }
                },
            );
            vec(prompt, 0..4).prop_map(move |prompts| {
                let id = SourceId {
                    name: "any".into(),
                    hash: "ab".repeat(16),
                };
                let (layers, made) = (layers.clone(), made.clone());
                Profile {
                    model: id.clone(),
                    layers,
                    n_expert,
                    n_used,
                    made,
                    prompts,
                    counted: None,
                    guesses: None,
                    id,
                }
                .identified()
            })
        })
}

/// [`Profile::counts`], the slow and plain way.
fn plain_counts(
    profile: &Profile,
    phase: Option<Phase>,
    split: Option<Split>,
    domain: Option<&str>,
) -> Vec<Vec<u64>> {
    let mut counts = vec![vec![0; profile.n_expert as usize]; profile.layers.len()];
    for (p, prompt) in profile.prompts.iter().enumerate() {
        for token in 0..prompt.tokens() {
            let now = if token < prompt.prompt_tokens as usize {
                Phase::Prompt
            } else {
                Phase::Decode
            };
            let wanted = phase.unwrap_or(now) == now
                && split.unwrap_or(prompt.split) == prompt.split
                && domain.unwrap_or(&prompt.domain) == prompt.domain;
            for (layer, counts) in counts.iter_mut().enumerate().filter(|_| wanted) {
                profile
                    .chosen(p, token, layer)
                    .iter()
                    .for_each(|&e| counts[usize::from(e)] += 1);
            }
        }
    }
    counts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_profile_reads_back(profile in any_profile()) {
        prop_assert_eq!(load(&profile.encode()), Ok(profile));
    }

    #[test]
    fn counts_agree_with_the_plain_way(profile in any_profile()) {
        for phase in [None, Some(Phase::Prompt), Some(Phase::Decode)] {
            for split in [None, Some(Split::Train), Some(Split::HeldOut)] {
                for domain in [None, Some("d1")] {
                    let plain = plain_counts(&profile, phase, split, domain);
                    prop_assert_eq!(profile.counts(phase, split, domain), plain);
                }
            }
        }
    }

    /// Any damage is found by the checksum.
    #[test]
    fn damage_is_always_found(at in any::<prop::sample::Index>(), cut in 0usize..9, insert in vec(any::<u8>(), 0..9)) {
        let mut bytes = V1.to_vec();
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, insert);
        prop_assert!(bytes == V1 || load(&bytes).is_err());
    }

    /// Damage with a right checksum may mean something, but never panics.
    #[test]
    fn forged_files_never_panic(at in any::<prop::sample::Index>(), cut in 0usize..9, insert in "[-0-9,\"\\[\\]{}e]{0,9}") {
        let mut bytes = V1[..V1.len() - 8].to_vec();
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, insert.into_bytes());
        let sum = xxh3_64(&bytes);
        bytes.extend(sum.to_le_bytes());
        if let Ok(profile) = load(&bytes) {
            prop_assert_eq!(load(&profile.encode()).unwrap().prompts, profile.prompts);
        }
    }

    #[test]
    fn forged_headers_never_panic(at in any::<prop::sample::Index>(), cut in 0usize..9, insert in "[-0-9,\"\\[\\]{}e]{0,9}") {
        let bytes = rebuild(|header| {
            let mut header = header.as_bytes().to_vec();
            let at = at.index(header.len());
            let end = (at + cut).min(header.len());
            header.splice(at..end, insert.bytes());
            String::from_utf8_lossy(&header).into_owned()
        }, 1, <[u8]>::to_vec);
        if let Ok(profile) = load(&bytes) {
            prop_assert_eq!(load(&profile.encode()).unwrap().prompts, profile.prompts);
        }
    }
}

#[test]
fn a_profile_begins_with_what_its_model_has() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let begin = |name: &str| {
        let gguf = crate::gguf::Gguf::open(&data.join(name)).unwrap();
        let spec = crate::model::describe(&gguf).unwrap();
        Profile::of_model(gguf.id(), &spec, "a test".into())
    };
    let profile = begin("arch/qwen3moe.gguf").unwrap();
    assert!(profile.n_used > 0 && profile.n_used < profile.n_expert);
    assert!(!profile.layers.is_empty() && profile.prompts.is_empty());
    let none = begin("arch2/qwen2.gguf");
    assert!(matches!(none, Err(NoProfile::NoExperts { .. })), "{none:?}");
    let uneven = begin("arch2/nemotron_h_moe-puzzle.gguf");
    assert!(
        matches!(uneven, Err(NoProfile::Uneven { .. })),
        "{uneven:?}"
    );
}
