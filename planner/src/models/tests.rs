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

/// [`removal`] where the environment names this cache.
#[cfg(unix)]
fn removal_in(cache: &Path, name: &str, models: &[Found]) -> anyhow::Result<Removal> {
    removal(name, models, &|variable| {
        let folder = match variable {
            "HF_HUB_CACHE" => cache.to_path_buf(),
            "OLLAMA_MODELS" => cache.join("ollama"),
            "HOME" => cache.join("home"),
            _ => return None,
        };
        Some(folder.into_os_string())
    })
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
    let removal = removal_in(cache.path(), "some--model/q4.gguf", &models()).unwrap();
    assert_eq!(
        (removal.links.len(), removal.blobs.len(), removal.bytes),
        (2, 1, 15)
    );
    removal.remove().unwrap();
    assert!(!repository.join("blobs/b1").exists());
    assert!(cache.path().join("models--other--model/blobs/b1").exists());
    assert!(repository.join("snapshots/r2/renamed.gguf").exists());
    // All parts go, but a blob that another name leads to stays.
    let removal = removal_in(
        cache.path(),
        "hf:owner/some--model/q8/m-00001-of-00002.gguf",
        &models(),
    )
    .unwrap();
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
    removal_in(cache.path(), "owner/some--model", &models())
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
    let removal = removal_in(cache.path(), "some--model/q4.gguf", &models).unwrap();
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
        let error = removal_in(cache.path(), name, &models)
            .unwrap_err()
            .to_string();
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
    let removal = removal_in(cache.path(), "a/b/x.gguf", &list(&in_cache(cache.path()))).unwrap();
    assert_eq!((removal.blobs.len(), removal.bytes), (0, 0));
    removal.remove().unwrap();
    assert!(target.exists() && !snapshot.exists());
}

/// A cache whose repository `me/m` has two revisions, with names of commits.
#[cfg(unix)]
fn cache_of_hub() -> tempfile::TempDir {
    use std::os::unix::fs::symlink;
    let cache = tempfile::tempdir().unwrap();
    let repository = cache.path().join("models--me--m");
    fs::create_dir_all(repository.join("blobs")).unwrap();
    for (commit, file, blob) in [
        ("1", "m-Q4_K_M.gguf", "b1"),
        ("1", "deep/m-Q8_0-00001-of-00002.gguf", "b2"),
        ("1", "deep/m-Q8_0-00002-of-00002.gguf", "b3"),
        ("2", "m-Q4_K_M.gguf", "b4"),
        ("2", "m-Q6_K-00002-of-00002.gguf", "b5"),
    ] {
        let path = repository
            .join("snapshots")
            .join(commit.repeat(40))
            .join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write(&repository.join("blobs").join(blob), blob.as_bytes());
        symlink(repository.join("blobs").join(blob), path).unwrap();
    }
    write(&repository.join("refs/main"), "2".repeat(40).as_bytes());
    cache
}

#[test]
#[cfg(unix)]
fn names_that_other_commands_take_are_removed_too() {
    let cache = cache_of_hub();
    let snapshots = cache.path().join("models--me--m/snapshots");
    let found = |name: &str| {
        let models = list(&in_cache(cache.path()));
        removal_in(cache.path(), name, &models).unwrap_or_else(|e| panic!("{name}: {e:#}"))
    };
    let whole = |name: &str| (found(name).name, found(name).links.len(), found(name).bytes);
    let file = "me/m/m-Q4_K_M.gguf".to_string();
    // In all revisions, whichever one is named.
    for name in [
        "hf:me/m",
        "hf:me/m:q4_k_m",
        "hf:me/m:m-Q4_K_M.gguf",
        &format!("hf:me/m@{}", "1".repeat(40)),
        "hf:me/m/m-Q4_K_M.gguf",
    ] {
        assert_eq!(whole(name), (file.clone(), 2, 4), "{name}");
    }
    // The branch has moved on since this one was fetched.
    let split = "me/m/deep/m-Q8_0-00001-of-00002.gguf".to_string();
    assert_eq!(whole("hf:me/m:Q8_0"), (split, 2, 4));
    // What is left of a split model goes as well.
    assert_eq!(found("hf:me/m:Q6_K").links.len(), 1);
    // Paths lead to the same, and so does the path of a blob.
    let path = snapshots.join("1".repeat(40)).join("m-Q4_K_M.gguf");
    let blob = cache.path().join("models--me--m/blobs/b4");
    for path in [path, blob] {
        let (name, links, bytes) = whole(path.to_str().unwrap());
        assert_eq!((name, links, bytes), (file.clone(), 2, 4));
    }
    found("hf:me/m:Q8_0").remove().unwrap();
    assert!(!snapshots.join("1".repeat(40)).join("deep").exists());
    assert_eq!(found("hf:me/m:Q4_K_M").links.len(), 2);
}

#[test]
#[cfg(unix)]
fn names_of_what_is_not_in_the_cache_are_refused() {
    let cache = cache_of_hub();
    let models = list(&in_cache(cache.path()));
    let studio = cache.path().join("home/.lmstudio/models/me/m/m.gguf");
    write(&studio, b"GGUF");
    let digits = "ab".repeat(32);
    let layer = serde_json::json!({
        "mediaType": "application/vnd.ollama.image.model", "digest": format!("sha256:{digits}"),
    });
    let manifest = serde_json::json!({ "layers": [layer] }).to_string();
    let ollama = cache.path().join("ollama");
    let tiny = "manifests/registry.ollama.ai/library/tiny/latest";
    write(&ollama.join(tiny), manifest.as_bytes());
    write(&ollama.join(format!("blobs/sha256-{digits}")), b"GGUF");
    let mine = cache.path().join("home/mine.gguf");
    write(&mine, b"GGUF");
    for (name, words) in [
        ("hf:me/m:Q2_K", "no model fits 'Q2_K'; there are Q8_0 ("),
        ("hf:me/other", "no GGUF model is there"),
        (
            &format!("hf:me/m@{}", "3".repeat(40)),
            "no GGUF model is there",
        ),
        ("hf:me", "expected hf:OWNER/REPO"),
        ("ollama:tiny", "ollama rm tiny:latest"),
        ("ollama:none", "there are ollama:tiny:latest"),
        ("lmstudio:me/m", "remove it in LM Studio"),
        (mine.to_str().unwrap(), "a file of yours"),
    ] {
        let error = removal_in(cache.path(), name, &models).unwrap_err();
        let hint = crate::hint::hint_for(&error).unwrap_or_default();
        let said = format!("{error:#}; {hint}");
        assert!(said.contains(words), "{name}: {said}");
    }
    assert!(studio.exists() && mine.exists() && ollama.join("blobs").exists());
}
