use super::*;
use std::fs;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn replaces_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    write(&path, b"one").unwrap();
    write(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(names(dir.path()), ["a.toml"]);
}

#[test]
fn a_failure_keeps_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    write(&path, b"one").unwrap();
    let error = with_file(&path, |file| {
        file.write_all(&[7; 100_000])?;
        Err(io::Error::other("the source dried up"))
    });
    assert!(
        error
            .unwrap_err()
            .to_string()
            .ends_with("a.toml: the source dried up")
    );
    assert_eq!(fs::read(&path).unwrap(), b"one");
    assert_eq!(names(dir.path()), ["a.toml"]);
}

#[test]
fn errors_name_the_folder_and_the_mend() {
    let dir = tempfile::tempdir().unwrap();
    let missing = write(&dir.path().join("no/such/a.toml"), b"x")
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("no/such does not exist; create it or choose another output"),
        "{missing}"
    );
    let folder = write(dir.path(), b"x").unwrap_err().to_string();
    assert!(
        folder.contains("this is a folder; name a file inside it"),
        "{folder}"
    );
    fs::write(dir.path().join("file"), b"").unwrap();
    let inside = write(&dir.path().join("file/a.toml"), b"x")
        .unwrap_err()
        .to_string();
    assert!(inside.contains("is not a folder"), "{inside}");
}

#[test]
fn a_check_says_beforehand_what_a_write_would_say() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"kept").unwrap();
    for name in ["", "no/such/a.toml", "file/a.toml", ".."] {
        let path = dir.path().join(name);
        let before = check(&path).unwrap_err().to_string();
        assert_eq!(before, write(&path, b"x").unwrap_err().to_string());
    }
    check(&dir.path().join("file")).unwrap();
    check(&dir.path().join("new")).unwrap();
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"kept");
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn a_folder_without_permission_is_explained() {
    // Root may write anywhere, so the words are tested on the error itself.
    let denied = explain(
        io::Error::from(ErrorKind::PermissionDenied),
        Path::new("/reports"),
    );
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
    assert!(
        denied
            .to_string()
            .contains("the folder /reports cannot be written to"),
        "{denied}"
    );
    let read_only = explain(
        io::Error::from(ErrorKind::ReadOnlyFilesystem),
        Path::new("/cdrom"),
    );
    assert!(
        read_only.to_string().contains("choose another output"),
        "{read_only}"
    );
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_devices_written_to() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    let link = dir.path().join("link");
    write(&real, b"one").unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&real, &link).unwrap();
    write(&link, b"two").unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read(&real).unwrap(), b"two");
    assert_eq!(
        fs::metadata(&real).unwrap().permissions().mode() & 0o777,
        0o600
    );
    write(Path::new("/dev/null"), b"gone").unwrap();
    assert!(
        fs::metadata("/dev/null")
            .unwrap()
            .file_type()
            .is_char_device()
    );
}

#[test]
fn a_full_folder_of_outputs_is_replaced_together() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("no/b"));
    write(&a, b"old").unwrap();
    let both = [(a.clone(), b"new".to_vec()), (b, b"new".to_vec())];
    assert!(write_together(&both).is_err());
    assert_eq!(fs::read(&a).unwrap(), b"old");
    write_together(&both[..1]).unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["a"]);
}

#[test]
fn names_that_no_file_can_have_are_refused_before_work() {
    let dir = tempfile::tempdir().unwrap();
    let long = "x".repeat(300);
    for name in ["new/", ".tier-plan-x.partial", &long] {
        let path = dir.path().join(name);
        let before = check(&path).unwrap_err().to_string();
        assert_eq!(before, write(&path, b"x").unwrap_err().to_string());
    }
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_model_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    fs::write(&path, b"GGUF\x03\0\0\0").unwrap();
    let refused = check(&path).unwrap_err().to_string();
    assert!(refused.contains("this is a model"), "{refused}");
    assert!(write(&path, b"x").is_err());
    assert_eq!(fs::read(&path).unwrap(), b"GGUF\x03\0\0\0");
}

#[test]
fn missing_folders_are_made_and_unused_ones_go_again() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b/c");
    check_folder(&deep).unwrap();
    assert!(names(dir.path()).is_empty());
    drop(NewFolders::make(&deep).unwrap());
    assert!(names(dir.path()).is_empty());
    let made = NewFolders::make(&deep).unwrap();
    write(&deep.join("file"), b"x").unwrap();
    drop(made);
    assert_eq!(names(&deep), ["file"]);
    let inside = deep.join("file/d");
    assert!(check_folder(&inside).is_err() && NewFolders::make(&inside).is_err());
}

#[test]
fn a_folder_gets_its_name_when_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (taken, free) = (dir.path().join("taken"), dir.path().join("free"));
    fs::create_dir(&taken).unwrap();
    let mut folder = TemporaryFolder::create(dir.path()).unwrap();
    fs::write(folder.path().join("file"), b"x").unwrap();
    assert!(!folder.publish(&taken).unwrap());
    assert!(folder.publish(&free).unwrap());
    drop(folder);
    drop(TemporaryFolder::create(dir.path()).unwrap());
    assert_eq!(names(dir.path()), ["free", "taken"]);
    assert_eq!(names(&free), ["file"]);
}

