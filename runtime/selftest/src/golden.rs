//! Golden values of another engine against a model that is all on a device: `NAME.gguf`, `NAME.json` with `tokens` and
//! `n_vocab`, and `NAME.logits`, little-endian 32-bit floats `[tokens, n_vocab]`.

use crate::{Stop, TargetError};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::shape_of;
use tier_plan_runtime::engine::{Engine, LogitsMode};
use tier_plan_runtime::options::LoadOptions;
use tier_plan_runtime::plans::in_memory::{all_in_memory, all_on_gpu};

/// A model with what its tokens should give.
#[derive(Debug, Clone)]
pub struct Golden {
    /// The model.
    pub model: PathBuf,
    /// What goes in.
    pub tokens: Vec<u32>,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// `[tokens, n_vocab]`.
    pub logits: Vec<f32>,
}

/// What a device made of it: sums of squared differences over sums of squared golden values.
///
/// The weights are random, so now and then a token's next best expert is a hair away. A prompt's attention rounds to 16
/// bits, and where another expert is chosen for that it is another network from there on: so a prompt's tokens are looked
/// at up to the first whose choices are not the processor's, too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Tokens.
    pub tokens: usize,
    /// Tokens of the prompt before the first that chose other experts than on the processor.
    pub alike: usize,
    /// Those, as a prompt.
    pub alike_nmse: f64,
    /// All tokens as one prompt.
    pub prompt_nmse: f64,
    /// One token after the other.
    pub one_by_one_nmse: f64,
}

impl Found {
    /// The largest error; NaN where any is. With `exact`, of a prompt only what chose the same experts.
    pub fn worst(&self, exact: bool) -> f64 {
        let a = if exact { self.alike_nmse } else { self.prompt_nmse };
        let b = self.one_by_one_nmse;
        if a.is_nan() || a > b { a } else { b }
    }
}

#[derive(Deserialize)]
struct Wire {
    n_vocab: usize,
    tokens: Vec<u32>,
}

