//! `tier-plan run` without a text to continue: a conversation on the terminal.

use crate::chat::template::Template;
use crate::chat::{Chat, Options, Signals};
use crate::cli::RunArgs;
use crate::cmd::run::{opening, sampler_config};
use crate::session::{self, Session};
use anyhow::{Context, Result, ensure};
use std::io::{ErrorKind, IsTerminal, Write};

/// Whether these arguments ask for a conversation.
pub fn is_wanted(args: &RunArgs) -> bool {
    let text = args.prompt.is_some() || args.file.is_some();
    let one_run = args.json || args.record.is_some();
    args.chat || (!text && !one_run && std::io::stdin().is_terminal())
}

/// Runs it.
pub fn run(args: &RunArgs) -> Result<()> {
    let sampling = sampler_config(&args.sampling)?;
    ensure!(args.tokens != Some(0), "--tokens 0 leaves no answer; give 1 or more");
    let mut session = Session::open(&args.model, opening(args)?)?;
    ensure!(session.engine.context() >= 2, "a context of one token holds no conversation; give a larger --ctx");
    let tokenizer = session.tokenizer_with(args.tokenizer_pre.as_deref())?;
    let source = match &args.chat_template {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            Some(text.with_context(|| format!("reading the chat template {}", path.display()))?)
        }
        None => session.gguf.opt_str("tokenizer.chat_template")?.map(str::to_string),
    };
    let piece = |id: Option<u32>| id.map(|id| String::from_utf8_lossy(tokenizer.piece(id)).into_owned());
    let bos = piece(tokenizer.bos()).unwrap_or_default();
    let eos = piece(tokenizer.eos()).unwrap_or_default();
    let template = source.map(|source| Template::new(&source, &bos, &eos)).transpose()?;
    let plan = session.residency();
    plan.iter().for_each(|line| eprintln!("{line}"));
    if template.is_none() && args.system.is_some() {
        eprintln!("warning: --system has no effect without a chat template");
    }
    let watched = std::io::stdin().is_terminal();
    if watched {
        eprintln!("/help lists the commands, /quit ends");
    }
    let options = Options {
        template,
        system: args.system.clone(),
        max_tokens: args.tokens.map(|n| n as usize),
        sampling,
        ignore_eos: args.ignore_eos,
        prompt: if watched { "> " } else { "" },
        plan,
        signals: Signals { interrupted: &session::interrupted, waiting: &session::waiting },
    };
    let _catching = session::catch_interrupts();
    let mut output = std::io::stdout().lock();
    let ended = Chat::new(&mut session.engine, &tokenizer, options).talk(&mut std::io::stdin().lock(), &mut output);
    session.keep()?;
    match ended.and_then(|()| Ok(output.flush()?)) {
        // A reader that went away, as in `| head`, is no failure of ours.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(())
        }
        ended => ended,
    }
}
