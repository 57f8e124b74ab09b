//! The files of this folder, compiled in, so that they are wherever the program is.
#![forbid(unsafe_code)]

/// Includes text files of a folder as pairs of a name and a text.
macro_rules! texts {
    ($before:literal, $after:literal, [$($name:literal),* $(,)?]) => {
        &[$(($name, include_str!(concat!("../", $before, $name, $after)))),*]
    };
}

/// `(name, text)` per shape of a model.
#[rustfmt::skip]
pub const MODELS: &[(&str, &str)] = texts!("models/", ".toml", [
    "deepseek-r1",
    "deepseek-v3",
    "deepseek-v4-flash",
    "deepseek-v4.1-flash",
    "gemma-4-26b-a4b",
    "glm-4.5",
    "glm-4.5-air",
    "glm-4.6",
    "glm-5.2",
    "glm-5.3-flash",
    "gpt-oss-120b",
    "gpt-oss-20b",
    "hy3",
    "kimi-k2",
    "kimi-k2.5",
    "kimi-k3",
    "ling-1t",
    "ling-flash-2.0",
    "llama-3.1-405b",
    "mimo-v2-flash",
    "minimax-m2",
    "minimax-m3",
    "mixtral-8x22b",
    "mixtral-8x7b",
    "moe-10t",
    "nemotron-3-nano-30b",
    "nemotron-3-super-120b",
    "qwen3-235b-a22b",
    "qwen3-30b-a3b",
    "qwen3.8-flash-next",
    "step-3.5-flash",
]);

/// `(name, text)` per machine.
#[rustfmt::skip]
pub const MACHINES: &[(&str, &str)] = texts!("machines/", ".toml", [
    "article-4090x4",
    "article-a100-80",
    "article-cxl-4tb",
    "article-h100x8",
    "article-optane-4090",
    "ddr4-8ch-5090",
    "demo-emulated",
    "desktop-4090-ddr5-nvme",
    "desktop-5070-ddr5",
    "desktop-5090-gen5",
    "epyc-7443p-3090",
    "epyc-9965",
    "optane-768",
    "vm-2core-avx512",
    "xeon-6248x2-ada",
    "xeon-6252n-x4-3090",
    "xeon-8480x2-4090",
]);

/// `(path below prompts/, text)` per calibration prompt, with their sources and licenses.
#[rustfmt::skip]
pub const PROMPTS: &[(&str, &str)] = texts!("prompts/", "", [
    "LICENSE-PYTHON.txt",
    "README.md",
    "code/heldout-1.txt",
    "code/heldout-2.txt",
    "code/train-1.txt",
    "code/train-2.txt",
    "code/train-3.txt",
    "code/train-4.txt",
    "dictionary/heldout-1.txt",
    "dictionary/heldout-2.txt",
    "dictionary/train-1.txt",
    "dictionary/train-2.txt",
    "dictionary/train-3.txt",
    "dictionary/train-4.txt",
    "manuals/heldout-1.txt",
    "manuals/heldout-2.txt",
    "manuals/train-1.txt",
    "manuals/train-2.txt",
    "manuals/train-3.txt",
    "manuals/train-4.txt",
    "scripture/heldout-1.txt",
    "scripture/heldout-2.txt",
    "scripture/train-1.txt",
    "scripture/train-2.txt",
    "scripture/train-3.txt",
    "scripture/train-4.txt",
]);

/// Path of the demo model below this folder.
pub const DEMO_MODEL_PATH: &str = "demo/demo.gguf";

/// The demo model, a GGUF file. `None` in builds from crates.io, whose packages are too small for it.
#[cfg(demo_model)]
pub const DEMO_MODEL: Option<&[u8]> = Some(include_bytes!("../demo/demo.gguf"));

/// The demo model, a GGUF file. `None` in builds from crates.io, whose packages are too small for it.
#[cfg(not(demo_model))]
pub const DEMO_MODEL: Option<&[u8]> = None;

/// A file of this folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundledFile {
    /// Path below this folder, with `/` between its parts.
    pub path: String,
    /// Contents.
    pub bytes: &'static [u8],
}

/// Returns the file at `path`, or all files below the folder `path`, in a fixed order. The path is
/// relative to this folder. Nothing is returned for a path that is not compiled in.
pub fn files(path: &str) -> Vec<BundledFile> {
    let all = texts(MODELS, "models/", ".toml")
        .chain(texts(MACHINES, "machines/", ".toml"))
        .chain(texts(PROMPTS, "prompts/", ""))
        .chain(DEMO_MODEL.map(|bytes| BundledFile {
            path: DEMO_MODEL_PATH.into(),
            bytes,
        }));
    all.filter(|file| is_at_or_below(&file.path, path))
        .collect()
}

fn texts(
    of: &'static [(&str, &str)],
    before: &'static str,
    after: &'static str,
) -> impl Iterator<Item = BundledFile> {
    of.iter().map(move |(name, text)| BundledFile {
        path: format!("{before}{name}{after}"),
        bytes: text.as_bytes(),
    })
}

fn is_at_or_below(file: &str, path: &str) -> bool {
    let path = path.trim_end_matches('/');
    file.strip_prefix(path)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    fn below(folder: &str, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.to_str().unwrap().replace('\\', "/");
            if path.is_dir() {
                below(&name, found);
            } else {
                found.insert(name);
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_compiled_in_with_its_bytes() {
        for folder in ["models", "machines", "prompts"] {
            let compiled = files(folder);
            let mut expected = BTreeSet::new();
            below(folder, &mut expected);
            let paths: BTreeSet<String> = compiled.iter().map(|f| f.path.clone()).collect();
            assert_eq!(paths, expected);
            for file in compiled {
                assert_eq!(std::fs::read(&file.path).unwrap(), file.bytes);
            }
        }
    }

    #[test]
    fn the_demo_model_is_compiled_in_where_its_file_is() {
        let on_disk = Path::new(DEMO_MODEL_PATH).is_file();
        assert_eq!(DEMO_MODEL.is_some(), on_disk);
        assert_eq!(files(DEMO_MODEL_PATH).len(), usize::from(on_disk));
    }

    #[test]
    fn a_path_names_a_file_or_a_whole_folder_and_nothing_beside_it() {
        assert_eq!(files("machines/demo-emulated.toml").len(), 1);
        assert_eq!(files("prompts/code/").len(), files("prompts/code").len());
        for path in ["", "..", "prompt", "machines/demo", "prompts/../demo"] {
            assert_eq!(files(path), [], "{path}");
        }
    }
}
