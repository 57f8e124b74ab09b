//! A request between its body and its answer: checked, queued, and collected.

use crate::answer::{Choice, Finish, Place};
use crate::calls::{Call, Part, add};
use crate::error::{ApiError, json_response};
use crate::http::body;
use crate::job::{Command, Job, JobEvent, What, most_events};
use crate::log::{Entry, Texts};
use crate::request::{BadLine, Code, Endpoint, Request};
use crate::sampled::Origin;
use crate::state::State;
use crate::thought::{CallOptions, Splitter};
use crate::truth::{Counts, Timings};
use axum::body::Body;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::batcher::{self, TextOptions, TokenText};
use tier_plan_runtime::sampler::SamplerConfig;
use tokio::sync::mpsc::{Receiver, channel};

/// A request that has been checked and tokenized.
pub(crate) struct Prepared {
    pub request: Request,
    pub options: Arc<TextOptions>,
    /// Text of the prompt, if a template made it.
    pub prompt: String,
    calls: Option<CallOptions>,
}

/// Status in the log of a request whose client left, as nginx has it.
pub(crate) const CLIENT_LEFT: u16 = 499;

tokio::task_local! {
    /// Whether the request at hand is queued, so that its line in the log is that of its texts.
    pub(crate) static QUEUED: Arc<AtomicBool>;
}

/// Marks a response whose line in the log is written elsewhere.
#[derive(Debug, Clone)]
pub(crate) struct HasLog;

pub(crate) fn mark_logged(response: &mut Response) {
    response.extensions_mut().insert(HasLog);
}

impl Prepared {
    /// Tokenizes a request.
    pub fn new(state: &State, request: Request) -> Result<Self, ApiError> {
        let calls = call_options(state, &request)?;
        let encoded = state.prompts().encode_with(&request, state.replay())?;
        let grammar = state.grammars.of(&request, &encoded.text)?;
        let mut stop = request.stop.clone();
        if let Some(calls) = calls.as_ref().filter(|calls| calls.only_one) {
            stop.extend(calls.form.one.iter().map(ToString::to_string));
        }
        let shown = calls
            .as_ref()
            .map_or(Arc::new([]) as Arc<[u32]>, |_| Arc::clone(&state.shown));
        let defaults = &state.config.sampling;
        let options = TextOptions {
            prompt: encoded.tokens,
            max_new: encoded.max_new,
            sampling: SamplerConfig {
                seed: request.seed(defaults.seed),
                ..request.sampling.over(defaults)
            },
            stop,
            shown,
            grammar,
            ignore_eos: request.ignore_eos,
            n_top: request.logprobs,
        };
        Ok(Self {
            request,
            options: Arc::new(options),
            prompt: encoded.text,
            calls,
        })
    }
}

/// Returns how calls in the answer to a request are found.
fn call_options(state: &State, request: &Request) -> Result<Option<CallOptions>, ApiError> {
    if !request.tools.may_call() {
        return Ok(None);
    }
    let refused = |message: &str| BadLine::new(Code::Unsupported, message).into();
    let Some(form) = state.form else {
        return Err(refused(match state.chats {
            Some(_) => {
                "tools: the chat template has no form of calls that is known; leave the field out, or give another \
                 with --chat-template FILE"
            }
            None => {
                "tools: this model has no chat template; leave the field out, or give one with --chat-template FILE"
            }
        }));
    };
    Ok(Some(CallOptions {
        form,
        tools: Arc::clone(&request.tools.list),
        only_one: !request.tools.parallel,
    }))
}

/// Returns the number of tokens in the prompt of a request.
pub(crate) fn count_tokens(state: &State, request: &Request) -> Result<usize, ApiError> {
    call_options(state, request)?;
    let encoded = state.prompts().encode_with(request, state.replay())?;
    Ok(encoded.tokens.len())
}

/// Does work on a body beside the connections, a few at once.
pub(crate) async fn prepare<T: Send + 'static>(
    state: &Arc<State>,
    work: impl FnOnce(&State) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let Ok(_turn) = state.preparing.acquire().await else {
        return Err(ApiError::stopping());
    };
    let shared = Arc::clone(state);
    let done = tokio::task::spawn_blocking(move || work(&shared)).await;
    done.unwrap_or_else(|_| {
        let status = axum::http::StatusCode::INTERNAL_SERVER_ERROR;
        Err(ApiError::new(
            status,
            "server_error",
            "the request could not be read",
        ))
    })
}

/// Receives a body, and prepares the texts that it asks for. `read` takes the name of the request and
/// the body, and returns the request with what its answer needs beside it.
pub(crate) async fn receive<T: Send + 'static>(
    state: &Arc<State>,
    headers: &HeaderMap,
    body: Body,
    read: impl FnOnce(&str, &[u8]) -> Result<(Request, T), BadLine> + Send + 'static,
) -> Result<(Prepared, T), ApiError> {
    let bytes = body::read(state, headers, body).await?;
    let id = state.new_id();
    prepare(state, move |state| {
        let (request, beside) = read(&id, &bytes)?;
        drop(bytes);
        Ok((Prepared::new(state, request)?, beside))
    })
    .await
}

