//! `tier-plan run`: continues a text, or chats, and prints what that cost.

use super::chat;
use crate::auto::Learner;
use crate::cmd::args::sampling;
use crate::cmd::args::{
    ComputeArgs, JsonArgs, KeptArgs, KvArgs, MemoryArgs, ModelArgs, PreTokenizerArgs,
};
use crate::cmd::args::{SamplingArgs, StoreArgs, TokenLimit, context_value};
use crate::conditions::{Given, Watch, evidence_of};
use crate::hint::HintExt;
use crate::opening::Opening;
use crate::prepared::Prepared;
use crate::screen::Screen;
use crate::session::Session;
use crate::{host, print, text};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{ErrorKind, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tier_plan_runtime::engine::generate::{Generated, Limits, Stop, generate};
use tier_plan_runtime::engine::measure::{Circumstances, record};
use tier_plan_runtime::formats::record::RunRecord;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_runtime::units::show_utc;

/// Tokens to generate by default, outside a chat.
const DEFAULT_TOKENS: usize = 128;

/// Options of `tier-plan run`.
#[derive(Debug, Args)]
#[command(
    about = "Generate text or chat, from a plan or within the memory that there is",
    after_long_help = "Example:\n  tier-plan run MODEL.gguf -p \"Once upon a time\" -n 100 --temp 0.8 --seed -1\n  \
                       tier-plan run MODEL.gguf --plan placement.toml        # chat, on a terminal\n  \
                       tier-plan run hf:OWNER/REPO:Q4_K_M                     # by name; asks before it fetches"
)]
pub struct RunArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Text to continue; without -p and -f, a chat begins on a terminal
    #[arg(
        short,
        long,
        value_name = "TEXT",
        conflicts_with = "file",
        help_heading = "Generation"
    )]
    pub prompt: Option<String>,
    /// File with the text to continue; `-` is standard input
    #[arg(short, long, value_name = "FILE", help_heading = "Generation")]
    pub file: Option<PathBuf>,
    /// Most tokens to generate; -1 is no limit [default: 128; in a chat, no limit]
    #[arg(
        short,
        long,
        visible_alias = "predict",
        alias = "tokens",
        value_name = "N",
        allow_negative_numbers = true,
        help_heading = "Generation"
    )]
    pub n_predict: Option<TokenLimit>,
    /// Context length in tokens; 0 is the model's training context
    /// [default: the plan's; without a plan the model's, up to 4096]
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        alias = "ctx",
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = context_value,
        help_heading = "Generation"
    )]
    pub context: Option<u32>,
    /// Continue past the end-of-text token
    #[arg(long, help_heading = "Generation")]
    pub ignore_eos: bool,
    /// Draft up to N tokens at a time from what followed the same words earlier in the text, where
    /// that pays; the text stays the same
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=8),
        help_heading = "Generation"
    )]
    pub draft: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kept: KeptArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pre: PreTokenizerArgs,
    /// Chat even if standard input is not a terminal: every line is a message
    #[arg(
        long,
        visible_alias = "conversation",
        conflicts_with_all = ["prompt", "file", "json", "record"],
        help_heading = "Chat"
    )]
    pub chat: bool,
    /// System message of a chat
    #[arg(
        long,
        visible_alias = "system-prompt",
        value_name = "TEXT",
        conflicts_with_all = ["prompt", "file"],
        help_heading = "Chat"
    )]
    pub system: Option<String>,
    /// File with a Jinja chat template to use instead of the model's
    #[arg(
        long,
        visible_alias = "chat-template-file",
        value_name = "FILE",
        conflicts_with_all = ["prompt", "file"],
        help_heading = "Chat"
    )]
    pub chat_template: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kv: KvArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub store: StoreArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compute: ComputeArgs,
    /// Write a run record to this file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub record: Option<PathBuf>,
    /// Print hits, misses, bytes and times per layer
    #[arg(long, help_heading = "Output")]
    pub stats: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Checked options of a run or a chat.
