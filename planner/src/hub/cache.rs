//! The cache of Hugging Face's own programs: blobs, snapshots that link to them, and refs.
//!
//! huggingface_hub, transformers, and llama.cpp use the same folders, so that a file is fetched
//! once for all of them.

use super::choose::{Digest, Listed};
use super::name::is_inner_path;
use crate::folders::{self, Environment};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Component, Path, PathBuf};
use tier_plan_runtime::formats::safely;

/// Most files of a snapshot that are looked at.
const MAX_FILES: usize = 10_000;

/// Most folders inside folders of a snapshot.
const MAX_DEPTH: usize = 8;

/// Where models come from and go to, as the environment says.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Address of the server, without a slash at its end.
    pub endpoint: String,
    /// Token to send to that server.
    pub token: Option<String>,
    /// Whether nothing may be asked of a server.
    pub is_offline: bool,
}

impl Settings {
    /// Reads the variables that huggingface_hub reads.
    ///
    /// # Errors
    /// When there is no home folder and none is given.
    pub fn from_env(env: Environment<'_>) -> Result<Self> {
        let cache = folders::hub(env).context(
            "no home folder is known; set HF_HOME to the folder of Hugging Face's cache",
        )?;
        let text = |name: &str| {
            let value = env(name).filter(|value| !value.is_empty());
            value.and_then(|value| value.into_string().ok())
        };
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| fs::read_to_string(folders::hub_token(env)?).ok());
        let token = token.map(|token| token.trim().to_string());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let is_on = |name: &str| {
            text(name).is_some_and(|value| {
                ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
            })
        };
        Ok(Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token: token.filter(|token| !token.is_empty()),
            is_offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        })
    }
}

/// The folder of a repository in the cache.
#[derive(Debug, Clone)]
pub struct RepoCache {
    root: PathBuf,
    folder: PathBuf,
    /// Name of the folder.
    name: String,
}

impl RepoCache {
    /// Returns the folder of `OWNER/REPO`, which may not exist.
    pub fn new(root: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self {
            root: root.to_path_buf(),
            folder: root.join(&name),
            name,
        }
    }

    /// Returns where the contents of a file are kept.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(digest.hex())
    }

    /// Returns where a file's contents are kept until all of them are there.
    pub fn incomplete(&self, digest: &Digest) -> PathBuf {
        let name = format!("{}.incomplete", digest.hex());
        self.folder.join("blobs").join(name)
    }

    /// Returns the file whose lock a program holds that fetches a blob.
    pub fn lock(&self, digest: &Digest) -> PathBuf {
        let folder = self.root.join(".locks").join(&self.name);
        folder.join(format!("{}.lock", digest.hex()))
    }

    /// Returns the path of a file in the snapshot of a commit.
    pub fn snapshot(&self, commit: &str, path: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit).join(path)
    }

    /// Returns the commit of a revision as it was when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) && self.folder.join("snapshots").join(revision).is_dir() {
            return Some(revision.to_string());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        is_commit(commit).then(|| commit.to_string())
    }

    /// Returns all commits that have a snapshot, that of a revision first.
    pub fn commits(&self, revision: &str) -> Vec<String> {
        let present = self.commit(revision);
        let entries = fs::read_dir(self.folder.join("snapshots"));
        let names = entries.into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let mut others: Vec<String> = names
            .filter(|name| is_commit(name) && Some(name) != present.as_ref())
            .collect();
        others.sort();
        present.into_iter().chain(others).collect()
    }

    /// Returns the complete files of a snapshot.
    pub fn files(&self, commit: &str) -> Vec<Listed> {
        files_below(&self.folder.join("snapshots").join(commit))
    }

    /// Whether a blob is there with all its bytes.
    pub fn has_blob(&self, file: &Listed) -> bool {
        let blob = file.digest.as_ref().map(|digest| self.blob(digest));
        blob.is_some_and(|blob| {
            fs::metadata(blob).is_ok_and(|m| m.is_file() && m.len() == file.bytes)
        })
    }

    /// Adds a file whose blob is there to the snapshot of a commit.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn link(&self, commit: &str, file: &Listed, digest: &Digest) -> Result<()> {
        let path = self.snapshot(commit, &file.path);
        let blob = self.blob(digest);
        if fs::canonicalize(&path).is_ok_and(|found| Some(found) == fs::canonicalize(&blob).ok()) {
            return Ok(());
        }
        let failed = || format!("making {}", path.display());
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(failed)?;
        let up: PathBuf = Path::new(&file.path)
            .components()
            .map(|_| Component::ParentDir)
            .chain([Component::ParentDir])
            .collect();
        let target = up.join("blobs").join(digest.hex());
        put_link(&target, &blob, &path).with_context(failed)
    }

    /// Notes which commit a revision is.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        safely::write(&path, commit.as_bytes())?;
        Ok(())
    }
}

