//! Models of ollama and LM Studio, found by name and only read.
//!
//! Links to their files, in a folder of this program, have names that end in `.gguf`. What other
//! commands write beside a model comes to lie there, and not among the files of another program.

use super::cache::{files_below, is_hex, put_link};
use super::choose::{Listed, choose};
use super::name::{LmStudioName, OllamaName, is_component};
use crate::folders::{self, Environment};
use crate::hint::HintExt;
use crate::printable::printable;
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most bytes of a manifest.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Most models that an error lists.
const MAX_SHOWN: usize = 40;

/// The layer of a manifest that is the model.
const MODEL_LAYER: &str = "application/vnd.ollama.image.model";

/// A file of a model, and the path of its link in the folder of links.
struct Link {
    inside: PathBuf,
    file: PathBuf,
}

/// A model of another program.
pub struct Foreign {
    /// First file.
    pub file: PathBuf,
    links: Vec<Link>,
    /// Folder of links.
    folder: Option<PathBuf>,
}

/// Finds a model of ollama.
///
/// # Errors
/// When there is none of that name, or its manifest is damaged.
pub fn ollama(name: &OllamaName, env: Environment<'_>) -> Result<Foreign> {
    let mut folders = folders::ollama(env);
    if folders.len() > 1 {
        folders.retain(|folder| folder.is_dir());
    }
    for folder in &folders {
        let mut manifest = folder.join("manifests");
        manifest.extend(&name.folders);
        manifest.push(&name.tag);
        if manifest.is_file() {
            let digest = model_digest(&manifest)?;
            let blob = folder.join("blobs").join(format!("sha256-{digest}"));
            if !blob.is_file() {
                let missing = anyhow!("{name}: {} is missing, expected the model", blob.display());
                return Err(missing).hint("pull the model again with ollama");
            }
            let model = name.folders.last().map_or("model", String::as_str);
            let file = format!("{model}-{}.gguf", name.tag);
            let mut inside: PathBuf = name.folders.iter().collect();
            inside.push(&file);
            return Ok(Foreign {
                file: blob.clone(),
                links: vec![Link { inside, file: blob }],
                folder: folders::ollama_links(env),
            });
        }
    }
    let there: Vec<String> = folders
        .iter()
        .flat_map(|folder| manifests(folder))
        .collect();
    let searched = match folders.as_slice() {
        [] => "~/.ollama/models".to_string(),
        all => joined(all),
    };
    let missing = anyhow!("{name}: no such model in {searched}; {}", there_are(&there));
    Err(missing)
        .hint("set OLLAMA_MODELS to the folder of ollama's models, or pull the model with ollama")
}

/// Returns folders in a sentence.
fn joined(folders: &[PathBuf]) -> String {
    let shown: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    shown.join(" and ")
}

/// Returns the list of what there is, as the end of a sentence.
fn there_are(names: &[String]) -> String {
    match names.len() {
        0 => "there are none".to_string(),
        n if n > MAX_SHOWN => format!(
            "there are {}, and {} more",
            names[..MAX_SHOWN].join(", "),
            n - MAX_SHOWN
        ),
        _ => format!("there are {}", names.join(", ")),
    }
}

/// Returns the names of all models of ollama.
fn manifests(folder: &Path) -> Vec<String> {
    let shown = |file: Listed| {
        let parts: Vec<&str> = file.path.split('/').collect();
        let [folders @ .., tag] = parts.as_slice() else {
            return None;
        };
        let name = OllamaName {
            folders: folders.iter().map(|f| (*f).to_string()).collect(),
            tag: (*tag).to_string(),
        };
        Some(printable(&name.to_string()).into_owned())
    };
    let files = files_below(&folder.join("manifests"));
    files.into_iter().filter_map(shown).collect()
}

