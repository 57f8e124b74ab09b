//! Generated answers as messages of a conversation, their thoughts apart.

use super::message::{Message, Role};
use std::ops::Range;
use tier_plan_runtime::tokenizer::ThoughtMark;
use tier_plan_serve::{Parts, split};

/// A generated answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Its tokens, without an end token.
    pub tokens: Vec<u32>,
    /// Its whole text, with marks.
    pub text: String,
    /// Tokens that mark a thought, by where they are in the text.
    pub marks: Vec<(Range<usize>, ThoughtMark)>,
}

impl Answer {
    /// Returns the answer as a message of the conversation. `prompt` is the text that it continues;
    /// some templates open the thought there.
    pub fn message(&self, prompt: &str) -> Message {
        let Parts { thinking, content } = split(&self.text, &self.marks, prompt);
        Message {
            thinking,
            ..Message::new(Role::Assistant, &content)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message of an answer in which these texts are tokens.
    fn message(text: &str, tokens: &[(&str, ThoughtMark)], prompt: &str) -> Message {
        let mut marks: Vec<_> = tokens
            .iter()
            .flat_map(|(token, mark)| {
                text.match_indices(token)
                    .map(|(at, t)| (at..at + t.len(), *mark))
            })
            .collect();
        marks.sort_by_key(|(range, _)| range.start);
        let text = text.to_string();
        let answer = Answer {
            text,
            marks,
            ..Answer::default()
        };
        answer.message(prompt)
    }

    /// Content and thought of an answer whose marks are ordinary text.
    fn spelled(text: &str, prompt: &str) -> (String, Option<String>) {
        let message = message(text, &[], prompt);
        (message.content, message.thinking)
    }

    fn parts(content: &str, thinking: &str) -> (String, Option<String>) {
        let thinking = (!thinking.is_empty()).then(|| thinking.to_string());
        (content.to_string(), thinking)
    }

    #[test]
    fn spelled_marks_count_at_the_start() {
        let (hm, yes) = ("<think>\nHm.\n</think>\n\nYes.", parts("Yes.", "Hm."));
        assert_eq!(spelled(hm, ""), yes);
        assert_eq!(spelled("Hm.</think>Yes.", "Q<think>\n"), yes);
        assert_eq!(spelled("[THINK]Hm.[/THINK]Yes.", ""), yes);
        assert_eq!(spelled("◁think▷Hm.◁/think▷Yes.", ""), yes);
        // Cut off, by a limit or by the user.
        assert_eq!(spelled("<think>Hm", ""), parts("", "Hm"));
        // Speaking of marks is no thought, and nothing is trimmed.
        for text in [
            "Close it with </think>. ",
            "A <think> b </think> c",
            "Yes. ",
        ] {
            assert_eq!(spelled(text, "Q"), parts(text, ""));
        }
    }

    #[test]
    fn tokens_mark_thoughts_anywhere() {
        use ThoughtMark::{Closes, Opens};
        let tokens = [("[THINK]", Opens), ("[/THINK]", Closes)];
        let read = |text: &str| {
            let message = message(text, &tokens, "");
            (message.content, message.thinking)
        };
        assert_eq!(
            read("[THINK]Greet.[/THINK]Hello!"),
            parts("Hello!", "Greet.")
        );
        // A stream has given out the beginning as content before the mark comes.
        assert_eq!(read("Hm.[/THINK]Yes."), parts("Hm.Yes.", ""));
        assert_eq!(
            read("Well, [THINK]hm[/THINK]yes."),
            parts("Well, yes.", "hm")
        );
        assert_eq!(read("[THINK]Hm"), parts("", "Hm"));
        assert_eq!(read("Yes."), parts("Yes.", ""));
    }

    #[test]
    fn channels_are_told_apart() {
        let analysis = "<|channel|>analysis<|message|>They greet.<|end|>";
        let answer = "<|start|>assistant<|channel|>final<|message|>Hello!";
        let whole = format!("{analysis}{answer}");
        assert_eq!(spelled(&whole, ""), parts("Hello!", "They greet."));
        assert_eq!(spelled(analysis, ""), parts("", "They greet."));
        assert_eq!(
            spelled("<|channel|>final<|message|>Hello!<|return|>", ""),
            parts("Hello!", "")
        );
        let call = "<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}";
        assert_eq!(
            spelled(&format!("{analysis}{call}<|call|>"), ""),
            parts("{}", "They greet.")
        );
        let told = "It writes <|channel|>final<|message|>.";
        assert_eq!(spelled(told, ""), parts(told, ""));
    }
}
