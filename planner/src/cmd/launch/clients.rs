//! The agents: how each is installed, and what makes it talk to a server.
//!
//! Settings are those of Claude Code 2.1, Codex 0.171, and opencode 1.18.

use super::setup::{Endpoint, SETTINGS, Setup};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// Longest wait for an answer, or for its next part. A long prompt takes minutes to read where
/// experts come from a drive.
const PATIENCE_MS: u64 = 3_600_000;

/// Most tokens per answer, which is Claude Code's own limit.
const MAX_ANSWER: usize = 32_000;

/// Variable that holds the key of the server, so that no command line has it.
const KEY: &str = "TIER_PLAN_API_KEY";

/// Name of the provider in the configuration of clients.
const PROVIDER: &str = "tier-plan";

/// What stands for a key where a client wants one and the server does not.
const NO_KEY: &str = "none";

/// An agent.
#[derive(Debug)]
pub(super) struct Client {
    pub program: &'static str,
    pub name: &'static str,
    /// Command that installs it.
    pub install: &'static str,
    /// Tokens of its instructions and tools, measured as SmolLM2's.
    pub first_tokens: usize,
    set_up: fn(&Endpoint, &mut Setup),
}

pub(super) static CLAUDE: Client = Client {
    program: "claude",
    name: "Claude Code",
    install: "npm install -g @anthropic-ai/claude-code",
    first_tokens: 20_300,
    set_up: claude,
};

pub(super) static CODEX: Client = Client {
    program: "codex",
    name: "Codex",
    install: "npm install -g @openai/codex",
    first_tokens: 9_100,
    set_up: codex,
};

pub(super) static OPENCODE: Client = Client {
    program: "opencode",
    name: "opencode",
    install: "npm install -g opencode-ai",
    first_tokens: 7_700,
    set_up: opencode,
};

impl Client {
    /// Returns what makes the client talk to a server; `args` are the user's own for the client.
    pub fn setup(&self, endpoint: &Endpoint, args: &[OsString]) -> Setup {
        let mut setup = Setup::new(args);
        if let Some(key) = &endpoint.key {
            setup.secret(KEY, key);
        }
        (self.set_up)(endpoint, &mut setup);
        setup.leave_proxy(&endpoint.host);
        setup
    }
}

/// Returns the most tokens of an answer, so that a conversation fits beside it.
fn max_answer(context: usize) -> usize {
    (context / 4).clamp(1, MAX_ANSWER)
}

/// Sets up Claude Code. Variables that its own settings files give win over those of the process, so
/// they are given as settings, too, which win over both.
fn claude(endpoint: &Endpoint, setup: &mut Setup) {
    let model = &endpoint.model;
    let wait = PATIENCE_MS.to_string();
    setup.variable("ANTHROPIC_BASE_URL", &endpoint.url);
    let key = endpoint.key.as_deref().unwrap_or(NO_KEY);
    setup.secret("ANTHROPIC_AUTH_TOKEN", key);
    for name in [
        "ANTHROPIC_MODEL",
        "ANTHROPIC_DEFAULT_FABLE_MODEL",
        "ANTHROPIC_DEFAULT_OPUS_MODEL",
        "ANTHROPIC_DEFAULT_SONNET_MODEL",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL",
        "CLAUDE_CODE_SUBAGENT_MODEL",
    ] {
        setup.variable(name, model);
    }
    if let Some(context) = endpoint.context {
        let answer = max_answer(context).to_string();
        setup.variable("CLAUDE_CODE_MAX_CONTEXT_TOKENS", &context.to_string());
        setup.variable("CLAUDE_CODE_MAX_OUTPUT_TOKENS", &answer);
    }
    setup.variable("API_TIMEOUT_MS", &wait);
    setup.variable("CLAUDE_STREAM_IDLE_TIMEOUT_MS", &wait);
    setup.variable("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1");
    // A block before the system prompt that differs between conversations.
    setup.variable("CLAUDE_CODE_ATTRIBUTION_HEADER", "0");
    // Each would win over the key or the address, or send them elsewhere.
    for name in [
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_CUSTOM_HEADERS",
        "CLAUDE_CODE_API_BASE_URL",
        "CLAUDE_CODE_USE_BEDROCK",
        "CLAUDE_CODE_USE_FOUNDRY",
        "CLAUDE_CODE_USE_VERTEX",
    ] {
        setup.remove(name);
    }
    if !setup.has_option("--settings") {
        setup.settings();
        setup.option("--settings");
        setup.option(SETTINGS);
    }
}

/// Sets up Codex by options, which win over its `config.toml`.
fn codex(endpoint: &Endpoint, setup: &mut Setup) {
    let text = |text: &str| toml::Value::String(text.to_string()).to_string();
    let mut provider = vec![
        format!("name={}", text(PROVIDER)),
        format!("base_url={}", text(&format!("{}/v1", endpoint.url))),
        format!("wire_api={}", text("responses")),
        format!("stream_idle_timeout_ms={PATIENCE_MS}"),
    ];
    if endpoint.key.is_some() {
        provider.push(format!("env_key={}", text(KEY)));
    }
    let mut config = |entry: String| {
        setup.option("-c");
        setup.option(&entry);
    };
    config(format!("model_provider={}", text(PROVIDER)));
    config(format!("model={}", text(&endpoint.model)));
    if let Some(context) = endpoint.context {
        config(format!("model_context_window={context}"));
    }
    config(format!(
        "model_providers.{PROVIDER}={{{}}}",
        provider.join(",")
    ));
}

/// Sets up opencode by a variable with configuration, which wins over its files.
fn opencode(endpoint: &Endpoint, setup: &mut Setup) {
    let mut model = json!({ "name": endpoint.model });
    if let Some(context) = endpoint.context {
        model["limit"] = json!({ "context": context, "output": max_answer(context) });
    }
    let mut options = json!({
        "baseURL": format!("{}/v1", endpoint.url),
        "timeout": false,
        "headerTimeout": false,
        "chunkTimeout": false,
    });
    if endpoint.key.is_some() {
        options["apiKey"] = format!("{{env:{KEY}}}").into();
    }
    let name = format!("{PROVIDER}/{}", endpoint.model);
    let config = json!({
        "model": name,
        "small_model": name,
        "provider": { PROVIDER: {
            "npm": "@ai-sdk/openai-compatible",
            "name": PROVIDER,
            "options": options,
            "models": { endpoint.model.as_str(): model },
        }},
    });
    setup.variable("OPENCODE_CONFIG_CONTENT", &config.to_string());
}

/// Returns the first file of a name in the folders of PATH that can be run.
pub(super) fn find(program: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    let endings: &[&str] = if cfg!(windows) {
        &[".exe", ".cmd"]
    } else {
        &[""]
    };
    std::env::split_paths(path?)
        .filter(|folder| !folder.as_os_str().is_empty())
        .flat_map(|folder| {
            endings
                .iter()
                .map(move |ending| folder.join(format!("{program}{ending}")))
        })
        .find(|path| can_run(path))
}

#[cfg(unix)]
fn can_run(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn can_run(path: &Path) -> bool {
    path.is_file()
}
