//! Bundled shapes and machines, found by name or file.
//!
//! The files of `profiles/` are compiled in, so that names work wherever the program is.

use crate::context;
use crate::opening::naming;
use crate::store;
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use tier_plan_profiles::{MACHINES, MODELS};
use tier_plan_runtime::formats::machine::{self, Machine};
use tier_plan_runtime::formats::shape::{self, Architecture, Mix};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::{ModelShape, shape_of};

/// Default quantization of a shape.
const DEFAULT_MIX: Mix = Mix::Q4_K_M;

/// A model that a plan can be made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its sizes.
    pub sizes: ModelShape,
    /// Shape and quantization that the sizes come from; `None` for a model file.
    pub shape: Option<(Architecture, Mix)>,
    /// Longest context in tokens that the model was trained for; 0 where that is unknown.
    pub longest_context: u64,
}

impl Known {
    /// Returns notes on the origin of the sizes, in sentences.
    pub fn notes(&self) -> Vec<String> {
        let Some((of, mix)) = &self.shape else {
            return Vec::new();
        };
        vec![format!(
            "'{}' is a shape without weights: tensor types are those that llama.cpp gives a {} file when nothing is \
             overridden, so a published file differs by some percent; to run the model, solve again with its own file",
            of.name,
            mix.name()
        )]
    }
}

/// Meaning of MODEL on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// A model file, which may not exist.
    File,
    /// A shape.
    Shape(Box<Architecture>),
}

/// Distinguishes a shape (a `.toml` file, or a bundled name that is not a file) from a model file.
///
/// # Errors
/// When a shape cannot be read.
pub fn named(model: &Path) -> Result<Named> {
    if model
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("toml"))
        && (model.exists() || text(MODELS, model).is_none())
    {
        return Ok(Named::Shape(Box::new(shape::read(model)?)));
    }
    match text(MODELS, model) {
        Some(text) if !model.exists() => Ok(Named::Shape(Box::new(shape::decode(
            text.as_bytes(),
            model,
        )?))),
        // A bare word that matches nothing was meant as a name.
        None if !model.exists() && is_word(model) => {
            bail!(
                "{}: no such file, and no shape of that name; bundled shapes: {}",
                model.display(),
                names(MODELS)
            )
        }
        _ => Ok(Named::File),
    }
}

/// Returns the sizes of a model, from its file or from a shape and a quantization.
///
/// # Errors
/// When the file or shape cannot be read, the quantization is unknown, or one is given for a file.
pub fn model(model: &Path, quant: Option<&str>) -> Result<Known> {
    match named(model)? {
        Named::File => {
            ensure!(
                quant.is_none(),
                "--quant {}: {} is a model file, expected a shape",
                quant.unwrap_or_default(),
                model.display()
            );
            let gguf = Gguf::open(model)?;
            let spec = describe(&gguf).map_err(|e| naming(model, e))?;
            let sizes = shape_of(&gguf, &spec);
            Ok(Known {
                longest_context: context::longest(&spec, sizes.context),
                sizes,
                shape: None,
            })
        }
        Named::Shape(of) => {
            let mix = mix(quant)?;
            let sizes = of.model_shape(mix);
            Ok(Known {
                longest_context: sizes.context.into(),
                sizes,
                shape: Some((*of, mix)),
            })
        }
    }
}

/// Returns the quantization of this name, or the default one.
///
/// # Errors
/// When the name is unknown; lists the known ones.
pub fn mix(quant: Option<&str>) -> Result<Mix> {
    let Some(name) = quant else {
        return Ok(DEFAULT_MIX);
    };
    Mix::from_name(name).with_context(|| {
        let names: Vec<&str> = Mix::ALL.iter().map(|m| m.name()).collect();
        format!("--quant: {name}, expected one of {}", names.join(", "))
    })
}

