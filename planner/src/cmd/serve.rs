//! `tier-plan serve`: answers requests over HTTP.

use crate::auto::MAX_CHOICES;
use crate::chat::SharedDialect;
use crate::cmd::args::sampling;
use crate::cmd::args::{MaxStep, ModelArgs, TextsArgs, check_key};
use crate::cmd::batch::{Asked, Parallel, Speeds, model_name, template};
use crate::hint::HintExt;
use crate::interrupt::Interrupted;
use crate::parallel::{self, Routing};
use crate::prepared::Prepared;
use crate::printable::printable;
use crate::replan::worker;
use crate::session::Session;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tier_plan_runtime::Cancel;
use tier_plan_runtime::batcher::{Batcher, Options};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_serve::prompts::Chats;
use tier_plan_serve::{
    Config, Limits, Question, Replan, Replanned, Security, Server, Setup, Traces,
};

/// Most texts that may be let wait.
const MAX_QUEUE: u64 = 65_536;

/// Options of `tier-plan serve`.
#[derive(Debug, Args)]
#[command(
    about = "Serve a model over HTTP, in the protocols of OpenAI and Anthropic",
    after_long_help = "Example:\n  tier-plan serve MODEL.gguf\n\n  \
                       curl http://127.0.0.1:8080/v1/completions \\\n    \
                       -d '{\"prompt\": \"Once upon a time\", \"max_tokens\": 32}'\n\n\
                       docs/SERVING.md has the endpoints."
)]
pub struct ServeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Address to listen on; any but this machine's own needs --api-key
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), help_heading = "Server")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8080,
        help_heading = "Server"
    )]
    pub port: u16,
    /// Key that requests must bring; better given as the variable than on the command line, which
    /// other users can see
    #[arg(
        long,
        value_name = "KEY",
        hide_env_values = true,
        help_heading = "Server"
    )]
    pub api_key: Option<String>,
    /// Let web pages of this origin use the server, such as https://example.com; repeat the option
    /// for more, `*` is all
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    pub cors: Vec<String>,
    /// Name of the model in answers [default: the file's]
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    pub alias: Option<String>,
    /// Texts that may wait beside those at work; more are refused with status 429
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=MAX_QUEUE),
        help_heading = "Server"
    )]
    pub max_queue: usize,
    /// Write the log as JSON, one object per line
    #[arg(long, help_heading = "Server")]
    pub log_json: bool,
    /// End when standard input does, so that no server outlives the program that started it
    #[arg(long, hide = true)]
    pub end_with_input: bool,
    /// Most milliseconds between two tokens of a text while prompts are read, or `auto` for what the
    /// predicted steps suggest
    #[arg(
        long,
        value_name = "N",
        default_value = "auto",
        help_heading = "Generation"
    )]
    pub max_step_ms: MaxStep,
    /// Profile to record which experts real use chooses; it has no texts, `solve` plans with it,
    /// and a later run adds to it
    #[arg(long, value_name = "FILE", help_heading = "Generation")]
    pub profile_out: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub texts: TextsArgs,
}

impl ServeArgs {
    /// Checks who may use the server.
    fn security(&self) -> Result<Security> {
        if let Some(key) = &self.api_key {
            check_key(key)?;
        }
        if !self.host.is_loopback() && self.api_key.is_none() {
            let open = format!(
                "--host: {}, expected 127.0.0.1, or a key that requests must bring",
                self.host
            );
            return Err(anyhow!(open)).hint("pass --api-key KEY, or set TIER_PLAN_API_KEY");
        }
        for origin in &self.cors {
            let is_origin = origin
                .split_once("://")
                .is_some_and(|(scheme, host)| !scheme.is_empty() && !host.is_empty());
            let is_plain = origin.bytes().all(|b| b.is_ascii_graphic());
            if origin != "*" && !(is_origin && is_plain && !origin.ends_with('/')) {
                bail!(
                    "--cors: \"{}\", expected an origin such as https://example.com, or *",
                    printable(origin)
                );
            }
        }
        Ok(Security {
            api_key: self.api_key.clone(),
            cors: self.cors.clone(),
        })
    }

