//! `tier-plan perplexity`: how well a model predicts a text, alone or against saved
//! log-probabilities of another run.

use crate::cmd::args::{JsonArgs, KvArgs, ModelArgs, PreTokenizerArgs, ThreadArgs, VerifyArgs};
use crate::hint::HintExt;
use crate::json::path_json;
use crate::opening::Opening;
use crate::perplexity::{Against, Place, Scores, divergence, fill_row, in_parallel, place};
use crate::prepared::Prepared;
use crate::progress;
use crate::text;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use serde_json::json;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use tier_plan_runtime::formats::logprobs::{Reader, Reference, Row, Writer, scored_per_window};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::units::show_utc;
use tier_plan_runtime::{Engine, LogitsMode, RunError};

/// Options of `tier-plan perplexity`.
#[derive(Debug, Args)]
#[command(
    about = "Measure how well the model predicts a text",
    after_long_help = "Example:\n  tier-plan perplexity MODEL.gguf -f wiki.test.raw --windows 20\n  \
                       tier-plan perplexity Q8_0.gguf -f wiki.test.raw --save-logits-base base.logprobs\n  \
                       tier-plan perplexity Q4_0.gguf --logits-base base.logprobs"
)]
pub struct PerplexityArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Text to score
    #[arg(
        short,
        long,
        value_name = "FILE",
        required_unless_present = "logits_base"
    )]
    pub file: Option<PathBuf>,
    /// Placement plan [default: everything in main memory]
    #[arg(long, value_name = "FILE", help_heading = "Memory")]
    pub plan: Option<PathBuf>,
    /// Tokens per window, of which the second half is scored [default: 512, or that of
    /// --logits-base]
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        alias = "ctx",
        value_name = "N"
    )]
    pub context: Option<u32>,
    /// Most windows to score [default: all]
    #[arg(long, visible_alias = "chunks", value_name = "N")]
    pub windows: Option<u32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kv: KvArgs,
    /// Write the log-probabilities of the whole vocabulary to this file, as a base to compare with
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "logits_base",
        help_heading = "Output"
    )]
    pub save_logits_base: Option<PathBuf>,
    /// Compare with the log-probabilities in this file, on its text
    #[arg(long, value_name = "FILE")]
    pub logits_base: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub verify: VerifyArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pre: PreTokenizerArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Default tokens per window, as in llama.cpp.
const DEFAULT_WINDOW: u32 = 512;
/// Most bytes of logits held at once.
const MAX_LOGIT_BYTES: usize = 256 << 20;

