use super::*;
use crate::bundled;
use std::path::PathBuf;

fn demo() -> PathBuf {
    bundled::path("demo/demo.gguf").unwrap()
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn names(found: &[Found]) -> Vec<&str> {
    found.iter().map(|found| found.name.as_str()).collect()
}

fn below(folder: &Path) -> Places {
    Places {
        folders: vec![folder.to_path_buf()],
        ..Places::default()
    }
}

fn in_cache(cache: &Path) -> Places {
    Places {
        hugging_face: Some(cache.to_path_buf()),
        ..Places::default()
    }
}

#[test]
fn folders_are_listed_with_what_lies_beside() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::copy(demo(), root.join("a/b/demo.gguf")).unwrap();
    write(&root.join("a/b/demo.profile"), b"x");
    write(&root.join("a/b/other.toml"), b"x = 1");
    write(&root.join("broken.GGUF"), b"GGUF");
    write(&root.join(".hidden/demo.gguf"), b"GGUF");
    write(&root.join("1/2/3/4/5/deep.gguf"), b"GGUF");
    write(&root.join("m-00001-of-00002.gguf"), b"GGUF");
    write(&root.join("m-00002-of-00002.gguf"), b"GGUF");
    let found = list(&below(root));
    let shown = |path: &str| root.join(path).display().to_string();
    assert_eq!(
        names(&found),
        [
            shown("a/b/demo.gguf"),
            shown("broken.GGUF"),
            shown("m-00001-of-00002.gguf")
        ]
    );
    let demo = &found[0];
    assert_eq!((demo.error.as_deref(), demo.parts), (None, 1));
    assert_eq!(demo.bytes, fs::metadata(&demo.path).unwrap().len());
    assert!(demo.arch.is_some() && demo.quantization.is_some());
    assert!(demo.parameters.is_some_and(|n| n > 1_000_000), "{demo:?}");
    assert_eq!(demo.profile, Some(root.join("a/b/demo.profile")));
    assert_eq!(
        (demo.plans.len(), demo.measured.as_ref(), demo.pack.as_ref()),
        (0, None, None)
    );
    assert!(found[1].error.is_some() && found[2].error.is_some());

    // This folder alone, without those in it.
    let here = Places {
        here: Some(root.to_path_buf()),
        ..Places::default()
    };
    assert_eq!(list(&here).len(), 2);
    let missing = below(&root.join("missing"));
    assert_eq!(list(&missing), []);
}

#[test]
fn later_parts_of_split_files_are_known() {
    assert!(scan::is_first(Path::new("x/a-00001-of-00002.gguf")));
    assert!(!scan::is_first(Path::new("x/a-00002-of-00002.GGUF")));
}

/// A cache with two revisions of one repository, and another repository.
#[cfg(unix)]
fn cache() -> tempfile::TempDir {
    use std::os::unix::fs::symlink;
    let cache = tempfile::tempdir().unwrap();
    let link = |repository: &str, revision: &str, file: &str, blob: &str| {
        let repository = cache.path().join(repository);
        let path = repository.join("snapshots").join(revision).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let blob = repository.join("blobs").join(blob);
        if !blob.exists() {
            write(&blob, b"GGUF of nothing");
        }
        symlink(blob, path).unwrap();
    };
    let repository = "models--owner--some--model";
    link(repository, "r1", "q4.gguf", "b1");
    link(repository, "r1", "q8/m-00001-of-00002.gguf", "b2");
    link(repository, "r1", "q8/m-00002-of-00002.gguf", "b3");
    link(repository, "r1", "README.md", "b4");
    link(repository, "r2", "q4.gguf", "b1");
    link(repository, "r2", "renamed.gguf", "b3");
    link("models--other--model", "r1", "q4.gguf", "b1");
    write(&cache.path().join("version.txt"), b"1");
    fs::create_dir_all(cache.path().join("datasets--a--b/snapshots/r")).unwrap();
    cache
}

