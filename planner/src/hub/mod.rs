//! Models by name: found in caches, or fetched from the hub.
//!
//! A name is resolved once, before its command runs, to the path of a file; see [`resolve`]. What
//! reads no weights gets files with headers alone, so that nothing is fetched to plan or predict.

mod ask;
mod cache;
mod choose;
mod client;
mod fetch;
mod header;
mod local;
mod name;
#[cfg(test)]
mod server_tests;
mod url;

pub use ask::this_machine;
pub use client::Unreachable;
pub use fetch::{SPACE_HINT, fits};

use crate::folders::{self, Environment};
use crate::hint::HintExt;
use crate::printable::printable;
use crate::{catalogue, progress};
use anyhow::{Context, Result, anyhow, bail};
use ask::{Offer, agree};
use cache::{RepoCache, Settings};
use choose::{Listed, choose, choose_first, has_default};
use client::{Client, Listing};
use header::Headers;
use name::{HubName, Name, Pick};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Tries of asking for a listing: fewer than in the middle of a fetch.
const LISTING_TRIES: u32 = 3;

/// How much of a model a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Its header: metadata and the shapes of its tensors.
    Header,
    /// All of it.
    Weights,
}

/// A model of which only the header is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToFetch {
    /// Its name, as it was given.
    pub name: String,
    /// Folder that it would be fetched to.
    pub folder: PathBuf,
    /// Bytes of its files, as the hub lists them.
    pub total_bytes: u64,
    /// Bytes of them that are not in the cache.
    pub missing_bytes: u64,
}

/// The file of a model that was given by name.
#[derive(Debug)]
pub struct Resolved {
    /// The file, or the first part.
    pub path: PathBuf,
    /// What is missing, where only headers were fetched.
    pub to_fetch: Option<ToFetch>,
    /// Where only headers were fetched: their folder, which is removed with this.
    _headers: Option<Headers>,
}

/// Resolves a model argument; `None` if it is a path. Fetches what is missing, after asking unless
/// `yes`.
///
/// # Errors
/// When there is no such model, it is not to be fetched, or fetching fails.
pub fn resolve(given: &Path, need: Need, yes: bool) -> Result<Option<Resolved>> {
    let env: Environment<'_> = &folders::variable;
    Ok(match name::parse(given)? {
        None => None,
        Some(Name::Ollama(name)) => Some(at(local::ollama(&name, env)?.linked())),
        Some(Name::LmStudio(name)) => Some(at(local::lm_studio(&name, env)?.linked())),
        Some(Name::Hub(name)) => {
            let settings = Settings::from_env(env)?;
            let client = Client::new(&settings)?;
            Some(Hub::new(&name, &settings, client).resolve(need, yes)?)
        }
    })
}

/// A model that was given by name, as it is on this machine.
#[derive(Debug, PartialEq, Eq)]
pub enum Here {
    /// First file that the cache of Hugging Face's tools has of it, in a snapshot.
    Cached(PathBuf),
    /// A file of another program.
    Foreign {
        /// First file.
        file: PathBuf,
        /// What removes it, as a clause.
        removed_by: String,
    },
}

/// Finds a model that is given by name on this machine, without asking a server; `None` if it is a
/// path.
///
/// # Errors
/// When there is no such model here, or several fit.
pub fn locate(given: &Path, env: Environment<'_>) -> Result<Option<Here>> {
    Ok(match name::parse(given)? {
        None => None,
        Some(Name::Ollama(name)) => Some(Here::Foreign {
            file: local::ollama(&name, env)?.file,
            removed_by: name.to_string().replacen(':', " rm ", 1),
        }),
        Some(Name::LmStudio(name)) => Some(Here::Foreign {
            file: local::lm_studio(&name, env)?.file,
            removed_by: "remove it in LM Studio".to_string(),
        }),
        Some(Name::Hub(name)) => {
            let root = folders::hub(env).context("no folder of cached models is known")?;
            Some(Here::Cached(first_cached(&name, &root)?))
        }
    })
}

