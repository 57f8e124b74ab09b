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
    /// Returns what a token of this text marks: a bracketed name about thinking, with a word for
    /// the border before or after it, as models of many makers have it.
    pub(super) fn of(text: &str) -> Option<Self> {
        let is_sign = |c: char| !c.is_alphanumeric();
        if text.len() > MAX_MARK_BYTES || !text.starts_with(is_sign) || !text.ends_with(is_sign) {
            return None;
        }
        let name = text.to_lowercase();
        let words: Vec<&str> = name.split(is_sign).filter(|w| !w.is_empty()).collect();
        let (first, last) = (*words.first()?, *words.last()?);
        let thinks = |word| ["think", "thinking", "thought", "reason", "reasoning"].contains(&word);
        let ends = |word| ["end", "close"].contains(&word);
        let is_border = ends(last) || ["start", "begin", "open"].contains(&last);
        let is_mark = thinks(last) || (is_border && words.iter().any(|word| thinks(word)));
        if !is_mark {
            return None;
        }
        Some(if text.contains('/') || ends(first) || ends(last) {
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
            "<|reasoning_start|>",
        ] {
            assert_eq!(ThoughtMark::of(text), Some(Opens), "{text}");
        }
        for text in [
            "</think>",
            "[/THINK]",
            "<|END_THINKING|>",
            "◁/think▷",
            "<|end_of_thought|>",
            "<|reasoning_end|>",
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
            "<|end|>",
            "<|start|>",
        ] {
            assert_eq!(ThoughtMark::of(text), None, "{text}");
        }
    }
}
