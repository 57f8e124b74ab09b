//! Compares a model that is fully on a device with golden values: logits of another engine.
//!
//! Golden values are three files: the model `NAME.gguf`, `NAME.json` with `tokens` and `n_vocab`,
//! and `NAME.logits`, little-endian 32-bit floats `[tokens, n_vocab]`.

use crate::{SelftestError, Stop};
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

/// A model, tokens, and the logits that it should compute for them.
#[derive(Debug, Clone)]
pub struct Golden {
    /// Path of the model.
    pub model: PathBuf,
    /// Tokens of the input text.
    pub tokens: Vec<u32>,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// `[tokens, n_vocab]`.
    pub logits: Vec<f32>,
}

/// Errors of a device's logits, as normalized mean squared errors (NMSE): the sum of squared
/// differences over the sum of squared golden values.
///
/// The weights are random, so a token's next best expert is sometimes very close. Attention of a
/// prompt rounds to 16 bits. Where another expert is chosen for that, the rest is another network.
/// So there is also an error of the prompt's tokens up to the first whose choices are not the
/// CPU's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GoldenErrors {
    /// Number of tokens compared.
    pub tokens: usize,
    /// Tokens of the prompt before the first that chose other experts than on the CPU.
    pub same_experts: usize,
    /// NMSE of those tokens, computed as a prompt.
    pub same_experts_nmse: f64,
    /// NMSE of all tokens, computed as a prompt.
    pub prompt_nmse: f64,
    /// NMSE of all tokens, computed one after the other.
    pub decode_nmse: f64,
}

impl GoldenErrors {
    /// Returns the largest error; NaN if any is NaN. With `exact`, the prompt counts only as far as
    /// it chose the same experts.
    pub fn worst(&self, exact: bool) -> f64 {
        let prompt = if exact {
            self.same_experts_nmse
        } else {
            self.prompt_nmse
        };
        if prompt.is_nan() || prompt > self.decode_nmse {
            prompt
        } else {
            self.decode_nmse
        }
    }
}

#[derive(Deserialize)]
struct Wire {
    n_vocab: usize,
    tokens: Vec<u32>,
}

