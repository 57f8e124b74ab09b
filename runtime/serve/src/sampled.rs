//! Answers with calls as the model wrote them, put back where a later prompt has them.
//!
//! A client sends calls back as JSON of its own: other spaces, other escapes, another order of keys.
//! The template prints that, and from there on the prompt would differ from what the KV cache has of
//! the conversation. So the tokens of such answers are kept for a while. They are put into a prompt
//! where everything before is what the answer was an answer to, calls have the names that the server
//! gave them, and what the template prints there is read as the same calls. So no prompt says anything
//! else than the conversation does, and none has the words of another conversation.

use crate::calls::Call;
use crate::calls::block::Block;
use crate::calls::forms::Form;
use crate::prompts::Rendered;
use crate::request::Message;
use crate::request::tools::Tool;
use serde_json::Value;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tier_plan_runtime::tokenizer::{KnownTokens, TokenKind, Tokenizer};

/// Memory of the answers that are kept, and what one takes beside its tokens.
const MAX_BYTES: usize = 4 << 20;
const BYTES_EACH: usize = 128;

/// A prompt, as far as two can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    len: usize,
    hash: u64,
}

/// An answer that is kept.
#[derive(Debug)]
struct Answer {
    origin: Origin,
    ids: Vec<u32>,
}

impl Answer {
    fn n_bytes(&self) -> usize {
        BYTES_EACH + self.ids.len() * size_of::<u32>()
    }
}

#[derive(Debug, Default)]
struct Table {
    /// By the hash of their calls: answers, and when they were last used.
    answers: HashMap<u64, (Arc<Answer>, u64)>,
    n_bytes: usize,
    now: u64,
}

/// The answers with calls that a server has given.
#[derive(Debug, Default)]
pub(crate) struct Sampled {
    table: Mutex<Table>,
    hasher: RandomState,
}

/// A call as it is compared.
pub(crate) struct CallKey<'a> {
    pub id: &'a str,
    pub name: &'a str,
    pub arguments: &'a Value,
}

impl Sampled {
    /// Returns what a prompt is compared by.
    pub fn origin(&self, prompt: &str) -> Origin {
        Origin {
            len: prompt.len(),
            hash: self.hasher.hash_one(prompt),
        }
    }

    /// Returns the hash of calls, of which neither the order of keys nor spaces matter.
    pub fn key<'a>(&self, calls: impl Iterator<Item = CallKey<'a>>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        for call in calls {
            (call.id, call.name).hash(&mut hasher);
            hash_value(call.arguments, &mut hasher);
        }
        hasher.finish()
    }

    /// Keeps the tokens of an answer with these calls.
    pub fn keep_calls(&self, calls: &[Call], origin: Origin, ids: Vec<u32>) {
        let parsed = calls
            .iter()
            .map(|call| serde_json::from_str(&call.arguments));
        let Ok(arguments) = parsed.collect::<Result<Vec<Value>, _>>() else {
            return;
        };
        let calls = calls.iter().zip(&arguments);
        let key = self.key(calls.map(|(call, arguments)| CallKey {
            id: call.id.as_deref().unwrap_or_default(),
            name: &call.name,
            arguments,
        }));
        self.keep(key, origin, ids);
    }

    fn keep(&self, key: u64, origin: Origin, ids: Vec<u32>) {
        let answer = Answer { origin, ids };
        if answer.n_bytes() > MAX_BYTES {
            return;
        }
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let table = &mut *table;
        table.now += 1;
        table.n_bytes += answer.n_bytes();
        let before = table.answers.insert(key, (Arc::new(answer), table.now));
        table.n_bytes -= before.map_or(0, |(answer, _)| answer.n_bytes());
        while table.n_bytes > MAX_BYTES {
            let oldest = table.answers.iter().min_by_key(|(_, (_, used))| *used);
            let Some(key) = oldest.map(|(key, _)| *key) else {
                break;
            };
            let gone = table.answers.remove(&key);
            table.n_bytes -= gone.map_or(0, |(answer, _)| answer.n_bytes());
        }
    }

    fn find(&self, key: u64) -> Option<Arc<Answer>> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let table = &mut *table;
        table.now += 1;
        let (answer, used) = table.answers.get_mut(&key)?;
        *used = table.now;
        Some(Arc::clone(answer))
    }
}

/// Hashes a value; the order of keys does not matter.
fn hash_value(value: &Value, hasher: &mut impl Hasher) {
    match value {
        Value::Object(fields) => {
            let mut sorted: Vec<_> = fields.iter().collect();
            sorted.sort_unstable_by_key(|(key, _)| *key);
            (0u8, sorted.len()).hash(hasher);
            for (key, value) in sorted {
                key.hash(hasher);
                hash_value(value, hasher);
            }
        }
        Value::Array(items) => {
            (1u8, items.len()).hash(hasher);
            items.iter().for_each(|item| hash_value(item, hasher));
        }
        Value::String(text) => (2u8, text).hash(hasher),
        other => (3u8, other.to_string()).hash(hasher),
    }
}

/// A prompt in which the tokens of some stretches are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replayed {
    pub text: String,
    pub plain: Vec<Range<usize>>,
    known: Vec<(Range<usize>, Vec<u32>)>,
}

impl Replayed {
    /// Returns the stretches whose tokens are known.
    pub fn known(&self) -> Vec<KnownTokens<'_>> {
        let known = self.known.iter().map(|(range, ids)| KnownTokens {
            range: range.clone(),
            ids,
        });
        known.collect()
    }
}

impl From<Rendered> for Replayed {
    fn from(rendered: Rendered) -> Self {
        Self {
            text: rendered.text,
            plain: rendered.plain,
            known: Vec::new(),
        }
    }
}

