//! The tokens that a model produced for an answer, put back where a later prompt has its text.
//!
//! A text can be spelled in many ways, and a model need not choose the one that the tokenizer
//! would. With its own tokens, a later turn sees what the model said, and what the context holds
//! of the answer is kept.

use super::message::{Message, Role};
use std::ops::Range;
use tier_plan_runtime::tokenizer::{KnownTokens, TokenKind, Tokenizer};

/// The tokens of an answer and the bytes that they spell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spoken {
    ids: Vec<u32>,
    /// `[ids.len()]`, where each token's bytes end in `text`.
    ends: Vec<usize>,
    text: String,
}

impl Spoken {
    /// Returns the tokens of an answer with their text. Returns `None` where that is not UTF-8, and
    /// so differs from the message, and where no text is spelled with one of them: the model has
    /// never read such a token in a prompt.
    pub fn new(ids: &[u32], tokenizer: &Tokenizer) -> Option<Self> {
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(ids.len());
        for &id in ids {
            // Control tokens have no text.
            if tokenizer.kind(id).is_some_and(TokenKind::is_text) {
                if !tokenizer.is_spelled(id) {
                    return None;
                }
                bytes.extend_from_slice(tokenizer.piece(id));
            }
            ends.push(bytes.len());
        }
        Some(Self {
            ids: ids.to_vec(),
            ends,
            text: String::from_utf8(bytes).ok()?,
        })
    }

    /// Returns the tokens of a stretch of `prompt` that has the range `content`, and keeps within
    /// the range `free`. Returns `None` if no whole tokens spell it.
    fn within(
        &self,
        prompt: &str,
        content: &Range<usize>,
        free: &Range<usize>,
    ) -> Option<KnownTokens<'_>> {
        let core = prompt
            .get(content.clone())
            .filter(|core| !core.is_empty())?;
        // A thought comes first, what follows it last.
        let places = [self.text.find(core), self.text.rfind(core)];
        places
            .into_iter()
            .flatten()
            .filter_map(|at| self.around(prompt, content, at, free))
            .max_by_key(|known| known.range.len())
    }

    /// As [`within`](Self::within), where the content stands at `at` in the answer.
    fn around(
        &self,
        prompt: &str,
        content: &Range<usize>,
        at: usize,
        free: &Range<usize>,
    ) -> Option<KnownTokens<'_>> {
        let (ours, theirs) = (self.text.as_bytes(), prompt.as_bytes());
        let before = ours[..at].iter().rev();
        let left = before
            .zip(theirs[free.start..content.start].iter().rev())
            .take_while(|(a, b)| a == b)
            .count();
        let end = at + content.len();
        let after = ours[end..].iter();
        let right = after
            .zip(&theirs[content.end..free.end])
            .take_while(|(a, b)| a == b)
            .count();
        let (start, stop) = (at - left, end + right);
        let begin = |i: usize| if i == 0 { 0 } else { self.ends[i - 1] };
        let is_inside = |i: &usize| begin(*i) >= start && self.ends[*i] <= stop;
        let has_text = |i: &usize| begin(*i) < self.ends[*i];
        let mut tokens = (0..self.ids.len()).filter(|i| is_inside(i) && has_text(i));
        let first = tokens.next()?;
        let last = tokens.next_back().unwrap_or(first);
        // A control token in the midst has no text that a template could have kept.
        let is_whole = (first..=last).all(|i| has_text(&i));
        let covers = begin(first) <= at && self.ends[last] >= end;
        if !is_whole || !covers {
            return None;
        }
        let range = content.start - (at - begin(first))..content.end + (self.ends[last] - end);
        // Bytes of a character may be tokens of their own.
        prompt.get(range.clone())?;
        Some(KnownTokens {
            range,
            ids: &self.ids[first..=last],
        })
    }
}

