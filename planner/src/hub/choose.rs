//! Chooses the files of one model among those of a repository or folder.

use super::name::Pick;
use crate::printable::printable;
use crate::split_name::{gguf_stem, split_name};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::BTreeMap;
use tier_plan_runtime::units::show_bytes;

/// Most models that an error lists.
const MAX_SHOWN: usize = 40;

/// The quantization that is taken where none is named.
const DEFAULT_QUANTIZATION: &str = "Q4_K_M";

/// Beginnings of names of quantizations that a digit follows.
const NUMBERED: [&str; 4] = ["IQ", "TQ", "UQ", "Q"];

/// Other names of quantizations, as beginnings.
const NAMED: [&str; 8] = [
    "BF16", "F16", "F32", "FP16", "FP32", "MXFP4", "NVFP4", "FP8",
];

/// Checksum of a file, in lowercase hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256 of the contents: a file of Git LFS.
    Sha256(String),
    /// SHA-1 as git computes it: a small file.
    Git(String),
}

impl Digest {
    /// Returns the digits, which are the name of the file's blob.
    pub fn hex(&self) -> &str {
        match self {
            Digest::Sha256(hex) | Digest::Git(hex) => hex,
        }
    }
}

/// A file of a repository or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Path inside the repository, with `/` between folders.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// Checksum, where the listing has one.
    pub digest: Option<Digest>,
}

/// A model: one file, or the parts of a split one in order.
#[derive(Debug)]
struct Model<'a> {
    /// Path without ending and part number.
    stem: String,
    /// Parts by number, from 1.
    parts: BTreeMap<u32, &'a Listed>,
    /// Number of parts that there should be.
    count: u32,
}

impl Model<'_> {
    fn bytes(&self) -> u64 {
        let sizes = self.parts.values().map(|part| part.bytes);
        sizes.fold(0, u64::saturating_add)
    }

    fn is_whole(&self) -> bool {
        self.parts.len() as u64 == u64::from(self.count)
    }

    /// Returns the quantization, or the file where the name has none.
    fn shown(&self) -> String {
        let file = || {
            let first = self.parts.values().next();
            first.map_or_else(String::new, |part| printable(&part.path).into_owned())
        };
        let name = label(&self.stem).unwrap_or_else(file);
        let parts = match (self.is_whole(), self.count) {
            (true, 1) => String::new(),
            (true, count) => format!(" in {count} files"),
            (false, count) => format!(", {} of {count} files", self.parts.len()),
        };
        format!("{} ({}{parts})", printable(&name), show_bytes(self.bytes()))
    }
}

/// Splits the path of a GGUF file into stem, part number, and number of parts; `None` if it is no
/// model. A file that is not split is part 1 of 1.
fn split(path: &str) -> Option<(&str, u32, u32)> {
    let stem = gguf_stem(path)?;
    let file = stem.rsplit('/').next().unwrap_or(stem).to_ascii_lowercase();
    if file.is_empty() || file.contains("mmproj") || file.contains("imatrix") {
        return None;
    }
    let numbered = split_name(path).map(|split| (split.stem, split.number, split.count));
    Some(numbered.unwrap_or((stem, 1, 1)))
}

/// Returns the name of the quantization that a path ends with, in capitals: `UD-Q4_K_XL`.
fn label(stem: &str) -> Option<String> {
    let upper = stem.to_ascii_uppercase();
    let starts = upper.char_indices().filter(|(at, _)| {
        let before = upper[..*at].chars().next_back();
        before.is_none_or(|c| "/-._ ".contains(c))
    });
    let at = starts
        .map(|(at, _)| at)
        .rfind(|at| is_quantization(&upper[*at..]))?;
    let rest = &upper[at..];
    let end = rest.find(['/', '-', '.', ' ']).unwrap_or(rest.len());
    let is_dynamic = upper[..at].ends_with("UD-");
    Some(format!(
        "{}{}",
        if is_dynamic { "UD-" } else { "" },
        &rest[..end]
    ))
}