/// What came of a text.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Delta {
    /// Number of the text.
    pub index: usize,
    /// Whether it was admitted just now.
    pub begun: bool,
    pub parts: Vec<Part>,
    pub tokens: Vec<TokenText>,
    /// Where the content begins in the text.
    pub from: Place,
    /// Why it ends, if it does.
    pub finish: Option<batcher::Finish>,
}

/// A text of an answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct TextState {
    pub n_new: usize,
    pub finish: Option<batcher::Finish>,
    /// Calls of tools so far.
    pub n_calls: usize,
    calls: Vec<Call>,
    /// Tokens that were drawn while the text was in a thought.
    pub n_thinking: usize,
    splitter: Option<Splitter>,
    place: Place,
}

/// An answer that is on its way.
pub(crate) struct Answering {
    pub state: Arc<State>,
    pub request: Request,
    pub created: u64,
    pub path: &'static str,
    pub n_prompt: usize,
    /// Tokens of the prompt that the first text began with.
    pub cached: usize,
    pub texts: Vec<TextState>,
    /// Times of the last text that ended.
    pub timings: Timings,
    events: Receiver<JobEvent>,
    received: Instant,
    /// What answers with calls are kept with.
    origin: Option<Origin>,
    has_log: bool,
}

impl Answering {
    /// Puts a request into the queue.
    pub fn begin(
        state: &Arc<State>,
        prepared: Prepared,
        path: &'static str,
        received: Instant,
    ) -> Result<Self, ApiError> {
        let request = prepared.request;
        let Some(loaded) = state.loaded() else {
            return Err(ApiError::loading(state.progress()));
        };
        if request.n > loaded.places {
            let most = loaded.places;
            return Err(ApiError::invalid(format!(
                "n: {}, expected at most {most}, the places of the queue",
                request.n
            )));
        }
        // Bounded by the largest `n` of a request.
        let wanted = request.n as u32;
        let Ok(places) = Arc::clone(&state.places).try_acquire_many_owned(wanted) else {
            let seconds = state.metrics.retry_after(loaded.max_texts);
            let message = format!(
                "the queue is full: {} texts at work or waiting; try again in {seconds} s",
                loaded.places
            );
            return Err(ApiError::overloaded(message, seconds));
        };
        let (sender, events) = channel(most_events(request.n, prepared.options.max_new));
        let n_prompt = prepared.options.prompt.len();
        let job = Job {
            options: prepared.options,
            n: request.n,
            whole: !request.stream.wanted,
            events: sender,
            received,
            places,
        };
        let sent = state.inbox.send(Command::Generate(job));
        sent.map_err(|_| ApiError::stopping())?;
        let _ = QUEUED.try_with(|is_queued| is_queued.store(true, Ordering::Relaxed));
        let origin = prepared.calls.as_ref();
        let origin = origin.map(|_| state.sampled.origin(&prepared.prompt));
        let text = TextState {
            splitter: (request.endpoint == Endpoint::Chat)
                .then(|| Splitter::new(&prepared.prompt, prepared.calls.clone())),
            ..TextState::default()
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            state: Arc::clone(state),
            created: since.map_or(0, |since| since.as_secs()),
            path,
            n_prompt,
            cached: 0,
            texts: vec![text; request.n],
            timings: Timings::default(),
            request,
            events,
            received,
            origin,
            has_log: false,
        })
    }

    /// Returns what comes next, `None` when all texts have ended.
    ///
    /// # Errors
    /// When a text cannot go on.
    pub async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        loop {
            let Some(event) = self.events.recv().await else {
                return match self.texts.iter().all(|text| text.finish.is_some()) {
                    true => Ok(None),
                    false => Err(ApiError::stopping()),
                };
            };
            if let Some(delta) = self.take(event)? {
                return Ok(Some(delta));
            }
        }
    }

    fn take(&mut self, event: JobEvent) -> Result<Option<Delta>, ApiError> {
        let index = event.index;
        let Some(text) = self.texts.get_mut(index) else {
            return Ok(None);
        };
        let (drawn, timings) = match event.what {
            What::Failed(failure) => return Err(failure.into()),
            What::Begun { cached } => {
                self.state.metrics.prompt(self.n_prompt, cached);
                if index == 0 {
                    self.cached = cached;
                }
                return Ok(Some(Delta {
                    index,
                    begun: true,
                    ..Delta::default()
                }));
            }
            What::Drawn(drawn, timings) => (drawn, timings),
        };
        if text.splitter.as_ref().is_some_and(Splitter::is_in_thought) {
            text.n_thinking += drawn.n_new.saturating_sub(text.n_new);
        }
        text.n_new = drawn.n_new;
        text.finish.clone_from(&drawn.finish);
        let from = text.place;
        text.place = from.after(&drawn.text);
        let mut parts = Vec::new();
        match &mut text.splitter {
            None => add(&mut parts, Part::Content(drawn.text)),
            Some(splitter) => {
                let mut came = splitter.push(&drawn.text, drawn.mark);
                if drawn.finish.is_some() {
                    came.extend(splitter.finish());
                }
                came.into_iter().for_each(|part| add(&mut parts, part));
            }
        }
        for part in &mut parts {
            if let Part::Call(call) = part {
                let id = || call_id(&self.request.custom_id, index, text.n_calls);
                call.id.get_or_insert_with(id);
                text.n_calls += 1;
                text.calls.push(call.clone());
            }
        }
        if let Some(origin) = self.origin.filter(|_| !text.calls.is_empty())
            && drawn.finish.is_some()
        {
            let calls = std::mem::take(&mut text.calls);
            self.state.sampled.keep_calls(&calls, origin, drawn.ids);
        }
        if let Some(timings) = timings {
            self.state.metrics.text_ended(&timings, text.n_new);
            self.timings = *timings;
        }
        let is_empty = parts.is_empty() && drawn.tokens.is_empty();
        let delta = Delta {
            index,
            begun: false,
            parts,
            tokens: drawn.tokens,
            from,
            finish: drawn.finish,
        };
        Ok((!is_empty || delta.finish.is_some()).then_some(delta))
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// When a text cannot go on.
    pub async fn collect(&mut self) -> Result<Vec<Collected>, ApiError> {
        let mut all = vec![Collected::default(); self.texts.len()];
        while let Some(delta) = self.next().await? {
            let text = &mut all[delta.index];
            delta
                .parts
                .into_iter()
                .for_each(|part| add(&mut text.parts, part));
            text.tokens.extend(delta.tokens);
        }
        Ok(all)
    }

    /// Returns texts that were collected as choices.
    pub fn choices(&self, all: Vec<Collected>) -> Vec<Choice> {
        let wants_tokens = self.request.logprobs.is_some();
        let texts = all.into_iter().zip(&self.texts);
        texts
            .map(|(collected, text)| {
                let mut choice = Choice {
                    text: String::new(),
                    thinking: None,
                    calls: Vec::new(),
                    finish: finish(text),
                    n_tokens: text.n_new,
                    tokens: wants_tokens.then_some(collected.tokens),
                };
                for part in collected.parts {
                    match part {
                        Part::Content(text) => choice.text.push_str(&text),
                        Part::Call(call) => choice.calls.push(call),
                        Part::Thinking(text) => {
                            choice.thinking.get_or_insert_default().push_str(&text);
                        }
                    }
                }
                choice
            })
            .collect()
    }

    /// Returns the response to a request whose texts have all ended.
    pub fn answered(&mut self, answer: &Value) -> Response {
        self.log(200, None);
        let mut response = json_response(StatusCode::OK, answer);
        mark_logged(&mut response);
        response
    }

    /// Returns the response to a request that failed after it was queued.
    pub fn failed(&mut self, error: ApiError) -> Response {
        self.log(error.status.as_u16(), Some(&error.message));
        let mut response = error.into_response();
        mark_logged(&mut response);
        response
    }

    /// Returns the tokens of all texts.
    pub fn counts(&self) -> Counts {
        Counts {
            prompt: self.n_prompt,
            cached: self.cached,
            new: self.texts.iter().map(|text| text.n_new).sum(),
            thinking: self.texts.iter().map(|text| text.n_thinking).sum(),
        }
    }

    /// Writes the line of the log, once.
    pub fn log(&mut self, status: u16, error: Option<&str>) {
        if std::mem::replace(&mut self.has_log, true) {
            return;
        }
        self.state.metrics.answered(self.path, status);
        let texts = Texts {
            id: self.request.custom_id.clone(),
            counts: self.counts(),
            n: self.texts.len(),
            timings: self.timings.clone(),
            complete: self.texts.iter().all(|text| text.finish.is_some()),
        };
        Entry {
            method: "POST",
            path: self.path,
            status,
            took: self.received.elapsed(),
            error,
            texts: Some(texts),
        }
        .write(&self.state);
    }
}

impl Drop for Answering {
    /// Writes the line of a request whose client left.
    fn drop(&mut self) {
        self.log(CLIENT_LEFT, None);
    }
}

/// A text of an answer that has ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Collected {
    pub parts: Vec<Part>,
    pub tokens: Vec<TokenText>,
}

/// Returns why a text ended in OpenAI's terms.
pub(crate) fn finish(text: &TextState) -> Finish {
    match &text.finish {
        Some(batcher::Finish::Length) => Finish::Length,
        _ if text.n_calls > 0 => Finish::ToolCalls,
        _ => Finish::Stop,
    }
}

/// Returns a name for a call, which no other call of the run has. Mistral's templates take nothing but
/// nine letters or digits.
fn call_id(request: &str, text: usize, call: usize) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    const DIGITS: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let mut hasher = DefaultHasher::new();
    (request, text, call).hash(&mut hasher);
    let mut left = hasher.finish();
    let digit = |_| {
        let digit = DIGITS[(left % 62) as usize];
        left /= 62;
        char::from(digit)
    };
    (0..9).map(digit).collect()
}