/// Returns the first file that a cache has of a model. Without a revision it may be of any, since a
/// branch that has moved on leaves files behind.
fn first_cached(name: &HubName, root: &Path) -> Result<PathBuf> {
    let cache = RepoCache::new(root, &name.repo);
    let commits = match name.revision.as_str() {
        name::DEFAULT_REVISION => cache.commits(&name.revision),
        revision => cache.commit(revision).into_iter().collect(),
    };
    let (mut files, mut of) = (Vec::new(), BTreeMap::new());
    for commit in commits {
        for file in cache.files(&commit) {
            if !of.contains_key(&file.path) {
                of.insert(file.path.clone(), commit.clone());
                files.push(file);
            }
        }
    }
    let found = || format!("{name} in the cache at {}", root.display());
    let first = choose_first(&files, &name.pick)
        .with_context(found)
        .hint("`tier-plan models` lists what there is")?;
    let commit = of.get(&first.path).with_context(found)?;
    Ok(cache.snapshot(commit, &first.path))
}

/// Returns the folder that models are fetched to, if the environment names one.
pub fn folder() -> Option<PathBuf> {
    folders::hub(&folders::variable)
}

/// A repository of the hub, and the cache of its files.
struct Hub<'a> {
    name: &'a HubName,
    settings: &'a Settings,
    client: Client,
    cache: RepoCache,
}

impl<'a> Hub<'a> {
    fn new(name: &'a HubName, settings: &'a Settings, client: Client) -> Self {
        Self {
            name,
            settings,
            client,
            cache: RepoCache::new(&settings.cache, &name.repo),
        }
    }

    fn resolve(&self, need: Need, yes: bool) -> Result<Resolved> {
        let is_offline = self.settings.is_offline;
        let cached = self.cached();
        if let Some((path, true)) = cached {
            return Ok(at(path));
        }
        let listing = match (cached, is_offline) {
            (Some((path, _)), true) => return Ok(at(path)),
            (None, true) => {
                let missing = anyhow!(
                    "{}: not in the cache at {}, and HF_HUB_OFFLINE is set",
                    self.name,
                    self.settings.cache.display()
                );
                return Err(missing)
                    .hint("unset HF_HUB_OFFLINE, or set HF_HUB_CACHE to the folder that has it");
            }
            (cached, false) => match (self.list(cached.is_some()), cached) {
                (Ok(listing), _) => listing,
                (Err(error), Some((path, _))) if error.chain().any(|e| e.is::<Unreachable>()) => {
                    return Ok(at(path));
                }
                (Err(error), _) => return Err(error),
            },
        };
        let parts = choose(&listing.files, &self.name.pick)
            .with_context(|| self.name.to_string())
            .hint(format!(
                "name one, such as hf:{}:QUANTIZATION",
                self.name.repo
            ))?;
        if let Some(file) = parts.iter().find(|file| file.digest.is_none()) {
            let path = printable(&file.path);
            bail!(
                "{}: {path} is listed without a checksum, expected one",
                self.name
            );
        }
        let missing: Vec<&Listed> = parts.iter().filter(|f| !self.cache.has_blob(f)).collect();
        if missing.is_empty() {
            return self.linked(&listing, &parts);
        }
        let headers = self.headers(&listing, &parts)?;
        let kept = |file: &&Listed| fetch::kept_bytes(&self.cache, file);
        let left = missing.iter().map(|file| file.bytes - kept(file));
        let bytes = left.fold(0, u64::saturating_add);
        if need == Need::Header {
            let all = parts.iter().map(|file| file.bytes);
            return Ok(Resolved {
                path: headers.path.clone(),
                to_fetch: Some(ToFetch {
                    name: self.name.to_string(),
                    folder: self.settings.cache.clone(),
                    total_bytes: all.fold(0, u64::saturating_add),
                    missing_bytes: bytes,
                }),
                _headers: Some(headers),
            });
        }
        // A model that cannot be run is refused before its weights are fetched.
        let known = catalogue::model(&headers.path, None)
            .with_context(|| format!("{}: nothing was fetched", self.name))?;
        drop(headers);
        fetch::check_space(&self.settings.cache, bytes)?;
        let offer = Offer {
            name: &self.name.to_string(),
            bytes,
            files: missing.len(),
            folder: &self.settings.cache,
            known: &known,
        };
        agree(&offer, yes)?;
        self.fetch(&listing, &missing)?;
        self.linked(&listing, &parts)
    }