/// Whether text in capitals begins with the name of a quantization.
fn is_quantization(upper: &str) -> bool {
    let is_numbered = NUMBERED.iter().any(|kind| {
        let rest = upper.strip_prefix(kind);
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    is_numbered || NAMED.iter().any(|name| upper.starts_with(name))
}

/// Whether a quantization is named in a path: `Q4_K` is not where `Q4_K_M` stands.
fn names(stem: &str, quantization: &str) -> bool {
    let (stem, wanted) = (stem.to_ascii_uppercase(), quantization.to_ascii_uppercase());
    stem.match_indices(&wanted).any(|(at, _)| {
        let before = stem[..at].chars().next_back();
        let after = stem[at + wanted.len()..].chars().next();
        before.is_none_or(|c| !c.is_alphanumeric())
            && after.is_none_or(|c| !c.is_alphanumeric() && c != '_')
    })
}

/// Groups files into models, in the order of their paths.
fn models(files: &[Listed]) -> Vec<Model<'_>> {
    let mut models: BTreeMap<(String, u32), Model<'_>> = BTreeMap::new();
    for file in files {
        let Some((stem, number, count)) = split(&file.path) else {
            continue;
        };
        let key = (stem.to_string(), count);
        let model = models.entry(key).or_insert_with(|| Model {
            stem: stem.to_string(),
            parts: BTreeMap::new(),
            count,
        });
        model.parts.entry(number).or_insert(file);
    }
    models.into_values().collect()
}

/// Whether the files settle what a default pick means, whatever other files there are elsewhere.
pub fn has_default(files: &[Listed]) -> bool {
    let of_default = |m: &Model<'_>| label(&m.stem).as_deref() == Some(DEFAULT_QUANTIZATION);
    models(files).iter().any(of_default)
}

/// Returns the files of the model that is picked, the parts of a split one in their order.
///
/// # Errors
/// When none or several fit, or a part is missing. The error lists what there is.
pub fn choose(files: &[Listed], pick: &Pick) -> Result<Vec<Listed>> {
    let models = models(files);
    let model = fitting(&models, pick)?;
    if !model.is_whole() {
        let missing = (1..=model.count).find(|number| !model.parts.contains_key(number));
        bail!(
            "part {} of {} of {} is missing there",
            missing.unwrap_or(1),
            model.count,
            printable(&model.stem)
        );
    }
    Ok(model.parts.values().map(|part| (*part).clone()).collect())
}

/// Returns the first file that is there of the model that is picked, though parts may be missing.
///
/// # Errors
/// When none or several fit. The error lists what there is.
pub fn choose_first(files: &[Listed], pick: &Pick) -> Result<Listed> {
    let models = models(files);
    let model = fitting(&models, pick)?;
    let first = model.parts.values().next();
    first
        .map(|part| (*part).clone())
        .context("a model without files")
}

/// Returns the model that is picked.
fn fitting<'m, 'a>(models: &'m [Model<'a>], pick: &Pick) -> Result<&'m Model<'a>> {
    let there: Vec<String> = models.iter().take(MAX_SHOWN).map(Model::shown).collect();
    let more = match models.len().saturating_sub(MAX_SHOWN) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    let there = format!("{}{more}", there.join(", "));
    ensure!(!models.is_empty(), "no GGUF model is there");
    let fitting: Vec<&'m Model<'a>> = match pick {
        Pick::Named(named) if named.to_ascii_lowercase().ends_with(".gguf") => {
            let parts = |m: &Model<'_>| m.parts.values().any(|part| is_file(&part.path, named));
            models.iter().filter(|m| parts(m)).collect()
        }
        Pick::Named(named) => of_quantization(models, named),
        Pick::Default if models.len() == 1 => models.iter().collect(),
        Pick::Default => of_quantization(models, DEFAULT_QUANTIZATION),
    };
    match (fitting.as_slice(), pick) {
        ([model], _) => Ok(model),
        ([], Pick::Named(named)) => {
            bail!("no model fits '{}'; there are {there}", printable(named))
        }
        ([], Pick::Default) => bail!(
            "no quantization is named, and {DEFAULT_QUANTIZATION}, the default, is not there; there are {there}"
        ),
        (several, _) => {
            let firsts = several.iter().filter_map(|m| m.parts.values().next());
            let files: Vec<_> = firsts.take(MAX_SHOWN).map(|p| printable(&p.path)).collect();
            Err(anyhow!(
                "{} models fit, expected one: {}; there are {there}",
                several.len(),
                files.join(", ")
            ))
        }
    }
}

/// Whether a file is the one named, with or without its folders.
fn is_file(path: &str, named: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    path.eq_ignore_ascii_case(named) || name.eq_ignore_ascii_case(named)
}

