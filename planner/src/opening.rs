//! What to open, and how: the checked options of commands that run a model.

use crate::auto::Auto;
use crate::hint::HintExt;
use anyhow::{Result, anyhow, ensure};
use std::path::Path;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::placement::{self, Placement};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::tiers::numa::NumaPolicy;

/// Most texts at once that are chosen without being asked for.
const MAX_AUTO_TEXTS: u32 = 16;

/// Fraction (1/n) of the memory that the KV cache of an automatic number of texts may take.
const AUTO_CACHE_FRACTION: u64 = 8;

/// How many texts at once a model without a plan has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Texts {
    /// One.
    #[default]
    One,
    /// This many.
    Count(u32),
    /// As many as a fraction of the memory is enough for.
    Auto,
}

impl Texts {
    /// Returns the number, given the bytes of KV cache for a number of texts, and the memory if it is
    /// bounded.
    pub fn number(self, cache_bytes: impl Fn(u32) -> u64, memory: Option<u64>) -> u32 {
        let fits = |n: &u32| memory.is_none_or(|m| cache_bytes(*n) <= m / AUTO_CACHE_FRACTION);
        match self {
            Texts::One => 1,
            Texts::Count(n) => n.max(1),
            Texts::Auto => {
                let halves = std::iter::successors(Some(MAX_AUTO_TEXTS), |n| Some(n / 2));
                halves.take_while(|n| *n > 0).find(fits).unwrap_or(1)
            }
        }
    }
}

/// What to open and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Opening<'a> {
    /// The plan; `None` chooses one that fits memory.
    pub plan: Option<&'a Path>,
    /// Whether a plan is made without being asked for, and how.
    pub auto: Option<Auto<'a>>,
    /// Memory of the whole process in bytes when there is no plan; `None` is all that is free.
    pub memory: Option<u64>,
    /// The profile to choose pinned experts from when there is no plan.
    pub profile: Option<&'a Path>,
    /// Context length asked for; 0 is the model's training context, or the plan's.
    pub context: Option<u32>,
    /// Texts at once when there is no plan.
    pub texts: Texts,
    /// Threads asked for.
    pub threads: Option<usize>,
    /// KV cache type; `None` is the plan's, or f16 without a plan.
    pub kv_type: Option<KvType>,
    /// Whether to use the mapped weights instead of a copy in huge pages.
    pub mapped: bool,
    /// NUMA policy; `None` is the system's.
    pub numa: Option<NumaPolicy>,
    /// Whether to verify checksums, and the file with them; the inner `None` is the one beside the
    /// model.
    pub verify: Option<Option<&'a Path>>,
    /// A packed copy of the experts; `None` is the one beside the model, if it exists.
    pub pack: Option<&'a Path>,
    /// File that keeps the contents of slots between runs.
    pub slots: Option<&'a Path>,
    /// Profile whose most used experts fill empty slots.
    pub warm: Option<&'a Path>,
}

impl Opening<'_> {
    /// Reads the plan, and checks it against the model and the options.
    pub(crate) fn read_plan(&self, gguf: &Gguf, path: &Path) -> Result<Placement> {
        let plan = placement::read(path)?;
        plan.check_model(&gguf.id(), path)?;
        let shown = path.display();
        let context = self.context.unwrap_or(plan.context);
        if context > plan.context {
            let planned = plan.context;
            let large = format!(
                "--context: {context}, expected at most {planned} tokens, the context of {shown}"
            );
            return Err(anyhow!(large)).hint(format!("solve again with --context {context}"));
        }
        let texts = match self.texts {
            Texts::Count(texts) => texts,
            Texts::One | Texts::Auto => plan.sequences,
        };
        if texts > plan.sequences {
            let many = format!(
                "--parallel: {texts} texts at once, expected at most {}, the room of {shown}",
                plan.sequences
            );
            return Err(anyhow!(many)).hint(format!("solve again with --parallel {texts}"));
        }
        let kv_type = self.kv_type.unwrap_or(plan.kv_type);
        if kv_type != plan.kv_type {
            let other = format!(
                "--kv-type: {kv_type}, expected {}, the KV cache type of {shown}",
                plan.kv_type
            );
            return Err(anyhow!(other)).hint(format!("solve again with --kv-type {kv_type}"));
        }
        Ok(plan)
    }
}

/// Adds a file's name to an error that does not begin with it.
pub fn naming(file: &Path, error: impl Into<anyhow::Error>) -> anyhow::Error {
    let (error, name) = (error.into(), file.display().to_string());
    if error.to_string().starts_with(&name) {
        error
    } else {
        error.context(name)
    }
}

/// Checks `--threads`.
///
/// # Errors
/// When it is outside 1 to 1024.
pub fn check_threads(threads: Option<usize>) -> Result<()> {
    let threads = threads.unwrap_or(1);
    ensure!(
        (1..=1024).contains(&threads),
        "--threads: {threads}, expected 1 to 1024"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_automatic_number_of_texts_fits_a_fraction_of_memory() {
        let bytes = |n: u32| u64::from(n) * 100;
        let number = |memory| Texts::Auto.number(bytes, memory);
        assert_eq!(number(None), 16);
        assert_eq!([number(Some(12_800)), number(Some(12_799))], [16, 8]);
        assert_eq!([number(Some(800)), number(Some(0))], [1, 1]);
        assert_eq!(Texts::Count(40).number(bytes, Some(0)), 40);
        assert_eq!(Texts::One.number(bytes, None), 1);
    }
}