/// The names of the golden values in a folder, in order.
///
/// # Errors
/// When it can't be listed.
pub fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_it = path.extension().is_some_and(|e| e == "logits");
        names.extend(path.file_stem().filter(|_| is_it).map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

impl Golden {
    /// Reads the values of a name.
    ///
    /// # Errors
    /// When a file is missing, or the three don't belong together.
    pub fn read(folder: &Path, name: &str) -> Result<Self, TargetError> {
        let path = |extension: &str| folder.join(format!("{name}.{extension}"));
        let bad = |path: PathBuf, what: String| TargetError::Golden { path, what };
        let read = |path: PathBuf| std::fs::read(&path).map_err(|error| bad(path, error.to_string()));
        let Wire { n_vocab, tokens } = serde_json::from_slice(&read(path("json"))?)
            .map_err(|error| bad(path("json"), format!("no tokens and n_vocab: {error}")))?;
        let bytes = read(path("logits"))?;
        let expected = tokens.len().checked_mul(n_vocab).and_then(|n| n.checked_mul(4));
        if expected != Some(bytes.len()) || tokens.is_empty() {
            let what = format!(
                "it has {} bytes, which are not those of {} tokens of {n_vocab} logits; take {name}'s files from one release",
                bytes.len(),
                tokens.len()
            );
            return Err(bad(path("logits"), what));
        }
        let logits = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Ok(Self { model: path("gguf"), tokens, n_vocab, logits })
    }

    /// Of the first `tokens`; NaN where there are none, or not as many as there should be.
    fn nmse(&self, found: &[f32], tokens: usize) -> f64 {
        if found.len() != self.logits.len() || tokens == 0 {
            return f64::NAN;
        }
        let square = |v: f64| v * v;
        let pairs = || found.iter().zip(&self.logits).take(tokens * self.n_vocab);
        let off: f64 = pairs().map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        off / pairs().map(|(_, b)| square(f64::from(*b))).sum::<f64>().max(f64::MIN_POSITIVE)
    }

    /// Computes them with everything on a device.
    ///
    /// # Errors
    /// When the model can't be loaded there, or a pass fails.
    pub fn compare(&self, device: &Arc<dyn Device>, stop: Stop<'_>) -> Result<Found, TargetError> {
        let gguf = Arc::new(Gguf::open(&self.model)?);
        let spec = describe(&gguf)?;
        if spec.n_vocab != self.n_vocab {
            let what = format!("a vocabulary of {}, where the golden values have {}", spec.n_vocab, self.n_vocab);
            return Err(TargetError::Golden { path: self.model.clone(), what });
        }
        let context = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        let shape = shape_of(&gguf, &spec);
        // The golden values were made with keys and values of 32 bits.
        let plan = all_on_gpu(&shape, context, KvType::F32);
        let (give, options) = (|_: usize| Ok(Arc::clone(device)), LoadOptions::default());
        let mut engine = Engine::load_on(Arc::clone(&gguf), &plan, &options, Some(&give), &mut |_, _| {})?;
        let prompt = engine.forward(&self.tokens, LogitsMode::All)?.to_vec();
        let plain = all_in_memory(&shape, context, KvType::F32);
        let mut here = Engine::load(gguf, &plain, &options, &mut |_, _| {})?;
        here.forward(&self.tokens, LogitsMode::Last)?;
        let n_used = shape.experts.first().map_or(1, |e| e.n_used as usize);
        let alike = alike(&engine.routing().experts, &here.routing().experts, n_used, self.tokens.len());
        engine.clear();
        let mut logits = Vec::with_capacity(self.logits.len());
        for token in &self.tokens {
            if stop() {
                return Err(TargetError::Stopped);
            }
            logits.extend_from_slice(engine.forward(&[*token], LogitsMode::Last)?);
        }
        let tokens = self.tokens.len();
        let (alike_nmse, prompt_nmse) = (self.nmse(&prompt, alike), self.nmse(&prompt, tokens));
        Ok(Found { tokens, alike, alike_nmse, prompt_nmse, one_by_one_nmse: self.nmse(&logits, tokens) })
    }
}

/// Tokens before the first that chose other experts in a layer, in whatever order; `[tokens, layers, n_used]`.
fn alike(a: &[u16], b: &[u16], n_used: usize, tokens: usize) -> usize {
    let of_a_token = a.len() / tokens.max(1);
    let same = |a: &[u16], b: &[u16]| {
        let layers = a.chunks(n_used.max(1)).zip(b.chunks(n_used.max(1)));
        layers.into_iter().all(|(a, b)| a.iter().all(|e| b.contains(e)))
    };
    let token = |t: usize| t * of_a_token..(t + 1) * of_a_token;
    (0..tokens).take_while(|t| a.len() == b.len() && same(&a[token(*t)], &b[token(*t)])).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;

    fn folder(of: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(of)
    }

    #[test]
    fn every_golden_model_is_found_and_read() {
        assert_eq!(names(&folder("arch")).unwrap().len(), 13);
        assert_eq!(names(&folder("quant")).unwrap().len(), 7);
        for of in ["arch", "quant"] {
            for name in names(&folder(of)).unwrap() {
                let golden = Golden::read(&folder(of), &name).unwrap();
                assert!(golden.model.is_file() && golden.logits.len() == golden.tokens.len() * golden.n_vocab);
                let (logits, n) = (golden.logits.clone(), golden.tokens.len());
                assert_eq!(golden.nmse(&logits, n), 0.0);
                assert!(golden.nmse(&logits[1..], n).is_nan() && golden.nmse(&logits, 0).is_nan());
            }
        }
        assert!(names(&folder("none")).is_err());
    }

    /// Every architecture and every format on the emulated device: as many as a GPU can have are within the bounds.
    #[test]
    fn golden_values_on_an_emulated_gpu() {
        let device: Arc<dyn Device> = shim::shared();
        // A GPU compares all of them, and is quicker.
        let models = [
            ("arch", "gpt-oss", true, 1e-4),
            ("arch", "minimax-m2", true, 1e-4),
            ("arch", "qwen3next", true, 1e-4),
            ("quant", "Q4_K_M", false, 1e-2),
        ];
        for (of, name, exact, bound) in models {
            assert!(names(&folder(of)).unwrap().iter().any(|n| n == name), "{name}");
            let found = Golden::read(&folder(of), name).unwrap().compare(&device, &|| false).unwrap();
            assert!(found.worst(exact) <= bound && found.prompt_nmse > 0.0, "{name}: {found:?}");
            assert!(found.tokens == 48 && found.alike > 0, "{name}: {found:?}");
        }
        let golden = Golden::read(&folder("arch"), "qwen3moe").unwrap();
        assert!(matches!(golden.compare(&device, &|| true), Err(TargetError::Stopped)));
        // Other values are found.
        let mut other = golden.clone();
        other.logits[7] += 3.0;
        assert!(other.compare(&device, &|| false).unwrap().worst(true) > 1e-4);
    }

    #[test]
    fn files_that_do_not_belong_together_are_errors() {
        let here = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(here.path().join(name), bytes).unwrap();
        let why = |name: &str| Golden::read(here.path(), name).unwrap_err().to_string();
        assert!(why("none").contains("none.json"));
        write("a.json", br#"{"n_vocab": 2, "tokens": [1, 2]}"#);
        write("a.logits", &[0; 12]);
        assert!(why("a").contains("12 bytes") && why("a").contains("a.logits"), "{}", why("a"));
        write("b.json", b"{}");
        assert!(why("b").contains("b.json") && why("b").contains("n_vocab"), "{}", why("b"));
        write("a.logits", &[0; 16]);
        let golden = Golden::read(here.path(), "a").unwrap();
        let device: Arc<dyn Device> = shim::shared();
        assert!(matches!(golden.compare(&device, &|| false), Err(TargetError::Gguf(_))));
        std::fs::copy(folder("arch/olmoe.gguf"), here.path().join("a.gguf")).unwrap();
        let error = golden.compare(&device, &|| false).unwrap_err().to_string();
        assert!(error.contains("vocabulary of"), "{error}");
        let found = |a, b| Found { tokens: 9, alike: 5, alike_nmse: a, prompt_nmse: 2.0 * a, one_by_one_nmse: b };
        let worst = |a, b| found(a, b).worst(true);
        assert_eq!((worst(1.0, 2.0), worst(2.0, 1.0), found(2.0, 1.0).worst(false)), (2.0, 2.0, 4.0));
        assert!(worst(f64::NAN, 1.0).is_nan() && worst(1.0, f64::NAN).is_nan());
    }

    #[test]
    fn tokens_that_chose_the_same_experts_are_counted() {
        // Three tokens, two layers, two experts each.
        let a = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4];
        assert_eq!(alike(&a, &a, 2, 3), 3);
        assert_eq!(alike(&a, &[2, 1, 4, 3, 5, 6, 7, 1, 1, 2, 3, 4], 2, 3), 1, "an order is no choice");
        assert_eq!(alike(&a, &[2, 3, 1, 4, 5, 6, 7, 0, 1, 2, 3, 4], 2, 3), 0, "layers are apart");
        assert_eq!((alike(&[], &[], 1, 3), alike(&a, &[], 2, 3)), (3, 0));
    }
}
