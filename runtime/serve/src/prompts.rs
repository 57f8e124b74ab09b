//! The tokens of a request, and what a request may ask of a model at hand.

mod late;

use crate::request::tools::{Choice, Tool};
use crate::request::{BadLine, Code, Endpoint, Message, Prompt, Request};
use crate::sampled::{Replay, Replayed};
use serde_json::{Map, Value};
use std::ops::Range;
use tier_plan_runtime::printable::printable;
use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerError};

/// Tokens of a completion whose request does not say how many, as in OpenAI's interface.
const COMPLETION_TOKENS: usize = 16;

/// Most tokens of all answers to a request, and most log-probabilities, so that a line of the output
/// stays below some hundred MB.
const MAX_ANSWER_TOKENS: usize = 1 << 22;
const MAX_ANSWER_LOGPROBS: usize = 1 << 20;

/// What makes a prompt of a conversation: a chat template.
pub trait Chats {
    /// Renders a conversation up to where the model should answer.
    ///
    /// # Errors
    /// When the template rejects the conversation, and after a signal.
    fn render(
        &self,
        conversation: Conversation<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Rendered, ChatError>;

    /// Returns the text of the template.
    fn source(&self) -> &str;
}

/// What a prompt is made of.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// The messages, oldest first.
    pub messages: &'a [Message],
    /// Tools that the answer may call.
    pub tools: &'a [Tool],
    /// Variables for the template beside its own.
    pub variables: &'a Map<String, Value>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Text of the prompt.
    pub text: String,
    /// Ranges of bytes that are texts of messages; sorted and apart.
    pub plain: Vec<Range<usize>>,
}

/// Why a conversation has no prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChatError {
    /// The template rejects it, or can't be rendered.
    Rejected(String),
    /// The template takes a message apart in which this control token is written out.
    Mixed {
        /// Text of the token.
        token: String,
    },
    /// The template leaves out tools, or calls of them.
    NoTools(&'static str),
    /// A signal asked for an end.
    Interrupted,
}

/// Why a request has no tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unencoded {
    /// This model can't answer it.
    Bad(BadLine),
    /// A signal asked for an end.
    Interrupted,
}

impl From<BadLine> for Unencoded {
    fn from(bad: BadLine) -> Self {
        Unencoded::Bad(bad)
    }
}

/// How requests become tokens.
pub struct Prompts<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The chat template, if there is one and a request needs it.
    pub template: Option<&'a dyn Chats>,
    /// Size of the model's vocabulary.
    pub n_vocab: usize,
    /// Tokens that a text may have.
    pub context: usize,
    /// Most tokens per answer for requests that do not say; the inner `None` is as many as fit.
    pub max_tokens: Option<Option<usize>>,
    /// What the names of fields have before them in errors, such as `body.`.
    pub path: &'a str,
}

/// A request's prompt as the model gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens, 1 or more.
    pub tokens: Vec<u32>,
    /// Text that a template made of messages, else empty.
    pub text: String,
    /// Most tokens to generate, at least 1.
    pub max_new: usize,
}