type BaseReader = Reader<BufReader<std::fs::File>>;

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &PerplexityArgs) -> Result<()> {
    let mut base = args.logits_base.as_deref().map(Reader::open).transpose()?;
    let ctx = match (&base, args.context) {
        (Some(base), Some(ctx)) if base.reference().ctx != ctx => {
            let expected = base.reference().ctx;
            let differs = format!(
                "--context: {ctx}, expected {expected} tokens, the windows of --logits-base"
            );
            return Err(anyhow!(differs)).hint("leave --context out");
        }
        (Some(base), _) => base.reference().ctx,
        (None, ctx) => ctx.unwrap_or(DEFAULT_WINDOW),
    };
    ensure!(
        ctx >= 4,
        "--context: {ctx}, expected 4 or more tokens per window"
    );
    ensure!(args.windows != Some(0), "--windows: 0, expected 1 or more");
    let file = args.file.as_deref();
    let text = file
        .map(|path| text::read_file("the text", path))
        .transpose()?;
    if let Some(path) = &args.save_logits_base {
        safely::check(path)?;
    }
    let opening = Opening {
        plan: args.plan.as_deref(),
        context: Some(ctx),
        threads: args.threads.checked()?,
        kv_type: args.kv.checked()?,
        verify: args.verify.asked(),
        ..Opening::default()
    };
    let prepared = Prepared::open(args.model.path()?, opening)?;
    let tokens = match (&text, &base) {
        (Some(text), base) => {
            let tokens = tokenize(&prepared, text, ctx, args)?;
            if let Some(base) = base {
                check_tokens(
                    &tokens,
                    base.reference(),
                    args.logits_base.as_deref().unwrap_or(Path::new("")),
                )?;
            }
            tokens
        }
        (None, Some(base)) => base.reference().tokens.clone(),
        (None, None) => bail!("no text to score, expected --file FILE"),
    };
    let n_vocab = prepared.spec().n_vocab;
    if let Some(base) = &base {
        let theirs = base.reference().n_vocab;
        ensure!(
            theirs as usize == n_vocab,
            "the reference log-probabilities are of a vocabulary of {theirs} tokens, but the model has {n_vocab}; they can't be compared"
        );
    }
    let mut session = prepared.load()?;
    if !args.format.json {
        session
            .residency()
            .iter()
            .for_each(|line| eprintln!("{line}"));
    }
    let _catching = crate::interrupt::catch_interrupts();
    let mut windows: Vec<&[u32]> = tokens.chunks_exact(ctx as usize).collect();
    windows.truncate(args.windows.map_or(usize::MAX, |most| most as usize));
    let done = match &args.save_logits_base {
        Some(path) => {
            let reference = Reference {
                model: session.gguf.id(),
                made: show_utc(SystemTime::now()),
                n_vocab: u32::try_from(n_vocab)
                    .context("the vocabulary has more tokens than ids can count")?,
                ctx,
                tokens: tokens.clone(),
            };
            save(&mut session.engine, &windows, &reference, path)?
        }
        None => {
            let mut compare = |places: &[Place],
                               logits: &[f32],
                               scores: &mut Scores,
                               threads: usize| match &mut base {
                Some(base) => compare_with(base, places, logits, n_vocab, scores, threads),
                None => Ok(()),
            };
            score(&mut session.engine, &windows, &mut compare)?
        }
    };
    // Past the last row the reader checks the whole file.
    let all = base
        .as_ref()
        .is_some_and(|b| b.reference().rows() == done.scores.nll.n);
    if let (Some(base), true) = (&mut base, all) {
        ensure!(
            !base.next(&mut Row::default())?,
            "the reference has more places than the text"
        );
    }
    show(&done, ctx, args)
}

/// Returns the tokens of the text, cut to whole windows, with BOS at the start of each.
fn tokenize(
    prepared: &Prepared<'_>,
    text: &str,
    ctx: u32,
    args: &PerplexityArgs,
) -> Result<Vec<u32>> {
    let tokenizer = prepared.tokenizer_with(args.pre.tokenizer_pre.as_deref())?;
    let bos = tokenizer.prefix();
    // Special tokens that occur in the text are scored as plain text.
    let mut tokens: Vec<u32> = bos.into_iter().collect();
    tokens.extend(tokenizer.encode(text, false)?);
    let ctx = ctx as usize;
    if tokens.len() < ctx {
        let short = format!(
            "the text has {} tokens, expected at least one window of {ctx}",
            tokens.len()
        );
        return Err(anyhow!(short)).hint("pass a longer text or a smaller --context");
    }
    let mut windows = tokens.len() / ctx;
    if let Some(most) = args.windows {
        windows = windows.min(most as usize);
    }
    tokens.truncate(windows * ctx);
    if let Some(bos) = bos {
        tokens
            .iter_mut()
            .step_by(ctx)
            .for_each(|first| *first = bos);
    }
    Ok(tokens)
}

fn check_tokens(tokens: &[u32], reference: &Reference, path: &Path) -> Result<()> {
    let wanted = &reference.tokens;
    if let Some(at) = tokens.iter().zip(wanted).position(|(a, b)| a != b) {
        let differs = format!(
            "{}: its text differs from --file at token {at} ({} there, {} here)",
            path.display(),
            wanted[at],
            tokens[at]
        );
        return Err(anyhow!(differs)).hint("leave --file out to use the text of --logits-base");
    }
    ensure!(
        tokens.len() <= wanted.len(),
        "{}: holds {} tokens, but --file has {}",
        path.display(),
        wanted.len(),
        tokens.len()
    );
    Ok(())
}

/// Scores and times of a run.
struct Done {
    scores: Scores,
    windows: usize,
    forwarded: u64,
    forward: Duration,
    total: Duration,
    interrupted: bool,
}

