//! Tokens that mark the thought of a model that reasons before it answers.

/// Longest text of a token that marks a thought.
const MAX_MARK_BYTES: usize = 40;

/// Which border of a thought a token marks, in models that reason before they answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThoughtMark {
    /// A thought begins (`<think>`, `[THINK]`).
    Opens,
    /// The thought ends (`</think>`, `[/THINK]`).
    Closes,
}

impl ThoughtMark {
    /// Returns what a token of this text marks: a bracketed name whose last word is about
    /// thinking, as models of many makers have it.
    pub(super) fn of(text: &str) -> Option<Self> {
        let is_sign = |c: char| !c.is_alphanumeric();
        if text.len() > MAX_MARK_BYTES || !text.starts_with(is_sign) || !text.ends_with(is_sign) {
            return None;
        }
        let name = text.to_lowercase();
        let words = || name.split(is_sign).filter(|w| !w.is_empty());
        let thinks = ["think", "thinking", "thought", "reason", "reasoning"];
        words().next_back().filter(|w| thinks.contains(w))?;
        Some(if text.contains('/') || words().next() == Some("end") {
            Self::Closes
        } else {
            Self::Opens
        })
    }
}

#[cfg(test)]
mod tests {
    use super::ThoughtMark::{self, Closes, Opens};

    #[test]
    fn marks_are_known_by_their_last_word() {
        for text in [
            "<think>",
            "[THINK]",
            "<|START_THINKING|>",
            "◁think▷",
            "<seed:think>",
        ] {
            assert_eq!(ThoughtMark::of(text), Some(Opens), "{text}");
        }
        for text in [
            "</think>",
            "[/THINK]",
            "<|END_THINKING|>",
            "◁/think▷",
            "<|end_of_thought|>",
        ] {
            assert_eq!(ThoughtMark::of(text), Some(Closes), "{text}");
        }
        for text in [
            "/think",
            "think",
            "<rethink>",
            "<|im_start|>",
            "",
            "[INST]",
            "<think_on>",
        ] {
            assert_eq!(ThoughtMark::of(text), None, "{text}");
        }
    }
}