/// Puts a link to `target` at `path`, whatever was there; where links cannot be made, the file
/// `found` itself.
pub fn put_link(target: &Path, found: &Path, path: &Path) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Two programs may do this at once, and a link cannot be replaced in one step.
    let temporary = path.with_file_name(format!(".{}.{}", std::process::id(), name));
    let _ = fs::remove_file(&temporary);
    #[cfg(unix)]
    {
        let _ = found;
        std::os::unix::fs::symlink(target, &temporary)?;
    }
    #[cfg(not(unix))]
    {
        let _ = target;
        fs::hard_link(found, &temporary).or_else(|_| fs::copy(found, &temporary).map(drop))?;
    }
    fs::rename(&temporary, path).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Whether text is the hash of a commit.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// Whether text is lowercase hexadecimal digits.
pub fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Returns the files below a folder that can be read, with paths as in a repository.
pub fn files_below(folder: &Path) -> Vec<Listed> {
    let mut files = Vec::new();
    let mut open = vec![(folder.to_path_buf(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let path = format!("{prefix}{name}");
            // A link whose blob is gone has no metadata.
            let Ok(metadata) = fs::metadata(entry.path()) else {
                continue;
            };
            if metadata.is_dir() && depth < MAX_DEPTH {
                open.push((entry.path(), format!("{path}/"), depth + 1));
            } else if metadata.is_file() && is_inner_path(&path) && files.len() < MAX_FILES {
                files.push(Listed {
                    path,
                    bytes: metadata.len(),
                    digest: None,
                });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_env(&|name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_environment_says_where_the_cache_is() {
        let cache = |variables: &[(&str, &str)]| settings(variables).unwrap().cache;
        let home = ("HOME", "/h");
        assert_eq!(cache(&[home]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(
            cache(&[home, ("XDG_CACHE_HOME", "/x")]),
            Path::new("/x/huggingface/hub")
        );
        assert_eq!(cache(&[home, ("HF_HOME", "/y")]), Path::new("/y/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "~/y")]), Path::new("/h/y/hub"));
        assert_eq!(
            cache(&[("HF_HOME", "/y"), ("HF_HUB_CACHE", "/z")]),
            Path::new("/z")
        );
        assert!(settings(&[]).is_err());
    }

    #[test]
    fn token_endpoint_and_offline_come_from_the_environment() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let plain = settings(&[("HF_HOME", home)]).unwrap();
        assert_eq!((plain.token, plain.is_offline), (None, false));
        fs::write(folder.path().join("token"), "from-file\n").unwrap();
        let token = |variables: &[(&str, &str)]| settings(variables).unwrap().token.unwrap();
        assert_eq!(token(&[("HF_HOME", home)]), "from-file");
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", " t ")]), "t");
        let path = folder.path().join("token");
        let elsewhere = [
            ("HF_HOME", "/none"),
            ("HF_TOKEN_PATH", path.to_str().unwrap()),
        ];
        assert_eq!(token(&elsewhere), "from-file");
        let set = [
            ("HF_HOME", home),
            ("HF_ENDPOINT", "http://x/"),
            ("HF_HUB_OFFLINE", "yes"),
        ];
        let set = settings(&set).unwrap();
        assert_eq!((set.endpoint.as_str(), set.is_offline), ("http://x", true));
    }

    #[test]
    fn a_snapshot_links_to_its_blobs() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path(), "me/m");
        let digest = Digest::Sha256("ab".repeat(32));
        let commit = "0".repeat(40);
        assert!(
            cache
                .blob(&digest)
                .starts_with(root.path().join("models--me--m/blobs"))
        );
        fs::create_dir_all(cache.blob(&digest).parent().unwrap()).unwrap();
        fs::write(cache.blob(&digest), b"abc").unwrap();
        for path in ["m.gguf", "Q8_0/deep/m.gguf"] {
            let file = Listed {
                path: path.into(),
                bytes: 3,
                digest: Some(digest.clone()),
            };
            assert!(cache.has_blob(&file));
            cache.link(&commit, &file, &digest).unwrap();
            cache.link(&commit, &file, &digest).unwrap();
            assert_eq!(fs::read(cache.snapshot(&commit, path)).unwrap(), b"abc");
            #[cfg(unix)]
            assert!(
                fs::read_link(cache.snapshot(&commit, path))
                    .unwrap()
                    .is_relative()
            );
        }
        assert_eq!(cache.commit("main"), None);
        cache.write_ref("main", &commit).unwrap();
        cache.write_ref("refs/pr/1", &commit).unwrap();
        assert_eq!(cache.commit("main").as_deref(), Some(commit.as_str()));
        assert_eq!(cache.commit("refs/pr/1"), cache.commit(&commit));
        let paths = |files: Vec<Listed>| files.into_iter().map(|f| f.path).collect::<Vec<_>>();
        assert_eq!(paths(cache.files(&commit)), ["Q8_0/deep/m.gguf", "m.gguf"]);
        fs::remove_file(cache.blob(&digest)).unwrap();
        #[cfg(unix)]
        assert!(cache.files(&commit).is_empty());
    }
}
