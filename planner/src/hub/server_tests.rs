//! The client, the cache, and fetching against a server on this machine, also one that fails.

use super::cache::{RepoCache, Settings};
use super::choose::{Digest, Listed};
use super::client::{Client, Unreachable};
use super::name::{HubName, Name, parse};
use super::{Hub, Need, Resolved, fetch};
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

#[test]
fn a_file_is_fetched_once() {
    let bytes = contents(3_000_000);
    let served = bytes.clone();
    let server = Server::start(move |request| Reply::ranged(request, &served));
    let (place, file) = (Place::new(&server), listed("m.gguf", &bytes));
    let (found, new) = place.fetch(&file).unwrap();
    assert!(found == bytes && new == 3_000_000);
    assert_eq!(server.requests().len(), 1);
    let (found, new) = place.fetch(&file).unwrap();
    assert!(found == bytes && new == 0);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn an_earlier_fetch_goes_on_where_it_ended() {
    let bytes = contents(2_500_000);
    let served = bytes.clone();
    let server = Server::start(move |request| Reply::ranged(request, &served));
    let (place, file) = (Place::new(&server), listed("m.gguf", &bytes));
    place.leave(&file, &bytes[..1_200_001]);
    let (found, new) = place.fetch(&file).unwrap();
    assert!(found == bytes && new == 1_299_999);
    assert_eq!(server.requests()[0].range, Some((1_200_001, None)));
    // All bytes, or too many.
    for kept in [bytes.clone(), contents(2_500_001)] {
        let place = Place::new(&server);
        place.leave(&file, &kept);
        assert!(place.fetch(&file).unwrap().0 == bytes);
    }
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let bytes = contents(1_000_000);
    let served = bytes.clone();
    let server = Server::start(move |request| Reply {
        cut: Some(150_000),
        ..Reply::ranged(request, &served)
    });
    let (place, file) = (Place::new(&server), listed("m.gguf", &bytes));
    assert!(place.fetch(&file).unwrap().0 == bytes);
    let starts: Vec<_> = server
        .requests()
        .iter()
        .map(|r| r.range.unwrap().0)
        .collect();
    assert_eq!(
        starts,
        [0, 150_000, 300_000, 450_000, 600_000, 750_000, 900_000]
    );
}

#[test]
fn a_server_that_never_gets_further_is_given_up() {
    let bytes = contents(500_000);
    let (served, requests) = (bytes.clone(), AtomicUsize::new(0));
    let server = Server::start(move |request| {
        let cut = if requests.fetch_add(1, Ordering::Relaxed) == 0 {
            100_000
        } else {
            0
        };
        Reply {
            cut: Some(cut),
            ..Reply::ranged(request, &served)
        }
    });
    let (place, file) = (Place::new(&server), listed("m.gguf", &bytes));
    let error = place.fetch(&file).unwrap_err();
    assert!(error.is::<Unreachable>(), "{error:#}");
    assert!(
        message(&error).contains("what was fetched is kept"),
        "{}",
        message(&error)
    );
    assert_eq!(
        fs::read(place.incomplete(&file)).unwrap(),
        &bytes[..100_000]
    );
    assert!(server.requests().len() < 10);
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let bytes = contents(700_000);
    let served = bytes.clone();
    let server = Server::start(move |_| Reply::whole(&served));
    let (place, file) = (Place::new(&server), listed("m.gguf", &bytes));
    place.leave(&file, &bytes[..300_000]);
    let (found, new) = place.fetch(&file).unwrap();
    assert!(found == bytes && new == 700_000);
}

#[test]
fn a_wrong_checksum_leaves_nothing() {
    let bytes = contents(400_000);
    let mut served = bytes.clone();
    served[399_999] ^= 1;
    let server = Server::start(move |request| Reply::ranged(request, &served));
    let (place, file) = (Place::new(&server), listed("m.gguf", &bytes));
    let error = message(&place.fetch(&file).unwrap_err());
    assert!(
        error.contains("checksum") && error.contains(&sha256(&bytes)),
        "{error}"
    );
    assert!(!place.incomplete(&file).exists());
    // A beginning that belongs to another file, too.
    let server = hub_of(vec![("m.gguf", bytes.clone())]);
    let place = Place::new(&server);
    place.leave(&file, &[7; 1000]);
    assert!(message(&place.fetch(&file).unwrap_err()).contains("checksum"));
    assert!(place.fetch(&file).unwrap().0 == bytes);
}

#[test]
fn checksums_of_git_are_checked_too() {
    let server = Server::start(|request| Reply::ranged(request, b"hello\n"));
    let place = Place::new(&server);
    // As `git hash-object` prints it.
    for (digest, fits) in [
        ("ce013625030ba8dba906f756967f9e9ca394464a", true),
        ("ce013625030ba8dba906f756967f9e9ca394464b", false),
    ] {
        let file = Listed {
            path: "x.gguf".into(),
            bytes: 6,
            digest: Some(Digest::Git(digest.into())),
        };
        assert_eq!(place.fetch(&file).is_ok(), fits);
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let bytes = contents(100_000);
    let file = listed("m.gguf", &bytes);
    let longer = contents(100_001);
    let shorter = contents(99_999);
    for other in [longer.clone(), shorter] {
        let served = other.clone();
        let server = Server::start(move |request| Reply::ranged(request, &served));
        let error = message(&Place::new(&server).fetch(&file).unwrap_err());
        assert!(error.contains("expected 100000 as listed"), "{error}");
        let server = Server::start(move |_| Reply::whole(&other));
        let error = message(&Place::new(&server).fetch(&file).unwrap_err());
        assert!(error.contains("expected 100000 as listed"), "{error}");
    }
    // More than Content-Range says.
    let served = longer;
    let server = Server::start(move |_| Reply {
        body: served.clone(),
        ..Reply::status(206).with("content-range", "bytes 0-99999/100000")
    });
    let error = message(&Place::new(&server).fetch(&file).unwrap_err());
    assert!(error.contains("more than the 100000 bytes"), "{error}");
    // Another place than was asked for.
    let served = bytes.clone();
    let server = Server::start(move |_| Reply {
        body: served[5..].to_vec(),
        ..Reply::status(206).with("content-range", "bytes 5-99999/100000")
    });
    let error = message(&Place::new(&server).fetch(&file).unwrap_err());
    assert!(error.contains("from 5 on"), "{error}");
    let served = bytes;
    let server = Server::start(move |_| Reply {
        body: served.clone(),
        ..Reply::status(206)
    });
    let error = message(&Place::new(&server).fetch(&file).unwrap_err());
    assert!(error.contains("Content-Range"), "{error}");
}

#[test]
fn the_token_stays_with_its_server() {
    let bytes = contents(1000);
    let served = bytes.clone();
    let elsewhere = Server::start(move |request| Reply::ranged(request, &served));
    let target = format!("{}/cdn/m?signature=x", elsewhere.address());
    let server = Server::start(move |request| {
        if request.path.contains("/resolve/") {
            Reply::status(302).with("location", "/second?a=b")
        } else {
            Reply::status(307).with("location", &target)
        }
    });
    let mut place = Place::new(&server);
    place.settings.token = Some("secret".into());
    let file = listed("a b/ü.gguf", &bytes);
    assert!(place.fetch(&file).unwrap().0 == bytes);
    let asked = server.requests();
    assert_eq!(
        asked[0].path,
        format!("/me/m/resolve/{COMMIT}/a%20b/%C3%BC.gguf")
    );
    assert_eq!(asked[1].path, "/second?a=b");
    for request in &asked {
        assert_eq!(request.authorization.as_deref(), Some("Bearer secret"));
    }
    let there = elsewhere.requests();
    assert_eq!((there.len(), &there[0].authorization), (1, &None));
    assert_eq!(there[0].range, Some((0, None)));
}

#[test]
fn redirects_end() {
    let server = Server::start(|_| Reply::status(302).with("location", "/again"));
    let error = message(
        &Place::new(&server)
            .fetch(&listed("m.gguf", b"x"))
            .unwrap_err(),
    );
    assert!(error.contains("more than 10 redirects"), "{error}");
    let server = Server::start(|_| Reply::status(302));
    assert!(Place::new(&server).fetch(&listed("m.gguf", b"x")).is_err());
}

#[test]
fn refusals_say_what_to_do() {
    for (status, token, words) in [
        (401, None, "set HF_TOKEN"),
        (403, None, "accept the license"),
        (403, Some("t"), "the token in HF_TOKEN"),
        (404, None, "check the names"),
        (410, None, "HF_ENDPOINT"),
    ] {
        let said = "Access to \u{1b}model is restricted";
        let plain = said.replace('\u{1b}', "");
        let server = Server::start(move |_| Reply::status(status).with("x-error-message", &plain));
        let mut place = Place::new(&server);
        place.settings.token = token.map(str::to_string);
        let error = place.resolve("hf:me/m:Q8_0", Need::Weights).unwrap_err();
        let text = message(&error);
        assert!(
            text.contains(words) && text.contains("is restricted"),
            "{text}"
        );
        assert!(text.contains(&format!("status {status}")), "{text}");
        assert_eq!(server.requests().len(), 1, "asked again after {status}");
    }
}

#[test]
fn a_busy_server_is_asked_again() {
    for status in [429, 500, 503] {
        let count = AtomicUsize::new(0);
        let server = Server::start(move |request| {
            if count.fetch_add(1, Ordering::Relaxed) < 2 {
                Reply::status(status).with("retry-after", "0")
            } else {
                Reply::ranged(request, b"abc")
            }
        });
        let place = Place::new(&server);
        assert_eq!(place.fetch(&listed("m.gguf", b"abc")).unwrap().0, b"abc");
        assert_eq!(server.requests().len(), 3);
        let server = Server::start(move |_| Reply::status(status));
        let error = Place::new(&server)
            .fetch(&listed("m.gguf", b"abc"))
            .unwrap_err();
        assert!(
            error.is::<Unreachable>() && server.requests().len() == 6,
            "{error:#}"
        );
    }
    let server = Server::start(|_| Reply::status(429).with("retry-after", "86400"));
    let error = message(
        &Place::new(&server)
            .fetch(&listed("m.gguf", b"x"))
            .unwrap_err(),
    );
    assert!(error.contains("asks to wait for 86400 s"), "{error}");
    assert_eq!(server.requests().len(), 1);
}

/// A hub with the bundled model in two quantizations, by name only, and one that is split by name.
fn demo_hub() -> Server {
    let model = fs::read(demo_model()).unwrap();
    hub_of(vec![
        ("README.md", b"hello".to_vec()),
        ("m-Q8_0.gguf", model.clone()),
        ("deep/m-Q4_K_M.gguf", model),
        ("mmproj-F16.gguf", b"GGUF".to_vec()),
    ])
}

#[test]
fn a_model_is_fetched_by_name_and_found_offline() {
    let server = demo_hub();
    let mut place = Place::new(&server);
    let fetched = place.resolve("hf:me/m", Need::Weights).unwrap().path;
    assert!(fetched.ends_with(format!(
        "models--me--m/snapshots/{COMMIT}/deep/m-Q4_K_M.gguf"
    )));
    assert!(fs::read(&fetched).unwrap() == fs::read(demo_model()).unwrap());
    let reference = place.settings.cache.join("models--me--m/refs/main");
    assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);
    // Both names have the same contents, which are fetched once.
    let asked = server.requests().len();
    place.resolve("hf:me/m:q8_0", Need::Weights).unwrap();
    assert_eq!(
        server.requests().len(),
        asked + 1,
        "{:?}",
        server.requests()
    );
    // A cached file needs no server, whether or not one may be asked.
    let asked = server.requests().len();
    for is_offline in [false, true] {
        place.settings.is_offline = is_offline;
        for name in [
            "hf:me/m",
            "hf:me/m:Q4_K_M",
            "hf:me/m:Q8_0",
            &format!("hf:me/m@{COMMIT}"),
        ] {
            place.resolve(name, Need::Weights).unwrap();
            place.resolve(name, Need::Header).unwrap();
        }
    }
    assert_eq!(server.requests().len(), asked);
    for (name, words) in [
        ("hf:me/m:Q2_K", "HF_HUB_OFFLINE"),
        ("hf:me/m@other", "not in the cache"),
    ] {
        let error = message(&place.resolve(name, Need::Weights).unwrap_err());
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn without_a_connection_what_is_there_is_taken() {
    let model = fs::read(demo_model()).unwrap();
    let server = hub_of(vec![("m-Q8_0.gguf", model)]);
    let mut place = Place::new(&server);
    let path = place.resolve("hf:me/m", Need::Weights).unwrap().path;
    // The default could have come to be there since, so the server is asked.
    let asked = server.requests().len();
    assert_eq!(place.resolve("hf:me/m", Need::Weights).unwrap().path, path);
    assert_eq!(server.requests().len(), asked + 1);
    place.settings.endpoint = "http://127.0.0.1:9".into();
    assert_eq!(place.resolve("hf:me/m", Need::Weights).unwrap().path, path);
    let error = place.resolve("hf:me/m:Q2_K", Need::Weights).unwrap_err();
    assert!(error.chain().any(|e| e.is::<Unreachable>()), "{error:#}");
}

#[test]
fn a_header_is_enough_to_know_a_model() {
    let server = demo_hub();
    let place = Place::new(&server);
    let header = place.resolve("hf:me/m:Q8_0", Need::Header).unwrap();
    let (part, whole) = (
        Gguf::open(&header.path).unwrap(),
        Gguf::open(&demo_model()).unwrap(),
    );
    assert_eq!(part.id().hash, whole.id().hash);
    assert_eq!(part.tensors(), whole.tensors());
    assert!(!place.settings.cache.exists());
    let bytes: usize = server
        .requests()
        .iter()
        .filter_map(|r| r.range.map(|(first, last)| last.unwrap() + 1 - first))
        .sum();
    assert!((bytes as u64) < whole.file_bytes() / 2, "{bytes}");
    let path = header.path.clone();
    drop((header, part));
    assert!(!path.exists());
}

#[test]
fn a_header_comes_from_any_server() {
    let model = fs::read(demo_model()).unwrap();
    let sends_everything = model.clone();
    let files = vec![("m-Q8_0.gguf", model.clone())];
    let whole = Server::start(move |request| match request.path.contains("/resolve/") {
        true => Reply::whole(&sends_everything),
        false => answer(&files, request),
    });
    let files = vec![("m-Q8_0.gguf", model)];
    let breaks = Server::start(move |request| Reply {
        cut: request.path.contains("/resolve/").then_some(50_000),
        ..answer(&files, request)
    });
    for server in [whole, breaks] {
        let header = Place::new(&server)
            .resolve("hf:me/m", Need::Header)
            .unwrap();
        assert!(Gguf::open(&header.path).is_ok());
    }
}

#[test]
fn what_is_no_model_is_refused_by_its_header() {
    let mut damaged = fs::read(demo_model()).unwrap();
    damaged[4] = 99;
    let mut endless = b"GGUF\x03\0\0\0".to_vec();
    endless.extend([1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
    endless.extend(u64::MAX.to_le_bytes());
    endless.resize(2_000_000, 0);
    let cases = [
        (b"<!doctype html><html>".repeat(1000), "not a GGUF model"),
        (damaged, "version 99"),
        (endless, "metadata key 0"),
        (
            fs::read(demo_model()).unwrap()[..100_000].to_vec(),
            "cut short",
        ),
    ];
    for (bytes, words) in cases {
        let server = hub_of(vec![("m-Q8_0.gguf", bytes)]);
        let place = Place::new(&server);
        for need in [Need::Header, Need::Weights] {
            let error = message(
                &place
                    .resolve("hf:me/m", need)
                    .and_then(|found| {
                        Gguf::open(&found.path)?;
                        Ok(())
                    })
                    .unwrap_err(),
            );
            assert!(error.contains(words), "{error}");
        }
        assert!(!place.cache().files(COMMIT).iter().any(|_| true));
    }
}

#[test]
fn a_listing_that_leads_elsewhere_writes_nothing_there() {
    let server = Server::start(|_| {
        let sha = "../../../../x";
        let listing = json!({"sha": COMMIT, "siblings": [
            {"rfilename": "../../../../evil-Q8_0.gguf", "size": 4, "lfs": {"sha256": "0".repeat(64)}},
            {"rfilename": "m-Q8_0.gguf", "size": 4, "lfs": {"sha256": sha}},
        ]});
        Reply::whole(listing.to_string().as_bytes())
    });
    let place = Place::new(&server);
    assert!(place.resolve("hf:me/m", Need::Weights).is_err());
    let left: Vec<_> = fs::read_dir(place.folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    for body in ["", "[]", "{\"sha\": 5}", "<html>"] {
        let server = Server::start(move |_| Reply::whole(body.as_bytes()));
        let error = message(
            &Place::new(&server)
                .resolve("hf:me/m", Need::Header)
                .unwrap_err(),
        );
        assert!(error.contains("the listing of me/m"), "{error}");
    }
}

#[test]
fn too_little_space_is_refused_before_a_byte_of_weights() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("not/there/yet");
    assert!(fetch::check_space(&deep, 1).is_ok());
    let error = message(&fetch::check_space(&deep, u64::MAX / 4).unwrap_err());
    assert!(
        error.contains("are free there") && error.contains("not/there/yet"),
        "{error}"
    );
    assert!(error.contains("HF_HUB_CACHE"), "{error}");
}
