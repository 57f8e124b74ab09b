//! `tier-plan batch`: answers a file of requests, many at once.

mod speeds;

pub use speeds::Parallel;

use crate::batch::{Batch, Chats, Grammars, Input, Options, Output, Prompts, Summary};
use crate::chat::dialect::Dialect;
use crate::chat::template::Template;
use crate::cmd::args::sampling;
use crate::cmd::args::{JsonArgs, MaxStep, TextsArgs};
use crate::interrupt::Interrupted;
use crate::parallel::{self, Routing};
use crate::prepared::Prepared;
use crate::printable::printable;
use crate::progress;
use crate::session::Session;
use anyhow::{Result, bail};
use clap::Args;
use indicatif::ProgressBar;
pub(in crate::cmd) use speeds::{Asked, Speeds};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::tokenizer::Tokenizer;

/// Options of `tier-plan batch`.
#[derive(Debug, Args)]
#[command(
    about = "Answer a file of requests in the format of OpenAI's batch interface, many at once",
    after_long_help = "Example:\n  tier-plan batch MODEL.gguf requests.jsonl -o answers.jsonl\n\n\
                       A line of requests.jsonl:\n  \
                       {\"custom_id\": \"1\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"Once upon a time\"}}\n\n\
                       The same command goes on where an earlier one was ended."
)]
pub struct BatchArgs {
    /// GGUF file, the first part of a split model, or a name such as hf:OWNER/REPO:Q4_K_M
    #[arg(
        value_name = "MODEL",
        required_unless_present = "model_option",
        help_heading = "Model"
    )]
    pub model: Option<PathBuf>,
    /// File with one request per line (JSONL)
    #[arg(
        value_name = "IN.jsonl",
        required_unless_present = "model_option",
        help_heading = "Generation"
    )]
    pub input: Option<PathBuf>,
    /// GGUF file, as an option instead of the argument MODEL
    #[arg(
        short = 'm',
        long = "model",
        value_name = "FILE",
        conflicts_with = "input",
        help_heading = "Model"
    )]
    pub model_option: Option<PathBuf>,
    /// File for the answers, one per line; what it has already is kept and not answered again
    #[arg(short, long, value_name = "OUT.jsonl", help_heading = "Output")]
    pub output: PathBuf,
    /// Most milliseconds between two tokens of a text while prompts are read, or `auto` for what the
    /// predicted steps suggest [default: no limit, for the most tokens per second]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    pub max_step_ms: Option<MaxStep>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub texts: TextsArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

impl BatchArgs {
    /// Returns the model and the requests. With `-m`, the only argument is the requests.
    fn files(&self) -> Result<(&Path, &Path)> {
        let (first, second) = (self.model.as_deref(), self.input.as_deref());
        match (self.model_option.as_deref(), first, second) {
            (None, Some(model), Some(input)) => Ok((model, input)),
            (Some(model), Some(input), None) => Ok((model, input)),
            _ => bail!("no requests given, expected IN.jsonl"),
        }
    }
}

/// What the names of fields have before them in errors.
const PATH: &str = "body.";

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file can't be read or written, or the model cannot be loaded.
pub fn run(args: &BatchArgs) -> Result<()> {
    let (model, requests) = args.files()?;
    let sampling = args.texts.sampling.checked()?;
    let opening = args.texts.opening()?;
    let max_tokens = args.texts.max_tokens()?;
    args.texts.kept.bytes()?;
    safely::check_file(&args.output)?;
    let given = args.texts.template()?;
    let mut input = Input::open(requests)?;
    let prepared = Prepared::open(model, opening)?;
    sampling::check_biases(&sampling, prepared.spec().n_vocab)?;
    let tokenizer = Arc::new(prepared.tokenizer_with(args.texts.pre.tokenizer_pre.as_deref())?);
    let template = match input.has_chats() {
        true => template(&prepared, &tokenizer, given)?,
        false => None,
    };
    let source = template.as_ref().map(Dialect::source);
    let grammars = Grammars::new(Arc::clone(&tokenizer), source, PATH);
    let prompts = Prompts {
        tokenizer: &tokenizer,
        template: template.as_ref().map(|template| template as &dyn Chats),
        n_vocab: prepared.spec().n_vocab,
        context: prepared.context(),
        max_tokens,
        path: PATH,
    };
    // Not before the model's header is read, so that a mistake leaves no file behind.
    let mut output = Output::open(&args.output, &input)?;
    if output.n_answered() == input.n_lines() {
        let summary = Summary {
            lines: input.n_lines(),
            earlier: input.n_lines(),
            earlier_refused: output.n_refused(),
            ..Summary::default()
        };
        return print(args, &summary, 0);
    }
    let routing = parallel::routing(args.texts.routing.as_deref(), model, &prepared)?;
    let mut session = prepared.load()?;
    args.texts.kept.open(&mut session.engine)?;
    if !args.format.json {
        session
            .residency()
            .iter()
            .for_each(|line| eprintln!("{line}"));
    }
    let work = Work {
        input: &mut input,
        output: &mut output,
        prompts: &prompts,
        grammars: &grammars,
    };
    let (summary, texts) = answer(args, &mut session, work, (sampling, &routing))?;
    session.keep()?;
    args.texts.kept.warn(&mut session.engine);
    print(args, &summary, texts)?;
    if summary.interrupted {
        return Err(Interrupted.into());
    }
    Ok(())
}

/// The two files of a batch, and what makes texts of requests.
struct Work<'a> {
    input: &'a mut Input,
    output: &'a mut Output,
    prompts: &'a Prompts<'a>,
    grammars: &'a Grammars,
}