/// Callback with the scored positions and their logits.
type Also<'a> = &'a mut dyn FnMut(&[Place], &[f32], &mut Scores, usize) -> Result<()>;

/// Runs tokens, and returns their logits, or `None` when interrupted.
fn forward<'e>(
    engine: &'e mut Engine,
    tokens: &[u32],
    mode: LogitsMode,
) -> Result<Option<&'e [f32]>> {
    match engine.forward(tokens, mode) {
        Ok(logits) => Ok(Some(logits)),
        Err(RunError::Canceled) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Scores window after window; stops when interrupted, and keeps what was scored.
fn score(engine: &mut Engine, windows: &[&[u32]], also: Also<'_>) -> Result<Done> {
    let start = Instant::now();
    let n_vocab = engine.spec().n_vocab;
    let threads = engine.n_threads();
    let at_once = (MAX_LOGIT_BYTES / (4 * n_vocab.max(1))).clamp(1, 512);
    let bar = progress::count("scoring", windows.len() as u64);
    let mut done = Done {
        scores: Scores::default(),
        windows: 0,
        forwarded: 0,
        forward: Duration::ZERO,
        total: Duration::ZERO,
        interrupted: false,
    };
    'windows: for window in windows {
        let first = window.len() / 2;
        let pass = Instant::now();
        engine.clear();
        if forward(engine, &window[..first], LogitsMode::Last)?.is_none() {
            done.interrupted = true;
            break;
        }
        done.forward += pass.elapsed();
        // The last token's own prediction has nothing to be scored on.
        let scored = &window[first..window.len() - 1];
        for (piece, tokens) in scored.chunks(at_once).enumerate() {
            let pass = Instant::now();
            let Some(logits) = forward(engine, tokens, LogitsMode::All)? else {
                done.interrupted = true;
                break 'windows;
            };
            done.forward += pass.elapsed();
            let at = first + piece * at_once;
            let targets = &window[at + 1..at + 1 + tokens.len()];
            let mut places: Vec<Option<Place>> = vec![None; tokens.len()];
            in_parallel(threads, &mut places, |i, found| {
                *found = place(&logits[i * n_vocab..(i + 1) * n_vocab], targets[i]);
            });
            let places: Option<Vec<Place>> = places.into_iter().collect();
            let places = places.with_context(|| {
                format!(
                    "window {}: logits are NaN or infinite; the model file may be damaged",
                    done.windows
                )
            })?;
            places.iter().for_each(|p| done.scores.nll.add(p.nll));
            also(&places, logits, &mut done.scores, threads)?;
        }
        done.forwarded += window.len() as u64 - 1;
        done.windows += 1;
        bar.set_message(format!("perplexity {:.4}", done.scores.perplexity()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    ensure!(
        done.scores.nll.n > 0,
        "interrupted before anything was scored"
    );
    done.total = start.elapsed();
    Ok(done)
}

/// Scores and writes the log-probabilities; an interrupted or failed run leaves no file.
fn save(
    engine: &mut Engine,
    windows: &[&[u32]],
    reference: &Reference,
    path: &Path,
) -> Result<Done> {
    let n_vocab = reference.n_vocab as usize;
    let mut outcome = None;
    let written = safely::with_file(path, |file| {
        let mut writer = Writer::new(file, reference)?;
        let mut rows = Vec::new();
        let done = score(engine, windows, &mut |places, logits, _, threads| {
            rows.resize_with(places.len(), Row::default);
            in_parallel(threads, &mut rows, |i, row| {
                fill_row(&logits[i * n_vocab..(i + 1) * n_vocab], &places[i], row);
            });
            rows.iter()
                .try_for_each(|row| writer.push(row))
                .context("writing log-probabilities")
        });
        match done {
            Ok(done) if done.interrupted => {
                outcome = Some(Err(anyhow::anyhow!(
                    "interrupted; no reference log-probabilities were written"
                )));
                Err(std::io::ErrorKind::Interrupted.into())
            }
            Ok(done) => {
                outcome = Some(Ok(done));
                writer.finish()
            }
            Err(error) => {
                outcome = Some(Err(error));
                Err(std::io::ErrorKind::Other.into())
            }
        }
    });
    match (outcome, written) {
        // The error of scoring explains the missing file, the error of writing doesn't.
        (Some(Err(error)), _) => Err(error.context(path.display().to_string())),
        (_, Err(error)) => Err(error.into()),
        (Some(Ok(done)), Ok(())) => Ok(done),
        (None, Ok(())) => bail!("{}: nothing was written", path.display()),
    }
}

/// Compares scored positions with the reference's.
fn compare_with(
    base: &mut BaseReader,
    places: &[Place],
    logits: &[f32],
    n_vocab: usize,
    scores: &mut Scores,
    threads: usize,
) -> Result<()> {
    let mut rows = Vec::with_capacity(places.len());
    for _ in places {
        let mut row = Row::default();
        ensure!(
            base.next(&mut row)?,
            "the reference has fewer places than the text"
        );
        rows.push((row, 0.0));
    }
    in_parallel(threads, &mut rows, |i, (row, found)| {
        *found = divergence(&logits[i * n_vocab..(i + 1) * n_vocab], &places[i], row);
    });
    let against = scores.against.get_or_insert_with(Against::default);
    places
        .iter()
        .zip(&rows)
        .for_each(|(place, (row, found))| against.add(place, row, *found));
    Ok(())
}

fn show(done: &Done, ctx: u32, args: &PerplexityArgs) -> Result<()> {
    let scores = &done.scores;
    let prompt_tok_s = done.forwarded as f64 / done.forward.as_secs_f64().max(1e-9);
    if args.format.json {
        let mut value = json!({
            "perplexity": scores.perplexity(),
            "perplexity_error": scores.perplexity_error(),
            "nll": scores.nll.value(),
            "tokens_scored": scores.nll.n,
            "windows": done.windows,
            "ctx": ctx,
            "prompt_tok_s": prompt_tok_s,
            "seconds": done.total.as_secs_f64(),
            "interrupted": done.interrupted,
        });
        if let (Some(against), Some(object)) = (&scores.against, value.as_object_mut()) {
            object.insert(
                "against".into(),
                json!({
                    "base": args.logits_base.as_ref().map(path_json),
                    "base_perplexity": against.reference_nll.value().exp(),
                    "perplexity_ratio": against.perplexity_ratio(),
                    "perplexity_ratio_error": against.log_ratio.error() * against.perplexity_ratio(),
                    "kl_mean": against.divergence.value(),
                    "kl_error": against.divergence.error(),
                    "kl_median": against.quantile(0.5),
                    "kl_p99": against.quantile(0.99),
                    "kl_max": against.quantile(1.0),
                    "same_top1": against.same_best_share(),
                }),
            );
        }
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!(
        "perplexity {:.4} ± {:.4} over {} tokens in {} windows of {ctx}{}",
        scores.perplexity(),
        scores.perplexity_error(),
        scores.nll.n,
        done.windows,
        if done.interrupted {
            " (interrupted)"
        } else {
            ""
        }
    );
    if let Some(against) = &scores.against {
        println!(
            "reference perplexity {:.4}, ratio {:.5} ± {:.5}",
            against.reference_nll.value().exp(),
            against.perplexity_ratio(),
            against.log_ratio.error() * against.perplexity_ratio()
        );
        println!(
            "KL divergence from the reference: mean {:.6} ± {:.6}, median {:.6}, 99 % below {:.6}, largest {:.6} nats",
            against.divergence.value(),
            against.divergence.error(),
            against.quantile(0.5),
            against.quantile(0.99),
            against.quantile(1.0)
        );
        println!(
            "same most likely token at {:.2} % of the positions",
            against.same_best_share() * 100.0
        );
    }
    if let Some(path) = &args.save_logits_base {
        println!(
            "reference log-probabilities of {} windows: {}",
            scores.nll.n / u64::from(scored_per_window(ctx)),
            path.display()
        );
    }
    println!("{prompt_tok_s:.1} tok/s, {:.1} s", done.total.as_secs_f64());
    Ok(())
}
