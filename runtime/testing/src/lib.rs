//! What tests of several crates share: golden values, errors, and numbers that look random.
//!
//! It knows none of the crates that it helps to test. A crate's unit tests would otherwise see two
//! copies of that crate.

pub mod http;
pub mod schema;

use std::path::{Path, PathBuf};

/// Returns the root of the source.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the source")
}

/// Returns the path of a file below `tests/data`.
pub fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

/// Returns the names of the models in a folder of `tests/data`, sorted: `qwen3moe` for
/// `qwen3moe.gguf`.
///
/// # Panics
/// When the folder cannot be listed, or has no model.
pub fn models(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(data(folder)).expect(folder);
    let paths = entries
        .map(|entry| entry.expect(folder).path())
        .filter(|path| path.extension() == Some("gguf".as_ref()));
    let mut names: Vec<String> = paths
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    assert!(!names.is_empty(), "{folder}: no models");
    names
}

/// Returns the path of the bundled model.
pub fn demo_model() -> PathBuf {
    root().join("profiles/demo/demo.gguf")
}

/// Gives `check` every input of a fuzz target in `tests/data/fuzz`.
///
/// # Panics
/// When there are none, or `check` fails, after it has named the input.
pub fn replay(target: &str, check: impl Fn(&[u8])) {
    let folder = data("fuzz").join(target);
    let entries = std::fs::read_dir(&folder).expect(target);
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect(target).path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target}: no inputs");
    for path in paths {
        // Shown only if the test fails.
        println!("{}", path.display());
        check(&std::fs::read(&path).expect(target));
    }
}

/// Whether tests run all of their cases: the environment has `TIER_PLAN_NIGHTLY=1`.
pub fn is_nightly() -> bool {
    std::env::var_os("TIER_PLAN_NIGHTLY").is_some_and(|value| value == "1")
}

/// Reads little-endian 32-bit floats.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// Returns the normalized mean squared error: the sum of squared differences over the sum of
/// squared expected values.
///
/// # Panics
/// When there are more values, or fewer, than are expected.
pub fn nmse<E: Copy + Into<f64>>(found: &[f32], expected: &[E]) -> f64 {
    assert_eq!(found.len(), expected.len(), "values found, and expected");
    let error: f64 = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (f64::from(*a) - (*b).into()).powi(2))
        .sum();
    error / expected.iter().map(|b| (*b).into().powi(2)).sum::<f64>()
}

/// What another engine computed from a small model of `tests/data`.
#[derive(Clone, Debug)]
pub struct Golden {
    /// The model's GGUF file.
    pub path: PathBuf,
    /// Size of the vocabulary.
    pub n_vocab: usize,
    /// The input.
    pub tokens: Vec<u32>,
    /// Tokens that greedy decoding adds.
    pub greedy: Vec<u32>,
    /// Logits after each token of the input, `[tokens, n_vocab]`.
    pub logits: Vec<f32>,
}

impl Golden {
    /// Reads what is known of a model, such as `arch/qwen3moe`.
    ///
    /// # Panics
    /// When a file is missing or contradicts another.
    pub fn read(name: &str) -> Self {
        let file =
            |extension: &str| std::fs::read(data(&format!("{name}.{extension}"))).expect(name);
        let json: serde_json::Value = serde_json::from_slice(&file("json")).expect(name);
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(json[key].clone()).expect(key);
        let golden = Self {
            path: data(&format!("{name}.gguf")),
            n_vocab: json["n_vocab"].as_u64().expect("n_vocab") as usize,
            tokens: ids("tokens"),
            greedy: ids("greedy"),
            logits: floats(&file("logits")),
        };
        assert_eq!(
            golden.logits.len(),
            golden.tokens.len() * golden.n_vocab,
            "{name}: logits"
        );
        golden
    }

    /// Returns the [`nmse`] of logits of all tokens.
    pub fn nmse(&self, logits: &[f32]) -> f64 {
        nmse(logits, &self.logits)
    }
}

/// A generator of numbers that look random (SplitMix64), the same ones for a seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// Returns any number.
    #[allow(
        clippy::should_implement_trait,
        reason = "it never ends, so that an iterator's option would be in the way"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Returns a number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Returns a number within -1 to 1.
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Returns a number of about a normal distribution with mean 0 and deviation 1.
    pub fn normal(&mut self) -> f32 {
        (0..12)
            .map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32)
            .sum::<f32>()
            - 6.0
    }

    /// Returns `n` numbers within -1 to 1.
    pub fn noise(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.signed()).collect()
    }

    /// Returns `n` numbers as [`normal`](Self::normal) makes them.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}