/// Returns a machine as [`machine()`] does, for plans of a model: without copies that are not of it.
///
/// # Errors
/// As those of [`machine()`]; or when the model cannot be read.
pub fn machine_for(path: &Path, model: &Path) -> Result<Machine> {
    let mut machine = self::machine(path)?;
    if !machine.extras.copies.is_empty() && named(model)? == Named::File {
        let gguf = Gguf::open(model)?;
        let spec = describe(&gguf).map_err(|e| naming(model, e))?;
        store::keep_copies_of(&gguf, &spec, &mut machine);
    }
    Ok(machine)
}

/// Returns a machine by file, or by bundled name if there is no such file.
///
/// # Errors
/// When the file cannot be read, or the name is unknown.
pub fn machine(path: &Path) -> Result<Machine> {
    match text(MACHINES, path) {
        Some(text) if !path.exists() => Ok(machine::decode(text.as_bytes(), path)?),
        None if !path.exists() && is_word(path) => bail!(
            "{}: no such file, and no machine of that name; bundled machines: {}",
            path.display(),
            names(MACHINES)
        ),
        _ => Ok(machine::read(path)?),
    }
}

fn text(of: &[(&str, &'static str)], name: &Path) -> Option<&'static str> {
    let name = name.to_str()?;
    of.iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, text)| *text)
}

fn names(of: &[(&str, &str)]) -> String {
    of.iter()
        .map(|(name, _)| *name)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Returns whether this is a bare word, without folders and without `.gguf` or `.toml`.
fn is_word(path: &Path) -> bool {
    let ours = |e: &std::ffi::OsStr| {
        ["gguf", "toml"]
            .iter()
            .any(|ours| e.eq_ignore_ascii_case(ours))
    };
    path.components().count() == 1
        && path.file_name().is_some()
        && !path.extension().is_some_and(ours)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn on_disk(folder: &str) -> BTreeSet<String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../profiles")
            .join(folder);
        let stem =
            |path: std::path::PathBuf| path.file_stem().unwrap().to_string_lossy().into_owned();
        std::fs::read_dir(folder)
            .unwrap()
            .map(|e| stem(e.unwrap().path()))
            .collect()
    }

    #[test]
    fn the_catalogue_is_the_folder() {
        let known = |of: &[(&str, &str)]| {
            of.iter()
                .map(|(n, _)| n.to_string())
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(known(MODELS), on_disk("models"));
        assert_eq!(known(MACHINES), on_disk("machines"));
        for (name, _) in MODELS {
            assert_eq!(
                model(Path::new(name), None).unwrap().shape.unwrap().0.name,
                *name
            );
        }
        for (name, _) in MACHINES {
            assert_eq!(machine(Path::new(name)).unwrap().name, *name);
        }
    }

    #[test]
    fn what_is_not_there_is_said() {
        let refused = |path: &str, quant, words: &str| {
            let error = model(Path::new(path), quant)
                .err()
                .map(|e| format!("{e:#}"))
                .unwrap_or_default();
            assert!(error.contains(words), "{path}: {error}");
        };
        refused(
            "kimi",
            None,
            "no shape of that name; bundled shapes: deepseek-r1, deepseek-v3",
        );
        refused(
            "kimi-k2",
            Some("q4"),
            "--quant: q4, expected one of bf16, f16",
        );
        refused("no/such.toml", None, "no/such.toml: No such file");
        refused("no-such.gguf", None, "no-such.gguf: No such file");
        refused(
            "no-such.gguf",
            Some("q2_k"),
            "is a model file, expected a shape",
        );
        let error = machine(Path::new("cray-1")).unwrap_err().to_string();
        assert!(
            error.contains("no machine of that name; bundled machines: article-4090x4"),
            "{error}"
        );
    }

    #[test]
    fn a_name_is_the_file_of_that_name() {
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../profiles/models/gpt-oss-20b.toml");
        assert_eq!(
            model(&file, Some("MXFP4")).unwrap(),
            model(Path::new("gpt-oss-20b"), Some("mxfp4")).unwrap()
        );
        assert_ne!(
            model(&file, None).unwrap(),
            model(&file, Some("mxfp4")).unwrap()
        );
    }
}