    /// Returns the model's path in the cache, and whether it is surely the one that is meant.
    /// Without a name of a quantization, that is so if the default one is there.
    fn cached(&self) -> Option<(PathBuf, bool)> {
        let commit = self.cache.commit(&self.name.revision)?;
        let files = self.cache.files(&commit);
        let first = choose(&files, &self.name.pick).ok()?.into_iter().next()?;
        let is_sure = self.name.pick != Pick::Default || has_default(&files);
        Some((self.cache.snapshot(&commit, &first.path), is_sure))
    }

    /// Asks the hub what the repository has.
    fn list(&self, is_cached: bool) -> Result<Listing> {
        // Where a model is there already, nobody waits for a server that cannot be reached.
        let tries = if is_cached { 1 } else { LISTING_TRIES };
        let bar = progress::steps();
        bar.set_message(format!("looking at {}", self.name.repo));
        let listing = self
            .client
            .listing(&self.name.repo, &self.name.revision, tries);
        bar.finish_and_clear();
        listing.with_context(|| self.name.to_string())
    }

    /// Reads the headers of a model's parts.
    fn headers(&self, listing: &Listing, parts: &[Listed]) -> Result<Headers> {
        let bar = progress::steps();
        bar.set_message("reading the header");
        let address = |file: &Listed| self.address(listing, file);
        let headers = header::read(&self.client, parts, &address);
        bar.finish_and_clear();
        headers.with_context(|| self.name.to_string())
    }

    fn address(&self, listing: &Listing, file: &Listed) -> String {
        let (repo, commit) = (&self.name.repo, &listing.commit);
        self.client.address(repo, commit, &file.path)
    }

    /// Fetches files one after another, with one bar for all.
    fn fetch(&self, listing: &Listing, files: &[&Listed]) -> Result<()> {
        let total = files
            .iter()
            .fold(0u64, |sum, file| sum.saturating_add(file.bytes));
        let bar = progress::bytes("fetching");
        bar.set_length(total);
        let mut before = 0;
        for (number, file) in files.iter().enumerate() {
            if files.len() > 1 {
                bar.set_message(format!("fetching {} of {}", number + 1, files.len()));
            }
            let mut is_new = false;
            let mut show = |have: u64, new: u64| {
                bar.set_position(before + have);
                // What an earlier fetch has left says nothing about the rate.
                if new > 0 && !std::mem::replace(&mut is_new, true) {
                    bar.reset_eta();
                }
            };
            let url = self.address(listing, file);
            let fetched = fetch::fetch(&self.client, &self.cache, &url, file, &mut show);
            if let Err(error) = fetched {
                bar.finish_and_clear();
                return Err(error).with_context(|| self.name.to_string());
            }
            before = before.saturating_add(file.bytes);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Puts a model whose blobs are all there into the snapshot of its commit.
    fn linked(&self, listing: &Listing, parts: &[Listed]) -> Result<Resolved> {
        for file in parts {
            if let Some(digest) = &file.digest {
                self.cache.link(&listing.commit, file, digest)?;
            }
        }
        self.cache.write_ref(&self.name.revision, &listing.commit)?;
        let first = parts.first().context("a model without files")?;
        Ok(at(self.cache.snapshot(&listing.commit, &first.path)))
    }
}

fn at(path: PathBuf) -> Resolved {
    Resolved {
        path,
        to_fetch: None,
        _headers: None,
    }
}