impl Prompts<'_> {
    /// Returns the tokens of a request.
    ///
    /// # Errors
    /// When this model can't answer the request, and after a signal.
    pub fn encode(&self, request: &Request) -> Result<Encoded, Unencoded> {
        self.encode_with(request, None)
    }

    /// Returns the tokens of a request, those of earlier answers as the model wrote them.
    pub(crate) fn encode_with(
        &self,
        request: &Request,
        replay: Option<Replay<'_>>,
    ) -> Result<Encoded, Unencoded> {
        let (tokens, text) = match &request.prompt {
            Prompt::Text(text) => self.text(text)?,
            Prompt::Tokens(tokens) => self.tokens(tokens)?,
            Prompt::Messages(messages) => {
                let conversation = Conversation {
                    messages,
                    tools: match request.tools.choice {
                        Choice::None => &[],
                        _ => &request.tools.list,
                    },
                    variables: &request.variables,
                };
                self.messages_with(conversation, replay)?
            }
        };
        Ok(self.limited(request, tokens, text)?)
    }

    fn text(&self, text: &str) -> Result<(Vec<u32>, String), BadLine> {
        let tokens = self.tokenizer.encode_within(text, true, self.context);
        Ok((self.checked(tokens)?, String::new()))
    }

    fn tokens(&self, tokens: &[u32]) -> Result<(Vec<u32>, String), BadLine> {
        let n_vocab = self.n_vocab;
        if let Some(i) = tokens.iter().position(|t| *t as usize >= n_vocab) {
            let last = n_vocab.saturating_sub(1);
            let message = format!(
                "{}prompt[{i}]: {}, expected a token id up to {last}",
                self.path, tokens[i]
            );
            return Err(invalid(message));
        }
        if tokens.len() > self.context {
            return Err(self.too_long(tokens.len()));
        }
        Ok((tokens.to_vec(), String::new()))
    }

    /// Returns the tokens of a conversation and the text that they spell.
    ///
    /// # Errors
    /// When the template rejects it, or it is longer than the context; and after a signal.
    pub fn messages(
        &self,
        conversation: Conversation<'_>,
    ) -> Result<(Vec<u32>, String), Unencoded> {
        self.messages_with(conversation, None)
    }

    fn messages_with(
        &self,
        conversation: Conversation<'_>,
        replay: Option<Replay<'_>>,
    ) -> Result<(Vec<u32>, String), Unencoded> {
        let rendered = self.rendered(conversation)?;
        let Conversation {
            messages, tools, ..
        } = conversation;
        let replayed = match replay {
            Some(replay) => replay.apply(rendered, messages, tools),
            None => rendered.into(),
        };
        let Replayed { text, plain, .. } = &replayed;
        let known = replayed.known();
        let tokens = (self.tokenizer).encode_known(text, plain, &known, self.context);
        Ok((self.checked(tokens)?, replayed.text))
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// When the template rejects it, and after a signal.
    pub fn rendered(&self, conversation: Conversation<'_>) -> Result<Rendered, Unencoded> {
        let Some(template) = self.template else {
            let message = "url: this model has no chat template, expected \"/v1/completions\", or a \
                           template with --chat-template FILE";
            return Err(BadLine::new(Code::Unsupported, message).into());
        };
        let refused =
            |why: String| Unencoded::Bad(invalid(format!("{}messages: {why}", self.path)));
        late::render(template, conversation, self.tokenizer)
            .map_err(|error| match error {
                ChatError::Interrupted => Unencoded::Interrupted,
                ChatError::Rejected(why) => refused(why),
                ChatError::NoTools(what) => {
                    let message = format!(
                        "{}{what}: the chat template has no place for tools; leave them out, or give another with \
                         --chat-template FILE",
                        self.path
                    );
                    BadLine::new(Code::Unsupported, message).into()
                }
                ChatError::Mixed { token } => refused(format!(
                    "the chat template takes messages apart, so that '{}' in one cannot be told from the \
                     template's own; write it differently",
                    printable(&token)
                )),
            })
    }

    fn checked(&self, tokens: Result<Vec<u32>, TokenizerError>) -> Result<Vec<u32>, BadLine> {
        match tokens {
            Err(TokenizerError::TooLong { least, .. }) => Err(self.too_long(least)),
            Err(error) => Err(invalid(format!("the prompt: {error}"))),
            Ok(tokens) if tokens.is_empty() => {
                Err(invalid("the prompt is empty, expected text".to_string()))
            }
            Ok(tokens) => Ok(tokens),
        }
    }

    fn too_long(&self, least: usize) -> BadLine {
        let message = format!(
            "the prompt has {least} tokens or more, expected at most {}: pass a shorter prompt, or start with a larger \
             --context",
            self.context
        );
        BadLine::new(Code::ContextLengthExceeded, message)
    }

    /// Checks what a request asks for against the model.
    fn limited(
        &self,
        request: &Request,
        tokens: Vec<u32>,
        text: String,
    ) -> Result<Encoded, BadLine> {
        let bias = request.sampling.logit_bias.iter();
        let unknown = bias.map(|b| b.token).find(|t| *t as usize >= self.n_vocab);
        if let Some(token) = unknown {
            let last = self.n_vocab.saturating_sub(1);
            let message = format!(
                "{}logit_bias: token {token}, expected a token id up to {last}",
                self.path
            );
            return Err(invalid(message));
        }
        // The last token is never computed, so it needs no place in the context.
        let room = self.context - tokens.len() + 1;
        let default = match (self.max_tokens, request.endpoint) {
            (Some(limit), _) => limit.unwrap_or(room),
            (None, Endpoint::Chat) => room,
            (None, Endpoint::Completions) => COMPLETION_TOKENS,
        };
        let max_new = request.max_tokens.unwrap_or(default).clamp(1, room);
        let answers = max_new.saturating_mul(request.n);
        let logprobs = request
            .logprobs
            .map_or(0, |top| answers.saturating_mul(top + 1));
        if answers > MAX_ANSWER_TOKENS || logprobs > MAX_ANSWER_LOGPROBS {
            let message = format!(
                "{}n: {} answers of up to {max_new} tokens with {logprobs} log-probabilities, expected at most \
                 {MAX_ANSWER_TOKENS} tokens and {MAX_ANSWER_LOGPROBS} log-probabilities in all; ask for fewer tokens",
                self.path, request.n
            );
            return Err(invalid(message));
        }
        Ok(Encoded {
            tokens,
            text,
            max_new,
        })
    }
}

fn invalid(message: String) -> BadLine {
    BadLine::new(Code::InvalidRequest, message)
}
