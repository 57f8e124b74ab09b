//! `tier-plan man`: manual pages, for those who package the program.

use anyhow::{Context, Result};
use clap::Args;
use clap_mangen::Man;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::safely;

/// Options of `tier-plan man`.
#[derive(Debug, Args)]
#[command(
    about = "Write manual pages, one per command",
    hide = true,
    after_long_help = "Example:\n  tier-plan man ~/.local/share/man/man1\n  man tier-plan-run"
)]
pub struct ManArgs {
    /// Folder for the pages, made if need be
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When the folder cannot be made, or a page not be written.
pub fn run(args: &ManArgs) -> Result<()> {
    std::fs::create_dir_all(&args.folder)
        .with_context(|| format!("making the folder {}", args.folder.display()))?;
    let pages = pages(&args.folder)?;
    safely::write_together(&pages)?;
    println!("{} pages in {}", pages.len(), args.folder.display());
    Ok(())
}

/// Returns the pages of the program and of every visible command, with their paths.
fn pages(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    // A page of clap's `help COMMAND` would say what the command's own page says.
    let mut program = super::command().disable_help_subcommand(true);
    program.build();
    let mut pages = Vec::new();
    add_pages(&program, folder, &mut pages)?;
    Ok(pages)
}

fn add_pages(
    command: &clap::Command,
    folder: &Path,
    pages: &mut Vec<(PathBuf, Vec<u8>)>,
) -> Result<()> {
    let man = Man::new(command.clone()).manual("tier-plan");
    let mut text = Vec::new();
    man.render(&mut text)
        .with_context(|| format!("writing the page of '{}'", command.get_name()))?;
    pages.push((folder.join(man.get_filename()), text));
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .try_for_each(|sub| add_pages(sub, folder, pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_visible_command_has_a_page_with_its_options() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("share/man1");
        let args = ManArgs { folder };
        run(&args).unwrap();
        let read = |name: &str| std::fs::read_to_string(args.folder.join(name)).unwrap();
        assert!(read("tier-plan.1").contains("tier\\-plan\\-what\\-if(1)"));
        for sub in super::super::command().get_subcommands() {
            let name = format!("tier-plan-{}.1", sub.get_name());
            if sub.is_hide_set() {
                assert!(!args.folder.join(&name).exists(), "{name}");
                continue;
            }
            let page = read(&name);
            let shown = sub.get_arguments().filter(|arg| !arg.is_hide_set());
            for option in shown.filter_map(clap::Arg::get_long) {
                let option = format!("\\-\\-{}", option.replace('-', "\\-"));
                assert!(page.contains(&option), "{name}: {option}");
            }
            assert!(page.contains("Exit codes"), "{name}");
        }
        assert!(!args.folder.join("tier-plan-help.1").exists());
        // A second run replaces them.
        std::fs::write(args.folder.join("tier-plan.1"), "old").unwrap();
        run(&args).unwrap();
        assert!(read("tier-plan.1").contains("SUBCOMMANDS"));
    }
}