#[cfg(unix)]
mod on_unix {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn what_dead_processes_left_is_removed_and_live_ones_keep_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let live = Temporary::create(dir.path()).unwrap();
        let live_folder = TemporaryFolder::create(dir.path()).unwrap();
        fs::write(dir.path().join(".tier-plan-probe-1.partial"), b"x").unwrap();
        fs::create_dir(dir.path().join(".tier-plan-2.partial")).unwrap();
        fs::write(dir.path().join(".tier-plan-2.partial/file"), b"x").unwrap();
        fs::write(dir.path().join("mine.partial"), b"x").unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, b"x").unwrap();
        // Not a file of ours: it stays, and so does what it leads to.
        symlink(&precious, dir.path().join(".tier-plan-3.partial")).unwrap();
        write(&dir.path().join("a"), b"x").unwrap();
        let mut expected = vec![
            live.path().file_name().unwrap().to_str().unwrap(),
            live_folder.path().file_name().unwrap().to_str().unwrap(),
            ".tier-plan-3.partial",
            "a",
            "mine.partial",
            "precious",
        ];
        expected.sort();
        assert_eq!(names(dir.path()), expected);
        assert_eq!(fs::read(&precious).unwrap(), b"x");
    }

    #[test]
    fn temporaries_are_private_and_files_follow_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        fs::write(&plain, b"x").unwrap();
        let temporary = Temporary::create(dir.path()).unwrap();
        assert_eq!(mode(temporary.path()), 0o600);
        let mut folder = TemporaryFolder::create(dir.path()).unwrap();
        assert_eq!(mode(folder.path()), 0o700);
        let (file, named) = (dir.path().join("file"), dir.path().join("named"));
        write(&file, b"x").unwrap();
        assert_eq!(mode(&file), mode(&plain));
        fs::create_dir(dir.path().join("made")).unwrap();
        assert!(folder.publish(&named).unwrap());
        assert_eq!(mode(&named), mode(&dir.path().join("made")));
    }

    #[test]
    fn a_link_stays_one_and_its_end_need_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("far")).unwrap();
        let link = dir.path().join("link");
        symlink("far/file", &link).unwrap();
        check(&link).unwrap();
        write(&link, b"one").unwrap();
        write(&link, b"two").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(dir.path().join("far/file")).unwrap(), b"two");
        assert_eq!(names(&dir.path().join("far")), ["file"]);
        symlink("circle", dir.path().join("circle")).unwrap();
        assert!(check(&dir.path().join("circle")).is_err());
    }

    #[test]
    fn pipes_and_devices_are_no_files_to_read_again() {
        let null = Path::new("/dev/null");
        check(null).unwrap();
        let refused = check_file(null).unwrap_err().to_string();
        assert!(refused.contains("pipe or a device"), "{refused}");
        assert!(check_file(Path::new("/dev/stdout")).is_err());
    }

    #[test]
    fn sockets_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let refused = write(&path, b"x").unwrap_err().to_string();
        assert!(refused.contains("this is a socket"), "{refused}");
    }

    #[test]
    fn unfinished_work_is_continued_by_one_process_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.partial");
        let mut first = Resumable::open(&path).unwrap();
        let mut second = Resumable::open(&path).unwrap();
        assert!(first.file().unwrap().is_none());
        first.write(b"one").unwrap();
        first.write(b"two").unwrap();
        let busy = second.write(b"three").unwrap_err().to_string();
        assert!(busy.contains("another process is writing"), "{busy}");
        assert!(Resumable::open(&path).is_err());
        assert_eq!(
            (fs::read(&path).unwrap(), mode(&path)),
            (b"two".to_vec(), 0o600)
        );
        // As a killed process leaves it.
        drop(first);
        drop(second);
        let third = Resumable::open(&path).unwrap();
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut third.file().unwrap().unwrap(), &mut bytes).unwrap();
        assert_eq!(bytes, b"two");
        third.remove();
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn nothing_planted_is_taken_for_unfinished_work() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("a.partial"), dir.path().join("precious"));
        fs::write(&precious, b"x").unwrap();
        let refused = |words: &str| {
            let error = Resumable::open(&path).unwrap_err().to_string();
            assert!(
                error.contains(words) && error.contains("remove it"),
                "{error}"
            );
        };
        symlink(&precious, &path).unwrap();
        refused("a link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused("a folder");
        fs::remove_dir(&path).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        refused("not a regular file");
        fs::remove_file(&path).unwrap();
        // Planted between two writes.
        let mut open = Resumable::open(&path).unwrap();
        open.write(b"one").unwrap();
        fs::remove_file(&path).unwrap();
        symlink(&precious, &path).unwrap();
        assert!(open.write(b"two").is_err());
        assert_eq!(fs::read(&precious).unwrap(), b"x");
    }
}
