//! How a model's experts are used, as the best profile there is shows.

use super::learn::is_enough;
use super::place::Place;
use crate::printable::printable;
use crate::profile::Evidence;
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::{self, Profile, PromptTrace};
use tier_plan_runtime::model::shape::ModelShape;

/// Profile that a user put beside what is kept of a model.
pub(super) const GIVEN: &str = "model.profile";

/// What runs of the model chose.
pub(super) const LEARNED: &str = "learned.profile";

/// What was learned when the present plan was made.
pub(super) const PLANNED: &str = "planned.profile";

/// Part (1/n) of what was learned that must be new to a plan before another one is made of it.
const NEW_FRACTION: u64 = 2;

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

/// Whether much of what was learned is new to the profile that a plan was made of. What was learned is
/// a sample that does not grow any more once it is full, and whose texts are replaced then.
fn is_much(learned: &Profile, planned: &Profile) -> bool {
    let known: HashMap<&str, &PromptTrace> = planned
        .prompts
        .iter()
        .map(|text| (text.name.as_str(), text))
        .collect();
    // Numbers of texts begin anew when the file is removed.
    let is_known = |text: &&PromptTrace| {
        known
            .get(text.name.as_str())
            .is_some_and(|known| known.experts == text.experts)
    };
    let decoded = |text: &PromptTrace| u64::from(text.decode_tokens);
    let all: u64 = learned.prompts.iter().map(decoded).sum();
    let before: u64 = planned.prompts.iter().map(decoded).sum();
    let old: u64 = learned.prompts.iter().filter(is_known).map(decoded).sum();
    (all - old).saturating_mul(NEW_FRACTION) >= all.max(before)
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
    let next = learned.filter(|learned| {
        let is_new = planned
            .as_ref()
            .is_none_or(|planned| is_much(learned, planned));
        is_new && is_enough(learned)
    });
    let (profile, path) = match (next, planned) {
        (Some(learned), _) => {
            let learned = learned.identified();
            let kept = place.keep(PLANNED, notes, |path| learned.write(path));
            (learned, kept.or_else(|| place.file(LEARNED)))
        }
        (None, Some(planned)) => (planned, place.file(PLANNED)),
        (None, None) => return None,
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

/// Returns a profile's path, and what it has of which model.
pub(super) fn shown(path: &Path, model: &SourceId) -> String {
    let shown = path.display();
    if !path.exists() {
        return format!("{shown} (not there yet)");
    }
    let Ok(found) = profile::read(path) else {
        return format!("{shown} (damaged)");
    };
    let name = printable(&found.model.name);
    match found.check_model(model, path) {
        Ok(()) => format!(
            "{shown} (of {name}: {} texts, {} tokens)",
            found.prompts.len(),
            found.n_tokens(None, None)
        ),
        Err(_) => format!("{shown} (of {name}, another model)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundled;
    use tier_plan_runtime::formats::profile::Split;
    use tier_plan_runtime::gguf::Gguf;
    use tier_plan_runtime::model::describe;
    use tier_plan_runtime::model::shape::shape_of;

    /// What was learned of the demo model, with texts of so many decoded tokens by number.
    struct Learned {
        profile: Profile,
        shape: ModelShape,
        _state: tempfile::TempDir,
        place: Place,
    }

    impl Learned {
        fn new() -> Self {
            let gguf = Gguf::open(&bundled::path("demo/demo.gguf").unwrap()).unwrap();
            let spec = describe(&gguf).unwrap();
            let state = tempfile::tempdir().unwrap();
            let mut place = Place::below(Some(state.path()), &gguf.id());
            assert_eq!(place.make(), None);
            Self {
                profile: Profile::of_model(gguf.id(), &spec, "a test".into()).unwrap(),
                shape: shape_of(&gguf, &spec),
                _state: state,
                place,
            }
        }

        /// Writes what was learned: texts `numbers`, each of `n_decoded` tokens that choose `expert` and
        /// those after it.
        fn write(&mut self, numbers: std::ops::Range<u64>, n_decoded: u32, expert: u16) {
            let of_token = self.profile.layers.len() * self.profile.n_used as usize;
            let (n, n_used) = (of_token * n_decoded as usize, self.profile.n_used as usize);
            let text = |number: u64| PromptTrace {
                domain: "served".into(),
                name: format!("text-{number}"),
                split: if number % 4 == 2 {
                    Split::HeldOut
                } else {
                    Split::Train
                },
                prompt_tokens: 0,
                decode_tokens: n_decoded,
                experts: (0..n).map(|i| expert + (i % n_used) as u16).collect(),
                weights: vec![100; n],
            };
            self.profile.prompts = numbers.map(text).collect();
            let path = self.place.file(LEARNED).unwrap();
            self.profile.write(&path).unwrap();
        }

        /// Returns the numbers of the texts that plans are made of.
        fn planned(&self) -> Option<Vec<u64>> {
            let mut notes = Vec::new();
            let uses = learned(&self.place, &self.shape, &mut notes);
            assert_eq!(notes, Vec::<String>::new());
            let profile = uses?.profile.unwrap();
            let number = |text: &PromptTrace| text.name["text-".len()..].parse().unwrap();
            Some(profile.prompts.iter().map(number).collect())
        }
    }

    #[test]
    fn plans_are_made_anew_when_half_of_what_was_learned_is_new() {
        let mut learned = Learned::new();
        assert_eq!(learned.planned(), None);
        learned.write(1..3, 3, 0);
        assert_eq!(learned.planned(), None, "too little");
        learned.write(1..9, 1000, 0);
        let of = |numbers: std::ops::Range<u64>| Some(numbers.collect::<Vec<u64>>());
        assert_eq!(learned.planned(), of(1..9));
        learned.write(1..16, 1000, 0);
        assert_eq!(learned.planned(), of(1..9), "less than half");
        learned.write(1..17, 1000, 0);
        assert_eq!(learned.planned(), of(1..17));
        // A sample that is full has no more tokens, but other texts.
        learned.write(8..24, 1000, 0);
        assert_eq!(learned.planned(), of(1..17), "seven of sixteen");
        learned.write(9..25, 1000, 0);
        assert_eq!(learned.planned(), of(9..25));
    }

    #[test]
    fn profiles_are_shown_with_their_model() {
        let mut learned = Learned::new();
        let path = learned.place.file(LEARNED).unwrap();
        let id = learned.profile.model.clone();
        let ends = |model: &SourceId, words: &str| {
            let found = shown(&path, model);
            assert!(found.ends_with(words), "{found}");
        };
        ends(&id, "(not there yet)");
        learned.write(1..3, 5, 0);
        ends(&id, &format!("(of {}: 2 texts, 10 tokens)", id.name));
        let other = SourceId::of_bytes("other", b"x");
        ends(&other, &format!("(of {}, another model)", id.name));
        std::fs::write(&path, "x").unwrap();
        ends(&id, "(damaged)");
    }

    #[test]
    fn what_is_learned_after_the_file_was_removed_counts() {
        let mut learned = Learned::new();
        learned.write(1..9, 1000, 0);
        assert!(learned.planned().is_some());
        std::fs::remove_file(learned.place.file(LEARNED).unwrap()).unwrap();
        assert_eq!(learned.planned().map(|texts| texts.len()), Some(8));
        // The texts have the numbers of others.
        learned.write(1..4, 1000, 1);
        assert_eq!(learned.planned().map(|texts| texts.len()), Some(8));
        learned.write(1..5, 1000, 1);
        assert_eq!(learned.planned().map(|texts| texts.len()), Some(4));
    }
}
