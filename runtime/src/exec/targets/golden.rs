//! Golden values of another engine against a model that is all on a device: `NAME.gguf`, `NAME.json` with `tokens` and
//! `n_vocab`, and `NAME.logits`, little-endian 32-bit floats `[tokens, n_vocab]`.

use super::{Stop, TargetError};
use crate::cuda::Device;
use crate::exec::plan::all_on_gpu;
use crate::exec::{Engine, KvType, LoadOptions, Wanted};
use crate::gguf::Gguf;
use crate::model::describe;
use crate::model::shape::shape_of;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// All tokens as one prompt.
    pub prompt_nmse: f64,
    /// One token after the other.
    pub one_by_one_nmse: f64,
}

impl Found {
    /// The larger of the two; NaN where either is.
    pub fn worst(&self) -> f64 {
        let (a, b) = (self.prompt_nmse, self.one_by_one_nmse);
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

    fn nmse(&self, found: &[f32]) -> f64 {
        if found.len() != self.logits.len() {
            return f64::NAN;
        }
        let square = |v: f64| v * v;
        let off: f64 = found.iter().zip(&self.logits).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        off / self.logits.iter().map(|b| square(f64::from(*b))).sum::<f64>().max(f64::MIN_POSITIVE)
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
        // The golden values were made with keys and values of 32 bits.
        let plan = all_on_gpu(&shape_of(&gguf, &spec), context, KvType::F32);
        let give = |_: usize| Ok(Arc::clone(device));
        let mut engine = Engine::load_on(gguf, &plan, &LoadOptions::default(), Some(&give), &mut |_, _| {})?;
        let prompt_nmse = self.nmse(engine.forward(&self.tokens, Wanted::All)?);
        engine.clear();
        let mut logits = Vec::with_capacity(self.logits.len());
        for token in &self.tokens {
            if stop() {
                return Err(TargetError::Stopped);
            }
            logits.extend_from_slice(engine.forward(&[*token], Wanted::Last)?);
        }
        Ok(Found { prompt_nmse, one_by_one_nmse: self.nmse(&logits) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::shim;

    fn folder(of: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(of)
    }

    #[test]
    fn every_golden_model_is_found_and_read() {
        assert_eq!(names(&folder("arch")).unwrap().len(), 13);
        assert_eq!(names(&folder("quant")).unwrap().len(), 7);
        for of in ["arch", "quant"] {
            for name in names(&folder(of)).unwrap() {
                let golden = Golden::read(&folder(of), &name).unwrap();
                assert!(golden.model.is_file() && golden.logits.len() == golden.tokens.len() * golden.n_vocab);
                assert_eq!(golden.nmse(&golden.logits.clone()), 0.0);
                assert!(golden.nmse(&golden.logits[1..]).is_nan());
            }
        }
        assert!(names(&folder("none")).is_err());
    }

    /// Every architecture and every format on the emulated device: as many as a GPU can have are within the bounds.
    #[test]
    fn golden_values_on_an_emulated_gpu() {
        let device: Arc<dyn Device> = shim::shared();
        let (mut compared, mut left_out) = (0, Vec::new());
        for (of, bound) in [("arch", 1e-4), ("quant", 1e-2)] {
            for name in names(&folder(of)).unwrap() {
                let golden = Golden::read(&folder(of), &name).unwrap();
                match golden.compare(&device, &|| false) {
                    Ok(found) => {
                        assert!(found.worst() <= bound && found.prompt_nmse > 0.0, "{name}: {found:?}");
                        compared += 1;
                    }
                    Err(error) => {
                        assert!(error.is_not_for_it(), "{name}: {error}");
                        left_out.push(name);
                    }
                }
            }
        }
        assert_eq!(compared + left_out.len(), 20);
        assert!(left_out.iter().all(|name| ["qwen3next", "qwen35moe"].contains(&name.as_str())), "{left_out:?}");
        let golden = Golden::read(&folder("arch"), "qwen3moe").unwrap();
        assert!(matches!(golden.compare(&device, &|| true), Err(TargetError::Stopped)));
        // Other values are found.
        let mut other = golden.clone();
        other.logits[7] += 3.0;
        assert!(other.compare(&device, &|| false).unwrap().worst() > 1e-4);
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
        let worst = |a, b| Found { prompt_nmse: a, one_by_one_nmse: b }.worst();
        assert_eq!((worst(1.0, 2.0), worst(2.0, 1.0)), (2.0, 2.0));
        assert!(worst(f64::NAN, 1.0).is_nan() && worst(1.0, f64::NAN).is_nan());
    }
}