/// Puts answers back into prompts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Replay<'a> {
    pub sampled: &'a Sampled,
    pub form: &'static Form,
    /// Control tokens that are text in answers.
    pub shown: &'a [u32],
    pub tokenizer: &'a Tokenizer,
}

impl Replay<'_> {
    /// Puts the tokens of earlier answers into a prompt.
    pub fn apply(&self, rendered: Rendered, messages: &[Message], tools: &[Tool]) -> Replayed {
        let mut replayed = Replayed::from(rendered);
        // Where texts of messages are not known, they could be taken for calls.
        if replayed.plain.is_empty() {
            return replayed;
        }
        for message in messages.iter().filter(|message| !message.calls.is_empty()) {
            let arguments: Vec<Value> = message
                .calls
                .iter()
                .map(|call| call.arguments.clone().into())
                .collect();
            let calls = message.calls.iter().zip(&arguments);
            let key = self.sampled.key(calls.map(|(call, arguments)| CallKey {
                id: &call.id,
                name: &call.name,
                arguments,
            }));
            if let Some(answer) = self.sampled.find(key) {
                self.put(&mut replayed, &answer, message.calls.len(), tools);
            }
        }
        replayed
    }

    /// Puts an answer into a prompt, if it has its place there.
    fn put(
        &self,
        to: &mut Replayed,
        answer: &Answer,
        n_calls: usize,
        tools: &[Tool],
    ) -> Option<()> {
        let from = answer.origin.len;
        let done = to.known.last().map_or(0, |(range, _)| range.end);
        let is_next = done <= from && self.sampled.origin(to.text.get(..from)?) == answer.origin;
        let spoken = Spoken::new(&answer.ids, self.tokenizer, self.shown).filter(|_| is_next)?;
        let ours = Block::find(self.form, &spoken.text, 0, &[], tools, n_calls)?;
        let theirs = Block::find(self.form, &to.text, from, &to.plain, tools, n_calls)?;
        if !are_equal(&ours, &theirs) {
            return None;
        }
        let (ours, theirs) = (ours.range, theirs.range);
        let (before, after) = (&to.text[from..theirs.start], &to.text[theirs.end..]);
        let left = before
            .bytes()
            .rev()
            .zip(spoken.text[..ours.start].bytes().rev());
        let left = left.take_while(|(a, b)| a == b).count();
        let right = after.bytes().zip(spoken.text[ours.end..].bytes());
        let right = right.take_while(|(a, b)| a == b).count();
        let inner = spoken.inside(ours.start - left..ours.end + right)?;
        let covers = inner.range.start <= ours.start && inner.range.end >= ours.end;
        let crosses = |range: &Range<usize>| {
            let holds = |at: usize| range.start < at && at < range.end;
            holds(theirs.start) || holds(theirs.end)
        };
        if !covers || to.plain.iter().any(crosses) {
            return None;
        }
        let start = theirs.start - (ours.start - inner.range.start);
        let end = theirs.start + (inner.range.end - ours.start);
        to.text
            .replace_range(theirs.clone(), &spoken.text[ours.clone()]);
        to.text.get(start..end)?;
        to.plain
            .retain(|range| range.end <= theirs.start || range.start >= theirs.end);
        for range in to
            .plain
            .iter_mut()
            .filter(|range| range.start >= theirs.end)
        {
            for end in [&mut range.start, &mut range.end] {
                *end = *end - theirs.len() + ours.len();
            }
        }
        to.known.push((start..end, inner.ids.to_vec()));
        Some(())
    }
}

/// Whether two blocks have the same calls.
fn are_equal(one: &Block, other: &Block) -> bool {
    let value = |text: &str| serde_json::from_str::<Value>(text).ok();
    one.calls.iter().zip(&other.calls).all(|(a, b)| {
        a.name == b.name && a.id == b.id && value(&a.arguments) == value(&b.arguments)
    })
}

/// The tokens of an answer and the bytes that they spell.
struct Spoken<'a> {
    ids: &'a [u32],
    /// By token: where its bytes end in `text`.
    ends: Vec<usize>,
    text: String,
}

/// Whole tokens of an answer.
struct Inner<'a> {
    range: Range<usize>,
    ids: &'a [u32],
}

impl<'a> Spoken<'a> {
    /// Returns the tokens with their text. Returns `None` where that is not UTF-8, and where the
    /// tokenizer spells no text with one of them: the model has never read such a token in a prompt.
    fn new(ids: &'a [u32], tokenizer: &Tokenizer, shown: &[u32]) -> Option<Self> {
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(ids.len());
        for id in ids {
            let is_text = tokenizer.kind(*id).is_some_and(TokenKind::is_text);
            if is_text && !tokenizer.is_spelled(*id) {
                return None;
            }
            if is_text || shown.contains(id) {
                bytes.extend_from_slice(tokenizer.piece(*id));
            }
            ends.push(bytes.len());
        }
        let text = String::from_utf8(bytes).ok()?;
        Some(Self { ids, ends, text })
    }

    /// Returns the tokens that lie within some bytes, `None` if one among them has no text.
    fn inside(&self, bytes: Range<usize>) -> Option<Inner<'_>> {
        let begin = |i: usize| if i == 0 { 0 } else { self.ends[i - 1] };
        let n = self.ids.len();
        let has_text = |i: &usize| begin(*i) < self.ends[*i];
        let first = (0..n).find(|i| begin(*i) >= bytes.start && has_text(i))?;
        let last = (first..n)
            .rev()
            .find(|i| self.ends[*i] <= bytes.end && has_text(i))?;
        (first..=last).all(|i| has_text(&i)).then(|| Inner {
            range: begin(first)..self.ends[last],
            ids: &self.ids[first..=last],
        })
    }
}

#[cfg(test)]
#[path = "sampled_tests.rs"]
mod tests;
