//! The client, the cache, and fetching against a server on this machine, also one that fails.

mod fetching;
mod models;

use crate::hub::cache::{RepoCache, Settings};
use crate::hub::choose::{Digest, Listed};
use crate::hub::client::{Client, Unreachable};
use crate::hub::name::{HubName, Name, parse};
use crate::hub::{Hub, Need, Resolved, fetch};
use anyhow::Result;
use ring::digest::{SHA256, digest};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_testing::demo_model;
use tier_plan_testing::http::{Reply, Request, Server};

/// The commit of every listing here.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn sha256(bytes: &[u8]) -> String {
    let hash = digest(&SHA256, bytes);
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes that differ from each other at every position that a mistake would confuse.
fn contents(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn listed(path: &str, bytes: &[u8]) -> Listed {
    Listed {
        path: path.to_string(),
        bytes: bytes.len() as u64,
        digest: Some(Digest::Sha256(sha256(bytes))),
    }
}

/// A cache in a folder of its own, and what the environment would say.
struct Place {
    folder: TempDir,
    settings: Settings,
}

impl Place {
    fn new(server: &Server) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            cache: folder.path().join("hub"),
            endpoint: server.address().to_string(),
            token: None,
            is_offline: false,
        };
        Self { folder, settings }
    }

    fn client(&self) -> Client {
        let mut client = Client::new(&self.settings).unwrap();
        client.first_wait = Duration::from_millis(1);
        client
    }

    fn cache(&self) -> RepoCache {
        RepoCache::new(&self.settings.cache, "me/m")
    }

    /// Fetches one file; returns its bytes, and those that came just now.
    fn fetch(&self, file: &Listed) -> Result<(Vec<u8>, u64)> {
        let (client, cache) = (self.client(), self.cache());
        let mut new = 0;
        let url = client.address("me/m", COMMIT, &file.path);
        let digest = fetch::fetch(&client, &cache, &url, file, &mut |_, n| new += n)?;
        assert!(!cache.incomplete(&digest).exists());
        Ok((fs::read(cache.blob(&digest))?, new))
    }

    /// Leaves the beginning of a file as an interrupted fetch does.
    fn leave(&self, file: &Listed, bytes: &[u8]) {
        let path = self.incomplete(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn incomplete(&self, file: &Listed) -> PathBuf {
        self.cache().incomplete(file.digest.as_ref().unwrap())
    }

    fn resolve(&self, name: &str, need: Need) -> Result<Resolved> {
        Hub::new(&hub_name(name), &self.settings, self.client()).resolve(need, true)
    }
}

fn hub_name(name: &str) -> HubName {
    match parse(Path::new(name)).unwrap() {
        Some(Name::Hub(name)) => name,
        other => panic!("{other:?}"),
    }
}

/// A hub with one repository of these files.
fn hub_of(files: Vec<(&'static str, Vec<u8>)>) -> Server {
    Server::start(move |request| answer(&files, request))
}

fn answer(files: &[(&str, Vec<u8>)], request: &Request) -> Reply {
    if let Some(revision) = request.path.strip_prefix("/api/models/me/m/revision/") {
        let siblings: Vec<_> = files
            .iter()
            .map(|(path, bytes)| {
                json!({"rfilename": path, "size": bytes.len(), "lfs": {"sha256": sha256(bytes), "size": bytes.len()}})
            })
            .collect();
        let known = ["main", COMMIT].iter().any(|r| revision.starts_with(r));
        let listing = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return if known {
            Reply::whole(listing.as_bytes())
        } else {
            Reply::status(404)
        };
    }
    let prefix = format!("/me/m/resolve/{COMMIT}/");
    let path = request.path.strip_prefix(&prefix);
    let file = files.iter().find(|(name, _)| Some(*name) == path);
    file.map_or(Reply::status(404), |(_, bytes)| {
        Reply::ranged(request, bytes)
    })
}

fn message(error: &anyhow::Error) -> String {
    format!(
        "{error:#} {}",
        crate::hint::hint_for(error).unwrap_or_default()
    )
}
