//! The context that a model was trained for, and the warning of a longer one.

use tier_plan_runtime::model::spec::{ModelSpec, RopeScaling};

/// Returns the longest context in tokens that a model was trained for, or that its rotary scaling
/// extends that to. `trained` is the number in its metadata; 0 where there is none.
pub fn longest(spec: &ModelSpec, trained: u32) -> u64 {
    let scaled = |scaling| match scaling {
        RopeScaling::None => 0.0,
        RopeScaling::Linear(factor) => f64::from(trained) * f64::from(factor),
        RopeScaling::Yarn {
            factor,
            original_context,
            ..
        } => f64::from(factor) * f64::from(original_context),
    };
    spec.layers
        .iter()
        .filter_map(|layer| layer.mixer.rope())
        .map(|rope| scaled(rope.scaling).round() as u64)
        .fold(u64::from(trained), u64::max)
}

/// Prints a warning if a context is longer than the `longest` that the model was trained for, as
/// [`longest()`] returns it.
pub fn warn_beyond(context: u64, longest: u64) {
    if let Some(warning) = beyond(context, longest) {
        eprintln!("{warning}");
    }
}

fn beyond(context: u64, longest: u64) -> Option<String> {
    (longest > 0 && context > longest).then(|| {
        format!(
            "warning: the context of {context} tokens is longer than the {longest} that the model was trained for; \
             text past them may be poor"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_longer_context_is_warned_of() {
        assert_eq!(beyond(512, 512), None);
        assert_eq!(beyond(512, 0), None);
        assert_eq!(
            beyond(513, 512).unwrap(),
            "warning: the context of 513 tokens is longer than the 512 that the model was trained for; text past them \
             may be poor"
        );
    }
}
