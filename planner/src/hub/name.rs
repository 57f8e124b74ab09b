//! Names of models: `hf:OWNER/REPO`, `ollama:NAME`, and `lmstudio:PUBLISHER/REPO`.

use crate::hint::HintExt;
use crate::printable::printable;
use anyhow::{Result, anyhow};
use std::fmt;
use std::path::Path;

/// Revision of a repository where none is named.
pub const DEFAULT_REVISION: &str = "main";

/// Longest name that is read, in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// A model by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// A repository of Hugging Face.
    Hub(HubName),
    /// A model of ollama.
    Ollama(OllamaName),
    /// A model of LM Studio.
    LmStudio(LmStudioName),
}

/// Which model of a repository or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    /// Q4_K_M, or the only one.
    Default,
    /// A quantization, or a file with its folders.
    Named(String),
}

/// `hf:OWNER/REPO[:QUANTIZATION or FILE.gguf][@REVISION]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `OWNER/REPO`.
    pub repo: String,
    /// Which of its models.
    pub pick: Pick,
    /// Branch, tag, or commit; `main` where none is given.
    pub revision: String,
}

/// `ollama:[[HOST/]NAMESPACE/]NAME[:TAG]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OllamaName {
    /// Folders of the manifest: host, namespace, and name.
    pub folders: Vec<String>,
    /// File of the manifest; `latest` where none is given.
    pub tag: String,
}

/// `lmstudio:PUBLISHER/REPO[/FILE][:QUANTIZATION]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LmStudioName {
    /// `PUBLISHER/REPO`.
    pub repo: String,
    /// Which of its models.
    pub pick: Pick,
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repo)?;
        if let Pick::Named(pick) = &self.pick {
            write!(f, ":{}", printable(pick))?;
        }
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

impl fmt::Display for OllamaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let folders: Vec<&str> = self.folders.iter().map(String::as_str).collect();
        let shown = match folders.as_slice() {
            [OLLAMA_HOST, OLLAMA_NAMESPACE, name] => (*name).to_string(),
            [OLLAMA_HOST, rest @ ..] => rest.join("/"),
            all => all.join("/"),
        };
        write!(f, "ollama:{shown}:{}", self.tag)
    }
}

impl fmt::Display for LmStudioName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lmstudio:{}", self.repo)?;
        match &self.pick {
            Pick::Default => Ok(()),
            Pick::Named(pick) => write!(f, ":{}", printable(pick)),
        }
    }
}

/// Host and namespace of ollama's own models, which its names leave out.
const OLLAMA_HOST: &str = "registry.ollama.ai";
const OLLAMA_NAMESPACE: &str = "library";

/// Reads a model argument; `None` if it is a path. A file of that very name is taken as one.
///
/// # Errors
/// When it begins as a name and does not go on as one.
pub fn parse(given: &Path) -> Result<Option<Name>> {
    let Some(text) = given.to_str() else {
        return Ok(None);
    };
    let Some((scheme, rest)) = text.split_once(':') else {
        return Ok(None);
    };
    if !["hf", "ollama", "lmstudio"].contains(&scheme) || given.exists() {
        return Ok(None);
    }
    let (name, form) = match scheme {
        "hf" => (
            hub(rest).map(Name::Hub),
            "hf:OWNER/REPO[:QUANTIZATION or FILE.gguf][@REVISION]",
        ),
        "ollama" => (ollama(rest).map(Name::Ollama), "ollama:NAME[:TAG]"),
        _ => (
            lm_studio(rest).map(Name::LmStudio),
            "lmstudio:PUBLISHER/REPO[/FILE][:QUANTIZATION]",
        ),
    };
    let name = name.filter(|_| text.len() <= MAX_NAME_BYTES);
    match name {
        Some(name) => Ok(Some(name)),
        None => Err(anyhow!(
            "{}: not a model's name, expected {form}",
            printable(text)
        ))
        .hint("for example hf:unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M"),
    }
}

/// Whether text is one component of a path that stays where it is put: no folder, no `..`.
pub fn is_component(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && text != "."
        && text != ".."
        && !text.contains(['/', '\\', ':', '\0'])
        && !text.chars().any(crate::printable::is_control)
}

/// Whether text is a path of components, each of which [`is_component`] allows.
pub fn is_inner_path(text: &str) -> bool {
    text.len() <= MAX_NAME_BYTES && text.split('/').all(is_component)
}