/// Returns the stretches of a prompt that spell answers with tokens that the model produced.
///
/// `texts` are the ranges of all messages' texts, `answers` those of the model's. Both are sorted
/// and do not overlap.
pub(super) fn known<'m>(
    prompt: &str,
    texts: &[Range<usize>],
    answers: &[Range<usize>],
    messages: &'m [Message],
) -> Vec<KnownTokens<'m>> {
    let mut known: Vec<KnownTokens<'m>> = Vec::new();
    let mut left = messages.iter().filter(|m| m.role == Role::Assistant);
    let mut message = left.next();
    for content in answers {
        let done = known.last().map_or(0, |k| k.range.end);
        if content.start < done {
            continue;
        }
        let Some(text) = prompt.get(content.clone()) else {
            continue;
        };
        // A template may leave out earlier answers.
        let mut ahead = left.clone();
        let mut candidate = message;
        while let Some(c) = candidate
            && !c.says(text)
        {
            candidate = ahead.next();
        }
        let Some(found) = candidate else { continue };
        (message, left) = (Some(found), ahead);
        let next = texts.iter().find(|range| range.start >= content.end);
        let free = done..next.map_or(prompt.len(), |range| range.start);
        let spoken = found.spoken.as_deref();
        known.extend(spoken.and_then(|spoken| spoken.within(prompt, content, &free)));
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tier_plan_runtime::gguf::Gguf;
    use tier_plan_runtime::tokenizer::TokenizerSource;

    fn tokenizer() -> Tokenizer {
        let gguf = Gguf::open(&crate::bundled::path("demo/demo.gguf").unwrap()).unwrap();
        Tokenizer::new(TokenizerSource::from_gguf(&gguf).unwrap()).unwrap()
    }

    /// Spells a text letter by letter, as its tokenizer would not.
    fn letters(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        let one = |c: char| tokenizer.encode(&c.to_string(), false).unwrap();
        text.chars().flat_map(one).collect()
    }

    /// An answer in letters, as the message that a chat keeps.
    fn said(tokenizer: &Tokenizer, text: &str, content: &str) -> Message {
        let ids = letters(tokenizer, text);
        assert_ne!(ids, tokenizer.encode(text, false).unwrap());
        Message {
            spoken: Spoken::new(&ids, tokenizer).map(Arc::new),
            ..Message::new(Role::Assistant, content)
        }
    }

    /// The stretches of a prompt in which the tokens of answers stand, as texts.
    fn stretches(prompt: &str, answers: &[&str], messages: &[Message]) -> Vec<String> {
        let mut from = 0;
        let ranges: Vec<Range<usize>> = answers
            .iter()
            .map(|answer| {
                let start = from + prompt[from..].find(answer).unwrap();
                from = start + answer.len();
                start..from
            })
            .collect();
        let known = known(prompt, &ranges, &ranges, messages);
        let tokenizer = tokenizer();
        for k in &known {
            assert_eq!(tokenizer.decode(k.ids), prompt[k.range.clone()]);
            let is_part =
                |spoken: &Arc<Spoken>| spoken.ids.windows(k.ids.len()).any(|w| w == k.ids);
            assert!(
                messages
                    .iter()
                    .filter_map(|m| m.spoken.as_ref())
                    .any(is_part)
            );
        }
        let encoded = tokenizer
            .encode_known(prompt, &[], &known, usize::MAX)
            .unwrap();
        assert_eq!(tokenizer.decode(&encoded), prompt);
        known
            .iter()
            .map(|k| prompt[k.range.clone()].to_string())
            .collect()
    }

    #[test]
    fn an_answer_keeps_its_tokens() {
        let t = tokenizer();
        let (first, second) = (
            said(&t, "And God said", "And God said"),
            said(&t, "it was so", "it was so"),
        );
        let prompt =
            "user:a\nassistant:And God said\nuser:b\nassistant:it was so\nuser:c\nassistant:";
        let both = [
            Message::new(Role::User, "a"),
            first.clone(),
            Message::new(Role::User, "b"),
            second.clone(),
        ];
        assert_eq!(
            stretches(prompt, &["And God said", "it was so"], &both),
            ["And God said", "it was so"]
        );
        // The oldest turn has left the prompt.
        assert_eq!(
            stretches("assistant:it was so\nuser:", &["it was so"], &both),
            ["it was so"]
        );
    }

    #[test]
    fn the_thought_counts_as_far_as_the_template_keeps_it() {
        let t = tokenizer();
        let answer = [said(
            &t,
            "<think>Let me see</think>\n\nit was so",
            "it was so",
        )];
        let kept = "assistant:<think>Let me see</think>\n\nit was so\nuser:";
        assert_eq!(
            stretches(kept, &["it was so"], &answer),
            ["<think>Let me see</think>\n\nit was so"]
        );
        let dropped = "assistant:it was so\nuser:";
        assert_eq!(stretches(dropped, &["it was so"], &answer), ["it was so"]);
    }

    #[test]
    fn what_a_template_rewrites_is_what_the_template_says() {
        let t = tokenizer();
        let answer = [said(&t, "it was so", "it was so")];
        assert!(stretches("assistant:IT WAS SO\n", &["IT WAS SO"], &answer).is_empty());
        // Only part of a token would be left.
        let whole = t.encode(" beginning", false).unwrap();
        assert_eq!(whole.len(), 1, "{whole:?}");
        let cut = [Message {
            spoken: Spoken::new(&whole, &t).map(Arc::new),
            ..Message::new(Role::Assistant, " beginning")
        }];
        assert!(stretches("assistant:beginning\n", &["beginning"], &cut).is_empty());
        assert_eq!(
            stretches("assistant: beginning\n", &["beginning"], &cut),
            [" beginning"]
        );
    }
}
