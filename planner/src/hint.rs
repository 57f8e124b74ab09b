//! Advice printed after an error, as `hint: …`.
//!
//! The runtime library knows no options, so its errors carry facts only. This module turns them
//! into advice that names options and commands of the program.

use crate::hub::Unreachable;
use anyhow::Error;
use std::fmt;
use tier_plan_runtime::cuda::CudaError;
use tier_plan_runtime::model::{ModelError, NotAModel};
use tier_plan_runtime::plans::budget::TooSmall;
use tier_plan_runtime::tiers::numa::NumaError;
use tier_plan_runtime::tokenizer::TokenizerError;
use tier_plan_runtime::units::show_bytes;
use tier_plan_runtime::{LoadError, RunError};

/// An error with advice.
#[derive(Debug)]
struct Hinted {
    error: Error,
    hint: String,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)
    }
}

impl std::error::Error for Hinted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Adds advice to the error of a result.
pub trait HintExt<T> {
    /// Adds advice, which is printed after the error as `hint: …`.
    ///
    /// # Errors
    /// Those of the result itself.
    fn hint(self, hint: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<Error>> HintExt<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> Result<T, Error> {
        self.map_err(|error| hinted(error.into(), hint))
    }
}

/// Adds advice to an error.
pub fn hinted(error: Error, hint: impl Into<String>) -> Error {
    Error::new(Hinted {
        error,
        hint: hint.into(),
    })
}

/// Returns the advice for an error, `None` if there is nothing to add to its message.
pub fn hint_for(error: &Error) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(hinted) = cause.downcast_ref::<Hinted>() {
            Some(hinted.hint.clone())
        } else if let Some(error) = cause.downcast_ref::<RunError>() {
            of_run(error)
        } else if let Some(error) = cause.downcast_ref::<LoadError>() {
            of_load(error)
        } else if let Some(error) = cause.downcast_ref::<CudaError>() {
            of_cuda(error)
        } else if let Some(error) = cause.downcast_ref::<NumaError>() {
            of_numa(error)
        } else if let Some(error) = cause.downcast_ref::<TooSmall>() {
            Some(format!(
                "pass --memory {} or more, or a smaller --context",
                show_bytes(error.least_bytes).replace(' ', "")
            ))
        } else if let Some(ModelError::NotAModel(other)) = cause.downcast_ref::<ModelError>() {
            Some(of_other(*other).to_string())
        } else if cause.is::<Unreachable>() {
            Some("run the same command again later; what was fetched is kept".to_string())
        } else if let Some(TokenizerError::UnknownPre { .. }) = cause.downcast_ref() {
            Some(
                "choose the pre-tokenizer that fits the model with --tokenizer-pre NAME"
                    .to_string(),
            )
        } else {
            None
        }
    })
}

/// Returns what to do with a file that is no model.
fn of_other(other: NotAModel) -> &'static str {
    match other {
        NotAModel::Adapter => {
            "name the model that the adapter is for; to use both, merge them with llama.cpp's `llama-export-lora` first"
        }
        NotAModel::Projector => "name the model's other .gguf file, which has the text part",
        NotAModel::ImportanceMatrix => {
            "`tier-plan profile --from-imatrix` reads it; to run a model, name the model's file"
        }
        NotAModel::ControlVector => "name the model that the control vector is for",
        NotAModel::Vocabulary => {
            "name a .gguf file with weights; `tier-plan tokenize` takes this one"
        }
        NotAModel::Encoder
        | NotAModel::TextDiffusion
        | NotAModel::ImageDiffusion
        | NotAModel::Speech => "name a model that continues text",
    }
}

fn of_run(error: &RunError) -> Option<String> {
    match error {
        RunError::ContextFull { .. } => Some(
            "pass a larger --context; with a plan, solve again with a larger --context".to_string(),
        ),
        RunError::Gpu(error) => of_cuda(error),
        _ => None,
    }
}

fn of_load(error: &LoadError) -> Option<String> {
    match error {
        LoadError::Context { .. } => Some(
            "pass a smaller --context; with a plan, solve again with a smaller --context"
                .to_string(),
        ),
        LoadError::Gpu { source, .. } => Some(
            of_cuda(source)
                .unwrap_or_else(|| "solve again with --vram 0 to leave the GPU out".to_string()),
        ),
        LoadError::OnGpu {
            group: "kv_cache", ..
        } => Some("solve again: a new plan keeps the KV cache with its attention".to_string()),
        LoadError::OnGpu { tier, group, .. } => Some(format!(
            "solve again with --forbid {tier}:{group}, or with --vram 0"
        )),
        LoadError::FactorOnGpu { .. } => Some(
            "solve again with --vram 0 to leave the GPU out, or with --forbid for that group"
                .to_string(),
        ),
        LoadError::GpuFull { tier, .. } => Some(format!(
            "solve again with a smaller --budget {tier}=SIZE, or free some of the GPU's memory"
        )),
        LoadError::Plan { .. } => {
            Some("make a plan for this model with `tier-plan solve`".to_string())
        }
        LoadError::Node { source, .. } => of_numa(source),
        _ => None,
    }
}

fn of_cuda(error: &CudaError) -> Option<String> {
    match error {
        CudaError::OutOfMemory { .. } => Some("solve again with a smaller --vram".to_string()),
        _ => None,
    }
}

fn of_numa(error: &NumaError) -> Option<String> {
    match error {
        NumaError::Missing { .. } => Some(
            "make a machine file for this machine with `tier-plan probe --numa-tiers`, and solve again".to_string(),
        ),
        NumaError::NodeFull { .. } => Some("solve again with a smaller --budget for the tier".to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, Result, bail};

    #[test]
    fn a_hint_survives_context_and_leaves_the_message_alone() {
        let fail = || -> Result<()> { bail!("--context: 0, expected 1 or more") };
        let error = fail()
            .context("outer")
            .hint("pass more")
            .context("outermost")
            .unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "outermost: outer: --context: 0, expected 1 or more"
        );
        assert_eq!(hint_for(&error).as_deref(), Some("pass more"));
        assert_eq!(hint_for(&fail().unwrap_err()), None);
    }

    #[test]
    fn runtime_errors_get_advice_with_options() {
        let full = Error::from(RunError::ContextFull {
            wanted: 9,
            context: 8,
        })
        .context("generating");
        assert!(hint_for(&full).is_some_and(|hint| hint.contains("--context")));
        let gpu = CudaError::OutOfMemory {
            device: "GPU 0".to_string(),
            wanted: 2,
            free: 1,
        };
        assert!(hint_for(&RunError::Gpu(gpu).into()).is_some_and(|hint| hint.contains("--vram")));
        assert_eq!(hint_for(&RunError::Broken.into()), None);
    }
}