/// Whether text is made of the characters that names of owners, repositories, and tags have.
fn is_plain(text: &str) -> bool {
    is_component(text)
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Returns the pick after a colon.
fn pick(text: Option<&str>) -> Option<Pick> {
    match text {
        None => Some(Pick::Default),
        Some(text) => is_inner_path(text).then(|| Pick::Named(text.to_string())),
    }
}

fn hub(text: &str) -> Option<HubName> {
    let (text, revision) = match text.rsplit_once('@') {
        Some((text, revision)) => (text, revision),
        None => (text, DEFAULT_REVISION),
    };
    let (repo, picked) = match text.split_once(':') {
        Some((repo, picked)) => (repo, Some(picked)),
        None => (text, None),
    };
    let (owner, name) = repo.split_once('/')?;
    // Folders of the cache join owner and name with two dashes.
    let fits = |part: &str| is_plain(part) && !part.contains("--");
    let is_valid = fits(owner) && fits(name) && revision.split('/').all(is_plain);
    is_valid.then_some(HubName {
        repo: repo.to_string(),
        pick: pick(picked)?,
        revision: revision.to_string(),
    })
}

fn ollama(text: &str) -> Option<OllamaName> {
    let (path, tag) = match text.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, tag),
        _ => (text, "latest"),
    };
    let parts: Vec<&str> = path.split('/').collect();
    let folders = match parts.as_slice() {
        [name] => vec![OLLAMA_HOST, OLLAMA_NAMESPACE, name],
        [namespace, name] => vec![OLLAMA_HOST, namespace, name],
        [host, namespace, name] => vec![*host, namespace, name],
        _ => return None,
    };
    let is_valid = is_plain(tag) && folders.iter().all(|folder| is_plain(folder));
    is_valid.then(|| OllamaName {
        folders: folders.into_iter().map(str::to_string).collect(),
        tag: tag.to_string(),
    })
}

fn lm_studio(text: &str) -> Option<LmStudioName> {
    let (path, quantization) = match text.split_once(':') {
        Some((path, quantization)) => (path, Some(quantization)),
        None => (text, None),
    };
    let mut parts = path.splitn(3, '/');
    let (publisher, repo, file) = (parts.next()?, parts.next()?, parts.next());
    let picked = match (file, quantization) {
        (Some(_), Some(_)) => return None,
        (file, quantization) => pick(file.or(quantization))?,
    };
    (is_component(publisher) && is_component(repo)).then(|| LmStudioName {
        repo: format!("{publisher}/{repo}"),
        pick: picked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Name> {
        parse(Path::new(text)).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn names_are_read_and_shown_as_they_are_written() {
        for text in [
            "hf:a/b",
            "hf:a/b.c-GGUF:Q4_K_M",
            "hf:a/b:UD-Q4_K_XL/x-00001-of-00002.gguf@refs/pr/1",
            "hf:a/b@0123abc",
        ] {
            let Some(Name::Hub(name)) = read(text) else {
                panic!("{text}")
            };
            assert_eq!(name.to_string(), text);
            assert_eq!(name.repo.split('/').count(), 2);
        }
        for (text, shown) in [
            ("ollama:qwen3", "ollama:qwen3:latest"),
            ("ollama:qwen3:30b-a3b", "ollama:qwen3:30b-a3b"),
            ("ollama:me/x:y", "ollama:me/x:y"),
            ("ollama:hf.co/a/b:Q8_0", "ollama:hf.co/a/b:Q8_0"),
        ] {
            let Some(Name::Ollama(name)) = read(text) else {
                panic!("{text}")
            };
            assert_eq!(name.to_string(), shown);
        }
        let Some(Name::LmStudio(name)) = read("lmstudio:p/r/x.gguf") else {
            panic!()
        };
        assert_eq!(name.pick, Pick::Named("x.gguf".into()));
        assert_eq!(
            read("lmstudio:p/r:Q8_0").unwrap(),
            read("lmstudio:p/r/Q8_0").unwrap()
        );
    }

    #[test]
    fn paths_are_no_names() {
        for text in [
            "model.gguf",
            "./hf/x.gguf",
            "C:\\x.gguf",
            "kimi-k2.5",
            "http://x",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for text in [
            "hf:",
            "hf:a",
            "hf:/b",
            "hf:a/../b",
            "hf:../b",
            "hf:a/b/c",
            "hf:a/b:",
            "hf:a/b:../../x.gguf",
            "hf:a/b:/etc/x.gguf",
            "hf:a/b:x\u{1b}.gguf",
            "hf:a--c/b",
            "hf:a/b@..",
            "hf:a/b@x/../y",
            "hf:a b/c",
            "ollama:",
            "ollama:../x",
            "ollama:a/b/c/d",
            "ollama:x:..",
            "lmstudio:p",
            "lmstudio:../r",
            "lmstudio:p/r/../x",
            "lmstudio:p/r/f:Q8_0",
        ] {
            let error = parse(Path::new(text)).expect_err(text);
            assert!(error.to_string().contains("expected"), "{text}: {error}");
            assert!(!error.to_string().contains('\u{1b}'));
        }
        assert!(parse(Path::new(&format!("hf:a/b:{}", "x".repeat(5000)))).is_err());
    }
}
