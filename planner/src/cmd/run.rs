//! `tier-plan run`: continues a text, and says what that cost.

use crate::cli::{RunArgs, SamplingArgs};
use crate::cmd::chat;
use crate::session::{self, Opening, Session};
use crate::{host, print};
use anyhow::{Context, Result, bail, ensure};
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::time::SystemTime;
use tier_plan_runtime::engine::generate::{Limits, generate};
use tier_plan_runtime::engine::measure::{Circumstances, record};
use tier_plan_runtime::formats::record::RunRecord;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::units::show_utc;

/// Tokens to generate unless told otherwise.
const DEFAULT_TOKENS: u32 = 128;

/// How the model is to be opened, for one text and for a chat.
pub(super) fn opening(args: &RunArgs) -> Result<Opening<'_>> {
    Ok(Opening {
        plan: args.plan.as_deref(),
        dram: session::dram(args.dram.as_deref())?,
        profile: args.profile.as_deref(),
        context: args.ctx,
        threads: args.threads,
        mapped: args.mmap,
        numa: args.numa,
        kv_type: args.kv_type,
        verify: args.store.verify.asked(),
        pack: args.store.pack.as_deref(),
        slots: args.store.slots.as_deref(),
        warm: args.store.warm.as_deref(),
    })
}

/// Runs it.
pub fn run(args: &RunArgs) -> Result<()> {
    if chat::is_wanted(args) {
        return chat::run(args);
    }
    let sampling = sampler_config(&args.sampling)?;
    if let Some(path) = &args.record {
        safely::check(path)?;
    }
    let text = prompt_text(args)?;
    let mut session = Session::open(&args.model, opening(args)?)?;
    let tokenizer = session.tokenizer_with(args.tokenizer_pre.as_deref())?;
    let prompt = tokenizer.encode(&text, true)?;
    ensure!(!prompt.is_empty(), "the prompt is empty; give some text with --prompt or --file");
    if !args.json {
        for line in session.residency() {
            eprintln!("{line}");
        }
    }
    let _catching = session::catch_interrupts();
    let loading_s = session.started.elapsed().as_secs_f64();
    let mut stream = tokenizer.stream();
    let mut output = std::io::stdout().lock();
    let mut answer = String::new();
    let mut write_error = None;
    let is_end = |token| !args.ignore_eos && tokenizer.is_eog(token);
    let limits = Limits { max_tokens: args.tokens.unwrap_or(DEFAULT_TOKENS) as usize, is_end: &is_end };
    let mut sampler = Sampler::new(sampling);
    let generated = generate(&mut session.engine, &prompt, &mut sampler, &limits, |_, token| {
        let piece = stream.push(token);
        if !args.json
            && let Err(error) = output.write_all(piece.as_bytes()).and_then(|()| output.flush())
        {
            write_error = Some(error);
            return ControlFlow::Break(());
        }
        answer.push_str(&piece);
        if session::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let tail = stream.finish();
    answer.push_str(&tail);
    if let Some(error) = write_error {
        print::cannot_print(&error);
    }
    let circumstances = Circumstances {
        when: show_utc(SystemTime::now()),
        host: host::describe(),
        first_token_s: loading_s + generated.first_token.as_secs_f64(),
    };
    let record = record(&session.engine, &generated, &circumstances);
    if let Some(path) = &args.record {
        record.write(path)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json(&record, &answer)?)?);
    } else {
        println!("{tail}");
        print::speed(&record);
        if session.engine.warmed() > 0 {
            eprintln!("{} slots were filled in the background before anybody asked", session.engine.warmed());
        }
        if args.stats {
            print::layers(&record);
        }
    }
    session.keep()?;
    // All that there is has been told and kept.
    if session::interrupted() { Err(session::Interrupted.into()) } else { Ok(()) }
}

/// The record with the text it stands for.
fn json(record: &RunRecord, text: &str) -> Result<serde_json::Value> {
    let mut value: serde_json::Value = serde_json::from_str(&record.encode()).context("encoding the run record")?;
    if let Some(object) = value.as_object_mut() {
        object.insert("text".into(), text.into());
    }
    Ok(value)
}

/// Checked sampling options.
pub fn sampler_config(args: &SamplingArgs) -> Result<SamplerConfig> {
    let config = SamplerConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repeat_penalty: args.repeat_penalty,
        repeat_last_n: args.repeat_last_n,
        seed: args.seed,
    };
    config.check()?;
    Ok(config)
}

fn prompt_text(args: &RunArgs) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) if path.as_os_str() != "-" => {
            std::fs::read_to_string(path).with_context(|| format!("reading the prompt {}", path.display()))
        }
        (None, None) if std::io::stdin().is_terminal() => {
            bail!("no text to continue; give --prompt TEXT, --file FILE, or pipe it in")
        }
        _ => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("reading the prompt from standard input")?;
            Ok(text)
        }
    }
}