    fn config(&self, model: &Path, sampling: SamplerConfig) -> Result<Config> {
        Ok(Config {
            model: self.alias.clone().unwrap_or_else(|| model_name(model)),
            file: model
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            limits: Limits {
                max_queue: self.max_queue,
                ..Limits::default()
            },
            security: self.security()?,
            sampling,
            max_tokens: self.texts.max_tokens()?,
            json_log: self.log_json,
        })
    }
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, the address is taken, or the model cannot be loaded.
pub fn run(args: &ServeArgs) -> Result<()> {
    if args.end_with_input {
        crate::interrupt::end_with_input().context("watching standard input")?;
    }
    let model = args.model.path()?;
    let sampling = args.texts.sampling.checked()?;
    args.texts.kept.bytes()?;
    let config = args.config(model, sampling)?;
    let opening = args.texts.opening()?;
    let given = args.texts.template()?;
    let listener = listen(args)?;
    let prepared = Prepared::open(model, opening)?;
    sampling::check_biases(&config.sampling, prepared.spec().n_vocab)?;
    let tokenizer = Arc::new(prepared.tokenizer_with(args.texts.pre.tokenizer_pre.as_deref())?);
    let traces_file = args.profile_out.as_deref().or(prepared.learns());
    let traces_file = traces_file.map(Path::to_path_buf);
    let mut traces = traces(args, &prepared)?;
    let template = template(&prepared, &tokenizer, given)?;
    let routing = parallel::routing(args.texts.routing.as_deref(), model, &prepared)?;
    let chats = template
        .map(|dialect| Arc::new(SharedDialect::new(dialect)) as Arc<dyn Chats + Send + Sync>);
    let cancel = Cancel::default();
    let setup = Setup {
        config,
        tokenizer: Arc::clone(&tokenizer),
        chats,
        replan: traces.is_some().then(|| {
            let model = model.to_path_buf();
            Arc::new(Replanner { model }) as Arc<dyn Replan>
        }),
        n_vocab: prepared.spec().n_vocab,
        context: prepared.context(),
        cancel: cancel.clone(),
        should_stop: Box::new(crate::interrupt::interrupted),
    };
    let address = listener
        .local_addr()
        .context("the address of the listener")?;
    let server = Server::start(listener, setup).context("starting the server")?;
    eprintln!("http://{address}: loading the model");
    let prepared = prepared.canceled_by(cancel).watched(server.progress());
    let mut session = prepared.load()?;
    args.texts.kept.open(&mut session.engine)?;
    session
        .residency()
        .iter()
        .for_each(|line| eprintln!("{line}"));
    let place = (server, address);
    let answered = answer(
        args,
        &mut session,
        (&tokenizer, &routing),
        traces.as_mut(),
        place,
    );
    if let Some(traces) = &mut traces {
        match record(traces, traces_file.as_deref()) {
            Err(error) if args.profile_out.is_none() => {
                let why = printable(&format!("{error:#}")).into_owned();
                eprintln!("note: nothing was learned from this server: {why}");
            }
            recorded => recorded?,
        }
    }
    answered?;
    session.keep()?;
    args.texts.kept.warn(&mut session.engine);
    // Only a signal ends a server.
    Err(Interrupted.into())
}

/// Opens the profile that texts are recorded in, if they are.
fn traces(args: &ServeArgs, prepared: &Prepared<'_>) -> Result<Option<Traces>> {
    let open = |path: &Path| {
        safely::check_file(path)?;
        Ok::<_, anyhow::Error>(Traces::open(path, prepared.gguf().id(), prepared.spec())?)
    };
    if let Some(path) = &args.profile_out {
        return open(path).context("--profile-out").map(Some);
    }
    // A model is served whether or not anything can be learned.
    match prepared.learns().map(open) {
        Some(Ok(traces)) => Ok(Some(traces.at_most(MAX_CHOICES))),
        Some(Err(error)) => {
            let why = printable(&format!("{error:#}")).into_owned();
            eprintln!("note: nothing is learned from this server: {why}");
            Ok(None)
        }
        None => Ok(None),
    }
}

/// Answers requests until a signal comes.
fn answer(
    args: &ServeArgs,
    session: &mut Session,
    (tokenizer, routing): (&Tokenizer, &Routing),
    traces: Option<&mut Traces>,
    (server, address): (Server, SocketAddr),
) -> Result<()> {
    let _catching = crate::interrupt::catch_interrupts();
    let asked = Asked {
        parallel: args.texts.parallel,
        max_step: Some(args.max_step_ms),
        has_plan: args.texts.memory.plan.is_some(),
    };
    let speeds = Speeds::choose(asked, session, routing);
    let options = Options {
        max_texts: speeds.texts as usize,
        max_step: speeds.max_step,
        max_drafts: args.texts.draft,
        cost: speeds.cost,
    };
    let mut batcher = Batcher::new(&mut session.engine, tokenizer, options);
    let texts = batcher.max_texts();
    eprintln!("{}", speeds.why);
    if let (Parallel::Auto, Routing::Unknown(Some(note))) = (args.texts.parallel, routing) {
        eprintln!("note: {note}");
    }
    let on_ready = || eprintln!("http://{address}: ready, up to {texts} texts at once");
    let summary = server
        .work(&mut batcher, traces, on_ready)
        .context("serving")?;
    eprintln!(
        "{} texts answered, {} left by their clients, {} failed",
        summary.answered, summary.abandoned, summary.failed
    );
    Ok(())
}

/// Makes plans for the model that is served.
struct Replanner {
    model: PathBuf,
}

impl Replan for Replanner {
    fn replan(&self, question: &Question) -> Result<Replanned, String> {
        worker::ask(&self.model, question).map_err(|error| format!("{error:#}"))
    }
}

/// Writes what is not written yet of the profile of real use.
fn record(traces: &mut Traces, path: Option<&Path>) -> Result<()> {
    traces.write()?;
    let path = path.unwrap_or(Path::new("")).display();
    match traces.n_texts() {
        0 => eprintln!("no text was recorded, so {path} is not written"),
        n => eprintln!("{path} has the choices of {n} texts"),
    }
    Ok(())
}

/// Takes the address before anything is read, so that one that is in use is known at once.
fn listen(args: &ServeArgs) -> Result<TcpListener> {
    let address = (args.host, args.port);
    TcpListener::bind(address)
        .with_context(|| format!("listening on {}, port {}", args.host, args.port))
        .hint("pass another --port, or 0 for a free one")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::{Command, parse_alone};

    fn parsed(more: &str) -> ServeArgs {
        let line = format!("tier-plan serve m {more}");
        let words = line.split_whitespace().map(Into::into);
        match parse_alone(words) {
            Ok(Command::Serve(args)) => args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn an_open_address_needs_a_key() {
        assert!(parsed("").security().is_ok());
        assert!(parsed("--host ::1").security().is_ok());
        assert!(parsed("--host 127.0.0.2").security().is_ok());
        for host in ["0.0.0.0", "::", "192.168.1.7"] {
            let open = parsed(&format!("--host {host}")).security();
            assert!(open.is_err_and(|e| e.to_string().contains(host)));
            let keyed = format!("--host {host} --api-key secret");
            assert!(parsed(&keyed).security().is_ok());
        }
        let bad = ["tier-plan", "serve", "m", "--api-key", "a b"];
        let Ok(Command::Serve(bad)) = parse_alone(bad.map(Into::into)) else {
            panic!("a key with a space");
        };
        assert!(bad.security().is_err());
    }

    #[test]
    fn origins_are_checked() {
        for origin in [
            "*",
            "https://example.com",
            "http://localhost:3000",
            "app://x",
        ] {
            assert!(
                parsed(&format!("--cors {origin}")).security().is_ok(),
                "{origin}"
            );
        }
        for origin in ["example.com", "https://", "https://example.com/", "://x"] {
            assert!(
                parsed(&format!("--cors {origin}")).security().is_err(),
                "{origin}"
            );
        }
    }
}
