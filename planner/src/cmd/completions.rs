//! `tier-plan completions`: scripts with which shells complete commands and options.

use anyhow::Result;
use clap::Args;
use clap_complete::Shell;

/// Options of `tier-plan completions`.
#[derive(Debug, Args)]
#[command(
    about = "Print a script that completes commands and options in a shell",
    after_long_help = "Example:\n  tier-plan completions bash > ~/.local/share/bash-completion/completions/tier-plan\n  \
        tier-plan completions zsh > ~/.zfunc/_tier-plan               # with ~/.zfunc in fpath\n  \
        tier-plan completions fish > ~/.config/fish/completions/tier-plan.fish"
)]
pub struct CompletionsArgs {
    /// Shell that reads the script
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// None: a closed pipe ends the program quietly.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    print!("{}", script(args.shell)?);
    Ok(())
}

/// Returns the script for a shell.
fn script(shell: Shell) -> Result<String> {
    let mut bytes = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "tier-plan", &mut bytes);
    Ok(String::from_utf8(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::printable::lines;
    use clap::ValueEnum;

    #[test]
    fn scripts_name_every_visible_command_and_print_as_they_are() {
        for shell in Shell::value_variants() {
            let script = script(*shell).unwrap();
            for command in super::super::command().get_subcommands() {
                let is_named = script.contains(command.get_name());
                assert!(is_named || command.is_hide_set(), "{shell}: {command}");
            }
            assert!(script.contains("n-predict"), "{shell}");
            assert_eq!(lines(&script), script, "{shell}");
        }
    }
}
