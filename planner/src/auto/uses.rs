//! How a model's experts are used, as the best profile there is shows.

use super::learn::is_enough;
use super::place::Place;
use crate::printable::printable;
use crate::profile::Evidence;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::profile::{self, Phase, Profile};
use tier_plan_runtime::model::shape::ModelShape;

/// Profile that a user put beside what is kept of a model.
pub(super) const GIVEN: &str = "model.profile";

/// What runs of the model chose.
pub(super) const LEARNED: &str = "learned.profile";

/// What was learned when the present plan was made.
pub(super) const PLANNED: &str = "planned.profile";

/// Factor by which what was learned grows before another plan is made of it.
const GROWTH: u64 = 2;

/// How experts are used.
pub(super) struct Uses {
    pub evidence: Evidence,
    pub profile: Option<Profile>,
    /// The profile's file, if it has one.
    pub path: Option<PathBuf>,
    /// Clause on where it is from.
    pub from: String,
}

/// Returns the profile that was asked for, else the one beside the model, one that the user put into
/// the state folder, or what was learned, else none.
///
/// # Errors
/// When the profile that was asked for is unusable.
pub(super) fn find(
    place: &Place,
    asked: Option<&Path>,
    model: &Path,
    shape: &ModelShape,
    notes: &mut Vec<String>,
) -> Result<Uses> {
    if let Some(path) = asked {
        return of_file(path, shape, format!("profile {}", path.display()));
    }
    let beside = Some(model.with_extension("profile")).filter(|path| path.exists());
    for path in beside.into_iter().chain(place.found(GIVEN)) {
        match of_file(&path, shape, format!("profile {}", path.display())) {
            Ok(uses) => return Ok(uses),
            Err(error) => notes.push(format!(
                "note: a profile is not used: {}",
                printable(&format!("{error:#}"))
            )),
        }
    }
    match learned(place, shape, notes) {
        Some(uses) => Ok(uses),
        None => Ok(Uses {
            evidence: Evidence::uniform(shape)?,
            profile: None,
            path: None,
            from: "no profile, so all experts are assumed to be equally likely".to_string(),
        }),
    }
}

fn of_file(path: &Path, shape: &ModelShape, from: String) -> Result<Uses> {
    let profile = profile::read(path)?;
    profile.check_model(&shape.id, path)?;
    let evidence =
        Evidence::new(shape, Some(&profile)).with_context(|| path.display().to_string())?;
    Ok(Uses {
        evidence,
        profile: Some(profile),
        path: Some(path.to_path_buf()),
        from,
    })
}

/// Returns what was learned, if that is enough. It stays as it is until there is much more, so that
/// not every start makes another plan.
fn learned(place: &Place, shape: &ModelShape, notes: &mut Vec<String>) -> Option<Uses> {
    let mut read = |name: &str| {
        let path = place.found(name)?;
        let found = profile::read(&path).and_then(|profile| {
            profile.check_model(&shape.id, &path)?;
            Ok(profile)
        });
        match found {
            Ok(profile) => Some(profile),
            Err(error) => {
                notes.push(format!(
                    "note: a damaged profile is set aside, and it is made anew: {}",
                    printable(&error.to_string())
                ));
                if place.is_writable() {
                    // What cannot be set aside is told of again.
                    let _ = std::fs::rename(&path, path.with_extension("profile.damaged"));
                }
                None
            }
        }
    };
    let (learned, planned) = (read(LEARNED), read(PLANNED));
    let decoded = |profile: &Profile| profile.n_tokens(Some(Phase::Decode), None);
    let all = learned.as_ref().map_or(0, &decoded);
    let (profile, path) = match planned {
        Some(planned) if all < GROWTH.saturating_mul(decoded(&planned)) => {
            (planned, place.file(PLANNED))
        }
        _ => {
            let learned = learned.filter(is_enough)?.identified();
            let kept = place.keep(PLANNED, notes, |path| learned.write(path));
            (learned, kept.or_else(|| place.file(LEARNED)))
        }
    };
    let evidence = Evidence::new(shape, Some(&profile)).ok()?;
    let from = format!(
        "what {} texts of earlier runs chose ({} tokens)",
        profile.prompts.len(),
        profile.n_tokens(None, None)
    );
    Some(Uses {
        evidence,
        profile: Some(profile),
        path,
        from,
    })
}
