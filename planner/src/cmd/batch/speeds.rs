//! How many texts go together, and how long their steps may last.

use crate::cmd::args::MaxStep;
use crate::cost::middle;
use crate::opening::Texts;
use crate::parallel::{self, Routing};
use crate::session::Session;
use std::str::FromStr;
use std::time::Duration;
use tier_plan_runtime::schedule::StepCost;

/// Most texts at once that a user may ask for.
const MAX_TEXTS: u32 = 1024;

/// Texts at once under a plan that is for one, which they share the KV cache of.
const TEXTS_OF_ONE: u32 = 16;

/// Texts at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parallel {
    /// As many as the memory allows.
    Auto,
    /// This many.
    Count(u32),
}

impl FromStr for Parallel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Parallel::Auto);
        }
        let count = text.parse().ok().filter(|n| (1..=MAX_TEXTS).contains(n));
        let expected = || format!("expected auto, or a number from 1 to {MAX_TEXTS}");
        count.map(Parallel::Count).ok_or_else(expected)
    }
}

impl Parallel {
    /// Returns what a plan is made for.
    pub(in crate::cmd) fn texts(self) -> Texts {
        match self {
            Parallel::Auto => Texts::Auto,
            Parallel::Count(n) => Texts::Count(n),
        }
    }

    /// Returns the most texts at once in an engine whose plan is for `planned`. A given plan for one
    /// text may be for several short ones.
    fn most(self, planned: u32, is_given: bool) -> u32 {
        match self {
            Parallel::Count(n) => n,
            Parallel::Auto if is_given && planned == 1 => TEXTS_OF_ONE,
            Parallel::Auto => planned,
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub(in crate::cmd) struct Asked {
    /// Texts at once.
    pub parallel: Parallel,
    /// Longest step, if one matters.
    pub max_step: Option<MaxStep>,
    /// Whether a plan was given.
    pub has_plan: bool,
}

/// What is chosen by predicted speeds.
pub(in crate::cmd) struct Speeds {
    /// Texts at once.
    pub texts: u32,
    /// A sentence on them.
    pub why: String,
    /// Longest step, if one matters.
    pub max_step: Option<Duration>,
    /// The first estimate of the time of steps.
    pub cost: Option<StepCost>,
}

impl Speeds {
    /// Chooses by the plan of the engine.
    pub fn choose(asked: Asked, session: &Session, routing: &Routing) -> Self {
        let (plan, shape) = (session.engine.plan(), session.engine.shape());
        let predictor = routing.predictor(plan, shape, middle(plan.context));
        let predictor = predictor.as_ref();
        let room = asked.parallel.most(plan.sequences, asked.has_plan);
        let longest = asked.max_step.and_then(MaxStep::asked);
        let parallel::Chosen { texts, mut why } = match asked.parallel {
            Parallel::Auto => parallel::choose(predictor, room, longest),
            Parallel::Count(texts) => parallel::Chosen {
                texts,
                why: format!("up to {texts} texts at once, as asked for"),
            },
        };
        let max_step = asked.max_step.map(|step| step.time(predictor, texts));
        if let Some(longest) = max_step {
            let ms = longest.as_millis();
            why = format!("{why}; a step that reads prompts beside them takes up to {ms} ms");
        }
        Self {
            texts,
            why,
            max_step,
            cost: predictor.and_then(|predictor| predictor.step_cost(texts)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_at_once_are_read_and_chosen() {
        let parse = |text: &str| text.parse::<Parallel>();
        assert_eq!(parse("auto"), Ok(Parallel::Auto));
        assert_eq!(parse("7"), Ok(Parallel::Count(7)));
        for bad in ["0", "-1", "1025", "many", ""] {
            assert!(parse(bad).unwrap_err().contains("from 1 to 1024"), "{bad}");
        }
        assert_eq!(Parallel::Auto.most(1, true), TEXTS_OF_ONE);
        assert_eq!(Parallel::Auto.most(1, false), 1);
        assert_eq!(Parallel::Auto.most(4, true), 4);
        assert_eq!(Parallel::Count(2).most(4, true), 2);
    }
}
