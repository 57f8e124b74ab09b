//! One file: ranges, redirects, failures in the middle, and bytes that are not those listed.

use super::*;

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