/// Answers the requests. Returns what was done, and how many texts at once.
fn answer(
    args: &BatchArgs,
    session: &mut Session,
    work: Work<'_>,
    (sampling, routing): (SamplerConfig, &Routing),
) -> Result<(Summary, usize)> {
    let _catching = crate::interrupt::catch_interrupts();
    let asked = Asked {
        parallel: args.texts.parallel,
        max_step: args.max_step_ms,
        has_plan: args.texts.memory.plan.is_some(),
    };
    let speeds = Speeds::choose(asked, session, routing);
    let progress = Progress::default();
    let options = Options {
        model: &model_name(args.files()?.0),
        sampling,
        max_texts: speeds.texts as usize,
        max_step: speeds.max_step,
        max_drafts: args.texts.draft,
        grammars: work.grammars,
        cost: speeds.cost,
        on_step: &mut |summary| progress.show(summary),
    };
    let batch = Batch::new(
        &mut session.engine,
        work.prompts,
        work.input,
        work.output,
        options,
    );
    let texts = batch.max_texts();
    if !args.format.json {
        eprintln!("{}", speeds.why);
        if let (Parallel::Auto, Routing::Unknown(Some(note))) = (args.texts.parallel, routing) {
            eprintln!("note: {note}");
        }
        if texts < speeds.texts as usize {
            eprintln!("the engine has room for {texts}");
        }
    }
    let done = batch.run();
    progress.bar.finish_and_clear();
    Ok((done?, texts))
}

/// Compiles the template given, or the model's.
pub(super) fn template(
    prepared: &Prepared<'_>,
    tokenizer: &Tokenizer,
    given: Option<String>,
) -> Result<Option<Dialect>> {
    let source = match given {
        Some(source) => Some(source),
        None => prepared
            .gguf()
            .opt_str("tokenizer.chat_template")?
            .map(str::to_string),
    };
    let Some(source) = source else {
        return Ok(None);
    };
    let piece =
        |id: Option<u32>| id.map(|id| String::from_utf8_lossy(tokenizer.piece(id)).into_owned());
    let bos = piece(tokenizer.bos()).unwrap_or_default();
    let eos = piece(tokenizer.eos()).unwrap_or_default();
    let template = Template::isolated(&source, &bos, &eos)?;
    let dialect = Dialect::probe(template, true)?;
    dialect.note().iter().for_each(|note| eprintln!("{note}"));
    Ok(Some(dialect))
}

/// Returns the name of a model file without its ending.
pub(super) fn model_name(model: &Path) -> String {
    let name = model.file_stem().unwrap_or(model.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Progress over the lines of the input, on a terminal only.
struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            bar: progress::requests(),
            started: Instant::now(),
        }
    }
}

impl Progress {
    fn show(&self, summary: &Summary) {
        if self.bar.length() != Some(summary.lines as u64) {
            self.bar.set_length(summary.lines as u64);
            // Lines of earlier runs took no time, so that the time left is not reckoned by them.
            self.bar.set_position(summary.earlier as u64);
            self.bar.reset_eta();
        }
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let rate = summary.generated_tokens as f64 / seconds;
        self.bar.set_message(format!("{rate:.1} tok/s"));
        self.bar
            .set_position((summary.earlier + summary.answered + summary.refused) as u64);
    }
}

fn print(args: &BatchArgs, summary: &Summary, texts: usize) -> Result<()> {
    let seconds = summary.took.as_secs_f64();
    let rate = summary.generated_tokens as f64 / seconds.max(1e-9);
    if args.format.json {
        let value = serde_json::json!({
            "requests": summary.lines,
            "answered": summary.answered,
            "refused": summary.refused,
            "answered_before": summary.earlier,
            "refused_before": summary.earlier_refused,
            "prompt_tokens": summary.prompt_tokens,
            "shared_tokens": summary.shared_tokens,
            "generated_tokens": summary.generated_tokens,
            "drafted_tokens": summary.drafted_tokens,
            "accepted_tokens": summary.accepted_tokens,
            "seconds": seconds,
            "tokens_per_second": rate,
            "parallel": texts,
            "preempted": summary.preempted,
            "interrupted": summary.interrupted,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let output = args.output.display().to_string();
    let output = printable(&output);
    eprintln!(
        "{} of {} requests answered in {output}: {} tokens in {seconds:.1} s, {rate:.1} tok/s",
        summary.answered, summary.lines, summary.generated_tokens
    );
    if summary.drafted_tokens > 0 {
        eprintln!(
            "{} of {} drafted tokens were right",
            summary.accepted_tokens, summary.drafted_tokens
        );
    }
    if summary.earlier > 0 {
        let errors = match summary.earlier_refused {
            0 => String::new(),
            n => format!(", {n} of them with an error"),
        };
        eprintln!("{} were answered before{errors}", summary.earlier);
    }
    if summary.refused > 0 {
        eprintln!(
            "{} have no answer: their lines in {output} have an error",
            summary.refused
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::{Command, parse_alone};

    #[test]
    fn the_model_is_an_argument_or_an_option() {
        for line in ["m r", "-m m r", "r --model m"] {
            let line = format!("tier-plan batch {line} -o o");
            let words = line.split_whitespace().map(Into::into);
            let Ok(Command::Batch(args)) = parse_alone(words) else {
                panic!("{line}");
            };
            let files = (Path::new("m"), Path::new("r"));
            assert_eq!(args.files().unwrap(), files, "{line}");
        }
        for line in ["batch m -o o", "batch m r", "batch -m m a b -o o"] {
            let words = ["tier-plan"].into_iter().chain(line.split_whitespace());
            assert!(parse_alone(words.map(Into::into)).is_err(), "{line}");
        }
    }

    #[test]
    fn a_model_has_the_name_of_its_file() {
        assert_eq!(model_name(Path::new("/a/b.Q4_K_M.gguf")), "b.Q4_K_M");
    }
}