#[test]
#[cfg(unix)]
fn a_cache_lists_each_file_once() {
    let cache = cache();
    let found = list(&in_cache(cache.path()));
    assert_eq!(
        names(&found),
        [
            "other/model/q4.gguf",
            "owner/some--model/q4.gguf",
            "owner/some--model/q8/m-00001-of-00002.gguf",
            "owner/some--model/renamed.gguf",
        ]
    );
    assert!(
        found
            .iter()
            .all(|found| found.cached_in.is_some() && found.error.is_some())
    );
}

#[test]
#[cfg(unix)]
fn a_model_is_removed_and_nothing_else() {
    let cache = cache();
    let repository = cache.path().join("models--owner--some--model");
    let models = || list(&in_cache(cache.path()));
    // Both revisions have it.
    let removal = super::removal("some--model/q4.gguf", &models()).unwrap();
    assert_eq!(
        (removal.links.len(), removal.blobs.len(), removal.bytes),
        (2, 1, 15)
    );
    removal.remove().unwrap();
    assert!(!repository.join("blobs/b1").exists());
    assert!(cache.path().join("models--other--model/blobs/b1").exists());
    assert!(repository.join("snapshots/r2/renamed.gguf").exists());
    // All parts go, but a blob that another name leads to stays.
    let removal =
        super::removal("hf:owner/some--model/q8/m-00001-of-00002.gguf", &models()).unwrap();
    assert_eq!((removal.links.len(), removal.blobs.len()), (2, 1));
    removal.remove().unwrap();
    assert!(!repository.join("blobs/b2").exists() && repository.join("blobs/b3").exists());
    assert!(
        !repository.join("snapshots/r1/q8").exists(),
        "an empty folder goes"
    );
    assert!(repository.join("snapshots/r1/README.md").exists());
    // What has gone meanwhile is no error.
    removal.remove().unwrap();
    // The name of a repository with one model is enough.
    super::removal("owner/some--model", &models())
        .unwrap()
        .remove()
        .unwrap();
    assert_eq!(names(&models()), ["other/model/q4.gguf"]);
    assert!(repository.join("blobs/b4").exists());
}

#[test]
#[cfg(unix)]
fn a_blob_that_any_other_file_needs_stays() {
    let cache = cache();
    let repository = cache.path().join("models--owner--some--model");
    let deep = repository.join("snapshots/r1/a/b/c/d/e");
    fs::create_dir_all(&deep).unwrap();
    std::os::unix::fs::symlink(repository.join("blobs/b1"), deep.join("weights.bin")).unwrap();
    let models = list(&in_cache(cache.path()));
    let removal = super::removal("some--model/q4.gguf", &models).unwrap();
    assert_eq!((removal.links.len(), removal.blobs.len()), (2, 0));
    removal.remove().unwrap();
    assert!(deep.join("weights.bin").exists());
}

#[test]
#[cfg(unix)]
fn names_that_are_unclear_or_not_cached_are_refused() {
    let cache = cache();
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("mine.gguf"), b"GGUF");
    let models = list(&Places {
        folders: vec![folder.path().to_path_buf()],
        ..in_cache(cache.path())
    });
    let refused = |name: &str, words: &str| {
        let error = super::removal(name, &models).unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
    };
    refused(
        "q4.gguf",
        "2 models, expected one of other/model/q4.gguf, owner/some--model/q4.gguf",
    );
    refused("owner/some--model", "3 models");
    refused("mine.gguf", "a file of yours");
    refused("4.gguf", "no such model");
    refused("", "no such model");
}

#[test]
#[cfg(unix)]
fn a_blob_outside_of_the_repository_is_not_removed() {
    use std::os::unix::fs::symlink;
    let (cache, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let target = outside.path().join("precious.gguf");
    write(&target, b"GGUF");
    let snapshot = cache.path().join("models--a--b/snapshots/r");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(cache.path().join("models--a--b/blobs")).unwrap();
    symlink(&target, snapshot.join("x.gguf")).unwrap();
    let removal = super::removal("a/b/x.gguf", &list(&in_cache(cache.path()))).unwrap();
    assert_eq!((removal.blobs.len(), removal.bytes), (0, 0));
    removal.remove().unwrap();
    assert!(target.exists() && !snapshot.exists());
}
