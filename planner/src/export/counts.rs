//! Expert counts as SGLang's `--init-expert-location` reads them.
//!
//! A JSON object with `logical_count`, `[layers][experts]`. All of the model's layers are there;
//! those without routed experts have zeros. ktransformers reads the same key from a PyTorch file.

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::model::shape::ModelShape;

/// Key that both engines look for.
pub const KEY: &str = "logical_count";

/// Counts how often each expert was chosen, `[layers][experts]`, over all tokens of the profile.
///
/// # Errors
/// When the model has no routed experts, or layers with different numbers of them, which the format
/// cannot express.
pub fn counts(shape: &ModelShape, profile: &Profile) -> Result<Vec<Vec<u64>>> {
    let Some(first) = shape.experts.first() else {
        bail!(
            "'{}' has no routed experts, so there is nothing to count",
            shape.id.name
        );
    };
    let n_expert = first.n_expert;
    ensure!(
        shape.experts.iter().all(|e| e.n_expert == n_expert) && profile.n_expert == n_expert,
        "the layers of '{}' differ in their number of experts, which a table of counts can't say",
        shape.id.name
    );
    let mut table = vec![vec![0; n_expert as usize]; shape.n_layer as usize];
    for (layer, counted) in profile.layers.iter().zip(profile.counts(None, None, None)) {
        let Some(row) = table.get_mut(*layer as usize) else {
            bail!(
                "the profile has a layer {layer}, but '{}' has {}",
                shape.id.name,
                shape.n_layer
            );
        };
        *row = counted;
    }
    Ok(table)
}

/// Encodes counts as the JSON file.
pub fn to_json(counts: &[Vec<u64>]) -> Value {
    json!({ KEY: counts })
}

/// Decodes the counts of such a file.
///
/// # Errors
/// When the value has another structure.
pub fn from_json(value: &Value) -> Result<Vec<Vec<u64>>> {
    let rows = value.get(KEY).and_then(Value::as_array);
    let Some(rows) = rows else {
        bail!("expected a table named '{KEY}'")
    };
    let row = |row: &Value| {
        row.as_array()?
            .iter()
            .map(Value::as_u64)
            .collect::<Option<Vec<u64>>>()
    };
    let table: Option<Vec<Vec<u64>>> = rows.iter().map(row).collect();
    let Some(table) = table else {
        bail!("'{KEY}' holds something else than rows of counts")
    };
    ensure!(
        table.windows(2).all(|w| w[0].len() == w[1].len()),
        "the rows of '{KEY}' differ in length"
    );
    Ok(table)
}
