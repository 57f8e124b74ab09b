//! Values of options that also accept -1, as in llama.cpp.

use crate::cost::steps::Predictor;
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::sampler::LogitBias;
use tier_plan_runtime::schedule::Limits;

/// Most tokens to generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenLimit {
    /// This many.
    Count(u32),
    /// Until the end-of-text token or a full context (-1).
    Unlimited,
}

impl TokenLimit {
    /// Returns the count, or `None` without a limit.
    pub fn count(self) -> Option<usize> {
        match self {
            TokenLimit::Count(count) => Some(count as usize),
            TokenLimit::Unlimited => None,
        }
    }
}

impl FromStr for TokenLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "-1" => Ok(TokenLimit::Unlimited),
            _ => text.parse().map(TokenLimit::Count).map_err(|_| {
                "expected a count, or -1 to generate until the end of the text or of the context".to_string()
            }),
        }
    }
}

/// Most milliseconds that a step may be asked to last.
const MOST_STEP_MS: u32 = 3_600_000;

/// Most time of a step that reads prompts beside running texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxStep {
    /// As the predicted steps suggest.
    Auto,
    /// This many milliseconds.
    Milliseconds(u32),
}

impl MaxStep {
    /// Returns the time that was asked for in so many words.
    pub fn asked(self) -> Option<Duration> {
        match self {
            MaxStep::Auto => None,
            MaxStep::Milliseconds(ms) => Some(Duration::from_millis(ms.into())),
        }
    }

    /// Returns the time beside `texts` running texts; the schedule's own where nothing is predicted.
    pub fn time(self, predictor: Option<&Predictor<'_>>, texts: u32) -> Duration {
        let predicted = || predictor?.max_step(texts);
        self.asked()
            .or_else(predicted)
            .unwrap_or(Limits::default().max_step)
    }
}

impl FromStr for MaxStep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(MaxStep::Auto);
        }
        let ms = text
            .parse()
            .ok()
            .filter(|ms| (1..=MOST_STEP_MS).contains(ms));
        let expected = || format!("expected auto, or milliseconds from 1 to {MOST_STEP_MS}");
        ms.map(MaxStep::Milliseconds).ok_or_else(expected)
    }
}

/// Seed of the random number generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seed {
    /// This one: equal seeds give equal text.
    Fixed(u64),
    /// A new one in every run (-1).
    Random,
}

impl Seed {
    /// Returns the number, which for a random seed comes from the clock and the process id.
    pub fn number(self) -> u64 {
        match self {
            Seed::Fixed(seed) => seed,
            Seed::Random => {
                let since = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default();
                // Short enough to type again.
                (since.as_nanos() as u64 ^ (u64::from(std::process::id()) << 20)) % 4_294_967_295
            }
        }
    }
}

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "-1" => Ok(Seed::Random),
            _ => {
                let expected = "expected a number of 64 bits, or -1 for a random seed";
                text.parse()
                    .map(Seed::Fixed)
                    .map_err(|_| expected.to_string())
            }
        }
    }
}

/// How many recent tokens the repeat penalty looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecentTokens(pub usize);

impl FromStr for RecentTokens {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "-1" => Ok(RecentTokens(usize::MAX)),
            _ => text.parse().map(RecentTokens).map_err(|_| {
                "expected a count, 0 for none, or -1 for the whole context".to_string()
            }),
        }
    }
}

impl fmt::Display for RecentTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == usize::MAX {
            f.write_str("-1")
        } else {
            write!(f, "{}", self.0)
        }
    }
}

/// Returns the context that a text asks for.
///
/// # Errors
/// What is expected.
pub fn context(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| {
        "expected a count of tokens, or 0 for the model's training context".to_string()
    })
}

/// Returns the number of threads that a text asks for.
///
/// # Errors
/// What is expected.
pub fn threads(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| {
        "expected a count; without the option, there is one thread per physical core".to_string()
    })
}

/// Returns how many tokens top-k sampling keeps; -1 is all of them, as 0 is.
///
/// # Errors
/// What is expected.
pub fn top_k(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(0),
        _ => text
            .parse()
            .map_err(|_| "expected a count, or 0 or -1 for all tokens".to_string()),
    }
}

/// Returns the token and the bias that a text has, such as `15043-1.5`.
///
/// # Errors
/// What is expected.
pub fn logit_bias(text: &str) -> Result<LogitBias, String> {
    let parsed = text.find(['+', '-']).and_then(|sign| {
        let (token, bias) = text.split_at(sign);
        Some(LogitBias {
            token: token.parse().ok()?,
            bias: bias.parse().ok()?,
        })
    });
    parsed.ok_or_else(|| {
        "expected the id of a token, + or -, and a bias of up to 100, such as 15043-1.5".to_string()
    })
}

/// Path of a file, or nothing where an environment variable only says yes.
pub fn file_or_yes(text: &str) -> Result<Option<std::path::PathBuf>, Infallible> {
    let yes = ["1", "y", "yes", "t", "true", "on"]
        .iter()
        .any(|word| word.eq_ignore_ascii_case(text));
    Ok((!yes).then(|| text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minus_one_is_taken_or_explained() {
        assert_eq!(top_k("-1"), Ok(0));
        assert_eq!(top_k("40"), Ok(40));
        assert!(top_k("-2").unwrap_err().contains("-1 for all"));
        assert_eq!((context("0"), threads("2")), (Ok(0), Ok(2)));
        assert!(context("-1").unwrap_err().contains("0 for the model's"));
        assert!(threads("-1").unwrap_err().contains("without the option"));
        let step = |text: &str| text.parse::<MaxStep>();
        assert_eq!(step("auto"), Ok(MaxStep::Auto));
        assert_eq!(step("3600000"), Ok(MaxStep::Milliseconds(3_600_000)));
        for bad in ["0", "-1", "3600001", "1.5", ""] {
            assert!(step(bad).unwrap_err().contains("1 to 3600000"), "{bad}");
        }
        assert_eq!(MaxStep::Auto.time(None, 8), Limits::default().max_step);
        assert_eq!(step("7").unwrap().time(None, 8), Duration::from_millis(7));
    }

    #[test]
    fn a_bias_follows_the_id_of_its_token() {
        let bias = |token, bias| Ok(LogitBias { token, bias });
        assert_eq!(logit_bias("15043-1.5"), bias(15043, -1.5));
        assert_eq!(logit_bias("7+100"), bias(7, 100.0));
        assert_eq!(logit_bias("7+1e-2"), bias(7, 0.01));
        for bad in ["", "7", "-1", "7+", "7*2", "x+1", "4294967296+1", "+1+1"] {
            assert!(logit_bias(bad).unwrap_err().contains("15043-1.5"), "{bad}");
        }
    }
}