pub(super) struct RunOptions<'a> {
    /// The model file.
    pub model: &'a Path,
    /// How to open it.
    pub opening: Opening<'a>,
    /// How tokens are drawn.
    pub sampling: SamplerConfig,
    /// Most tokens to generate, as given.
    pub limit: Option<TokenLimit>,
}

impl<'a> RunOptions<'a> {
    /// Checks the options before any work starts.
    ///
    /// # Errors
    /// When an option is invalid, or the record cannot be written.
    pub fn from_args(args: &'a RunArgs) -> Result<Self> {
        if let Some(path) = &args.record {
            safely::check(path)?;
        }
        args.kept.bytes()?;
        Ok(Self {
            model: args.model.path()?,
            sampling: args.sampling.checked()?,
            opening: Opening {
                context: args.context,
                ..crate::cmd::args::opening(&args.memory, &args.kv, &args.store, &args.compute)?
            },
            limit: args.n_predict,
        })
    }

    /// Returns the most tokens to generate outside a chat.
    fn max_tokens(&self) -> usize {
        self.limit
            .map_or(DEFAULT_TOKENS, |limit| limit.count().unwrap_or(usize::MAX))
    }
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, the model cannot be loaded, or the run fails.
pub fn run(args: &RunArgs) -> Result<()> {
    let options = RunOptions::from_args(args)?;
    if chat::is_wanted(args) {
        return chat::run(args, &options);
    }
    let text = prompt_text(args)?;
    let prepared = Prepared::open(options.model, options.opening)?;
    sampling::check_biases(&options.sampling, prepared.spec().n_vocab)?;
    let tokenizer = prepared.tokenizer_with(args.pre.tokenizer_pre.as_deref())?;
    let prompt = prepared.prompt(&tokenizer, &text)?;
    drop(text);
    let report = prepared.report().cloned();
    let mut learner = prepared.learner();
    let mut session = prepared.load()?;
    args.kept.open(&mut session.engine)?;
    if !args.format.json {
        session
            .residency()
            .iter()
            .for_each(|line| eprintln!("{line}"));
    }
    let _catching = crate::interrupt::catch_interrupts();
    let loading_s = session.started.elapsed().as_secs_f64();
    let Answer {
        generated,
        text: answer,
        given,
    } = print_answer(
        &mut session,
        (&tokenizer, &prompt),
        (args, &options),
        learner.as_mut(),
    )?;
    let circumstances = Circumstances {
        when: show_utc(SystemTime::now()),
        host: host::describe(),
        system: host::system(),
        first_token_s: loading_s + generated.first_token.as_secs_f64(),
    };
    let mut record = record(&session.engine, &generated, &circumstances);
    given.add_to(&mut record, &session.engine, || {
        evidence_of(session.engine.plan(), options.model, session.engine.shape())
    });
    if let Some(path) = &args.record {
        record.write(path)?;
    }
    // Before anything is printed: a closed pipe ends the program there.
    session.keep()?;
    args.kept.keep(&mut session.engine);
    if let Some(learner) = learner {
        learner.keep();
    }
    if args.format.json {
        let mut json = json(&record, &answer, generated.stop)?;
        if let Some(report) = report {
            json["auto"] = report.as_json();
        }
        println!("{}", serde_json::to_string_pretty(&json)?);
    } else {
        if generated.stop == Stop::ContextFull {
            eprintln!("{}", context_full(&session, &generated, options.limit));
        }
        print::speed(&record);
        if session.engine.warmed() > 0 {
            eprintln!(
                "{} slots were filled in the background before they were needed",
                session.engine.warmed()
            );
        }
        if args.stats {
            print::layers(&record);
        }
    }
    // Only now, so that an interrupted run is reported and its slots are kept.
    if crate::interrupt::interrupted() {
        Err(crate::interrupt::Interrupted.into())
    } else {
        Ok(())
    }
}

/// An answer, and what the machine gave while it was generated.
struct Answer {
    generated: Generated,
    text: String,
    given: Given,
}

/// Generates the answer, and prints it as it comes unless JSON is asked for.
fn print_answer(
    session: &mut Session,
    (tokenizer, prompt): (&Tokenizer, &[u32]),
    (args, options): (&RunArgs, &RunOptions<'_>),
    mut learner: Option<&mut Learner>,
) -> Result<Answer> {
    let as_text = !args.format.json;
    let mut stream = tokenizer.stream();
    let mut output = std::io::stdout().lock();
    let mut screen = Screen::new(output.is_terminal());
    let mut answer = String::new();
    let mut write_error = None;
    let is_end = |token| !args.ignore_eos && tokenizer.is_eog(token);
    let limits = Limits {
        max_tokens: options.max_tokens(),
        is_end: &is_end,
        draft: args.draft,
    };
    let mut sampler = Sampler::new(options.sampling.clone());
    let mut watch: Option<Watch> = None;
    if let Some(learner) = &mut learner {
        learner.begin(prompt.len());
    }
    let mut n_text = prompt.len();
    let generated = generate(
        &mut session.engine,
        prompt,
        &mut sampler,
        &limits,
        |engine, token| {
            watch
                .get_or_insert_with(|| Watch::begin(engine))
                .between_tokens(engine);
            if let Some(learner) = &mut learner {
                learner.see(engine, n_text);
            }
            n_text += 1;
            let piece = stream.push(token);
            if as_text
                && let Err(error) = output
                    .write_all(screen.show(&piece).as_bytes())
                    .and_then(|()| output.flush())
            {
                write_error = Some(error);
                return ControlFlow::Break(());
            }
            answer.push_str(&piece);
            if crate::interrupt::interrupted() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    )?;
    let given = watch.map_or_else(Given::default, |mut watch| {
        watch.count_reads(&session.engine);
        watch.end(&session.engine)
    });
    let tail = stream.finish();
    answer.push_str(&tail);
    if as_text && write_error.is_none() {
        write_error = writeln!(output, "{tail}").err();
    }
    drop(output);
    // A reader that has gone, as in `| head`, has what it wanted, and the record is still kept.
    match write_error {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => print::cannot_print(&error),
        _ => Ok(Answer {
            generated,
            text: answer,
            given,
        }),
    }
}

/// Returns the line that says that the text ends because the context is full.
fn context_full(session: &Session, generated: &Generated, limit: Option<TokenLimit>) -> String {
    let context = session.engine.context();
    let written = generated.tokens.len();
    let limit = match limit {
        Some(TokenLimit::Unlimited) => String::new(),
        Some(TokenLimit::Count(count)) => format!(" of {count}"),
        None => format!(" of {DEFAULT_TOKENS}"),
    };
    format!(
        "the context of {context} tokens is full, so the text ends after {written}{limit} tokens; \
         a larger --context takes more"
    )
}

/// Returns why the text ends, in the terms of OpenAI's interface where it has one.
fn finish_reason(stop: Stop) -> &'static str {
    match stop {
        Stop::EndToken => "stop",
        Stop::Limit => "length",
        Stop::ContextFull => "context",
        Stop::Caller | Stop::Canceled => "interrupted",
    }
}

/// Returns the record with the generated text and why it ends.
fn json(record: &RunRecord, text: &str, stop: Stop) -> Result<serde_json::Value> {
    let mut value: serde_json::Value =
        serde_json::from_str(&record.encode()).context("encoding the run record")?;
    if let Some(object) = value.as_object_mut() {
        object.insert("text".into(), text.into());
        object.insert("finish_reason".into(), finish_reason(stop).into());
    }
    Ok(value)
}

fn prompt_text(args: &RunArgs) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) if path.as_os_str() != "-" => {
            text::read_file("the prompt", path).map(text::unix_lines)
        }
        (None, None) if std::io::stdin().is_terminal() => {
            let missing = || bail!("no text to continue");
            missing().hint("pass --prompt TEXT or --file FILE, or pipe the text in")
        }
        _ => text::read("the prompt on standard input", std::io::stdin().lock())
            .map(text::unix_lines),
    }
}
