//! Where files of this program lie that no option names, and those of programs whose models it reads.
//!
//! Nothing else decides this. docs/config.md has a table of it, which a test holds to the code. The
//! rules for variables are those of [`tier_plan_runtime::formats::folders`].

use std::path::PathBuf;
use tier_plan_runtime::cuda::kernel_cache;
use tier_plan_runtime::formats::folders::{cache, config, home, path, state};

pub use tier_plan_runtime::formats::folders::{Environment, expanded};

/// Folder where ollama keeps models if its installer set up a service.
const OLLAMA_SERVICE: &str = "/usr/share/ollama/.ollama/models";

/// Returns a variable of this process.
pub fn variable(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name)
}

/// Returns the home folder of this process's user.
pub fn home_of_user() -> Option<PathBuf> {
    home(&variable)
}

/// Returns the configuration file.
pub fn configuration(env: Environment<'_>) -> Option<PathBuf> {
    Some(config(env)?.join("tier-plan/config.toml"))
}

/// Returns the folder of what `--auto` keeps.
pub fn auto(env: Environment<'_>) -> Option<PathBuf> {
    Some(state(env)?.join("tier-plan/auto"))
}

/// Returns the folder of the files that come with the program, where it has to unpack them.
pub fn bundled(env: Environment<'_>) -> Option<PathBuf> {
    Some(cache(env)?.join("tier-plan/bundled"))
}

/// Returns the folder of compiled GPU kernels.
pub fn kernels(env: Environment<'_>) -> Option<PathBuf> {
    kernel_cache::folder(env)
}

/// Returns the folder of links to ollama's models.
pub fn ollama_links(env: Environment<'_>) -> Option<PathBuf> {
    Some(cache(env)?.join("tier-plan/ollama"))
}

/// Returns the folder of links to LM Studio's models.
pub fn lm_studio_links(env: Environment<'_>) -> Option<PathBuf> {
    Some(cache(env)?.join("tier-plan/lmstudio"))
}

/// Returns the folder of everything that Hugging Face's tools keep.
fn hugging_face(env: Environment<'_>) -> Option<PathBuf> {
    let given = path("HF_HOME", env);
    given.or_else(|| Some(cache(env)?.join("huggingface")))
}

/// Returns the folder of models of Hugging Face's tools.
pub fn hub(env: Environment<'_>) -> Option<PathBuf> {
    // The second is an older name of the first.
    let given = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"];
    let given = given.iter().find_map(|name| path(name, env));
    given.or_else(|| Some(hugging_face(env)?.join("hub")))
}

/// Returns the file with the user's token for Hugging Face.
pub fn hub_token(env: Environment<'_>) -> Option<PathBuf> {
    path("HF_TOKEN_PATH", env).or_else(|| Some(hugging_face(env)?.join("token")))
}

/// Returns the folders where ollama's models may be, the preferred one first.
pub fn ollama(env: Environment<'_>) -> Vec<PathBuf> {
    if let Some(given) = path("OLLAMA_MODELS", env) {
        return vec![given];
    }
    let own = home(env).map(|home| home.join(".ollama/models"));
    own.into_iter().chain([OLLAMA_SERVICE.into()]).collect()
}

/// Returns the folders where LM Studio's models may be, the preferred one first.
pub fn lm_studio(env: Environment<'_>) -> Vec<PathBuf> {
    let of = |home: PathBuf| [".lmstudio/models", ".cache/lm-studio/models"].map(|f| home.join(f));
    home(env).map(of).into_iter().flatten().collect()
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::ffi::OsString;
    use std::path::Path;

    /// Returns the folders of a row of the table.
    fn found(row: &str, env: Environment<'_>) -> Vec<PathBuf> {
        let one = |folder: Option<PathBuf>| folder.into_iter().collect();
        match row {
            "configuration file" => one(configuration(env)),
            "what `--auto` keeps" => one(auto(env)),
            "files that come with the program" => one(bundled(env)),
            "compiled GPU kernels" => one(kernels(env)),
            "links to models of ollama" => one(ollama_links(env)),
            "links to models of LM Studio" => one(lm_studio_links(env)),
            "models of Hugging Face" => one(hub(env)),
            "token for Hugging Face" => one(hub_token(env)),
            "models of ollama" => ollama(env),
            "models of LM Studio" => lm_studio(env),
            other => panic!("'{other}' is in the table only"),
        }
    }

    const N_ROWS: usize = 10;

    /// Returns the texts in backquotes of a cell.
    fn quoted(cell: &str) -> Vec<&str> {
        cell.split('`').skip(1).step_by(2).collect()
    }

    #[test]
    fn the_documented_folders_are_those_of_the_code() {
        let text = include_str!("../../docs/config.md");
        let (_, after) = text.split_once("| what | ").unwrap();
        let rows: Vec<Vec<&str>> = after
            .lines()
            .skip(2)
            .map_while(|line| line.strip_prefix("| "))
            .map(|line| line.trim_end_matches(" |").split(" | ").collect())
            .collect();
        assert_eq!(rows.len(), N_ROWS);
        for row in rows {
            let [what, given, otherwise] = row[..] else {
                panic!("{row:?}");
            };
            let mut set = BTreeMap::from([("HOME", OsString::from("/home/me"))]);
            let of_home = |path: &str| PathBuf::from(path.replacen('~', "/home/me", 1));
            let check = |set: &BTreeMap<&str, OsString>, expected: Vec<PathBuf>| {
                let env = |name: &str| set.get(name).cloned();
                assert_eq!(found(what, &env), expected, "{what}: {set:?}");
            };
            check(&set, quoted(otherwise).into_iter().map(of_home).collect());
            // The first wins over those after it, so they are set from the last one on.
            for path in quoted(given).into_iter().rev() {
                let (name, below) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
                set.insert(name, format!("/in/{name}").into());
                check(&set, vec![Path::new("/in").join(name).join(below)]);
                // Empty ones are no choice of a folder, and `~` is the home folder.
                let mut other = set.clone();
                other.insert(name, "~/x".into());
                check(&other, vec![Path::new("/home/me/x").join(below)]);
                if name.starts_with("XDG_") {
                    other.insert(name, "x".into());
                    check(&other, quoted(otherwise).into_iter().map(of_home).collect());
                }
            }
            let empty: BTreeMap<&str, OsString> = set
                .keys()
                .map(|name| match *name {
                    "HOME" => ("HOME", "/home/me".into()),
                    name => (name, OsString::new()),
                })
                .collect();
            check(&empty, quoted(otherwise).into_iter().map(of_home).collect());
        }
    }

    #[test]
    fn without_a_home_folder_only_named_folders_are_known() {
        assert_eq!(hub(&|_| None), None);
        assert!(lm_studio(&|_| None).is_empty());
        let hf_home = |name: &str| (name == "HF_HOME").then(|| OsString::from("/hf"));
        assert_eq!(hub(&hf_home), Some("/hf/hub".into()));
        // As for Hugging Face's own tools, their folder may be relative to the current one.
        let relative = |name: &str| (name == "HF_HOME").then(|| OsString::from("hf"));
        assert_eq!(hub(&relative), Some("hf/hub".into()));
    }
}