/// Returns the models of exactly this quantization, or those whose path names it.
fn of_quantization<'m, 'a>(models: &'m [Model<'a>], named: &str) -> Vec<&'m Model<'a>> {
    let is_exact = |m: &&Model<'_>| label(&m.stem).is_some_and(|l| l.eq_ignore_ascii_case(named));
    let exact: Vec<_> = models.iter().filter(is_exact).collect();
    if exact.is_empty() {
        models.iter().filter(|m| names(&m.stem, named)).collect()
    } else {
        exact
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(paths: &[&str]) -> Vec<Listed> {
        let file = |path: &&str| Listed {
            path: (*path).to_string(),
            bytes: 1 << 30,
            digest: None,
        };
        paths.iter().map(file).collect()
    }

    fn named(text: &str) -> Pick {
        Pick::Named(text.to_string())
    }

    fn chosen(files: &[Listed], pick: &Pick) -> Vec<String> {
        let chosen = choose(files, pick).unwrap_or_else(|e| panic!("{pick:?}: {e}"));
        chosen.into_iter().map(|file| file.path).collect()
    }

    #[test]
    fn labels_are_found_in_names_and_folders() {
        for (stem, expected) in [
            ("Qwen3-30B-A3B-Q4_K_M", Some("Q4_K_M")),
            ("UD-Q4_K_XL/m-UD-Q4_K_XL", Some("UD-Q4_K_XL")),
            ("BF16/m", Some("BF16")),
            ("ggml-model-q4_0", Some("Q4_0")),
            ("model_iq2_xxs", Some("IQ2_XXS")),
            ("gpt-oss-120b-mxfp4", Some("MXFP4")),
            ("m.Q8_0", Some("Q8_0")),
            ("Qwen3-30B", None),
            ("q-star", None),
        ] {
            assert_eq!(label(stem).as_deref(), expected, "{stem}");
        }
    }

    #[test]
    fn a_quantization_is_found_whatever_its_case_and_folder() {
        let files = listed(&[
            "README.md",
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "m-IQ4_K_M.gguf",
            "UD-Q2_K_XL/m-UD-Q2_K_XL-00002-of-00002.gguf",
            "UD-Q2_K_XL/m-UD-Q2_K_XL-00001-of-00002.gguf",
            "mmproj-BF16.gguf",
            "mmproj-Q8_0.gguf",
        ]);
        assert_eq!(chosen(&files, &named("q4_k_m")), ["m-Q4_K_M.gguf"]);
        assert_eq!(chosen(&files, &Pick::Default), ["m-Q4_K_M.gguf"]);
        assert_eq!(chosen(&files, &named("M-q4_k_s.GGUF")), ["m-Q4_K_S.gguf"]);
        let both = [
            "UD-Q2_K_XL/m-UD-Q2_K_XL-00001-of-00002.gguf",
            "UD-Q2_K_XL/m-UD-Q2_K_XL-00002-of-00002.gguf",
        ];
        assert_eq!(chosen(&files, &named("UD-Q2_K_XL")), both);
        assert_eq!(chosen(&files, &named("Q2_K_XL")), both);
        assert_eq!(
            chosen(&files, &named("m-ud-q2_k_xl-00002-of-00002.gguf")),
            both
        );
        for none in ["Q4_K", "BF16", "Q8_0", "K_M_", "mmproj-Q8_0.gguf", "x.gguf"] {
            let error = choose(&files, &named(none)).unwrap_err().to_string();
            assert!(
                error.contains("no model fits") && error.contains("Q4_K_S (1.00 GiB)"),
                "{none}: {error}"
            );
        }
    }

    #[test]
    fn several_and_none_are_listed_with_sizes() {
        let files = listed(&["a/m-Q4_K_M.gguf", "b/m-Q4_K_M.gguf", "c-Q8_0.gguf"]);
        let error = choose(&files, &named("Q4_K_M")).unwrap_err().to_string();
        assert!(
            error.contains("2 models fit") && error.contains("b/m-Q4_K_M.gguf"),
            "{error}"
        );
        assert!(error.contains("Q8_0 (1.00 GiB)"), "{error}");
        assert_eq!(
            chosen(&files, &named("b/m-Q4_K_M.gguf")),
            ["b/m-Q4_K_M.gguf"]
        );
        let files = listed(&["m-Q8_0.gguf", "m-Q2_K.gguf"]);
        let error = choose(&files, &Pick::Default).unwrap_err().to_string();
        assert!(
            error.contains("Q4_K_M") && error.contains("Q2_K (1.00 GiB)"),
            "{error}"
        );
        assert_eq!(chosen(&files[..1], &Pick::Default), ["m-Q8_0.gguf"]);
        assert!(!has_default(&files) && has_default(&listed(&["x.q4_k_m.gguf"])));
        assert!(choose(&listed(&["README.md"]), &Pick::Default).is_err());
    }

    #[test]
    fn a_missing_part_is_named() {
        let files = listed(&["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"]);
        let error = choose(&files, &named("Q8_0")).unwrap_err().to_string();
        assert!(error.contains("part 2 of 3"), "{error}");
    }

    #[test]
    fn odd_names_do_no_harm() {
        let long = format!("{}.gguf", "é".repeat(3000));
        let odd = [
            "é.gguf",
            ".gguf",
            "gguf",
            "",
            "\u{1b}[31m.gguf",
            "x-99999-of-00001.gguf",
            &long,
        ];
        for path in odd {
            let files = listed(&[path]);
            for pick in [Pick::Default, named("é"), named("Q4_K_M")] {
                if let Err(error) = choose(&files, &pick) {
                    assert!(!error.to_string().contains('\u{1b}'));
                }
            }
        }
    }
}
