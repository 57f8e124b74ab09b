//! The model of a command: a positional argument, or `-m/--model`.

use crate::catalogue::Known;
use crate::hint::HintExt;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::profile::{self, Profile};

/// The model file that a command opens.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// GGUF file, the first part of a split model, or a name such as hf:OWNER/REPO:Q4_K_M
    #[arg(
        value_name = "MODEL",
        required_unless_present = "model_option",
        conflicts_with = "model_option"
    )]
    pub model: Option<PathBuf>,
    /// GGUF file, as an option instead of the argument MODEL
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    pub model_option: Option<PathBuf>,
}

impl ModelArgs {
    /// Returns the path or name that was given either way.
    pub fn given_mut(&mut self) -> Option<&mut PathBuf> {
        self.model.as_mut().or(self.model_option.as_mut())
    }

    /// Returns the path that was given either way.
    ///
    /// # Errors
    /// When there is none, which clap reports before.
    pub fn path(&self) -> Result<&Path> {
        self.model
            .as_deref()
            .or(self.model_option.as_deref())
            .context("no model given, expected MODEL or --model")
    }
}

/// The model or shape that a command plans for. It has no `-m`, which was the machine in these
/// commands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelOrShape {
    /// GGUF file, a name such as hf:OWNER/REPO:Q4_K_M, or a shape: a .toml file, or a bundled name
    /// such as kimi-k2.5
    #[arg(
        value_name = "MODEL",
        required_unless_present = "model_option",
        conflicts_with = "model_option"
    )]
    pub model: Option<PathBuf>,
    /// GGUF file or shape, as an option instead of the argument MODEL
    #[arg(long = "model", value_name = "MODEL")]
    pub model_option: Option<PathBuf>,
    /// Quantization to assume for a shape [default: q4_k_m]
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
}

impl ModelOrShape {
    /// Returns the path or name that was given either way.
    pub fn given_mut(&mut self) -> Option<&mut PathBuf> {
        self.model.as_mut().or(self.model_option.as_mut())
    }

    /// Returns the path or name that was given either way.
    ///
    /// # Errors
    /// When there is none, which clap reports before.
    pub fn path(&self) -> Result<&Path> {
        self.model
            .as_deref()
            .or(self.model_option.as_deref())
            .context("no model given, expected MODEL or --model")
    }
}

/// The model or shape that a plan was made for, where the argument of the command is the plan.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelOption {
    /// Model that the plan was made for: a GGUF file, or a shape (.toml, or a name such as
    /// kimi-k2.5)
    #[arg(short, long, value_name = "MODEL")]
    pub model: PathBuf,
    /// Quantization to assume for a shape [default: q4_k_m]
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
    /// Profile that the plan was made from, if any
    #[arg(short = 'P', short_alias = 'p', long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

impl ModelOption {
    /// Reads the profile, if given, and checks that it is of the model.
    ///
    /// # Errors
    /// When it cannot be read, or is of another model.
    pub fn read_profile(&self, model: &Known) -> Result<Option<Profile>> {
        let Some(path) = &self.profile else {
            return Ok(None);
        };
        let profile = profile::read(path)?;
        profile.check_model(&model.sizes.id, path)?;
        Ok(Some(profile))
    }
}

/// Checks that a plan that was made from a profile comes with that profile.
///
/// # Errors
/// When the profile is missing, or another one.
pub fn check_profile(plan: &Placement, path: &Path, profile: Option<&Profile>) -> Result<()> {
    let Some(expected) = &plan.profile else {
        return Ok(());
    };
    let found = match profile {
        Some(profile) if profile.id.hash == expected.hash => return Ok(()),
        Some(profile) => profile.id.to_string(),
        None => "none".to_string(),
    };
    let other = || {
        bail!(
            "--profile: {found}, expected {expected}, which {} was made from",
            path.display()
        )
    };
    other().hint("pass the profile that the plan was made from")
}