/// Returns the sorted names of the golden values in a folder.
///
/// # Errors
/// When the folder can't be listed.
pub fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_logits = path.extension().is_some_and(|e| e == "logits");
        names.extend(
            path.file_stem()
                .filter(|_| is_logits)
                .map(|stem| stem.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}

impl Golden {
    /// Reads golden values by name.
    ///
    /// # Errors
    /// When a file is missing, or the three files don't belong together.
    pub fn read(folder: &Path, name: &str) -> Result<Self, SelftestError> {
        let path = |extension: &str| folder.join(format!("{name}.{extension}"));
        let bad = |path: PathBuf, what: String| SelftestError::Golden { path, what };
        let read =
            |path: PathBuf| std::fs::read(&path).map_err(|error| bad(path, error.to_string()));
        let Wire { n_vocab, tokens } = serde_json::from_slice(&read(path("json"))?)
            .map_err(|error| bad(path("json"), format!("no tokens and n_vocab: {error}")))?;
        let bytes = read(path("logits"))?;
        let expected = tokens
            .len()
            .checked_mul(n_vocab)
            .and_then(|n| n.checked_mul(4));
        if expected != Some(bytes.len()) || tokens.is_empty() {
            let what = format!(
                "it has {} bytes, expected those of {} tokens of {n_vocab} logits; take {name}'s files from one release",
                bytes.len(),
                tokens.len()
            );
            return Err(bad(path("logits"), what));
        }
        let logits = bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        Ok(Self {
            model: path("gguf"),
            tokens,
            n_vocab,
            logits,
        })
    }

    /// Returns the NMSE of the first `tokens`; NaN if there are none, or `logits` have another
    /// length.
    fn nmse(&self, logits: &[f32], tokens: usize) -> f64 {
        if logits.len() != self.logits.len() || tokens == 0 {
            return f64::NAN;
        }
        let square = |v: f64| v * v;
        let pairs = || logits.iter().zip(&self.logits).take(tokens * self.n_vocab);
        let error: f64 = pairs()
            .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
            .sum();
        error
            / pairs()
                .map(|(_, b)| square(f64::from(*b)))
                .sum::<f64>()
                .max(f64::MIN_POSITIVE)
    }

    /// Computes the logits with the model fully on a device, and compares them.
    ///
    /// # Errors
    /// When the model can't be loaded there, a pass fails, or `stop` returns true.
    pub fn compare(
        &self,
        device: &Arc<dyn Device>,
        stop: Stop<'_>,
    ) -> Result<GoldenErrors, SelftestError> {
        let gguf = Arc::new(Gguf::open(&self.model)?);
        let spec = describe(&gguf)?;
        if spec.n_vocab != self.n_vocab {
            let what = format!(
                "a vocabulary of {}, expected {} as in the golden values",
                spec.n_vocab, self.n_vocab
            );
            return Err(SelftestError::Golden {
                path: self.model.clone(),
                what,
            });
        }
        let context = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        let shape = shape_of(&gguf, &spec);
        // The golden values were made with a KV cache of 32 bits.
        let plan = all_on_gpu(&shape, context, KvType::F32);
        let (give, options) = (|_: usize| Ok(Arc::clone(device)), LoadOptions::default());
        let mut engine = Engine::load_on(
            Arc::clone(&gguf),
            &plan,
            &options,
            Some(&give),
            &mut |_, _| {},
        )?;
        let prompt = engine.forward(&self.tokens, LogitsMode::All)?.to_vec();
        let plain = all_in_memory(&shape, context, KvType::F32);
        let mut on_cpu = Engine::load(gguf, &plain, &options, &mut |_, _| {})?;
        on_cpu.forward(&self.tokens, LogitsMode::Last)?;
        let n_used = shape.experts.first().map_or(1, |e| e.n_used as usize);
        let same_experts = tokens_with_same_experts(
            &engine.routing().experts,
            &on_cpu.routing().experts,
            n_used,
            self.tokens.len(),
        );
        engine.clear();
        let mut logits = Vec::with_capacity(self.logits.len());
        for token in &self.tokens {
            if stop() {
                return Err(SelftestError::Stopped);
            }
            logits.extend_from_slice(engine.forward(&[*token], LogitsMode::Last)?);
        }
        let tokens = self.tokens.len();
        Ok(GoldenErrors {
            tokens,
            same_experts,
            same_experts_nmse: self.nmse(&prompt, same_experts),
            prompt_nmse: self.nmse(&prompt, tokens),
            decode_nmse: self.nmse(&logits, tokens),
        })
    }
}

/// Counts the tokens before the first one that chose another set of experts in a layer. `a` and `b`
/// are `[tokens, layers, n_used]`.
fn tokens_with_same_experts(a: &[u16], b: &[u16], n_used: usize, tokens: usize) -> usize {
    let per_token = a.len() / tokens.max(1);
    let same = |a: &[u16], b: &[u16]| {
        let layers = a.chunks(n_used.max(1)).zip(b.chunks(n_used.max(1)));
        layers
            .into_iter()
            .all(|(a, b)| a.iter().all(|e| b.contains(e)))
    };
    let token = |t: usize| t * per_token..(t + 1) * per_token;
    (0..tokens)
        .take_while(|t| a.len() == b.len() && same(&a[token(*t)], &b[token(*t)]))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/data")
            .join(name)
    }

    #[test]
    fn every_golden_model_is_found_and_read() {
        assert_eq!(names(&folder("arch")).unwrap().len(), 13);
        assert_eq!(names(&folder("quant")).unwrap().len(), 12);
        for set in ["arch", "quant"] {
            for name in names(&folder(set)).unwrap() {
                let golden = Golden::read(&folder(set), &name).unwrap();
                assert!(
                    golden.model.is_file()
                        && golden.logits.len() == golden.tokens.len() * golden.n_vocab
                );
                let (logits, n) = (golden.logits.clone(), golden.tokens.len());
                assert_eq!(golden.nmse(&logits, n), 0.0);
                assert!(golden.nmse(&logits[1..], n).is_nan() && golden.nmse(&logits, 0).is_nan());
            }
        }
        assert!(names(&folder("none")).is_err());
    }

    /// Some golden values on the GPU emulator; a real GPU compares all of them.
    #[test]
    fn golden_values_on_the_gpu_emulator() {
        let device: Arc<dyn Device> = shim::shared();
        let models = [
            ("arch", "gpt-oss", true, 1e-4),
            ("arch", "minimax-m2", true, 1e-4),
            ("arch", "qwen3next", true, 1e-4),
            ("quant", "Q4_K_M", false, 1e-2),
        ];
        for (set, name, exact, bound) in models {
            assert!(
                names(&folder(set)).unwrap().iter().any(|n| n == name),
                "{name}"
            );
            let errors = Golden::read(&folder(set), name)
                .unwrap()
                .compare(&device, &|| false)
                .unwrap();
            assert!(
                errors.worst(exact) <= bound && errors.prompt_nmse > 0.0,
                "{name}: {errors:?}"
            );
            assert!(
                errors.tokens == 48 && errors.same_experts > 0,
                "{name}: {errors:?}"
            );
        }
        let golden = Golden::read(&folder("arch"), "qwen3moe").unwrap();
        assert!(matches!(
            golden.compare(&device, &|| true),
            Err(SelftestError::Stopped)
        ));
        // A wrong golden value is detected.
        let mut other = golden.clone();
        other.logits[7] += 3.0;
        assert!(other.compare(&device, &|| false).unwrap().worst(true) > 1e-4);
    }

    #[test]
    fn files_that_do_not_belong_together_are_errors() {
        let here = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(here.path().join(name), bytes).unwrap();
        let why = |name: &str| Golden::read(here.path(), name).unwrap_err().to_string();
        assert!(why("none").contains("none.json"));
        write("a.json", br#"{"n_vocab": 2, "tokens": [1, 2]}"#);
        write("a.logits", &[0; 12]);
        assert!(
            why("a").contains("12 bytes") && why("a").contains("a.logits"),
            "{}",
            why("a")
        );
        write("b.json", b"{}");
        assert!(
            why("b").contains("b.json") && why("b").contains("n_vocab"),
            "{}",
            why("b")
        );
        write("a.logits", &[0; 16]);
        let golden = Golden::read(here.path(), "a").unwrap();
        let device: Arc<dyn Device> = shim::shared();
        assert!(matches!(
            golden.compare(&device, &|| false),
            Err(SelftestError::Gguf(_))
        ));
        std::fs::copy(folder("arch/olmoe.gguf"), here.path().join("a.gguf")).unwrap();
        let error = golden.compare(&device, &|| false).unwrap_err().to_string();
        assert!(error.contains("vocabulary of"), "{error}");
        let errors = |prompt, decode_nmse| GoldenErrors {
            tokens: 9,
            same_experts: 5,
            same_experts_nmse: prompt,
            prompt_nmse: 2.0 * prompt,
            decode_nmse,
        };
        let worst = |a, b| errors(a, b).worst(true);
        assert_eq!(
            (
                worst(1.0, 2.0),
                worst(2.0, 1.0),
                errors(2.0, 1.0).worst(false)
            ),
            (2.0, 2.0, 4.0)
        );
        assert!(worst(f64::NAN, 1.0).is_nan() && worst(1.0, f64::NAN).is_nan());
    }

    #[test]
    fn tokens_that_chose_the_same_experts_are_counted() {
        // Three tokens, two layers, two experts each.
        let a = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4];
        assert_eq!(tokens_with_same_experts(&a, &a, 2, 3), 3);
        assert_eq!(
            tokens_with_same_experts(&a, &[2, 1, 4, 3, 5, 6, 7, 1, 1, 2, 3, 4], 2, 3),
            1,
            "the order does not matter"
        );
        assert_eq!(
            tokens_with_same_experts(&a, &[2, 3, 1, 4, 5, 6, 7, 0, 1, 2, 3, 4], 2, 3),
            0,
            "layers are compared one by one"
        );
        assert_eq!(
            (
                tokens_with_same_experts(&[], &[], 1, 3),
                tokens_with_same_experts(&a, &[], 2, 3)
            ),
            (3, 0)
        );
    }
}