/// Reads the digits of the model's checksum from a manifest.
fn model_digest(manifest: &Path) -> Result<String> {
    let shown = || manifest.display().to_string();
    let mut text = String::new();
    File::open(manifest)
        .and_then(|file| file.take(MAX_MANIFEST_BYTES).read_to_string(&mut text))
        .with_context(shown)?;
    let value: Value = serde_json::from_str(&text)
        .with_context(|| format!("{}: not a manifest of ollama", manifest.display()))?;
    let layers = value["layers"].as_array().map(Vec::as_slice);
    let models: Vec<&str> = layers
        .unwrap_or_default()
        .iter()
        .filter(|layer| layer["mediaType"] == MODEL_LAYER)
        .filter_map(|layer| layer["digest"].as_str())
        .collect();
    let [digest] = models.as_slice() else {
        bail!(
            "{}: {} layers with a model, expected one",
            manifest.display(),
            models.len()
        );
    };
    let hex = digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && is_hex(hex));
    let hex = hex.with_context(|| {
        let found = printable(digest);
        format!(
            "{}: digest '{found}', expected sha256: and 64 digits",
            manifest.display()
        )
    })?;
    Ok(hex.to_string())
}

/// Finds a model of LM Studio.
///
/// # Errors
/// When there is none of that name, or several fit.
pub fn lm_studio(name: &LmStudioName, env: Environment<'_>) -> Result<Foreign> {
    let folders = folders::lm_studio(env);
    ensure!(
        !folders.is_empty(),
        "no home folder is known, expected one with LM Studio's models"
    );
    for folder in &folders {
        let repo = folder.join(&name.repo);
        if !repo.is_dir() {
            continue;
        }
        let chosen = choose(&files_below(&repo), &name.pick);
        let parts = chosen.with_context(|| format!("{name} in {}", repo.display()))?;
        let link = |part: &Listed| Link {
            inside: Path::new(&name.repo).join(&part.path),
            file: repo.join(&part.path),
        };
        let links: Vec<Link> = parts.iter().map(link).collect();
        let first = links.first().context("a model without files")?;
        return Ok(Foreign {
            file: first.file.clone(),
            links,
            folder: folders::lm_studio_links(env),
        });
    }
    let mut there: Vec<String> = Vec::new();
    for publisher in folders.iter().flat_map(|folder| entries(folder)) {
        let name = publisher
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        for repo in entries(&publisher).iter().filter(|repo| repo.is_dir()) {
            let repo = repo
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if is_component(&name) && is_component(&repo) {
                there.push(format!("lmstudio:{name}/{repo}"));
            }
        }
    }
    there.sort();
    there.dedup();
    bail!(
        "{name}: no such folder in {}; {}",
        joined(&folders),
        there_are(&there)
    )
}

/// Returns what is in a folder.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

impl Foreign {
    /// Makes links to the files, and returns the first; the file itself where links cannot be made.
    pub fn linked(self) -> PathBuf {
        let Some(folder) = self.folder else {
            return self.file;
        };
        let mut first = None;
        for Link { inside, file } in self.links {
            let path = folder.join(inside);
            // A relative folder of models would make a link that leads elsewhere.
            let Ok(target) = fs::canonicalize(file) else {
                return self.file;
            };
            let is_made = fs::read_link(&path).is_ok_and(|found| found == target)
                || path
                    .parent()
                    .is_some_and(|parent| fs::create_dir_all(parent).is_ok())
                    && make_link(&target, &path);
            if !is_made {
                return self.file;
            }
            first.get_or_insert(path);
        }
        first.unwrap_or(self.file)
    }
}

