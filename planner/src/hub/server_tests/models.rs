//! A model by its name: fetched, found again, or known by its header alone.

use super::*;

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
fn a_fetch_waits_for_one_of_another_program() {
    let server = demo_hub();
    let place = Place::new(&server);
    let file = listed("m-Q8_0.gguf", &fs::read(demo_model()).unwrap());
    let (cache, digest) = (place.cache(), file.digest.clone().unwrap());
    fs::create_dir_all(cache.lock(&digest).parent().unwrap()).unwrap();
    fs::create_dir_all(cache.blob(&digest).parent().unwrap()).unwrap();
    let lock = fs::File::create(cache.lock(&digest)).unwrap();
    lock.lock().unwrap();
    std::thread::scope(|scope| {
        let fetching = scope.spawn(|| place.resolve("hf:me/m:Q8_0", Need::Weights).unwrap().path);
        // The other program completes the file after the header was read.
        while server.requests().len() < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::copy(demo_model(), cache.blob(&digest)).unwrap();
        drop(lock);
        assert!(Gguf::open(&fetching.join().unwrap()).is_ok());
    });
    let weights = server
        .requests()
        .into_iter()
        .filter(|r| matches!(r.range, Some((_, None))));
    assert_eq!(weights.count(), 0);
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
    let to_fetch = header.to_fetch.clone().unwrap();
    assert_eq!(
        (to_fetch.name.as_str(), &to_fetch.folder),
        ("hf:me/m:Q8_0", &place.settings.cache)
    );
    assert_eq!(
        (to_fetch.total_bytes, to_fetch.missing_bytes),
        (whole.file_bytes(), whole.file_bytes())
    );
    let bytes: usize = server
        .requests()
        .iter()
        .filter_map(|r| r.range.map(|(first, last)| last.unwrap() + 1 - first))
        .sum();
    assert!((bytes as u64) < whole.file_bytes() / 2, "{bytes}");
    let path = header.path.clone();
    drop((header, part));
    assert!(!path.exists());
    // What an interrupted fetch has left is not missing any more.
    let model = fs::read(demo_model()).unwrap();
    place.leave(&listed("m-Q8_0.gguf", &model), &model[..1000]);
    let header = place.resolve("hf:me/m:Q8_0", Need::Header).unwrap();
    let to_fetch = header.to_fetch.unwrap();
    assert_eq!(to_fetch.missing_bytes, to_fetch.total_bytes - 1000);
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
