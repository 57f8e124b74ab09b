//! `tier-plan profile`: which experts a model uses, over calibration prompts.

use crate::bundled;
use crate::cli::ProfileArgs;
use crate::profile::collect::{Settings, collect};
use crate::profile::{prompts, stats};
use crate::session::{self, Opening, Session};
use anyhow::{Result, ensure};
use std::path::PathBuf;
use tier_plan_runtime::sampler::SamplerConfig;

/// Runs it.
pub fn run(args: &ProfileArgs) -> Result<()> {
    ensure!(args.prompt_tokens > 0, "--prompt-tokens 0 leaves nothing to process; give 1 or more");
    let settings = Settings {
        prompt_tokens: args.prompt_tokens,
        decode_tokens: args.decode_tokens,
        temperature: args.temperature,
        seed: args.seed,
    };
    SamplerConfig { temperature: args.temperature, ..SamplerConfig::default() }.check()?;
    session::catch_interrupts();
    let folder = match &args.prompts {
        Some(folder) => folder.clone(),
        None => bundled::path("prompts")?,
    };
    let prompts = prompts::read(&folder)?;
    let output = args.output.clone().unwrap_or_else(|| {
        let stem = args.model.file_stem().unwrap_or_default();
        let mut name = PathBuf::from(stem);
        name.as_mut_os_string().push(".profile");
        name
    });
    let opening = Opening { context: Some(settings.context()), threads: args.threads, ..Opening::default() };
    let mut session = Session::open(&args.model, opening)?;
    let tokenizer = session.tokenizer()?;
    let profile = collect(&mut session, &tokenizer, &prompts, settings, &output, args.restart)?;
    stats::show(&profile, &output, args.json)
}