/// Makes a link, where the system has them.
fn make_link(target: &Path, path: &Path) -> bool {
    cfg!(unix) && put_link(target, target, path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::name::{Name, parse};
    use super::*;
    use std::ffi::OsString;

    fn put(path: &Path, bytes: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn find(name: &str, home: &Path, models: Option<&Path>) -> Result<PathBuf> {
        let env = |variable: &str| match variable {
            "HOME" => Some(home.as_os_str().to_os_string()),
            "OLLAMA_MODELS" => models.map(|folder| OsString::from(folder.as_os_str())),
            _ => None,
        };
        match parse(Path::new(name)).unwrap().unwrap() {
            Name::Ollama(name) => Ok(ollama(&name, &env)?.linked()),
            Name::LmStudio(name) => Ok(lm_studio(&name, &env)?.linked()),
            Name::Hub(name) => panic!("{name}"),
        }
    }

    fn manifest(digest: &str) -> Vec<u8> {
        serde_json::json!({"layers": [
            {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00"},
            {"mediaType": MODEL_LAYER, "digest": digest},
        ]})
        .to_string()
        .into_bytes()
    }

    #[test]
    fn ollama_is_found_by_manifest_and_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let models = home.path().join(".ollama/models");
        let digits = "ab".repeat(32);
        let of = |name: &str| {
            models
                .join("manifests/registry.ollama.ai/library")
                .join(name)
        };
        put(&of("tiny/latest"), &manifest(&format!("sha256:{digits}")));
        put(&models.join(format!("blobs/sha256-{digits}")), b"GGUF");
        let before = files_below(&models);
        for elsewhere in [None, Some(models.as_path())] {
            let path = find("ollama:tiny", home.path(), elsewhere).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"GGUF");
            #[cfg(unix)]
            assert!(
                path.ends_with("registry.ollama.ai/library/tiny/tiny-latest.gguf"),
                "{path:?}"
            );
        }
        assert_eq!(files_below(&models), before);
        let error = find("ollama:tiny:7b", home.path(), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("there are ollama:tiny:latest"), "{error}");
        for bad in [
            "sha256:../../x",
            "md5:00",
            &format!("sha256:{}", "ab".repeat(31)),
        ] {
            put(&of("bad/latest"), &manifest(bad));
            let error = find("ollama:bad", home.path(), None)
                .unwrap_err()
                .to_string();
            assert!(error.contains("64 digits"), "{error}");
        }
        put(
            &of("gone/latest"),
            &manifest(&format!("sha256:{}", "cd".repeat(32))),
        );
        let error = find("ollama:gone", home.path(), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("is missing"), "{error}");
        put(&of("odd/latest"), b"{");
        assert!(find("ollama:odd", home.path(), None).is_err());
    }

    #[test]
    fn lm_studio_is_found_in_both_folders() {
        let home = tempfile::tempdir().unwrap();
        let new = home.path().join(".lmstudio/models/me/m-GGUF");
        put(&new.join("m-Q8_0-00001-of-00002.gguf"), b"1");
        put(&new.join("m-Q8_0-00002-of-00002.gguf"), b"2");
        put(&new.join("m-Q4_K_M.gguf"), b"3");
        let old = home.path().join(".cache/lm-studio/models/me/old");
        put(&old.join("old.gguf"), b"4");
        let bytes = |name: &str| {
            let path = find(name, home.path(), None).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            fs::read(path).unwrap()
        };
        assert_eq!(bytes("lmstudio:me/m-GGUF"), b"3");
        assert_eq!(bytes("lmstudio:me/m-GGUF:q8_0"), b"1");
        assert_eq!(bytes("lmstudio:me/m-GGUF/m-Q4_K_M.gguf"), b"3");
        assert_eq!(bytes("lmstudio:me/old"), b"4");
        let first = find("lmstudio:me/m-GGUF:q8_0", home.path(), None).unwrap();
        assert!(first.with_file_name("m-Q8_0-00002-of-00002.gguf").is_file());
        let error = format!(
            "{:#}",
            find("lmstudio:me/x", home.path(), None).unwrap_err()
        );
        assert!(
            error.contains("lmstudio:me/m-GGUF, lmstudio:me/old"),
            "{error}"
        );
        let error = format!(
            "{:#}",
            find("lmstudio:me/old:Q2_K", home.path(), None).unwrap_err()
        );
        assert!(error.contains("no model fits 'Q2_K'"), "{error}");
    }
}
