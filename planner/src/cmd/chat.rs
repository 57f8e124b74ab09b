//! `tier-plan run` without a text to continue: a chat on the terminal.

use crate::chat::dialect::Dialect;
use crate::chat::template::Template;
use crate::chat::{Chat, Options, Signals};
use crate::cmd::args::TokenLimit;
use crate::cmd::args::sampling;
use crate::cmd::run::{RunArgs, RunOptions};
use crate::hint::HintExt;
use crate::prepared::Prepared;
use crate::screen::Screen;
use crate::text;
use anyhow::{Result, bail, ensure};
use std::io::{ErrorKind, IsTerminal, Write};

/// Returns whether the arguments ask for a chat.
pub fn is_wanted(args: &RunArgs) -> bool {
    let text = args.prompt.is_some() || args.file.is_some();
    let one_run = args.format.json || args.record.is_some();
    args.chat || (!text && !one_run && std::io::stdin().is_terminal())
}

/// Runs a chat.
///
/// # Errors
/// When an option is invalid, the model cannot be loaded, or its chat template fails.
pub(super) fn run(args: &RunArgs, run: &RunOptions<'_>) -> Result<()> {
    ensure!(
        run.limit != Some(TokenLimit::Count(0)),
        "--n-predict: 0, expected 1 or more in a chat"
    );
    // A file that cannot be read is named before the model is opened.
    let given = args.chat_template.as_deref();
    let given = given
        .map(|path| text::read_file("the chat template", path))
        .transpose()?;
    let prepared = Prepared::open(run.model, run.opening)?;
    sampling::check_biases(&run.sampling, prepared.spec().n_vocab)?;
    if prepared.context() < 2 {
        let short = || bail!("--context: one token, expected 2 or more in a chat");
        return short().hint("pass a larger --context");
    }
    let tokenizer = prepared.tokenizer_with(args.pre.tokenizer_pre.as_deref())?;
    let source = match given {
        Some(source) => Some(source),
        None => prepared
            .gguf()
            .opt_str("tokenizer.chat_template")?
            .map(str::to_string),
    };
    let piece =
        |id: Option<u32>| id.map(|id| String::from_utf8_lossy(tokenizer.piece(id)).into_owned());
    let bos = piece(tokenizer.bos()).unwrap_or_default();
    let eos = piece(tokenizer.eos()).unwrap_or_default();
    let template = source
        .map(|source| {
            // Its processes end with it, also on a signal.
            let _catching = crate::interrupt::catch_interrupts();
            let template = Template::isolated(&source, &bos, &eos)?;
            Dialect::probe(template, args.system.is_some())
        })
        .transpose()?;
    if crate::interrupt::interrupted() {
        return Err(crate::interrupt::Interrupted.into());
    }
    // Loading leaves nothing behind, so a signal may end the program meanwhile.
    let mut learner = prepared.learner();
    let mut session = prepared.load()?;
    args.kept.open(&mut session.engine)?;
    let _catching = crate::interrupt::catch_interrupts();
    let plan = session.residency();
    plan.iter().for_each(|line| eprintln!("{line}"));
    match &template {
        Some(template) => template.note().iter().for_each(|note| eprintln!("{note}")),
        None if args.system.is_some() => {
            eprintln!("warning: --system has no effect without a chat template");
        }
        None => {}
    }
    let watched = std::io::stdin().is_terminal();
    if watched {
        eprintln!("/help lists the commands, /quit ends");
    }
    let options = Options {
        template,
        system: args.system.clone(),
        max_tokens: run.limit.and_then(TokenLimit::count),
        sampling: run.sampling.clone(),
        ignore_eos: args.ignore_eos,
        draft: args.draft,
        prompt: if watched { "> " } else { "" },
        screen: Screen::new(std::io::stdout().is_terminal()),
        plan,
        learner: learner.as_mut(),
        signals: Signals {
            interrupted: &crate::interrupt::interrupted,
            waiting: &crate::interrupt::waiting,
        },
    };
    let mut output = std::io::stdout().lock();
    let ended = Chat::new(&mut session.engine, &tokenizer, options)
        .talk(&mut std::io::stdin().lock(), &mut output);
    session.keep()?;
    args.kept.keep(&mut session.engine);
    if let Some(learner) = learner {
        learner.keep();
    }
    match ended.and_then(|()| Ok(output.flush()?)) {
        // A reader that has gone, as in `| head`, is not a failure.
        Err(error)
            if error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) =>
        {
            Ok(())
        }
        ended => ended,
    }
}
