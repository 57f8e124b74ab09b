//! The model argument of each command, which may be a name: the one place where names become paths.

use super::Command;
use crate::hub::{self, Need, Resolved};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Puts the path of its file for a model that is given by name. The file is there while the second
/// value lives.
///
/// # Errors
/// When there is no such model, it is not to be fetched, or fetching fails.
pub(super) fn resolved(mut command: Command, yes: bool) -> Result<(Command, Option<Resolved>)> {
    let Some((given, need)) = given(&mut command) else {
        return Ok((command, None));
    };
    let resolved = hub::resolve(&given, need, yes)?;
    if let Some(model) = &resolved {
        set(&mut command, &model.path);
        match &mut command {
            Command::Doctor(args) => args.to_fetch.clone_from(&model.to_fetch),
            Command::Auto(args) => args.to_fetch.clone_from(&model.to_fetch),
            _ => {}
        }
    }
    Ok((command, resolved))
}

/// Returns the model of a command, and how much of it the command needs.
fn given(command: &mut Command) -> Option<(PathBuf, Need)> {
    let need = match command {
        Command::Inspect(_)
        | Command::WhatIf(_)
        | Command::Solve(_)
        | Command::Explain(_)
        | Command::Tokenize(_) => Need::Header,
        // The drive is measured with the file itself.
        Command::Doctor(args) if !args.measure => Need::Header,
        Command::Auto(args) if args.show => Need::Header,
        Command::Profile(args) if args.from_imatrix.is_some() => Need::Header,
        _ => Need::Weights,
    };
    let model = match command {
        // What is only printed needs no model.
        Command::Launch(args) if args.print => None,
        Command::Launch(args) => args.serving.model().map(Path::to_path_buf),
        Command::Tokenize(args) => args.inputs().ok().map(|(model, _)| model),
        other => field(other).map(|model| model.clone()),
    };
    Some((model?, need))
}

fn set(command: &mut Command, path: &Path) {
    match command {
        Command::Launch(args) => args.serving.set_model(path),
        Command::Tokenize(args) => args.set_model(path),
        other => {
            if let Some(model) = field(other) {
                *model = path.to_path_buf();
            }
        }
    }
}

/// Returns where a command has its model.
fn field(command: &mut Command) -> Option<&mut PathBuf> {
    match command {
        Command::Inspect(args) => args.model.given_mut(),
        Command::Auto(args) => args.run.model.given_mut(),
        Command::Run(args) => args.model.given_mut(),
        Command::Serve(args) => args.model.given_mut(),
        Command::Bench(args) => args.model.given_mut(),
        Command::Checksum(args) => args.model.given_mut(),
        Command::Pack(args) => args.model.given_mut(),
        Command::Logits(args) => args.model.given_mut(),
        Command::Perplexity(args) => args.model.given_mut(),
        Command::Solve(args) => args.model.given_mut(),
        Command::WhatIf(args) => args.model.given_mut(),
        Command::Explain(args) => Some(&mut args.model.model),
        Command::Export(args) => Some(&mut args.model.model),
        Command::Batch(args) => args.model_option.as_mut().or(args.model.as_mut()),
        Command::Profile(args) => args.model.as_mut().or(args.model_option.as_mut()),
        Command::Probe(args) => args.model.as_mut(),
        Command::Doctor(args) => args.model.as_mut().or(args.model_option.as_mut()),
        Command::Compare(args) => args.model.as_mut(),
        Command::Selftest(args) => args.model.as_mut(),
        Command::Launch(_)
        | Command::Tokenize(_)
        | Command::Calibrate(_)
        | Command::Replan(_)
        | Command::Top(_)
        | Command::Diff(_)
        | Command::Demo(_)
        | Command::Completions(_)
        | Command::Man(_)
        | Command::Config(_)
        | Command::Models(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse_alone;
    use super::*;

    /// Every command that takes a model, with its other required arguments.
    const LINES: &[&str] = &[
        "inspect MODEL",
        "inspect -m MODEL",
        "auto MODEL",
        "auto --show -m MODEL",
        "run MODEL",
        "run -m MODEL",
        "serve MODEL",
        "bench MODEL",
        "checksum MODEL",
        "pack MODEL",
        "logits MODEL --tokens 1 -o x",
        "perplexity MODEL -f x",
        "solve MODEL -M x",
        "solve --model MODEL -M x",
        "what-if MODEL -M x",
        "explain x -m MODEL",
        "export x --to llama.cpp -m MODEL",
        "batch MODEL r -o x",
        "batch -m MODEL r -o x",
        "profile MODEL",
        "profile -m MODEL",
        "probe -m MODEL",
        "doctor MODEL",
        "doctor -m MODEL",
        "compare x -m MODEL",
        "selftest --gpu --model MODEL",
        "launch claude --model MODEL",
        "tokenize MODEL text",
        "tokenize -m MODEL text",
        "tokenize MODEL -p text",
    ];

    #[test]
    fn every_command_has_its_model_replaced() {
        for line in LINES {
            let words = format!("tier-plan {line}");
            let words = words.split_whitespace().map(|word| match word {
                "MODEL" => "hf:a/b".into(),
                word => word.into(),
            });
            let mut command = parse_alone(words).unwrap_or_else(|e| panic!("{line}: {e}"));
            let (model, _) = given(&mut command).unwrap_or_else(|| panic!("{line}: no model"));
            assert_eq!(model, Path::new("hf:a/b"), "{line}");
            set(&mut command, Path::new("/x/y.gguf"));
            let (model, _) = given(&mut command).unwrap();
            assert_eq!(model, Path::new("/x/y.gguf"), "{line}");
            if let Command::Tokenize(args) = &command {
                assert_eq!(args.inputs().unwrap().1, "text", "{line}");
            }
        }
    }

    #[test]
    fn paths_stay_as_they_are() {
        let command = parse_alone(["tier-plan", "run", "m.gguf"].map(Into::into)).unwrap();
        let (_, resolved) = resolved(command, false).unwrap();
        assert!(resolved.is_none());
    }
}
